"""Encode raw shards into latent shards: what training reads.

Reads any WebDataset (directories, paths, globs, {000..009} ranges or fsspec URLs; --key-map names its members) and
writes under --out the directories `train` and, with a held-out share, `heldout`, each with its shards, manifest, index
and null context. A clip takes the bucket of the closest aspect ratio that it is long enough for and is cut into
consecutive windows of its length; what is left at the end is counted. Sound that is missing stays missing: it is never
replaced by silence. The held-out split goes by source file. A killed run continues where it was; other settings are
refused, and so is a directory with shards of other input, unless by --replace.

Codecs and text encoder are the embedded ones by name, or released ones by path: --video-codec and --audio-codec take
files or diffusers folders, --text-encoder the local folder of the language model, with --text-weights for the text
projection. --text-cache features stores a row per text token; context stores what the frozen connectors make of them,
so that training runs without connectors. With --device cuda each worker process has a GPU of its own, in turn.
"""

import json
import logging
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep import console
from data_prep.buckets import PixelBucket, choose, parse_buckets
from data_prep.codec_choice import CodecChoice, Codecs, build_codecs, process_device
from data_prep.jobs import Job, Report, fingerprint, run_jobs
from data_prep.pack import (
    AUDIO_SUFFIXES,
    DROPPED_NAME,
    PACK_NAME,
    VIDEO_SUFFIXES,
    Dropped,
    EmptyCaption,
    drop_reason,
    parse_json,
    read_caption,
)
from data_prep.tables import table, total
from data_prep.tars import Members, file_sha256, list_shards, read_tar, size_of, state_of, write_jsonl
from ltx2_train.codecs import EMBEDDED as EMBEDDED_CODECS
from ltx2_train.codecs.resample import to_stereo
from ltx2_train.data.datasets import save_null_text
from ltx2_train.data.index import build_index
from ltx2_train.data.shards import write_shard
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.geometry import AUDIO_STEPS_PER_SECOND, audio_latent_length
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import MediaInfo, probe
from ltx2_train.media.video import VideoFile, to_tensor
from ltx2_train.record import MANIFEST_NAME, Manifest, Sample, TextCache, TextFeatures
from ltx2_train.rng import derive_seed
from ltx2_train.text import EMBEDDED as EMBEDDED_TEXT
from ltx2_train.text import Quantisation
from ltx2_train.text.encoder import MAX_ROWS

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "heldout"
BATCH_VALUES = 1 << 24  # pixel values of the windows that go through the video codec together
BATCH_WINDOWS = 8  # more only misses the caches
CAPTIONS_TOGETHER = 64  # distinct ones that the text encoder is handed at once
TEXT_KEPT = 1 << 28  # bytes of the text of captions that may come again
LATENT_STEP = 1 / AUDIO_STEPS_PER_SECOND  # s


class Dtype(StrEnum):
    """Of the tensors in the latent shards."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def torch(self) -> torch.dtype:
        return {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}[self]


@dataclass(kw_only=True, slots=True)
class EncodeConfig:
    """How raw records become latent records. What changes them stands in the manifest."""

    buckets: list[PixelBucket]
    """Sizes that clips are brought to."""
    video_codec: str = "dct"
    """Name of the video codec, or the file or folder of a released one."""
    audio_codec: str = "dct"
    """Name of the audio codec, or the file or folder of a released one."""
    vocoder: str | None = None
    """The file or folder of a released vocoder, where it is not that of the audio codec. Encoding does not run it."""
    text_encoder: str = "hashed"
    """Name of the text encoder, or the local folder of the language model of a released one."""
    text_weights: str | None = None
    """The file or folder with the text projection of a released text encoder."""
    text_cache: TextCache = TextCache.FEATURES
    """What is stored of a caption: features, or the context behind the connectors."""
    connectors: str | None = None
    """The file or folder with the connectors, for text_cache=context; None: text_weights, one file with all."""
    text_quantisation: Quantisation = Quantisation.NONE
    """Of the released text encoder's language model."""
    video_text_width: int | None = None
    """Width of the text features beside the video; None: what the text encoder gives."""
    audio_text_width: int | None = None
    """Width of the text features beside the audio; None: what the text encoder gives."""
    fps: float | None = None
    """Frames per second that clips are brought to; None keeps each clip's own mean rate."""
    audio_tolerance: float = 0.25
    """Seconds by which sound may be shorter than its window and is padded; beyond, the window has no audio."""
    audio_only_seconds: float | None = None
    """Window length of records with sound alone, in seconds; None drops them."""
    empty_caption: EmptyCaption = EmptyCaption.KEEP
    """What becomes of records without a caption."""
    holdout: float = 0.0
    """Share of the source files that is held out, by the hash of their names."""
    holdout_count: int = 0
    """Instead of a share: how many source files are held out."""
    key_map: dict[str, list[str]] = field(default_factory=dict)
    """Member extensions of `video`, `audio`, `caption` and `json`; what is not given keeps its default."""
    dtype: Dtype = Dtype.BF16
    """Of latents and text features on disk."""
    device: str = "cpu"
    """Where the codecs and the text encoder run; "cuda": a GPU for each process, in turn."""
    codec_dtype: Dtype | None = None
    """What a released video codec computes in; None: bf16 on a GPU, fp32 elsewhere. Audio is always fp32."""
    chunk_frames: int | None = None
    """Pixel frames that a released video codec takes at once, for clips that do not fit; None: the whole clip."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout: {self.holdout}; need a share in [0, 1)")
        if self.holdout_count < 0 or (self.holdout_count and self.holdout):
            raise ConfigError("holdout, holdout_count: give one of them, not negative")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps: {self.fps}; need more than 0")
        if self.audio_tolerance < 0:
            raise ConfigError(f"audio_tolerance: {self.audio_tolerance} s; need 0 or more")
        if self.audio_only_seconds is not None and self.audio_only_seconds < LATENT_STEP:
            raise ConfigError(f"audio_only_seconds: {self.audio_only_seconds}; need at least {LATENT_STEP}")
        if unknown := sorted(set(self.key_map) - set(KEY_MAP)):
            raise ConfigError(f"key_map: {unknown[0]!r} is none of {', '.join(KEY_MAP)}")
        if self.chunk_frames is not None and (self.chunk_frames < 8 or self.chunk_frames % 8):
            raise ConfigError(f"chunk_frames: {self.chunk_frames}; need a multiple of 8")
        if self.chunk_frames is not None and self.video_codec in EMBEDDED_CODECS:
            raise ConfigError(f"chunk_frames: the video codec {self.video_codec!r} takes whole clips; leave it away")
        if self.text_cache is TextCache.CONTEXT and self.text_weights is None and self.connectors is None:
            raise ConfigError("text_cache: a context needs connectors; give --connectors, the file that holds them")


KEY_MAP = {
    "video": [suffix[1:] for suffix in VIDEO_SUFFIXES],
    "audio": [suffix[1:] for suffix in AUDIO_SUFFIXES],
    "caption": ["txt", "caption"],
    "json": ["json"],
}


@dataclass(frozen=True, slots=True)
class Window:
    """One future sample: everything but its latents and text features."""

    key: str
    source: str
    caption: str
    fps: float
    frames: Tensor | None  # (3, F, H, W) fp32 in [-1, 1]
    waveform: Tensor | None  # (2, N) fp32
    rate: int  # Hz
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RawShard:
    """The input of one job."""

    url: str
    digest: str | None  # its SHA-256, where that is known
    held_out: frozenset[str] | None  # its sources that are held out; None: the share of `EncodeConfig` decides


def encode(
    raw: Sequence[str], out: Path, config: EncodeConfig, workers: int = 1, replace: bool = False
) -> dict[str, dict[str, int]]:
    """Encode the raw shards that `raw` names into `out`; returns the counts of each split. See the module's text.

    `replace`: remove the shards of other input from `out`, where they are else an error.
    """
    jobs = _jobs(list_shards(raw), config)
    codecs = build_codecs(codec_choice(config))
    settings = _settings(config, codecs)
    reports = run_jobs(encode_shard, jobs, out, settings, config, workers, replace)
    _refuse_repeated_keys(jobs, reports)
    write_jsonl(out / DROPPED_NAME, (row for report in reports for row in report.dropped))
    counts, told = {}, {"raw": _origins(jobs), "paths": _paths(config)}
    for split in (TRAIN, HELD_OUT):
        if any(name.startswith(f"{split}/") for report in reports for name in report.outputs):
            counts[split] = _finish(out, split, reports, settings | told, codecs)
    if not counts:
        dropped = total(report.counts for report in reports)
        raise DataError(f"{out}: nothing was kept ({dropped}). The reasons are in {out / DROPPED_NAME}")
    return counts | {"all": total(report.counts for report in reports)}


def _jobs(shards: Sequence[str], config: EncodeConfig) -> list[Job]:
    known = _known_digests(shards)
    held_out = _held_out_sources(shards, config) if config.holdout_count else {}
    jobs = []
    for place, url in enumerate(shards):
        shard, name = RawShard(url, known.get(url), held_out.get(url)), _job_name(shards, place)
        # Held-out sources change when shards are added: a shard that has such a one is other input than before.
        mark = fingerprint([shard.digest or state_of(url), sorted(shard.held_out or ())])
        outputs = tuple(f"{split}/{name}.tar" for split in (TRAIN, HELD_OUT))
        jobs.append(Job(name, mark, shard, outputs, url if "://" in url else str(Path(url).resolve())))
    return jobs


def codec_choice(config: EncodeConfig) -> CodecChoice:
    """What `config` says of codecs and text encoder."""
    is_context = config.text_cache is TextCache.CONTEXT
    return CodecChoice(
        video=config.video_codec,
        audio=config.audio_codec,
        vocoder=config.vocoder,
        text=config.text_encoder,
        text_weights=config.text_weights,
        text_dtype=text_dtype.torch if (text_dtype := _text_dtype(config)) else None,
        connectors=config.connectors or config.text_weights if is_context else None,
        quantisation=config.text_quantisation,
        widths=(config.video_text_width, config.audio_text_width),
        device=process_device(config.device),
        video_dtype=dtype.torch if (dtype := _codec_dtype(config)) else None,
    )


def _codec_dtype(config: EncodeConfig) -> Dtype | None:
    """What a released video codec computes in; the embedded one takes no notice."""
    if config.video_codec in EMBEDDED_CODECS:
        return None
    return config.codec_dtype or _dtype_on(config.device)


def _text_dtype(config: EncodeConfig) -> Dtype | None:
    """What a released text encoder computes in, and the connectors behind it; the embedded one takes no notice."""
    return None if config.text_encoder in EMBEDDED_TEXT else _dtype_on(config.device)


def _dtype_on(device: str) -> Dtype:
    return Dtype.BF16 if device.startswith("cuda") else Dtype.FP32


def _settings(config: EncodeConfig, codecs: Codecs) -> dict[str, Any]:
    """What the latents depend on, as it stands in the manifest. Another value is another dataset.

    Files are known by what they hold and not by where they lie.
    """
    fields = asdict(config) | {
        "buckets": ";".join(map(str, config.buckets)),
        "dtype": config.dtype.value,
        "codec_dtype": _codec_dtype(config),
        "empty_caption": config.empty_caption.value,
        "key_map": KEY_MAP | config.key_map,
        "crop": "centre",
        "resize": "bicubic, antialiased, covering",
        "video_codec": codecs.video.name,
        "audio_codec": codecs.audio.name,
        "text_encoder": codecs.text.name,
        "text_dtype": _text_dtype(config),
        "text_cache": config.text_cache.value,
        "text_quantisation": config.text_quantisation.value,
        "video_text_width": codecs.text.video_width,
        "audio_text_width": codecs.text.audio_width,
        "code_version": code_version(),
    }
    for name in ("device", "chunk_frames", "vocoder", "text_weights", "connectors"):
        del fields[name]
    return fields


def _paths(config: EncodeConfig) -> dict[str, str]:
    """Where the released components lie, by setting: for sampling, to find them again."""
    named = {name: getattr(config, name) for name in ("video_codec", "audio_codec", "text_encoder")}
    paths = {name: value for name, value in named.items() if value not in (*EMBEDDED_CODECS, *EMBEDDED_TEXT)}
    paths |= {name: getattr(config, name) for name in ("vocoder", "text_weights", "connectors")}
    return {name: str(Path(path).resolve()) for name, path in paths.items() if path is not None}


def code_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ltx2_train")
    except PackageNotFoundError:
        return "not installed"


def _known_digests(shards: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the shards whose directory has a `pack.json`."""
    folders = {Path(url).parent for url in shards if "://" not in url}
    listings = {folder: folder / PACK_NAME for folder in folders if (folder / PACK_NAME).exists()}
    named = {folder: json.loads(listing.read_text())["shards"] for folder, listing in listings.items()}
    digests = {url: named.get(Path(url).parent, {}).get(Path(url).name) for url in shards}
    return {url: digest for url, digest in digests.items() if digest}


def _job_name(shards: Sequence[str], place: int) -> str:
    """The name of a latent shard: that of its raw shard, with its place in front where two have the same name."""
    stems = [url.rsplit("/", 1)[-1].removesuffix(".tar") for url in shards]
    return stems[place] if stems.count(stems[place]) == 1 else f"{place:06d}-{stems[place]}"


def _origins(jobs: Sequence[Job]) -> dict[str, str]:
    """Name of each raw shard and its hash, or its size where that is not known, by the name of its latent shard."""
    shards = {f"{job.name}.tar": job.payload for job in jobs}
    marks = {name: shard.digest or f"size {size_of(shard.url)}" for name, shard in shards.items()}
    return {name: f"{shard.url.rsplit('/', 1)[-1]} {marks[name]}" for name, shard in shards.items()}


def _refuse_repeated_keys(jobs: Sequence[Job], reports: Sequence[Report]) -> None:
    first: dict[str, str] = {}
    for job, report in zip(jobs, reports, strict=True):
        for key in report.keys:
            if key in first:
                where = f"{first[key]} and {job.payload.url}"
                raise DataError(f"key {key!r} comes twice, in {where}. Give every clip a key of its own")
            first[key] = job.payload.url


# --- held-out split ---


def source_hash(source: str) -> int:
    """A number in [0, 2^63) that depends on the source's name alone."""
    return derive_seed("held out", source)


def _held_out_sources(shards: Sequence[str], config: EncodeConfig) -> dict[str, frozenset[str]]:
    """Which of its sources each shard holds out: in all, the `holdout_count` of smallest hash. Reads all shards once."""
    sources = {url: _sources(url, config) for url in shards}
    every = set().union(*sources.values())
    if len(every) <= config.holdout_count:
        raise ConfigError(f"holdout_count: {config.holdout_count}; need less than the {len(every)} source files")
    held_out = set(sorted(every, key=source_hash)[: config.holdout_count])
    return {url: frozenset(there & held_out) for url, there in sources.items()}


def _sources(url: str, config: EncodeConfig) -> set[str]:
    return {_source(key, _raw_json(key, members, config)) for key, members in read_tar(url)}


def _split(source: str, config: EncodeConfig, held_out: AbstractSet[str] | None) -> str:
    if held_out is not None:
        return HELD_OUT if source in held_out else TRAIN
    return HELD_OUT if source_hash(source) < config.holdout * 2**63 else TRAIN


# --- one shard ---


def encode_shard(job: Job, directory: Path, config: EncodeConfig) -> Report:
    """Write the latent shards of one raw shard. Raises `DataError` for a damaged one and for latents with NaN."""
    shard: RawShard = job.payload
    is_verified = _verify(shard)
    for split in (TRAIN, HELD_OUT):  # while a shard is replaced, the directory is not finished
        (directory / split / MANIFEST_NAME).unlink(missing_ok=True)
    counts: dict[str, int] = {}
    dropped: list[dict[str, str]] = []
    held_out: list[Sample] = []  # waits for the end, while the larger split is written as it comes
    samples = _shard_samples(shard, config, counts, dropped, decode=not is_verified)
    train, rest = (f"{split}/{job.name}.tar" for split in (TRAIN, HELD_OUT))
    keys = {train: _write(directory / train, _without_held_out(samples, held_out))}
    keys[rest] = _write(directory / rest, iter(held_out))
    digests = {name: file_sha256(str(directory / name)) for name, written in keys.items() if written}
    return Report(digests, counts, dropped, [key for written in keys.values() for key in written])


def _shard_samples(
    shard: RawShard, config: EncodeConfig, counts: dict[str, int], dropped: list[dict[str, str]], decode: bool
) -> Iterator[Sample]:
    """The samples of a raw shard, one at a time; what becomes of its clips is counted and named."""
    codecs = build_codecs(codec_choice(config))
    for sample in encode_windows(_windows(shard.url, config, counts, dropped, decode), codecs, config):
        split = sample.meta["split"] = _split(sample.meta["source"], config, shard.held_out)
        if cut := codecs.text.rows_cut(sample.caption):
            _count(counts, "caption_cut")
            detail = f"kept, but {codecs.text.name} left away the last {cut} rows of its caption"
            dropped.append({"file": sample.key, "shard": shard.url, "reason": "caption_cut", "detail": detail})
        _tally(counts, sample, split)
        _tally_text(counts, sample, codecs, config)
        yield sample


def _without_held_out(samples: Iterator[Sample], held_out: list[Sample]) -> Iterator[Sample]:
    for sample in samples:
        if sample.meta["split"] == HELD_OUT:
            held_out.append(sample)
        else:
            yield sample


def _write(path: Path, samples: Iterator[Sample]) -> list[str]:
    """Writes a shard as its samples come, and returns their keys; none if there is no sample."""
    first = next(samples, None)
    if first is None:
        return []
    keys: list[str] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, _noted(chain([first], samples), keys))
    return keys


def _noted(samples: Iterable[Sample], keys: list[str]) -> Iterator[Sample]:
    for sample in samples:
        keys.append(sample.key)
        yield sample


def _verify(shard: RawShard) -> bool:
    """True when the shard's hash is known and right. Raises `DataError` when it is wrong."""
    if shard.digest is None:
        return False
    if (found := file_sha256(shard.url)) != shard.digest:
        told = shard.digest[:12]
        raise DataError(f"{shard.url}: its SHA-256 is {found[:12]}..., {PACK_NAME} says {told}...: damaged or "
                        "truncated. Copy the shard again, or delete it and re-run data_prep.pack")  # fmt: skip
    return True


def _tally(counts: dict[str, int], sample: Sample, split: str) -> None:
    kinds = {"va": "with_video_and_audio", "v": "video_only", "a": "audio_only"}
    for name in ("kept", f"kept_{split}", f"{split}_{kinds[sample.bucket.signature]}"):
        _count(counts, name)


def _tally_text(counts: dict[str, int], sample: Sample, codecs: Codecs, config: EncodeConfig) -> None:
    """Bytes of the sample's text as it is stored, and as it would be stored otherwise."""
    both = (sample.text.video, sample.text.audio)
    row_bytes = sum(rows.shape[1] * rows.element_size() for rows in both)
    stored = sum(rows.nbytes for rows in both)
    if config.text_cache is TextCache.CONTEXT:
        features, context = codecs.text.num_rows(sample.caption) * row_bytes, stored
    else:
        features, context = stored, MAX_ROWS * row_bytes
    _count(counts, "text_bytes_as_features", features)
    if config.text_weights or config.connectors:  # there are connectors whose output is or could be stored
        _count(counts, "text_bytes_as_context", context)


def _count(counts: dict[str, int], name: str, number: int = 1) -> None:
    counts[name] = counts.get(name, 0) + number


def _windows(
    url: str, config: EncodeConfig, counts: dict[str, int], dropped: list[dict[str, str]], decode: bool
) -> Iterator[Window]:
    """The windows of all records of a raw shard; dropped records are counted and named with their reason."""
    for key, members in read_tar(url):
        _count(counts, "clips_read")
        try:
            yield from clip_windows(key, members, config, counts, decode)
        except DataError as error:
            reason = drop_reason(error)
            _count(counts, f"dropped_{reason}")
            dropped.append({"file": key, "shard": url, "reason": reason, "detail": str(error)})


def clip_windows(
    key: str, members: Members, config: EncodeConfig, counts: dict[str, int], decode: bool = False
) -> Iterator[Window]:
    """The windows of one raw record. Raises `DataError` with the reason why it has none.

    `decode`: look for damage inside frames first; of packed shards this is known.
    """
    fields = _raw_json(key, members, config)
    for extension in _unread(members, config):
        _count(counts, f"members_not_read_(.{extension})")
    caption = _caption(key, members, fields, config)
    if not caption and config.empty_caption is EmptyCaption.DROP:
        raise Dropped("empty_caption", "no caption; --empty-caption=keep keeps such clips for the null context")
    video, audio = _member(members, "video", config), _member(members, "audio", config)
    shown = probe(video, name=key, decode=decode) if video is not None else None
    sound = audio if audio is not None else video
    heard = probe(audio, name=key, decode=decode) if audio is not None else shown
    heard = _told_bounds(heard, fields) if heard is not None and heard.has_audio else None
    base = Window(key, _source(key, fields), caption, 0.0, None, None, 0, {"truth": _truth(fields)})
    if shown is not None and shown.has_video and video is not None:
        yield from _video_windows(base, video, shown, sound, heard, config, counts)
    elif heard is not None and sound is not None:
        yield from _audio_windows(base, sound, heard, config, counts)
    else:
        raise Dropped("no_video_and_no_audio", f"members: {', '.join(sorted(members))}; --key-map says which is which")


def _video_windows(
    base: Window,
    video: bytes,
    shown: MediaInfo,
    sound: bytes | None,
    heard: MediaInfo | None,
    config: EncodeConfig,
    counts: dict[str, int],
) -> Iterator[Window]:
    fps = shown.fps if config.fps is None or shown.is_image else config.fps
    frames = shown.frames_at(fps)
    bucket = choose(config.buckets, shown.width, shown.height, frames)
    if bucket is None:
        sizes = "; ".join(map(str, config.buckets))
        raise Dropped("too_short", f"{base.key}: {frames} frames at {fps:.3f} fps; buckets: {sizes}")
    if shown.is_variable:
        _count(counts, "variable_frame_rate")
    pieces, rest = divmod(frames, bucket.frames)
    if rest:
        _count(counts, "remainder_frames", rest)
    with VideoFile(video, info=shown) as file:
        for piece in range(pieces):
            start = piece * bucket.frames / fps
            waveform = _window_sound(sound, heard, start, bucket.frames, fps, config, counts)
            yield replace(
                base,
                key=_window_key(base.key, piece, pieces),
                fps=fps,
                frames=to_tensor(file.frames(start, bucket.frames, fps, (bucket.width, bucket.height))),
                waveform=waveform,
                rate=heard.sample_rate if heard is not None else 0,
                meta=_window_meta(base, start, bucket.frames / fps, (shown.width, shown.height)),
            )


def _window_sound(
    sound: bytes | None,
    heard: MediaInfo | None,
    start: float,
    frames: int,
    fps: float,
    config: EncodeConfig,
    counts: dict[str, int],
) -> Tensor | None:
    """The stereo waveform beside a window; None where there is no sound or too little of it."""
    steps = audio_latent_length(frames, fps)
    if heard is None or sound is None or not steps:
        return None
    if not _is_heard(heard, start, frames / fps, config, counts):
        return None
    # As much sound as the latent steps cover: what lies beside the window's edge is heard, not invented.
    return to_stereo(read_audio(sound, start=start, duration=steps * LATENT_STEP, info=heard)[0])


def _is_heard(heard: MediaInfo, start: float, length: float, config: EncodeConfig, counts: dict[str, int]) -> bool:
    """Whether a window has enough sound; what is missing is counted."""
    limit = max(config.audio_tolerance, LATENT_STEP)
    missing = heard.missing_audio(start, length)
    if missing > limit:
        is_gap = replace(heard, audio_gaps=()).missing_audio(start, length) <= limit
        _count(counts, f"audio_{'with_gaps' if is_gap else 'too_short'}_treated_as_missing")
    elif missing > LATENT_STEP:
        _count(counts, "audio_padded")
    return missing <= limit


def _audio_windows(
    base: Window, sound: bytes, heard: MediaInfo, config: EncodeConfig, counts: dict[str, int]
) -> Iterator[Window]:
    length = config.audio_only_seconds
    if length is None:
        raise Dropped("audio_only", f"{base.key}: sound without picture; --audio-only-seconds keeps such records")
    pieces = int(heard.audio_end / length + 1e-6)
    if not pieces:
        raise Dropped("too_short", f"{base.key}: {heard.audio_end:.2f} s of sound; --audio-only-seconds is {length}")
    if rest := round(1000 * (heard.audio_end - pieces * length)):
        _count(counts, "remainder_audio_milliseconds", rest)
    heard_pieces = [i for i in range(pieces) if _is_heard(heard, i * length, length, config, counts)]
    if not heard_pieces:
        raise Dropped("no_sound_in_any_window", f"{base.key}: gaps in its track reach into every window")
    for piece in heard_pieces:
        waveform, rate = read_audio(sound, start=piece * length, duration=length, info=heard)
        yield replace(
            base,
            key=_window_key(base.key, piece, pieces),
            fps=float(AUDIO_STEPS_PER_SECOND),
            waveform=to_stereo(waveform),
            rate=rate,
            meta=_window_meta(base, piece * length, length, None),
        )


def _window_key(key: str, piece: int, pieces: int) -> str:
    return key if pieces == 1 else f"{key}-w{piece:04d}"


def _window_meta(base: Window, start: float, length: float, size: tuple[int, int] | None) -> dict[str, Any]:
    meta = base.meta | {"source": base.source, "start": round(start, 6), "duration": round(length, 6)}
    return meta | ({"source_size": list(size)} if size else {})


def _told_bounds(heard: MediaInfo, fields: Mapping[str, Any]) -> MediaInfo:
    """Where there truly is sound, as the raw record tells it: the sound of a cut segment is padded to its length."""
    start = max(heard.audio_start, float(fields.get("audio_start", heard.audio_start)))
    end = min(heard.audio_end, float(fields.get("audio_end", heard.audio_end)))
    gaps = fields.get("audio_gaps")
    told = tuple((float(begin), float(end)) for begin, end in gaps) if gaps else heard.audio_gaps
    return replace(heard, audio_start=start, audio_end=end, audio_gaps=told)


def _member(members: Members, role: str, config: EncodeConfig) -> bytes | None:
    return members[name] if (name := _member_name(members, role, config)) else None


def _member_name(members: Members, role: str, config: EncodeConfig) -> str | None:
    return next((name for name in config.key_map.get(role, KEY_MAP[role]) if name in members), None)


def _unread(members: Members, config: EncodeConfig) -> list[str]:
    """Extensions of the members that no role takes."""
    return sorted(set(members) - {_member_name(members, role, config) for role in KEY_MAP})


def _raw_json(key: str, members: Members, config: EncodeConfig) -> dict[str, Any]:
    text = _member(members, "json", config)
    try:
        fields = parse_json(text) if text is not None else {}
    except ValueError as error:
        raise DataError(f"{key}: corrupt json ({error}). Re-run data_prep.pack for its shard") from error
    return fields if isinstance(fields, dict) else {"value": fields}


def _caption(key: str, members: Members, fields: Mapping[str, Any], config: EncodeConfig) -> str:
    text = _member(members, "caption", config)
    return read_caption(text, key) if text is not None else str(fields.get("caption", "")).strip()


def _source(key: str, fields: Mapping[str, Any]) -> str:
    return str(fields.get("source", key))


def _truth(fields: Mapping[str, Any]) -> Any:
    """What the metadata said beside the caption; of a foreign record all of its json."""
    return fields.get("truth", {k: v for k, v in fields.items() if k != "caption"})


# --- codecs ---


def encode_windows(windows: Iterator[Window], codecs: Codecs, config: EncodeConfig) -> Iterator[Sample]:
    """The samples of windows, in their order.

    Windows of one shape that follow each other share the codecs' calls; captions wait for each other, so that many share
    the text encoder's.
    """
    texts: dict[str, TextFeatures] = {}
    waiting: list[_Latents] = []
    for batch in _batches(windows):
        latents = zip(batch, _encode_video(batch, codecs, config), _encode_audio(batch, codecs), strict=True)
        waiting += [
            (replace(w, frames=None, waveform=None), _stored(v, config), _stored(a, config)) for w, v, a in latents
        ]
        if len({window.caption for window, *_ in waiting} - texts.keys()) >= CAPTIONS_TOGETHER:
            yield from _samples(waiting, texts, codecs, config)
            waiting = []
    yield from _samples(waiting, texts, codecs, config)


_Latents = tuple[Window, Tensor | None, Tensor | None]  # a window without its media, its video, its audio


def _samples(
    waiting: Sequence[_Latents], texts: dict[str, TextFeatures], codecs: Codecs, config: EncodeConfig
) -> Iterator[Sample]:
    _encode_text([window.caption for window, *_ in waiting], texts, codecs, config)
    for window, video, audio in waiting:
        sample = Sample(
            key=window.key,
            video=video,
            audio=audio,
            text=texts[window.caption],
            fps=window.fps,
            caption=window.caption,
            meta=window.meta,
        )
        check_finite(sample)
        yield sample


def _batches(windows: Iterator[Window]) -> Iterator[list[Window]]:
    """Consecutive windows of a bounded number of pixel values."""
    batch: list[Window] = []
    values = 0
    for window in windows:
        size = window.frames.numel() if window.frames is not None else 0
        if batch and (len(batch) == BATCH_WINDOWS or values + size > BATCH_VALUES):
            yield batch
            batch, values = [], 0
        batch.append(window)
        values += size
    if batch:
        yield batch


def _encode_text(captions: Sequence[str], texts: dict[str, TextFeatures], codecs: Codecs, config: EncodeConfig) -> None:
    """Put the features of the captions into `texts`; those that are there already are not encoded again."""
    if sum(text.video.nbytes + text.audio.nbytes for text in texts.values()) > TEXT_KEPT:
        for caption in texts.keys() - set(captions):
            del texts[caption]
    new = [caption for caption in dict.fromkeys(captions) if caption not in texts]
    for caption, text in zip(new, codecs.text.encode(new) if new else [], strict=True):
        texts[caption] = _stored_text(text, config)


def _stored_text(text: TextFeatures, config: EncodeConfig) -> TextFeatures:
    return TextFeatures(text.video.to(config.dtype.torch), text.audio.to(config.dtype.torch))


def _encode_video(batch: Sequence[Window], codecs: Codecs, config: EncodeConfig) -> list[Tensor | None]:
    def call(places: list[int]) -> Tensor:
        stacked = torch.stack([frames for i in places if (frames := batch[i].frames) is not None])
        if config.chunk_frames is None:
            return codecs.video.encode(stacked.to(codecs.device)).cpu()
        return codecs.video.encode(stacked, chunk_frames=config.chunk_frames).cpu()  # type: ignore[call-arg]

    return _by_shape([None if w.frames is None else tuple(w.frames.shape) for w in batch], call)


def _encode_audio(batch: Sequence[Window], codecs: Codecs) -> list[Tensor | None]:
    def call(places: list[int]) -> Tensor:
        stacked = torch.stack([waveform for i in places if (waveform := batch[i].waveform) is not None])
        return codecs.audio.encode(stacked.to(codecs.device), batch[places[0]].rate).cpu()

    return _by_shape([None if w.waveform is None else (w.rate, *w.waveform.shape) for w in batch], call)


def _by_shape(shapes: list[Any], call: Any) -> list[Tensor | None]:
    """`call(places)` for the places of each shape, its rows put back in order; None where the shape is None."""
    groups: dict[Any, list[int]] = {}
    for place, shape in enumerate(shapes):
        if shape is not None:
            groups.setdefault(shape, []).append(place)
    result: list[Tensor | None] = [None] * len(shapes)
    with torch.inference_mode():
        for places in groups.values():
            for place, row in zip(places, call(places), strict=True):
                result[place] = row
    return result


def _stored(latents: Tensor | None, config: EncodeConfig) -> Tensor | None:
    return None if latents is None else latents.to(config.dtype.torch)


def check_finite(sample: Sample) -> None:
    """Raises `DataError` naming the key for latents with NaN or infinity: they are refused, not written."""
    text = sample.text
    named = {"video": sample.video, "audio": sample.audio, "video text": text.video, "audio text": text.audio}
    for name, tensor in named.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{sample.key}: the codec gave NaN or infinity in its {name}; nothing is written. "
                            "Look at the clip with data_prep.show, or use --dtype fp32")  # fmt: skip


def _finish(
    out: Path, split: str, reports: Sequence[Report], settings: dict[str, Any], codecs: Codecs
) -> dict[str, int]:
    """Write null context, index and manifest of one split; returns its counts. The manifest comes last: finished."""
    directory = out / split
    outputs = outputs_of(reports, split)
    [null] = codecs.text.encode([""])
    save_null_text(directory, null)
    build_index(directory)
    counts = total(report.counts for report in reports)
    Manifest(
        video_codec=codecs.video.name,
        audio_codec=codecs.audio.name,
        text_encoder=codecs.text.name,
        video_text_width=codecs.text.video_width,
        audio_text_width=codecs.text.audio_width,
        text_cache=settings["text_cache"],
        code_version=settings["code_version"],
        settings=settings | {"split": split},
        shards=outputs,
        counts=counts,
    ).save(directory)
    return {name: number for name, number in counts.items() if name.startswith(split) or name == f"kept_{split}"}


def outputs_of(reports: Sequence[Report], split: str) -> dict[str, str]:
    """SHA-256 of all shards of a split, by file name."""
    pairs = [pair for report in reports for pair in report.outputs.items()]
    return {name.removeprefix(f"{split}/"): digest for name, digest in pairs if name.startswith(f"{split}/")}


def parse_key_map(text: str) -> dict[str, list[str]]:
    """Extensions by role from "video=mp4;webm,caption=txt"."""
    roles = {}
    for part in filter(None, text.split(",")):
        role, separator, names = part.partition("=")
        if not separator or not names:
            raise ConfigError(f'key_map: {part!r}; write "video=mp4,caption=txt"; alternatives: "video=mp4;webm"')
        roles[role.strip()] = [name.strip().lstrip(".").lower() for name in names.split(";")]
    return roles


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("raw", nargs="+", help="raw shards: directories, tars, globs, {000..009} ranges or fsspec URLs")
    parser.add_argument("--out", type=Path, required=True, help="directory for the latent shards")
    parser.add_argument("--buckets", required=True, help='"WxHxF;WxHxF": width and height multiples of 32, F = 8k + 1')
    parser.add_argument("--video-codec", default="dct", help="its name, or the file or folder of a released one")
    parser.add_argument("--audio-codec", default="dct", help="its name, or the file or folder of a released one")
    parser.add_argument("--vocoder", help="where a released one lies, if not with the audio codec; kept for sampling")
    parser.add_argument("--text-encoder", default="hashed", help="its name, or the folder of a language model")
    parser.add_argument("--text-weights", help="file or folder with the text projection of a released text encoder")
    caches = [cache.value for cache in TextCache]
    parser.add_argument("--text-cache", choices=caches, default="features", help="what is stored of a caption")
    parser.add_argument("--connectors", help="file or folder with them, for --text-cache context; None: --text-weights")
    kinds = [kind.value for kind in Quantisation]
    parser.add_argument(
        "--text-quantisation", choices=kinds, default="none", help="of the language model; int8 on a GPU"
    )
    parser.add_argument("--video-text-width", type=int, help="of the features beside the video; hashed: 128")
    parser.add_argument("--audio-text-width", type=int, help="of the features beside the audio; hashed: 128")
    parser.add_argument("--fps", type=float, help="bring all clips to this rate; None: each keeps its own mean rate")
    parser.add_argument("--audio-tolerance", type=float, default=0.25, help="s of missing sound that are padded")
    parser.add_argument("--audio-only-seconds", type=float, help="keep records without picture, in such windows")
    policies = [policy.value for policy in EmptyCaption]
    parser.add_argument("--empty-caption", choices=policies, default="keep", help="clips without a caption")
    parser.add_argument("--holdout", type=float, default=0.0, help="share of the source files to hold out")
    parser.add_argument("--holdout-count", type=int, default=0, help="hold out this many source files instead")
    parser.add_argument("--key-map", default="", help='members of a foreign WebDataset: "video=mp4,caption=txt"')
    parser.add_argument("--dtype", choices=[dtype.value for dtype in Dtype], default="bf16", help="of stored tensors")
    parser.add_argument("--device", default="cpu", help='of codecs and text encoder; "cuda": a GPU per worker, in turn')
    dtypes = [Dtype.BF16.value, Dtype.FP32.value]
    parser.add_argument(
        "--codec-dtype", choices=dtypes, help="of a released video codec; None: bf16 on a GPU, else fp32"
    )
    parser.add_argument("--chunk-frames", type=int, help="pixel frames at once through a released video codec")
    console.add_replace(parser)
    console.add_workers(parser)
    parser.set_defaults(workers=None, cores=parser.get_default("workers"))


def main(argv: Sequence[str] | None = None) -> None:
    example = """python -m data_prep.encode raw --out latents --buckets "64x64x41;64x64x1" --holdout 0.05
  python -m data_prep.encode raw --out latents --buckets "960x544x89" --device cuda --video-codec ltx-2.3.safetensors \\
    --audio-codec ltx-2.3.safetensors --text-encoder gemma-3-12b --text-weights ltx-2.3.safetensors"""
    parser = console.parser("encode", __doc__ or "", example)
    _add_options(parser)
    options = vars(parser.parse_args(argv))
    raw, out, replace = (options.pop(name) for name in ("raw", "out", "replace"))
    workers = default_workers(options.pop("workers"), options["device"], options.pop("cores"))
    options["buckets"] = parse_buckets(options["buckets"])
    options["key_map"] = parse_key_map(options["key_map"])
    for name, kind in KINDS.items():
        options[name] = options[name] and kind(options[name])
    config = EncodeConfig(**options)
    counts = encode(raw, out, config, workers, replace)["all"]
    print(table(f"encoded into {out}", counts))
    print(text_sizes(counts, config.text_cache))
    if any(name.startswith("dropped") or name == "caption_cut" for name in counts):
        print(f"each clip that was dropped or cut, and its reason: {out / DROPPED_NAME}")


def default_workers(asked: int | None, device: str, cores: int) -> int:
    """Processes: as asked, else one per GPU that the device names, or one per core."""
    if asked is not None or not device.startswith("cuda"):
        return cores if asked is None else asked
    return max(1, torch.cuda.device_count()) if device == "cuda" else 1


KINDS = {
    "empty_caption": EmptyCaption,
    "dtype": Dtype,
    "codec_dtype": Dtype,
    "text_cache": TextCache,
    "text_quantisation": Quantisation,
}


def text_sizes(counts: Mapping[str, int], chosen: TextCache) -> str:
    """What the stored text takes, and what it would take the other way."""
    lines = []
    for kind in TextCache:
        if (size := counts.get(f"text_bytes_as_{kind.value}")) is not None:
            how = "stored" if kind is chosen else "not chosen; it would be"
            lines.append(f"text as {kind.value} ({how}): {size:,} bytes, {size // counts['kept']:,} per caption")
    return "\n".join(lines)


if __name__ == "__main__":
    console.run(main)

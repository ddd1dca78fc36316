"""Turn the caches of the LTX reference trainer (`.precomputed`) into latent shards, as data_prep.encode writes them.

Latents and text features are taken over bit by bit; of the text only the valid rows, which are a tenth or less of the
padded files. Nothing is encoded again, so no GPU and no weights are needed. But the folder does not say which VAE and
which text encoder made it, and all generations have latents of the same shape: --video-codec, --audio-codec and
--text-encoder have to say it, by the path of the released file, or as unknown:NAME, where training goes on but nothing
can be decoded. Captions are not in the folder either: --captions takes the metadata file that it was made from.
What is left out, changed or missing is counted, and named with its reason in `dropped.jsonl`. A killed run continues.
"""

import logging
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep import console
from data_prep.dropped import DROPPED_NAME, Dropped, drop
from data_prep.jobs import Job, Report, fingerprint, run_jobs
from data_prep.origin import Origin, known_origin
from data_prep.precomputed import (
    AUDIO,
    TEXT,
    VIDEO,
    Entry,
    Listing,
    audio_latents,
    list_folder,
    text_features,
    video_latents,
)
from data_prep.rows import clip_key, read_metadata
from data_prep.splits import MANIFESTS, SPLITS, code_version, finish, split_of, tally
from data_prep.tables import add, table, total
from data_prep.tars import file_sha256, state_of, write_jsonl
from ltx2_train.data.shards import write_shard
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.geometry import AUDIO_STEPS_PER_SECOND, audio_latent_length, pixel_frames
from ltx2_train.record import Sample, TextCache, TextFeatures

log = logging.getLogger(__name__)

Captions = Mapping[str, tuple[str, str]]  # media path and caption by key
Note = tuple[str, str]  # name of a count, and what to say of the sample, "" for nothing
CACHE_BYTES = "bytes_in_the_caches"  # of the samples that were kept


class Dtype(StrEnum):
    """Of the tensors in the latent shards."""

    KEEP = "keep"
    BF16 = "bf16"
    FP32 = "fp32"

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self is Dtype.KEEP else tensor.to(torch.bfloat16 if self is Dtype.BF16 else torch.float32)


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """How caches become latent records. All of it stands in the manifest."""

    fps: float | None = None
    """Rate of the samples whose file has none; None drops them."""
    audio_tolerance: float = 0.25
    """Seconds by which sound may end before the picture and stays; beyond, the sample has no audio."""
    dtype: Dtype = Dtype.KEEP
    """Of latents and text features on disk; `keep`: as they are."""
    holdout: float = 0.0
    """Share of the samples that is held out, by the hash of their names."""
    samples_per_shard: int = 256
    """Samples of one shard, before the held-out ones are taken out."""

    def __post_init__(self) -> None:
        self.dtype = Dtype(self.dtype)
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps: {self.fps}; need more than 0")
        if not self.audio_tolerance >= 0:
            raise ConfigError(f"audio_tolerance: {self.audio_tolerance} s; need 0 or more")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout: {self.holdout}; need a share in [0, 1)")
        if self.samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard: {self.samples_per_shard}; need at least 1")


@dataclass(frozen=True, slots=True)
class Row:
    """One future record."""

    entry: Entry
    caption: str
    source: str
    split: str


@dataclass(frozen=True, slots=True)
class Work:
    """What every job needs besides its rows."""

    config: ImportConfig
    widths: tuple[int, int]  # of the text features
    has_audio: bool  # the folder has sound, so that a sample without is worth a line


def import_precomputed(
    folder: Path,
    out: Path,
    config: ImportConfig,
    origin: Origin,
    captions: Captions | None = None,
    workers: int = 1,
    replace: bool = False,
) -> dict[str, int]:
    """Write the samples of a `.precomputed` folder as latent shards under `out`; returns the counts of all of it.

    `origin`: what made the latents and features. `captions`: media path and caption by key. Raises `DataError` when
    nothing is kept, and what `run_jobs` raises.
    """
    listing = list_folder(folder)
    rows = [_row(entry, captions or {}, config) for entry in listing.entries]
    work = Work(config, (origin.text.video_width, origin.text.audio_width), AUDIO in listing.kinds)
    settings = _settings(config, origin)
    jobs = _jobs(rows, folder, config)
    reports = run_jobs(import_shard, jobs, out, settings, work, workers, replace, finished_by=MANIFESTS)
    dropped = listing.dropped + [line for report in reports for line in report.dropped]
    write_jsonl(out / DROPPED_NAME, dropped)
    counts = total([_listing_counts(listing, rows, captions), *(report.counts for report in reports)])
    if not counts.get("kept"):
        raise DataError(f"{out}: nothing was kept ({counts}). The reasons are in {out / DROPPED_NAME}")
    for split in SPLITS:
        if counts.get(f"kept_{split}"):
            finish(out, split, reports, settings | _facts(origin), origin.text.null)
    return counts


def _row(entry: Entry, captions: Captions, config: ImportConfig) -> Row:
    source, caption = captions.get(entry.key, (entry.name, ""))
    return Row(entry, caption, source, split_of(source, config.holdout))


def _jobs(rows: Sequence[Row], folder: Path, config: ImportConfig) -> list[Job]:
    size = config.samples_per_shard
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [_job(f"shard-{i:06d}", group, folder) for i, group in enumerate(groups)]


def _job(name: str, rows: Sequence[Row], folder: Path) -> Job:
    states = [[row.entry.key, row.caption, row.source, *map(state_of, map(str, _files(row)))] for row in rows]
    outputs = tuple(f"{split}/{name}.tar" for split in SPLITS)
    return Job(name, fingerprint(states), list(rows), outputs, str(folder.resolve()))


def _files(row: Row) -> list[Path]:
    return [row.entry.files[kind] for kind in (VIDEO, TEXT, AUDIO) if kind in row.entry.files]


def _settings(config: ImportConfig, origin: Origin) -> dict[str, Any]:
    """What the records depend on. Another value is another dataset."""
    return asdict(config) | {
        "dtype": config.dtype.value,
        "imported": "precomputed caches of the reference trainer",
        "video_codec": origin.video_codec,
        "audio_codec": origin.audio_codec,
        "text_encoder": origin.text.name,
        "text_cache": TextCache.FEATURES.value,
        "video_text_width": origin.text.video_width,
        "audio_text_width": origin.text.audio_width,
        "code_version": code_version(),
    }


def _facts(origin: Origin) -> dict[str, Any]:
    """What the manifest says besides, and what may change without importing again."""
    return {"null_context_rows": len(origin.text.null.video), "paths": origin.paths}


def _listing_counts(listing: Listing, rows: Sequence[Row], captions: Any) -> dict[str, int]:
    counts = {"samples": len(rows) + len(listing.dropped), "kept": 0}
    counts |= {f"files_not_imported_({name}/)": number for name, number in listing.unread.items()}
    if captions is not None:
        used = {row.entry.key for row in rows} & captions.keys()
        counts |= {"without_caption": len(rows) - len(used), "captions_not_used": len(captions) - len(used)}
    dropped = Counter(f"dropped_{line['reason']}" for line in listing.dropped)
    return {name: number for name, number in (counts | dropped).items() if number or name == "kept"}


# --- one shard ---


def import_shard(job: Job, directory: Path, work: Work) -> Report:
    """Write the latent shards of a group of samples."""
    counts: dict[str, int] = {}
    dropped: list[dict[str, str]] = []
    outputs: dict[str, str] = {}
    keys: list[str] = []
    for split in SPLITS:
        rows = [row for row in job.payload if row.split == split]
        kept: list[str] = []
        path = directory / split / f"{job.name}.tar"
        if rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_shard(path, _samples(rows, work, counts, dropped, kept))
        if kept:
            outputs[f"{split}/{path.name}"] = file_sha256(str(path))
        else:
            path.unlink(missing_ok=True)
        keys += kept
    return Report(outputs, counts, dropped, keys)


def _samples(
    rows: Sequence[Row], work: Work, counts: dict[str, int], dropped: list[dict[str, str]], kept: list[str]
) -> Iterator[Sample]:
    """The samples of rows, one at a time; what becomes of each is counted and, if it is not taken whole, named."""
    for row in rows:
        notes: list[Note] = []
        try:
            sample = read_sample(row, work, notes)
        except Dropped as error:
            add(counts, f"dropped_{error.reason}")
            dropped.append(drop(row.entry.name, error.reason, str(error)))
            continue
        for reason, detail in notes:
            add(counts, reason)
            if detail:
                dropped.append(drop(row.entry.name, reason, detail))
        tally(counts, sample, row.split)
        add(counts, CACHE_BYTES, row.entry.num_bytes)
        kept.append(sample.key)
        yield sample


def read_sample(row: Row, work: Work, notes: list[Note]) -> Sample:
    """The sample of a row. Raises `Dropped` with the reason; what was changed goes to `notes`: (count, detail or "")."""
    files, config = row.entry.files, work.config
    text = _text(files[TEXT], work)
    video, fps = video_latents(files[VIDEO], config.fps) if VIDEO in files else (None, float(AUDIO_STEPS_PER_SECOND))
    audio = audio_latents(files[AUDIO]) if AUDIO in files else None
    if video is not None:
        audio = _beside(audio, video, fps, work, notes)
    frames = pixel_frames(video.shape[1]) if video is not None else audio.shape[1] if audio is not None else 0
    stored = [None if tensor is None else config.dtype.of(tensor) for tensor in (video, audio)]
    return Sample(
        key=row.entry.key,
        video=stored[0],
        audio=stored[1],
        text=TextFeatures(config.dtype.of(text.video), config.dtype.of(text.audio)),
        fps=fps,
        caption=row.caption,
        meta={
            "truth": {},
            "source": row.source,
            "start": 0.0,
            "duration": round(frames / fps, 6),
            "split": row.split,
        },
    )


def _text(path: Path, work: Work) -> TextFeatures:
    text = text_features(path)
    widths = text.video.shape[1], text.audio.shape[1]
    if widths != work.widths:
        raise Dropped("other_text_width", f"{path}: features of widths {widths}; the others have {work.widths}. "
                      "Encode its caption again with the text encoder of the others")  # fmt: skip
    return text


def _beside(audio: Tensor | None, video: Tensor, fps: float, work: Work, notes: list[Note]) -> Tensor | None:
    """The audio latents that belong beside the picture: round(25 F / fps) steps, or what there is of them."""
    steps = audio_latent_length(pixel_frames(video.shape[1]), fps)
    if audio is None:
        if work.has_audio and video.shape[1] > 1:  # an image has none
            notes.append(("no_audio", f"kept without sound: no file in {AUDIO}/, where the reference drops the sample"))
        return None
    surplus = audio.shape[1] - steps
    told = f"{audio.shape[1]} audio steps; {pixel_frames(video.shape[1])} frames at {fps:g} fps take {steps}"
    if surplus > 0:  # the reference keeps the step that its centred mel frames add; the sampler works without it
        notes.append(("audio_cropped", "") if surplus == 1 else ("audio_cropped_by_more", f"kept, cropped: {told}"))
        return audio[:, :steps].contiguous() if steps else None
    if -surplus > max(1.0, work.config.audio_tolerance * AUDIO_STEPS_PER_SECOND):
        notes.append(("audio_too_short", f"kept without its sound: {told}. A larger --audio-tolerance keeps it"))
        return None
    if surplus < 0:
        notes.append(("audio_ends_early", f"kept as it is: {told}"))
    return audio


def read_captions(path: Path) -> dict[str, tuple[str, str]]:
    """Media path and caption by key, from the metadata file that the caches were made from. Raises `DataError`."""
    captions: dict[str, tuple[str, str]] = {}
    for place, fields in enumerate(read_metadata(path), 1):
        media = fields.get("video") or fields.get("media_path") or fields.get("audio")
        if not media:
            raise DataError(f"{path}: row {place}: none of video, media_path and audio is given. Fill one in")
        media = Path(str(media))
        inside = media.is_absolute() and media.is_relative_to(path.parent.resolve())
        name = media.relative_to(path.parent.resolve()).as_posix() if inside else media.as_posix()
        key, told = clip_key(name), (name, str(fields.get("caption") or "").strip())
        if captions.setdefault(key, told) != told:
            raise DataError(f"{path}: row {place}: {name!r} and {captions[key][0]!r} have the same key {key!r} and differ. "
                            "Remove the one that the caches were not made from")  # fmt: skip
    return captions


def _add_options(parser: ArgumentParser) -> None:
    defaults = ImportConfig()
    parser.add_argument("folder", type=Path, help=".precomputed, or the dataset around it")
    parser.add_argument("--out", type=Path, required=True, help="directory for the latent shards")
    parser.add_argument(
        "--video-codec", required=True, help="path of the file whose VAE made latents/, or unknown:NAME"
    )
    parser.add_argument("--audio-codec", required=True, help="likewise for audio_latents/")
    parser.add_argument("--text-encoder", required=True, help="path of the text encoder's folder, or unknown:NAME")
    parser.add_argument(
        "--text-weights", help="released file with the text projections, where --text-encoder is a path"
    )
    parser.add_argument(
        "--null-context", type=Path, help="features of the empty caption: a null_text.safetensors or a .pt"
    )
    parser.add_argument("--device", default="cpu", help="of the text encoder, where that gives the null context")
    parser.add_argument("--captions", type=Path, help=".csv, .json or .jsonl that the caches were made from")
    parser.add_argument("--fps", type=float, help="rate of samples whose file has none; None: they are dropped")
    text = "s by which sound may end before the picture; beyond, the sample is kept without"
    parser.add_argument("--audio-tolerance", type=float, default=defaults.audio_tolerance, help=text)
    dtypes = [dtype.value for dtype in Dtype]
    parser.add_argument("--dtype", choices=dtypes, default=defaults.dtype.value, help="of stored tensors")
    parser.add_argument("--holdout", type=float, default=0.0, help="share of the samples to hold out")
    text = "samples of one shard"
    parser.add_argument("--samples-per-shard", type=int, default=defaults.samples_per_shard, help=text)
    console.add_replace(parser)
    console.add_workers(parser)


EXAMPLE = (
    "python -m data_prep.import_precomputed clips/.precomputed --out latents --captions clips/metadata.jsonl \\\n"
    "    --video-codec ltx-2.3.safetensors --audio-codec ltx-2.3.safetensors --text-encoder unknown:gemma-3-12b"
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = console.parser("import_precomputed", __doc__ or "", EXAMPLE)
    _add_options(parser)
    o = parser.parse_args(argv)
    config = ImportConfig(
        fps=o.fps,
        audio_tolerance=o.audio_tolerance,
        dtype=Dtype(o.dtype),
        holdout=o.holdout,
        samples_per_shard=o.samples_per_shard,
    )
    captions = read_captions(o.captions) if o.captions else None
    if captions is None:
        log.warning("The folder does not hold the captions: they stay empty, their features are there. Give --captions")
    places = o.video_codec, o.audio_codec, o.text_encoder, o.text_weights, o.null_context
    origin = known_origin(o.folder, *places, o.device)
    counts = import_precomputed(o.folder, o.out, config, origin, captions, o.workers, o.replace)
    caches = counts.pop(CACHE_BYTES)
    print(table(f"imported into {o.out}", counts))
    shards = sum(path.stat().st_size for split in SPLITS for path in (o.out / split).glob("*.tar"))
    print(f"{caches:,} bytes of caches became {shards:,} bytes of shards ({shards / caches:.2f} times)")
    if (o.out / DROPPED_NAME).stat().st_size:
        print(f"each sample that was dropped or changed, and its reason: {o.out / DROPPED_NAME}")


if __name__ == "__main__":
    console.run(main)

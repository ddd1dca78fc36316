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
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from data_prep import console
from data_prep.buckets import parse_buckets
from data_prep.codec_choice import Codecs, build_codecs
from data_prep.dropped import DROPPED_NAME, EmptyCaption, drop
from data_prep.encode_config import Dtype, EncodeConfig, choice_of, released_paths, settings_of
from data_prep.jobs import Job, Report, fingerprint, run_jobs
from data_prep.latents import encode_windows
from data_prep.raw import PACK_NAME, parse_key_map
from data_prep.splits import (
    HELD_OUT,
    MANIFESTS,
    SPLITS,
    HoldoutBy,
    finish,
    held_out_names,
    names_in,
    outputs_of,
    split_of,
    tally,
)
from data_prep.tables import add, table, total
from data_prep.tars import file_sha256, list_shards, size_of, state_of, write_jsonl
from data_prep.windows import shard_windows
from ltx2_train.data.shards import write_shard
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.model.config import CONFIGURATIONS, named_config
from ltx2_train.record import Sample, TextCache
from ltx2_train.text import Quantisation
from ltx2_train.text.encoder import MAX_ROWS


@dataclass(frozen=True, slots=True)
class RawShard:
    """The input of one job."""

    url: str
    digest: str | None  # its SHA-256, where that is known
    held_out: (
        frozenset[str] | None
    )  # its sources or captions that are held out; None: the share of `EncodeConfig` decides


def encode(
    raw: Sequence[str], out: Path, config: EncodeConfig, workers: int = 1, replace: bool = False
) -> dict[str, dict[str, int]]:
    """Encode the raw shards that `raw` names into `out`; returns the counts of each split. See the module's text.

    `replace`: remove the shards of other input from `out`, where they are else an error.
    """
    jobs = _jobs(list_shards(raw), config)
    codecs = build_codecs(choice_of(config))
    settings = settings_of(config, codecs)
    reports = run_jobs(encode_shard, jobs, out, settings, config, workers, replace, finished_by=MANIFESTS)
    _refuse_repeated_keys(jobs, reports)
    write_jsonl(out / DROPPED_NAME, (row for report in reports for row in report.dropped))
    counts, told = {}, {"raw": _origins(jobs), "paths": released_paths(config)}
    for split in SPLITS:
        if outputs_of(reports, split):
            [null] = codecs.text.encode([""])
            counts[split] = finish(out, split, reports, settings | told, null)
    if not counts:
        dropped = total(report.counts for report in reports)
        raise DataError(f"{out}: nothing was kept ({dropped}). The reasons are in {out / DROPPED_NAME}")
    return counts | {"all": total(report.counts for report in reports)}


def _jobs(shards: Sequence[str], config: EncodeConfig) -> list[Job]:
    known = _known_digests(shards)
    held_out: dict[str, frozenset[str]] = {}
    if config.holdout_count:  # the only reason to read all shards beforehand
        held_out = held_out_names(
            {url: names_in(url, config.holdout_by, config.key_map) for url in shards}, config.holdout_count
        )
    jobs = []
    for place, url in enumerate(shards):
        shard, name = RawShard(url, known.get(url), held_out.get(url)), _job_name(shards, place)
        # What is held out changes when shards are added: a shard that has some of it is other input than before.
        mark = fingerprint([shard.digest or state_of(url), sorted(shard.held_out or ())])
        outputs = tuple(f"{split}/{name}.tar" for split in SPLITS)
        jobs.append(Job(name, mark, shard, outputs, url if "://" in url else str(Path(url).resolve())))
    return jobs


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


# --- one shard ---


def encode_shard(job: Job, directory: Path, config: EncodeConfig) -> Report:
    """Write the latent shards of one raw shard. Raises `DataError` for a damaged one and for latents with NaN."""
    shard: RawShard = job.payload
    is_verified = _verify(shard)
    counts: dict[str, int] = {}
    dropped: list[dict[str, str]] = []
    held_out: list[Sample] = []  # waits for the end, while the larger split is written as it comes
    samples = _shard_samples(shard, config, counts, dropped, decode=not is_verified)
    train, rest = (f"{split}/{job.name}.tar" for split in SPLITS)
    keys = {train: _write(directory / train, _without_held_out(samples, held_out))}
    keys[rest] = _write(directory / rest, iter(held_out))
    digests = {name: file_sha256(str(directory / name)) for name, written in keys.items() if written}
    return Report(digests, counts, dropped, [key for written in keys.values() for key in written])


def _shard_samples(
    shard: RawShard, config: EncodeConfig, counts: dict[str, int], dropped: list[dict[str, str]], decode: bool
) -> Iterator[Sample]:
    """The samples of a raw shard, one at a time; what becomes of its clips is counted and named."""
    codecs = build_codecs(choice_of(config))
    for sample in encode_windows(shard_windows(shard.url, config, counts, dropped, decode), codecs, config):
        name = sample.caption if config.holdout_by is HoldoutBy.CAPTION else sample.meta["source"]
        split = sample.meta["split"] = split_of(name, config.holdout, shard.held_out)
        if cut := codecs.text.rows_cut(sample.caption):
            add(counts, "caption_cut")
            detail = f"kept, but {codecs.text.name} left away the last {cut} rows of its caption"
            dropped.append(drop(sample.key, "caption_cut", detail, shard=shard.url))
        tally(counts, sample, split)
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


def _tally_text(counts: dict[str, int], sample: Sample, codecs: Codecs, config: EncodeConfig) -> None:
    """Bytes of the sample's text as it is stored, and as it would be stored otherwise."""
    both = (sample.text.video, sample.text.audio)
    row_bytes = sum(rows.shape[1] * rows.element_size() for rows in both)
    stored = sum(rows.nbytes for rows in both)
    if config.text_cache is TextCache.CONTEXT:
        features, context = codecs.text.num_rows(sample.caption) * row_bytes, stored
    else:
        features, context = stored, MAX_ROWS * row_bytes
    add(counts, "text_bytes_as_features", features)
    if config.text_weights or config.connectors:  # there are connectors whose output is or could be stored
        add(counts, "text_bytes_as_context", context)


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
    text = "model that will be trained, of conf/model: sets both text widths to what it takes"
    parser.add_argument("--model", choices=list(CONFIGURATIONS), help=text)
    parser.add_argument("--video-text-width", type=int, help="of the features beside the video; hashed: 128")
    parser.add_argument("--audio-text-width", type=int, help="of the features beside the audio; hashed: 128")
    parser.add_argument("--fps", type=float, help="bring all clips to this rate; None: each keeps its own mean rate")
    parser.add_argument("--audio-tolerance", type=float, default=0.25, help="s of missing sound that are padded")
    parser.add_argument("--audio-only-seconds", type=float, help="keep records without picture, in such windows")
    policies = [policy.value for policy in EmptyCaption]
    parser.add_argument("--empty-caption", choices=policies, default="keep", help="clips without a caption")
    parser.add_argument(
        "--holdout", type=float, default=0.0, help="share of the source files, or captions, to hold out"
    )
    parser.add_argument("--holdout-count", type=int, default=0, help="hold out this many instead")
    sides = [by.value for by in HoldoutBy]
    parser.add_argument("--holdout-by", choices=sides, default="source", help="what is held out; source: files")
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
    if (model := options.pop("model")) is not None:
        options |= text_widths(model, options)
    config = EncodeConfig(**options)
    counts = encode(raw, out, config, workers, replace)["all"]
    print(table(f"encoded into {out}", counts))
    print("datasets: " + ", ".join(str(out / split) for split in SPLITS if f"kept_{split}" in counts))
    print(text_sizes(counts, config.text_cache))
    if config.holdout and f"kept_{HELD_OUT}" not in counts:
        print(none_held_out(out, config), file=sys.stderr)
    if any(name.startswith("dropped") or name == "caption_cut" for name in counts):
        print(f"each clip that was dropped or cut, and its reason: {out / DROPPED_NAME}")


def text_widths(model: str, options: Mapping[str, Any]) -> dict[str, int]:
    """The options that a named model stands for. Raises `ConfigError` when one of them is given too."""
    config = named_config(model)
    widths = {"video_text_width": config.video_connector_width, "audio_text_width": config.audio_connector_width}
    if any(options[name] is not None for name in widths):
        numbers = " and ".join(map(str, widths.values()))
        raise ConfigError(f"--model {model} sets both text widths ({numbers}). Leave --video-text-width and "
                          "--audio-text-width away, or --model")  # fmt: skip
    return widths


def default_workers(asked: int | None, device: str, cores: int) -> int:
    """Processes: as asked, else one per GPU that the device names, or one per core."""
    if asked is not None or not device.startswith("cuda"):
        return cores if asked is None else asked
    return max(1, torch.cuda.device_count()) if device == "cuda" else 1


def none_held_out(out: Path, config: EncodeConfig) -> str:
    """What a share tells that met none of the sources."""
    what = f"{config.holdout_by.value}s"
    return (
        f"warning: no clip is held out, and there is no {out / HELD_OUT}: --holdout {config.holdout} is drawn for each "
        f"of the {what} by the hash of its name, and met none that is kept. Of few {what}, hold out N with --holdout-count N"
    )


KINDS = {
    "holdout_by": HoldoutBy,
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

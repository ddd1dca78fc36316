"""The two splits of a latent dataset: which sources or captions go where, what is counted of each, what finishes it."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from data_prep.dropped import Dropped
from data_prep.jobs import Report
from data_prep.raw import KeyMap, caption_of, raw_json, source_of
from data_prep.tables import add, total
from data_prep.tars import read_tar
from ltx2_train.data.datasets import save_null_text
from ltx2_train.data.index import build_index
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.record import MANIFEST_NAME, Manifest, Sample, TextFeatures
from ltx2_train.rng import derive_seed

TRAIN, HELD_OUT = "train", "heldout"
SPLITS = (TRAIN, HELD_OUT)
MANIFESTS = tuple(f"{split}/{MANIFEST_NAME}" for split in SPLITS)  # what finishes them, as named in their directory


class HoldoutBy(StrEnum):
    """What stays together on one side of the split."""

    SOURCE = "source"  # all that was cut from one file
    CAPTION = "caption"  # all that has one caption: training never sees a held-out prompt


def names_in(url: str, by: HoldoutBy, key_map: KeyMap) -> set[str]:
    """The sources, or captions, of all records of a raw shard, but for those that cannot be read and become no clip."""
    names = set()
    for key, members in read_tar(url):
        with suppress(DataError, Dropped):
            fields = raw_json(key, members, key_map)
            is_source = by is HoldoutBy.SOURCE
            names.add(source_of(key, fields) if is_source else caption_of(key, members, fields, key_map))
    return names


def name_hash(name: str) -> int:
    """A number in [0, 2^63) that depends on a source's name, or on a caption, alone."""
    return derive_seed("held out", name)


def held_out_names(names: Mapping[str, AbstractSet[str]], count: int) -> dict[str, frozenset[str]]:
    """Which of its `names` (sources or captions) each shard holds out: in all, the `count` of smallest hash."""
    every = set().union(*names.values())
    if len(every) <= count:
        raise ConfigError(f"holdout_count: {count}; need less than the {len(every)} that there are")
    held_out = set(sorted(every, key=name_hash)[:count])
    return {url: frozenset(there & held_out) for url, there in names.items()}


def split_of(name: str, share: float, held_out: AbstractSet[str] | None = None) -> str:
    """Where a source or caption goes: held out when `held_out` has it; where that is not known, by `share` and hash."""
    if held_out is not None:
        return HELD_OUT if name in held_out else TRAIN
    return HELD_OUT if name_hash(name) < share * 2**63 else TRAIN


def tally(counts: dict[str, int], sample: Sample, split: str) -> None:
    """Count a sample that is kept: in all, in its split, and there by what it holds."""
    kinds = {"va": "with_video_and_audio", "v": "video_only", "a": "audio_only"}
    for name in ("kept", f"kept_{split}", f"{split}_{kinds[sample.bucket.signature]}"):
        add(counts, name)


def finish(
    out: Path, split: str, reports: Sequence[Report], settings: dict[str, Any], null: TextFeatures
) -> dict[str, int]:
    """Write null context, index and manifest of one split; returns its counts. The manifest comes last: finished.

    `settings`: what the latents depend on, also the names of what made them; `null`: the empty caption's features.
    """
    directory = out / split
    save_null_text(directory, null)
    build_index(directory)
    counts = total(report.counts for report in reports)
    Manifest(
        video_codec=settings["video_codec"],
        audio_codec=settings["audio_codec"],
        text_encoder=settings["text_encoder"],
        video_text_width=settings["video_text_width"],
        audio_text_width=settings["audio_text_width"],
        text_cache=settings["text_cache"],
        code_version=settings["code_version"],
        settings=settings | {"split": split},
        shards=outputs_of(reports, split),
        counts=counts,
    ).save(directory)
    return {name: number for name, number in counts.items() if name.startswith(split) or name == f"kept_{split}"}


def outputs_of(reports: Sequence[Report], split: str) -> dict[str, str]:
    """SHA-256 of all shards of a split, by file name."""
    pairs = [pair for report in reports for pair in report.outputs.items()]
    return {name.removeprefix(f"{split}/"): digest for name, digest in pairs if name.startswith(f"{split}/")}


def code_version() -> str:
    """What the manifests say of the program that wrote them."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ltx2_train")
    except PackageNotFoundError:
        return "not installed"

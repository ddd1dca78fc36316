"""What lies in a `.precomputed` folder of the LTX reference trainer: samples by name, and the tensors of each.

A directory per kind, a `torch.save` file per sample and kind, under the same relative path in each:
`latents/`        `latents` (128, F, H, W), older ones tokens (F H W, 128); `num_frames`, `height`, `width` of these; `fps`
`conditions/`     `video_prompt_embeds` (L, Wv), `audio_prompt_embeds` (L, Wa), `prompt_attention_mask` (L,): text features
                  before the connectors, padded; older ones have `prompt_embeds` for both
`audio_latents/`  `latents` (8, T, 16), `num_time_steps`, `frequency_bins`
Older folders pair `latents/latent_X.pt` with `conditions/condition_X.pt`.

These files are pickles, the one kind that is read here: only tensors and plain values are unpickled, never code.
"""

import io
import math
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.dropped import Dropped, drop
from data_prep.rows import clip_key
from ltx2_train.errors import DataError
from ltx2_train.geometry import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS
from ltx2_train.record import TextFeatures

FOLDER = ".precomputed"
SUFFIX = ".pt"
VIDEO, TEXT, AUDIO = "latents", "conditions", "audio_latents"
ARCHIVE = b"PK\x03\x04"  # how a file of torch 1.6 and later begins
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLD_PREFIXES = {VIDEO: "latent_", TEXT: "condition_", AUDIO: "latent_"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: its name (a relative path without suffix), its key in shards, and its file of each kind."""

    name: str
    key: str
    files: Mapping[str, Path]

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True, slots=True)
class Listing:
    """The samples of a folder in the order of their names, and what is not one."""

    entries: list[Entry]
    kinds: frozenset[str]  # directories that are there, of those that are read
    dropped: list[dict[str, str]]  # file, reason, detail: what cannot become a sample
    unread: dict[str, int]  # files of each other directory


def list_folder(folder: Path) -> Listing:
    """What a `.precomputed` folder, or the dataset folder around it, holds. Raises `DataError` when it is none."""
    root = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    names = {kind: _names(root / kind) for kind in (VIDEO, TEXT, AUDIO) if (root / kind).is_dir()}
    if TEXT not in names or not names.keys() & {VIDEO, AUDIO}:
        raise DataError(f"{root}: need {TEXT}/ beside {VIDEO}/ or {AUDIO}/, as the reference trainer's preprocessing "
                        "writes them. Name that folder, or the dataset around it")  # fmt: skip
    found: dict[str, dict[str, list[Path]]] = {}
    for kind, files in names.items():
        others = set().union(*(files for other, files in names.items() if other != kind))
        for raw, path in files.items():
            found.setdefault(_sample_name(raw, kind, others), {}).setdefault(kind, []).append(path)
    entries, dropped = _entries(found, names.keys())
    return Listing(entries, frozenset(names), dropped, _unread(root, names.keys()))


def _names(directory: Path) -> dict[str, Path]:
    """The files of a directory by relative path without suffix, in order."""
    paths = sorted(path for path in directory.rglob(f"*{SUFFIX}") if path.is_file())
    return {path.relative_to(directory).as_posix().removesuffix(SUFFIX): path for path in paths}


def _sample_name(raw: str, kind: str, others: Collection[str]) -> str:
    """The sample that a file belongs to: an old prefix is no part of its name, unless another kind has that very name."""
    folder, slash, base = raw.rpartition("/")
    return raw if raw in others else f"{folder}{slash}{base.removeprefix(OLD_PREFIXES[kind])}"


def _entries(
    found: Mapping[str, Mapping[str, list[Path]]], kinds: Collection[str]
) -> tuple[list[Entry], list[dict[str, str]]]:
    """The samples that have what a record needs; the rest by name and reason."""
    entries: dict[str, Entry] = {}
    dropped = []
    for name, files in sorted(found.items()):
        key = clip_key(f"{name}{SUFFIX}")
        for path in (path for paths in files.values() for path in paths[1:]):
            dropped.append(drop(str(path), "duplicate_name", f"{path}: {name!r} has such a file already"))
        entry = Entry(name, key, {kind: paths[0] for kind, paths in files.items()})
        if reason := _lacking(entry, kinds):
            dropped.append(drop(name, *reason))
        elif key in entries:
            both = f"{entries[key].name!r} and {name!r} have the key {key!r}"
            dropped.append(drop(name, "duplicate_name", f"{both} in shards. Rename one of them to keep both"))
        else:
            entries[key] = entry
    return list(entries.values()), dropped


def _lacking(entry: Entry, kinds: Collection[str]) -> tuple[str, str] | None:
    for kind in (TEXT, VIDEO):
        if kind in kinds and kind not in entry.files:
            there = ", ".join(map(str, entry.files.values()))
            return f"no_{kind}", f"{entry.name}: no file in {kind}/, only {there}. Preprocess it again to keep it"
    return None


def _unread(root: Path, kinds: Collection[str]) -> dict[str, int]:
    """Files that nothing here reads, by directory, and those of other suffixes among the ones that are read."""
    counts: dict[str, int] = {}
    for path in root.rglob("*"):
        folder = path.relative_to(root).parts[0] if path.parent != root else "."
        if path.is_file() and not (folder in kinds and path.suffix == SUFFIX):
            counts[folder] = counts.get(folder, 0) + 1
    return dict(sorted(counts.items()))


# --- one sample ---


def video_latents(path: Path, default_fps: float | None) -> tuple[Tensor, float]:
    """Latents (128, F, H, W) in their own dtype, and frames per second. Raises `Dropped` with the reason."""
    fields = read_file(path)
    latents = _tensor(fields, "latents", path)
    stated = [_number(fields.get(name)) for name in ("num_frames", "height", "width")]
    if latents.ndim == 2:
        latents = _from_tokens(latents, stated, path)
    sizes = list(latents.shape)
    differs = any(number is not None and number != size for number, size in zip(stated, sizes[1:], strict=False))
    if len(sizes) != 4 or sizes[0] != VIDEO_CHANNELS or 0 in sizes or differs:
        raise Dropped("wrong_shape", f"{path}: latents {sizes}; need [{VIDEO_CHANNELS}, F, H, W] and, as num_frames, "
                      f"height, width say, F, H, W = {stated}. {_AGAIN}")  # fmt: skip
    fps = _number(fields.get("fps"))
    if fps is None or not 0 < fps < math.inf:
        fps = default_fps
    if fps is None:
        raise Dropped("no_fps", f"{path}: fps is {fields.get('fps')!r}. Give the rate of such samples with --fps")
    return latents, fps


def _from_tokens(tokens: Tensor, stated: list[float | None], path: Path) -> Tensor:
    """Tokens (F H W, 128), width fastest, back on their grid."""
    grid = [int(size) for size in stated if size is not None and size.is_integer()]
    if len(grid) != 3 or [prod(grid), VIDEO_CHANNELS] != list(tokens.shape):
        raise Dropped("wrong_shape", f"{path}: tokens {list(tokens.shape)}; num_frames, height, width = {stated} do not "
                      f"make [F H W, {VIDEO_CHANNELS}] of them. {_AGAIN}")  # fmt: skip
    return tokens.reshape(*grid, VIDEO_CHANNELS).permute(3, 0, 1, 2).contiguous()


def audio_latents(path: Path) -> Tensor:
    """Latents (8, T, 16) in their own dtype. Raises `Dropped` with the reason."""
    fields = read_file(path)
    latents = _tensor(fields, "latents", path)
    sizes = list(latents.shape)
    stated = [AUDIO_CHANNELS, _number(fields.get("num_time_steps")), AUDIO_BINS]
    if len(sizes) != 3 or 0 in sizes or any(n not in (None, size) for n, size in zip(stated, sizes, strict=True)):
        raise Dropped("wrong_shape", f"{path}: latents {sizes}; need [{AUDIO_CHANNELS}, T, {AUDIO_BINS}] and, as "
                      f"num_time_steps says, T = {stated[1]}. {_AGAIN}")  # fmt: skip
    return latents


def text_features(path: Path) -> TextFeatures:
    """The valid rows of a caption, in order: what the mask says is padding is left out. Raises `Dropped`."""
    fields = read_file(path)
    names = ("prompt_embeds",) * 2 if "prompt_embeds" in fields else ("video_prompt_embeds", "audio_prompt_embeds")
    mask = _tensor(fields, "prompt_attention_mask", path, (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS))
    embeds = [_tensor(fields, name, path) for name in names]
    sizes = [list(tensor.shape) for tensor in (mask, *embeds)]
    if mask.ndim != 1 or any(tensor.ndim != 2 or len(tensor) != len(mask) for tensor in embeds):
        raise Dropped("wrong_shape", f"{path}: mask {sizes[0]}, features {sizes[1:]}; need [L] and twice [L, width]")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise Dropped("wrong_mask", f"{path}: prompt_attention_mask holds other values than 0 and 1. {_AGAIN}")
    if not bool(mask.any()):
        raise Dropped("no_text_rows", f"{path}: its mask leaves no row of the caption. {_AGAIN}")
    video, audio = (tensor[mask.bool()] for tensor in embeds)
    return TextFeatures(video, audio)


_AGAIN = "Preprocess this sample again to keep it"


def read_file(path: Path) -> dict[str, Any]:
    """The dictionary in a `.pt` file, unpickled without running code. Raises `Dropped` for anything else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Dropped("unreadable", f"{path}: {error.strerror}. Correct its rights") from error
    try:
        _check_archive(data)
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged archive or pickle raises is what its bytes happen to say
        what = str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise Dropped(
            "corrupt", f"{path}: damaged, or more than tensors and plain values ({what}). {_AGAIN}"
        ) from error
    if not isinstance(value, dict):
        raise Dropped("corrupt", f"{path}: holds a {type(value).__name__}; need a dictionary of tensors. {_AGAIN}")
    return value


def _check_archive(data: bytes) -> None:
    """torch.load does not look at the archive's checksums, so flipped bits would pass. Raises `BadZipFile`."""
    if not data.startswith(ARCHIVE):
        return  # the form before torch 1.6 has no checksums
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:  # torch.save never does, and a small file could unpack to any size
            raise zipfile.BadZipFile(f"{packed[0]} is compressed")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} does not match its bytes")


def _tensor(fields: Mapping[str, Any], name: str, path: Path, dtypes: Collection[torch.dtype] = FLOATS) -> Tensor:
    value = fields.get(name)
    if not isinstance(value, Tensor):
        there = ", ".join(map(str, fields))
        raise Dropped("corrupt", f"{path}: no tensor {name!r}; there is {there or 'nothing'}. {_AGAIN}")
    if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in dtypes:
        raise Dropped(
            "corrupt", f"{path}: {name} is no plain tensor of numbers ({value.layout}, {value.dtype}). {_AGAIN}"
        )
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():  # a few bytes can claim any shape
        raise Dropped("corrupt", f"{path}: {name} {list(value.shape)} has fewer bytes than its shape needs. {_AGAIN}")
    if not bool(torch.isfinite(value).all()):
        raise Dropped("not_finite", f"{path}: {name} holds NaN or infinity. {_AGAIN}")
    return value.detach()


def _number(value: Any) -> float | None:
    """A number, be it a tensor of one element; None for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def evenly(entries: list[Entry], count: int) -> Iterator[Entry]:
    """At most `count` of the entries, spread over all of them."""
    step = max(1, -(-len(entries) // count))
    yield from entries[::step]

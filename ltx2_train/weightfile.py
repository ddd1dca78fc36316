"""Released weights on disk: safetensors in one file, or in a folder of several with an index, read a tensor at a time.

The header is parsed here and nothing is mapped into memory: what a program holds is what it asked for, be it some rows of
one matrix of a 40 GB file. Format: 8 bytes length N, N bytes of JSON, then the tensors' bytes.
"""

import hashlib
import json
import operator
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ltx2_train.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SCALE_SUFFIX = "_scale"  # of the tensor beside an FP8 weight that it is multiplied with
MOST_LISTED = 20  # tensors in one message
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
FINGERPRINT_BYTES = 4096  # of every tensor
PICKLE_MARKS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Stored(Protocol):
    """A tensor that is not in memory yet."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the first dim."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a file. Row ranges are contiguous there, so that a rank reads its shard and no more."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int  # in the file

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        return self._read(self.offset, self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the first dim."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])  # never a neighbour's bytes
        row = prod(self.shape[1:]) * self.dtype.itemsize
        return self._read(self.offset + start * row, torch.Size([max(0, stop - start), *self.shape[1:]]))

    def _read(self, offset: int, shape: torch.Size) -> Tensor:
        buffer = torch.empty(prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        view = buffer.numpy().data
        with _opened(self.path) as file:
            file.seek(offset)
            if file.readinto(view) < len(view):
                raise CheckpointError(f"{self.path}: ends inside {self.key}; the file was cut. Copy it again")
        return buffer.view(self.dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class Deferred:
    """A tensor that is computed when it is read: a sum of two, a dequantised one."""

    dtype: torch.dtype
    shape: torch.Size
    compute: Callable[[], Tensor]

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        return self.compute()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the first dim."""
        return self.compute()[start:stop]


@dataclass(frozen=True, slots=True)
class Scaled:
    """An FP8 weight times its scale, one number or one per row, in bf16; the product in fp32. Without a scale: a cast."""

    weight: FileTensor
    scale: FileTensor | None
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        return self._scaled(self.weight.read(), slice(None))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the first dim."""
        return self._scaled(self.weight.rows(start, stop), slice(start, stop))

    def _scaled(self, weight: Tensor, rows: slice) -> Tensor:
        value = weight.float()
        if self.scale is not None:
            factor = self.scale.read().float()
            value *= factor if factor.numel() == 1 else factor.reshape(-1, *[1] * (value.ndim - 1))[rows]
        return value.to(self.dtype)


@dataclass(frozen=True, slots=True)
class Finite:
    """A stored tensor that is refused when what is read of it is NaN or infinite; `name` says which it is."""

    tensor: Stored
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        return self._checked(self.tensor.read())

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the first dim."""
        return self._checked(self.tensor.rows(start, stop))

    def _checked(self, value: Tensor) -> Tensor:
        # The extremes are NaN or infinite if anything is, and need no memory of the tensor's size.
        if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
            wrong = int(value.isfinite().logical_not().sum())
            raise CheckpointError(
                f"{self.name}: {wrong:,} of {value.numel():,} values read are NaN or infinite. "
                "The file is damaged, or was saved by a run that had diverged: use another one"
            )
        return value


class WeightFile(Mapping[str, Stored]):
    """The tensors of a released file, or of the files an index names, by key; and what the header says of them.

    FP8 weights with a scale beside them come out dequantised in bf16; the scales themselves are not listed.
    """

    def __init__(self, path: Path, tensors: dict[str, FileTensor], metadata: dict[str, Any], header: bytes) -> None:
        self.path = path
        self.metadata = metadata
        """The header's strings, those that are JSON decoded."""
        self.stored = tensors
        """What is on disk, scales and FP8 bytes as they are."""
        self._header = header
        self._tensors = dict(_dequantised(tensors))

    def __getitem__(self, key: str) -> Stored:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def under(self, prefix: str) -> dict[str, Stored]:
        """The tensors whose keys start with `prefix`, without it."""
        return {key.removeprefix(prefix): tensor for key, tensor in self.items() if key.startswith(prefix)}

    def config(self, *section: str) -> dict[str, Any]:
        """The header's `config`, or a section of it. Raises `CheckpointError` when it is not there."""
        value: Any = self.metadata.get("config")
        for name in section:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            where = ".".join(("config", *section))
            raise CheckpointError(
                f"{self.path}: no `{where}` in the header, so the architecture is unknown. "
                "Use a file in the official layout, as published or written by ltx2-export"
            )
        return value

    @property
    def model_version(self) -> str | None:
        """As the header says it, e.g. "2.3.0"."""
        version = self.metadata.get("model_version")
        return None if version is None else str(version)

    @property
    def num_quantised(self) -> int:
        """Weights that are FP8 on disk."""
        return sum(tensor.dtype in FP8 for tensor in self.stored.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the header and the first 4 KiB of every tensor: tells files apart in seconds, whatever their size."""
        digest = hashlib.sha256(self._header)
        for tensor in sorted(self.stored.values(), key=lambda t: (t.path.name, t.offset)):
            with _opened(tensor.path) as file:
                file.seek(tensor.offset)
                digest.update(file.read(min(FINGERPRINT_BYTES, tensor.nbytes)))
        return digest.hexdigest()

    def sha256(self) -> str:
        """Of the whole file, or over those of all files in the order of their names."""
        files = sorted({tensor.path for tensor in self.stored.values()})
        if len(files) == 1:
            return _sha256(files[0])
        return hashlib.sha256("".join(_sha256(file) for file in files).encode()).hexdigest()


def open_weights(path: str | Path) -> WeightFile:
    """A safetensors file, an index of several (`*.safetensors.index.json`), or a folder that holds one of them.

    There is at least one tensor in it. Raises `CheckpointError` for what is not safetensors (a pickle under any name), for
    a file shorter or longer than its header says, for overlapping tensors, and for an index that does not match its files.
    """
    path = Path(path)
    if os.path.isdir(path):  # False for a name that no file can have, where Path.is_dir raises
        path = _only_entry(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    tensors, metadata, header = _read_header(path)
    return WeightFile(path, tensors, metadata, header)


def _only_entry(folder: Path) -> Path:
    """The index of a folder, else its only safetensors file."""
    indices, files = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
    for found in (indices, files):
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:5])
            raise CheckpointError(f"{folder}: {len(found)} candidates ({names}); name the file that is meant")
    if folder.parent.name == "checkpoints" or (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"{folder}: what a run saves, not weights. Make a file of it and name that: ltx2-export {folder} "
            "--to transformer --out FILE.safetensors (--to lora for the adapters of a LoRA alone)"
        )
    raise CheckpointError(f"{folder}: no safetensors file in it. Name the file or folder that holds the weights")


def _open_index(path: Path) -> WeightFile:
    with _opened(path) as file:
        raw = file.read()
    try:
        places: dict[str, str] = json.loads(raw)["weight_map"]
        names = sorted(set(places.values()))
        beside = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files ({error!r})") from error
    if not places:
        raise CheckpointError(f"{path}: {_EMPTY}")
    if not beside:
        raise CheckpointError(f"{path}: names files outside its own folder; put them beside it and name them so")
    tensors: dict[str, FileTensor] = {}
    first: dict[str, Any] = {}
    headers = hashlib.sha256()
    for name in names:
        found, metadata, header = _read_header(path.parent / name)
        wrong = [key for key in found if places.get(key) != name]
        if wrong:
            raise CheckpointError(f"{path.parent / name}: holds {wrong[0]}, which {path.name} does not place there")
        tensors |= found
        first = first or metadata  # the reference reads the metadata of the first file
        headers.update(header)
    if missing := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: {len(missing)} tensors are in none of its files, the first is {missing[0]}")
    return WeightFile(path, tensors, first, headers.digest())


def _read_header(path: Path) -> tuple[dict[str, FileTensor], dict[str, Any], bytes]:
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            if start.startswith(PICKLE_MARKS):  # a length that a real header may have as well, were it not so large
                raise CheckpointError(f"{path}: a pickle, not safetensors; reading it could run code. {_CONVERT}")
            raise CheckpointError(f"{path}: not a safetensors file, or cut inside its header ({size:,} bytes)")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = {key: _decoded(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors = {key: _entry(path, key, entry, 8 + length) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors header ({error!r})") from error
    if not tensors:
        raise CheckpointError(f"{path}: {_EMPTY}")
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata, raw


_CONVERT = "Convert it with a tool that you trust, or get the safetensors file"
_EMPTY = "no tensors in it. Get the file again"


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """The file to read. Raises `CheckpointError` for what is gone or no regular file: to open a FIFO would wait for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file. Give a safetensors file, its index or its folder")
        with path.open("rb") as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({reason}). Correct its path or its permissions") from error


def _entry(path: Path, key: str, entry: dict[str, Any], base: int) -> FileTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {key} is {entry['dtype']}; supported are {', '.join(DTYPES)}")
    begin, end = map(operator.index, entry["data_offsets"])  # integers, as shapes have to be
    tensor = FileTensor(path, key, DTYPES[entry["dtype"]], torch.Size(entry["shape"]), base + begin)
    if end - begin != tensor.nbytes or min(tensor.shape, default=0) < 0:
        raise CheckpointError(
            f"{path}: {key} has other bytes than its shape {list(tensor.shape)} needs; damaged header"
        )
    return tensor


def _check_layout(path: Path, tensors: dict[str, FileTensor], base: int, size: int) -> None:
    """Tensors follow one another without gaps up to the end of the file."""
    end = base
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: {tensor.key} overlaps its neighbour or leaves a gap; damaged header")
        end += tensor.nbytes
    if end != size:
        what = "was cut" if size < end else "has surplus bytes"
        raise CheckpointError(f"{path}: {size:,} bytes, its header claims {end:,}; the file {what}. Copy it again")


def _decoded(value: str) -> Any:
    """JSON where it is an object or a list; numbers stay strings, so that a version "2.5" does."""
    if not re.match(r"\s*[\[{]", value):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _dequantised(tensors: dict[str, FileTensor]) -> Iterator[tuple[str, Stored]]:
    scales = {f"{key}{SCALE_SUFFIX}" for key, tensor in tensors.items() if tensor.dtype in FP8}
    inputs = {key.removesuffix("weight") + "input_scale" for key, t in tensors.items() if t.dtype in FP8}
    for key, tensor in tensors.items():
        if tensor.dtype in FP8:
            yield key, _with_scale(tensor, tensors.get(key + SCALE_SUFFIX))
        elif key not in scales and key not in inputs:
            yield key, tensor


def _with_scale(weight: FileTensor, scale: FileTensor | None) -> Scaled:
    rows = weight.shape[0] if weight.shape else 1
    shapes = [[], [1], [rows], [rows, 1]]  # other shapes of as many numbers are scales of columns or of blocks
    if scale is not None and (list(scale.shape) not in shapes or scale.dtype not in SCALES):
        raise CheckpointError(
            f"{scale.path}: {scale.key} is {NAMES[scale.dtype]} {list(scale.shape)}; a scale is one floating-point number, "
            f"or one for each of the {rows} rows: [{rows}] or [{rows}, 1]. Use the bf16 file, or one with such scales"
        )
    return Scaled(weight, scale)


def _sha256(path: Path) -> str:
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_floating(tensors: Mapping[str, Stored], source: object) -> None:
    """Raises `CheckpointError` listing the tensors that hold integers or booleans, which no weight of ours does."""
    wrong = [f"{key} is {tensor.dtype}" for key, tensor in tensors.items() if not tensor.dtype.is_floating_point]
    if wrong:
        more = f"; and {len(wrong) - MOST_LISTED} more" if len(wrong) > MOST_LISTED else ""
        raise CheckpointError(
            f"{source}: {len(wrong)} weights are quantised in a form that is not read: "
            f"{'; '.join(wrong[:MOST_LISTED])}{more}. Use the bf16 file, or one in FP8 with scales"
        )


# --- writing ---


def write_weights(
    path: Path, tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str], *, max_bytes: int | None = None
) -> list[Path]:
    """Writes the tensors one at a time, complete or not at all; returns the files, the index last where there is one.

    Above `max_bytes` of data the tensors go to `NAME-00001-of-0000N.safetensors` and an index beside them; every file
    carries the metadata. Tensors keep the order of the mapping. Files get their names when all of them are written; when
    that fails, what is there is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, index = planned_files(path, tensors, max_bytes), index_path(path)
    files = [*parts, index] if len(parts) > 1 else [*parts]
    with _all_or_nothing(files) as partials:
        for file, keys in parts.items():
            _write_file(partials[file], {key: tensors[key] for key in keys}, metadata)
        if index in files:
            places = {key: file.name for file, keys in parts.items() for key in keys}
            total = sum(_nbytes(tensor) for tensor in tensors.values())
            partials[index].write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1))
    return files


def index_path(path: Path) -> Path:
    """Where the index of `path` lies when it is written in several files."""
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.safetensors.index.json")


def planned_files(
    path: Path, tensors: Mapping[str, Tensor | Stored], max_bytes: int | None = None
) -> dict[Path, list[str]]:
    """The files that `write_weights` makes, each with the keys of its tensors; without the index."""
    parts = _parts(tensors, max_bytes)
    if len(parts) == 1:
        return {path: parts[0]}
    stem = path.name.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    return {path.with_name(name): part for name, part in zip(names, parts, strict=True)}


@contextmanager
def _all_or_nothing(files: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """What to write for each file; they get their names at the end, in this order, and go away when anything fails."""
    partials = {file: file.with_name(f".{file.name}.partial") for file in files}
    try:
        yield partials
        for file, partial in partials.items():
            partial.replace(file)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def _parts(tensors: Mapping[str, Tensor | Stored], max_bytes: int | None) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for key, tensor in tensors.items():
        if max_bytes is not None and parts[-1] and filled + _nbytes(tensor) > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(key)
        filled += _nbytes(tensor)
    return parts


def _write_file(path: Path, tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + _nbytes(tensor)
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for key, tensor in tensors.items():
            value = tensor if isinstance(tensor, Tensor) else tensor.read()
            assert value.shape == tensor.shape, f"{key}: {value.shape} came out, {tensor.shape} was announced"
            assert value.dtype == tensor.dtype, f"{key}: {value.dtype} came out, {tensor.dtype} was announced"
            file.write(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _nbytes(tensor: Tensor | Stored) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize

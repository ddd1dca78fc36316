"""What a dataset holds and where: one row per sample in columns of numbers, so that 100 million samples stay a few GB.

`index.safetensors` lies beside the shards. It is built once from the tar headers (and the header of each sample's
safetensors member), is mapped into memory when loaded, and is shared by all processes of a node.
"""

import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ltx2_train.errors import DataError
from ltx2_train.record import INDEX_NAME, Bucket, Manifest

INDEX_VERSION = 1
TENSORS_EXTENSION = "safetensors"
META_EXTENSION = "json"
MAX_HEADER_BYTES = 1 << 20  # of a sample's safetensors member; a real one has a few hundred bytes
REBUILD = "Rebuild it with: ltx2-plan --rebuild-index"

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Location:
    """Where the two members of a record lie in their shard: offsets of their first data byte, and sizes, in bytes."""

    shard: int
    tensors_offset: int
    tensors_size: int
    meta_offset: int
    meta_size: int


@dataclass(frozen=True, eq=False)
class Index:
    """The columns of a dataset. Samples are ordered by shard, and within a shard as they lie in it."""

    shard_names: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    shard_sizes: NDArray[np.int64]  # (shards,) bytes
    shard_starts: NDArray[np.int64]  # (shards + 1,) number of the first sample of each shard
    tensors_offset: NDArray[np.int64]  # (N,)
    tensors_size: NDArray[np.int64]
    meta_offset: NDArray[np.int64]
    meta_size: NDArray[np.int32]
    bucket_ids: NDArray[np.int32]
    text_lengths: NDArray[np.int32]
    key_starts: NDArray[np.int64]  # (N + 1,) first byte of each key in `key_bytes`
    key_bytes: NDArray[np.uint8]  # all keys, UTF-8, one after another

    def __len__(self) -> int:
        return len(self.bucket_ids)

    def shard_of(self, i: int) -> int:
        return int(np.searchsorted(self.shard_starts, i, side="right")) - 1

    def key(self, i: int) -> str:
        return self.key_bytes[self.key_starts[i] : self.key_starts[i + 1]].tobytes().decode()

    def bucket(self, i: int) -> Bucket:
        return self.buckets[self.bucket_ids[i]]

    def location(self, i: int) -> Location:
        columns = (self.tensors_offset, self.tensors_size, self.meta_offset, self.meta_size)
        return Location(self.shard_of(i), *(int(column[i]) for column in columns))

    def find(self, keys: Iterable[str]) -> dict[str, int]:
        """Sample numbers of those of the keys that are here. Reads all keys: a matter of a minute at 100 million."""
        wanted = {key.encode() for key in keys}
        blob = np.ascontiguousarray(self.key_bytes).data
        found = {}
        for i in range(len(self)) if wanted else ():
            key = bytes(blob[self.key_starts[i] : self.key_starts[i + 1]])
            if key in wanted:
                found[key.decode()] = i
        return found

    @cached_property
    def bucket_counts(self) -> NDArray[np.int64]:
        """(buckets,) samples of each bucket."""
        return np.bincount(self.bucket_ids, minlength=len(self.buckets))

    @cached_property
    def shard_bucket_counts(self) -> NDArray[np.int32]:
        """(shards, buckets) samples of each bucket in each shard."""
        starts, ids = self.shard_starts, self.bucket_ids
        rows = [np.bincount(ids[a:b], minlength=len(self.buckets)) for a, b in pairwise(starts)]
        return np.array(rows, dtype=np.int32).reshape(len(self.shard_names), len(self.buckets))

    def save(self, directory: Path) -> None:
        """Write `index.safetensors` whole or not at all."""
        partial = directory / f"{INDEX_NAME}.partial"
        columns = {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)[2:]}
        buckets = [[b.frames, b.height, b.width, b.audio_steps] for b in self.buckets]
        tables = {"version": INDEX_VERSION, "shard_names": list(self.shard_names), "buckets": buckets}
        save_file(columns, partial, metadata={"tables": json.dumps(tables)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(directory / INDEX_NAME)

    @classmethod
    def load(cls, directory: str | Path) -> "Index":
        """The index of a local dataset, mapped into memory and checked against the manifest and the shard sizes.

        Raises `DataError` when the index is missing, damaged, or not that of these shards.
        """
        directory = Path(directory)
        index = cls.read(directory / INDEX_NAME)
        check_index(index, Manifest.load(directory), _size_of(directory), str(directory))
        return index

    @classmethod
    def read(cls, path: Path) -> "Index":
        """The columns of one index file, mapped into memory and not yet held against any shard."""
        if not path.exists():
            raise DataError(f"{path} is missing. Build it with: ltx2-plan --rebuild-index {path.parent}")
        try:
            with safe_open(path, framework="pt") as file:
                tables = json.loads((file.metadata() or {})["tables"])
                if tables.get("version") != INDEX_VERSION:
                    raise ValueError(f"version {tables.get('version')}; this program reads {INDEX_VERSION}")
                columns = {f.name: file.get_tensor(f.name).numpy() for f in fields(cls)[2:]}
            return cls(tuple(tables["shard_names"]), tuple(Bucket(*b) for b in tables["buckets"]), **columns)
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path}: not a readable index ({error}). {REBUILD} {path.parent}") from error


def _size_of(directory: Path) -> Callable[[str], int | None]:
    return lambda name: path.stat().st_size if (path := directory / name).exists() else None


def check_index(index: Index, manifest: Manifest, size_of: Callable[[str], int | None], where: str) -> None:
    """Raises `DataError` unless the index, the manifest and the shard files name the same shards of the same sizes.

    `size_of(name)` gives the bytes of a shard as it lies in the store, None when it is not there.
    """
    if unlike := sorted(set(index.shard_names) ^ set(manifest.shards)):
        raise DataError(
            f"{where}: index and manifest disagree about {len(unlike)} shards, first {unlike[0]}. {REBUILD} {where}; "
            "if the manifest is the older one, re-run data_prep.encode to its end"
        )
    for name, size in zip(index.shard_names, index.shard_sizes.tolist(), strict=True):
        if (actual := size_of(name)) != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise DataError(
                f"{where}/{name} {found}; the index says {size} bytes. Copy the shard again if the copy was cut short; "
                f"if the shard was rewritten, {REBUILD[0].lower()}{REBUILD[1:]} {where}"
            )


def build_index(directory: str | Path, num_workers: int = 0) -> Index:
    """Read the headers of all `*.tar` of a local directory, write `index.safetensors` there, and return the index.

    `num_workers` processes share the shards; 0 reads them in this process.
    Raises `DataError` when a shard is truncated or damaged, or a sample lacks one of its two members.
    """
    directory = Path(directory)
    shards = sorted(directory.glob("*.tar"))
    if not shards:
        raise DataError(f"{directory}: no *.tar here, so there is nothing to index. Run data_prep.encode first")
    scans = list(_map(scan_shard, shards, num_workers))
    index = merge_scans([path.name for path in shards], scans)
    index.save(directory)
    return index


def _map(function: Callable[[Path], Any], items: Sequence[Path], num_workers: int) -> Iterable[Any]:
    if num_workers < 1:
        yield from map(function, items)
        return
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(num_workers) as pool:
        yield from pool.map(function, items)


@dataclass(frozen=True, slots=True)
class ShardScan:
    """The columns of one shard; `bucket_ids` number the shard's own list of buckets."""

    size: int
    buckets: tuple[Bucket, ...]
    columns: Columns
    key_lengths: NDArray[np.int64]
    key_bytes: bytes


def merge_scans(names: Sequence[str], scans: Sequence[ShardScan]) -> Index:
    """The index of shards that were scanned one by one. Buckets are sorted: the order of work does not matter."""
    buckets = tuple(sorted({bucket for scan in scans for bucket in scan.buckets}))
    number = {bucket: i for i, bucket in enumerate(buckets)}
    ids = [np.array([number[b] for b in s.buckets], dtype=np.int32)[s.columns["bucket_ids"]] for s in scans]
    columns = {name: np.concatenate([scan.columns[name] for scan in scans]) for name in scans[0].columns}
    columns["bucket_ids"] = np.concatenate(ids)
    return Index(
        shard_names=tuple(names),
        buckets=buckets,
        shard_sizes=np.array([scan.size for scan in scans], dtype=np.int64),
        shard_starts=_starts([len(scan.key_lengths) for scan in scans]),
        key_starts=_starts(np.concatenate([scan.key_lengths for scan in scans])),
        key_bytes=np.frombuffer(b"".join(scan.key_bytes for scan in scans), dtype=np.uint8),
        **columns,
    )


def _starts(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def scan_shard(path: Path) -> ShardScan:
    """The columns of one shard. Raises `DataError` naming the shard, and the key where it is known."""
    with open(path, "rb") as file:
        records = _records(path, file)
        shapes = [_shapes(path, key, file, members[TENSORS_EXTENSION]) for key, members in records.items()]
    buckets = tuple(sorted({bucket for bucket, _ in shapes}))
    number = {bucket: i for i, bucket in enumerate(buckets)}
    members = list(records.values())
    keys = [key.encode() for key in records]
    columns: Columns = {
        "tensors_offset": np.array([m[TENSORS_EXTENSION][0] for m in members], dtype=np.int64),
        "tensors_size": np.array([m[TENSORS_EXTENSION][1] for m in members], dtype=np.int64),
        "meta_offset": np.array([m[META_EXTENSION][0] for m in members], dtype=np.int64),
        "meta_size": np.array([m[META_EXTENSION][1] for m in members], dtype=np.int32),
        "bucket_ids": np.array([number[bucket] for bucket, _ in shapes], dtype=np.int32),
        "text_lengths": np.array([length for _, length in shapes], dtype=np.int32),
    }
    lengths = np.array([len(key) for key in keys], dtype=np.int64)
    return ShardScan(path.stat().st_size, buckets, columns, lengths, b"".join(keys))


def _records(path: Path, file: BinaryIO) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> (offset, size) of the shard's records, in their order."""
    records: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in _members(path, file):
        key, extension = split_name(name)
        if records.setdefault(key, {}).setdefault(extension, (offset, size)) != (offset, size):
            raise DataError(f"{path}: {name} stands there twice. Re-run data_prep.encode for this shard")
    for key, members in records.items():
        if missing := {TENSORS_EXTENSION, META_EXTENSION} - members.keys():
            raise DataError(f"{path}: {key} has no .{min(missing)} member. Re-run data_prep.encode for this shard")
    return records


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as WebDataset parts them: at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _members(path: Path, file: BinaryIO) -> list[tuple[str, int, int]]:
    """Name, data offset and size of every file in the tar. A damaged header or missing end is an error, not an end."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: truncated or damaged shard ({error}). Copy or encode it again") from error
    file.seek(end)
    if (block := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        last = members[-1][0] if members else "its start"
        problem = "truncated" if len(block) < tarfile.BLOCKSIZE else "damaged"
        raise DataError(f"{path}: {problem} after {last} (byte {end} of the shard). Copy or encode it again")
    return members


def _shapes(path: Path, key: str, file: BinaryIO, member: tuple[int, int]) -> tuple[Bucket, int]:
    """Bucket and text length of a sample, from the header of its safetensors member."""
    offset, size = member
    try:
        file.seek(offset)
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"header of {length} bytes in a member of {size}")
        shapes = {name: entry["shape"] for name, entry in json.loads(file.read(length)).items() if "shape" in entry}
        _, frames, height, width = shapes.get("video", (0, 0, 0, 0))
        _, audio_steps, _ = shapes.get("audio", (0, 0, 0))
        return Bucket(frames, height, width, audio_steps), shapes["video_text"][0]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise DataError(f"{path}: {key} is damaged ({error!r}). Re-run data_prep.encode for this shard") from error

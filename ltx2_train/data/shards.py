"""Shards as files: written whole as ordinary WebDataset tars, read member by member at known offsets.

A local shard is read with one `pread` per record. A remote one (any fsspec URL) is read by ranges, or copied once per
node into a cache directory when one is given. Every read is held against the tar header that precedes it, so that a
shard that is not the one the index describes is found before its bytes are believed.
"""

import fcntl
import hashlib
import logging
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ltx2_train.data.index import META_EXTENSION, TENSORS_EXTENSION, Index, Location
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.record import Manifest, Sample, encode_record

logger = logging.getLogger(__name__)
T = TypeVar("T")
OPEN_FILES = 64  # shards that a process keeps open
HASH_CHUNK = 1 << 22
LONGEST_SPAN = 1 << 16  # bytes between a record's two members up to which they are read in one go
SHORT_NAME = 100  # a tar header holds longer names in a second header, or in part


@dataclass(kw_only=True, slots=True)
class StoreConfig:
    """How records are read from where the shards lie."""

    cache: str | None = None
    """Node-local directory that remote shards are copied into when first needed; it must have room for all of them.
    None reads remote records by range."""
    attempts: int = 3
    """How often a failing read is tried before it is an error."""
    retry_seconds: float = 1.0
    """Wait before the second attempt; doubled for each further one."""
    verify: bool = False
    """Hold the SHA-256 of every shard against the manifest when the dataset is opened. Reads all bytes once."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"attempts = {self.attempts}; a read needs at least 1")
        if self.retry_seconds < 0:
            raise ConfigError(f"retry_seconds = {self.retry_seconds}; must be >= 0")


def write_shard(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write a latent shard whole or not at all. The same samples give the same bytes."""
    import webdataset

    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                tar.write({"__key__": sample.key, **encode_record(sample)})
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_remote(location: str | Path) -> bool:
    return "://" in str(location)


def as_local(location: str | Path) -> str:
    """The location without a `file://` in front of it."""
    return str(location).removeprefix("file://")


class Store:
    """The files of one directory, local or behind an fsspec URL. Safe to use after a fork; reads are retried."""

    def __init__(self, location: str | Path, config: StoreConfig | None = None) -> None:
        self.location = as_local(location).rstrip("/") or "/"
        self.config = config or StoreConfig()
        self.remote = is_remote(self.location)
        self.retried_reads = 0  # attempts that failed and were made again, in this process
        self.version = ""  # of the files: those of another version are cached apart
        self._files: OrderedDict[str, int] = OrderedDict()
        self._filesystem: tuple[int, Any, str] | None = None

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the directory, from one listing."""
        if not self.remote:
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.location) if entry.is_file()}
        filesystem, root = self._remote()
        entries = self._retried(self.location, lambda: filesystem.ls(root, detail=True))
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def read(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes of a file from `start`. Raises `DataError` naming the file if unreadable or too short."""
        data = self._retried(self.path(name), lambda: self._read_once(name, start, size))
        if len(data) < size:
            raise DataError(f"{self.path(name)}: truncated, it ends before byte {start + size}. Copy the shard again")
        return data

    def fetch(self, name: str, directory: Path) -> Path:
        """A local copy of a remote file, made once however many processes ask for it."""
        target = directory / name
        with _locked(directory / f".{name}.lock"):
            if not target.exists():
                self._retried(self.path(name), lambda: self._download(name, target))
        return target

    def _download(self, name: str, target: Path) -> None:
        filesystem, root = self._remote()
        partial = target.with_name(f"{target.name}.partial")
        filesystem.get_file(f"{root}/{name}", str(partial))
        partial.replace(target)

    def _read_once(self, name: str, start: int, size: int) -> bytes:
        if not self.remote:
            return self._pread(self.path(name), start, size)
        if self.config.cache is not None:
            return self._pread(str(self.fetch(name, self.cache_directory())), start, size)
        filesystem, root = self._remote()
        data: bytes = filesystem.cat_file(f"{root}/{name}", start=start, end=start + size)
        return data

    def cache_directory(self) -> Path:
        """Where this version of this location's files is kept inside the cache."""
        assert self.config.cache is not None
        directory = (
            Path(self.config.cache) / hashlib.sha256(f"{self.location} {self.version}".encode()).hexdigest()[:16]
        )
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _pread(self, path: str, start: int, size: int) -> bytes:
        data = b""
        try:
            while part := os.pread(self._descriptor(path), size - len(data), start + len(data)):
                data += part  # a single pread gives at most 2 GB
        except OSError:
            if path in self._files:  # the next attempt opens it again: a handle of a network file can go stale
                os.close(self._files.pop(path))
            raise
        return data

    def _descriptor(self, path: str) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(path)
        return self._files[path]

    def _remote(self) -> tuple[Any, str]:
        """The filesystem and the directory's path in it. A forked process makes its own: connections are not shared."""
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            import fsspec

            filesystem, root = fsspec.url_to_fs(self.location, skip_instance_cache=True)
            self._filesystem = os.getpid(), filesystem, str(root).rstrip("/")
        return self._filesystem[1:]

    def _retried(self, what: str, read: Callable[[], T]) -> T:
        wait = self.config.retry_seconds
        for attempt in range(1, self.config.attempts + 1):
            try:
                return read()
            except FileNotFoundError as error:
                raise DataError(f"{what} is missing. Copy it again, or re-run data_prep.encode") from error
            except OSError as error:
                if attempt == self.config.attempts:
                    raise DataError(
                        f"{what}: unreadable after {attempt} attempts ({error}). Check the store"
                    ) from error
                self.retried_reads += 1
                logger.warning("%s: attempt %d of %d failed (%s)", what, attempt, self.config.attempts, error)
            time.sleep(wait)
            wait *= 2
        raise AssertionError("attempts >= 1")

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


@contextmanager
def _locked(path: Path) -> Any:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_members(store: Store, index: Index, i: int) -> tuple[bytes, bytes]:
    """The safetensors and json bytes of sample i. Raises `DataError` naming shard and key."""
    at = index.location(i)
    shard, key = index.shard_names[at.shard], index.key(i)
    spans = {TENSORS_EXTENSION: (at.tensors_offset, at.tensors_size), META_EXTENSION: (at.meta_offset, at.meta_size)}
    try:
        blocks = _read_spans(store, shard, at)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    for (extension, (_, size)), block in zip(spans.items(), blocks, strict=True):
        _check_header(store.path(shard), key, f"{key}.{extension}", size, block[: tarfile.BLOCKSIZE])
    tensors, meta = (block[tarfile.BLOCKSIZE :] for block in blocks)
    return tensors, meta


def _read_spans(store: Store, shard: str, at: Location) -> list[bytes]:
    """Both members with the tar header before each, in one read when they are neighbours."""
    parts = [(at.tensors_offset, at.tensors_size), (at.meta_offset, at.meta_size)]
    spans = [(offset - tarfile.BLOCKSIZE, offset + size) for offset, size in parts]
    start, end = min(a for a, _ in spans), max(b for _, b in spans)
    if end - start - sum(b - a for a, b in spans) > LONGEST_SPAN:
        return [store.read(shard, a, b - a) for a, b in spans]
    data = store.read(shard, start, end - start)
    return [data[a - start : b - start] for a, b in spans]


def _check_header(shard: str, key: str, name: str, size: int, block: bytes) -> None:
    try:
        header = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        found = header.name
    except tarfile.HeaderError:  # damaged, or not a header at all
        header, found = None, "no tar header"
    same_name = found == name or len(name.encode()) > SHORT_NAME or not name.isascii()
    if header is None or header.size != size or not same_name:
        raise DataError(
            f"{key}: {shard} holds {found} where the index places {name}: the shard is damaged, or the index is not "
            "its own. Copy the shard again, or rebuild the index with: ltx2-plan --rebuild-index"
        )


def verify_shards(store: Store, manifest: Manifest, names: Sequence[str] | None = None) -> None:
    """Raises `DataError` naming the first shard whose SHA-256 is not the manifest's. Reads every byte."""
    sizes = store.sizes()
    for name in names if names is not None else sorted(manifest.shards):
        if _hash(store, name, sizes.get(name, 0)) != manifest.shards[name]:
            raise DataError(
                f"{store.path(name)}: its SHA-256 is not the manifest's, so bytes were changed or lost. "
                "Copy the shard again, or re-run data_prep.encode for it"
            )


def _hash(store: Store, name: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, HASH_CHUNK):
        digest.update(store.read(name, start, min(HASH_CHUNK, size - start)))
    return digest.hexdigest()

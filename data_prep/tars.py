"""WebDataset tars: written whole or not at all, with the same bytes for the same records; damage is noticed."""

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ltx2_train.errors import DataError
from ltx2_train.media.write import atomic

BLOCK = 512
Members = dict[str, bytes]  # by extension: what follows the first dot of the member's base name


def write_tar(path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> str:
    """Write (key, members by extension) in order; returns the SHA-256 of the file. Times and owners are constant."""
    import webdataset

    with atomic(path) as partial:
        with partial.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
            for key, members in records:
                tar.write({"__key__": key, **members})
        flush(partial)
        return file_sha256(str(partial))


def read_tar(url: str) -> Iterator[tuple[str, Members]]:
    """Yields (key, members by extension) of a tar at a path or fsspec URL.

    Raises `DataError` naming the shard and the place for one that is damaged, cut short or repeats a key.
    """
    seen: set[str] = set()
    key, members, after = "", Members(), "the beginning"
    with _open(url) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for entry in tar:
                    if not entry.isfile():
                        continue
                    entry_key, extension = split_key(entry.name)
                    if entry_key != key and members:
                        yield key, members
                        members = Members()
                    if (entry_key != key and entry_key in seen) or extension in members:
                        raise DataError(f"{url}: key {entry_key!r} comes twice. Give every clip a key of its own")
                    key, after = entry_key, f"member {entry.name!r}"
                    seen.add(key)
                    content = tar.extractfile(entry)
                    assert content is not None
                    members[extension] = content.read()
                _check_end(file, tar.offset, url, after)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{url}: damaged or truncated after {after} ({error}). {_ADVICE}") from error
    if members:
        yield key, members


def flush(path: Path) -> None:
    """Bring a file's bytes to the disk, so that it is whole even after the machine goes down."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


_ADVICE = "Copy the shard again, or delete it and re-run data_prep.pack"


def _check_end(file: BinaryIO, offset: int, url: str, after: str) -> None:
    """tarfile takes a damaged header for the end of the archive; a true end is a block of zeros."""
    file.seek(offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK or block.count(0) != BLOCK:
        what = "truncated" if len(block) < BLOCK else "damaged"
        raise DataError(f"{url}: {what} at byte {offset}, after {after}. {_ADVICE}")


def split_key(name: str) -> tuple[str, str]:
    """(key, extension) of a member name: the key ends at the first dot of the base name."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def file_sha256(url: str) -> str:
    with _open(url) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(url: str) -> int:
    """Bytes of a file at a path or fsspec URL."""
    if "://" not in url:
        return Path(url).stat().st_size
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return int(filesystem.info(path)["size"])


def state_of(url: str) -> list[Any]:
    """What tells a file whose hash is not known from another: its place, size and time of change."""
    if "://" not in url:
        return [str(Path(url).resolve()), size_of(url), Path(url).stat().st_mtime_ns]
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return [url, size_of(url), filesystem.ukey(path)]


def list_shards(patterns: Iterable[str]) -> list[str]:
    """The tars that directories, paths, globs, {000..009} ranges and fsspec URLs name, in order and without repetition.

    Raises `DataError` for a pattern that names nothing.
    """
    import braceexpand

    shards: list[str] = []
    for pattern in patterns:
        found = [shard for part in braceexpand.braceexpand(pattern) for shard in _expand(part)]
        if not found:
            raise DataError(f"{pattern}: no shard there. Give a directory of tars, a path, a glob or a URL")
        shards += found
    return list(dict.fromkeys(shards))


def _expand(pattern: str) -> list[str]:
    if "://" in pattern:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(pattern)
        if not glob.has_magic(path):
            return [pattern]
        return [filesystem.unstrip_protocol(p) for p in sorted(filesystem.glob(path))]
    if Path(pattern).is_dir():
        return sorted(str(path) for path in Path(pattern).glob("*.tar"))
    return sorted(glob.glob(pattern))


def _open(url: str) -> Any:
    if "://" not in url:
        try:
            return open(url, "rb")
        except OSError as error:
            raise DataError(f"{url}: cannot be opened ({error.strerror}). Correct the path") from error
    import fsspec

    return fsspec.open(url, "rb").open()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all, with the same bytes for the same value."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")
        flush(partial)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, whole or not at all."""
    with atomic(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

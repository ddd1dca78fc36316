"""The clips that a folder of media files or a metadata file names: one row each, whether it can become a clip or not."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.dropped import Dropped
from data_prep.raw import AUDIO_SUFFIXES, VIDEO_SUFFIXES, parse_json, read_caption
from ltx2_train.errors import DataError

ALIASES = {"media_path": "video"}
METADATA_SUFFIXES = (".csv", ".json", ".jsonl")
NOT_PACKED = ("reference_video", "ref_media_path", "reference_audio", "video_mask", "audio_mask")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the metadata: where a clip's media lie and what is said about it."""

    key: str
    source: str  # the media's path as the metadata gives it: the held-out split goes by it
    video: Path | None
    audio: Path | None
    caption: str
    truth: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, str] | None = None  # reason and message of a file that was found but cannot become a clip


def read_rows(source: Path, out: Path | None = None) -> list[Row]:
    """The clips that a folder or a metadata file names. Raises `DataError` for none, and for a key that comes twice.

    Files of a folder that cannot become clips are rows with a `fault`, so that they are counted and listed; what lies
    under `out` was written by `pack` itself and is none of them.
    """
    if source.is_dir():
        rows = list(_folder_rows(source, out))
    elif source.suffix.lower() in METADATA_SUFFIXES:
        rows = [_row(fields, source, place) for place, fields in enumerate(read_metadata(source), 1)]
    else:
        raise DataError(f"{source}: neither a folder nor a .csv, .json or .jsonl file. Give one of these")
    if not rows:
        raise DataError(f"{source}: names no clips. Put media files there, or rows into it")
    first: dict[str, Row] = {}
    for row in rows:
        if row.fault is not None:
            continue
        if row.key in first:
            both = f"{first[row.key].source} and {row.source}"
            raise DataError(f"{source}: {both} have the same key {row.key!r}. Rename or remove one of them")
        first[row.key] = row
    return rows


def _folder_rows(folder: Path, out: Path | None) -> Iterator[Row]:
    """Video files with the sound file of the same name, if there is one; sound files on their own; and what is neither."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_set_aside(folder, path, out))
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    sounds: dict[Path, list[Path]] = {}
    for path in sorted((p for p in files if p.suffix.lower() in AUDIO_SUFFIXES), key=_audio_order):
        sounds.setdefault(path.with_suffix(""), []).append(path)
    heard = {stem: paths[0] for stem, paths in sounds.items()}
    for path in videos:
        yield _folder_row(folder, path, path, heard.pop(path.with_suffix(""), None))
    for path in heard.values():
        yield _folder_row(folder, path, None, path)
    for first, *others in sounds.values():
        yield from (_faulty(folder, path, "shadowed_audio", f"{path}: {first.name} is taken") for path in others)
    for path in files:
        if path.suffix.lower() not in VIDEO_SUFFIXES + AUDIO_SUFFIXES:
            yield _faulty(folder, path, "unknown_suffix", f"{path}: {_KNOWN}")


_KNOWN = f"known suffixes are {' '.join(VIDEO_SUFFIXES + AUDIO_SUFFIXES)}. Convert or remove it"


def _audio_order(path: Path) -> tuple[int, Path]:
    return AUDIO_SUFFIXES.index(path.suffix.lower()), path


def _is_set_aside(folder: Path, path: Path, out: Path | None) -> bool:
    """True for captions, a metadata file, hidden files and what `pack` wrote to `out`, which are no clips."""
    if out is not None and path.resolve().is_relative_to(out.resolve()) and out.resolve() != folder.resolve():
        return True
    parts = path.relative_to(folder).parts
    is_metadata = len(parts) == 1 and path.stem == "metadata" and path.suffix.lower() in METADATA_SUFFIXES
    return path.suffix.lower() == ".txt" or is_metadata or any(part.startswith(".") for part in parts)


def _faulty(folder: Path, path: Path, reason: str, detail: str) -> Row:
    name = path.relative_to(folder).as_posix()
    return Row(clip_key(name), name, None, None, "", fault=(reason, detail))


def _folder_row(folder: Path, named: Path, video: Path | None, audio: Path | None) -> Row:
    text, name = named.with_suffix(".txt"), named.relative_to(folder).as_posix()
    try:
        caption = read_caption(text.read_bytes(), str(text)) if text.exists() else ""
    except Dropped as error:
        return _faulty(folder, named, error.reason, str(error))
    return Row(clip_key(name), name, video, audio, caption)


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """Rows of a metadata file as they stand there."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        lines = [text] if path.suffix.lower() == ".json" else [line for line in text.split("\n") if line.strip()]
        rows = [parse_json(line) for line in lines]
        rows = rows[0] if path.suffix.lower() == ".json" else rows
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Correct it") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: need a list of objects with the columns video, audio, caption")
    return rows


def _row(fields: dict[Any, Any], metadata: Path, place: int) -> Row:
    if None in fields:
        raise DataError(f"{metadata}: row {place} has more cells than there are columns. Put quotes around its caption")
    fields = {name: value for name, value in fields.items() if value not in (None, "")}
    for alias, name in ALIASES.items():
        if alias in fields and name in fields:
            raise DataError(f"{metadata}: row {place}: {name!r} and {alias!r} mean the same. Fill in only one of them")
    fields = {ALIASES.get(name, name): value for name, value in fields.items()}
    if unpacked := [name for name in NOT_PACKED if name in fields]:
        known = "only video, audio and caption are. Remove the column or leave it empty"
        raise DataError(f"{metadata}: row {place}: column {unpacked[0]!r} is not packed; {known}")
    video, audio = fields.pop("video", None), fields.pop("audio", None)
    named = video or audio
    if named is None:
        raise DataError(f"{metadata}: row {place}: neither 'video' (or 'media_path') nor 'audio' is given. Fill one in")
    paths = [metadata.parent / path if path else None for path in (video, audio)]
    caption = str(fields.pop("caption", "")).strip()
    return Row(clip_key(str(named)), str(named), paths[0], paths[1], caption, fields)


def clip_key(name: str) -> str:
    """The key of a media file in shards: its path without suffix, free of dots and slashes."""
    stem = Path(name).with_suffix("").as_posix()
    return re.sub(r"[^\w\-]", "_", stem.strip("./").replace("/", "__"))

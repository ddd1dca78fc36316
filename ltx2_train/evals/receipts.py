"""The small files beside a clip's media: which media are whole, and which are ours to remove."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ltx2_train.errors import ConfigError
from ltx2_train.media.write import PARTIAL


def receipt_path(directory: Path, name: str) -> Path:
    """The small file beside a clip's media that is written last: where it is, the media are whole."""
    return directory / f"{name}.json"


def read_receipt(directory: Path, name: str, digest: str) -> dict[str, Any] | None:
    """The receipt of exactly this clip, if its files are there in full size; else None."""
    receipt = _listing(receipt_path(directory, name))
    if receipt is None or receipt.get("digest") != digest or not receipt["files"]:
        return None
    try:
        is_whole = all((directory / name).stat().st_size == size for name, size in receipt["files"].items())
    except OSError:  # one of them is gone
        return None
    return receipt if is_whole else None


def begun_path(directory: Path, name: str) -> Path:
    """The list of the media that a clip of that name removes and places, there while it does so."""
    return directory / f".{name}{PARTIAL}" / "files.json"


def media_of(directory: Path, name: str) -> list[str]:
    """The media that an earlier clip of that name left: what its receipt lists, or the list of one that was killed.

    Nothing else in the directory is ours to remove.
    """
    receipt = receipt_path(directory, name)
    found = _listing(receipt if os.path.lexists(receipt) else begun_path(directory, name))
    own = re.compile(rf"{re.escape(name)}(\.mp4|\.wav|/\d{{5,}}\.png)")
    return [file for file in (found or {"files": {}})["files"] if own.fullmatch(file)]


def check_free(directory: Path, name: str, files: Sequence[str]) -> None:
    """Raises `ConfigError` where something that no earlier clip left lies where this one's files would be written.

    `files` as `Clip.files` lists them. Where some lie in the folder of the clip's name, nothing else may lie there.
    """
    action = "Give the clip another name, or another --out, or move that away"
    receipt, folder = receipt_path(directory, name), directory / name
    if os.path.lexists(receipt) and "digest" not in (_listing(receipt) or {}):
        raise ConfigError(f"{receipt}: there already, and not written by this program. {action}")
    own, wanted = set(media_of(directory, name)), list(files)
    if any(file.startswith(f"{name}/") for file in files):
        inside = [f"{name}/{entry.name}" for entry in folder.iterdir()] if folder.is_dir() else [name]
        wanted = [*wanted, *inside]
    foreign = next((file for file in wanted if file not in own and os.path.lexists(directory / file)), None)
    if foreign is not None:
        raise ConfigError(f"{directory / foreign}: there already, and no receipt of this program lists it. {action}")


def _listing(path: Path) -> dict[str, Any] | None:
    """A file of ours that lists media with their sizes; None where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None

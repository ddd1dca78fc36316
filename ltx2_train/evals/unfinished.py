"""Samples that are done while others are not: one file each, so that an evaluation that is killed can be taken up.

Media and samples lie in a folder of their own until all are there. Only then they take their names in the directory,
and the file that names them is written last: whoever reads it finds everything. What is removed and placed is listed all
the while, so that whatever is killed here leaves nothing that the next evaluation does not know.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ltx2_train.evals.files import write_json

logger = logging.getLogger(__name__)

MEDIA = ("media", "strip", "mel")  # entries of a clip in samples.json that name files
PREFIX = "unfinished-"
SPENT = PREFIX + "spent-"  # folders that only wait to be removed
PARTIAL = ".partial"
NO_STRIP = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Done:
    """One sample that was made and measured. `clip`: the number of the clip whose caption it has."""

    clip: int
    entry: dict[str, Any]
    rows: Mapping[str, Mapping[str, Sequence[float] | None]]  # by side (sampled, real) and metric
    strip: NDArray[np.uint8] | None


class Unfinished:
    """The folder of samples that follow from `settings`; what was made with others is not theirs."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.directory = directory
        self.place = directory / f"{PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def open(self, *, anew: bool) -> dict[int, Done]:
        """The samples that are done, none if `anew`; those of other settings are removed. What was cut short is not done."""
        for other in self.directory.glob(f"{PREFIX}*"):
            if anew or other != self.place:
                _remove(other)
        self.place.mkdir(parents=True, exist_ok=True)
        found = [] if anew else sorted(self.place.glob("[0-9]*.npz"))
        read = {int(path.stem): _read(path) for path in found}
        return {number: done for number, done in read.items() if done is not None}

    def keep(self, number: int, done: Done) -> None:
        """Write a sample, whole or not at all."""
        path = self.place / f"{number:06d}.npz"
        text = json.dumps({"clip": done.clip, "entry": done.entry, "rows": done.rows}, allow_nan=False)
        partial = path.with_suffix(PARTIAL)
        with partial.open("wb") as file:
            np.savez(file, text=np.array(text), strip=NO_STRIP if done.strip is None else done.strip)
        partial.replace(path)

    def close(self, name: str, contents: dict[str, Any]) -> None:
        """Move the media where they belong, write `contents` as `name` behind them, and remove the folder.

        What the last `name` tells of, or a `close` that was killed had listed, goes with it, but for what `contents` name.
        """
        target, listing = self.directory / name, self.directory / f".{name}{PARTIAL}"
        new, former = _told(contents), [*_told(_contents(target)), *_plain(_contents(listing).get("files", []))]
        write_json(listing, {"files": list(dict.fromkeys([*former, *new]))})
        target.unlink(missing_ok=True)
        for other in set(former) - set(new):
            (self.directory / other).unlink(missing_ok=True)
        for one in new:
            if (self.place / one).exists():  # else a `close` that was killed has placed it
                (self.place / one).replace(self.directory / one)
        write_json(target, contents)
        listing.unlink()
        _remove(self.place)


def _remove(folder: Path) -> None:
    """What of it cannot be removed (something has it open on a network file system) stays, under another name."""
    spent = folder if folder.name.startswith(SPENT) else folder.with_name(f"{SPENT}{uuid4().hex}")
    try:
        folder.replace(spent)
        shutil.rmtree(spent)
    except OSError as error:
        logger.warning("%s: not all of it could be removed (%s); the next evaluation tries again", spent, error)


def _read(path: Path) -> Done | None:
    """None, with a warning, for a file that is not whole: a machine that died may leave one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            strip = arrays["strip"]
            return Done(**json.loads(str(arrays["text"])), strip=strip if strip.size else None)
    except (BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is not whole (%s); the sample is made again", path, error)
        return None


def _contents(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none or, with a warning, if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except ValueError as error:
        logger.warning("%s cannot be read (%s); media that it names stay", path, error)
        return {}


def _told(contents: Mapping[str, Any]) -> list[str]:
    """The files beside a samples.json of these contents that it names."""
    sides = [entry.get(side, {}) for entry in contents.get("clips", []) for side in ("sampled", "real")]
    return _plain([side.get(kind) for side in sides for kind in MEDIA] + [contents.get("sheet")])


def _plain(names: Sequence[str | None]) -> list[str]:
    """The names of files that lie in the directory itself."""
    return [name for name in names if name and Path(name).name == name]

"""What a measurement is of: its clips, known by their content, and how they were measured. Only like is set beside like."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltx2_train.data.datasets import LatentDataset
from ltx2_train.errors import ConfigError, DataError

Identity = Mapping[str, Any]  # plain values, as they come back from a JSON file
UNKNOWN = "unknown"  # of a file without an identity: what can still be told from its contents stands beside it


def digest(values: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def clips_identity(dataset: LatentDataset, indices: Sequence[int]) -> dict[str, Any]:
    """Which clips of which data. The data are known by the hashes of their shards, wherever they lie."""
    keys = [dataset.index.key(index) for index in indices]
    return {"data": digest(dataset.manifest.shards), "clips": len(keys), "keys": digest(keys)}


def heldout_of(contents: Mapping[str, Any]) -> Identity:
    """What the contents of a heldout-STEP.json are of."""
    losses = contents.get("ema") or contents.get("raw") or {}
    known: Identity | None = losses.get("identity")
    return known or {
        UNKNOWN: True,
        "clips": losses.get("clips"),
        "keys": digest(losses.get("keys")),
        "sigmas": losses.get("sigmas"),
    }


def samples_of(contents: Mapping[str, Any]) -> Identity:
    """What the contents of a samples.json are of."""
    known: Identity | None = contents.get("identity")
    if known:
        return known
    asked = [[clip.get("key"), clip.get("seed")] for clip in contents.get("clips", [])]
    tolerance = (contents.get("sync") or {}).get("sampled", {}).get("tolerance_ms")
    told = {name: contents.get(name) for name in ("profile", "weights")}
    return {UNKNOWN: True, "clips": len(asked), "keys": digest(asked), "tolerance_ms": tolerance, **told}


def differences(first: Identity, other: Identity) -> str:
    """In words, what `other` has instead of what `first` has."""
    if first.get(UNKNOWN, False) != other.get(UNKNOWN, False):
        return "one does not say what it was measured on: an earlier version wrote it"
    names = [name for name in dict.fromkeys([*first, *other]) if first.get(name) != other.get(name)]
    return ", ".join(f"{name} {other.get(name)} instead of {first.get(name)}" for name in names)


def check_same(path: Path, there: Identity, here: Identity) -> None:
    """Raises `ConfigError` where the file at `path`, which is of `there`, would be replaced by one of `here`."""
    if there == here:
        return
    if there.get(UNKNOWN):
        said = "does not say what it was measured on (an earlier version wrote it)"
    else:
        said = f"is another measurement: this one has {differences(there, here)}"
    raise ConfigError(f"{path} {said}. It is not replaced: give --out with a folder for this one, or remove that file")


def read_contents(path: Path) -> dict[str, Any]:
    """What an evaluation's JSON file says. Raises `FileNotFoundError`, and `DataError` for one that is not whole."""
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not whole JSON ({error}). Remove it and evaluate its step again") from error
    return contents

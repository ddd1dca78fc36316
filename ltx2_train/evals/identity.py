"""What a measurement is of: its clips, known by their content, and how they were measured. Only like is set beside like."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ltx2_train.data.datasets import LatentDataset
from ltx2_train.errors import ConfigError, DataError

Identity = Mapping[str, Any]  # plain values, as they come back from a JSON file
UNKNOWN = "unknown"  # of a file without an identity: what can still be told from its contents stands beside it
DIGESTS = {"data": "other data", "keys": "other clips", "profile_settings": "other settings of the sampler profile"}
IMPLIED_BY = {"keys": {"data", "clips"}, "profile_settings": {"profile"}}  # what differs anyhow where one of these does


def digest(values: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def clips_identity(dataset: LatentDataset, indices: Sequence[int]) -> dict[str, Any]:
    """Which clips of which data. The data are known by the hashes of their shards, wherever they lie."""
    keys = [dataset.index.key(index) for index in indices]
    return {"data": digest(dataset.manifest.shards), "clips": len(keys), "keys": digest(keys)}


def dtype_name(dtype: torch.dtype) -> str:
    """What a model computes in, as identities spell it."""
    return str(dtype).removeprefix("torch.")


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
    names = _differing(first, other)
    return ", ".join(DIGESTS.get(n, f"{n} {other.get(n)} instead of {first.get(n)}") for n in names)


def _differing(first: Identity, other: Identity) -> list[str]:
    """What is not the same in both, without what follows from the rest of it."""
    names = [name for name in dict.fromkeys([*first, *other]) if first.get(name) != other.get(name)]
    return [name for name in names if not IMPLIED_BY.get(name, set()) & set(names)]


def check_same(path: Path, there: Identity, here: Identity, options: Mapping[str, str]) -> None:
    """Raises `ConfigError` where the file at `path`, which is of `there`, would be replaced by one of `here`.

    `options`: those of the program by the name of what they set.
    """
    if there == here:
        return
    names = _differing(there, here)
    alike = ""
    if all(name in options and there.get(name) is not None for name in names):
        alike = " ".join(f"{options[name]} {_plain(there[name])}" for name in names) + " to measure the same again, or "
    if there.get(UNKNOWN):
        said = "does not say what it was measured on (an earlier version wrote it)"
    else:
        said = f"is another measurement: this one has {differences(there, here)}"
    raise ConfigError(
        f"{path} {said}. It is not replaced: give {alike}--out with a folder for this one, or remove that file"
    )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_source(path: Path, there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the file at `path`, made of the weights `there`, would be replaced by one of `here`.

    Both as `Trained.source` tells them; None: not known.
    """
    if there is not None and there["manifest"] == here["manifest"]:
        return
    said = "does not say of which weights it is" if there is None else f"is of {_source(there)}"
    raise ConfigError(
        f"{path} {said}, and this is a measurement of {_source(here)}. It is not replaced: name another --out, or remove "
        "that file"
    )


def _source(source: Mapping[str, Any]) -> str:
    return f"{source['checkpoint']} (manifest {source['manifest'][:16]})"


def read_contents(path: Path) -> dict[str, Any]:
    """What an evaluation's JSON file says. Raises `FileNotFoundError`, and `DataError` for one that is not whole."""
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not whole JSON ({error}). Remove it and evaluate its step again") from error
    return contents

"""An engine's checkpoint on disk: tensors in PyTorch's distributed format, and a JSON index that says what they are.

Read here without an engine; engines of either backend write and load the same files.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltx2_train.distributed.base import other_base, verified
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError

FORMAT = "dcp-3"
INDEX_FILE = "engine.json"
READ_AT_ONCE = 1 << 30  # bytes of weights read in one call


class WritingSave:
    """A distributed checkpoint being written; the JSON index follows when all ranks' tensors are on disk."""

    def __init__(self, future: Future, directory: Path, world: World, index: str, num_bytes: int) -> None:
        self._future, self._directory, self._world, self._index = future, directory, world, index
        self.num_bytes = num_bytes

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Raises `CheckpointError` with the first failure of any rank."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            self._future.result()
            if self._world.is_main:
                (self._directory / INDEX_FILE).write_text(self._index)
        except CheckpointException as error:  # not an Exception, and silent about the cause in its last line
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"rank {rank}: {type(cause).__name__}: {cause}") from error

    def files(self) -> list[Path]:
        return sorted(self._directory.glob(f"__{self._world.rank}_*.distcp"))


def checkpoint_talk(world: World) -> dict[str, Any]:
    """How the ranks agree on a checkpoint: on a group of its own, as saving talks from its own thread; one rank not at all.

    The threads of gloo that copy what is gathered keep OpenMP workers for good, and with more of those than cores all
    of them sleep at every barrier: a small model's step on a CPU took twice as long from the first checkpoint on.
    """
    if world.size == 1:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant: there is no one to talk to
        return {"no_dist": True}
    return {"process_group": dist.new_group(backend="gloo")}


def split_extra(extra: dict[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The dicts of sharded tensors, and the plain values."""
    sharded = {k: v for k, v in extra.items() if isinstance(v, dict) and any(isinstance(t, Tensor) for t in v.values())}
    return sharded, {k: v for k, v in extra.items() if k not in sharded}


def read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX_FILE
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint index ({error})") from error
    if index.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: written as {index.get('format')!r}, this version reads {FORMAT!r}. Start the run anew, or go on "
            "with the version that wrote it"
        )
    return index


def check_fits(
    index: dict[str, Any], own: dict[str, Any], extra: dict[str, dict[str, Tensor]], directory: Path
) -> None:
    """Raises `CheckpointError` naming what differs between a checkpoint and an engine's own contents."""
    lines = _differences(index["shapes"], own["shapes"], "parameter")
    lines += _differences(dict.fromkeys(index["trained"]), dict.fromkeys(own["trained"]), "trained parameter")
    saved = {f"{key}.{name}" for key, names in index["extra_tensors"].items() for name in names}
    lacking = {f"{key}.{name}" for key, shards in extra.items() for name in shards} - saved
    lines += _differences({}, dict.fromkeys(lacking), "tensor")
    if lines:
        raise CheckpointError(f"{directory} belongs to another model:\n  " + "\n  ".join(lines))
    if changed := [name for name, value in own["base"].items() if index["base"][name] != value]:
        raise CheckpointError(other_base(directory, changed[0]))


def _differences(saved: dict[str, Any], own: dict[str, Any], what: str) -> list[str]:
    """One line per name whose value differs; at most ten."""
    lines = [f"{what} {name}: only in the checkpoint" for name in saved if name not in own]
    lines += [f"{what} {name}: not in the checkpoint" for name in own if name not in saved]
    both = (name for name in own if name in saved and saved[name] != own[name])
    lines += [f"{what} {name}: {saved[name]} in the checkpoint, {own[name]} here" for name in both]
    return lines if len(lines) <= 10 else [*lines[:10], f"and {len(lines) - 10} more"]


def saved_weights(
    directory: Path, *, averaged: str | None = None, initial: Iterable[tuple[str, Any]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole CPU tensor) of every parameter of a checkpoint, some at a time, without an engine or a process group.

    `averaged`: the `extra` key of the moving average, which then stands in for the trained weights. `initial`: the
    weights that the run started from, of which the frozen ones are taken; without them those are left out. Verify the
    checkpoint's hashes first. Raises `CheckpointError` for another base than the one it was trained beside.
    """
    index = read_index(directory)
    keys = _saved_keys(index, averaged, directory)
    part: dict[str, Tensor] = {}
    for left, (name, entry) in zip(range(len(keys) - 1, -1, -1), keys.items(), strict=True):
        part[name] = _empty_like_saved(entry[1])
        if not left or sum(tensor.nbytes for tensor in part.values()) >= READ_AT_ONCE:
            _read({keys[n][0]: tensor for n, tensor in part.items()}, directory)
            yield from part.items()
            part = {}
    if initial is not None:
        yield from verified(initial, index["base"], directory)


def _saved_keys(index: dict[str, Any], averaged: str | None, directory: Path) -> dict[str, tuple[str, Any]]:
    """The key in the checkpoint, and what it says of it, of every tensor that is saved."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    trained = set(index["trained"]) if averaged else set()
    names = [name for name in index["shapes"] if name not in index["base"]]
    keys = {n: f"extra.{averaged}.{n}" if n in trained else f"model.{n}" for n in names}
    if missing := [key for key in keys.values() if key not in metadata]:
        found = list(index["extra_tensors"]) or "none"
        raise CheckpointError(f"{directory} holds no {missing[0]}; its averages: {found}")
    return {name: (key, metadata[key]) for name, key in keys.items()}


def _empty_like_saved(entry: Any) -> Tensor:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    assert isinstance(entry, TensorStorageMetadata)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _read(state: dict[str, Tensor], directory: Path) -> None:
    """Fills the tensors. A call has a price of its own, about 0.1 s, so many are read at once."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant: one process reads all
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)

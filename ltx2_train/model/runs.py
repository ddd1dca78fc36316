"""From a compact form of per-token timesteps to runs of the token axis."""

import weakref

import torch
from torch import Tensor

from ltx2_train.model.fused import Runs

MAX_RUNS = 16  # beyond this many pieces, one modulation row per token is the better layout


class RunsCache:
    """Runs by the identity of the `timestep_index` they were read from: one look at its values per geometry."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[weakref.ref[Tensor], int, Runs | None]] = {}

    def resolve(self, timesteps: Tensor, index: Tensor | None) -> tuple[Tensor, Runs | None]:
        """(timesteps to embed, runs): the few distinct values with runs, or values that broadcast over the tokens."""
        if timesteps.dim() == 3:
            timesteps = timesteps.squeeze(-1)
        if index is None:
            return timesteps, None
        runs = self._get(index)
        return (timesteps, runs) if runs is not None else (timesteps.gather(1, index.expand(len(timesteps), -1)), None)

    def _get(self, index: Tensor) -> Runs | None:
        key, version = id(index), 0 if index.is_inference() else index._version
        entry = self._runs.get(key)
        if entry is not None and entry[0]() is index and entry[1] == version:
            return entry[2]
        runs = _shared_runs(index.detach().cpu())
        self._runs[key] = (weakref.ref(index, lambda _: self._runs.pop(key, None)), version, runs)
        return runs


def _shared_runs(index: Tensor) -> Runs | None:
    """The runs that all samples of (B or 1, T) share, or None where samples differ, or there are none or too many."""
    if not bool((index == index[:1]).all()):
        return None
    values, lengths = torch.unique_consecutive(index[0], return_counts=True)
    if not 0 < len(values) <= MAX_RUNS:
        return None
    stops = lengths.cumsum(0).tolist()
    return tuple(zip([0, *stops[:-1]], stops, values.tolist(), strict=True))

"""The frozen weights beside those that are trained: known by fingerprints instead of being saved with every checkpoint."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError

Part = tuple[Tensor, int]  # elements of a tensor that follow each other, and the place of the first in the flat tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed integer; its multiples spread over all 64 bits
_AT_ONCE = 1 << 22  # elements: their integers take 8 bytes each


def fingerprints(parts: dict[str, Part], world: World) -> dict[str, str]:
    """The fingerprint of every tensor of which each rank has a part, and no two ranks the same: equal on all ranks.

    A fingerprint is of values, places and dtype, and does not depend on how the tensor is sharded. It finds a mistake,
    not an attack.
    """
    if not parts:
        return {}
    sums = torch.stack([_sum(values, first) for values, first in parts.values()])
    totals = world.all_sum(sums.to(world.device)).tolist()
    return {name: _spelled(parts[name][0].dtype, total) for name, total in zip(parts, totals, strict=True)}


def verified(weights: Iterable[tuple[str, Any]], base: dict[str, str], source: object) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole initial weights that `base` has a fingerprint of, in the dtype that they were kept in.

    `weights` are tensors, or stored ones that give theirs with `read()`; only those that are asked for are read. Raises
    `CheckpointError` naming the first that is not the one that `source` was trained beside, or that is missing.
    """
    missing = set(base)
    for name, tensor in weights if missing else ():
        if name in missing:
            dtype = getattr(torch, base[name].split(":")[0])
            kept = (tensor if isinstance(tensor, Tensor) else tensor.read()).to(dtype)
            if _spelled(dtype, int(_sum(kept, 0))) != base[name]:
                raise CheckpointError(other_base(source, name))
            missing.remove(name)
            yield name, kept
        if not missing:
            return
    if missing:
        raise CheckpointError(f"{source}: the initial weights lack {len(missing)} frozen tensors, as {min(missing)}")


def other_base(source: object, name: str) -> str:
    """What is said of frozen weights that are not those of a checkpoint."""
    return (
        f"{source} was trained beside other frozen weights: {name} differs. Frozen weights are not part of a checkpoint. "
        "Give the model.weights (or the seed) that the run started from"
    )


def _sum(values: Tensor, first: int) -> Tensor:
    """() int64: the elements' bits, each times an odd number that its place gives, modulo 2**64."""
    bits = values.detach().reshape(-1).view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _AT_ONCE):
        part = bits[start : start + _AT_ONCE]
        places = torch.arange(first + start, first + start + len(part), device=bits.device)
        total += (part * (places * _GOLDEN | 1)).sum()
    return total


def _spelled(dtype: torch.dtype, total: int) -> str:
    return f"{str(dtype).removeprefix('torch.')}:{total % (1 << 64):016x}"

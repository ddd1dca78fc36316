"""Large clips in overlapping tiles that are blended: less memory, and another result near the seams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ltx2_train.errors import ConfigError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Axis:
    """How one dim is cut: spans in latent units, and the slices of input and output that a span stands for."""

    dim: int
    spans: Sequence[Span]
    take: Callable[[int, int], slice]
    place: Callable[[int, int], slice]

    def weights(self, index: int) -> Tensor:
        """Of the output of span `index`: rising over what it shares with the one before, falling over the next."""
        own = self.place(*self.spans[index])
        weights = torch.ones(own.stop - own.start)
        if index > 0:
            rise = ramp(self.place(*self.spans[index - 1]).stop - own.start)
            weights[: len(rise)] *= rise
        if index + 1 < len(self.spans):
            fall = 1 - ramp(own.stop - self.place(*self.spans[index + 1]).start)
            weights[len(weights) - len(fall) :] *= fall
        return weights


def ramp(length: int) -> Tensor:
    """From 0 up to below 1: where a tile begins it has seen least of its surroundings."""
    return torch.arange(length) / max(length, 1)


def spans(length: int, size: int, overlap: int) -> list[Span]:
    """[start, end) of tiles of `size` that share `overlap` with the next and cover `length`; the last may be shorter."""
    if length <= size:
        return [(0, length)]
    return [(start, min(start + size, length)) for start in range(0, length - overlap, size - overlap)]


def check_tile(name: str, tile: tuple[int, int], unit: int) -> tuple[int, int]:
    """Size and overlap in latent units. Raises `ConfigError` for what is no multiple of `unit` or overlaps too much."""
    size, overlap = tile
    if size % unit or overlap % unit or not 0 < overlap <= size // 2:
        raise ConfigError(
            f"{name}=({size}, {overlap}); size and overlap have to be multiples of {unit}, the overlap at most half the size"
        )
    return size // unit, overlap // unit


def blend(run: Callable[[Tensor], Tensor], x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """`run` on every tile of `x`, blended linearly where tiles overlap; fp32."""
    out: Tensor | None = None
    for indices in product(*(range(len(axis.spans)) for axis in axes)):
        taken, placed = [slice(None)] * x.ndim, [slice(None)] * x.ndim
        for axis, index in zip(axes, indices, strict=True):
            taken[axis.dim], placed[axis.dim] = axis.take(*axis.spans[index]), axis.place(*axis.spans[index])
        tile = run(x[tuple(taken)]).float()
        for axis, index in zip(axes, indices, strict=True):
            tile = tile * axis.weights(index).to(tile.device).reshape(-1, *[1] * (tile.ndim - 1 - axis.dim))
        out = tile.new_zeros(_whole(tile, axes)) if out is None else out
        out[tuple(placed)] += tile
    assert out is not None, "there is at least one tile"
    return out


def _whole(tile: Tensor, axes: Sequence[Axis]) -> list[int]:
    """The shape of the result, of which `tile` is a part."""
    shape = list(tile.shape)
    for axis in axes:
        shape[axis.dim] = axis.place(*axis.spans[-1]).stop
    return shape

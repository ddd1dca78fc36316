"""Rotary position embeddings over seconds and pixels, and their cache.

Source: RoFormer (arXiv:2104.09864) eq. 15 and 34, with LTX-Video's fractional coordinates and frequency ladder.
"""

import weakref
from dataclasses import dataclass
from functools import lru_cache
from math import pi

import numpy as np
import torch
from torch import Tensor

from ltx2_train.model.config import RopeType


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One RoPE of the model: `axes` of the positions, the whole `width` (all heads), and how coordinates are scaled."""

    axes: int
    width: int
    heads: int
    max_pos: tuple[float, ...]
    theta: float
    double_precision: bool
    rope_type: RopeType


@dataclass(frozen=True, slots=True)
class Rope:
    """Tables (B or 1, T, N, K/2) for split halves, or (B or 1, T, N, K) for interleaved pairs."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def of(self, samples: slice) -> "Rope":
        """The tables of some samples of the batch."""
        return self if len(self.cos) == 1 else Rope(self.cos[samples], self.sin[samples], self.interleaved)


@lru_cache(maxsize=64)
def frequency_ladder(spec: RopeSpec, device: torch.device) -> Tensor:
    """theta^(k / (count - 1)) * pi / 2 for k < count = width // (2 axes), fp32; built in fp64 where the release does.

    An fp32-built ladder differs by up to 5e-3: enough to change the picture.
    """
    count = spec.width // (2 * spec.axes)
    if spec.double_precision:
        exponents = np.linspace(0.0, 1.0, count, dtype=np.float64)
        return torch.from_numpy(np.power(spec.theta, exponents) * pi / 2).float().to(device)
    return (torch.tensor(spec.theta) ** torch.linspace(0.0, 1.0, count) * pi / 2).to(device)


def build_rope(positions: Tensor, spec: RopeSpec, dtype: torch.dtype) -> Rope:
    """Tables for positions (B, n, T, 2) fp32 given as [start, end); the first `spec.axes` axes are used, at midpoints.

    Phases are fp32 products, laid out frequency-major, axis-minor, over the whole width: every head gets another slice.
    What the ladder leaves over stands at the front as cos = 1, sin = 0.
    """
    midpoints = (positions[:, : spec.axes, :, 0] + positions[:, : spec.axes, :, 1]) / 2
    max_pos = torch.tensor(spec.max_pos, device=positions.device)[None, :, None]
    fractions = (midpoints / max_pos * 2 - 1).transpose(1, 2)  # (B, T, n)
    phases = (fractions[:, :, None, :] * frequency_ladder(spec, positions.device)[:, None]).flatten(2)
    if spec.rope_type is RopeType.INTERLEAVED:
        phases = phases.repeat_interleave(2, dim=-1)
    missing = (spec.width if spec.rope_type is RopeType.INTERLEAVED else spec.width // 2) - phases.shape[-1]
    phases = torch.nn.functional.pad(phases, (missing, 0))  # cos 0 = 1, sin 0 = 0
    shape = (*phases.shape[:2], spec.heads, phases.shape[-1] // spec.heads)  # -1 fails where there are no tokens
    cos, sin = phases.cos().to(dtype).view(shape), phases.sin().to(dtype).view(shape)
    return Rope(cos, sin, spec.rope_type is RopeType.INTERLEAVED)


def rotate(x: Tensor, rope: Rope, *, inverse: bool = False) -> Tensor:
    """Rotate x (B, T, N, K) by the tables, or back. Computed in the dtype of `x`."""
    sin = -rope.sin if inverse else rope.sin
    a, b = (x[..., 0::2], x[..., 1::2]) if rope.interleaved else x.chunk(2, dim=-1)
    cos, sin = (rope.cos[..., 0::2], sin[..., 0::2]) if rope.interleaved else (rope.cos, sin)
    out = torch.empty_like(x)
    out_a, out_b = (out[..., 0::2], out[..., 1::2]) if rope.interleaved else out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


class RopeCache:
    """Tables by the identity of the positions tensor they were built from.

    Positions depend on geometry and frame rate only, and `geometry` hands out the same tensor for the same geometry, so
    one lookup a step replaces the sines and cosines of every token. An entry dies with its positions.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple, tuple[weakref.ref[Tensor], int, Rope]] = {}

    def get(self, positions: Tensor, spec: RopeSpec, dtype: torch.dtype) -> Rope:
        key = (id(positions), spec, dtype)
        version = 0 if positions.is_inference() else positions._version
        entry = self._tables.get(key)
        if entry is not None and entry[0]() is positions and entry[1] == version:
            return entry[2]
        rope = build_rope(positions, spec, dtype)
        reference = weakref.ref(positions, lambda _: self._tables.pop(key, None))
        self._tables[key] = (reference, version, rope)
        return rope

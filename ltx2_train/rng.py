"""Randomness as a function: every draw is keyed by (seed, purpose, step, position), never by a rank or by history."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on all parts of the key and on nothing else."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the key alone."""
    return torch.Generator(device=device).manual_seed(derive_seed(*key))


@dataclass(frozen=True, slots=True)
class BatchRng:
    """Draws for the samples of one micro-batch. `positions` are their places in the global batch of the step.

    A sample's draws depend on (seed, step, position) only, so they are the same whichever rank computes it and
    whatever stands beside it in the micro-batch.

    `drawn_on`: the device that normal numbers are drawn on, wherever they are wanted; None: there, which is fastest.
    """

    seed: int
    step: int
    positions: Sequence[int]
    drawn_on: str | None = None

    def _generators(self, purpose: str, device: torch.device | str) -> list[torch.Generator]:
        return [generator(self.seed, purpose, self.step, p, device=device) for p in self.positions]

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) fp32 standard normal numbers on `device`; where they are drawn tells which: CPU and CUDA differ."""
        source = self.drawn_on or device
        rows = [torch.randn(tuple(shape), generator=g, device=source) for g in self._generators(purpose, source)]
        return torch.stack(rows).to(device)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) fp32 numbers in [0, 1), on the CPU."""
        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self._generators(purpose, "cpu")])

"""Adaptive layer norm with one shared embedding of the timestep ("AdaLN-single").

Source: PixArt-alpha (arXiv:2310.00426) section 2.3; sinusoid of DDPM (arXiv:2006.11239), cosine first.
"""

from math import log

import torch
from torch import Tensor, nn

SINUSOID_DIM = 256
MAX_PERIOD = 10000.0


def sinusoid(timesteps: Tensor) -> Tensor:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i / 128): (..., 256) fp32. Rounding t to bf16 first would ruin it."""
    half = SINUSOID_DIM // 2
    frequencies = torch.exp(
        torch.arange(half, device=timesteps.device, dtype=torch.float32) * (-log(MAX_PERIOD) / half)
    )
    phases = timesteps.float()[..., None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_DIM, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        embedded = sinusoid(timesteps).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(embedded)))


class AdaLayerNormSingle(nn.Module):
    """Timesteps (B, K), already scaled, to `rows` modulation vectors of `width` each."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(width)})  # the published keys have this level
        self.linear = nn.Linear(width, rows * width)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """((B, K, rows, D) modulation, (B, K, D) embedding before the last activation)."""
        embedded = self.emb["timestep_embedder"](timesteps)
        return self.linear(nn.functional.silu(embedded)).unflatten(-1, (self.rows, -1)), embedded

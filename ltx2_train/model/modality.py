"""What one hands the transformer, and what it gives back. Runtime values: frozen, no behaviour."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor


class Stream(StrEnum):
    """The two streams."""

    video = "video"
    audio = "audio"


SKIP_VIDEO_SELF_ATTN = "SKIP_VIDEO_SELF_ATTN"
SKIP_AUDIO_SELF_ATTN = "SKIP_AUDIO_SELF_ATTN"
SKIP_A2V = "SKIP_A2V"
SKIP_V2A = "SKIP_V2A"

Perturbation = tuple[str, list[int] | None]  # (kind, blocks or None = all blocks)
Perturbations = list[list[Perturbation]]  # one list per batch element


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One stream of a batch.

    `timesteps` are sigmas per token, in one of three forms with equal results:
    (B, 1), all tokens of a sample alike; (B, T), one per token; (B, K) with `timestep_index` (B, T) int64, the few
    distinct values of each sample and which of them a token has. The model multiplies by 1000 itself.
    """

    latent: Tensor  # (B, T, C) patchified
    sigma: Tensor  # (B,) fp32, the noise level of the stream; 0 when it is given clean
    timesteps: Tensor  # fp32, see above
    positions: Tensor  # (B or 1, n, T, 2) fp32: [start, end) in seconds, pixels, pixels (n = 3) or seconds (n = 1)
    context: Tensor  # (B, L, W) text features
    timestep_index: Tensor | None = None
    context_mask: Tensor | None = None  # (B, L): int or bool, 1 = valid; or float, additive
    attention_mask: Tensor | None = None  # (B, T, T) in [0, 1]: strength of self-attention
    keyframes_mask: Tensor | None = None  # (B, T, 1), video only: > 0 marks tokens that stand for a single pixel frame
    enabled: bool = True  # False: the hidden state passes all blocks unchanged, and still serves the other stream


class Velocity(NamedTuple):
    """The model's output per stream, (B, T, C): velocity = noise - clean. None for a stream that was not given."""

    video: Tensor | None
    audio: Tensor | None

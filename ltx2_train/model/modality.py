"""What one hands the transformer, and what it gives back. Runtime values: frozen, but for what a context keeps."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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


class SharedContext:
    """Text features of a group of samples, for all passes of guidance and all steps of a generation.

    What the model makes of the text alone is made by the first forward and kept in this object: the connectors' output,
    the caption projection, and the keys and values of every block. Where the architecture modulates the text with
    sigma (prompt AdaLN: 2.3 and later), keys and values are other ones at each step: they are made once per forward.
    While gradients are recorded nothing is kept.

    The object belongs to one model with its weights of this moment: it is made for a generation and dropped with it.
    """

    def __init__(self, features: Tensor, mask: Tensor | None = None) -> None:
        """`features` (B, L, W) and `mask` (B, L) as in `Modality.context` and `Modality.context_mask`."""
        self.features = features
        self.mask = mask
        self._kept: dict[Hashable, Any] = {}

    def once(self, maker: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives: made at the first call for this `maker`, the module whose weights it is made with."""
        if torch.is_grad_enabled():
            return make()
        if maker not in self._kept:
            self._kept[maker] = make()
        return self._kept[maker]


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One stream of a batch.

    `timesteps` are sigmas per token, in one of three forms with equal results:
    (B, 1), all tokens of a sample alike; (B, T), one per token; (B, K) with `timestep_index` (B, T) int64, the few
    distinct values of each sample and which of them a token has. The model multiplies by 1000 itself.

    `context` is one tensor, or the shared context of each group of the batch, in order: the first `len(features)` samples
    have the first one, and so on. Features of all groups have one length L, and either all or none of them a mask; groups
    that share a context are of one sigma. `context_mask` then is None.
    """

    latent: Tensor  # (B, T, C) patchified
    sigma: Tensor  # (B,) fp32, the noise level of the stream; 0 when it is given clean
    timesteps: Tensor  # fp32, see above
    positions: Tensor  # (B or 1, n, T, 2) fp32: [start, end) in seconds, pixels, pixels (n = 3) or seconds (n = 1)
    context: Tensor | tuple[SharedContext, ...]  # (B, L, W) text features, or the groups' own
    timestep_index: Tensor | None = None
    context_mask: Tensor | None = None  # (B, L): int or bool, 1 = valid; or float, additive
    attention_mask: Tensor | None = None  # (B, T, T) in [0, 1]: strength of self-attention
    keyframes_mask: Tensor | None = None  # (B, T, 1), video only: > 0 marks tokens that stand for a single pixel frame
    enabled: bool = True  # False: the hidden state passes all blocks unchanged, and still serves the other stream


class Velocity(NamedTuple):
    """The model's output per stream, (B, T, C): velocity = noise - clean. None for a stream that was not given."""

    video: Tensor | None
    audio: Tensor | None

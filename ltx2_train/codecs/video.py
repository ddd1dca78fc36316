"""What a video codec is: pixels to normalised latents and back."""

from typing import Protocol

import torch
from torch import Tensor


class VideoCodec(Protocol):
    """Latents have 128 channels, one latent frame per 8 pixel frames (the first holds one), one pixel per 32 x 32."""

    name: str  # name and version or fingerprint: goes into the manifest, a mismatch is refused

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, 8k + 1, H, W) in [-1, 1] to normalised latents (B, 128, k + 1, H / 32, W / 32) fp32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to (B, 3, 8k + 1, H, W), about [-1, 1]."""

    def to(self, device: torch.device | str) -> None:
        """Has all that it holds lie on the device, and what it gives too."""

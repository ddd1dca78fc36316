"""What an audio codec is: stereo waveforms to normalised latents and back."""

from typing import Protocol

import torch
from torch import Tensor


class AudioCodec(Protocol):
    """Latents are (8, T, 16) per clip, 25 steps per second."""

    name: str  # name and version or fingerprint: goes into the manifest, a mismatch is refused

    @property
    def sample_rate(self) -> int:
        """Hz of what `decode` returns."""

    def mel(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(B, 2, N) at `sample_rate` to log-mel (B, 2, T_mel, M)."""

    def encode(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(B, 2, N) in [-1, 1] to normalised latents (B, 8, round(25 N / sample_rate), 16) fp32."""

    def decode_mel(self, latents: Tensor) -> Tensor:
        """Normalised latents to log-mel (B, 2, T_mel, M)."""

    def vocode(self, mel: Tensor) -> Tensor:
        """Log-mel to a waveform (B, 2, N) at `self.sample_rate`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to a waveform (B, 2, N) at `self.sample_rate`."""

    def to(self, device: torch.device | str) -> None:
        """Has all that it holds lie on the device, and what it gives too."""

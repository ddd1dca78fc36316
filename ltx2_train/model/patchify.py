"""Latent grid <-> token sequence."""

from torch import Tensor

from ltx2_train.geometry import AUDIO_BINS, AUDIO_CHANNELS


def patchify_video(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) to tokens (B, F*H*W, C) in order f, h, w."""
    return latents.flatten(2).transpose(1, 2)


def unpatchify_video(tokens: Tensor, f: int, h: int, w: int) -> Tensor:
    """Tokens (B, F*H*W, C) to (B, C, F, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, (f, h, w))


def patchify_audio(latents: Tensor) -> Tensor:
    """(B, 8, T, 16) to tokens (B, T, 128), channel-major: feature = channel * 16 + bin."""
    return latents.transpose(1, 2).flatten(2)


def unpatchify_audio(tokens: Tensor) -> Tensor:
    """Tokens (B, T, 128) to (B, 8, T, 16)."""
    return tokens.unflatten(2, (AUDIO_CHANNELS, AUDIO_BINS)).transpose(1, 2)

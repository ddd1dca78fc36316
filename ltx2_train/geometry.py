"""Shapes and positions of video and audio on the latent grid.

Shape letters used throughout the project:
`B` batch, `C` channels, `F H W` latent frames/height/width, `M` mel bins, `T` tokens (`Tv` video, `Ta` audio),
`L` text tokens, `D` width, `N` heads, `K` head width.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ltx2_train.errors import DataError

TIME_SCALE = 8  # pixel frames per latent frame (the first latent frame holds one)
SPACE_SCALE = 32  # pixels per latent row or column
VIDEO_CHANNELS = 128
AUDIO_CHANNELS = 8  # an audio latent step is AUDIO_CHANNELS x AUDIO_BINS = 128 numbers
AUDIO_BINS = 16
AUDIO_STEPS_PER_SECOND = 25  # 16000 Hz / hop 160 / 4 mel frames
MEL_FRAMES_PER_STEP = 4
MEL_HOP = 160  # samples at AUDIO_RATE between mel frames: 10 ms
AUDIO_RATE = 16000
CACHED_GEOMETRIES = 8  # positions kept at a time; the RoPE tables that hang on one can take 100 MB of a device


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames` = 8k + 1 pixel frames.

    Raises `DataError` when `frames` is not of that form.
    """
    if frames < 1 or (frames - 1) % TIME_SCALE:
        nearest = max(1, round((frames - 1) / TIME_SCALE) * TIME_SCALE + 1)
        raise DataError(f"{frames} frames; the video codec needs 8k + 1 (nearest: {nearest})")
    return (frames - 1) // TIME_SCALE + 1


def pixel_frames(latents: int) -> int:
    """Pixel frames that `latents` latent frames decode to."""
    return TIME_SCALE * (latents - 1) + 1


def latent_size(pixels: int, name: str = "size") -> int:
    """Latent rows or columns of `pixels` pixels. Raises `DataError` when it is not a multiple of 32."""
    if pixels < SPACE_SCALE or pixels % SPACE_SCALE:
        nearest = max(SPACE_SCALE, round(pixels / SPACE_SCALE) * SPACE_SCALE)
        raise DataError(
            f"{name} of {pixels} px; the video codec needs a multiple of {SPACE_SCALE} (nearest: {nearest})"
        )
    return pixels // SPACE_SCALE


def audio_latent_length(frames: int, fps: float) -> int:
    """Audio latent steps beside `frames` pixel frames: round(25 * frames / fps), ties to even."""
    return round(AUDIO_STEPS_PER_SECOND * frames / fps)


def video_positions(frames: int, height: int, width: int, fps: float) -> Tensor:
    """RoPE coordinates (3, T, 2) fp32 of a clip: [start, end) in seconds, pixels, pixels, in token order f, h, w.

    `frames`, `height`, `width` are in pixels. The first latent frame covers one pixel frame, every other eight.
    """
    f, h, w = latent_frames(frames), latent_size(height, "height"), latent_size(width, "width")
    return latent_video_positions(f, h, w, fps)


def latent_video_positions(f: int, h: int, w: int, fps: float) -> Tensor:
    """As `video_positions`, for a latent grid (F, H, W)."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (f, h, w)), indexing="ij")).reshape(3, -1)
    scale = torch.tensor([TIME_SCALE, SPACE_SCALE, SPACE_SCALE])[:, None, None]
    bounds = (torch.stack([grid, grid + 1], dim=-1) * scale).float()
    bounds[0] = (bounds[0] + 1 - TIME_SCALE).clamp(min=0) / fps
    return bounds


def audio_positions(num_steps: int) -> Tensor:
    """RoPE coordinates (1, T, 2) fp32 of audio latent steps: [start, end) in seconds."""
    mel_frame = torch.arange(num_steps, dtype=torch.float32) * MEL_FRAMES_PER_STEP
    bounds = torch.stack([mel_frame, mel_frame + MEL_FRAMES_PER_STEP], dim=-1)
    # Multiplied, then divided: times 0.01 rounds otherwise, and RoPE multiplies the last bit by up to 15,708.
    return ((bounds + 1 - MEL_FRAMES_PER_STEP).clamp(min=0) * MEL_HOP / AUDIO_RATE)[None]


def batch_video_positions(f: int, h: int, w: int, fps: tuple[float, ...], device: torch.device) -> Tensor:
    """Positions (B, 3, T, 2) of samples that share a latent grid, or (1, 3, T, 2) when they share the frame rate too.

    The usual case, one rate, gives the same tensor object for the same arguments, so that what is derived from it (RoPE
    tables) can be cached by identity. A mixture of rates is built anew: there are too many of them to keep.
    """
    if len(set(fps)) == 1:
        return _shared_video_positions(f, h, w, fps[0], device)
    return torch.stack([latent_video_positions(f, h, w, rate) for rate in fps]).to(device, non_blocking=True)


@lru_cache(maxsize=CACHED_GEOMETRIES)
def _shared_video_positions(f: int, h: int, w: int, fps: float, device: torch.device) -> Tensor:
    return latent_video_positions(f, h, w, fps)[None].to(device)


@lru_cache(maxsize=CACHED_GEOMETRIES)
def batch_audio_positions(num_steps: int, device: torch.device) -> Tensor:
    """Positions (1, 1, T, 2) shared by all samples of a batch; the same arguments give the same tensor object."""
    return audio_positions(num_steps)[None].to(device)

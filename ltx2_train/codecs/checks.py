"""What a codec takes: shapes and ranges of pixels, sound and latents, refused with the bound and the next action."""

import torch
from torch import Tensor

from ltx2_train import geometry
from ltx2_train.errors import DataError

PIXEL_LIMIT = 1.5  # [-1, 1] and the overshoot of resizing; catches [0, 255]
WAVEFORM_LIMIT = 4.0  # [-1, 1] and the overshoot of lossy decoders; catches 16-bit integers


def check_video(video: Tensor) -> Tensor:
    """The video in fp32. Raises `DataError` unless it is (B, 3, 8k + 1, 32 h, 32 w) with values in about [-1, 1]."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise DataError(f"video of shape {tuple(video.shape)}; the video codec needs (B, 3, F, H, W)")
    geometry.latent_frames(video.shape[2])
    geometry.latent_size(video.shape[3], "height")
    geometry.latent_size(video.shape[4], "width")
    return _check_values(video, "video", PIXEL_LIMIT)


def check_waveform(waveform: Tensor) -> Tensor:
    """The waveform in fp32. Raises `DataError` unless it is (B, 2, N) with values in about [-1, 1]."""
    if waveform.ndim != 3 or waveform.shape[1] != 2:
        raise DataError(
            f"waveform of shape {tuple(waveform.shape)}; the audio codec needs (B, 2, N). Use to_stereo first"
        )
    return _check_values(waveform, "waveform", WAVEFORM_LIMIT)


def check_latents(latents: Tensor, *shape: int | None) -> None:
    """Raises `DataError` unless the shape behind the batch is the one given; None is any size of at least 1."""
    sizes = latents.shape[1:]
    if len(sizes) != len(shape) or any(
        got < 1 if want is None else got != want for got, want in zip(sizes, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(f"latents of shape {tuple(latents.shape)}; the codec needs (B, {wanted})")


def _check_values(values: Tensor, name: str, limit: float) -> Tensor:
    if not values.is_floating_point():
        raise DataError(f"{name} of {values.dtype}; the codec needs floating-point values in [-1, 1]")
    low, high = values.detach().aminmax() if values.numel() else (values.new_zeros(()), values.new_zeros(()))
    peak = float(torch.maximum(-low, high))  # abs() would make a copy of a long clip
    if not peak <= limit:  # also catches NaN
        raise DataError(
            f"{name} reaches {peak:g}; the codec needs finite values in [-1, 1]. Rescale or repair the file"
        )
    return values.float()

"""The causal video encoder a piece at a time, with the same result as of the whole clip.

No layer of the encoder sees ahead, so a later piece needs nothing of an earlier one but the last two frames that stood
before each convolution. Memory follows the piece; the length of a clip is bounded by its pixels alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ltx2_train import geometry
from ltx2_train.errors import ConfigError

Layer = Any  # a module of diffusers, known by its parts
CONTEXT = 2  # frames before the present one that a convolution of three sees


def pieces(frames: int, chunk_frames: int) -> Iterator[tuple[int, int]]:
    """[start, end) of a clip's pieces: the first takes one frame more, the one that a latent frame holds alone.

    Raises `ConfigError` when `chunk_frames` is not a multiple of 8.
    """
    if chunk_frames < 1 or chunk_frames % geometry.TIME_SCALE:
        raise ConfigError(f"chunk_frames={chunk_frames}; it has to be a multiple of {geometry.TIME_SCALE}, e.g. 64")
    start = 0
    for stop in range(1 + chunk_frames, frames + chunk_frames, chunk_frames):
        yield start, min(stop, frames)
        start = stop


class CausalStream:
    """One pass of an encoder over a clip that comes in pieces: the first of 8k + 1 frames, the others of 8k."""

    def __init__(self, encoder: Layer) -> None:
        self.encoder = encoder
        self.past: dict[Layer, Tensor] = {}

    def __call__(self, video: Tensor) -> Tensor:
        """The next piece (B, 3, F, H, W) to what the encoder makes of it, (B, C, F', H / 32, W / 32), mean only."""
        encoder, is_first = self.encoder, not self.past
        x = self._convolve(encoder.conv_in, patchify(video, encoder.patch_size))
        for block in encoder.down_blocks:
            for layer in block.resnets:
                x = self._residual(layer, x)
            for layer in block.downsamplers:
                x = self._downsample(layer, x, is_first)
        for layer in encoder.mid_block.resnets:
            x = self._residual(layer, x)
        x = encoder.conv_act(encoder.norm_out(x))
        return self._convolve(encoder.conv_out, x)[:, :-1]  # the last channel is the variance

    def _convolve(self, layer: Layer, x: Tensor) -> Tensor:
        """The frames before the clip are its first one; those before a later piece are the last of the earlier."""
        past = self.past.get(layer)
        if past is None:
            past = x[:, :, :1].expand(-1, -1, CONTEXT, -1, -1)
        x = torch.cat([past, x], dim=2)
        self.past[layer] = x[:, :, -CONTEXT:].clone()  # a view would keep the whole piece
        return layer.conv(x)

    def _residual(self, layer: Layer, x: Tensor) -> Tensor:
        hidden = self._convolve(layer.conv1, layer.nonlinearity(layer.norm1(x)))
        hidden = self._convolve(layer.conv2, layer.nonlinearity(layer.norm2(hidden)))
        return hidden + x

    def _downsample(self, layer: Layer, x: Tensor, is_first: bool) -> Tensor:
        """Convolved and folded, plus folded and averaged; the first frame of a clip counts twice in time."""
        if is_first:
            x = torch.cat([x[:, :, : layer.stride[0] - 1], x], dim=2)
        averaged = fold(x, layer.stride).unflatten(1, (-1, layer.group_size)).mean(dim=2)
        return fold(self._convolve(layer.conv, x), layer.stride) + averaged


def patchify(video: Tensor, size: int) -> Tensor:
    """(B, C, F, H, W) to (B, C * size^2, F, H / size, W / size); the column within a patch is the slower index."""
    b, c, f, h, w = video.shape
    x = video.reshape(b, c, f, h // size, size, w // size, size)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * size * size, f, h // size, w // size)


def fold(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Space and time to depth: (B, C, F, H, W) to (B, C * t * h * w, F / t, H / h, W / w), channels in that order."""
    b, c, f, h, w = x.shape
    s, p, q = stride
    x = x.reshape(b, c, f // s, s, h // p, p, w // q, q)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * s * p * q, f // s, h // p, w // q)

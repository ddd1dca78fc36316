"""Codecs without weights: truncated cosine transforms with the shapes, rates and contract of the released LTX-2 VAEs.

They are stand-ins for trying, testing and debugging the training: exact, fast, deterministic, and poor pictures.
`docs/embedded_codec.md` has the measured figures.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ltx2_train import geometry
from ltx2_train.codecs import griffin_lim
from ltx2_train.codecs.checks import check_latents, check_video, check_waveform
from ltx2_train.codecs.mel import LogMel

VERSION = 1  # raise with the transform or the statistics: latents of another version are another dataset
NAME = f"dct-{VERSION}"
STATISTICS_FILE = "dct_statistics.json"

PLANE_CHANNELS = (72, 28, 28)  # of Y, Cb, Cr
TIME_WEIGHT = (
    0.5  # < 1 keeps more temporal than spatial detail: what decides when something happens, not how sharp it is
)
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # ITU-R BT.601, full range

MEL_FLOOR = 1e-2  # 5.5 nats of range: with 1e-5 the numbers would mostly describe 16-bit dither
BAND_BINS = geometry.MEL_FRAMES_PER_STEP  # mel bins per band: 64 / 16
AUDIO_ORDERS = [
    (0, 0, 0),
    (0, 1, 0),
    (0, 2, 0),
    (0, 3, 0),
    (0, 0, 1),
    (0, 1, 1),
    (1, 0, 0),
    (1, 1, 0),
]  # side, time, mel

VIDEO_FLOOR = 0.1  # deviations below this count as this: a channel that is nearly empty is not blown up
AUDIO_FLOOR = 0.05
WHITENING = 0.5  # z = (c - mean) / deviation ** 0.5: low orders, which carry the content, stay larger than high ones


def cosines(size: int, orders: int) -> Tensor:
    """The first `orders` rows of the orthonormal DCT-II of `size` points: (orders, size) fp64."""
    rows = torch.arange(orders, dtype=torch.float64)[:, None]
    basis = torch.cos(math.pi / size * (torch.arange(size, dtype=torch.float64) + 0.5) * rows) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Per-channel mean and scale, in the shape of the channels. `z = (c - mean) / scale`."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, mean: Tensor, deviation: Tensor, floor: float) -> "Normalisation":
        """Half-whitening with a floor on the deviation, rescaled so that the mean variance over channels is 1."""
        scale = deviation.clamp(min=floor) ** WHITENING
        return cls(mean, scale * (deviation / scale).square().mean().sqrt())

    def apply(self, coefficients: Tensor) -> Tensor:
        return (coefficients - self.mean.to(coefficients.device)) / self.scale.to(coefficients.device)

    def undo(self, latents: Tensor) -> Tensor:
        return latents * self.scale.to(latents.device) + self.mean.to(latents.device)


class BlockTransform:
    """Truncated orthonormal 3-D DCT of `depth` x 32 x 32 blocks to 128 channels in YCbCr."""

    def __init__(self, depth: int, channel_of: dict[tuple[int, int, int, int], int] | None = None) -> None:
        self.depth = depth
        self.channels = _allocate(depth) if channel_of is None else _align(_allocate(depth), channel_of)
        self.orders = 1 + max(max(u, v) for _, _, u, v in self.channels)
        self.time = cosines(depth, depth).float()
        self.space = cosines(geometry.SPACE_SCALE, self.orders).float()
        self.colour = torch.tensor(YCBCR)
        self.picture = torch.linalg.inv(torch.tensor(YCBCR, dtype=torch.float64)).float()
        grid = torch.arange(3 * depth * self.orders**2).reshape(3, depth, self.orders, self.orders)
        self.index = torch.stack([grid[c] for c in self.channels])

    def analyse(self, video: Tensor) -> Tensor:
        """RGB (B, 3, depth * F, H, W) to coefficients (B, 128, F, H / 32, W / 32)."""
        b, _, frames, height, width = video.shape
        f, h, w, u = frames // self.depth, height // geometry.SPACE_SCALE, width // geometry.SPACE_SCALE, self.orders
        x = video.reshape(-1, geometry.SPACE_SCALE) @ self.space.T.to(video.device)
        x = self.space.to(video.device) @ x.reshape(-1, geometry.SPACE_SCALE, w * u)
        x = self.time.to(video.device) @ x.reshape(b * 3 * f, self.depth, h * u * w * u)
        x = x.reshape(b, 3, f, self.depth, h, u, w, u).permute(0, 2, 4, 6, 1, 3, 5, 7)
        x = x.reshape(b, f, h, w, 3, self.depth * u * u)  # all sizes named: f is 0 for an image
        x = self.colour.to(video.device) @ x
        return x.flatten(-2)[..., self.index.to(video.device)].movedim(-1, 1)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """Coefficients (B, 128, F, H, W) to RGB (B, 3, depth * F, 32 H, 32 W): what was cut off is zero."""
        b, _, f, h, w = coefficients.shape
        u, device = self.orders, coefficients.device
        x = coefficients.new_zeros(b, f, h, w, 3 * self.depth * u * u)
        x[..., self.index.to(device)] = coefficients.movedim(1, -1)
        x = self.picture.to(device) @ x.reshape(b, f, h, w, 3, self.depth * u * u)
        x = x.reshape(b, f, h, w, 3, self.depth, u, u).permute(0, 4, 1, 5, 2, 6, 3, 7)
        x = self.time.T.to(device) @ x.reshape(b * 3 * f, self.depth, h * u * w * u)
        x = self.space.T.to(device) @ x.reshape(-1, u, w * u)
        x = x.reshape(-1, u) @ self.space.to(device)
        return x.reshape(b, 3, f * self.depth, h * geometry.SPACE_SCALE, w * geometry.SPACE_SCALE)


def _allocate(depth: int) -> list[tuple[int, int, int, int]]:
    """(plane, time, row, column order) of the 128 channels: per plane the lowest by (a t)^2 + u^2 + v^2."""
    orders = [(t, u, v) for t in range(depth) for u in range(geometry.SPACE_SCALE) for v in range(geometry.SPACE_SCALE)]
    orders.sort(key=lambda o: ((TIME_WEIGHT * o[0]) ** 2 + o[1] ** 2 + o[2] ** 2, o))
    return [(plane, *order) for plane, count in enumerate(PLANE_CHANNELS) for order in orders[:count]]


def _align(
    channels: list[tuple[int, int, int, int]], channel_of: dict[tuple[int, int, int, int], int]
) -> list[tuple[int, int, int, int]]:
    """The same channels, reordered: those that `channel_of` knows stand where it says, the others fill the gaps."""
    placed = {channel_of[c]: c for c in channels if c in channel_of}
    others = iter([c for c in channels if c not in channel_of])
    return [placed[i] if i in placed else next(others) for i in range(len(channels))]


class DctVideoCodec:
    """Video to latents of 128 channels: 8 x 32 x 32 blocks, the first frame alone, so an image is a clip too."""

    name = NAME

    def __init__(self) -> None:
        self.block, self.first = _transforms()
        statistics = _statistics()
        self.block_norm = _video_norm(statistics["video_block"])
        self.first_norm = _video_norm(statistics["video_first"])

    def to(self, device: torch.device | str) -> None:
        """It lies nowhere: what it needs follows the tensors that it is given."""

    def coefficients(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Transform before normalisation, of the first frame and of the blocks behind it. Raises as `encode`."""
        checked = check_video(video)
        return self.first.analyse(checked[:, :, :1]), self.block.analyse(checked[:, :, 1:])

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, 8k + 1, H, W) in [-1, 1] to normalised latents (B, 128, k + 1, H / 32, W / 32) fp32.

        Raises `DataError` for other shapes, for integers, for NaN and for values far outside [-1, 1].
        """
        first, blocks = self.coefficients(video)
        return torch.cat([self.first_norm.apply(first), self.block_norm.apply(blocks)], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, 128, k + 1, h, w) to (B, 3, 8k + 1, 32 h, 32 w) fp32, about [-1, 1]; not clamped."""
        check_latents(latents, geometry.VIDEO_CHANNELS, None, None, None)
        first, blocks = latents.float().split([1, latents.shape[2] - 1], dim=2)
        frames = [
            self.first.synthesise(self.first_norm.undo(first)),
            self.block.synthesise(self.block_norm.undo(blocks)),
        ]
        return torch.cat(frames, dim=2)


class DctAudioCodec:
    """Stereo waveforms to latents of 8 x 16 numbers per 40 ms: log-mel, mid/side, local DCT in 16 bands of 4 bins."""

    name = NAME

    def __init__(self) -> None:
        self.front = LogMel(floor=MEL_FLOOR)
        self.sample_rate = self.front.sample_rate
        self.norm = _audio_norm(_statistics()["audio"])

    def to(self, device: torch.device | str) -> None:
        """It lies nowhere: what it needs follows the tensors that it is given."""

    def mel(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(B, 2, N) at `sample_rate` to log-mel (B, 2, T_mel, 64). Raises `DataError` as `encode`."""
        return self.front(check_waveform(waveform), sample_rate)

    def encode(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(B, 2, N) in [-1, 1] to normalised latents (B, 8, round(25 N / sample_rate), 16) fp32.

        Raises `DataError` for other shapes, for integers, for NaN, for values far outside [-1, 1] and below 33 ms.
        """
        mel = self.mel(waveform, sample_rate)
        steps = round(geometry.AUDIO_STEPS_PER_SECOND * waveform.shape[-1] / sample_rate)
        return self.norm.apply(analyse_mel(mel[:, :, : _mel_frames(steps)]))

    def decode_mel(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, 8, T, 16) to log-mel (B, 2, 4 T - 3, 64), never below the front end's silence."""
        check_latents(latents, geometry.AUDIO_CHANNELS, None, geometry.AUDIO_BINS)
        return synthesise_mel(self.norm.undo(latents.float())).clamp(min=self.front.silence)

    def vocode(self, mel: Tensor) -> Tensor:
        """Log-mel (B, 2, T_mel, 64) to a waveform (B, 2, 160 T_mel) at 16 kHz, by Griffin-Lim."""
        return griffin_lim.vocode(mel, self.front).clamp(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, 8, T, 16) to a waveform (B, 2, 160 (4 T - 3)) at 16 kHz."""
        return self.vocode(self.decode_mel(latents))


@lru_cache(maxsize=1)
def _transforms() -> tuple[BlockTransform, BlockTransform]:
    """Of 8-frame blocks and of the first frame; channels of the same still pattern stand at the same place in both."""
    block = BlockTransform(geometry.TIME_SCALE)
    return block, BlockTransform(1, {order: channel for channel, order in enumerate(block.channels)})


def _mel_frames(steps: int) -> int:
    """Mel frames that `steps` latent steps stand for: the first step holds one, every other four."""
    return geometry.MEL_FRAMES_PER_STEP * (steps - 1) + 1


def analyse_mel(mel: Tensor) -> Tensor:
    """Log-mel (B, 2, 4 T - 3, 64) to coefficients (B, 8, T, 16); the first frame counts four times."""
    steps = geometry.MEL_FRAMES_PER_STEP
    grouped = torch.cat([mel[:, :, :1].expand(-1, -1, steps - 1, -1), mel], dim=2)
    x = grouped.reshape(len(mel), 2, -1, steps, geometry.AUDIO_BINS, BAND_BINS).permute(0, 2, 4, 1, 3, 5)
    return (x.flatten(-3) @ _audio_basis().T.to(mel.device)).permute(0, 3, 1, 2)


def synthesise_mel(coefficients: Tensor) -> Tensor:
    """Coefficients (B, 8, T, 16) to log-mel (B, 2, 4 T - 3, 64)."""
    steps = geometry.MEL_FRAMES_PER_STEP
    b, _, num_steps, bands = coefficients.shape
    x = coefficients.permute(0, 2, 3, 1) @ _audio_basis().to(coefficients.device)
    x = x.reshape(b, num_steps, bands, 2, steps, BAND_BINS).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, 2, num_steps * steps, bands * BAND_BINS)[:, :, steps - 1 :]


@lru_cache(maxsize=1)
def _audio_basis() -> Tensor:
    """(8, 2 * 4 * 4) orthonormal rows over (left and right, time, mel) of a band."""
    sides = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    local = cosines(BAND_BINS, BAND_BINS)
    rows = [torch.einsum("s,t,m->stm", sides[s], local[t], local[m]).flatten() for s, t, m in AUDIO_ORDERS]
    return torch.stack(rows).float()


@lru_cache(maxsize=1)
def _statistics() -> dict[str, Any]:
    """Mean and deviation of every channel before normalisation, measured once and shipped with the package."""
    text = resources.files("ltx2_train.codecs").joinpath(STATISTICS_FILE).read_text()
    statistics = json.loads(text)
    assert statistics["version"] == VERSION, f"{STATISTICS_FILE} is of version {statistics['version']}, not {VERSION}"
    return statistics


def _video_norm(entry: dict[str, list[float]]) -> Normalisation:
    mean, deviation = (torch.tensor(entry[name])[:, None, None, None] for name in ("mean", "deviation"))
    return Normalisation.of(mean, deviation, VIDEO_FLOOR)


def _audio_norm(entry: dict[str, list[float]]) -> Normalisation:
    shape = (geometry.AUDIO_CHANNELS, 1, geometry.AUDIO_BINS)
    mean, deviation = (torch.tensor(entry[name]).reshape(shape) for name in ("mean", "deviation"))
    return Normalisation.of(mean, deviation, AUDIO_FLOOR)


def measure_statistics(clips: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    """What `dct_statistics.json` holds, from pairs of video (3, F, H, W) in [-1, 1] and waveform (2, N) at 16 kHz."""
    block, first = _transforms()
    front = LogMel(floor=MEL_FLOOR)
    seen = {name: _Moments() for name in ("video_first", "video_block", "audio")}
    for video, waveform in clips:
        seen["video_first"].add(first.analyse(video[None, :, :1]).movedim(1, 0))
        seen["video_block"].add(block.analyse(video[None, :, 1:]).movedim(1, 0))
        if waveform is not None:
            mel = front(waveform[None], front.sample_rate)
            steps = 1 + (mel.shape[2] - 1) // geometry.MEL_FRAMES_PER_STEP
            seen["audio"].add(analyse_mel(mel[:, :, : _mel_frames(steps)]).permute(1, 3, 0, 2).flatten(0, 1))
    return {"version": VERSION} | {name: moments.result() for name, moments in seen.items()}


class _Moments:
    """Running first and second moments of the 128 channels of (128, ...) tensors, in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros(2, 128, dtype=torch.float64)

    def add(self, channels: Tensor) -> None:
        values = channels.flatten(1).double()
        self.count += values.shape[1]
        self.sums += torch.stack([values.sum(1), values.square().sum(1)])

    def result(self) -> dict[str, list[float]]:
        mean, square = self.sums / self.count
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        return {"mean": [round(x, 5) for x in mean.tolist()], "deviation": [round(x, 5) for x in deviation.tolist()]}

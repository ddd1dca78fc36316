"""The released video VAEs: the causal encoder, and the decoder by convolutions or by one step of diffusion."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import ceil
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train import geometry
from ltx2_train.codecs import ltx2, ltx2_names
from ltx2_train.codecs.causal import CausalStream, pieces
from ltx2_train.codecs.checks import check_latents, check_video
from ltx2_train.codecs.tiling import Axis, blend, check_tile, spans
from ltx2_train.errors import DataError
from ltx2_train.rng import generator

DECODE_NOISE = 0.025  # share of noise that a conditioned decoder expects in its latents
DECODE_TIMESTEP = 0.05
LATENT_FACTS = (  # what decides on the latents beside the tensors
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "downsample_type",
    "patch_size",
    "encoder_spatial_padding_mode",
)


def load_video_codec(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> "Ltx2VideoCodec":
    """The video VAE of a released file (2.0, 2.3, 2.5; whole or on its own) or of a diffusers folder.

    `dtype` is what encoder and decoder compute in, fp32 when not given; the reference encodes datasets in bf16.
    Raises `CheckpointError` when the file is not safetensors, when its header does not describe a video VAE, or when its
    tensors are not exactly those that the header asks for.
    """
    part = _open(path)
    ltx2.fill(part.modules, part.component, part.name_in_file, dtype or torch.float32)
    mean, deviation = ltx2.statistics(part.component, part.arguments["latent_channels"])
    return Ltx2VideoCodec(part.name, part.modules.to(device), mean.to(device), deviation.to(device))


def video_codec_name(path: str | Path) -> str:
    """The `name` of the codec that `load_video_codec` makes of a file, for which little of it is read. Raises likewise."""
    return _open(path).name


def has_video_codec(path: str | Path) -> bool:
    """Whether a released file or folder, of whatever parts, has a video VAE among them.

    A sub-folder of a diffusers pipeline has what stands beside it. Raises `CheckpointError` for what is no weights.
    """
    return ltx2.has_component(path, "vae")


@dataclass(frozen=True, slots=True)
class _Part:
    """A video VAE of a file: its modules without values, and how the file calls their tensors."""

    component: ltx2.Component
    arguments: dict[str, Any]
    modules: nn.ModuleDict
    name_in_file: ltx2.Namer

    @property
    def name(self) -> str:
        facts = {key: self.arguments[key] for key in LATENT_FACTS}
        encoder = nn.ModuleDict({"encoder": self.modules["encoder"]})
        return f"ltx2-video-{ltx2.fingerprint(self.component, encoder, self.name_in_file, facts)}"


def _open(path: str | Path) -> _Part:
    component = ltx2.open_component(path, "vae")
    part = _Part(component, *ltx2.video_modules(component.section, component.converted))
    if component.converted:
        return part
    return replace(part, component=replace(component, tensors=ltx2_names.split_fused(component.tensors)))


class Ltx2VideoCodec:
    """Pixels to normalised latents and back; one latent frame per 8 pixel frames, one latent pixel per 32 x 32.

    `name` stands for the space of the latents: encoder and statistics. Decoders that share them share the name.
    """

    def __init__(self, name: str, modules: nn.ModuleDict, mean: Tensor, deviation: Tensor) -> None:
        self.name = name
        self.encoder: Any = modules["encoder"]
        self.decoder: Any = modules["decoder"]
        self.mean, self.deviation = (values.reshape(1, -1, 1, 1, 1) for values in (mean, deviation))
        self.channels = mean.numel()
        self._denoises = hasattr(self.decoder, "denoise")
        self._is_conditioned = not self._denoises and self.decoder.timestep_scale_multiplier is not None
        parameter = next(self.encoder.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def to(self, device: torch.device | str) -> None:
        """Has encoder, decoder and statistics lie on the device."""
        self.encoder, self.decoder = self.encoder.to(device), self.decoder.to(device)
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        self.device = self.mean.device

    def normalise(self, raw: Tensor) -> Tensor:
        """What the encoder gives to what the transformer takes: zero mean and unit deviation per channel, fp32.

        On the codec's device, as all that its methods return.
        """
        return (raw.to(self.mean) - self.mean) / self.deviation

    def unnormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return latents.to(self.mean) * self.deviation + self.mean

    @torch.no_grad()
    def encode(self, video: Tensor, *, chunk_frames: int | None = None, tile: tuple[int, int] | None = None) -> Tensor:
        """(B, 3, 8k + 1, H, W) in [-1, 1] to normalised latents (B, C, k + 1, H / 32, W / 32), fp32, on its device.

        The mean of the posterior: nothing is drawn. `chunk_frames`, a multiple of 8, encodes that many frames at a time
        with the same result (1e-6 in fp32); the video may stay on the CPU then. `tile=(size, overlap)` in pixels also
        cuts height and width, with another result near the seams, since a latent sees more than a tile: with drawn
        weights (512, 128) is off by 7 to 9 % RMS, (256, 64) by 19 to 25 %.
        Raises `DataError` for other shapes, for integers, for NaN and for values far outside [-1, 1].
        """
        checked = check_video(video)
        run = partial(self._encode, chunk_frames=chunk_frames)
        return self.normalise(run(checked) if tile is None else blend(run, checked, _encode_axes(checked, tile)))

    def _encode(self, video: Tensor, chunk_frames: int | None) -> Tensor:
        if chunk_frames is None:
            return self.encoder(video.to(self.device, self.dtype), causal=True)[:, : self.channels]
        stream = CausalStream(self.encoder)
        parts = [video[:, :, start:stop] for start, stop in pieces(video.shape[2], chunk_frames)]
        return torch.cat([stream(part.to(self.device, self.dtype)) for part in parts], dim=2)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        seed: int = 0,
        tile: tuple[int, int] | None = None,
        tile_frames: tuple[int, int] | None = None,
    ) -> Tensor:
        """Normalised latents (B, C, k + 1, h, w) to (B, 3, 8k + 1, 32 h, 32 w) fp32, about [-1, 1]; not clamped.

        `seed` draws the noise of the decoders that need some. `tile` in pixels and `tile_frames` in frames, each (size,
        overlap), decode in overlapping pieces: less memory and another picture near the seams; with drawn weights
        (256, 64) is off by 27 to 33 % RMS, (80, 24) frames by 13 to 18 %. Raises `DataError` for other shapes.
        """
        check_latents(latents, self.channels, None, None, None)
        noisy = self._with_noise(latents.to(self.device).float(), seed)
        run = partial(self._decode, seed=seed)
        axes = _decode_axes(noisy, tile, tile_frames)
        return blend(run, noisy, axes) if axes else run(noisy)

    def _with_noise(self, latents: Tensor, seed: int) -> Tensor:
        if not self._is_conditioned:
            return latents
        noise = torch.randn(latents.shape, generator=generator(seed, "decode")).to(latents)
        return (1 - DECODE_NOISE) * latents + DECODE_NOISE * noise

    def _decode(self, latents: Tensor, seed: int) -> Tensor:
        raw = self.unnormalise(latents).to(self.dtype)
        if self._denoises:
            return _decode_by_diffusion(self.decoder, raw, seed).float()
        if min(raw.shape[3:]) < 2 and self.decoder.conv_in.conv.padding_mode == "reflect":
            raise DataError(f"latents of {tuple(raw.shape[3:])}; this decoder reflects its borders and needs 2 x 2")
        time = raw.new_full((len(raw),), DECODE_TIMESTEP) if self._is_conditioned else None
        return self.decoder(raw, time).float()


def _decode_by_diffusion(decoder: Any, raw: Tensor, seed: int) -> Tensor:
    """Clips smaller than the decoder's windows are continued with their borders, and cut again."""
    frames, height, width = raw.shape[2:]
    needed = _least_latents(decoder)
    padding = [max(0, need - have) for need, have in zip(needed, raw.shape[2:], strict=True)]
    padded = nn.functional.pad(raw, (0, padding[2], 0, padding[1], 0, padding[0]), mode="replicate")
    pixels = decoder(padded, generator=generator(seed, "decode"))
    scale = geometry.SPACE_SCALE
    return pixels[:, :, : geometry.pixel_frames(frames), : scale * height, : scale * width]


def _least_latents(decoder: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns below which some window of the decoder is larger than what it looks at."""
    windows = [blocks[0].attn.kernel_size for blocks in (*decoder.det_stages, decoder.diff_blocks)]
    time, *space = (list(accumulate((up.stride[i] for up in decoder.upsamples), mul, initial=1)) for i in range(3))
    copies = [decoder.trailing_pad_latent_frames] * len(decoder.det_stages) + [0]  # of the last latent, cut off at last
    frames = max(ceil((w[0] - 1) / scale) + 1 - c for w, scale, c in zip(windows, time, copies, strict=True))
    height, width = (
        max(ceil(w[i] / scale) for w, scale in zip(windows, scales, strict=True)) for i, scales in enumerate(space, 1)
    )
    return frames, height, width


def _encode_axes(video: Tensor, tile: tuple[int, int]) -> list[Axis]:
    unit = geometry.SPACE_SCALE
    size, overlap = check_tile("tile", tile, unit)
    return [
        Axis(dim, spans(video.shape[dim] // unit, size, overlap), lambda a, b: slice(unit * a, unit * b), slice)
        for dim in (3, 4)
    ]


def _decode_axes(latents: Tensor, tile: tuple[int, int] | None, tile_frames: tuple[int, int] | None) -> list[Axis]:
    """In time a piece's first latent gives one frame, of which the piece before knows more."""
    space, time, axes = geometry.SPACE_SCALE, geometry.TIME_SCALE, []
    if tile_frames is not None:
        size, overlap = check_tile("tile_frames", tile_frames, time)
        cuts = spans(latents.shape[2], size, overlap)
        axes.append(Axis(2, cuts, slice, lambda a, b: slice(time * a, time * (b - 1) + 1)))
    if tile is not None:
        size, overlap = check_tile("tile", tile, space)
        axes += [
            Axis(dim, spans(latents.shape[dim], size, overlap), slice, lambda a, b: slice(space * a, space * b))
            for dim in (3, 4)
        ]
    return axes

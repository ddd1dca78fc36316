"""Released latent upsamplers: normalised latents of a clip to those of a larger or a smoother one."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ltx2_train.codecs import ltx2
from ltx2_train.codecs.checks import check_latents


class Normalising(Protocol):
    """What an upsampler needs of a video codec: it works on latents as the encoder gives them."""

    def normalise(self, raw: Tensor) -> Tensor: ...

    def unnormalise(self, latents: Tensor) -> Tensor: ...


def load_upsampler(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> "Upsampler":
    """The upsampler of a released file, or of a diffusers folder. Computes in `dtype`, fp32 when not given.

    Raises `CheckpointError` when the file is not safetensors or its tensors are not those that the header asks for.
    """
    component = ltx2.open_upsampler(path)
    module = ltx2.upsampler_module(component.section, component.converted)
    ltx2.fill(module, component, str, dtype or torch.float32)
    return Upsampler(module.to(device))


class Upsampler:
    """Space x2 or x1.5, or frames F to 2 F - 1."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @torch.no_grad()
    def __call__(self, latents: Tensor, codec: Normalising) -> Tensor:
        """Normalised latents (B, C, F, H, W) of `codec` to upsampled normalised latents fp32, on the codec's device.

        Latents, upsampler and codec may be on devices of their own.
        Raises `DataError` when the number of channels is not the upsampler's.
        """
        check_latents(latents, self.module.in_channels, None, None, None)  # type: ignore[arg-type]
        raw = codec.unnormalise(latents).to(self.device, self.dtype)
        return codec.normalise(self.module(raw))

"""The released audio VAE with its mel front end, and the vocoders. All of it runs in fp32, under autocast too."""

from collections.abc import Callable
from fractions import Fraction
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ltx2_train import geometry
from ltx2_train.codecs import ltx2, ltx2_config
from ltx2_train.codecs.checks import check_latents, check_waveform
from ltx2_train.codecs.mel import LogMel
from ltx2_train.errors import CheckpointError, DataError

LATENT_FACTS = ("mid_block_add_attention", "attn_resolutions")  # what decides on the latents beside the tensors
MEL_FACTS = ("sample_rate", "n_fft", "window", "hop", "bins", "lowest_hz", "highest_hz", "floor")
Method = TypeVar("Method", bound=Callable[..., Tensor])


def in_full_precision(method: Method) -> Method:
    """No gradients and no autocast: in bf16 the second stage of the vocoder loses half of its spectrum."""

    @wraps(method)
    def run(self: Any, *args: Any, **named: Any) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **named)

    return run  # type: ignore[return-value]


def load_audio_codec(
    path: str | Path, vocoder: str | Path | None = None, *, device: torch.device | str = "cpu"
) -> "Ltx2AudioCodec":
    """The audio VAE of a released file or a diffusers folder, and the vocoder of the same or of another one.

    Raises `CheckpointError` when a file is not safetensors, when its header does not describe the part, when its tensors
    are not exactly those that the header asks for, or when VAE and vocoder speak of other mel spectrograms.
    """
    component = ltx2.open_component(path, "audio_vae")
    arguments, modules, name_in_file = ltx2.audio_modules(component.section, component.converted)
    front = _converted_front(arguments) if component.converted else ltx2_config.log_mel(component.section)
    ltx2.fill(modules, component, name_in_file, torch.float32)
    channels = arguments["latent_channels"]
    mean, deviation = ltx2.statistics(component, channels * _bins(front))
    facts = {key: arguments[key] for key in LATENT_FACTS} | {"mel": [getattr(front, field) for field in MEL_FACTS]}
    encoder = nn.ModuleDict({"encoder": modules["encoder"]})
    name = f"ltx2-audio-{ltx2.fingerprint(component, encoder, name_in_file, facts)}"
    build_vocoder, rate = _open_vocoder(vocoder or path, front)
    shape = (channels, 1, _bins(front))
    return Ltx2AudioCodec(
        name,
        front,
        modules.to(device),
        mean.reshape(shape).to(device),
        deviation.reshape(shape).to(device),
        build_vocoder,
        rate,
    )


def _converted_front(arguments: dict[str, Any]) -> LogMel:
    """A diffusers folder says no more than these three; the rest is as released."""
    rate = arguments["sample_rate"]
    return LogMel(sample_rate=rate, hop=arguments["mel_hop_length"], bins=arguments["mel_bins"], highest_hz=rate / 2)


def _bins(front: LogMel) -> int:
    """Latent bins: the VAE halves the mel bins as often as the mel frames."""
    if front.bins % geometry.MEL_FRAMES_PER_STEP:
        raise CheckpointError(
            f"{front.bins} mel bins; the audio VAE needs a multiple of {geometry.MEL_FRAMES_PER_STEP}"
        )
    return front.bins // geometry.MEL_FRAMES_PER_STEP


def _open_vocoder(path: str | Path, front: LogMel) -> tuple[Callable[[], nn.Module], int]:
    """What builds the vocoder, after a look at the keys and shapes of its file, and the rate of its sound in Hz."""
    component = ltx2.open_component(path, "vocoder")
    shapes = {key: tensor.shape for key, tensor in component.tensors.items() if key.endswith("conv_pre.weight")}
    widths = {key.removesuffix(".weight"): shape[1] for key, shape in shapes.items() if len(shape) == 3}

    def build(device: str = "cpu") -> tuple[nn.Module, ltx2.Namer]:
        return ltx2.vocoder_module(component.section, widths, component.converted, device)

    def filled() -> nn.Module:
        module, name_in_file = build()
        ltx2.fill(module, component, name_in_file, torch.float32)
        return module

    outline, name_in_file = build("meta")
    ltx2.check_keys(component, {name_in_file(name): t.shape for name, t in outline.state_dict().items()})
    return filled, _sample_rate(component, outline, front)


def _sample_rate(component: ltx2.Component, vocoder: nn.Module, front: LogMel) -> int:
    """Of a vocoder's sound. Raises `CheckpointError` when it was made for another number of mel bins."""
    config: Any = vocoder.config
    if config.in_channels != 2 * front.bins:
        raise CheckpointError(
            f"{component.where}: made for {config.in_channels // 2} mel bins, the audio VAE has {front.bins}. "
            "Use a matching pair"
        )
    if component.converted or ltx2_config.has_bandwidth_extension(component.section):
        return int(config.output_sampling_rate)
    samples_per_frame: Any = vocoder.total_upsample_factor
    return ltx2_config.stated_rate(component.section) or front.sample_rate * samples_per_frame // front.hop


class Ltx2AudioCodec:
    """Stereo sound to normalised latents and back. `name` stands for the space of the latents, whatever the vocoder."""

    def __init__(
        self,
        name: str,
        front: LogMel,
        modules: nn.ModuleDict,
        mean: Tensor,
        deviation: Tensor,
        build_vocoder: Callable[[], nn.Module],
        sample_rate: int,
    ) -> None:
        self.name, self.front, self.sample_rate = name, front, sample_rate
        self.encoder, self.decoder, self._build_vocoder = modules["encoder"], modules["decoder"], build_vocoder
        self.mean, self.deviation, self.device = mean, deviation, mean.device

    @cached_property
    def vocoder(self) -> nn.Module:
        """Read from its file when first needed: who encodes a dataset never hears it."""
        return self._build_vocoder().to(self.device)

    @property
    def steps_per_second(self) -> Fraction:
        """Of the latents; 25 in the releases."""
        return Fraction(self.front.sample_rate, self.front.hop * geometry.MEL_FRAMES_PER_STEP)

    @in_full_precision
    def mel(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(B, 2, N) at `sample_rate` to log-mel (B, 2, T_mel, bins). Raises `DataError` as `encode`."""
        return self.front(check_waveform(waveform).to(self.device), sample_rate)

    @in_full_precision
    def encode(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(B, 2, N) in [-1, 1] to normalised latents (B, C, round(25 N / sample_rate), bins / 4) fp32.

        The VAE makes a step more of it, which lies beyond the sound and is left away. Raises `DataError` for other
        shapes, for integers, for NaN, for values far outside [-1, 1] and for sound shorter than half a window.
        """
        mel = self.mel(waveform, sample_rate)
        steps = round(self.steps_per_second * waveform.shape[-1] / sample_rate)
        if steps < 1:
            raise DataError(
                f"{waveform.shape[-1] / sample_rate:.4f} s of audio are less than half a latent step. Drop the clip"
            )
        raw = self.encoder(mel)[:, : self.mean.shape[0], :steps]
        assert raw.shape[2] == steps, f"{raw.shape[2]} steps out of {waveform.shape[-1]} samples at {sample_rate} Hz"
        return (raw - self.mean) / self.deviation

    @in_full_precision
    def decode_mel(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, T, bins / 4) to log-mel (B, 2, 4 T - 3, bins)."""
        check_latents(latents, self.mean.shape[0], None, self.mean.shape[2])
        return self.decoder(latents.to(self.device).float() * self.deviation + self.mean)

    @in_full_precision
    def vocode(self, mel: Tensor) -> Tensor:
        """Log-mel (B, 2, T_mel, bins) to a waveform (B, 2, N) in [-1, 1] at `self.sample_rate`."""
        if mel.ndim != 4 or mel.shape[1] != 2 or mel.shape[3] != self.front.bins:
            raise DataError(f"mel of shape {tuple(mel.shape)}; the vocoder needs (B, 2, T, {self.front.bins})")
        return self.vocoder(mel.to(self.device).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, T, bins / 4) to a waveform (B, 2, N) at `self.sample_rate`."""
        return self.vocode(self.decode_mel(latents))

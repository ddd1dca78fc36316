"""The released audio VAE with its mel front end, and the vocoders. All of it runs in fp32, under autocast too."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial, wraps
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
    are not exactly those that the header asks for, or when VAE and vocoder speak of other mel spectrograms. Where there is
    no vocoder the codec encodes and decodes to mel, and raises when it is asked for sound.
    """
    part = _open(path)
    ltx2.fill(part.modules, part.component, part.name_in_file, torch.float32)
    bins = _bins(part.front)
    mean, deviation = ltx2.statistics(part.component, part.channels * bins)
    shape = (part.channels, 1, bins)
    return Ltx2AudioCodec(
        part.name,
        part.front,
        part.modules.to(device),
        mean.reshape(shape).to(device),
        deviation.reshape(shape).to(device),
        _voice(path, vocoder, part.front),
    )


def audio_codec_name(path: str | Path) -> str:
    """The `name` of the codec that `load_audio_codec` makes of a file, for which little of it is read. Raises likewise.

    It is that of the latents: no vocoder is looked at.
    """
    return _open(path).name


def has_audio_codec(path: str | Path) -> bool:
    """Whether a released file or folder, of whatever parts, has an audio VAE among them; as `has_video_codec`."""
    return ltx2.has_component(path, "audio_vae")


@dataclass(frozen=True, slots=True)
class _Part:
    """An audio VAE of a file: its front end, its modules without values, and how the file calls their tensors."""

    component: ltx2.Component
    front: LogMel
    arguments: dict[str, Any]
    modules: nn.ModuleDict
    name_in_file: ltx2.Namer

    @property
    def channels(self) -> int:
        return int(self.arguments["latent_channels"])

    @property
    def name(self) -> str:
        facts = {key: self.arguments[key] for key in LATENT_FACTS}
        facts["mel"] = [getattr(self.front, field) for field in MEL_FACTS]
        encoder = nn.ModuleDict({"encoder": self.modules["encoder"]})
        return f"ltx2-audio-{ltx2.fingerprint(self.component, encoder, self.name_in_file, facts)}"


def _open(path: str | Path) -> _Part:
    component = ltx2.open_component(path, "audio_vae")
    arguments, modules, name_in_file = ltx2.audio_modules(component.section, component.converted)
    front = _converted_front(arguments) if component.converted else ltx2_config.log_mel(component.section)
    return _Part(component, front, arguments, modules, name_in_file)


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


@dataclass(frozen=True, slots=True)
class _Voice:
    """A vocoder that is not in memory yet."""

    build: Callable[[], nn.Module]
    sample_rate: int  # Hz


def _voice(path: str | Path, vocoder: str | Path | None, front: LogMel) -> Callable[[], _Voice]:
    """What opens the vocoder of `vocoder`, else of `path`: looked at now where it is there, missed when it is needed."""
    if vocoder is None and not ltx2.has_component(path, "vocoder"):
        return partial(_no_voice, path)
    voice = _open_vocoder(vocoder or path, front)
    return lambda: voice


def _no_voice(path: str | Path) -> _Voice:
    raise CheckpointError(
        f"{path}: no vocoder in it, which makes sound of what the audio VAE decodes. Name the file or folder of one "
        "beside the audio codec: `vocoder`"
    )


def _open_vocoder(path: str | Path, front: LogMel) -> _Voice:
    """The vocoder, after a look at the keys and shapes of its file."""
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
    return _Voice(filled, _sample_rate(component, outline, front))


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
    """Stereo sound to normalised latents and back. `name` stands for the space of the latents, whatever the vocoder.

    Its methods take tensors on any device and return them on the codec's.
    """

    def __init__(
        self,
        name: str,
        front: LogMel,
        modules: nn.ModuleDict,
        mean: Tensor,
        deviation: Tensor,
        voice: Callable[[], _Voice],
    ) -> None:
        self.name, self.front, self._voice = name, front, voice
        self.encoder, self.decoder = modules["encoder"], modules["decoder"]
        self.mean, self.deviation, self.device = mean, deviation, mean.device

    def to(self, device: torch.device | str) -> None:
        """Has encoder, decoder, statistics and a vocoder that is in memory lie on the device."""
        self.encoder, self.decoder = self.encoder.to(device), self.decoder.to(device)
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        self.device = self.mean.device
        if "vocoder" in vars(self):
            self.vocoder.to(device)

    @cached_property
    def vocoder(self) -> nn.Module:
        """Read from its file when first needed: who encodes a dataset never hears it."""
        return self._voice().build().to(self.device)

    @property
    def sample_rate(self) -> int:
        """Of `decode`, in Hz. Raises `CheckpointError` where there is no vocoder, as all that gives sound."""
        return self._voice().sample_rate

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

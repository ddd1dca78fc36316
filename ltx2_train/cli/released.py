"""A model out of files, published or exported, to be sampled as it is or with adapters: no run, no training data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train import text
from ltx2_train.cli.components import Components, ComponentsConfig, resolved
from ltx2_train.cli.provenance import embedded_parts, made_with
from ltx2_train.diffusion.profiles import Fit, SamplerProfile, profile
from ltx2_train.errors import ConfigError
from ltx2_train.model import fuse_lora
from ltx2_train.model.build import ModelConfig, build_model, initial_weights, transformer_config
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.generation import UNKNOWN, generation_of
from ltx2_train.model.modality import Stream
from ltx2_train.model.weights import fingerprint, header
from ltx2_train.weightfile import open_weights

SIZE = {"frames": 121, "width": 768, "height": 512, "fps": 24.0}  # of the reference's first stage
INSIDE = ("video_codec", "audio_codec")  # parts that are looked for in the weights themselves
TEXT_INSIDE = ("text_weights", "connectors")  # these too, unless the text encoder is embedded


@dataclass(frozen=True)
class Released:
    """A model of files, and the frozen parts around it."""

    weights: Path
    loras: Sequence[tuple[Path, float]]
    profile: SamplerProfile
    components: Components
    device: torch.device
    dtype: torch.dtype
    title: str
    fit: Fit
    """What sampler profiles are held against; a model on the latents of embedded codecs is of no known generation."""
    keyframe_marker: bool
    stated_size: dict[str, Any] | None
    """Frames, width, height and fps of a clip where they are not given; None: not known."""

    streams: frozenset[Stream] = frozenset(Stream)
    """What the model makes: all that it was trained to."""

    @property
    def size(self) -> dict[str, Any]:
        """As `stated_size`. Raises `ConfigError` where it is not known."""
        if self.stated_size is None:
            raise ConfigError(
                f"{self.weights}: does not say the size of its training data. Give --frames, --width, --height, --fps"
            )
        return self.stated_size

    @property
    def identity(self) -> dict[str, Any]:
        """What the weights are and those of the parts around them, in plain values. Another one makes other clips."""
        loras = [[open_weights(path).fingerprint, strength] for path, strength in self.loras]
        return {"weights": fingerprint(self.weights), "loras": loras, "parts": self.components.contents}

    @cached_property
    def model(self) -> nn.Module:
        """Filled when it is asked for first, so that what is needed before it alone does not lie beside it."""
        model = _filled(_model_config(self.weights, self.streams), self.dtype, self.device)
        for path, strength in self.loras:
            fuse_lora(model, path, strength)
        return model


def load_released(
    weights: Path,
    components: ComponentsConfig,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    profile_name: str | None = None,
    device: torch.device | str = "cpu",
) -> Released:
    """The model of `weights`, with `loras` (file, strength) added to it; bf16 on a GPU and fp32 elsewhere.

    Profile, size and embedded parts are those that the weights were exported with. Other parts without a place of their own
    are looked for in `weights`, which of published ones hold all of 2.0 and 2.3 but the language model.
    Raises `CheckpointError`, and `ConfigError` for a generation that has no sampler profile.
    """
    architecture, device = transformer_config(_model_config(weights)), torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stated, embedded = header(weights), embedded_parts(made_with(weights))
    generation = UNKNOWN if embedded else generation_of(architecture)
    streams = _streams(stated)
    size = stated.get("clip_size")
    if not isinstance(size, dict) or size.keys() != SIZE.keys():
        size = None if embedded else SIZE
    kind = "" if embedded else f"LTX-{generation} of "
    return Released(
        weights=weights,
        loras=tuple(loras),
        profile=profile(profile_name) if profile_name else _default_profile(weights, stated, generation),
        components=_components(components, embedded, weights, architecture, device),
        device=device,
        dtype=dtype,
        title=f"{kind}{weights.name}" + "".join(f" + {path.name} x {s:g}" for path, s in loras),
        fit=Fit(generation, streams, architecture.num_layers),
        keyframe_marker=architecture.use_keyframes_abs_pos_embedding,
        stated_size=None if size is None else dict(size),
        streams=streams,
    )


def _streams(stated: Mapping[str, Any]) -> frozenset[Stream]:
    """What the weights were trained to make, as an export states it; published ones make both."""
    named = stated.get("sampled_streams")
    if not isinstance(named, list) or not named or not set(named) <= {stream.value for stream in Stream}:
        return frozenset(Stream)
    return frozenset(map(Stream, named))


def _default_profile(weights: Path, stated: Mapping[str, Any], generation: str) -> SamplerProfile:
    """The profile that an export states, else that of the generation. Raises `ConfigError` where there is neither."""
    plain = stated.get("sampler_profile")
    if isinstance(plain, dict) and plain.keys() >= {"name", "steps", "sampler", "schedule"}:  # else another program's
        try:
            return SamplerProfile.from_dict(plain)
        except ConfigError as error:
            raise ConfigError(f"{weights}: {error}. Name one with --profile") from error
    if generation == UNKNOWN:
        raise ConfigError(f"{weights}: a mixture of generations, so no sampler profile fits. Name one with --profile")
    return profile(f"ltx2_{generation}")


def _components(
    given: ComponentsConfig,
    embedded: Mapping[str, str],
    weights: Path,
    architecture: TransformerConfig,
    device: torch.device,
) -> Components:
    """The parts around the model: where they are given, else embedded by name, else looked for in `weights`."""
    named = {part: name for part, name in embedded.items() if getattr(given, part) is None}
    inside = [part for part in INSIDE if part not in named]
    if named.get("text_encoder", given.text_encoder) not in text.EMBEDDED:
        return Components(resolved(given, dict.fromkeys([*inside, *TEXT_INSIDE], str(weights))), named, device)
    widths = {
        "video_text_width": architecture.video_connector_width,
        "audio_text_width": architecture.audio_connector_width,
    }
    return Components(resolved(given, dict.fromkeys(inside, str(weights))), {**named, **widths}, device)


def _model_config(weights: Path, streams: Iterable[Stream] = Stream) -> ModelConfig:
    return ModelConfig(weights=str(weights), streams=sorted(streams), train_connectors=False)


def _filled(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Built without memory, then filled one tensor after another."""
    with torch.device("meta"):
        model = build_model(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    targets = dict(model.named_parameters())
    for name, tensor in initial_weights(model, config, seed=0):
        targets[name].copy_(tensor if isinstance(tensor, Tensor) else tensor.read())
    return model

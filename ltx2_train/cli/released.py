"""A released model out of files, to be sampled as it is or with adapters: no run, no training data."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.cli.components import Components, ComponentsConfig, resolved
from ltx2_train.diffusion.profiles import Fit, SamplerProfile, profile
from ltx2_train.errors import ConfigError
from ltx2_train.model import fuse_lora
from ltx2_train.model.build import ModelConfig, build_model, initial_weights, transformer_config
from ltx2_train.model.generation import UNKNOWN, generation_of
from ltx2_train.model.modality import Stream
from ltx2_train.model.weights import fingerprint
from ltx2_train.weightfile import open_weights

SIZE = {"frames": 121, "width": 768, "height": 512, "fps": 24.0}  # of the reference's first stage


@dataclass(frozen=True)
class Released:
    """A model of published files, and the frozen parts around it."""

    weights: Path
    loras: Sequence[tuple[Path, float]]
    profile: SamplerProfile
    components: Components
    device: torch.device
    dtype: torch.dtype
    title: str
    fit: Fit
    """What sampler profiles are held against."""
    keyframe_marker: bool
    size: dict[str, Any]
    """Frames, width, height and fps of a clip where they are not given."""

    streams: frozenset[Stream] = frozenset(Stream)
    """What the model has, and makes."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the weights are and those of the parts around them, in plain values. Another one makes other clips."""
        loras = [[open_weights(path).fingerprint, strength] for path, strength in self.loras]
        return {"weights": fingerprint(self.weights), "loras": loras, "parts": self.components.contents}

    @cached_property
    def model(self) -> nn.Module:
        """Filled when it is asked for first, so that what is needed before it alone does not lie beside it."""
        model = _filled(_model_config(self.weights), self.dtype, self.device)
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

    Parts without a place of their own are looked for in `weights`, which holds all of 2.0 and 2.3 but the language model.
    Raises `CheckpointError`, and `ConfigError` for a generation that has no sampler profile.
    """
    architecture, device = transformer_config(_model_config(weights)), torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generation = generation_of(architecture)
    if profile_name is None and generation == UNKNOWN:
        raise ConfigError(f"{weights}: a mixture of generations, so no sampler profile fits. Name one with --profile")
    parts = ("video_codec", "audio_codec", "text_weights", "connectors")
    return Released(
        weights=weights,
        loras=tuple(loras),
        profile=profile(profile_name or f"ltx2_{generation}"),
        components=Components(resolved(components, dict.fromkeys(parts, str(weights))), device=device),
        device=device,
        dtype=dtype,
        title=f"LTX-{generation} of {weights.name}" + "".join(f" + {path.name} x {s:g}" for path, s in loras),
        fit=Fit(generation, frozenset(Stream), architecture.num_layers),
        keyframe_marker=architecture.use_keyframes_abs_pos_embedding,
        size=dict(SIZE),
    )


def _model_config(weights: Path) -> ModelConfig:
    return ModelConfig(weights=str(weights), train_connectors=False)


def _filled(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Built without memory, then filled one tensor after another."""
    with torch.device("meta"):
        model = build_model(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    targets = dict(model.named_parameters())
    for name, tensor in initial_weights(model, config, seed=0):
        targets[name].copy_(tensor if isinstance(tensor, Tensor) else tensor.read())
    return model

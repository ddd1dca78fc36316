"""From a configuration to a model, and the stream of tensors it starts from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx2_train.errors import ConfigError
from ltx2_train.model.config import RELEASED_TEXT_TOKENS, TEXT_TOKENS, TransformerConfig, named_config
from ltx2_train.model.connector import Connectors, TextConditioned
from ltx2_train.model.init import initial_tensor
from ltx2_train.model.modality import Stream
from ltx2_train.model.transformer import Transformer
from ltx2_train.model.weights import PREFIX, check_shapes, read_config


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained, and what it starts from."""

    name: str = "demo"
    """A named configuration: ltx2_19b, ltx2_3_22b, ltx2_5_22b, small_30m, demo, tiny. Ignored where `weights` is given."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig` that differ from the named configuration."""
    weights: str | None = None
    """An official-format safetensors file to start from; its header decides the architecture. None: from scratch."""
    streams: list[Stream] = field(default_factory=lambda: [Stream.video, Stream.audio])
    """Which streams the model is built with."""
    train_connectors: bool = True
    """Whether the text connectors are trained with the transformer, or frozen."""
    text_tokens: int | None = None
    """Rows of text context behind the connectors, a multiple of its registers; None: what belongs to the configuration
    (1024 for released architectures). Captions with more text tokens are an error."""

    def __post_init__(self) -> None:
        self.streams = [Stream(s) for s in self.streams]
        if not self.streams:
            raise ConfigError("model.streams is empty; give [video, audio], [video] or [audio]")
        if self.weights is not None and self.overrides:
            raise ConfigError("model.overrides cannot change the architecture of model.weights; remove one of them")


def transformer_config(config: ModelConfig) -> TransformerConfig:
    """The architecture: from the weights' header where there are weights."""
    if config.weights is not None:
        return read_config(Path(config.weights))
    return named_config(config.name, config.overrides)


def build_model(config: ModelConfig) -> TextConditioned:
    """The model with memory for its weights on the current default device, not yet initialised."""
    architecture = transformer_config(config)
    streams = {"video": Stream.video in config.streams, "audio": Stream.audio in config.streams}
    model = TextConditioned(
        Transformer(architecture, **streams), Connectors(architecture, **streams), context_tokens(config)
    )
    model.connectors.requires_grad_(config.train_connectors)
    return model


def context_tokens(config: ModelConfig) -> int:
    """Rows of text context behind the connectors: the most text tokens that a caption may have."""
    if config.text_tokens is not None:
        return config.text_tokens
    return RELEASED_TEXT_TOKENS if config.weights is not None else TEXT_TOKENS.get(config.name, RELEASED_TEXT_TOKENS)


def initial_weights(model: nn.Module, config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every parameter, one at a time: from the weights file, else from (seed, name)."""
    if config.weights is None:
        for name, parameter in model.named_parameters():
            yield name, initial_tensor(name, parameter.shape, seed)
    else:
        yield from _from_file(model, Path(config.weights), seed)


def _from_file(model: nn.Module, path: Path, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an official file under the model's names; adapters are new and come from (seed, name)."""
    adapters = {name: p.shape for name, p in model.named_parameters() if "lora_" in name}
    names = {official_key(name): name for name, _ in model.named_parameters() if name not in adapters}
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(PREFIX)]  # noqa: SIM118 (no mapping)
        found = {key: torch.Size(file.get_slice(key).get_shape()) for key in keys}
        check_shapes({key: model.get_parameter(name).shape for key, name in names.items()}, found, path)
        for key, name in names.items():
            yield name, file.get_tensor(key)
    for name, shape in adapters.items():
        yield name, initial_tensor(name, shape, seed)


def official_key(name: str) -> str:
    """The key of an official file for a parameter of `TextConditioned`, seen through any LoRA wrapping."""
    name = name.replace(".base_layer.", ".")
    return PREFIX + name.removeprefix("transformer.").removeprefix("connectors.")

"""From a configuration to a model, and the stream of tensors it starts from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.errors import ConfigError
from ltx2_train.model.config import RELEASED_TEXT_TOKENS, TEXT_TOKENS, TransformerConfig, named_config
from ltx2_train.model.connector import Connectors, TextConditioned
from ltx2_train.model.init import initial_tensor
from ltx2_train.model.modality import Stream
from ltx2_train.model.transformer import Transformer
from ltx2_train.model.weights import PREFIX, check_shapes, header, read_config, read_weights, tensor_shapes
from ltx2_train.weightfile import Stored


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained, and what it starts from."""

    name: str = "demo"
    """A named configuration: ltx2_19b, ltx2_3_22b, ltx2_5_22b, small_30m, demo, bounce, tiny. Ignored where `weights` is
    given."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig` that differ from the named configuration."""
    weights: str | None = None
    """What to start from: a published file, one that was exported here, or a folder of diffusers. It decides the
    architecture. None: from scratch."""
    streams: list[Stream] = field(default_factory=lambda: [Stream.video, Stream.audio])
    """Which streams the model is built with."""
    with_connectors: bool = True
    """Whether the text connectors are part of the model. False for data that hold their output instead of text features."""
    train_connectors: bool = True
    """Whether the text connectors are trained with the transformer, or frozen."""
    text_tokens: int | None = None
    """Rows of text context behind the connectors, a multiple of its registers; None: what belongs to the configuration
    (1024 for released architectures), and of exported weights what they were trained with. Captions with more text tokens
    are an error."""

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
    connectors = Connectors(architecture, **streams) if config.with_connectors else None
    if connectors is not None:
        connectors.requires_grad_(config.train_connectors)
    return TextConditioned(Transformer(architecture, **streams), connectors, context_tokens(config))


def context_tokens(config: ModelConfig) -> int:
    """Rows of text context behind the connectors: the most text tokens that a caption may have."""
    if config.text_tokens is not None:
        return config.text_tokens
    if config.weights is None:
        return TEXT_TOKENS.get(config.name, RELEASED_TEXT_TOKENS)
    stated = str(header(config.weights).get("text_tokens", ""))
    return int(stated) if stated.isdecimal() else RELEASED_TEXT_TOKENS


def initial_weights(model: nn.Module, config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor | Stored]]:
    """(name, whole tensor) of every parameter, one at a time: from (seed, name), or from the weights file, not yet read."""
    if config.weights is None:
        for name, parameter in model.named_parameters():
            yield name, initial_tensor(name, parameter.shape, seed)
    else:
        yield from _from_file(model, Path(config.weights), seed)


def _from_file(model: nn.Module, path: Path, seed: int) -> Iterator[tuple[str, Tensor | Stored]]:
    """Tensors of a file under the model's names; adapters are new and come from (seed, name)."""
    architecture, tensors = read_weights(path)
    needs_connectors = any("_embeddings_connector." in name for name in [*dict(model.named_parameters()), *tensors])
    with torch.device("meta"):  # the file has to fit as a whole, also where the model has one stream of it
        whole = [Transformer(architecture), *([Connectors(architecture)] if needs_connectors else [])]
    wanted = {name: shape for module in whole for name, shape in tensor_shapes(module).items()}
    check_shapes(wanted, {name: tensor.shape for name, tensor in tensors.items()}, path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            yield name, initial_tensor(name, parameter.shape, seed)
        else:
            yield name, tensors[official_name(name)]


def official_name(name: str) -> str:
    """The published name of a parameter of `TextConditioned`, seen through any LoRA wrapping."""
    return name.replace(".base_layer.", ".").removeprefix("transformer.").removeprefix("connectors.")


def official_key(name: str) -> str:
    """The key of a published file for a parameter of `TextConditioned`."""
    return PREFIX + official_name(name)

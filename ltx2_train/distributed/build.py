"""From a function that builds the model to an engine that trains it."""

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ltx2_train.distributed.engine import Backend, Engine, EngineConfig
from ltx2_train.distributed.sequence import apply_sequence_parallel
from ltx2_train.distributed.sharded import tensor_shapes
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.weightfile import Stored

BuildModel = Callable[[], nn.Module]
Initialise = Callable[[nn.Module], Iterable[tuple[str, Tensor | Stored]]]


def build_engine(build_model: BuildModel, initialise: Initialise | None, config: EngineConfig, world: World) -> Engine:
    """The engine: tokens shared out over `config.sequence` ranks, weights sharded over all of them and filled.

    `build_model` is called on the meta device, more than once. `initialise` gets such a whole model for its names and
    shapes, and gives (name, whole tensor, or one still in a file) of every parameter and buffer; each is generated or read,
    sharded and dropped before the next, so that the whole model is nowhere in memory. None: what `build_model` makes on
    rank 0.
    Raises `CheckpointError` when a tensor is missing, unknown or of another shape, `ConfigError` when `world` is not in
    groups of `config.sequence` ranks.
    """
    if world.sequence != config.sequence:
        raise ConfigError(
            f"engine.sequence={config.sequence}, but the ranks are in groups of {world.sequence}: "
            f"give world.sharing_samples({config.sequence})"
        )
    with torch.device("meta"):
        whole = build_model()
    freeze_parameters(whole, config.freeze)
    weights = initialise(whole) if initialise is not None else _from_rank_zero(build_model, world)

    def build_shared() -> nn.Module:
        model = apply_sequence_parallel(build_model(), world)
        freeze_parameters(model, config.freeze)
        return model

    return _engine(config.backend)(build_shared, checked(weights, tensor_shapes(whole)), config, world)


def _engine(backend: Backend) -> Callable[..., Engine]:
    """The one choice between backends."""
    if backend is Backend.zero3:
        from ltx2_train.distributed.zero3 import Zero3Engine

        return Zero3Engine
    from ltx2_train.distributed.fsdp2 import Fsdp2Engine

    return Fsdp2Engine


def freeze_parameters(model: nn.Module, patterns: list[str]) -> None:
    """Takes every parameter that a pattern matches out of training. Raises `ConfigError` where one matches nothing."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        frozen = [parameter for name, parameter in parameters.items() if re.fullmatch(pattern, name)]
        if not frozen:
            example = next(iter(parameters))
            raise ConfigError(f"engine.freeze: '{pattern}' matches no parameter; their names are like '{example}'")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"engine.freeze={patterns}: nothing is left to train")


def checked(
    weights: Iterable[tuple[str, Tensor | Stored]], shapes: dict[str, torch.Size]
) -> Iterator[tuple[str, Tensor | Stored]]:
    """The same stream; raises `CheckpointError` unless it gives each of `shapes` once, as it should be."""
    missing = set(shapes)
    for name, tensor in weights:
        if name not in missing:
            what = "is given twice" if name in shapes else "is not a parameter or buffer of the model"
            raise CheckpointError(f"initial weights: {name} {what}")
        if tensor.shape != shapes[name]:
            own = list(shapes[name])
            raise CheckpointError(f"initial weights: {name} is {list(tensor.shape)}, the model has {own}")
        missing.remove(name)
        yield name, tensor
    if missing:
        raise CheckpointError(f"initial weights: {len(missing)} tensors are not given: {', '.join(sorted(missing))}")


def _from_rank_zero(build_model: BuildModel, world: World) -> Iterator[tuple[str, Tensor]]:
    model = build_model()
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        yield name, world.broadcast_object(tensor.detach())

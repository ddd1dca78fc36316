"""The blocks of a model: what is gathered, recomputed and compiled as one."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ltx2_train.distributed.engine import EngineConfig
from ltx2_train.distributed.recompute import apply_recompute

COMPILED_SHAPES = 256


def shard_units(model: nn.Module) -> list[nn.Module]:
    """The modules gathered one at a time: those the model names, else the children of its outermost ModuleLists."""
    named: Callable[[], list[nn.Module]] | None = getattr(model, "shard_units", None)
    units = named() if named is not None else _list_children(model)
    return [unit for unit in units if any(True for _ in unit.parameters())]


def _list_children(module: nn.Module) -> list[nn.Module]:
    units: list[nn.Module] = []
    for child in module.children():
        units += child.children() if isinstance(child, nn.ModuleList) else _list_children(child)
    return units


def prepare_units(units: list[nn.Module], config: EngineConfig) -> Callable[[], Sequence[int]]:
    """Compiles and recomputes the blocks as configured, without renaming a parameter. Gives what `apply_recompute` gives.

    The forward itself is replaced, not the module, so that sharding's hooks (gather before, free after) lie outside of
    what is compiled and recomputed. Compiled code lies inside recomputation.
    """
    if config.compile:
        _compile(units)
    return apply_recompute(units, config)


def _compile(units: list[nn.Module]) -> None:
    """Compiles every block for each shape that it meets: buckets are few, and code for shapes that vary can fail.

    More than so many shapes are an error; otherwise all further ones would run uncompiled with no more than a warning.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = COMPILED_SHAPES, True
    for unit in units:
        unit.forward = torch.compile(unit.forward, dynamic=False)

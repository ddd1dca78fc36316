"""The blocks of a model: what is gathered, recomputed and compiled as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ltx2_train.distributed.engine import EngineConfig, Recompute


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


def prepare_units(units: list[nn.Module], config: EngineConfig) -> None:
    """Compiles and recomputes the blocks as configured, without renaming a parameter.

    The forward itself is replaced, not the module, so that sharding's hooks (gather before, free after) lie outside of
    what is compiled and recomputed. Compiled code lies inside recomputation.
    """
    for i, unit in enumerate(units):
        if config.compile:
            unit.forward = torch.compile(unit.forward)
        if _recomputes(i, config):
            unit.forward = _recomputed(unit.forward)


def _recomputes(index: int, config: EngineConfig) -> bool:
    if config.recompute is Recompute.every_n:
        return index % config.recompute_every == 0
    return config.recompute is Recompute.full


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run

"""Activation checkpointing policies: what a block keeps for backward, and what is run again there.

Each turns a block's forward into one that gives the same bits and gradients with less memory in between.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ltx2_train.distributed.engine import EngineConfig, Recompute

Forward = Callable[..., Any]

# Attention as one operation, by backend. PyTorch's plain fallback ("math") is none: it is many, and is recomputed.
ATTENTIONS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def apply_recompute(units: list[nn.Module], config: EngineConfig) -> Callable[[], Sequence[int]]:
    """Replaces the blocks' forwards, not the blocks: no parameter is renamed.

    Gives what tells which of `units`, by number, backward runs again after the last forward, where it goes through them.
    """
    if config.recompute is Recompute.budget:
        assert config.recompute_budget_gb is not None
        budget = Budget(units, config.recompute_budget_gb * 1e9)
        for i, unit in enumerate(units):
            unit.forward = partial(budget.run, i, unit.forward)
        return lambda: budget.again
    every = config.recompute_every if config.recompute is Recompute.every_n else 1
    context = attention_kept if config.recompute is Recompute.selective else None
    again = range(0, len(units) if config.recompute is not Recompute.none else 0, every)
    for i in again:
        units[i].forward = recomputed(units[i].forward, context)
    return lambda: again


def recomputed(forward: Forward, context: Callable[[], Any] | None = None) -> Forward:
    """The forward, run again in backward. Without gradients it is called as it is."""
    options: dict[str, Any] = {"use_reentrant": False} | ({"context_fn": context} if context else {})

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def attention_kept() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of forward and recomputation under which what the attentions gave is kept."""
    packets = (getattr(torch.ops.aten, name, None) for name in ATTENTIONS)  # not every build of PyTorch has all
    return create_selective_checkpoint_contexts([packet.default for packet in packets if packet is not None])


class Budget:
    """Keeps blocks' activations as long as they fit, and recomputes the others.

    Blocks of one shape need the same memory, so the first of them is kept and measured, in every forward anew: the
    choice is a function of the inputs' shapes alone, the same on every rank that has the same ones and after a resume.
    """

    def __init__(self, units: list[nn.Module], num_bytes: float) -> None:
        self.units, self.num_bytes = units, num_bytes
        self._kinds = [(type(unit), tuple(p.shape for p in unit.parameters())) for unit in units]
        self._begin()

    def _begin(self) -> None:
        self._left, self._last = self.num_bytes, -1
        self.again: list[int] = []
        self._sizes: dict[Any, int] = {}

    def run(self, index: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """The forward of block number `index`."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if index <= self._last:  # another forward of the model
            self._begin()
        self._last, kind = index, self._kinds[index]
        if kind not in self._sizes:
            return self._measure(index, forward, *args, **kwargs)
        size, others = self._sizes[kind], self._kinds[index + 1 :].count(kind)
        if self._left < size * (2 if others else 1):  # one of the others would need room while it is recomputed
            self.again.append(index)
            return recomputed(forward)(*args, **kwargs)
        self._left -= size
        return forward(*args, **kwargs)

    def _measure(self, index: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Keeps a block's activations and notes their bytes, without the weights and inputs that live anyway."""
        known = {_storage(tensor) for tensor in (*tensors_in((args, kwargs)), *self.units[index].parameters())}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in known:
                sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            result = forward(*args, **kwargs)
        size = self._sizes[self._kinds[index]] = sum(sizes.values())
        self._left -= size
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        yield from tensors_in(tuple(getattr(value, f.name) for f in fields(value)))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

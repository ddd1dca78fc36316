"""What every engine does with its shards, whoever made them: norm, update, average, checkpoint."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltx2_train.distributed.base import fingerprints
from ltx2_train.distributed.engine import EngineConfig, PendingSave, StepResult
from ltx2_train.distributed.held import Boxed, Held
from ltx2_train.distributed.saved import (
    FORMAT,
    WritingSave,
    check_fits,
    checkpoint_talk,
    read_index,
    split_extra,
)
from ltx2_train.distributed.units import prepare_units, shard_units
from ltx2_train.distributed.world import World
from ltx2_train.weightfile import Stored


class ShardedEngine(ABC):
    """The half of an engine that no backend has of its own: AdamW over this rank's fp32 masters.

    A backend's constructor shards `module`, sets what is declared here, and ends with `_begin`.
    """

    model: Callable[..., Any]
    _parameters: dict[str, nn.Parameter]
    _buffers: dict[str, Tensor]  # whole on every rank
    _held: dict[str, Held]  # by parameter: the range of its elements that is this rank's
    _kept: dict[str, Tensor]  # by parameter: those elements, as they are computed with
    _group: dist.ProcessGroup | None = None  # the ranks that hold one copy of the model; None: all

    def __init__(self, build: Callable[[], nn.Module], config: EngineConfig, world: World) -> None:
        """Builds the module on the meta device and prepares its blocks."""
        self.config, self.world = config, world
        self._talk = checkpoint_talk(world)
        with torch.device("meta"):
            self.module = build()
        self._shapes = tensor_shapes(self.module)
        names, units = {module: name for name, module in self.module.named_modules()}, shard_units(self.module)
        self._unit_names = [names[unit] for unit in units]
        self._again = prepare_units(units, config)

    def _begin(self, masters: dict[str, Tensor], weights: Iterable[tuple[str, Tensor | Stored]]) -> None:
        """Fills the model. The update will run on `masters`: of every trained parameter its range, in fp32."""
        self._masters = masters
        self._optimizer = _adamw(masters, {name: len(shape) for name, shape in self._shapes.items()}, self.config)
        self._fill(weights)

    @abstractmethod
    def _gradients(self) -> dict[str, Tensor]:
        """Of the parameters that have one: shaped as the masters, summed over the ranks."""

    @abstractmethod
    def _clear_gradients(self) -> None:
        """Leaves nothing of them for the next step."""

    @abstractmethod
    def _publish(self) -> None:
        """Makes the masters what the next forward computes with."""

    @torch.no_grad()
    def step(self, *, lr: float) -> StepResult:
        """Clips, updates and clears the gradients. A non-finite norm, or one above `skip_above`, is not applied."""
        grads = self._gradients()
        norm = self._global_norm(list(grads.values()))
        applied = math.isfinite(norm) and (self.config.skip_above is None or norm <= self.config.skip_above)
        if applied:
            self._update(grads, norm, lr)
        self._clear_gradients()
        return StepResult(norm, applied)

    def recomputed(self) -> list[str]:
        """Names of the blocks that backward runs again after this rank's last forward, where it goes through them."""
        return [self._unit_names[i] for i in self._again()]

    def shards(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's fp32 master shards: the live tensors, not copies."""
        return self._masters.items()

    @contextmanager
    def swapped(self, shards: dict[str, Tensor]) -> Iterator[None]:
        """The model with `shards` in place, which hold its own weights meanwhile."""
        self._exchange(shards)
        try:
            yield
        finally:
            self._exchange(shards)

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Whole CPU copies, one at a time, on rank 0; empty tensors elsewhere."""
        for name in self._parameters:
            if name in self._masters or not trained_only:
                yield name, self._gathered(name)

    def save(self, directory: Path, extra: dict[str, Any]) -> PendingSave:
        """Copies the state to the host and writes it in a thread (PyTorch distributed checkpoint)."""
        import torch.distributed.checkpoint as dcp

        tensors, plain = split_extra(extra)
        directory.mkdir(parents=True, exist_ok=True)
        state = self._state(tensors, lambda tensor: tensor.to("cpu", copy=True))
        num_bytes = sum(t.numel() * t.element_size() for part in state.values() for t in part.values())
        thread = ThreadPoolExecutor(1, "checkpoint")
        future = thread.submit(dcp.save, state, storage_writer=dcp.FileSystemWriter(directory), **self._talk)
        thread.shutdown(wait=False)
        steps = torch.stack([self._optimizer.state[master]["step"] for master in self._masters.values()]).tolist()
        index = self._contents() | {
            "steps": dict(zip(self._masters, steps, strict=True)),
            "extra_tensors": {key: list(shards) for key, shards in tensors.items()},
            "extra": plain,
        }
        return WritingSave(future, directory, self.world, json.dumps(index), num_bytes)

    def load(self, directory: Path, extra: dict[str, Any]) -> dict[str, Any]:
        """Reads only JSON until names and shapes agree. The rest is a pickle: verify its hashes before calling this."""
        import torch.distributed.checkpoint as dcp

        index = read_index(directory)
        tensors, plain = split_extra(extra)
        check_fits(index, self._contents(), tensors, directory)
        with torch.no_grad():
            dcp.load(self._state(tensors), storage_reader=dcp.FileSystemReader(directory), **self._talk)
            self._publish()
        for name, master in self._masters.items():
            self._optimizer.state[master]["step"].fill_(index["steps"][name])
        return {**plain, **index["extra"], **tensors}

    @torch.no_grad()
    def _fill(self, weights: Iterable[tuple[str, Tensor | Stored]]) -> None:
        """Of each tensor this rank's range, which is all that is read of one that is still in a file."""
        for name, weight in weights:
            if name in self._buffers:
                self._buffers[name].copy_(weight if isinstance(weight, Tensor) else weight.read())
                continue
            values = self._held[name].of(weight)
            for place in (self._kept, self._masters):
                if name in place:
                    place[name].view(-1).copy_(values)

    def _gathered(self, name: str) -> Tensor:
        """A whole parameter in the host's memory of rank 0; an empty tensor elsewhere."""
        own, held = self._masters.get(name, self._kept[name]), self._held[name]
        ranks = self.world.size // self.config.replicate
        padded = torch.zeros(held.size, dtype=own.dtype, device=self.world.device)
        padded[: len(held)] = own.view(-1)
        first = self.world.rank % ranks == 0
        parts = [torch.empty_like(padded) for _ in range(ranks)] if first else None
        dist.gather(padded, parts, dst=self.world.rank // ranks * ranks, group=self._group)
        if parts is None or not self.world.is_main:
            return torch.empty(0)
        return torch.cat([part.cpu() for part in parts])[: math.prod(held.shape)].view(held.shape)

    def _global_norm(self, grads: list[Tensor]) -> float:
        """Square root of the sum of squares over all parameters, in fp32. Every replica adds the same."""
        assert grads, "step() without gradients: backward(..., last=True) comes first"
        squares = torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)).square().sum()
        total = self.world.all_sum(squares.to(self.world.device))
        return float((total / self.config.replicate).sqrt().item())

    def _update(self, grads: dict[str, Tensor], norm: float, lr: float) -> None:
        clip = self.config.grad_clip
        if clip is not None and norm > clip:
            torch._foreach_mul_(list(grads.values()), clip / norm)
        for name, grad in grads.items():
            self._masters[name].grad = grad.to(self._masters[name].device) if grad.numel() else None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._publish()

    @torch.no_grad()
    def _exchange(self, shards: dict[str, Tensor]) -> None:
        for name, master in self._masters.items():
            own = master.clone()
            master.copy_(shards[name])
            shards[name].copy_(own)
        self._publish()

    def _state(
        self, extra: dict[str, dict[str, Tensor]], placed: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> dict[str, dict[str, Tensor]]:
        """Everything that is saved, as whole tensors of which this rank holds its part: nothing that is frozen.

        `placed` gives the tensor that stands for a live one.
        """
        moments = [(moment, name) for moment in ("exp_avg", "exp_avg_sq") for name in self._masters]
        kept = self._optimizer.state
        parts = {
            "model": {n: (n, master) for n, master in self._masters.items()},
            "optimizer": {f"{m}.{n}": (n, kept[self._masters[n]][m]) for m, n in moments},
            "extra": {f"{key}.{n}": (n, t) for key, shards in extra.items() for n, t in shards.items()},
        }
        state: dict[str, dict[str, Tensor]] = {
            part: {key: Boxed(placed(shard).view(-1), self._held[name]) for key, (name, shard) in named.items()}
            for part, named in parts.items()
        }
        state["model"] |= {name: placed(buffer) for name, buffer in self._buffers.items()}
        return state

    @cached_property
    def _base(self) -> dict[str, str]:
        """Fingerprints of the frozen weights. Nothing ever changes them, so they are taken once."""
        counted = self.world.rank < self.world.size // self.config.replicate  # one copy of the model
        parts = {name: (kept[: None if counted else 0], self._held[name].start) for name, kept in self._kept.items()}
        frozen = {name: part for name, part in parts.items() if name not in self._masters}
        return fingerprints(frozen, self.world)

    def _contents(self) -> dict[str, Any]:
        """What a checkpoint must agree in with this engine."""
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        return {"format": FORMAT, "shapes": shapes, "trained": list(self._masters), "base": self._base}


def tensor_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The whole shape of every parameter and buffer, by name."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.shape for name, tensor in named.items()}


def _adamw(masters: dict[str, Tensor], num_dims: dict[str, int], config: EngineConfig) -> torch.optim.AdamW:
    """AdamW over plain local tensors, with its state there from the start, so that it can be loaded into."""
    optim = config.optimizer
    decayed = [m for name, m in masters.items() if optim.decays(name, num_dims[name])]
    others = [m for name, m in masters.items() if not optim.decays(name, num_dims[name])]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    beta1, beta2 = optim.betas
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=optim.eps, fused=True)
    for master in masters.values():
        adamw.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
    return adamw

"""The FSDP2 engine: PyTorch's fully_shard per block, in one copy of the model or in several (HSDP)."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ltx2_train.distributed.engine import EngineConfig, Offload, Precision
from ltx2_train.distributed.held import Held
from ltx2_train.distributed.sharded import ShardedEngine
from ltx2_train.distributed.units import shard_units
from ltx2_train.distributed.world import World
from ltx2_train.errors import ConfigError
from ltx2_train.weightfile import Stored


class Fsdp2Engine(ShardedEngine):
    """Implements `Engine` on PyTorch's fully_shard.

    In fp32 on one rank there is nothing to shard and nothing to cast: the module stays as it is, and everything else is
    the same code (fully_shard copies all weights on every pass, 13 % of a step of a 30 M model on a CPU).
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        weights: Iterable[tuple[str, Tensor | Stored]],
        config: EngineConfig,
        world: World,
    ) -> None:
        mesh = _mesh(world, config.replicate)
        super().__init__(build, config, world)
        self.model = self.module
        if config.precision is Precision.bf16:
            _keep_frozen_in_bf16(self.module)
        offloads = config.offload is Offload.all
        if world.size > 1 or config.precision is not Precision.fp32 or offloads:
            _shard(self.module, mesh, config)
            self._group = mesh.get_group(mesh.ndim - 1)
        self.module.to_empty(device="cpu" if offloads else world.device)
        if offloads:
            _move_buffers(self.module, world.device)
        # Parameters are looked up once: after a forward the module may hold whole weights in their place.
        self._parameters = dict(self.module.named_parameters())
        self._buffers = dict(self.module.named_buffers())
        local = {name: _local(parameter) for name, parameter in self._parameters.items()}
        self._kept = {name: tensor.view(-1) for name, tensor in local.items()}
        self._held = {name: self._rows_held(shape) for name, shape in self._shapes.items()}
        trained = {name: local[name] for name, p in self._parameters.items() if p.requires_grad}
        self._begin(trained if config.offload is not Offload.optimizer else _on_host(trained), weights)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates gradients; they are summed over the ranks with the last micro-batch."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        loss.backward()

    def _gradients(self) -> dict[str, Tensor]:
        return {name: _local(p.grad) for name, p in self._parameters.items() if p.grad is not None}

    def _clear_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _publish(self) -> None:
        """Makes the masters what the next forward computes with.

        Masters on the host are copied into the parameters, and whole weights that a forward left in place are dropped,
        so that the next one gathers the new ones.
        """
        if self.config.offload is Offload.optimizer:
            for name, master in self._masters.items():
                self._kept[name].copy_(master.view(-1))
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _rows_held(self, shape: torch.Size) -> Held:
        """Shards are rows, cut as torch.chunk cuts them."""
        ranks = self.world.size // self.config.replicate
        rows = -(-shape[0] // ranks) if shape else 1
        return Held.cut(shape, rows * math.prod(shape[1:]), self.world.rank % ranks)


def _keep_frozen_in_bf16(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def _mesh(world: World, replicate: int) -> DeviceMesh:
    """Ranks in rows of neighbours that shard one copy of the model; in columns those that hold the same part of copies."""
    if world.size % replicate:
        fitting = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise ConfigError(f"engine.replicate={replicate}: does not divide {world.size} ranks; take one of {fitting}")
    if replicate == 1:
        return init_device_mesh(world.device.type, (world.size,))
    shape = (replicate, world.size // replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _shard(model: nn.Module, mesh: DeviceMesh, config: EngineConfig) -> None:
    """Shards each block and the rest. Gradients are summed over ranks, exactly: nothing depends on their number.

    Inputs are not cast: the model decides what stays fp32 (positions, sigmas).
    """
    # A linear layer's output counts as a view on the CPU; nothing of ours writes into what a model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    compute = torch.bfloat16 if config.precision is Precision.bf16 else None
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": _offload_policy(mesh, config),
    }
    units = shard_units(model)
    for unit in units:
        fully_shard(unit, reshard_after_forward=config.reshard and unit is not units[-1], **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if config.prefetch:
        _gather_ahead(model, config.prefetch)


def _offload_policy(mesh: DeviceMesh, config: EngineConfig) -> OffloadPolicy:
    if config.offload is not Offload.all:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")


def _gather_ahead(model: nn.Module, num_blocks: int) -> None:
    """Tells each block which ones to gather while it runs.

    Only blocks of one list are sure to run after each other, and only those with something to train have a backward:
    whole weights that nothing waits for would be there still, and old, in the next step.
    """
    for siblings in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        blocks: list[FSDPModule] = [block for block in siblings if isinstance(block, FSDPModule)]
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + num_blocks])
        trained: list[FSDPModule] = [
            block
            for block in reversed(siblings)
            if isinstance(block, FSDPModule) and any(p.requires_grad for p in block.parameters())
        ]
        for i, block in enumerate(trained):
            block.set_modules_to_backward_prefetch(trained[i + 1 : i + 1 + num_blocks])


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers are small, and no block fetches them: they are where the model runs, whatever is offloaded."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else torch.empty_like(buffer, device=device)


def _on_host(shards: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, pinned where a GPU copies from and to it."""
    copies = {name: shard.to("cpu", copy=True) for name, shard in shards.items()}
    return {name: copy.pin_memory() if shards[name].is_cuda else copy for name, copy in copies.items()}


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    with torch.no_grad():
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

"""The ZeRO-3 engine: DeepSpeed shards, gathers and reduces; norm, update and checkpoints are those of every engine.

Every parameter is cut into one range of its flattened elements per rank. DeepSpeed keeps this rank's range in the dtype
that is computed in, gathers whole parameters around each module and adds up the gradients of the range. Its optimizer is
never stepped: it knows one flat tensor, in which a parameter that had no gradient would decay, and keeps a gradient
from one step to the next where the later step has none. AdamW runs on views of DeepSpeed's fp32 masters instead,
parameter by parameter, so that both engines give the same run and write the same checkpoints.

Source: ZeRO (arXiv:1910.02054).
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.distributed.engine import EngineConfig, Offload, Precision
from ltx2_train.distributed.held import Held
from ltx2_train.distributed.sharded import ShardedEngine
from ltx2_train.distributed.world import World
from ltx2_train.errors import ConfigError

REDUCED_AT_ONCE = 1 << 27  # elements, fp32: gradients wait in a buffer of this size to be reduced together


class Zero3Engine(ShardedEngine):
    """Implements `Engine` on DeepSpeed's ZeRO stage 3."""

    def __init__(
        self, build: Callable[[], nn.Module], weights: Iterable[tuple[str, Any]], config: EngineConfig, world: World
    ) -> None:
        deepspeed = _import_deepspeed(world)
        super().__init__(build, config, world)
        _partition(deepspeed, self.module, config, world)
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        self._parameters, self._buffers = parameters, dict(self.module.named_buffers())
        self._touched: set[str] = set()  # trained parameters that had a gradient since the last step
        _watch_gradients(self._parameters, self._touched)
        self._deepspeed = _initialize(deepspeed, self.module, config, world)
        self._zero = self._deepspeed.optimizer
        self.model = self._deepspeed
        self._names = {parameter.ds_id: name for name, parameter in parameters.items()}
        padded: dict[str, Tensor] = {name: p.ds_tensor for name, p in parameters.items()}  # the last ranks' are
        self._held = {name: Held.cut(self._shapes[name], len(own), world.rank) for name, own in padded.items()}
        self._kept = {name: own[: len(self._held[name])] for name, own in padded.items()}
        masters = self._views(self._zero.fp32_partitioned_groups_flat)
        sizes = [len(flat) for flat in self._zero.fp32_partitioned_groups_flat]
        self._held_gradients = self._views(self._zero.grad_partitions_flat_buffer.split(sizes))
        self._begin(masters, weights)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates this rank's range of the gradients, reduced with every micro-batch."""
        # For DeepSpeed none is the last: with that one it prepares the update of its own optimizer.
        self._deepspeed.set_gradient_accumulation_boundary(False)
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> dict[str, Tensor]:
        self._drop_whole()
        self._zero.grad_partitions_flat_buffer.mul_(self.world.size)  # DeepSpeed's are means over the ranks
        return {name: grad for name, grad in self._held_gradients.items() if name in self._touched}

    def _views(self, flats: Iterable[Tensor]) -> dict[str, Tensor]:
        """(len,) this rank's range of every trained parameter inside DeepSpeed's flat tensors, one per group."""
        views = {}
        for group, flat in zip(self._zero.fp16_groups, flats, strict=True):
            pieces = flat.detach().split([parameter.partition_numel() for parameter in group])
            for parameter, piece in zip(group, pieces, strict=True):
                name = self._names[parameter.ds_id]
                views[name] = piece[: len(self._held[name])]
        return views

    def _clear_gradients(self) -> None:
        """Zeroes what a next step without a gradient for some parameter would otherwise add to."""
        self._zero.grad_partitions_flat_buffer.zero_()
        self._zero.zero_grad()
        self._touched.clear()

    def _publish(self) -> None:
        """Makes the masters what the next forward computes with."""
        groups = zip(self._zero.fp16_partitioned_groups_flat, self._zero.fp32_partitioned_groups_flat, strict=True)
        for computed_with, masters in groups:
            if computed_with.data_ptr() != masters.data_ptr():  # in fp32 they may be one
                computed_with.copy_(masters.detach())
        self._drop_whole()

    def _drop_whole(self) -> None:
        """Frees whole parameters that a forward or backward left in place."""
        self._zero.parameter_offload.partition_all_parameters()


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, told what it would otherwise find out, or compile, by itself."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine.backend=zero3 needs DeepSpeed ({error}): pip install 'ltx2_train[deepspeed]', "
            "or take engine.backend=fsdp2"
        ) from error

    if world.device.type == "cpu":
        __compatible_ops__["deepspeed_shm_comm"] = False  # else C++ is compiled, about a minute, for what gloo does
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _partition(deepspeed: Any, module: nn.Module, config: EngineConfig, world: World) -> None:
    """Gives the parameters memory, one module at a time, and leaves this rank its range. Buffers stay whole."""
    dtype = config.precision.dtype
    offloads = config.offload is Offload.all
    place = {"remote_device": "cpu", "pin_memory": world.device.type == "cuda"} if offloads else {}
    for part in reversed(list(module.modules())):  # what is inside comes first
        for name, meta in list(part.named_parameters(recurse=False)):
            values = torch.empty(meta.shape, dtype=dtype, device=world.device)
            part.register_parameter(name, nn.Parameter(values, requires_grad=meta.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty_like(buffer, device=world.device))
        # It also replaces torch's linear function for good, by one that keeps no gathered weight for backward.
        deepspeed.zero.Init(module=part, dtype=dtype, **place)


def _initialize(deepspeed: Any, module: nn.Module, config: EngineConfig, world: World) -> Any:
    """DeepSpeed's engine around the partitioned module."""
    trained: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    waiting = min(REDUCED_AT_ONCE, max(1, sum(parameter.ds_numel for parameter in trained)))
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(trained), config=_settings(config, world, waiting)
    )
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        flat.grad = None  # memory for an update that is not DeepSpeed's to do
    return engine


def _settings(config: EngineConfig, world: World, waiting: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Batches, clipping and the update are not its affair."""
    host = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": waiting}
    if config.offload is not Offload.none:
        zero["offload_optimizer"] = host
    if config.offload is Offload.all:
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": config.precision is Precision.bf16},
        "communication_data_type": "fp32",  # of gradients
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _watch_gradients(parameters: dict[str, nn.Parameter], touched: set[str]) -> None:
    """Notes the name of every trained parameter that a backward reaches."""
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(_note, touched, name))


def _note(touched: set[str], name: str, parameter: Tensor) -> None:
    touched.add(name)

"""The ZeRO-3 engine: DeepSpeed shards, gathers and reduces; norm, update and checkpoints are those of the FSDP2 engine.

Every parameter is cut into one range of its flattened elements per rank. DeepSpeed keeps this rank's range in the dtype
that is computed in, gathers whole parameters around each module and adds up the gradients of the range. Its optimizer is
never stepped: it knows one flat tensor, in which a parameter that had no gradient would decay, and keeps a gradient
from one step to the next where the later step has none. AdamW runs on views of DeepSpeed's fp32 masters instead,
parameter by parameter, so that both engines give the same run and write the same checkpoints.

Source: ZeRO (arXiv:1910.02054).
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltx2_train.distributed.base import fingerprints
from ltx2_train.distributed.engine import EngineConfig, Offload, PendingSave, Precision, Recompute, StepResult
from ltx2_train.distributed.fsdp2 import Fsdp2Engine, _adamw, _DcpSave, _save_talk, _split_extra
from ltx2_train.distributed.units import prepare_units, shard_units
from ltx2_train.distributed.world import World
from ltx2_train.errors import ConfigError

REDUCED_AT_ONCE = 1 << 27  # elements, fp32: gradients wait in a buffer of this size to be reduced together


@dataclass(frozen=True, slots=True)
class Held:
    """Elements start .. stop - 1 of a flattened parameter: those that this rank holds. It may be none."""

    shape: torch.Size  # of the whole parameter
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, weight: Any) -> Tensor:
        """(len,) of a whole tensor, or of a stored one, of which only the rows around are read."""
        if isinstance(weight, Tensor):
            return weight.reshape(-1)[self.start : self.stop]
        row = math.prod(self.shape[1:])
        first, last = self.start // row, -(-self.stop // row)
        return weight.rows(first, last).reshape(-1)[self.start - first * row : self.stop - first * row]


class Zero3Engine(Fsdp2Engine):
    """Implements `Engine` on DeepSpeed's ZeRO stage 3."""

    def __init__(
        self, build: Callable[[], nn.Module], weights: Iterable[tuple[str, Any]], config: EngineConfig, world: World
    ) -> None:
        _check(config)
        self.config, self.world = config, world
        self._save_talk = _save_talk(world)
        deepspeed = _import_deepspeed(world)
        with torch.device("meta"):
            self.module = build()
        shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        prepare_units(shard_units(self.module), config)
        _partition(deepspeed, self.module, config, world)
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        self._parameters, self._buffers = parameters, dict(self.module.named_buffers())
        self._touched: set[str] = set()  # trained parameters that had a gradient since the last step
        _watch_gradients(self._parameters, self._touched)
        self._deepspeed = _initialize(deepspeed, self.module, config, world)
        self._zero = self._deepspeed.optimizer
        self.model: Callable[..., Any] = self._deepspeed
        self._names = {parameter.ds_id: name for name, parameter in parameters.items()}
        self._padded: dict[str, Tensor] = {name: p.ds_tensor for name, p in parameters.items()}  # the last ranks' are
        self._held = {name: _held(shapes[name], len(padded), world) for name, padded in self._padded.items()}
        self._stored = {name: padded[: len(self._held[name])] for name, padded in self._padded.items()}
        self._masters = self._views(self._zero.fp32_partitioned_groups_flat)
        sizes = [len(flat) for flat in self._zero.fp32_partitioned_groups_flat]
        self._gradients = self._views(self._zero.grad_partitions_flat_buffer.split(sizes))
        self._fill(weights)
        self._optimizer = _adamw(self._masters, {name: len(shape) for name, shape in shapes.items()}, config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates this rank's range of the gradients, reduced with every micro-batch."""
        # For DeepSpeed none is the last: with that one it prepares the update of its own optimizer.
        self._deepspeed.set_gradient_accumulation_boundary(False)
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def step(self, *, lr: float) -> StepResult:
        """Clips, updates and clears the gradients. A non-finite norm, or one above `skip_above`, is not applied."""
        self._drop_whole()
        grads = {name: grad for name, grad in self._gradients.items() if name in self._touched}
        self._zero.grad_partitions_flat_buffer.mul_(self.world.size)  # DeepSpeed's are means over the ranks
        norm = self._global_norm(list(grads.values()))
        applied = math.isfinite(norm) and (self.config.skip_above is None or norm <= self.config.skip_above)
        if applied:
            self._update(grads, norm, lr)
        self._clear_gradients()
        return StepResult(norm, applied)

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Whole CPU copies, one at a time, on rank 0; empty tensors elsewhere."""
        for name in self._masters if trained_only else self._parameters:
            yield name, self._gathered(name, self._masters.get(name, self._stored[name]))

    def save(self, directory: Path, extra: dict[str, Any]) -> PendingSave:
        """Copies the state to the host and writes it in a thread (PyTorch distributed checkpoint)."""
        import torch.distributed.checkpoint as dcp

        tensors, plain = _split_extra(extra)
        directory.mkdir(parents=True, exist_ok=True)
        state = {part: {n: _on_host(t) for n, t in named.items()} for part, named in self._state(tensors).items()}
        num_bytes = sum(t.numel() * t.element_size() for named in state.values() for t in named.values())
        thread = ThreadPoolExecutor(1, "checkpoint")
        future = thread.submit(dcp.save, state, storage_writer=dcp.FileSystemWriter(directory), **self._save_talk)
        thread.shutdown(wait=False)
        return _DcpSave(future, directory, self.world, self._index(tensors, plain), num_bytes)

    @torch.no_grad()
    def _fill(self, weights: Iterable[tuple[str, Any]]) -> None:
        """This rank's range is cut out of each tensor, or read of it, and the tensor dropped."""
        for name, weight in weights:
            if name in self._buffers:
                self._buffers[name].copy_(weight if isinstance(weight, Tensor) else weight.read())
                continue
            values = self._held[name].of(weight)
            for place in (self._stored, self._masters):
                if name in place:
                    place[name].copy_(values)

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

    def _gathered(self, name: str, own: Tensor) -> Tensor:
        """The whole of which `own` is this rank's range, on rank 0's CPU."""
        held, size = self._held[name], self.world.size
        padded = own.new_zeros(len(self._padded[name]))
        padded[: len(held)] = own
        parts = [torch.empty_like(padded) for _ in range(size)] if self.world.is_main else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return torch.empty(0)
        return torch.cat([part.cpu() for part in parts])[: math.prod(held.shape)].view(held.shape)

    def _whole(self, name: str, shard: Tensor) -> Tensor:
        return Boxed(shard, self._held[name])

    @cached_property
    def _base(self) -> dict[str, str]:
        frozen = [name for name in self._parameters if name not in self._masters]
        return fingerprints({name: (self._stored[name], self._held[name].start) for name in frozen}, self.world)

    def _contents(self) -> dict[str, Any]:
        shapes = {name: list(held.shape) for name, held in self._held.items()}
        shapes |= {name: list(buffer.shape) for name, buffer in self._buffers.items()}
        return super()._contents() | {"shapes": shapes}


class Boxed(Tensor):
    """A whole tensor of which this rank has a range of elements, as PyTorch's distributed checkpoint wants to see it.

    A checkpoint knows boxes of a tensor: a range is the rest of a row, whole rows and the beginning of a row. Nothing
    can be computed with it.
    """

    flat: Tensor
    held: Held

    @staticmethod
    def __new__(cls, flat: Tensor, held: Held) -> "Boxed":
        boxed = Tensor._make_wrapper_subclass(cls, held.shape, dtype=flat.dtype, device=flat.device)
        boxed.flat, boxed.held = flat, held
        return boxed

    def __init__(self, flat: Tensor, held: Held) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} on a tensor that is only there to be saved")

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        held = self.held
        return [ChunkStorageMetadata(*map(torch.Size, box)) for box in boxes(held.shape, held.start, held.stop)]

    def __create_write_items__(self, fqn: str, tensor: Tensor) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        chunks = self.__create_chunk_list__()
        sizes = [math.prod(chunk.sizes) for chunk in chunks]
        for chunk, part in zip(chunks, self.flat.split(sizes), strict=True):
            if chunk.offsets == index.offset:
                return part.view(chunk.sizes)
        raise AssertionError(f"{index} is not of this rank")


def boxes(shape: torch.Size, start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    """(offsets, sizes) of the boxes that elements start .. stop - 1 of a tensor fill, in their order."""
    if start >= stop:
        return []
    if len(shape) < 2:
        return [([start], [stop - start])] if len(shape) else [([], [])]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    head = _in_row(shape, first - 1, start - (first - 1) * row, row) if start % row else []
    middle = [([first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]])] if last > first else []
    return [*head, *middle, *_in_row(shape, last, 0, stop - last * row)]


def _in_row(shape: torch.Size, row: int, start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    return [([row, *offsets], [1, *sizes]) for offsets, sizes in boxes(shape[1:], start, stop)]


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    if isinstance(tensor, Boxed):
        return Boxed(tensor.flat.to("cpu", copy=True), tensor.held)
    return tensor.to("cpu", copy=True)


def _held(shape: torch.Size, size: int, world: World) -> Held:
    """What this rank holds where all hold `size` elements, padding included."""
    whole = math.prod(shape)
    return Held(shape, min(world.rank * size, whole), min((world.rank + 1) * size, whole))


def _check(config: EngineConfig) -> None:
    """Raises `ConfigError` for what whole blocks must be gathered for: here it is the modules inside, as they run."""
    inside = "engine.backend=zero3 gathers weights inside a block, where"
    if config.compile:
        raise ConfigError(f"engine.compile=true: {inside} a compiled block has none. Leave it at false")
    if config.recompute is Recompute.selective:
        raise ConfigError(
            f"engine.recompute=selective: {inside} single operations cannot be kept. Take full, every_n or budget"
        )


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
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
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

"""The FSDP2 engine: per-block sharding, AdamW on this rank's fp32 shards, asynchronous sharded checkpoints."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ltx2_train.distributed.base import Part, fingerprints, other_base, verified
from ltx2_train.distributed.engine import EngineConfig, Offload, PendingSave, Precision, StepResult
from ltx2_train.distributed.units import prepare_units, shard_units
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.weightfile import Stored

FORMAT = "fsdp2-dcp-2"
INDEX_FILE = "engine.json"
READ_AT_ONCE = 1 << 30  # bytes of weights read in one call


class Fsdp2Engine:
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
        self.config, self.world = config, world
        self._mesh = _mesh(world, config.replicate)
        self._save_talk = _save_talk(world)
        with torch.device("meta"):
            self.module = build()
        self.model: Callable[..., Any] = self.module
        if config.precision is Precision.bf16:
            _keep_frozen_in_bf16(self.module)
        prepare_units(shard_units(self.module), config)
        offloads = config.offload is Offload.all
        self._is_sharded = world.size > 1 or config.precision is not Precision.fp32 or offloads
        if self._is_sharded:
            _shard(self.module, self._mesh, config)
        self.module.to_empty(device="cpu" if offloads else world.device)
        if offloads:
            _move_buffers(self.module, world.device)
        # Parameters are looked up once: after a forward the module may hold whole weights in their place.
        self._parameters = dict(self.module.named_parameters())
        self._buffers = dict(self.module.named_buffers())
        self._fill(weights)
        trained = {name: _local(p) for name, p in self._parameters.items() if p.requires_grad}
        self._masters = trained if config.offload is not Offload.optimizer else _on_host(trained)
        self._optimizer = _adamw(self._masters, {n: p.ndim for n, p in self._parameters.items()}, config)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates gradients; they are summed over the ranks with the last micro-batch."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        loss.backward()

    @torch.no_grad()
    def step(self, *, lr: float) -> StepResult:
        """Clips, updates and clears the gradients. A non-finite norm, or one above `skip_above`, is not applied."""
        grads = {name: _local(p.grad) for name, p in self._parameters.items() if p.grad is not None}
        norm = self._global_norm(list(grads.values()))
        applied = math.isfinite(norm) and (self.config.skip_above is None or norm <= self.config.skip_above)
        if applied:
            self._update(grads, norm, lr)
        for parameter in self._parameters.values():
            parameter.grad = None
        return StepResult(norm, applied)

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
        for name, parameter in self._parameters.items():
            if trained_only and name not in self._masters:
                continue
            whole = self._whole(name, _local(parameter))
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            yield name, whole.to("cpu", copy=True) if self.world.is_main else torch.empty(0)

    def save(self, directory: Path, extra: dict[str, Any]) -> PendingSave:
        """Copies the state to the host and writes it in a thread (PyTorch distributed checkpoint)."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        tensors, plain = _split_extra(extra)
        directory.mkdir(parents=True, exist_ok=True)
        state = self._state(tensors)
        future = dcp.async_save(
            state,
            storage_writer=dcp.FileSystemWriter(directory),
            async_stager=BlockingAsyncStager(),
            **self._save_talk,
        )
        assert isinstance(future, Future)
        num_bytes = sum(t.numel() * t.element_size() for part in state.values() for t in part.values())
        return _DcpSave(future, directory, self.world, self._index(tensors, plain), num_bytes)

    def load(self, directory: Path, extra: dict[str, Any]) -> dict[str, Any]:
        """Reads only JSON until names and shapes agree. The rest is a pickle: verify its hashes before calling this."""
        import torch.distributed.checkpoint as dcp

        index = _read_index(directory)
        tensors, plain = _split_extra(extra)
        self._check(index, tensors, directory)
        with torch.no_grad():
            reader = dcp.FileSystemReader(directory)
            dcp.load(self._state(tensors), storage_reader=reader, **self._save_talk)
            self._publish()
        for name, master in self._masters.items():
            self._optimizer.state[master]["step"].fill_(index["steps"][name])
        return {**plain, **index["extra"], **tensors}

    def _fill(self, weights: Iterable[tuple[str, Tensor | Stored]]) -> None:
        """Of each whole tensor this rank's part, which is all that is read of one that is still in a file."""
        targets = self._parameters | self._buffers
        for name, whole in weights:
            target = targets[name].detach()
            _local(target).copy_(_part(whole, target))

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

    def _publish(self) -> None:
        """Makes the masters what the next forward computes with.

        Masters on the host are copied into the parameters, and whole weights that a forward left in place are dropped,
        so that the next one gathers the new ones.
        """
        if self.config.offload is Offload.optimizer:
            for name, master in self._masters.items():
                _local(self._parameters[name]).copy_(master)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _state(self, extra: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Everything that is saved, as whole tensors of which this rank holds its part: nothing that is frozen."""
        model = {name: self._whole(name, master) for name, master in self._masters.items()}
        moments = [("exp_avg", name, master) for name, master in self._masters.items()]
        moments += [("exp_avg_sq", name, master) for name, master in self._masters.items()]
        return {
            "model": model | {name: buffer.detach() for name, buffer in self._buffers.items()},
            "optimizer": {f"{m}.{n}": self._whole(n, self._optimizer.state[p][m]) for m, n, p in moments},
            "extra": {f"{key}.{n}": self._whole(n, t) for key, shards in extra.items() for n, t in shards.items()},
        }

    def _whole(self, name: str, shard: Tensor) -> Tensor:
        """The tensor of which `shard` is this rank's part, laid out as parameter `name`."""
        like = self._parameters[name]
        if not isinstance(like, DTensor):
            return shard
        mesh = self._mesh if shard.device.type == self._mesh.device_type else self._host_mesh
        return DTensor.from_local(shard, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())

    @cached_property
    def _host_mesh(self) -> DeviceMesh:
        """The same ranks, for shards in the host's memory: a DTensor moves what it is given to its mesh's device."""
        return _mesh(replace(self.world, device=torch.device("cpu")), self.config.replicate)

    @cached_property
    def _base(self) -> dict[str, str]:
        """Fingerprints of the frozen weights. Nothing ever changes them, so they are taken once."""
        frozen = {name: p for name, p in self._parameters.items() if name not in self._masters}
        return fingerprints({name: self._part(parameter) for name, parameter in frozen.items()}, self.world)

    def _part(self, parameter: Tensor) -> Part:
        """What this rank holds of a parameter and no other rank says it holds: of replicas, the first one's."""
        local = _local(parameter)
        if not isinstance(parameter, DTensor):
            return local, 0
        replica, rank = divmod(self.world.rank, self.world.size // self.config.replicate)
        rows = -(-parameter.shape[0] // (self.world.size // self.config.replicate))  # as torch.chunk cuts
        return local[: 0 if replica else None], rank * rows * math.prod(parameter.shape[1:])

    def _index(self, tensors: dict[str, dict[str, Tensor]], plain: dict[str, Any]) -> str:
        """What the checkpoint holds, as JSON."""
        steps = torch.stack([self._optimizer.state[master]["step"] for master in self._masters.values()]).tolist()
        index = self._contents() | {
            "steps": dict(zip(self._masters, steps, strict=True)),
            "extra_tensors": {key: list(shards) for key, shards in tensors.items()},
            "extra": plain,
        }
        return json.dumps(index)

    def _contents(self) -> dict[str, Any]:
        tensors = self._parameters | self._buffers
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        return {"format": FORMAT, "shapes": shapes, "trained": list(self._masters), "base": self._base}

    def _check(self, index: dict[str, Any], extra: dict[str, dict[str, Tensor]], directory: Path) -> None:
        own = self._contents()
        lines = _differences(index["shapes"], own["shapes"], "parameter")
        lines += _differences(dict.fromkeys(index["trained"]), dict.fromkeys(own["trained"]), "trained parameter")
        saved = {f"{key}.{name}" for key, names in index["extra_tensors"].items() for name in names}
        lacking = {f"{key}.{name}" for key, shards in extra.items() for name in shards} - saved
        lines += _differences({}, dict.fromkeys(lacking), "tensor")
        if lines:
            raise CheckpointError(f"{directory} belongs to another model:\n  " + "\n  ".join(lines))
        if changed := [name for name, value in own["base"].items() if index["base"][name] != value]:
            raise CheckpointError(other_base(directory, changed[0]))


class _DcpSave:
    """A distributed checkpoint being written; the JSON index follows when all ranks' tensors are on disk."""

    def __init__(self, future: Future, directory: Path, world: World, index: str, num_bytes: int) -> None:
        self._future, self._directory, self._world, self._index = future, directory, world, index
        self.num_bytes = num_bytes

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Raises `CheckpointError` with the first failure of any rank."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            self._future.result()
            if self._world.is_main:
                (self._directory / INDEX_FILE).write_text(self._index)
        except CheckpointException as error:  # not an Exception, and silent about the cause in its last line
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"rank {rank}: {type(cause).__name__}: {cause}") from error

    def files(self) -> list[Path]:
        return sorted(self._directory.glob(f"__{self._world.rank}_*.distcp"))


def _save_talk(world: World) -> dict[str, Any]:
    """How the ranks agree on a checkpoint: on a group of its own, as saving talks from its own thread; one rank not at all.

    The threads of gloo that copy what is gathered keep OpenMP workers for good, and with more of those than cores all
    of them sleep at every barrier: a small model's step on a CPU took twice as long from the first checkpoint on.
    """
    if world.size == 1:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant: there is no one to talk to
        return {"no_dist": True}
    return {"process_group": dist.new_group(backend="gloo")}


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


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    with torch.no_grad():
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _part(whole: Tensor | Stored, target: Tensor) -> Tensor:
    """What this rank keeps of a whole tensor. Shards are ranges of rows, which lie together in a file."""
    if not isinstance(target, DTensor):
        return whole if isinstance(whole, Tensor) else whole.read()
    assert target.placements[-1] == Shard(0), f"{target.placements}: weights are cut by rows over the last mesh dim"
    mesh, axis = target.device_mesh, target.device_mesh.ndim - 1
    rows = -(-target.shape[0] // mesh.size(axis))  # as torch.chunk cuts them
    start = min(mesh.get_local_rank(axis) * rows, target.shape[0])
    stop = start + _local(target).shape[0]
    return whole[start:stop] if isinstance(whole, Tensor) else whole.rows(start, stop)


def _split_extra(extra: dict[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The dicts of sharded tensors, and the plain values."""
    sharded = {k: v for k, v in extra.items() if isinstance(v, dict) and any(isinstance(t, Tensor) for t in v.values())}
    return sharded, {k: v for k, v in extra.items() if k not in sharded}


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX_FILE
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint index ({error})") from error
    if index.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: written as {index.get('format')!r}, this version reads {FORMAT!r}. Start the run anew, or go on "
            "with the version that wrote it"
        )
    return index


def _differences(saved: dict[str, Any], own: dict[str, Any], what: str) -> list[str]:
    """One line per name whose value differs; at most ten."""
    lines = [f"{what} {name}: only in the checkpoint" for name in saved if name not in own]
    lines += [f"{what} {name}: not in the checkpoint" for name in own if name not in saved]
    both = (name for name in own if name in saved and saved[name] != own[name])
    lines += [f"{what} {name}: {saved[name]} in the checkpoint, {own[name]} here" for name in both]
    return lines if len(lines) <= 10 else [*lines[:10], f"and {len(lines) - 10} more"]


def saved_weights(
    directory: Path, *, averaged: str | None = None, initial: Iterable[tuple[str, Any]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole CPU tensor) of every parameter of a checkpoint, some at a time, without an engine or a process group.

    `averaged`: the `extra` key of the moving average, which then stands in for the trained weights. `initial`: the
    weights that the run started from, of which the frozen ones are taken; without them those are left out. Verify the
    checkpoint's hashes first. Raises `CheckpointError` for another base than the one it was trained beside.
    """
    index = _read_index(directory)
    keys = _saved_keys(index, averaged, directory)
    part: dict[str, Tensor] = {}
    for left, (name, entry) in zip(range(len(keys) - 1, -1, -1), keys.items(), strict=True):
        part[name] = _empty_like_saved(entry[1])
        if not left or sum(tensor.nbytes for tensor in part.values()) >= READ_AT_ONCE:
            _read({keys[n][0]: tensor for n, tensor in part.items()}, directory)
            yield from part.items()
            part = {}
    if initial is not None:
        yield from verified(initial, index["base"], directory)


def _saved_keys(index: dict[str, Any], averaged: str | None, directory: Path) -> dict[str, tuple[str, Any]]:
    """The key in the checkpoint, and what it says of it, of every tensor that is saved."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    trained = set(index["trained"]) if averaged else set()
    names = [name for name in index["shapes"] if name not in index["base"]]
    keys = {n: f"extra.{averaged}.{n}" if n in trained else f"model.{n}" for n in names}
    if missing := [key for key in keys.values() if key not in metadata]:
        found = list(index["extra_tensors"]) or "none"
        raise CheckpointError(f"{directory} holds no {missing[0]}; its averages: {found}")
    return {name: (key, metadata[key]) for name, key in keys.items()}


def _empty_like_saved(entry: Any) -> Tensor:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    assert isinstance(entry, TensorStorageMetadata)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _read(state: dict[str, Tensor], directory: Path) -> None:
    """Fills the tensors. A call has a price of its own, about 0.1 s, so many are read at once."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant: one process reads all
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)

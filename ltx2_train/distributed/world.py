"""The ranks of a run: who they are, and the few things they tell each other."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ltx2_train.errors import ConfigError, Ltx2Error

T = TypeVar("T")
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class World:
    """This process among the processes of the run. Every method is called by all ranks together."""

    rank: int
    size: int
    local_rank: int  # place on this machine: the number of its GPU
    device: torch.device
    sequence: int = 1  # ranks that share the tokens of each sample; consecutive ones form a group
    sequence_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Place among the groups that get samples of their own; without sequence parallel, the rank."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """How many groups get samples of their own."""
        return self.size // self.sequence

    @property
    def counts_samples(self) -> bool:
        """Whether the samples that this rank sees are counted here: in each group, by the first rank alone."""
        return self.rank % self.sequence == 0

    def sharing_samples(self, sequence: int, timeout_seconds: float = TIMEOUT_SECONDS) -> "World":
        """This world with groups of `sequence` consecutive ranks. Raises `ConfigError` where they do not come out even."""
        if sequence < 1 or self.size % sequence:
            raise ConfigError(
                f"engine.sequence={sequence}: {self.size} processes do not fall into groups of {sequence}. "
                f"Set engine.sequence to a divisor of {self.size}, or start a multiple of {sequence} processes"
            )
        if sequence == 1:
            return self
        group, _ = dist.new_subgroups(group_size=sequence, timeout=timedelta(seconds=timeout_seconds))
        return replace(self, sequence=sequence, sequence_group=group)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same bits on all of them, on the tensor's device; the host does not wait for it."""
        if self.size == 1:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def data_sum(self, tensor: Tensor) -> Tensor:
        """As `all_sum`, for what follows from samples: of the ranks that share them, one counts."""
        return self.all_sum(tensor if self.counts_samples else torch.zeros_like(tensor))

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, pickled to the others."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_in_sequence(self, value: T) -> T:
        """The value of the first rank of this rank's group, pickled to the others of the group."""
        if self.sequence == 1:
            return value
        box = [value]
        first = self.rank - self.rank % self.sequence
        dist.broadcast_object_list(box, src=first, group=self.sequence_group, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)


class Gathers(Protocol):
    """What of a world `agreed` needs."""

    def gather_objects(self, value: Any) -> list[Any]: ...


def agreed(world: Gathers, task: Callable[[], T]) -> T:
    """What `task` gives this rank; if it fails on any rank, all of them raise the first such error together.

    The error is of the kind that the failing rank raised, or an `Ltx2Error` naming it, and is marked as agreed. `task`
    calls no collective: a rank that failed before it would leave the others waiting there.
    """
    own: Exception | None = None
    try:
        result = task()
    except Exception as error:
        own = error
    failures = [told for told in world.gather_objects(_told(own)) if told is not None]
    if failures:
        kind, message = failures[0]
        together = kind(message)
        together.agreed = True
        raise together from own
    return result


class Tells(Gathers, Protocol):
    """What of a world `from_main` needs."""

    @property
    def is_main(self) -> bool: ...

    def broadcast_object(self, value: T) -> T: ...


def from_main(world: Tells, task: Callable[[], T]) -> T:
    """What `task`, which rank 0 alone does, gives: on all ranks. If it fails, all of them raise, as in `agreed`."""
    done = agreed(world, lambda: task() if world.is_main else None)
    return world.broadcast_object(cast(T, done))


def _told(error: Exception | None) -> tuple[type[Ltx2Error], str] | None:
    """An error as it can be sent."""
    if error is None:
        return None
    if isinstance(error, Ltx2Error):
        return type(error), str(error)
    return Ltx2Error, f"{type(error).__name__}: {error}"


def init_world(timeout_seconds: float = TIMEOUT_SECONDS) -> World:
    """Joins the process group that torchrun's environment describes; without one, a group of this process alone.

    Called again it describes the group that is there. `timeout_seconds`: how long a collective may hang.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(device, timedelta(seconds=timeout_seconds))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _join(device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def close_world() -> None:
    """Leaves the group, after all ranks have come to this point. Belongs into a `finally`.

    A rank that leaves the group early dies at exit on some systems (SIGABRT), hence the barrier. While an exception is
    in flight there is none: the other ranks may never come.
    """
    if not dist.is_initialized():
        return
    if sys.exc_info()[0] is None and dist.get_world_size() > 1:
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
    dist.destroy_process_group()

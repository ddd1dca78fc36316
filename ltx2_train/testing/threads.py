"""Ranks as threads: enough for evaluations, which only sum tensors and gather plain values."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ThreadWorld:
    rank: int
    size: int
    values: list[Any]
    barrier: threading.Barrier
    sequence: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        return self.size // self.sequence

    @property
    def counts_samples(self) -> bool:
        return self.rank % self.sequence == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def gather_objects(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def all_sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(tensor)).sum(dim=0)


def on_ranks(size: int, function: Callable[[ThreadWorld], Any], *, sequence: int = 1) -> list[Any]:
    """What `function` gives on each of `size` ranks that run side by side; `sequence` of them share samples."""
    barrier, values, results = threading.Barrier(size, timeout=60), [None] * size, [None] * size

    def run(rank: int) -> None:
        results[rank] = function(ThreadWorld(rank, size, values, barrier, sequence))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

"""Batches of one rank, step by step, read ahead by worker processes: the plan says what comes next."""

import itertools
import logging
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ltx2_train.batch import Batch, collate, placeholder
from ltx2_train.data.datasets import LatentDataset
from ltx2_train.data.plan import MicroBatch, Plan, SampleRef
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.record import Bucket, Sample

logger = logging.getLogger(__name__)
FEWEST_SEEN = 1000  # the limit on bad records counts at least so many samples, so that one early one does not end a run


@dataclass(kw_only=True, slots=True)
class LoaderConfig:
    """How batches are read. Changes nothing of what is computed."""

    num_workers: int = 2
    """Processes per rank that read and collate; 0 reads in the training process."""
    prefetch_steps: int = 2
    """Steps that the workers read ahead."""
    pin_memory: bool = True
    """Copy batches to page-locked memory, for asynchronous copies to a CUDA device. Ignored where there is none."""
    bad_fraction: float = 0.01
    """Damaged records per record read that are tolerated; they keep their place with loss weight 0. More is an error.
    The first thousand records count as one thousand. 0: the first damaged record is an error."""
    timeout_seconds: float = 600.0
    """Longest wait for one batch from a worker before the run ends with an error; 0: for ever."""

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 0), ("prefetch_steps", 1), ("timeout_seconds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}; must be >= {least}")
        if not 0 <= self.bad_fraction <= 1:
            raise ConfigError(f"bad_fraction = {self.bad_fraction}; must be between 0 and 1")


def check_bad_records(bad: int, seen: int, limit: float, example: str) -> None:
    """Raises `DataError` when so many damaged records, of all that the run has read, are above the limit."""
    if bad > limit * max(seen, FEWEST_SEEN):
        raise DataError(
            f"{bad} of {seen} records are damaged, more than bad_fraction = {limit} allows. Among them: {example}. "
            "Repair the shards, or raise bad_fraction"
        )


class BatchReader(Dataset[Batch]):
    """Reads planned micro-batches. A damaged record keeps its place as a placeholder of weight 0."""

    def __init__(self, datasets: Sequence[LatentDataset]) -> None:
        self.datasets = list(datasets)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        errors: list[str] = []
        retried = self._retried_reads()
        samples = [self._read(ref, micro_batch.bucket, errors) for ref in micro_batch.samples]
        batch = collate(samples, micro_batch.positions, micro_batch.bucket, errors)
        return replace(batch, retried_reads=self._retried_reads() - retried)

    def _retried_reads(self) -> int:
        """Of all stores in this process, so far."""
        return sum(dataset.store.retried_reads for dataset in self.datasets)

    def _read(self, ref: SampleRef, bucket: Bucket, errors: list[str]) -> Sample:
        dataset = self.datasets[ref.dataset]
        try:
            return dataset.read(ref.number)
        except DataError as error:
            errors.append(str(error))
            return placeholder(dataset.index.key(ref.number), bucket, dataset.stand_in_text)
        except Exception as error:
            key = dataset.index.key(ref.number)
            raise RuntimeError(f"reading {key} of {dataset.location} failed: {error!r}") from error


@dataclass(frozen=True, slots=True)
class _Work:
    """The micro-batches of one data rank, without end, in the order in which they are wanted."""

    plan: Plan
    data_rank: int
    data_size: int
    start_step: int

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in itertools.count(self.start_step):
            yield from self.plan.rank_step(step, self.data_rank, self.data_size)


class Loader:
    """Iterating gives one list of batches per step, without end, from `start_step` on; each iteration starts there."""

    def __init__(
        self,
        datasets: Sequence[LatentDataset],
        plan: Plan,
        data_rank: int = 0,
        data_size: int = 1,
        start_step: int = 0,
        config: LoaderConfig | None = None,
    ) -> None:
        """`datasets` in the order of the plan's indexes. Raises `ConfigError` when the plan does not fit the data ranks."""
        self.reader = BatchReader(datasets)
        self.config = config or LoaderConfig()
        self.work = _Work(plan, data_rank, data_size, start_step)
        self.batches_per_step = plan.config.micro_batches_per_step * plan.split(data_size) // data_size

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self._data_loader())
        try:
            for step in itertools.count(self.work.start_step):
                loaded = list(itertools.islice(batches, self.batches_per_step))
                for message in itertools.chain.from_iterable(batch.errors for batch in loaded):
                    logger.warning("step %d: bad record, loss weight 0: %s", step, message)
                yield loaded
        finally:
            _stop_workers(batches)

    def _data_loader(self) -> DataLoader[Batch]:
        config, options = self.config, dict[str, Any]()
        if config.num_workers:
            ahead = math.ceil(config.prefetch_steps * self.batches_per_step / config.num_workers)
            options = {"prefetch_factor": ahead, "timeout": config.timeout_seconds}
        return DataLoader(
            self.reader,
            batch_size=None,  # the plan has made the batches
            sampler=self.work,
            num_workers=config.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_termination,
            pin_memory=config.pin_memory and torch.cuda.is_available(),
            **options,
        )


def _stop_workers(batches: Any) -> None:
    """End the worker processes now. Left to the garbage collector after an error, each would take five seconds."""
    stop = getattr(batches, "_shutdown_workers", None)
    if stop is not None:
        stop()


def _outlive_termination(worker: int) -> None:
    """A scheduler's SIGTERM goes to all processes; a reader that dies of it would break the step that is to be saved.

    It then has ten more minutes, and never keeps a parent waiting that wants to exit.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch

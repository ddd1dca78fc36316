"""The plan of a run: which samples make up which step, a pure function of (indexes, weights, config, skipped).

A dataset is an endless *stream*, epoch after epoch: its shards are shuffled, walked in blocks of a few shards, and the
samples are shuffled inside a block. The streams of a mixture advance together, window by window, each by its share; a
*window* is one block of the dataset with the greatest share. The samples of one bucket, in stream order, are cut into
micro-batches; the micro-batches of one modality signature, in the order of their cost, are cut into steps. What a
window leaves over opens the next, so an epoch has no ragged end and a dataset smaller than a step is simply repeated.

How many samples, micro-batches and steps lie before a window follows from counts alone. That is why step n is found
without walking through the steps before it, and why nothing about the order has to be saved. Caches below only save
time.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ltx2_train.data.index import Index
from ltx2_train.data.stream import Ints, SampleStream, shuffled
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.record import Bucket

KEPT_WINDOWS = 8  # how many stay cached


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """How samples become micro-batches and steps. It defines the run: another setting is another order."""

    seed: int = 0
    """Key of all shuffling."""
    micro_batches_per_step: int = 1
    """Forward-backward passes of one optimizer step over all ranks; the numbers of ranks that divide it can run it."""
    max_tokens: int = 16384
    """Most latent tokens (video + audio, text not counted) of one micro-batch; what one device must hold at once."""
    max_samples: int = 16
    """Most samples of one micro-batch, where the token budget would allow more."""
    block_shards: int = 16
    """Shards whose samples are shuffled together. A block always holds at least two steps."""
    split: int | None = None
    """Contiguous parts that each planned micro-batch is cut into when it is loaded; the global batch stays the same.
    None: as few as the number of ranks needs."""

    def __post_init__(self) -> None:
        for name in ("micro_batches_per_step", "max_tokens", "max_samples", "block_shards"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; must be >= 1")
        if self.split is not None and self.split < 1:
            raise ConfigError(f"split = {self.split}; must be >= 1, or null for as many parts as the ranks need")


class SampleRef(NamedTuple):
    """Sample `number` of dataset `dataset` of the mixture, both counted from 0."""

    dataset: int
    number: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one bucket and their positions in the global batch of the step."""

    bucket: Bucket
    samples: tuple[SampleRef, ...]
    positions: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Latent tokens over both modalities: what the cost of a micro-batch is measured by."""
        return self.bucket.tokens * len(self.samples)

    def split(self, parts: int) -> tuple["MicroBatch", ...]:
        """Contiguous parts whose lengths differ by at most one."""
        assert parts <= len(self.samples)
        cuts = [len(self.samples) * i // parts for i in range(parts + 1)]
        spans = [slice(a, b) for a, b in pairwise(cuts)]
        return tuple(MicroBatch(self.bucket, self.samples[s], self.positions[s]) for s in spans)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The micro-batches of one step over all ranks; their positions run from 0 through the global batch."""

    step: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_samples(self) -> int:
        return sum(len(m.samples) for m in self.micro_batches)

    @property
    def tokens(self) -> int:
        return sum(m.tokens for m in self.micro_batches)


class Share(NamedTuple):
    """One bucket of the plan: its samples and the micro-batches they fill in one epoch of the leading dataset."""

    bucket: Bucket
    samples: float
    micro_batch_samples: int
    micro_batches: float


class _Group(NamedTuple):
    """A micro-batch before it has positions: bucket number, and rows (dataset, sample)."""

    bucket: int
    refs: Ints


Spares = dict[int, Ints]  # bucket -> rows (dataset, sample) that do not yet fill a micro-batch
Groups = dict[int, list[_Group]]  # step class -> micro-batches


class Plan:
    """The steps of a run, any of them in any order."""

    def __init__(
        self,
        indexes: Sequence[Index],
        weights: Sequence[float] | None,
        config: PlanConfig,
        skipped: frozenset[str] = frozenset(),
    ) -> None:
        """`weights`: share of the samples that each dataset gives; None: as their sizes. `skipped`: sample keys.

        Raises `ConfigError` when a bucket exceeds the token budget, `DataError` when a dataset or a key is not there.
        """
        self.config = config
        self.buckets = tuple(sorted({bucket for index in indexes for bucket in index.buckets}))
        self._tokens = np.array([bucket.tokens for bucket in self.buckets], dtype=np.int64)
        lost = _find_skipped(indexes, skipped)
        self._streams = [SampleStream(x, d, self.buckets, config.seed, lost[d]) for d, x in enumerate(indexes)]
        if empty := [stream.number for stream in self._streams if stream.size == 0]:
            raise DataError(
                f"dataset {empty[0]} of the mixture has no samples to plan. Leave it out, or encode it again"
            )
        self._ratios, self._lead = _ratios(weights, self._streams)
        self._micro_batch_samples = self._sizes()
        self._classes = self._step_classes()
        self._set_windows()
        self._window_samples = lru_cache(KEPT_WINDOWS)(self._make_window_samples)
        self._window_groups = lru_cache(KEPT_WINDOWS)(self._make_window_groups)
        self._window_steps = lru_cache(KEPT_WINDOWS)(self._make_window_steps)
        self._spare_samples: dict[int, Spares] = {}  # by window: what lies over when it begins
        self._spare_groups: dict[int, Groups] = {}
        self._recent = (0, 0, 0)  # window, first step, first step of the next: where the last question fell

    # --- what the settings make of the datasets

    def _sizes(self) -> Ints:
        """(buckets,) samples of a micro-batch of each bucket."""
        config = self.config
        for bucket in self.buckets:
            if bucket.tokens > config.max_tokens:
                raise ConfigError(
                    f"max_tokens = {config.max_tokens}, but one sample of bucket {bucket} has {bucket.tokens} tokens; "
                    f"set max_tokens >= {max(b.tokens for b in self.buckets)}, or encode smaller buckets"
                )
        return np.minimum(config.max_samples, config.max_tokens // self._tokens)

    @cached_property
    def _samples_per_epoch(self) -> NDArray[np.float64]:
        """(buckets,) samples of each bucket in one epoch of the leading dataset; of the others, their share."""
        lead = self._streams[self._lead]
        rates = [lead.size * float(ratio) / s.size for ratio, s in zip(self._ratios, self._streams, strict=True)]
        return np.sum([r * s.bucket_counts for r, s in zip(rates, self._streams, strict=True)], axis=0)

    def _step_classes(self) -> Ints:
        """(buckets,) the step class of each bucket: its signature, or the commonest one's when it is too rare.

        Steps are made of one class. A signature that does not fill a step in an epoch would have to wait for several.
        """
        names = sorted({bucket.signature for bucket in self.buckets})
        ids = np.array([names.index(bucket.signature) for bucket in self.buckets])
        groups = np.bincount(ids, self._samples_per_epoch / self._micro_batch_samples)
        rare = groups < self.config.micro_batches_per_step
        return np.where(rare[ids], int(np.argmax(groups)), ids)

    def _set_windows(self) -> None:
        """Blocks large enough for two steps; when the dataset is too small for one, windows of several epochs."""
        lead, config = self._streams[self._lead], self.config
        groups = self._samples_per_epoch / self._micro_batch_samples
        steps = float(groups.sum()) / config.micro_batches_per_step
        shards_for_two_steps = math.ceil(2 * len(lead.shard_counts) / steps)
        for stream in self._streams:
            stream.set_block_shards(min(len(stream.shard_counts), max(config.block_shards, shards_for_two_steps)))
        self._window_epochs = max(1, math.ceil(1 / steps)) if lead.num_blocks == 1 else 1

    # --- what lies before a window, from counts alone

    def _bounds(self, window: int) -> list[int]:
        """Per dataset, the stream position at which the window begins."""
        lead = self._streams[self._lead]
        epoch, block = divmod(window, lead.num_blocks)
        return self._positions(lead.boundary(epoch * self._window_epochs, block))

    def _positions(self, lead_position: int) -> list[int]:
        return [math.floor(lead_position * ratio) for ratio in self._ratios]

    def _samples_before(self, positions: Sequence[int]) -> Ints:
        counts = [s.counts_before(x) for s, x in zip(self._streams, positions, strict=True)]
        return np.sum(counts, axis=0, dtype=np.int64)

    def _groups_before(self, positions: Sequence[int]) -> Ints:
        """(classes,) micro-batches of each step class that are complete at these stream positions."""
        complete = self._samples_before(positions) // self._micro_batch_samples
        totals = np.zeros(int(self._classes.max()) + 1, dtype=np.int64)
        np.add.at(totals, self._classes, complete)
        return totals

    def _steps_before(self, positions: Sequence[int]) -> int:
        return int((self._groups_before(positions) // self.config.micro_batches_per_step).sum())

    def _find_window(self, step: int) -> tuple[int, int, int]:
        """The window that holds a step, its first step and the next window's."""
        window, first, end = self._recent
        if not first <= step < end:
            window = self._search(step, near=window)
            first, end = (self._steps_before(self._bounds(w)) for w in (window, window + 1))
            self._recent = window, first, end
        return self._recent

    def _search(self, step: int, near: int) -> int:
        """The last window that begins at or before the step, by doubling and halving from a window nearby."""
        low, width = near, 1
        while low > 0 and self._steps_before(self._bounds(low)) > step:
            low, width = max(0, low - width), width * 2
        high, width = low + 1, 1
        while self._steps_before(self._bounds(high)) <= step:
            low, high, width = high, high + width, width * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._steps_before(self._bounds(middle)) > step else (middle, high)
        return low

    # --- what a window holds

    def _make_window_samples(self, window: int) -> Spares:
        """Bucket -> rows (dataset, sample) in stream order: the samples that this window adds."""
        start, end = self._bounds(window), self._bounds(window + 1)
        refs, ids, places = [], [], []
        for stream, a, b in zip(self._streams, start, end, strict=True):
            samples = stream.samples(a, b)
            refs.append(np.stack([np.full_like(samples, stream.number), samples], axis=1))
            ids.append(stream.buckets_of(samples))
            places.append((np.arange(len(samples)) + 0.5) / max(1, len(samples)))  # datasets are spread evenly
        order = np.lexsort((np.concatenate(places), np.concatenate(ids)))
        sorted_refs, sorted_ids = np.concatenate(refs)[order], np.concatenate(ids)[order]
        cuts = np.searchsorted(sorted_ids, np.arange(len(self.buckets) + 1))
        return {b: sorted_refs[cuts[b] : cuts[b + 1]] for b in range(len(self.buckets)) if cuts[b] < cuts[b + 1]}

    def _samples_over(self, window: int) -> Spares:
        """Bucket -> rows that earlier windows left over: the last ones of each bucket's stream before this window."""
        if window in self._spare_samples:
            return self._spare_samples[window]
        before = self._samples_before(self._bounds(window))
        missing = before % self._micro_batch_samples
        found: dict[int, list[Ints]] = defaultdict(list)
        while missing.any():
            window -= 1
            after, before = before, self._samples_before(self._bounds(window))
            for b in np.flatnonzero((after > before) & (missing > 0)).tolist():
                tail = self._window_samples(window)[b][-int(missing[b]) :]
                found[b].insert(0, tail)
                missing[b] -= len(tail)
        return {b: np.concatenate(parts) for b, parts in found.items()}

    def _make_window_groups(self, window: int) -> Groups:
        """Step class -> micro-batches that become complete in this window, in the order in which they enter steps.

        The order is by signature and cost, rising in one window and falling in the next, so that those that are
        cut into a step cost about the same, also across the border of two windows.
        """
        over, added = self._samples_over(window), self._window_samples(window)
        groups: Groups = defaultdict(list)
        left: Spares = {}
        for b in self._by_cost if window % 2 == 0 else self._by_cost[::-1]:
            parts = [rows[b] for rows in (over, added) if b in rows]
            refs = np.concatenate(parts) if parts else np.empty((0, 2), dtype=np.int64)
            size = int(self._micro_batch_samples[b])
            whole = len(refs) // size * size
            groups[int(self._classes[b])] += [_Group(b, refs[i : i + size]) for i in range(0, whole, size)]
            if whole < len(refs):
                left[b] = refs[whole:]
        _remember(self._spare_samples, window + 1, left)
        return groups

    @cached_property
    def _by_cost(self) -> list[int]:
        cost = self._tokens * self._micro_batch_samples
        return sorted(range(len(self.buckets)), key=lambda b: (self.buckets[b].signature, cost[b], self.buckets[b]))

    def _groups_over(self, window: int) -> Groups:
        """Step class -> micro-batches that earlier windows left over."""
        if window in self._spare_groups:
            return self._spare_groups[window]
        missing = self._groups_before(self._bounds(window)) % self.config.micro_batches_per_step
        found: Groups = defaultdict(list)
        while missing.any():
            window -= 1
            groups = self._window_groups(window)
            for c in np.flatnonzero(missing).tolist():
                tail = groups[c][-int(missing[c]) :] if c in groups else []
                found[c] = tail + found[c]
                missing[c] -= len(tail)
        return found

    def _make_window_steps(self, window: int) -> list[list[_Group]]:
        """The steps that become complete in this window, shuffled."""
        size = self.config.micro_batches_per_step
        over, added = self._groups_over(window), self._window_groups(window)
        steps: list[list[_Group]] = []
        left: Groups = {}
        for c in sorted({*over, *added}):
            groups = [*over.get(c, ()), *added.get(c, ())]
            whole = len(groups) // size * size
            steps += [groups[i : i + size] for i in range(0, whole, size)]
            left[c] = groups[whole:]
        _remember(self._spare_groups, window + 1, left)
        order = shuffled(np.arange(len(steps)), self.config.seed, "steps", window)
        return [steps[i] for i in order.tolist()]

    # --- the steps

    def step(self, n: int) -> PlannedStep:
        """Step n >= 0, the same whenever and wherever it is asked for."""
        assert n >= 0
        window, first, _ = self._find_window(n)
        micro_batches, position = [], 0
        for group in self._window_steps(window)[n - first]:
            samples = tuple(SampleRef(d, i) for d, i in group.refs.tolist())
            positions = tuple(range(position, position + len(samples)))
            micro_batches.append(MicroBatch(self.buckets[group.bucket], samples, positions))
            position += len(samples)
        return PlannedStep(n, tuple(micro_batches))

    def counts(self, n: int) -> tuple[int, int]:
        """Samples of step n that have video, and that have audio."""
        sizes = [(m.bucket.signature, len(m.samples)) for m in self.step(n).micro_batches]
        return sum(k for s, k in sizes if "v" in s), sum(k for s, k in sizes if "a" in s)

    def rank_step(self, n: int, data_rank: int, data_size: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of step n that a data rank loads: numbers data_rank, + data_size, ... after the split."""
        assert 0 <= data_rank < data_size
        parts = self.split(data_size)
        return tuple(part for m in self.step(n).micro_batches for part in m.split(parts))[data_rank::data_size]

    def split(self, data_size: int) -> int:
        """Parts that every micro-batch is cut into on so many data ranks. Raises `ConfigError` naming the valid numbers.

        A data rank is a group of processes that share samples: there are processes / engine.sequence of them.
        """
        size = self.config.micro_batches_per_step
        parts = self.config.split or data_size // math.gcd(data_size, size)
        smallest = int(self._micro_batch_samples.min())
        if size * parts % data_size or parts > smallest:
            bucket = self.buckets[int(self._micro_batch_samples.argmin())]
            valid = self.valid_data_sizes()
            raise ConfigError(
                f"{data_size} data ranks (processes / engine.sequence) with micro_batches_per_step = {size}, split = "
                f"{self.config.split}: valid numbers are {', '.join(map(str, valid)) or 'none'} (a micro-batch of bucket "
                f"{bucket} has {smallest} samples to cut). Start so many, or set micro_batches_per_step to a multiple of "
                f"{data_size}"
            )
        return parts

    def valid_data_sizes(self) -> list[int]:
        """All numbers of data ranks that this plan runs on with the same global batches."""
        size, smallest = self.config.micro_batches_per_step, int(self._micro_batch_samples.min())
        if self.config.split is not None:
            whole = size * self.config.split
            return [w for w in range(1, whole + 1) if whole % w == 0 and self.config.split <= smallest]
        return [w for w in range(1, size * smallest + 1) if w // math.gcd(w, size) <= smallest]

    # --- what a person wants to know

    def steps_before_epoch(self, epoch: int) -> int:
        """Steps that are complete when the leading dataset has been seen `epoch` times."""
        return self._steps_before(self._positions(epoch * self._streams[self._lead].size))

    def epoch(self, n: int) -> int:
        """The epoch of the leading dataset in whose windows step n lies."""
        window, _, _ = self._find_window(n)
        return window // self._streams[self._lead].num_blocks * self._window_epochs

    def shares(self) -> list[Share]:
        """What each bucket contributes in one epoch of the leading dataset."""
        sizes = self._micro_batch_samples.tolist()
        rows = zip(self.buckets, self._samples_per_epoch.tolist(), sizes, strict=True)
        return [Share(bucket, samples, size, samples / size) for bucket, samples, size in rows]


def _remember(cache: dict[int, Spares] | dict[int, Groups], window: int, value: Spares | Groups) -> None:
    cache[window] = value  # type: ignore[assignment]
    while len(cache) > KEPT_WINDOWS:
        del cache[next(iter(cache))]


def left_out(indexes: Sequence[Index], skipped: frozenset[str], given: frozenset[str]) -> list[tuple[int, int]]:
    """Per dataset: how many samples are skipped beyond the given ones, and of how many that is."""
    every, known = _find_skipped(indexes, skipped | given), _find_skipped(indexes, given)
    return [(len(e) - len(k), len(index) - len(k)) for index, e, k in zip(indexes, every, known, strict=True)]


def _find_skipped(indexes: Sequence[Index], skipped: frozenset[str]) -> list[Ints]:
    """Per dataset, the sample numbers of the skipped keys, sorted."""
    found = [index.find(skipped) for index in indexes]
    if unknown := skipped - set().union(*found):
        raise DataError(
            f"skipped sample {min(unknown)} is in none of the datasets. Resume with those the run was started on"
        )
    return [np.array(sorted(numbers.values()), dtype=np.int64) for numbers in found]


def _ratios(weights: Sequence[float] | None, streams: Sequence[SampleStream]) -> tuple[list[Fraction], int]:
    """Samples of each dataset per sample of the leading one, exactly, and which one leads."""
    if weights is not None and (len(weights) != len(streams) or min(weights) <= 0):
        raise ConfigError(f"weights = {list(weights)}; need one number > 0 for each of the {len(streams)} datasets")
    sizes = [stream.size for stream in streams]
    shares = [Fraction(w).limit_denominator(10**9) for w in (weights if weights is not None else sizes)]
    lead = max(range(len(shares)), key=lambda d: shares[d])
    return [share / shares[lead] for share in shares], lead

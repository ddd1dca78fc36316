"""The order of one dataset's samples, epoch after epoch without end: shards shuffled, read in blocks, shuffled inside.

Any part of the stream is found without walking through what lies before it, and how many samples of each bucket lie
before a place follows from the counts per shard. All shuffling is by integer hashes of our own, since no library
promises its permutations for ever.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ltx2_train.data.index import Index
from ltx2_train.record import Bucket
from ltx2_train.rng import derive_seed

Ints = NDArray[np.int64]
KEPT_EPOCHS, KEPT_BLOCKS = 4, 4  # how many stay cached


def mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A uniform-looking 64-bit hash of each value. Source: the finalizer of SplitMix64 (Steele et al. 2014), twice."""
    x = values ^ np.uint64(seed)
    for _ in range(2):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


def shuffled(values: Ints, *key: int | str) -> Ints:
    """The (distinct) values in an order that depends on them and the key, and on no other state."""
    return values[np.argsort(mix(values.astype(np.uint64), derive_seed(*key)), kind="stable")]


class _Epoch(NamedTuple):
    shards: Ints  # in the order of this epoch
    block_starts: Ints  # (blocks + 1,) samples before each block
    counts: Ints  # (blocks + 1, buckets) samples of each bucket before each block


class SampleStream:
    """One dataset, epoch after epoch. Position x of the stream is sample x % size of epoch x // size."""

    def __init__(self, index: Index, number: int, buckets: Sequence[Bucket], seed: int, skipped: Ints) -> None:
        self.index, self.number, self.seed, self.skipped = index, number, seed, skipped
        self.bucket_ids = np.array([buckets.index(bucket) for bucket in index.buckets], dtype=np.int64)
        self.shard_counts = self._count(len(buckets))
        self.bucket_counts = self.shard_counts.sum(axis=0)
        self.size = int(self.bucket_counts.sum())
        self.set_block_shards(1)

    def _count(self, num_buckets: int) -> Ints:
        counts = np.zeros((len(self.index.shard_names), num_buckets), dtype=np.int64)
        counts[:, self.bucket_ids] = self.index.shard_bucket_counts
        shards = np.searchsorted(self.index.shard_starts, self.skipped, side="right") - 1
        np.subtract.at(counts, (shards, self.buckets_of(self.skipped)), 1)
        return counts

    def set_block_shards(self, block_shards: int) -> None:
        self.block_shards = block_shards
        self.num_blocks = math.ceil(len(self.shard_counts) / block_shards)
        self.epoch = lru_cache(KEPT_EPOCHS)(self._epoch)
        self.block = lru_cache(KEPT_BLOCKS)(self._block)

    def buckets_of(self, samples: Ints) -> Ints:
        """Bucket numbers of samples, in the numbering of the whole mixture."""
        return self.bucket_ids[self.index.bucket_ids[samples]]

    def _epoch(self, epoch: int) -> _Epoch:
        shards = shuffled(np.arange(len(self.shard_counts)), self.seed, "shards", self.number, epoch)
        first = np.arange(0, len(shards), self.block_shards)
        counts = np.cumsum(np.add.reduceat(self.shard_counts[shards], first, axis=0), axis=0)
        counts = np.concatenate([np.zeros_like(counts[:1]), counts])
        return _Epoch(shards, counts.sum(axis=1), counts)

    def _block(self, epoch: int, block: int) -> Ints:
        """Sample numbers of one block, shuffled."""
        shards = self.epoch(epoch).shards[block * self.block_shards : (block + 1) * self.block_shards]
        starts = self.index.shard_starts
        samples = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        if len(self.skipped):
            samples = samples[~np.isin(samples, self.skipped)]
        return shuffled(samples, self.seed, "samples", self.number, epoch)

    def boundary(self, epoch: int, block: int) -> int:
        """Stream position at which a block of an epoch begins."""
        return epoch * self.size + (int(self.epoch(epoch).block_starts[block]) if block else 0)

    def _find(self, x: int) -> tuple[int, int, int]:
        """Epoch, block, and place inside the block, of a stream position."""
        epoch, rest = divmod(x, self.size)
        if rest == 0:
            return epoch, 0, 0
        starts = self.epoch(epoch).block_starts
        block = int(np.searchsorted(starts, rest, side="right")) - 1
        return epoch, block, rest - int(starts[block])

    def counts_before(self, x: int) -> Ints:
        """(buckets,) how many samples of each bucket the stream gives before position x."""
        epoch, block, rest = self._find(x)
        counts = epoch * self.bucket_counts
        if block:
            counts = counts + self.epoch(epoch).counts[block]
        if rest:
            ids = self.buckets_of(self.block(epoch, block)[:rest])
            counts = counts + np.bincount(ids, minlength=len(counts))
        return counts

    def samples(self, start: int, end: int) -> Ints:
        """Sample numbers at the stream positions from `start` to `end`."""
        parts = [np.empty(0, dtype=np.int64)]
        epoch, block, rest = self._find(start)
        while start < end:
            part = self.block(epoch, block)[rest : rest + end - start]
            parts.append(part)
            start += len(part)
            epoch, block, rest = (epoch, block + 1, 0) if block + 1 < self.num_blocks else (epoch + 1, 0, 0)
        return np.concatenate(parts)

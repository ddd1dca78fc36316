"""Indexes without shards, for tests of the plan."""

import numpy as np

from ltx2_train.data.index import Index
from ltx2_train.data.stream import shuffled
from ltx2_train.record import Bucket

CLIP, WIDE, LONG = Bucket(3, 4, 4, 24), Bucket(3, 4, 7, 24), Bucket(7, 4, 4, 56)
SILENT, IMAGE, SOUND = Bucket(3, 4, 4, 0), Bucket(1, 4, 4, 0), Bucket(0, 0, 0, 24)


def make_index(buckets: dict[Bucket, float], num_samples: int, shard_samples: int = 100, name: str = "a") -> Index:
    """An index of `num_samples` samples whose buckets have these weights, strewn over the shards."""
    table = tuple(sorted(buckets))
    ends = np.cumsum([buckets[bucket] for bucket in table]) / sum(buckets.values()) * num_samples
    ids = np.searchsorted(ends, shuffled(np.arange(num_samples), "make_index"), side="right").astype(np.int32)
    starts = np.append(np.arange(0, num_samples, shard_samples), num_samples)
    keys = [f"{name}{i:07d}".encode() for i in range(num_samples)]
    zeros = np.zeros(num_samples, dtype=np.int64)
    return Index(
        shard_names=tuple(f"{name}-{i:06d}.tar" for i in range(len(starts) - 1)),
        buckets=table,
        shard_sizes=np.zeros(len(starts) - 1, dtype=np.int64),
        shard_starts=starts.astype(np.int64),
        tensors_offset=zeros,
        tensors_size=zeros,
        meta_offset=zeros,
        meta_size=zeros.astype(np.int32),
        bucket_ids=ids,
        text_lengths=np.full(num_samples, 4, dtype=np.int32),
        key_starts=np.arange(num_samples + 1, dtype=np.int64) * len(keys[0]),
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
    )

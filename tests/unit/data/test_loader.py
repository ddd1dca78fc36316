import logging
import multiprocessing
import os
from contextlib import nullcontext
from itertools import islice

import pytest
import torch

from ltx2_train.data.datasets import open_dataset
from ltx2_train.data.loader import Loader, LoaderConfig, check_bad_records
from ltx2_train.data.plan import Plan, PlanConfig
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.record import Bucket, decode_record
from ltx2_train.testing.shards import random_sample, write_latent_dataset

BUCKETS = (Bucket(2, 2, 2, 5), Bucket(1, 2, 2, 0), Bucket(2, 2, 2, 5), Bucket(0, 0, 0, 7))
NUM_SAMPLES = 60


@pytest.fixture
def directory(tmp_path):
    samples = [random_sample(f"clip{i:02d}", BUCKETS[i % 4], text_length=1 + i % 5) for i in range(NUM_SAMPLES)]
    write_latent_dataset(tmp_path, samples)
    return tmp_path


def make_loader(directory, rank=0, world_size=1, start_step=0, num_workers=0, **plan):
    dataset = open_dataset(directory)
    settings = {"micro_batches_per_step": 2, "max_tokens": 60, "max_samples": 4, "block_shards": 3, **plan}
    config = LoaderConfig(num_workers=num_workers, timeout_seconds=60)
    return Loader([dataset], Plan([dataset.index], None, PlanConfig(**settings)), rank, world_size, start_step, config)


def take(loader, num_steps):
    return list(islice(loader, num_steps))


def damage(directory, key):
    """Flip one bit among the tensors of a record."""
    dataset = open_dataset(directory)
    number = dataset.index.find([key])[key]
    at = dataset.index.location(number)
    path = directory / dataset.index.shard_names[at.shard]
    data = bytearray(path.read_bytes())
    data[at.tensors_offset + at.tensors_size - 1] ^= 1
    path.write_bytes(data)
    return number


def equal(a, b):
    same = (a.keys, a.positions, a.text_lengths, a.errors) == (b.keys, b.positions, b.text_lengths, b.errors)
    return same and all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("video", "audio", "video_text", "has_audio")
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_plan_in_its_order(directory, num_workers):
    loader = make_loader(directory, num_workers=num_workers)
    index, plan = loader.reader.datasets[0].index, loader.work.plan
    for n, batches in enumerate(take(loader, 12)):
        for batch, planned in zip(batches, plan.step(n).micro_batches, strict=True):
            assert batch.keys == tuple(index.key(ref.number) for ref in planned.samples)
            assert (batch.positions, batch.bucket) == (planned.positions, planned.bucket)


def test_workers_change_nothing(directory):
    alone, helped = (take(make_loader(directory, num_workers=n), 8) for n in (0, 2))
    assert all(equal(a, b) for x, y in zip(alone, helped, strict=True) for a, b in zip(x, y, strict=True))


def test_a_loader_that_starts_later_goes_on_as_if_it_had_started_at_zero(directory):
    straight, resumed = take(make_loader(directory), 9), take(make_loader(directory, start_step=6), 3)
    assert all(equal(a, b) for x, y in zip(straight[6:], resumed, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_load_the_global_batch(directory, world_size):
    whole = take(make_loader(directory), 6)
    ranks = [take(make_loader(directory, rank=r, world_size=world_size), 6) for r in range(world_size)]
    for n, batches in enumerate(whole):
        expected = {p: key for batch in batches for p, key in zip(batch.positions, batch.keys, strict=True)}
        parts = [batch for rank in ranks for batch in rank[n]]
        assert {p: key for b in parts for p, key in zip(b.positions, b.keys, strict=True)} == expected
        assert sum(len(batch) for batch in parts) == len(expected)


def test_a_world_that_does_not_fit_is_refused_before_anything_is_read(directory):
    with pytest.raises(ConfigError, match="3 data ranks .*valid numbers are"):
        make_loader(directory, world_size=3, split=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_record_keeps_its_place_and_all_others_are_untouched(directory, num_workers, caplog):
    before = take(make_loader(directory, num_workers=num_workers), 8)
    key = before[3][1].keys[1]
    damage(directory, key)
    with caplog.at_level(logging.WARNING):
        after = take(make_loader(directory, num_workers=num_workers), 8)
    found = 0
    for old, new in ((a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)):
        assert (old.keys, old.positions) == (new.keys, new.positions)
        for i, name in enumerate(new.keys):
            weights = new.has_video[i] + new.has_audio[i]
            assert (weights == 0) == (name == key)
            assert torch.equal(old.video[i], new.video[i]) or name == key
        found += len(new.errors)
        assert all(key in message and ".tar" in message for message in new.errors)
    assert found == sum(batch.keys.count(key) for batches in after for batch in batches) > 0
    assert sum(key in record.message for record in caplog.records) == found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_tells_of_the_reads_that_were_tried_again(directory, num_workers, monkeypatch):
    loader = make_loader(directory, num_workers=num_workers)
    loader.reader.datasets[0].store.config.retry_seconds = 0.0
    key = loader.work.plan.step(1).micro_batches[1].samples[0]
    at = loader.reader.datasets[0].index.location(key.number)
    real, failed = os.pread, set()

    def pread(descriptor, size, offset):
        place = os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"shard-{at.shard:06d}.tar"), offset
        if place == (True, min(at.tensors_offset, at.meta_offset) - 512) and place not in failed:
            failed.add(place)
            raise OSError("stale handle")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    told = [(batch.retried_reads, batch.errors) for batches in take(loader, 3) for batch in batches]
    assert told == [(0, ()), (0, ()), (0, ()), (1, ()), (0, ()), (0, ())]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unforeseen_error_names_the_key_and_ends_the_iteration(directory, num_workers, monkeypatch):
    loader = make_loader(directory, num_workers=num_workers)
    key = loader.reader.datasets[0].index.key(loader.work.plan.step(2).micro_batches[0].samples[0].number)

    def broken(name, tensors, meta):
        if name == key:
            raise ZeroDivisionError("a bug")
        return decode_record(name, tensors, meta)

    monkeypatch.setattr("ltx2_train.data.datasets.decode_record", broken)
    with pytest.raises(RuntimeError, match=f"reading {key} of .* failed: ZeroDivisionError"):
        take(loader, 4)
    assert not multiprocessing.active_children()


def test_an_iteration_that_is_left_early_can_be_started_again(directory):
    loader = make_loader(directory, num_workers=2)
    first, again = take(loader, 2), take(loader, 2)
    assert all(equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))


def test_a_dataset_of_one_sample_fills_every_place(tmp_path):
    write_latent_dataset(tmp_path, [random_sample("only", BUCKETS[0])])
    for batches in take(make_loader(tmp_path), 3):
        assert [batch.keys for batch in batches] == [("only",) * len(batch) for batch in batches]
        assert [p for batch in batches for p in batch.positions] == list(range(sum(map(len, batches))))


@pytest.mark.parametrize(
    ("bad", "seen", "limit", "fits"),
    [
        (10, 1000, 0.01, True),
        (11, 1000, 0.01, False),
        (10, 20, 0.01, True),
        (30, 4000, 0.01, True),
        (1, 4000, 0.0, False),
    ],
)
def test_more_damaged_records_than_the_limit_are_an_error(bad, seen, limit, fits):
    message = rf"{bad} of {seen} records are damaged.* bad_fraction = {limit} .*clip00"
    with nullcontext() if fits else pytest.raises(DataError, match=message):
        check_bad_records(bad, seen, limit, "clip00: damaged")


@pytest.mark.parametrize(
    "setting", [{"num_workers": -1}, {"prefetch_steps": 0}, {"bad_fraction": 1.5}, {"timeout_seconds": -1.0}]
)
def test_settings_out_of_bounds_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LoaderConfig(**setting)

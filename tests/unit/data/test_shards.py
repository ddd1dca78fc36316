import os

import pytest
import torch

from ltx2_train.data.datasets import open_dataset
from ltx2_train.data.shards import Store, StoreConfig, file_hash, verify_shards, write_shard
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.record import Bucket
from ltx2_train.testing.shards import random_sample, write_latent_dataset

BUCKETS = (Bucket(2, 2, 2, 5), Bucket(1, 2, 2, 0), Bucket(0, 0, 0, 7))
QUICK = {"retry_seconds": 0.0}


@pytest.fixture
def samples():
    return [random_sample(f"clip{i:02d}" + "x" * 20 * (i % 7), BUCKETS[i % 3]) for i in range(14)]


@pytest.fixture
def directory(tmp_path, samples):
    write_latent_dataset(tmp_path / "set", samples, shard_samples=5)
    return tmp_path / "set"


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in ((a.video, b.video), (a.audio, b.audio)))


def test_the_same_samples_give_the_same_shard(tmp_path, samples):
    write_shard(tmp_path / "a.tar", samples)
    write_shard(tmp_path / "b.tar", samples)
    assert file_hash(tmp_path / "a.tar") == file_hash(tmp_path / "b.tar")


def test_a_shard_that_could_not_be_finished_is_not_there(tmp_path, samples):
    def interrupted():
        yield samples[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", interrupted())
    assert not (tmp_path / "a.tar").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_a_remote_dataset_reads_as_a_local_one(directory, samples, tmp_path, cached):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{directory}/", "/remote/set/", recursive=True)
    config = StoreConfig(cache=str(tmp_path / "cache") if cached else None)
    dataset = open_dataset("memory://remote/set", config)
    assert all(same(dataset.read(i), samples[i]) for i in range(14))
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == (3 if cached else 0)
    if cached:
        memory.rm("/remote/set/shard-000000.tar")  # what is cached is not asked for again
        assert same(dataset.read(0), samples[0])


def test_a_cache_keeps_versions_of_a_dataset_apart(directory, samples, tmp_path):
    import fsspec

    memory, config = fsspec.filesystem("memory"), StoreConfig(cache=str(tmp_path / "cache"))
    for order in (samples, samples[::-1]):
        write_latent_dataset(directory, order, shard_samples=5)
        memory.put(f"{directory}/", "/remote/changing/", recursive=True)
        dataset = open_dataset("memory://remote/changing", config)
        assert [dataset.read(i).key for i in range(14)] == [s.key for s in order]


@pytest.mark.parametrize("member", ["tensors_offset", "meta_offset"])
@pytest.mark.parametrize("place", [-400, 20, 60])
def test_a_flipped_bit_anywhere_in_a_record_is_found_and_named(directory, member, place):
    index = open_dataset(directory).index
    at = index.location(7)
    shard = index.shard_names[at.shard]
    flip(directory / shard, getattr(at, member) + place)
    with pytest.raises(DataError, match=index.key(7)) as caught:
        open_dataset(directory).read(7)
    assert shard in str(caught.value)


def test_a_flipped_bit_among_the_latents_is_found(directory):
    index = open_dataset(directory).index
    at = index.location(0)
    flip(directory / index.shard_names[at.shard], at.tensors_offset + at.tensors_size - 1000)
    with pytest.raises(DataError, match="checksum does not match"):
        open_dataset(directory).read(0)


def test_a_shard_cut_short_after_it_was_opened_names_shard_and_key(directory):
    dataset = open_dataset(directory)
    os.truncate(directory / "shard-000001.tar", 3000)
    with pytest.raises(DataError, match=rf"{dataset.index.key(9)}: .*shard-000001.tar: truncated"):
        dataset.read(9)


def test_an_index_that_is_not_the_shards_own_is_found_at_the_first_record(tmp_path):
    samples = [random_sample(key, BUCKETS[0]) for key in ("first", "other")]
    write_latent_dataset(tmp_path, samples)
    write_shard(tmp_path / "shard-000000.tar", samples[::-1])  # the same size, in another order
    with pytest.raises(
        DataError, match=r"first: .*shard-000000.tar holds other.safetensors where the index places first"
    ):
        open_dataset(tmp_path).read(0)


def test_verify_finds_one_changed_byte(directory):
    flip(directory / "shard-000002.tar", 5000)
    open_dataset(directory)
    with pytest.raises(DataError, match=r"shard-000002.tar: its SHA-256 is not the manifest's"):
        open_dataset(directory, StoreConfig(verify=True))


def test_verify_passes_untouched_shards(directory):
    dataset = open_dataset(directory, StoreConfig(verify=True))
    verify_shards(dataset.store, dataset.manifest, ["shard-000000.tar"])


def test_a_read_that_fails_once_is_tried_again(directory, monkeypatch):
    dataset, real, failures = open_dataset(directory, StoreConfig(**QUICK)), os.pread, [OSError("stale handle")]

    def pread(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(os, "pread", pread)
    assert [dataset.read(4).key, dataset.read(4).key] == [dataset.index.key(4)] * 2
    assert dataset.store.retried_reads == 1


def test_a_read_that_keeps_failing_is_an_error_that_names_the_attempts(directory, monkeypatch):
    dataset = open_dataset(directory, StoreConfig(attempts=2, **QUICK))

    def pread(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(DataError, match=r"unreadable after 2 attempts \(no route to host\)"):
        dataset.read(4)


def test_a_process_keeps_a_bounded_number_of_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("ltx2_train.data.shards.OPEN_FILES", 3)
    write_latent_dataset(tmp_path, [random_sample(f"k{i}", BUCKETS[1]) for i in range(8)], shard_samples=1)
    dataset = open_dataset(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [dataset.read(i).key for i in (*range(8), 0)] == [f"k{i}" for i in (*range(8), 0)]
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_a_missing_file_is_not_tried_again(tmp_path):
    with pytest.raises(DataError, match=r"gone.tar is missing"):
        Store(tmp_path).read("gone.tar", 0, 1)


@pytest.mark.parametrize("setting", [{"attempts": 0}, {"retry_seconds": -1}])
def test_settings_out_of_bounds_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        StoreConfig(**setting)

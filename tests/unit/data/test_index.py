import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from ltx2_train.data.index import Index, build_index, split_name
from ltx2_train.errors import DataError
from ltx2_train.record import INDEX_NAME, Bucket, Manifest
from ltx2_train.testing.indexes import CLIP, IMAGE, make_index
from ltx2_train.testing.shards import random_sample, write_latent_dataset

BUCKETS = (Bucket(2, 2, 2, 5), Bucket(1, 2, 2, 0), Bucket(0, 0, 0, 7))


@pytest.fixture
def samples():
    keys = ["clip/a", "b", "späte Glocke", *(f"name{'x' * 8 * n}{n}" for n in range(17))]
    return [random_sample(key, BUCKETS[i % 3], text_length=1 + i) for i, key in enumerate(keys)]


@pytest.fixture
def directory(tmp_path, samples):
    write_latent_dataset(tmp_path, samples, shard_samples=6)
    return tmp_path


def test_the_index_knows_key_bucket_and_text_length_of_every_sample(directory, samples):
    index = Index.load(directory)
    assert [index.key(i) for i in range(len(index))] == [s.key for s in samples]
    assert [index.bucket(i) for i in range(len(index))] == [s.bucket for s in samples]
    assert index.text_lengths.tolist() == [len(s.text.video) for s in samples]
    assert [index.shard_of(i) for i in (0, 5, 6, 19)] == [0, 0, 1, 3]


def test_the_bytes_at_an_offset_are_those_of_the_tar_member(directory):
    index = Index.load(directory)
    for i in range(len(index)):
        at = index.location(i)
        path = directory / index.shard_names[at.shard]
        with tarfile.open(path) as tar:
            member = tar.extractfile(f"{index.key(i)}.json")
            assert member is not None
            expected = member.read()
        assert path.read_bytes()[at.meta_offset : at.meta_offset + at.meta_size] == expected


def test_any_webdataset_reader_reads_the_shards(directory, samples):
    urls = sorted(map(str, directory.glob("*.tar")))
    found = [r["__key__"] for r in webdataset.WebDataset(urls, shardshuffle=False)]
    assert found == [s.key for s in samples]


def test_several_processes_build_the_same_index(directory):
    before = (directory / INDEX_NAME).read_bytes()
    build_index(directory, num_workers=2)
    assert (directory / INDEX_NAME).read_bytes() == before


def test_counts_per_shard_add_up_to_the_counts_per_bucket():
    index = make_index({CLIP: 3, IMAGE: 1}, 1234)
    assert index.shard_bucket_counts.sum(axis=0).tolist() == index.bucket_counts.tolist()
    assert index.shard_bucket_counts.sum(axis=1).tolist() == np.diff(index.shard_starts).tolist()


def test_keys_are_found(directory):
    index = Index.load(directory)
    assert index.find(["clip/a", "späte Glocke", "clip"]) == {"clip/a": 0, "späte Glocke": 2}


def test_a_sample_costs_few_bytes_in_the_index(tmp_path):
    index = make_index({CLIP: 1}, 20000)
    index.save(tmp_path)
    assert (tmp_path / INDEX_NAME).stat().st_size < 64 * len(index)  # 100 million samples: below 7 GB, mapped


@pytest.mark.parametrize(
    ("name", "parts"), [("a.json", ("a", "json")), ("d.x/a.b.c", ("d.x/a", "b.c")), ("a", ("a", ""))]
)
def test_keys_end_at_the_first_dot_of_the_last_component(name, parts):
    assert split_name(name) == parts


def test_a_missing_index_names_the_command_that_builds_it(directory):
    (directory / INDEX_NAME).unlink()
    with pytest.raises(DataError, match=r"index.safetensors is missing.*ltx2-plan --rebuild-index"):
        Index.load(directory)


def test_a_half_written_index_is_refused(directory):
    path = directory / INDEX_NAME
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a readable index"):
        Index.load(directory)


def test_an_index_of_a_rewritten_shard_is_refused(directory, samples):
    index = (directory / INDEX_NAME).read_bytes()
    write_latent_dataset(directory, samples[:3] + samples[4:], shard_samples=6)
    (directory / INDEX_NAME).write_bytes(index)
    with pytest.raises(DataError, match=r"shard-00000\d.tar.* bytes; the index says \d+ bytes.*--rebuild-index"):
        Index.load(directory)


def test_an_index_without_one_of_the_shards_is_refused(directory):
    manifest = Manifest.load(directory)
    replace(manifest, shards={**manifest.shards, "shard-000009.tar": "00"}).save(directory)
    with pytest.raises(DataError, match=r"disagree about 1 shards, first shard-000009.tar"):
        Index.load(directory)


def test_a_missing_shard_is_named(directory):
    (directory / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar is missing"):
        Index.load(directory)


@pytest.mark.parametrize("lost", [1, 700, 1024, 1536, 40000])
def test_a_truncated_shard_is_not_indexed(directory, lost):
    path = directory / "shard-000002.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0")[: -lost or None])
    with pytest.raises(DataError, match=r"shard-000002.tar: (truncated|.* is damaged)"):
        build_index(directory)


def test_a_flipped_bit_in_a_tar_header_is_an_error_and_not_the_end_of_the_shard(directory):
    index, path = Index.load(directory), directory / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[index.location(3).tensors_offset - 512 + 124] ^= 1  # first digit of the size
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000000.tar: damaged after"):
        build_index(directory)


@pytest.mark.parametrize(
    ("members", "problem"), [({"json": b"{}"}, "no .safetensors"), ({"safetensors": b"x"}, "no .json")]
)
def test_a_record_needs_both_members(tmp_path, members, problem):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "lonely", **members})
    with pytest.raises(DataError, match=f"lonely has {problem}"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 40, (9).to_bytes(8, "little") + b"not json!", b"\2" + bytes(7) + b"[]"]
)
def test_a_damaged_tensor_header_names_the_key(tmp_path, data):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "broken", "json": b"{}", "safetensors": data})
    with pytest.raises(DataError, match=r"a.tar: broken is damaged"):
        build_index(tmp_path)


def test_an_empty_directory_has_nothing_to_index(tmp_path):
    with pytest.raises(DataError, match=r"no \*.tar here"):
        build_index(tmp_path)

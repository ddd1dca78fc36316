"""Shards have the same bytes for the same records, and damage is noticed and named."""

import io
import tarfile

import pytest

from data_prep.tars import file_sha256, list_shards, read_tar, split_key, write_tar
from ltx2_train.errors import DataError

RECORDS = [(f"clip-{i}", {"mp4": bytes([i]) * 700, "json": b"{}"}) for i in range(5)]


@pytest.fixture
def shard(tmp_path):
    write_tar(tmp_path / "a.tar", RECORDS)
    return tmp_path / "a.tar"


def test_what_was_written_is_read(shard):
    assert list(read_tar(str(shard))) == RECORDS


def test_the_same_records_give_the_same_bytes(shard, tmp_path):
    assert write_tar(tmp_path / "b.tar", RECORDS) == file_sha256(str(shard)) == file_sha256(str(tmp_path / "b.tar"))


@pytest.mark.parametrize("kept", [0.1, 0.3, 0.6])
def test_a_truncated_shard_is_named_with_the_place(shard, kept):
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"a\.tar: (damaged or truncated|truncated|damaged).* after "):
        list(read_tar(str(shard)))


def test_a_shard_cut_between_two_members_is_truncated(shard):
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[4].offset
    shard.write_bytes(shard.read_bytes()[:third])
    with pytest.raises(DataError, match=r"a\.tar: truncated at byte"):
        list(read_tar(str(shard)))


def test_a_flipped_bit_in_a_header_is_damage_and_not_the_end(shard):
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[4].offset
    content = bytearray(shard.read_bytes())
    content[third + 3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: damaged at byte \d+, after member 'clip-1\.mp4'"):
        list(read_tar(str(shard)))


def test_a_key_that_comes_twice_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [*RECORDS, RECORDS[0]])
    with pytest.raises(DataError, match="key 'clip-0' comes twice"):
        list(read_tar(str(tmp_path / "a.tar")))


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.tar: cannot be opened"):
        list(read_tar(str(tmp_path / "gone.tar")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.mp4", ("a", "mp4")), ("./x.y/a.b.JSON", ("x.y/a", "b.json")), ("dir/a", ("dir/a", ""))],
)
def test_keys_end_at_the_first_dot_of_the_base_name(name, expected):
    assert split_key(name) == expected


def test_shards_are_found_by_directory_glob_and_range(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"s-{i:03d}.tar", RECORDS)
    paths = [str(tmp_path / f"s-{i:03d}.tar") for i in range(3)]
    assert list_shards([str(tmp_path)]) == paths
    assert list_shards([f"{tmp_path}/s-*.tar"]) == paths
    assert list_shards([f"{tmp_path}/s-{{000..001}}.tar", paths[1]]) == paths[:2]
    with pytest.raises(DataError, match="no shard there"):
        list_shards([f"{tmp_path}/t-*.tar"])


def test_shards_are_read_through_fsspec(shard):
    import fsspec

    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(shard.read_bytes())
    assert list_shards(["memory://bucket/*.tar"]) == ["memory:///bucket/a.tar"] or list_shards(
        ["memory://bucket/*.tar"]
    )
    assert list(read_tar("memory://bucket/a.tar")) == RECORDS
    assert file_sha256("memory://bucket/a.tar") == file_sha256(str(shard))


def test_folders_inside_a_shard_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        member = tarfile.TarInfo("x/a.txt")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"ab"))
    assert list(read_tar(str(tmp_path / "a.tar"))) == [("x/a", {"txt": b"ab"})]

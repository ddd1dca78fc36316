"""Weights files: what safetensors' own library writes is read, what is written it reads, and damage is named."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx2_train.errors import CheckpointError
from ltx2_train.weightfile import (
    DTYPES,
    Deferred,
    Finite,
    check_floating,
    index_path,
    open_weights,
    planned_files,
    write_weights,
)

CPU_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def some_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {str(d): (10 * torch.randn(5, 3, generator=g)).to(d) for d in CPU_DTYPES}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "cube": torch.randn(4, 2, 2, generator=g),
    }


def raw_file(path: Path, header: object, data: bytes = b"", *, claimed: int | None = None) -> Path:
    """A file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    tensors = some_tensors()
    save_file(
        tensors, tmp_path / "a.safetensors", {"config": '{"vae": {"x": 1}}', "model_version": "2.5", "note": "[cut"}
    )
    file = open_weights(tmp_path / "a.safetensors")
    assert dict(file).keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (file[key].dtype, file[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(file[key].read(), tensor)
        if tensor.ndim:
            assert torch.equal(file[key].rows(1, 3), tensor[1:3])
            assert len(file[key].rows(len(tensor), len(tensor))) == 0
    assert file.config("vae") == {"x": 1}
    assert (file.model_version, file.metadata["note"]) == ("2.5", "[cut")


@pytest.mark.parametrize("max_bytes", [None, 100])
def test_the_library_reads_what_is_written(tmp_path, max_bytes):
    tensors = some_tensors()
    deferred = Deferred(torch.float32, torch.Size([4, 2, 2]), lambda: tensors["cube"])
    files = write_weights(tmp_path / "b.safetensors", tensors | {"cube": deferred}, {"note": "x"}, max_bytes=max_bytes)
    parts = [file for file in files if file.suffix == ".safetensors"]
    found = {key: tensor for part in parts for key, tensor in load_file(part).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    for part in parts:
        with safe_open(part, framework="pt") as file:
            assert file.metadata() == {"note": "x"}
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing partial stays behind"
    again = open_weights(tmp_path if max_bytes else files[0])
    assert again.keys() == tensors.keys()
    assert (len(parts) > 1) == (max_bytes is not None)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.safetensors"
    write_weights(path, {"a": torch.ones(2)}, {})
    broken = Deferred(torch.float32, torch.Size([2]), lambda: torch.ones(2)[3])
    with pytest.raises(IndexError):
        write_weights(path, {"a": torch.zeros(2), "b": broken}, {})
    assert torch.equal(open_weights(path)["a"].read(), torch.ones(2))


@pytest.mark.parametrize("max_bytes", [None, 8], ids=["one file", "several"])
def test_a_write_that_fails_leaves_nothing(tmp_path, max_bytes):
    broken = Deferred(torch.float32, torch.Size([2]), lambda: torch.ones(2)[3])
    with pytest.raises(IndexError):
        write_weights(tmp_path / "c.safetensors", {"a": torch.zeros(2), "b": broken}, {}, max_bytes=max_bytes)
    assert not list(tmp_path.iterdir())


def test_the_index_gets_its_name_last_and_names_the_files_as_planned(tmp_path):
    path, tensors = tmp_path / "c.safetensors", {name: torch.zeros(2) for name in "abc"}
    files = write_weights(path, tensors, {}, max_bytes=16)
    assert files == [*planned_files(path, tensors, 16), index_path(path)]
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize("num_scales", [0, 1, 6])
def test_fp8_weights_come_out_scaled(tmp_path, num_scales):
    weight = torch.randn(6, 4).to(torch.float8_e4m3fn)
    scale = torch.rand(num_scales) + 0.5
    tensors = {"l.weight": weight, "l.bias": torch.ones(6, dtype=torch.bfloat16), "l.input_scale": torch.tensor(3.0)}
    if num_scales:
        tensors["l.weight_scale"] = scale.squeeze(0) if num_scales == 1 else scale
    save_file(tensors, tmp_path / "fp8.safetensors")
    file = open_weights(tmp_path / "fp8.safetensors")
    factor = scale[:, None] if num_scales else 1.0
    expected = (weight.float() * factor).bfloat16()
    assert set(file) == {"l.weight", "l.bias"}
    assert file.num_quantised == 1
    assert file["l.weight"].dtype == torch.bfloat16
    assert torch.equal(file["l.weight"].read(), expected)
    assert torch.equal(file["l.weight"].rows(2, 5), expected[2:5])
    assert set(file.stored) == set(tensors)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
def test_a_scale_is_one_number_or_one_per_row(tmp_path, shape):
    scale = torch.rand(shape) + 0.5
    save_file({"w": torch.ones(4, 4).to(torch.float8_e5m2), "w_scale": scale}, tmp_path / "a.safetensors")
    expected = scale.reshape(-1, 1).expand(4, 4).bfloat16()
    assert torch.equal(open_weights(tmp_path / "a.safetensors")["w"].read(), expected)


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (torch.ones(3), r"F32 \[3\]"),
        (torch.ones(1, 4), r"F32 \[1, 4\]"),  # of columns
        (torch.ones(2, 2), r"F32 \[2, 2\]"),  # of blocks
        (torch.ones(1, 1), r"F32 \[1, 1\]"),
        (torch.ones(4, dtype=torch.int32), r"I32 \[4\]"),
        (torch.ones(4).to(torch.float8_e4m3fn), r"F8_E4M3 \[4\]"),
    ],
)
def test_any_other_scale_is_refused_though_its_numbers_may_be_as_many(tmp_path, scale, told):
    save_file({"w": torch.ones(4, 4).to(torch.float8_e5m2), "w_scale": scale}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"w_scale is {told}; a scale is one .* or one for each of the 4 rows"):
        open_weights(tmp_path / "a.safetensors")


def test_weights_that_are_not_floating_point_are_listed():
    def stored(dtype: torch.dtype) -> Deferred:
        return Deferred(dtype, torch.Size([2]), lambda: pytest.fail("read"))

    check_floating({"a": stored(torch.float32), "b": stored(torch.bfloat16)}, "file")
    wrong = {f"w{i:02}": stored(torch.int32) for i in range(22)} | {"bias": stored(torch.bool), "a": stored(torch.half)}
    with pytest.raises(CheckpointError, match=r"file: 23 weights are .*: w00 is torch.int32; .*; and 3 more\. Use"):
        check_floating(wrong, "file")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_named_when_its_rows_are_read(wrong, dtype):
    value = torch.ones(4, 3, dtype=dtype)
    value[2, 1] = wrong
    tensor = Finite(Deferred(dtype, value.shape, lambda: value), "file: layer.weight")
    assert torch.equal(tensor.rows(0, 2), value[:2])
    assert tensor.rows(4, 4).shape == (0, 3)
    for read in (tensor.read, lambda: tensor.rows(2, 4)):
        with pytest.raises(CheckpointError, match=r"file: layer.weight: 1 of \d+ values read are NaN or infinite"):
            read()


def test_the_fingerprint_tells_files_apart(tmp_path):
    def fingerprint(value: float, key: str = "a", **meta: str) -> str:
        write_weights(tmp_path / "f.safetensors", {key: torch.full((9,), value)}, meta)
        return open_weights(tmp_path / "f.safetensors").fingerprint

    prints = [fingerprint(1.0), fingerprint(2.0), fingerprint(1.0, key="b"), fingerprint(1.0, model_version="2.3.0")]
    assert len(set(prints)) == 4
    assert fingerprint(1.0) == prints[0]
    file = open_weights(tmp_path / "f.safetensors")
    assert file.sha256() == hashlib.sha256((tmp_path / "f.safetensors").read_bytes()).hexdigest()


def test_the_fingerprint_is_of_the_header_and_the_first_4_kib_of_every_tensor(tmp_path):
    path, tensors = tmp_path / "f.safetensors", {"a": torch.arange(3000.0), "b": torch.arange(5.0)}
    write_weights(path, tensors, {})
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    starts = b"".join(t.numpy().tobytes()[:4096] for t in tensors.values())
    assert open_weights(path).fingerprint == hashlib.sha256(header + starts).hexdigest()


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """640 bytes are 0x280, written 80 02, with which pickles begin."""
    header = json.dumps({"a": entry(0, 8, [2])}).encode().ljust(640)
    path = raw_file(tmp_path / "a.safetensors", header, bytes(8))
    assert path.read_bytes().startswith(b"\x80\x02")
    assert open_weights(path)["a"].read().tolist() == [0, 0]


def test_pickles_are_refused_under_any_name(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "zip.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("zip", "old"):
        with pytest.raises(CheckpointError, match="a pickle, not safetensors; reading it could run code"):
            open_weights(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_a_cut_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="was cut|cut inside its header"):
        open_weights(path)


def test_a_file_that_is_cut_or_goes_while_it_is_open_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    file = open_weights(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends inside a; the file was cut"):
        file["a"].read()
    path.unlink()
    for read in (file["a"].read, lambda: file["a"].rows(0, 1), lambda: file.fingerprint, file.sha256):
        with pytest.raises(CheckpointError, match="a.safetensors: cannot be read"):
            read()


DAMAGED = {
    "claims more than there is": ({"a": entry(0, 1 << 40, [1 << 38])}, "its header claims .* was cut"),
    "surplus bytes": ({"a": entry(0, 4, [1])}, "has surplus bytes"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, "overlaps its neighbour or leaves a gap"),
    "gap": ({"a": entry(4, 8, [1])}, "overlaps its neighbour or leaves a gap"),
    "negative offset": ({"a": entry(-8, 0, [2])}, "overlaps its neighbour or leaves a gap"),
    "other bytes": ({"a": entry(0, 8, [3])}, "other bytes than its shape"),
    "negative shape": ({"a": entry(0, 8, [-1, -2])}, "other bytes than its shape"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F4")}, "a is F4; supported are"),
    "huge shape": ({"a": entry(0, 8, [10**30])}, "other bytes than its shape"),
    "fraction": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}, "not a safetensors header"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "not a safetensors header"),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "not a safetensors header"),
    "nothing": ({}, "no tensors in it"),
    "only metadata": ({"__metadata__": {"format": "pt"}}, "no tensors in it"),
    "a list": ([1, 2], "not a safetensors header"),
    "not JSON": (b"{" * 50, "not a safetensors header"),
    "nested without end": (b"[" * 100_000, "not a safetensors header"),
    "not text": (b"\xff\xfe" * 8, "not a safetensors header"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_refused(tmp_path, name):
    header, message = DAMAGED[name]
    with pytest.raises(CheckpointError, match=message):
        open_weights(raw_file(tmp_path / "a.safetensors", header, bytes(8)))


def test_no_changed_byte_of_a_header_gives_anything_but_tensors_or_a_refusal(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4, 2), "b": torch.ones(3, dtype=torch.float8_e4m3fn), "b_scale": torch.ones(3)}, path)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 2, 4))):
            changed[rng.randrange(len(whole) - 47)] = rng.choice(b'0123456789.eE-+"[]{}:,ntF \\\x00\xff')
        path.write_bytes(changed)
        try:
            assert all(tensor.read().shape == tensor.shape for tensor in open_weights(path).values())
        except CheckpointError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("claimed", [0, 1 << 20, 1 << 62])
def test_a_header_longer_than_the_file_is_refused_before_memory_is_taken(tmp_path, claimed):
    path = raw_file(tmp_path / "a.safetensors", {"a": entry(0, 8, [2])}, bytes(8), claimed=claimed)
    with pytest.raises(CheckpointError, match="not a safetensors file, or cut inside its header"):
        open_weights(path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no.safetensors: cannot be read \(No such file .*\). Correct its path"):
        open_weights(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="no safetensors file in it. Name the file or folder"):
        open_weights(tmp_path)
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 candidates \(a.safetensors, b.safetensors\); name the file"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no `config.vae` in the header"):
        open_weights(tmp_path / "a.safetensors").config("vae")


def test_a_run_in_the_place_of_weights_is_called_one(tmp_path):
    """And so is a checkpoint of it: weights come of them by the program that is named."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    for place in (tmp_path / "run", checkpoint):
        with pytest.raises(CheckpointError, match=f"not weights.* ltx2-export {place} --to transformer --out FILE"):
            open_weights(place)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "a" * 5000 + ".index.json"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_weights(name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json"])
def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path, name):
    """To open a FIFO that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
            open_weights(path)
    with pytest.raises(CheckpointError, match="null: not a regular file"):
        open_weights(os.devnull)


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    *_, index = write_weights(folder / "w.safetensors", {n: torch.ones(4) for n in "abc"}, {}, max_bytes=16)
    return index, json.loads(index.read_text())["weight_map"]


def test_an_index_that_does_not_match_its_files_is_refused(tmp_path):
    index, places = sharded(tmp_path)
    assert list(open_weights(index)) == list("abc")

    def refused(changed: object, message: str) -> None:
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            open_weights(index)

    refused({"weight_map": places | {"d": places["a"]}}, "1 tensors are in none of its files, the first is d")
    refused({"weight_map": places | {"a": places["b"]}}, "w-00002-of-00003.safetensors: holds b|a.*none")
    refused({"weight_map": {"a": places["a"], "c": places["a"]}}, "1 tensors are in none of its files, the first is c")
    refused({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors: cannot be read")
    refused({"weight_map": {"a": "../w.safetensors"}}, "names files outside its own folder")
    refused({"weight_map": {"a": "nul\0"}}, "cannot be read")
    refused({"weight_map": {"a": "w" * 5000}}, "cannot be read")
    refused({"weight_map": {"a": ".."}}, "not a regular file")
    refused({"weight_map": {"a": 1}}, "not an index of safetensors files")
    refused({"weight_map": {}}, "no tensors in it")
    refused({"metadata": {}}, "not an index of safetensors files")
    refused([1], "not an index of safetensors files")
    (tmp_path / places["b"]).unlink()
    refused({"weight_map": places}, f"{places['b']}: cannot be read")


def test_every_dtype_has_one_name():
    assert len(set(DTYPES.values())) == len(DTYPES)

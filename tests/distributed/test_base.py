"""Frozen weights: known by fingerprints, in no checkpoint, and checked when a run goes on beside them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltx2_train.distributed.base import fingerprints
from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import Engine, EngineConfig, Precision
from ltx2_train.distributed.saved import INDEX_FILE, saved_weights
from ltx2_train.distributed.world import World, close_world, init_world
from ltx2_train.errors import CheckpointError
from ltx2_train.model import ModelConfig, build_model, initial_weights
from ltx2_train.model.lora import LoraConfig, add_lora
from ltx2_train.testing import run_on_ranks
from ltx2_train.train.ema import Ema, EmaConfig
from tests.distributed.toy import Toy, initialise, toy_engine, train

BASE = [r"blocks\..*", r"enter\..*"]
CONFIG = ModelConfig(name="tiny")


@pytest.fixture
def world():
    yield init_world()
    close_world()


def of(tensor: Tensor, world: World) -> str:
    return fingerprints({"x": (tensor, 0)}, world)["x"]


def test_a_fingerprint_is_of_values_places_and_dtype(world):
    tensor = torch.randn(5, 7)
    changed, swapped = tensor.clone(), tensor.clone()
    changed[3, 2] += 1e-6
    swapped[[0, 1]] = swapped[[1, 0]]
    different = [of(t, world) for t in (tensor, changed, swapped, tensor.bfloat16(), torch.zeros(5, 7), -tensor)]
    assert len(set(different)) == len(different)
    assert of(tensor.clone(), world) == different[0]


def saved_base(world: World, directory: str) -> list[dict[str, str]]:
    """What the index of a checkpoint says, for every number of whole copies that fits."""
    found = []
    for replicate in (n for n in (1, 2, 4) if world.size % n == 0):
        engine = toy_engine(world, freeze=BASE, replicate=replicate)
        engine.save(Path(directory) / f"{world.size}x{replicate}", {}).wait()
        found.append(engine._contents()["base"])
    return found


def test_fingerprints_do_not_depend_on_the_sharding(tmp_path):
    alone = run_on_ranks(saved_base, 1, str(tmp_path))[0][0]
    assert json.loads((tmp_path / "1x1" / INDEX_FILE).read_text())["base"] == alone
    assert alone.keys() == {name for name, _ in Toy().named_parameters() if name.startswith(("blocks.", "enter."))}
    for size in (2, 4):
        for found in run_on_ranks(saved_base, size, str(tmp_path)):
            assert all(base == alone for base in found)


def nudged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same initial weights but for one number of one frozen tensor."""
    for name, tensor in initialise(model):
        if name == "blocks.1.up.bias":
            tensor[3] += 1e-6
        yield name, tensor


def test_another_base_is_refused_and_named(world, tmp_path):
    toy_engine(world, freeze=BASE).save(tmp_path, {}).wait()
    other = build_engine(Toy, nudged, EngineConfig(freeze=BASE), world)
    for attempt in (
        lambda: other.load(tmp_path, {}),
        lambda: dict(saved_weights(tmp_path, initial=nudged(Toy()))),
    ):
        with pytest.raises(CheckpointError, match=r"other frozen weights: blocks\.1\.up\.bias differs.*model\.weights"):
            attempt()
    with pytest.raises(CheckpointError, match="lack 1 frozen tensors, as enter.bias"):
        dict(saved_weights(tmp_path, initial=((n, t) for n, t in initialise(Toy()) if n != "enter.bias")))


def test_a_checkpoint_of_an_older_format_is_refused(world, tmp_path):
    engine = toy_engine(world)
    engine.save(tmp_path, {}).wait()
    index = tmp_path / INDEX_FILE
    index.write_text(index.read_text().replace("dcp-3", "dcp-2"))
    with pytest.raises(CheckpointError, match="written as 'dcp-2', this version reads 'dcp-3'"):
        engine.load(tmp_path, {})


def with_adapters() -> nn.Module:
    return add_lora(build_model(CONFIG), LoraConfig(rank=2))


def adapter_engine(world: World, precision: Precision) -> Engine:
    config = EngineConfig(precision=precision)
    return build_engine(with_adapters, lambda model: initial_weights(model, CONFIG, 0), config, world)


@pytest.mark.parametrize("precision", list(Precision))
def test_a_checkpoint_of_adapters_holds_them_their_moments_and_their_average_alone(world, tmp_path, precision):
    engine = adapter_engine(world, precision)
    ema = Ema(engine.shards(), EmaConfig())
    pending = engine.save(tmp_path, ema.state())
    pending.wait()
    adapters = sum(shard.numel() for _, shard in engine.shards())
    assert pending.num_bytes == 4 * 4 * adapters
    written = sum(path.stat().st_size for path in pending.files())
    assert written < pending.num_bytes + 2000 * 4 * len(dict(engine.shards())), "and a header each"
    assert all("lora_" in name for name, _ in saved_weights(tmp_path))
    expected = dict(engine.full_weights())
    with torch.device("meta"):
        shapes = with_adapters()
    found = dict(saved_weights(tmp_path, averaged="ema", initial=initial_weights(shapes, CONFIG, 0)))
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def goes_on(world: World, directory: str) -> tuple[list[float], list[float]]:
    """Losses after a save, in this engine and in a new one beside the same frozen weights."""
    first = toy_engine(world, freeze=BASE, replicate=world.size // 2)
    train(first, world, 0, 3)
    first.save(Path(directory), {}).wait()
    world.barrier()
    second = toy_engine(world, freeze=BASE)
    second.load(Path(directory), {})
    return train(first, world, 3, 6), train(second, world, 3, 6)


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_beside_frozen_weights_goes_on(tmp_path, size):
    for straight, resumed in run_on_ranks(goes_on, size, str(tmp_path / "c")):
        torch.testing.assert_close(resumed, straight, rtol=1e-6, atol=0)

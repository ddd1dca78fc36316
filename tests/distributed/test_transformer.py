"""The transformer itself under the engine: its blocks' inputs and outputs pass through sharding."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import Engine, EngineConfig, Precision, Recompute
from ltx2_train.distributed.world import World, close_world, init_world
from ltx2_train.model import ModelConfig, build_model, initial_weights, named_config
from ltx2_train.model.lora import LoraConfig, add_lora
from ltx2_train.model.modality import Modality
from ltx2_train.rng import generator
from ltx2_train.testing import run_on_ranks
from tests.peers.diffusers_transformer import random_inputs

BATCH = 4
CONFIG = ModelConfig(name="tiny")
LORA = LoraConfig(rank=2)


@pytest.fixture
def world():
    yield init_world()
    close_world()


def with_adapters() -> nn.Module:
    return add_lora(build_model(CONFIG), LORA)


def perturbed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights as of a trained model: none of them zero, so that a gradient reaches every adapter."""
    for name, tensor in initial_weights(model, CONFIG, 0):
        yield name, tensor + 0.05 * torch.randn(tensor.shape, generator=generator("perturbed", name))


def tiny_engine(world: World, *, lora: bool = False, **config: object) -> Engine:
    build = with_adapters if lora else lambda: build_model(CONFIG)
    return build_engine(build, perturbed, EngineConfig(grad_clip=0.5, **config), world)


def rows(modality: Modality, part: slice) -> Modality:
    """Some samples of a batch."""
    values = {f.name: getattr(modality, f.name) for f in fields(modality)}
    cut = {n: v[part] for n, v in values.items() if isinstance(v, Tensor) and len(v) == BATCH}
    return replace(modality, **cut)


def train(engine: Engine, world: World, start: int, stop: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; a rank's samples are its micro-batches."""
    results = []
    for step in range(start, stop):
        torch.manual_seed(step)
        streams = random_inputs(named_config("tiny"), BATCH, (3, 2, 2), 5, 4)
        targets = [torch.randn_like(stream.latent) for stream in streams]
        mine = range(world.rank, BATCH, world.size)
        total = torch.zeros(())
        for i in mine:
            velocity = engine.model(*(rows(stream, slice(i, i + 1)) for stream in streams))
            errors = [(v - t[i : i + 1]).float().square().mean() for v, t in zip(velocity, targets, strict=True)]
            loss = torch.stack(errors).sum() / BATCH
            engine.backward(loss, last=i == mine[-1])
            total += loss.detach()
        norm = engine.step(lr=0.01).norm
        results.append((world.all_sum(total).item(), norm))
    return results


def eight_steps(world: World) -> list[list[tuple[float, float]]]:
    """With weights sharded over all ranks and, on four, as two copies sharded over two."""
    copies = [1, 2] if world.size == 4 else [1]
    return [train(tiny_engine(world, replicate=n), world, 0, 8) for n in copies]


@pytest.mark.slow
def test_one_two_and_four_ranks_agree(world):
    (expected,) = eight_steps(world)
    assert expected[7][0] < expected[0][0]
    for size in (2, 4):
        for arrangements in run_on_ranks(eight_steps, size):
            for results in arrangements:
                for (loss, norm), (own_loss, own_norm) in zip(results, expected, strict=True):
                    assert loss == pytest.approx(own_loss, rel=1e-6)
                    assert norm == pytest.approx(own_norm, rel=1e-5)


def recomputed(world: World) -> list[tuple[float, float]]:
    return train(tiny_engine(world, recompute=Recompute.full, reshard=False), world, 0, 3)


@pytest.mark.slow
def test_recomputed_blocks_change_nothing(world):
    expected = train(tiny_engine(world), world, 0, 3)
    assert recomputed(world) == expected
    torch.testing.assert_close(run_on_ranks(recomputed, 2)[1], expected, rtol=1e-4, atol=0)


def adapters_in_bf16(world: World) -> dict[str, tuple[bool, torch.dtype]]:
    """Whether five steps moved a parameter, and what it is kept in. Four ranks hold two copies."""
    engine = tiny_engine(world, lora=True, precision=Precision.bf16, replicate=max(1, world.size // 2), prefetch=1)
    before = dict(engine.full_weights())
    train(engine, world, 0, 5)
    return {name: (not torch.equal(before[name], now), now.dtype) for name, now in engine.full_weights()}


@pytest.mark.parametrize("size", [1, 4])
def test_adapters_train_in_fp32_beside_a_frozen_bf16_base(world, size):
    result = adapters_in_bf16(world) if size == 1 else run_on_ranks(adapters_in_bf16, size)[0]
    for name, (moved, dtype) in result.items():
        assert moved == ("lora_" in name), name
        assert dtype is (torch.float32 if "lora_" in name else torch.bfloat16)


def saves(world: World, directory: str) -> list[tuple[float, float]]:
    engine = tiny_engine(world, freeze=[r"connectors\..*"])
    train(engine, world, 0, 2)
    pending = engine.save(Path(directory), {})
    results = train(engine, world, 2, 4)
    pending.wait()
    return results


def loads(world: World, directory: str) -> list[tuple[float, float]]:
    engine = tiny_engine(world, freeze=[r"connectors\..*"])
    engine.load(Path(directory), {})
    return train(engine, world, 2, 4)


def test_a_saved_model_goes_on(world, tmp_path):
    expected = run_on_ranks(saves, 2, str(tmp_path / "c"))[0]
    assert run_on_ranks(loads, 2, str(tmp_path / "c"))[0] == expected, "bit-equal on as many ranks"
    torch.testing.assert_close(loads(world, str(tmp_path / "c")), expected, rtol=1e-4, atol=0)

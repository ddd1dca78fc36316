"""What holds on the CPU holds on a CUDA device: each case here runs on both, and `make gpu` runs those of the device."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltx2_train import geometry
from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import Backend, Engine, EngineConfig, Offload, Precision, Recompute
from ltx2_train.distributed.world import World, close_world, init_world
from ltx2_train.model import ModelConfig, build_model, initial_weights, named_config
from ltx2_train.model.config import RopeType
from ltx2_train.model.fused import gated_add, norm_rotate, rms_modulate
from ltx2_train.model.lora import LoraConfig, add_lora
from ltx2_train.model.rope import RopeSpec, build_rope
from ltx2_train.rng import BatchRng, generator
from ltx2_train.testing import run_on_ranks
from tests.golden.transformer_cases import CASES, VARIANTS, goldens, inputs, tiny_model
from tests.peers.diffusers_transformer import random_inputs

CONFIG = ModelConfig(name="tiny", overrides={"num_layers": 3})
BOUNDS = {"cpu": 5e-5, "cuda": 2e-4}  # absolute, fp32, of outputs of magnitude 1 to 4: the device adds in another order
IN_BF16 = 0.06  # relative RMS; 0.04 was measured on a CPU
STEP = 1e-4  # relative, fp32: losses and norms of a few steps

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
slowly_on_each = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=CUDA)]
)


@pytest.fixture
def world(device: str) -> Iterator[World]:
    """This process alone, on the device."""
    yield replace(init_world(), device=torch.device(device))
    close_world()


def moved(value: Any, device: str | torch.device) -> Any:
    """A modality on another device."""
    tensors = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(value, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


@on_each
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_equal_the_golden_numbers(device: str, variant: str, case: str):
    video, audio, perturbations = inputs(variant, case)
    model = tiny_model(variant).to(device)
    outputs = model(moved(video, device), moved(audio, device), perturbations)
    for name, out in outputs._asdict().items():
        golden = goldens()["golden_outputs"][f"{variant}/{case}"][name]
        flat = out.cpu().flatten()
        torch.testing.assert_close(flat[:8], torch.tensor(golden["first8"]), atol=BOUNDS[device], rtol=0)
        torch.testing.assert_close(flat[-4:], torch.tensor(golden["last4"]), atol=BOUNDS[device], rtol=0)


@on_each
@pytest.mark.parametrize("variant", ["2.0", "2.3", "2.5"])
@torch.no_grad()
def test_weights_in_bf16_give_the_same_outputs_to_bf16_s_precision(device: str, variant: str):
    video, audio, _ = inputs(variant, "joint")
    exact = tiny_model(variant)(video, audio)
    rounded = tiny_model(variant).to(device, torch.bfloat16)(moved(video, device), moved(audio, device))
    for name, out in rounded._asdict().items():
        expected = getattr(exact, name)
        assert (out.float().cpu() - expected).square().mean().sqrt() < IN_BF16 * expected.square().mean().sqrt()


@on_each
def test_noise_that_is_drawn_on_the_cpu_is_the_same_on_the_device(device: str):
    drawn = BatchRng(0, 0, [1, 2], drawn_on="cpu").normal("noise.video", (5, 3), device)
    assert drawn.device.type == device
    assert torch.equal(drawn.cpu(), BatchRng(0, 0, [1, 2]).normal("noise.video", (5, 3)))


def perturbed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights as of a trained model: none of them zero, so that a gradient reaches every parameter."""
    for name, tensor in initial_weights(model, CONFIG, 0):
        yield name, tensor + 0.05 * torch.randn(tensor.shape, generator=generator("perturbed", name))


def tiny_engine(world: World, *, lora: bool = False, **config: Any) -> Engine:
    def with_adapters() -> nn.Module:
        return add_lora(build_model(CONFIG), LoraConfig(rank=2))

    build = with_adapters if lora else lambda: build_model(CONFIG)
    return build_engine(build, perturbed, EngineConfig(grad_clip=0.5, **config), world)


def train(engine: Engine, world: World, start: int, stop: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, of two micro-batches."""
    results = []
    for step in range(start, stop):
        torch.manual_seed(step)
        losses = []
        for last in (False, True):
            streams = random_inputs(named_config("tiny"), 2, (3, 2, 2), 5, 4)
            targets = [torch.randn_like(stream.latent).to(world.device) for stream in streams]
            velocity = engine.model(*(moved(stream, world.device) for stream in streams))
            errors = [(v.float() - t).square().mean() for v, t in zip(velocity, targets, strict=True)]
            losses.append(torch.stack(errors).sum() / 2)
            engine.backward(losses[-1], last=last)
        total = float(torch.stack(losses).detach().sum())
        results.append((total, engine.step(lr=1e-3).norm))
    return results


def on_the_cpu(world: World) -> World:
    return replace(world, device=torch.device("cpu"))


@on_each
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_steps_are_those_of_the_cpu(world: World, lora: bool):
    expected = train(tiny_engine(on_the_cpu(world), lora=lora), on_the_cpu(world), 0, 3)
    torch.testing.assert_close(train(tiny_engine(world, lora=lora), world, 0, 3), expected, rtol=STEP, atol=0)


@slowly_on_each
def test_adapters_train_beside_a_bf16_base_that_stays_bit_equal(world: World):
    engine = tiny_engine(world, lora=True, precision=Precision.bf16)
    before = dict(engine.full_weights())
    train(engine, world, 0, 5)
    for name, now in engine.full_weights():
        assert torch.equal(before[name], now) != ("lora_" in name), name
        assert now.dtype is (torch.float32 if "lora_" in name else torch.bfloat16)


@slowly_on_each
@pytest.mark.parametrize("precision", list(Precision))
def test_recomputation_changes_no_bit(world: World, precision: Precision):
    expected = train(tiny_engine(world, precision=precision), world, 0, 2)
    for policy in (Recompute.every_n, Recompute.selective, Recompute.budget, Recompute.full):
        engine = tiny_engine(world, precision=precision, recompute=policy, recompute_budget_gb=1e-4)
        assert train(engine, world, 0, 2) == expected, policy


@slowly_on_each
@pytest.mark.parametrize("offload", [Offload.optimizer, Offload.all])
def test_what_is_kept_in_host_memory_trains_alike(world: World, offload: Offload):
    expected = train(tiny_engine(world), world, 0, 3)
    torch.testing.assert_close(train(tiny_engine(world, offload=offload), world, 0, 3), expected, rtol=STEP, atol=0)


@on_each
@pytest.mark.parametrize("precision", list(Precision))
def test_a_saved_engine_goes_on_to_the_same_bits(world: World, tmp_path: Path, precision: Precision):
    engine = tiny_engine(world, precision=precision)
    train(engine, world, 0, 2)
    engine.save(tmp_path / "saved", {}).wait()
    expected = train(engine, world, 2, 4)
    other = tiny_engine(world, precision=precision)
    other.load(tmp_path / "saved", {})
    assert train(other, world, 2, 4) == expected


def steps_under(world: World, backend: Backend, device: str) -> list[tuple[float, float]]:
    here = replace(world, device=torch.device(device))
    return train(tiny_engine(here, backend=backend, lora=True), here, 0, 3)


@slowly_on_each
def test_both_engines_train_alike(device: str):
    """Each in a process of its own: DeepSpeed replaces torch's linear function for good."""
    pytest.importorskip("deepspeed")
    fsdp2, zero3 = (run_on_ranks(steps_under, 1, backend, device)[0] for backend in Backend)
    torch.testing.assert_close(zero3, fsdp2, rtol=STEP, atol=0)


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_operations_and_their_gradients_are_those_of_the_cpu(device: str, dtype: torch.dtype):
    bound = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for name in ("rms_modulate", "gated_add", "norm_rotate"):
        for found, expected in zip(fused(name, device, dtype), fused(name, "cpu", dtype), strict=True):
            torch.testing.assert_close(found.cpu(), expected, **bound)


def fused(name: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The operation's result and the gradients of its inputs."""
    torch.manual_seed(0)
    x, other, rows, weight = (torch.randn(shape) for shape in ((2, 5, 24), (2, 5, 24), (2, 5, 24), (24,)))
    given = [t.to(device, dtype).requires_grad_() for t in (x, other, rows, weight)]
    x, other, rows, weight = given
    if name == "rms_modulate":
        out = rms_modulate(x, other, rows, None, 1e-6)
    elif name == "gated_add":
        out = gated_add(x, other, rows, None)
    else:
        spec = RopeSpec(1, 24, 3, (20.0,), 10000.0, True, RopeType.SPLIT)
        out = norm_rotate(x, weight, build_rope(geometry.audio_positions(5)[None].to(device), spec, dtype), 3, 1e-6)
    out.float().square().sum().backward()
    return [out.detach(), *(t.grad for t in given if t.grad is not None)]

"""Recomputation policies on the transformer's own blocks: the same gradients, bit for bit, and less memory in between."""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltx2_train.distributed.engine import EngineConfig, Recompute
from ltx2_train.distributed.units import prepare_units, shard_units
from ltx2_train.model import ModelConfig, build_model, initial_weights, named_config
from ltx2_train.rng import generator
from tests.peers.diffusers_transformer import random_inputs

CONFIG = ModelConfig(name="tiny", overrides={"num_layers": 4}, train_connectors=False)


class Live(TorchDispatchMode):
    """Follows the memory of every tensor that is made under it."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in storages((args, kwargs))}  # a view has no memory of its own
        for storage in storages(result):
            if id(storage) not in given:
                self._storages[id(storage)] = weakref.ref(storage), storage.nbytes()
        return result

    def num_bytes(self) -> int:
        """Bytes that are still held by something."""
        return sum(size for storage, size in self._storages.values() if storage() is not None)


def storages(value: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.fixture(scope="module")
def inputs() -> tuple:
    torch.manual_seed(0)
    streams = random_inputs(named_config("tiny"), 2, (4, 4, 4), 9, 6)
    return tuple(replace(stream, timesteps=stream.sigma[:, None]) for stream in streams)


def model_with(model_config: ModelConfig = CONFIG, **config: Any) -> nn.Module:
    model = build_model(model_config)
    with torch.no_grad():
        for name, tensor in initial_weights(model, model_config, 0):
            model.get_parameter(name).copy_(
                tensor + 0.05 * torch.randn(tensor.shape, generator=generator("near", name))
            )
    prepare_units(shard_units(model), EngineConfig(**config))
    return model


def forward_and_backward(inputs: tuple, **config: Any) -> tuple[int, dict[str, Tensor]]:
    """Bytes held between forward and backward, and the gradients."""
    model = model_with(**config)
    warm(model, inputs)
    with Live() as live:
        loss = sum(velocity.square().sum() for velocity in model(*inputs))
        held = live.num_bytes()
        loss.backward()
    return held, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def warm(model: nn.Module, inputs: tuple) -> None:
    """A forward that fills the caches of rotations and counts for nothing."""
    with torch.no_grad():
        model(*inputs)


@pytest.fixture(scope="module")
def kept(inputs) -> tuple[int, dict[str, Tensor]]:
    return forward_and_backward(inputs)


@pytest.fixture(scope="module")
def recomputed(inputs) -> tuple[int, dict[str, Tensor]]:
    return forward_and_backward(inputs, recompute=Recompute.full)


def same(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return gradients.keys() == expected.keys() and all(torch.equal(g, expected[n]) for n, g in gradients.items())


def test_all_recomputed_holds_the_least_and_changes_no_gradient(kept, recomputed):
    assert recomputed[0] < 0.25 * kept[0]
    assert same(recomputed[1], kept[1])


def test_every_second_block_holds_half_of_the_difference(inputs, kept, recomputed):
    held, gradients = forward_and_backward(inputs, recompute=Recompute.every_n, recompute_every=2)
    assert held - recomputed[0] == pytest.approx(0.5 * (kept[0] - recomputed[0]), rel=0.02)
    assert same(gradients, kept[1])


def test_selective_keeps_what_the_attentions_gave_and_little_else(inputs, kept, recomputed):
    held, gradients = forward_and_backward(inputs, recompute=Recompute.selective)
    video, audio = (stream.latent for stream in inputs)
    config = named_config("tiny")
    widths = 2 * config.video_width + config.audio_width, 3 * config.audio_width  # of the attentions by query tokens
    outputs = sum(4 * x.shape[0] * x.shape[1] * w for x, w in zip((video, audio), widths, strict=True))
    sums = sum(4 * x.shape[0] * x.shape[1] * 3 * config.num_attention_heads for x in (video, audio))
    # Beside each output its log-sum-exp per head and query, and a few numbers for dropout that is not there.
    assert held - recomputed[0] == pytest.approx(4 * (outputs + sums), rel=0.01)
    assert held < kept[0]
    assert same(gradients, kept[1])


@pytest.mark.parametrize(("share", "blocks"), [(0.01, 1), (0.3, 1), (0.6, 2), (0.8, 3), (1.01, 4)])
def test_a_budget_keeps_as_many_blocks_as_fit_and_one_in_any_case(inputs, kept, recomputed, share, blocks):
    all_blocks = kept[0] - recomputed[0]
    budget = {"recompute": Recompute.budget, "recompute_budget_gb": share * all_blocks / 1e9}
    held, gradients = forward_and_backward(inputs, **budget)
    assert held - recomputed[0] == pytest.approx(blocks / 4 * all_blocks, rel=0.02)
    assert same(gradients, kept[1])


def test_a_budget_is_divided_anew_in_every_forward(inputs):
    model = model_with(recompute=Recompute.budget, recompute_budget_gb=2e-3)
    warm(model, inputs)
    held = []
    for _ in range(2):
        with Live() as live:
            loss = sum(velocity.sum() for velocity in model(*inputs))
            held.append(live.num_bytes())
        loss.backward()
        warm(model, inputs)
    assert held[0] == held[1]


@pytest.mark.parametrize("recompute", list(Recompute))
def test_without_gradients_nothing_is_measured_or_recomputed(inputs, recompute):
    model = model_with(recompute=recompute, recompute_budget_gb=1.0)
    warm(model, inputs)
    with torch.no_grad(), Live() as live:
        outputs = model(*inputs)
    assert live.num_bytes() == sum(velocity.untyped_storage().nbytes() for velocity in outputs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recompute": "full"},
        {"recompute": "every_n", "recompute_every": 2},
        {"recompute": "selective"},
        {"recompute": "budget", "recompute_budget_gb": 2e-3},
    ],
    ids=lambda settings: settings.get("recompute", "none"),
)
def test_the_blocks_that_are_told_are_those_that_backward_runs_again(inputs, settings):
    model, runs = build_model(CONFIG), Counter()
    units = shard_units(model)
    for i, unit in enumerate(units):
        unit.forward = counting(runs, i, unit.forward)
    again = prepare_units(units, EngineConfig(**settings))
    for _ in range(2):
        runs.clear()
        sum(velocity.sum() for velocity in model(*inputs)).backward()
        trained = range(len(units) - 4, len(units))  # before them lie frozen connectors, which have no backward
        assert [i for i in trained if runs[i] == 2] == [i for i in again() if i in trained]
    assert bool(list(again())) == bool(settings)


def counting(runs: Counter[int], number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        runs[number] += 1
        return forward(*args)

    return run


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients():
    """One block of one stream, because compiling is what takes the time."""
    config = ModelConfig(name="tiny", overrides={"num_layers": 1}, streams=["video"], train_connectors=False)
    gradients = []
    for compile in (False, True):
        model = model_with(config, recompute=Recompute.budget, recompute_budget_gb=1e-6, compile=compile)
        torch.manual_seed(0)
        video, _ = random_inputs(named_config("tiny"), 2, (2, 2, 2), 5, 4)
        model(replace(video, timesteps=video.sigma[:, None])).video.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-6), name

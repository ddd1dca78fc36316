"""Sequence parallel: sharing a sample's tokens over ranks changes nothing but who computes what."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import Engine, EngineConfig, Recompute
from ltx2_train.distributed.sequence import GroupBatches, apply_sequence_parallel
from ltx2_train.distributed.units import prepare_units, shard_units
from ltx2_train.distributed.world import World, close_world, init_world
from ltx2_train.errors import ConfigError
from ltx2_train.model import Modality, ModelConfig, Transformer, TransformerConfig, build_model, initial_weights
from ltx2_train.model import rope as rope_module
from ltx2_train.model.build import transformer_config
from ltx2_train.model.modality import SKIP_A2V, SKIP_AUDIO_SELF_ATTN, SKIP_V2A, SKIP_VIDEO_SELF_ATTN, Perturbations
from ltx2_train.rng import generator
from ltx2_train.testing import run_on_ranks
from tests.distributed.test_transformer import rows
from tests.distributed.toy import Toy
from tests.golden.transformer_cases import fill, tiny_header
from tests.peers.diffusers_transformer import random_inputs

BATCH, GRID, STEPS, TEXT = 2, (3, 3, 1), 5, 4  # 9 and 5 tokens: neither 2 nor 4 divides them
HEADS = {"num_attention_heads": 4, "attention_head_dim": 10, "cross_attention_dim": 40}
HEADS |= {"audio_num_attention_heads": 4, "audio_attention_head_dim": 6, "audio_cross_attention_dim": 24}
CONNECTORS = {"connector_num_attention_heads": 4, "connector_attention_head_dim": 10}
CONNECTORS |= {"audio_connector_num_attention_heads": 4, "audio_connector_attention_head_dim": 6}
MODEL = ModelConfig(name="tiny", overrides={**HEADS, **CONNECTORS})
FIRST_FRAME = torch.tensor([1] * 3 + [0] * 6).expand(BATCH, -1).contiguous()


@pytest.fixture
def world():
    yield init_world()
    close_world()


class Case(NamedTuple):
    """A model and what it is asked, in fp64: what remains are differences in the order of sums."""

    model: Callable[[], nn.Module]
    video: Modality | None
    audio: Modality | None
    perturbations: Perturbations | None = None


def transformer(variant: str, **streams: bool) -> nn.Module:
    model = Transformer(TransformerConfig.from_header(tiny_header(variant) | HEADS), **streams)
    fill(model)
    return model.double()


def conditioned() -> nn.Module:
    """With connectors that are trained."""
    model = build_model(MODEL)
    fill(model)
    return model.double()


def doubled(modality: Modality) -> Modality:
    return replace(modality, latent=modality.latent.double(), context=modality.context.double())


def cases() -> dict[str, Case]:
    def asked(model: nn.Module, **sizes: Any) -> tuple[Modality, Modality]:
        arguments = {"grid": GRID, "steps": STEPS, "text": TEXT, "shared_sigma": False} | sizes
        video, audio = random_inputs(model.config, BATCH, **arguments)
        return doubled(video), doubled(audio)

    def of_2_0() -> nn.Module:
        return transformer("2.0")

    def of_2_3() -> nn.Module:
        return transformer("2.3")

    def of_2_5() -> nn.Module:
        return transformer("2.5")

    video, audio = asked(of_2_0())
    per_token = replace(video, timesteps=video.sigma[:, None] * torch.linspace(0, 1, 9))
    found = {"2.0, a timestep per token": Case(of_2_0, per_token, audio)}

    video, audio = asked(of_2_5())
    given = torch.stack([video.sigma, torch.zeros(BATCH)], dim=1)
    marked = replace(video, timesteps=given, timestep_index=FIRST_FRAME, keyframes_mask=FIRST_FRAME[..., None].float())
    found["2.5, first frame given and marked"] = Case(of_2_5, marked, audio)
    found["2.5, no audio at all"] = Case(of_2_5, marked, None)

    video, audio = asked(of_2_3())
    text = torch.ones(BATCH, TEXT, dtype=torch.int64)
    text[0, -2:] = 0
    strength = torch.ones(BATCH, 9, 9)
    strength[:, :4, -3:], strength[:, -3:, :4] = 0.5, 0
    masked = replace(video, context_mask=text, attention_mask=strength)
    perturbed = [
        [(SKIP_VIDEO_SELF_ATTN, [1]), (SKIP_A2V, [0])],
        [(SKIP_AUDIO_SELF_ATTN, None), (SKIP_V2A, None)],
    ]
    found["2.3, masks and perturbations"] = Case(of_2_3, masked, replace(audio, context_mask=text), perturbed)
    isolated = [[(SKIP_A2V, None), (SKIP_V2A, None)]] * BATCH
    single = asked(of_2_3(), steps=1)[1]
    found["2.3, clips without sound"] = Case(of_2_3, video, single, isolated)
    found["2.3, audio passes unchanged"] = Case(of_2_3, video, replace(audio, enabled=False))
    found["2.3, video only"] = Case(lambda: transformer("2.3", audio=False), video, None)

    video, audio = asked(conditioned())
    found["connectors trained"] = Case(conditioned, video, audio)
    short = asked(conditioned(), grid=(3, 1, 1), steps=2)
    index = torch.tensor([[1, 0, 0]]).expand(BATCH, -1).contiguous()
    few = replace(short[0], timesteps=torch.stack([video.sigma, torch.zeros(BATCH)], 1), timestep_index=index)
    found["fewer tokens than ranks"] = Case(conditioned, few, short[1])
    return found


def run(model: nn.Module, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Velocities, and every parameter's gradient of a loss that weighs each number of them differently."""
    velocity = [v for v in model(*case[1:]) if v is not None]
    sum((v * torch.linspace(0, 9, v.numel(), dtype=v.dtype).cos().view_as(v)).sum() for v in velocity).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [v.detach() for v in velocity], gradients


def agreement(world: World) -> dict[str, float]:
    """The largest difference of each case, relative to the norm of its tensor."""
    world = world.sharing_samples(world.size)
    worst = {}
    for name, case in cases().items():
        velocity, gradients = run(case.model(), case)
        split_velocity, parts = run(apply_sequence_parallel(case.model(), world), case)
        summed = world.all_sum(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
        expected, found = [*velocity, *gradients], [*split_velocity, *summed]
        scale = max(t.norm() for t in expected) * 1e-6  # of a gradient that is zero but for rounding
        pairs = zip(expected, found, strict=True)
        worst[name] = max(float((a.flatten() - b.flatten()).norm() / (a.norm() + scale)) for a, b in pairs)
        with torch.no_grad():  # what a whole batch skips is not run then
            plain, split = case.model()(*case[1:]), apply_sequence_parallel(case.model(), world)(*case[1:])
            torch.testing.assert_close(split, plain, rtol=1e-11, atol=1e-11)
    return worst


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_outputs_and_all_gradients_are_those_of_one_process(size):
    for worst in run_on_ranks(agreement, size):
        assert len(worst) == len(cases())
        assert max(worst.values()) < 1e-10, worst


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """What this rank sends to others."""
    sent: list[int] = []
    original = dist.all_to_all_single

    def counting(output: Tensor, rows: Tensor, received: list[int], given: list[int], group: Any) -> Any:
        others = sum(given) - given[dist.get_rank(group)]
        sent.append(others * rows[:1].numel() * rows.element_size())
        return original(output, rows, received, given, group=group)

    dist.all_to_all_single = counting
    try:
        yield sent
    finally:
        dist.all_to_all_single = original


def traffic(world: World) -> tuple[int, int, int, int]:
    """Bytes that all ranks send in the blocks' forward and backward; rotation tables that two forwards build."""
    world = world.sharing_samples(world.size)
    model = apply_sequence_parallel(transformer("2.3").float(), world)
    streams = random_inputs(model.config, BATCH, GRID, STEPS, TEXT)
    built, build = [], rope_module.build_rope
    rope_module.build_rope = lambda *args: built.append(1) or build(*args)
    with counted_bytes() as forward:
        velocity = model(*streams)
    with counted_bytes() as backward:
        sum(v.square().sum() for v in velocity).backward()
    first = len(built)
    model(*streams)
    rope_module.build_rope = build
    velocities = 4 * (world.size - 1) * sum(v.numel() for v in velocity)
    sums = [sum(sum(rank) for rank in world.gather_objects(sent)) for sent in (forward, backward)]
    return sums[0] - velocities, sums[1], first, len(built) - first


def test_a_block_sends_what_the_formula_says_and_tables_are_built_once():
    """Queries and outputs of the piece, keys and values: (P - 1) / P of each, per attention and direction."""
    size, layers, video, audio = 4, 2, (9, 40), (5, 24)
    own = sum(4 * tokens * width for tokens, width in (video, audio))
    exchange = 2 * 2 * (video[0] + audio[0]) * audio[1]
    expected = 4 * BATCH * layers * (own + exchange) * (size - 1) // size
    for result in run_on_ranks(traffic, size):
        assert result == (expected, expected, 3, 0)  # video, audio, the exchange's video; its audio's is the audio's


def kept(world: World) -> int:
    """Bytes that a forward leaves for backward on this rank, weights not counted."""
    model = apply_sequence_parallel(transformer("2.3"), world.sharing_samples(world.size))
    streams = random_inputs(model.config, 1, (8, 8, 4), 64, TEXT)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity = model(*map(doubled, streams))
    assert all(v.requires_grad for v in velocity)
    return sum(sizes.values())


def test_a_rank_keeps_its_share_of_the_activations(world):
    whole = kept(world)
    for share in run_on_ranks(kept, 4):
        assert share == pytest.approx(whole / 4, rel=0.15)  # the text's keys and values are on every rank


def interleaved(world: World, recompute: Recompute) -> float:
    """Two forwards of other lengths, then both backwards: largest difference of a gradient, relative."""
    world = world.sharing_samples(world.size)
    gradients = []
    for shared in (world, replace(world, size=1, rank=0, sequence=1)):
        model = apply_sequence_parallel(conditioned(), shared)
        prepare_units(shard_units(model), EngineConfig(recompute=recompute))
        losses = []
        for steps in (STEPS, STEPS + 3):
            streams = random_inputs(model.config, BATCH, GRID, steps, TEXT)
            losses.append(sum(v.square().sum() for v in model(*map(doubled, streams))))
        for loss in losses:
            loss.backward()
        gradients.append(
            shared.all_sum(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    found, expected = gradients
    return float((found - expected).norm() / expected.norm())


def recomputations(world: World) -> list[float]:
    return [interleaved(world, policy) for policy in (Recompute.full, Recompute.selective)]


def test_a_recomputed_block_trades_the_tokens_of_its_own_forward():
    for differences in run_on_ranks(recomputations, 2):
        assert max(differences) < 1e-10


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in initial_weights(model, MODEL, 0):
        yield name, tensor + 0.05 * torch.randn(tensor.shape, generator=generator("perturbed", name))


def opened(world: World, **settings: Any) -> Engine:
    return build_engine(lambda: build_model(MODEL), weights, EngineConfig(grad_clip=0.5, **settings), world)


def curve(world: World, sequence: int, settings: dict[str, Any]) -> list[tuple[float, float]]:
    """Loss and gradient norm of eight steps over four samples."""
    world = world.sharing_samples(sequence)
    return trained(opened(world, sequence=sequence, **settings), world, range(8))


def trained(engine: Engine, world: World, steps: range) -> list[tuple[float, float]]:
    results = []
    for step in steps:
        torch.manual_seed(step)
        streams = random_inputs(transformer_config(MODEL), 4, GRID, STEPS, TEXT)
        targets = [torch.randn_like(stream.latent) for stream in streams]
        mine, total = range(world.data_rank, 4, world.data_size), torch.zeros(())
        for i in mine:
            velocity = engine.model(*(rows(stream, slice(i, i + 1)) for stream in streams))
            errors = [(v - t[i : i + 1]).float().square().mean() for v, t in zip(velocity, targets, strict=True)]
            loss = torch.stack(errors).sum() / 4
            engine.backward(loss, last=i == mine[-1])
            total += loss.detach()
        norm = engine.step(lr=0.01).norm
        results.append((world.data_sum(total).item(), norm))
    return results


@pytest.mark.parametrize(
    ("size", "sequence", "settings"),
    [
        pytest.param(2, 2, {}, marks=pytest.mark.slow),
        (4, 2, {}),
        pytest.param(4, 2, {"replicate": 2, "recompute": "every_n"}, marks=pytest.mark.slow),
        pytest.param(4, 4, {}, marks=pytest.mark.slow),
    ],
)
def test_the_loss_curve_is_that_of_one_process(world, size, sequence, settings):
    """Weights are sharded over all ranks, those of a group too: on 4 ranks, two samples at a time on two ranks each."""
    expected = curve(world, 1, {})
    assert expected[-1][0] < expected[0][0]
    losses, norms = zip(*expected, strict=True)
    for results in run_on_ranks(curve, size, sequence, settings):
        found_losses, found_norms = zip(*results, strict=True)
        torch.testing.assert_close(found_losses, losses, rtol=2e-6, atol=0)
        torch.testing.assert_close(found_norms, norms, rtol=5e-5, atol=0)


def goes_on(world: World, directory: str) -> list[tuple[list[float], list[float]]]:
    """Losses of a run and of one that goes on from its checkpoint at another degree: from 1 to 2, and from 2 to 1."""
    worlds = {1: world, 2: world.sharing_samples(2)}
    found = []
    for before, after in ((1, 2), (2, 1)):
        first, second = (opened(worlds[n], sequence=n) for n in (before, after))
        trained(first, worlds[before], range(3))
        place = Path(directory) / f"from-{before}"
        first.save(place, {}).wait()
        world.barrier()
        second.load(place, {})
        curves = (trained(e, worlds[n], range(3, 6)) for e, n in ((first, before), (second, after)))
        found.append(tuple([loss for loss, _ in curve] for curve in curves))
    return found


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_a_sample(tmp_path):
    for curves in run_on_ranks(goes_on, 2, str(tmp_path)):
        for straight, resumed in curves:
            assert straight[-1] != straight[0]
            torch.testing.assert_close(resumed, straight, rtol=2e-6, atol=0)


def who_counts(world: World) -> tuple[int, int, bool, list[int], list[str]]:
    """Places, a sum over samples, and what each rank of the groups is given of batches that carry their reader's name."""
    shared = world.sharing_samples(2)
    batches = iter(GroupBatches((f"{world.rank} reads {step}" for step in range(2)), shared))
    seen = [next(batches), next(batches)]
    return shared.data_rank, shared.data_size, shared.counts_samples, shared.data_sum(torch.ones(2)).tolist(), seen


def test_each_sample_is_read_and_counted_by_one_rank_of_its_group():
    told = run_on_ranks(who_counts, 4)
    assert [(rank, size, counts) for rank, size, counts, _, _ in told] == [
        (0, 2, True),
        (0, 2, False),
        (1, 2, True),
        (1, 2, False),
    ]
    assert all(total == [2, 2] for *_, total, _ in told)
    assert [seen for *_, seen in told] == [[f"{r} reads 0", f"{r} reads 1"] for r in (0, 0, 2, 2)]


def test_what_cannot_be_shared_out_is_named(world):
    with pytest.raises(ConfigError, match="engine.sequence=2: 1 processes do not fall into groups of 2"):
        world.sharing_samples(2)
    three = replace(world, size=3, sequence=3)
    with pytest.raises(ConfigError, match="engine.sequence=3 does not divide num_attention_heads=4.*one of 1, 2, 4"):
        apply_sequence_parallel(transformer("2.3"), three)
    with pytest.raises(ConfigError, match="Toy has no transformer to split"):
        apply_sequence_parallel(Toy(), three)
    assert apply_sequence_parallel(toy := Toy(), world) is toy
    with pytest.raises(
        ConfigError, match=r"engine.sequence=2, but the ranks are in groups of 1: .*sharing_samples\(2\)"
    ):
        build_engine(Toy, None, EngineConfig(sequence=2), world)

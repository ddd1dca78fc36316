"""The engine on 1, 2 and 4 ranks: the same run, whatever the number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import AdamWConfig, EngineConfig, Offload, Precision, Recompute
from ltx2_train.distributed.world import World, close_world, init_world
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.testing import run_on_ranks
from ltx2_train.train.ema import Ema, EmaConfig
from tests.distributed.toy import Toy, data, initialise, toy_engine, train, train_step, whole


@pytest.fixture
def world():
    yield init_world()
    close_world()


def reference() -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and weights of eight steps, without any engine."""
    model, losses, norms = Toy(), [], []
    model.load_state_dict(dict(initialise(model)))
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.ndim == 2 and n != "scale_shift_table"]
    others = [p for n, p in named.items() if p.ndim < 2 or n == "scale_shift_table"]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.99))
    for step in range(8):
        x, y = data(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {n: p.detach() for n, p in named.items()}


def eight_steps(world: World, **config: Any) -> dict:
    """Losses, norms, weights and average of eight steps, and what a swap leaves."""
    engine = toy_engine(world, **config)
    ema = Ema(engine.shards(), EmaConfig(decay=0.7))
    norms, step = [], engine.step
    engine.step = lambda *, lr: norms.append(step(lr=lr).norm)
    losses = []
    for i in range(8):
        losses.append(train_step(engine, world, i))
        ema.update(engine.shards())
    x, _ = data(0)
    with torch.no_grad():
        trained = engine.model(x)
        with engine.swapped(ema.weights()):
            averaged, average = engine.model(x), whole(engine)
        back = engine.model(x)
    assert torch.equal(back, trained), "the trained weights come back bit-equal"
    assert not torch.allclose(averaged, trained)
    return {"losses": losses, "norms": norms, "weights": whole(engine), "average": average, "averaged": averaged}


def arrangements(world: World) -> list[dict]:
    """Eight steps with every number of whole copies that fits."""
    return [eight_steps(world, replicate=n) for n in range(1, world.size + 1) if world.size % n == 0]


def test_one_two_and_four_ranks_and_replicas_of_shards_train_the_same_model():
    losses, norms, weights = reference()
    runs = {size: run_on_ranks(arrangements, size) for size in (1, 2, 4)}
    assert len(runs[4][0]) == 3
    alone = runs[1][0][0]
    for ranks in runs.values():
        for result in (result for results in ranks for result in results):
            torch.testing.assert_close(result["losses"], losses, rtol=1e-6, atol=0)
            torch.testing.assert_close(result["norms"], norms, rtol=1e-5, atol=0)  # a mean over ranks would show here
            torch.testing.assert_close(result["averaged"], alone["averaged"], rtol=1e-4, atol=1e-5)
        for result in ranks[0]:
            for name, weight in weights.items():
                torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(result["average"][name], alone["average"][name], rtol=1e-4, atol=1e-5)


MOVED = [
    {"prefetch": 2},
    {"prefetch": 1, "recompute": Recompute.full},
    {"reshard": False},
    {"offload": Offload.optimizer},
    {"offload": Offload.all},
    {"recompute": Recompute.selective},
    {"recompute": Recompute.budget, "recompute_budget_gb": 1e-9},
]


def moved(world: World) -> list[dict]:
    return [eight_steps(world, **config) for config in ({}, *MOVED)]


@pytest.mark.parametrize("size", [1, 2])
def test_where_and_when_things_are_changes_no_bit(size):
    plain, *others = run_on_ranks(moved, size)[0]
    for config, other in zip(MOVED, others, strict=True):
        for key in ("losses", "norms"):
            assert other[key] == plain[key], config
        for key in ("weights", "average"):
            assert all(torch.equal(tensor, plain[key][name]) for name, tensor in other[key].items()), config


def test_copies_that_do_not_fit_the_ranks_are_named(world):
    with pytest.raises(ConfigError, match=r"engine\.replicate=2: does not divide 1 ranks; take one of \[1\]"):
        toy_engine(world, replicate=2)


def exact_sums(world: World) -> list[Tensor]:
    """Gradients of integers, whose sums are exact in any order, of one copy of the model and of two."""
    weights, gradients = [("blocks.0.weight", torch.ones(4, 3))], []
    for replicate in (1, 2):
        engine = build_engine(Sums, lambda model: weights, EngineConfig(replicate=replicate), world)
        for last in (False, True):
            engine.backward(engine.model(torch.full((1, 3), float(world.rank + 1))).sum(), last=last)
        gradients.append(engine.module.blocks[0].weight.grad.full_tensor())
    return gradients


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 4, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def test_gradients_are_exact_sums_over_ranks_and_micro_batches():
    for size in (2, 4):
        expected = torch.full((4, 3), 2.0 * sum(range(1, size + 1)))
        for gradients in run_on_ranks(exact_sums, size):
            assert all(torch.equal(gradient, expected) for gradient in gradients)


def frozen_stays(world: World) -> None:
    for config in ({"freeze": [r"blocks\.1\..*", "scale_shift_table"]}, {"build": FrozenOut}):
        engine = toy_engine(world, **config)
        before = whole(engine)
        train(engine, world, 0, 5)
        after = whole(engine)
        for name in before if world.is_main else ():
            frozen = name not in dict(engine.shards())
            assert torch.equal(before[name], after[name]) == frozen, name


class FrozenOut(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.out.requires_grad_(False)


def test_frozen_parameters_stay_bit_equal_under_weight_decay():
    run_on_ranks(frozen_stays, 2)


def test_frozen_parameters_stay_bit_equal_on_one_rank(world):
    frozen_stays(world)


def refuses_non_finite(world: World) -> None:
    engine = toy_engine(world, skip_above=1e6)
    train(engine, world, 0, 2)
    before = {name: shard.clone() for name, shard in engine.shards()}
    for poison in (torch.nan, torch.inf, 1e12):
        x, _ = data(2)
        loss = engine.model(x).square().sum() * (poison if world.rank == world.size - 1 else 1.0)
        engine.backward(loss, last=True)
        result = engine.step(lr=0.1)
        assert not result.applied
        assert not result.norm <= 1e6
        assert all(torch.equal(before[name], shard) for name, shard in engine.shards())
    clean = train(engine, world, 2, 4)
    again = toy_engine(world)
    train(again, world, 0, 2)
    assert train(again, world, 2, 4) == clean, "a refused step leaves no trace, in the optimizer neither"


def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none():
    run_on_ranks(refuses_non_finite, 2)


def test_a_gradient_that_is_not_finite_is_not_applied(world):
    refuses_non_finite(world)


def lora_like(world: World) -> list[float]:
    """bf16 compute: frozen weights are kept in bf16, trained ones in fp32."""
    config = EngineConfig(precision=Precision.bf16, freeze=[r"blocks\..*", r"enter\..*"])
    engine = build_engine(Toy, initialise, config, world)
    dtypes = {name: tensor.dtype for name, tensor in engine.module.named_parameters()}
    assert dtypes["blocks.0.up.weight"] == torch.bfloat16
    assert dtypes["out.weight"] == torch.float32
    assert engine.model(data(0)[0]).dtype == torch.bfloat16
    before = whole(engine)
    losses = train(engine, world, 0, 3)
    after = whole(engine)
    if world.is_main:
        assert torch.equal(before["blocks.0.up.weight"], after["blocks.0.up.weight"])
        assert not torch.equal(before["out.weight"], after["out.weight"])
        assert {name for name, _ in engine.full_weights(trained_only=True)} == set(dict(engine.shards()))
    else:
        for _ in engine.full_weights(trained_only=True):
            pass
    return losses


def test_a_bf16_base_stays_frozen_while_fp32_masters_train(world):
    two, _ = run_on_ranks(lora_like, 2)
    torch.testing.assert_close(lora_like(world), two, rtol=2e-2, atol=0)  # bf16 activations in other micro-batches


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.every_n])
def test_recomputed_activations_change_no_bit(world, recompute):
    kept, recomputed = toy_engine(world), toy_engine(world, recompute=recompute)
    assert train(kept, world, 0, 3) == train(recomputed, world, 0, 3)


def recomputed_on_ranks(world: World) -> list[float]:
    return train(toy_engine(world, recompute=Recompute.full), world, 0, 3)


def test_recomputation_works_sharded(world):
    for losses in run_on_ranks(recomputed_on_ranks, 2):
        torch.testing.assert_close(losses, train(toy_engine(world), world, 0, 3), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(world):
    plain, compiled = toy_engine(world), toy_engine(world, compile=True, recompute=Recompute.full)
    torch.testing.assert_close(train(plain, world, 0, 3), train(compiled, world, 0, 3), rtol=1e-5, atol=0)


def test_one_rank_sharded_equals_one_rank_plain(world):
    """fp32 on one rank is not sharded at all; in bf16 it is, and its frozen-free masters are the same."""
    plain = toy_engine(world)
    sharded = toy_engine(world, precision=Precision.bf16)
    assert not hasattr(plain.module, "unshard")
    assert hasattr(sharded.module, "unshard")
    for (name, a), (_, b) in zip(plain.shards(), sharded.shards(), strict=True):
        assert torch.equal(a, b), name


def test_without_an_initialiser_rank_zero_decides():
    first, second = run_on_ranks(unseeded, 2)
    assert first["out.bias"].numel() == 2
    assert second["out.bias"].numel() == 0


def unseeded(world: World) -> dict[str, Tensor]:
    torch.manual_seed(world.rank)
    engine = build_engine(Toy, None, EngineConfig(), world)
    gathered = whole(engine)
    torch.manual_seed(0)
    expected = dict(Toy().named_parameters())
    if world.is_main:
        assert all(torch.equal(gathered[name], tensor) for name, tensor in expected.items())
    return gathered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named[1:], "1 tensors are not given: scale_shift_table"),
        (lambda named: [*named, ("blocks.9.weight", torch.ones(1))], "blocks.9.weight is not a parameter"),
        (lambda named: [(n, t.flatten()) for n, t in named], r"scale_shift_table is \[12\], the model has \[2, 6\]"),
        (lambda named: [named[0], *named], "scale_shift_table is given twice"),
    ],
)
def test_initial_weights_that_do_not_fit_are_named(world, change, message):
    with pytest.raises(CheckpointError, match=message):
        build_engine(Toy, lambda model: change(list(initialise(model))), EngineConfig(), world)


def test_a_buffer_without_a_value_is_an_error(world):
    class Buffered(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(3), persistent=False)

    with pytest.raises(CheckpointError, match="1 tensors are not given: steps"):
        toy_engine(world, Buffered)
    given = lambda model: [*initialise(model), ("steps", torch.arange(3.0))]  # noqa: E731
    engine = build_engine(Buffered, given, EngineConfig(), world)
    assert engine.module.steps.tolist() == [0, 1, 2]


def test_a_freeze_pattern_that_matches_nothing_is_an_error(world):
    with pytest.raises(ConfigError, match="matches no parameter; their names are like 'scale_shift_table'"):
        toy_engine(world, freeze=[r"block\.0\..*"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        toy_engine(world, freeze=[".*"])


def magnitude(world: World, shards: dict[str, Tensor], replicate: int) -> float:
    total = torch.stack([shard.double().abs().sum() for shard in shards.values()]).sum()
    return world.all_sum(total).item() / replicate


def save_and_train_on(world: World, directory: str, replicate: int) -> tuple[list[float], float]:
    """Three steps, a save, and three more while it is being written."""
    engine = toy_engine(world, replicate=replicate)
    ema = Ema(engine.shards(), EmaConfig())
    for step in range(3):
        train_step(engine, world, step)
        ema.update(engine.shards())
    average = magnitude(world, ema.weights(), replicate)
    pending = engine.save(Path(directory), {**ema.state(), "seen": [1, 2]})
    losses = train(engine, world, 3, 6)
    with torch.no_grad():
        for shard in ema.weights().values():
            shard.fill_(9.0)
    pending.wait()
    assert pending.done()
    assert all(path.is_file() for path in pending.files())
    return losses, average


LOADED = {1: Offload.all, 2: Offload.optimizer, 4: Offload.none}  # where what is saved goes to is free, by ranks


def load_and_train(world: World, directory: str, replicates: list[int]) -> list[tuple[list[float], float]]:
    return [go_on(world, directory, replicate) for replicate in replicates]


def go_on(world: World, directory: str, replicate: int) -> tuple[list[float], float]:
    engine = toy_engine(world, replicate=replicate, offload=LOADED[world.size])
    train(engine, world, 4, 6)  # something to be overwritten
    ema = Ema(engine.shards(), EmaConfig())
    extra = engine.load(Path(directory), ema.state())
    ema.restore(extra)
    assert ema.updates == 3
    assert extra["seen"] == [1, 2]
    average = magnitude(world, ema.weights(), replicate)
    return train(engine, world, 3, 6), average


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [
        ((1, 1), {1: [1], 2: [1], 4: [1, 2]}),
        ((2, 1), {1: [1], 2: [1]}),
        ((4, 2), {1: [1], 2: [1, 2], 4: [1, 2]}),
    ],
    ids=["1", "2", "2x2"],
)
def test_a_checkpoint_goes_on_with_any_number_of_ranks_and_copies(tmp_path, saved_on, loaded_on):
    """(ranks, copies) that write it, and copies by number of ranks that go on from it."""
    directory = str(tmp_path / "c")
    straight, average = run_on_ranks(save_and_train_on, saved_on[0], directory, saved_on[1])[0]
    for size, replicates in loaded_on.items():
        for results in run_on_ranks(load_and_train, size, directory, replicates):
            for replicate, (losses, loaded_average) in zip(replicates, results, strict=True):
                if saved_on == (size, replicate):
                    assert losses == straight, "bit-equal"
                torch.testing.assert_close(losses, straight, rtol=1e-6, atol=0)
                assert loaded_average == pytest.approx(average, rel=1e-9), "saved as it was, not as it became"


def test_another_model_is_refused_with_its_differences(world, tmp_path):
    toy_engine(world).save(tmp_path, {}).wait()
    with pytest.raises(CheckpointError, match=r"parameter enter\.weight: \[6, 4\] in the checkpoint, \[8, 4\] here"):
        toy_engine(world, WiderToy).load(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"trained parameter out\.bias: only in the checkpoint"):
        toy_engine(world, freeze=["out.bias"]).load(tmp_path, {})
    engine = toy_engine(world)
    with pytest.raises(CheckpointError, match=r"tensor ema\..*: not in the checkpoint"):
        engine.load(tmp_path, Ema(engine.shards(), EmaConfig()).state())


class WiderToy(Toy):
    def __init__(self) -> None:
        super().__init__(width=8)


def test_weights_are_read_back_without_an_engine(world, tmp_path):
    from ltx2_train.distributed.saved import saved_weights

    engine = toy_engine(world, freeze=["out.bias"])
    ema = Ema(engine.shards(), EmaConfig())
    train(engine, world, 0, 2)
    ema.update(engine.shards())
    engine.save(tmp_path, ema.state()).wait()
    expected = whole(engine)
    found = dict(saved_weights(tmp_path, initial=initialise(Toy())))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    averaged = dict(saved_weights(tmp_path, averaged="ema", initial=initialise(Toy())))
    assert torch.equal(averaged["out.weight"], ema.weights()["out.weight"])
    assert torch.equal(averaged["out.bias"], expected["out.bias"])
    assert dict(saved_weights(tmp_path)).keys() == expected.keys() - {"out.bias"}, "what is frozen is not saved"
    with pytest.raises(CheckpointError, match="its averages: \\['ema'\\]"):
        dict(saved_weights(tmp_path, averaged="slow"))


def test_weight_decay_shrinks_matrices_only(world):
    engine = toy_engine(world, optimizer=AdamWConfig(weight_decay=1.0))
    before = whole(engine)
    engine.backward(engine.model(data(0)[0]).sum() * 0, last=True)
    assert engine.step(lr=0.5).norm == 0
    for name, weight in whole(engine).items():
        decays = weight.ndim == 2 and name != "scale_shift_table"
        torch.testing.assert_close(weight, before[name] * (0.5 if decays else 1.0))

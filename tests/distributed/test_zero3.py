"""The ZeRO-3 engine against the FSDP2 engine: the same run, the same checkpoints."""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx2_train.distributed.engine import Backend, Engine, Offload, Precision, Recompute
from ltx2_train.distributed.saved import saved_weights
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError
from ltx2_train.testing import run_on_ranks
from ltx2_train.train.ema import Ema, EmaConfig
from tests.distributed import test_transformer as tiny
from tests.distributed.test_engine import reference
from tests.distributed.toy import Toy, data, toy_engine, train, train_step, whole

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra")

BACKENDS = (Backend.fsdp2, Backend.zero3)
CLOSE = {"rtol": 1e-6, "atol": 0}


def recorded(engine: Engine, world: World, steps: int) -> dict[str, Any]:
    """Losses, norms, weights and average of some steps, and what a swap leaves."""
    ema, norms, losses, step = Ema(engine.shards(), EmaConfig(decay=0.7)), [], [], engine.step
    engine.step = lambda *, lr: norms.append((result := step(lr=lr)).norm) or result
    for i in range(steps):
        losses.append(train_step(engine, world, i))
        ema.update(engine.shards())
    x, _ = data(0)
    with torch.no_grad():
        trained = engine.model(x)
        with engine.swapped(ema.weights()):
            averaged, average = engine.model(x), whole(engine)
        assert torch.equal(engine.model(x), trained), "the trained weights come back bit-equal"
    assert not torch.allclose(averaged, trained)
    engine.step = step
    return {"losses": losses, "norms": norms, "weights": whole(engine), "averaged": averaged, "average": average}


def eight_steps(world: World) -> dict[str, dict[str, Any]]:
    return {backend: recorded(toy_engine(world, backend=backend), world, 8) for backend in BACKENDS}


@pytest.mark.parametrize("size", [1, 2])
def test_both_engines_train_the_same_model(size):
    losses, norms, weights = reference()
    for ranks in run_on_ranks(eight_steps, size):
        fsdp2, zero3 = ranks[Backend.fsdp2], ranks[Backend.zero3]
        torch.testing.assert_close(zero3["losses"], fsdp2["losses"], **CLOSE)
        torch.testing.assert_close(zero3["norms"], fsdp2["norms"], **CLOSE)  # a mean over ranks would show here
        torch.testing.assert_close(zero3["losses"][: len(losses)], losses, **CLOSE)
        torch.testing.assert_close(zero3["norms"][: len(norms)], norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(zero3["averaged"], fsdp2["averaged"], rtol=1e-4, atol=1e-6)
        for kind in ("weights", "average"):
            assert zero3[kind].keys() == weights.keys()
            for name in weights:
                torch.testing.assert_close(zero3[kind][name], fsdp2[kind][name], rtol=1e-4, atol=1e-6)


class Branches(Toy):
    """Its second block runs only where told."""

    def forward(self, x: Tensor, *, both: bool = True) -> Tensor:
        x = self.blocks[0](self.enter(x))
        return self.out(self.blocks[2](self.blocks[1](x) if both else x))


def with_branches(world: World, backend: Backend, pattern: list[tuple[bool, ...]]) -> dict[str, Tensor]:
    """Weights after steps whose micro-batches do or do not run the second block."""
    engine = toy_engine(world, Branches, backend=backend)
    for step, branches in enumerate(pattern):
        x, y = (t.tensor_split(world.size)[world.rank] for t in data(step))
        for i, both in enumerate(branches):
            engine.backward((engine.model(x, both=both) - y).square().sum(), last=i == len(branches) - 1)
        engine.step(lr=0.05)
    return whole(engine)


def updates_like_fsdp2(world: World) -> None:
    """Gradients that come and go, frozen parameters, refused steps, and how many micro-batches there are."""
    pattern = [(True, True), (False, False), (False, True), (True, False), (False, False), (True, True)]
    expected, got = (with_branches(world, backend, pattern) for backend in BACKENDS)
    for name in expected if world.is_main else ():
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    frozen_stays(world)
    refuses_non_finite(world)
    survives_a_failed_evaluation(world)
    one, two = (toy_engine(world, backend=Backend.zero3) for _ in range(2))
    for step in range(3):
        losses = [train_step(engine, world, step, micro_batches=n) for engine, n in ((one, 1), (two, 4))]
        torch.testing.assert_close(*losses, **CLOSE)


def frozen_stays(world: World) -> None:
    engine = toy_engine(world, backend=Backend.zero3, freeze=[r"blocks\.1\..*", "scale_shift_table"])
    before = whole(engine)
    train(engine, world, 0, 3)
    after = whole(engine)
    for name in before if world.is_main else ():
        assert torch.equal(before[name], after[name]) == (name not in dict(engine.shards())), name


def refuses_non_finite(world: World) -> None:
    engine = toy_engine(world, backend=Backend.zero3, skip_above=1e6)
    train(engine, world, 0, 2)
    before = {name: shard.clone() for name, shard in engine.shards()}
    for poison in (torch.nan, torch.inf, 1e12):
        loss = engine.model(data(2)[0]).square().sum() * (poison if world.rank == world.size - 1 else 1.0)
        engine.backward(loss, last=True)
        result = engine.step(lr=0.1)
        assert not result.applied
        assert not result.norm <= 1e6
        assert all(torch.equal(before[name], shard) for name, shard in engine.shards())
    clean = train(engine, world, 2, 4)
    again = toy_engine(world, backend=Backend.zero3)
    train(again, world, 0, 2)
    assert train(again, world, 2, 4) == clean, "a refused step leaves no trace"


def survives_a_failed_evaluation(world: World) -> None:
    engine, again = (toy_engine(world, backend=Backend.zero3) for _ in range(2))
    expected = train(engine, world, 0, 4)
    losses = train(again, world, 0, 2)
    average = {name: shard.clone() for name, shard in again.shards()}
    for grads in (False, True):
        with torch.set_grad_enabled(grads), pytest.raises(RuntimeError, match="shapes"), again.swapped(average):
            again.model(torch.zeros(2, 3))
    assert losses + train(again, world, 2, 4) == expected


def test_what_is_updated_and_what_is_not():
    run_on_ranks(updates_like_fsdp2, 2)


def variants(world: World) -> None:
    """Where things lie changes no bit; bf16 computes in bf16 beside fp32 masters."""
    expected = train(toy_engine(world, backend=Backend.zero3), world, 0, 4)
    for offload in (Offload.optimizer, Offload.all):
        assert train(toy_engine(world, backend=Backend.zero3, offload=offload), world, 0, 4) == expected
    for offload, freeze in product(Offload, ([], [r"blocks\..*", r"enter\..*"])):
        in_bf16(world, offload, freeze)


def in_bf16(world: World, offload: Offload, freeze: list[str]) -> None:
    config = {"precision": Precision.bf16, "freeze": freeze}
    fsdp2, zero3 = toy_engine(world, **config), toy_engine(world, backend=Backend.zero3, offload=offload, **config)
    for (name, expected), (_, got) in zip(whole(fsdp2).items(), whole(zero3).items(), strict=True):
        assert torch.equal(got, expected), name
        assert got.dtype == expected.dtype
    assert zero3.model(data(0)[0]).dtype == torch.bfloat16
    assert all(shard.dtype == torch.float32 for _, shard in zero3.shards())
    losses = [train(engine, world, 0, 3) for engine in (fsdp2, zero3)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_precision_and_offload():
    run_on_ranks(variants, 2)


def saves(world: World, directory: str) -> dict[str, list[float]]:
    """With each backend: three steps, a save, and three more while it is being written."""
    losses = {}
    for backend in BACKENDS:
        engine = toy_engine(world, backend=backend, freeze=["out.bias"])
        ema = Ema(engine.shards(), EmaConfig())
        for step in range(3):
            train_step(engine, world, step)
            ema.update(engine.shards())
        magnitude = total(world, ema)
        saved = whole(engine)
        pending = engine.save(Path(directory) / backend, {**ema.state(), "seen": [1, 2]})
        losses[backend] = [*train(engine, world, 3, 6), magnitude]
        for shard in ema.weights().values():
            shard.fill_(9.0)
        pending.wait()
        assert pending.done()
        assert all(path.is_file() for path in pending.files())
        if world.is_main:
            assert all(torch.equal(tensor, saved[name]) for name, tensor in saved_weights(Path(directory) / backend))
    return losses


def total(world: World, ema: Ema) -> float:
    return world.all_sum(torch.stack([shard.double().abs().sum() for shard in ema.weights().values()]).sum()).item()


def loads(world: World, directory: str) -> dict[tuple[str, str], list[float]]:
    """Each backend's checkpoint with each backend."""
    losses = {}
    for saved, backend in product(BACKENDS, BACKENDS):
        engine = toy_engine(world, backend=backend, freeze=["out.bias"])
        train(engine, world, 4, 6)  # something to be overwritten
        ema = Ema(engine.shards(), EmaConfig())
        extra = engine.load(Path(directory) / saved, ema.state())
        ema.restore(extra)
        assert (ema.updates, extra["seen"]) == (3, [1, 2])
        magnitude = total(world, ema)
        losses[saved, backend] = [*train(engine, world, 3, 6), magnitude]
    return losses


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_either_engine_on_any_number_of_ranks(tmp_path, before, after):
    straight = run_on_ranks(saves, before, str(tmp_path))[0]
    for resumed in run_on_ranks(loads, after, str(tmp_path)):
        for (saved, backend), losses in resumed.items():
            if saved == backend and before == after:
                assert losses[:-1] == straight[saved][:-1], "bit-equal"
            torch.testing.assert_close(losses, straight[saved], **CLOSE)


def refuses_another(world: World, directory: str) -> None:
    toy_engine(world, backend=Backend.zero3).save(Path(directory), {}).wait()
    world.barrier()
    with pytest.raises(CheckpointError, match=r"parameter enter\.weight: \[6, 4\] in the checkpoint, \[8, 4\] here"):
        toy_engine(world, WiderToy, backend=Backend.zero3).load(Path(directory), {})
    with pytest.raises(CheckpointError, match=r"trained parameter out\.bias: only in the checkpoint"):
        toy_engine(world, backend=Backend.zero3, freeze=["out.bias"]).load(Path(directory), {})


def other_shapes(world: World) -> list[list[float]]:
    """Norms of steps in which every rank has another number of samples, by policy."""
    norms: list[list[float]] = []
    for recompute in (Recompute.none, Recompute.every_n, Recompute.full):
        engine = toy_engine(world, backend=Backend.zero3, recompute=recompute)
        norms.append([])
        for step in range(3):
            x, y = (t[:3] if world.rank else t[3:] for t in data(step))
            engine.backward((engine.model(x) - y).square().sum() / len(data(step)[0]), last=True)
            norms[-1].append(engine.step(lr=0.05).norm)
    return norms


@pytest.mark.slow
def test_ranks_of_other_shapes_run_the_same_collectives():
    for none, every_n, full in run_on_ranks(other_shapes, 2, timeout=60.0):
        assert none == every_n == full
        assert all(map(math.isfinite, none))


class WiderToy(Toy):
    def __init__(self) -> None:
        super().__init__(width=8)


def test_another_model_is_refused_with_its_differences(tmp_path):
    run_on_ranks(refuses_another, 2, str(tmp_path))


def transformers(world: World) -> dict[Any, list[tuple[float, float]]]:
    """Loss and norm of steps of the real architecture, full and LoRA, and with blocks recomputed."""
    results = {}
    for lora, backend in product((False, True), BACKENDS):
        engine = tiny.tiny_engine(world, lora=lora, backend=backend)
        results[lora, backend] = tiny.train(engine, world, 0, 3)
    engine = tiny.tiny_engine(world, backend=Backend.zero3, recompute=Recompute.every_n)
    results["recomputed"] = tiny.train(engine, world, 0, 3)
    return results


@pytest.mark.slow
def test_the_transformer_trains_alike_full_and_with_adapters():
    for results in run_on_ranks(transformers, 2):
        for lora in (False, True):
            torch.testing.assert_close(results[lora, Backend.zero3], results[lora, Backend.fsdp2], rtol=1e-5, atol=0)
        assert results["recomputed"] == results[False, Backend.zero3], "bit-equal"


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (3, 2, 5), (2, 3, 2, 2)])
def test_boxes_are_exactly_the_range(shape):
    from ltx2_train.distributed.held import boxes

    places = torch.arange(math.prod(shape)).view(shape)
    for start, stop in product(range(places.numel() + 1), repeat=2):
        cut = [
            places[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
            for offsets, sizes in boxes(torch.Size(shape), start, stop)
        ]
        assert torch.equal(torch.cat([torch.arange(0), *cut]), torch.arange(start, max(start, stop)))
        assert len(cut) <= max(1, 2 * len(shape) - 1)


@dataclass
class Stored:
    """A tensor on disk that counts the rows that are read."""

    values: Tensor
    rows_read: int = 0

    def rows(self, start: int, stop: int) -> Tensor:
        self.rows_read += stop - start
        return self.values[start:stop]


def test_of_a_stored_tensor_only_the_rows_around_the_range_are_read():
    from ltx2_train.distributed.held import Held

    values = torch.arange(40).view(8, 5)
    for start, stop, rows in ((0, 10, 2), (3, 12, 3), (17, 18, 1), (40, 40, 0)):
        stored, held = Stored(values), Held(values.shape, start, stop, stop - start)
        assert torch.equal(held.of(stored), held.of(values))
        assert torch.equal(held.of(values), torch.arange(start, stop))
        assert stored.rows_read == rows


@pytest.mark.slow
def test_the_whole_program_gives_the_same_curve(tmp_path):
    """Through the launcher, on two processes, and gone on with on one."""
    from tests.proofs.exactness import finish, largest_difference, settings, write_data

    data, zero3 = write_data(tmp_path / "latents"), "engine.backend=zero3"
    finish(2, *settings(data, tmp_path / "fsdp2"))
    finish(2, *settings(data, tmp_path / "zero3", zero3, "train.max_steps=3"))
    finish(1, *settings(data, tmp_path / "zero3", zero3))
    assert largest_difference(tmp_path / "fsdp2", tmp_path / "zero3") <= 1e-5

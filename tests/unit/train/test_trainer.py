import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ltx2_train.batch import collate, placeholder
from ltx2_train.distributed.engine import StepResult
from ltx2_train.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from ltx2_train.record import Bucket, TextFeatures
from ltx2_train.train.checkpoint import Saved
from ltx2_train.train.ema import Ema, EmaConfig
from ltx2_train.train.faults import NAMED, BadUpdate, FaultsConfig, LeftOut, Rollback, told
from ltx2_train.train.metrics import Metrics
from ltx2_train.train.state import TrainState, check_same_run, defining_settings
from ltx2_train.train.trainer import Outcome, TrainConfig, Trainer, spread_non_finite

BUCKET = Bucket(1, 1, 2, 3)
TEXT = TextFeatures(torch.zeros(2, 4), torch.zeros(2, 4))


@dataclass
class World:
    rank: int = 0
    size: int = 1
    device: str = "cpu"
    counts_samples: bool = True

    def all_sum(self, tensor):
        return tensor

    def data_sum(self, tensor):
        return tensor

    def gather_objects(self, value):
        return [value]


@dataclass
class Engine:
    """One weight, plain gradient descent; remembers what it was told."""

    weight: torch.Tensor = field(default_factory=lambda: torch.tensor(1.0, requires_grad=True))
    lasts: list = field(default_factory=list)
    rates: list = field(default_factory=list)

    def model(self, x):
        return self.weight * x

    def backward(self, loss, *, last):
        loss.backward()
        self.lasts.append(last)

    def step(self, *, lr):
        gradient, self.weight.grad = self.weight.grad.clone(), None
        applied = bool(torch.isfinite(gradient))
        if applied:
            self.weight.data -= lr * gradient
        self.rates.append(lr)
        return StepResult(norm=float(gradient.abs()), applied=applied)

    def shards(self):
        return [("weight", self.weight.detach())]

    @contextlib.contextmanager
    def swapped(self, shards):
        kept = self.weight.data.clone()
        self.weight.data.copy_(shards["weight"])
        yield
        self.weight.data.copy_(kept)


@dataclass
class Losses:
    video: torch.Tensor
    audio: torch.Tensor
    has_video: torch.Tensor
    has_audio: torch.Tensor
    weight_video: float = 1.0
    weight_audio: float = 1.0

    def __post_init__(self):
        self.sigma_video = self.sigma_audio = torch.full_like(self.has_video, 0.5)

    def total(self, counts):
        return (self.video * self.has_video).sum() / counts[0] + (self.audio * self.has_audio).sum() / counts[1]


@dataclass
class Objective:
    """The loss of sample k is weight * k on both streams; `poison` makes one sample's loss what it says."""

    poison: dict = field(default_factory=dict)

    def counts(self, batch, rng):
        return torch.stack([batch.has_video.sum(), batch.has_audio.sum()])

    def __call__(self, model, batch, rng):
        assert tuple(rng.positions) == batch.positions
        loss = model(torch.tensor([self.poison.get(key, float(key[1:])) for key in batch.keys]))
        return Losses(loss, loss * 2, batch.has_video, batch.has_audio)


@dataclass
class Saves:
    states: list = field(default_factory=list)
    in_flight: list = field(default_factory=list)
    settled: list = field(default_factory=list)

    kept: list = field(default_factory=list)

    def save(self, step, engine, state, config, *, back_to):
        assert not self.in_flight
        self.kept.append(back_to)
        self.states.append(TrainState.from_dict(state["train"]))
        self.in_flight.append(Saved(step, Path(f"step-{step:08d}"), 2**20, 0.5))

    def wait(self):
        return self.in_flight.pop() if self.in_flight else None

    def poll(self):
        return None

    asked: list = field(default_factory=list)

    def last_before(self, step):
        self.asked.append(step)
        return Path(f"step-{step:08d}")

    def settle(self):
        self.settled.append(len(self.in_flight))
        return self.wait()


class Records(list):
    log = list.append

    def close(self):
        pass


def batch(*keys, bad=()):
    samples = [placeholder(key, BUCKET, TEXT) for key in keys]
    for sample in samples:
        sample.meta["bad"] = sample.key in bad
    return collate(samples, range(len(samples)), BUCKET, [f"{key}: damaged" for key in bad])


def steps(*lists) -> Iterator:
    return iter(lists)


def dawdling(seconds: float) -> Iterator:
    while True:
        time.sleep(seconds)
        yield [batch("k0")]


def endless(*micro_batches):
    while True:
        yield list(micro_batches)


def trainer(batches, **changes):
    world = World()
    settings = {"run_dir": "unused", "max_steps": 6, "log_every": 2, "save_every": 3, **changes.pop("config", {})}
    parts = {
        "seed": 0,
        "world": world,
        "engine": Engine(),
        "objective": Objective(),
        "learning_rate": lambda step: 0.1,
        "metrics": Metrics(world),
        "checkpoints": Saves(),
        "sinks": [Records()],
    }
    return Trainer(config=TrainConfig(**settings), batches=batches, **(parts | changes))


def records(t):
    return [r for r in t.sinks[0] if "event" not in r]


def events(t):
    """What happened, without what a busy machine makes of steps that take no time."""
    return [e for e in all_events(t) if e[0] not in ("straggler", "data_stall")]


def all_events(t):
    return [(r["event"], r["step"]) for r in t.sinks[0] if "event" in r]


def test_a_step_is_one_update_with_the_gradient_of_the_mean_over_all_its_samples():
    t = trainer(steps([batch("k1", "k2"), batch("k6")]), config={"max_steps": 1})
    t.run()
    assert t.engine.lasts == [False, True]
    assert t.engine.weight.item() == pytest.approx(1 - 0.1 * (3 + 6))
    assert records(t)[0]["loss_video"] == pytest.approx(3.0)
    assert records(t)[0]["grad_norm"] == pytest.approx(9.0)


def test_records_and_checkpoints_come_when_they_are_due():
    t = trainer(endless(batch("k0")))
    assert t.run() is Outcome.DONE
    assert [r["step"] for r in records(t)] == [1, 2, 3, 4, 6]
    assert events(t) == [("checkpoint", 3), ("checkpoint", 6)]
    assert [s.step for s in t.checkpoints.states] == [3, 6]
    assert t.checkpoints.states[-1].samples == 6
    assert t.checkpoints.states[-1].tokens == 6 * BUCKET.tokens
    assert not t.checkpoints.in_flight


def test_the_learning_rate_is_asked_by_step():
    t = trainer(endless(batch("k1")), learning_rate=lambda step: step / 100, state=TrainState(step=4))
    t.run()
    assert t.engine.rates == [0.04, 0.05]


def test_a_saved_state_goes_on_where_it_was():
    straight = trainer(endless(batch("k1", "k2")))
    straight.run()
    first = trainer(endless(batch("k1", "k2")), config={"max_steps": 3})
    first.run()
    second = trainer(endless(batch("k1", "k2")), engine=first.engine, state=first.checkpoints.states[-1])
    second.run()
    assert torch.equal(straight.engine.weight, second.engine.weight)
    timeless = {"step", "loss", "loss_video", "loss_audio", "grad_norm", "lr", "samples", "tokens", "sigma_bins"}
    expected = [{k: r[k] for k in timeless} for r in records(straight)]
    assert [{k: r[k] for k in timeless} for r in records(first) + records(second)] == expected
    assert second.state.samples == straight.state.samples
    assert records(second)[0]["time"] >= records(first)[-1]["time"]


STRICT = {"faults": FaultsConfig(skips=0, rollbacks=0)}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_and_never_applied(poison):
    first, second = [batch("k1")], [batch("k2", "k3"), batch("k4")]
    t = trainer(steps(first, second), config={"log_every": 1, **STRICT})
    t.objective.poison["k3"] = poison
    with pytest.raises(NonFiniteError, match=r"step 2: a loss is not finite.*Samples: k3\."):
        t.run()
    after_one_step = 1 - 0.1 * 3
    assert t.engine.weight.item() == pytest.approx(after_one_step)
    (event,) = [r for r in t.sinks[0] if r.get("event") == "update_skipped"]
    assert event["keys"] == ["k3"]
    assert event["reason"] == "a loss is not finite"


def test_a_loss_that_overflows_while_its_gradient_does_not_is_not_applied():
    weight = torch.tensor(1.0, requires_grad=True)
    loss = spread_non_finite(weight * 2.0 + torch.tensor(float("inf")))
    loss.backward()
    assert torch.isnan(weight.grad)
    spread_non_finite(torch.tensor(2.0)).item()


def test_a_finite_loss_keeps_its_gradient_exactly():
    weight = torch.tensor(3.0, requires_grad=True)
    spread_non_finite(weight.square()).backward()
    assert weight.grad == 6.0


def test_when_only_the_gradient_is_not_finite_all_samples_of_the_step_are_named():
    class Broken(Engine):
        def step(self, *, lr):
            return StepResult(norm=float("nan"), applied=False)

    t = trainer(steps([batch("k1", "k2"), batch("k3")]), engine=Broken(), config=STRICT)
    with pytest.raises(NonFiniteError, match=r"though every loss is finite.*Samples: k1, k2, k3\."):
        t.run()


def test_a_gradient_that_is_merely_too_large_costs_its_step_only():
    class Careful(Engine):
        def step(self, *, lr):
            self.weight.grad = None
            return StepResult(norm=1e6, applied=False)

    t = trainer(endless(batch("k1")), engine=Careful(), config={"max_steps": 2})
    assert t.run() is Outcome.DONE
    assert events(t)[:2] == [("update_skipped", 0), ("update_skipped", 1)]
    assert "engine.skip_above" in t.sinks[0][0]["reason"]


ONE = FaultsConfig(skips=1, rollbacks=1)


def poisoned(where: dict[int, str], **changes) -> Trainer:
    """A run whose sample of the step with that number (from 1) is another, and whose loss is not finite there."""
    lists = ([batch(where.get(n, "k1"))] for n in range(1, 100))
    t = trainer(lists, **changes)
    t.objective.poison.update(dict.fromkeys(where.values(), float("nan")))
    return t


def test_bad_updates_are_passed_over_and_a_good_one_ends_the_row():
    bad = {2: "k11", 3: "k12", 5: "k13", 6: "k14"}
    t = poisoned(bad, config={"max_steps": 8, "faults": FaultsConfig(skips=2, rollbacks=0)})
    assert t.run() is Outcome.DONE
    assert [e for e in events(t) if e[0] == "update_skipped"] == [("update_skipped", n - 1) for n in bad]
    assert t.engine.weight.item() == pytest.approx(1 - 4 * 0.1 * 3)


def test_one_bad_update_too_many_sends_the_run_back_to_before_the_first_of_them():
    bad = {4: "k11", 5: "k12"}
    t = poisoned(bad, config={"save_every": 1, "faults": FaultsConfig(skips=1, rollbacks=1)})
    assert t.run() is Outcome.ROLLED_BACK
    assert not t.checkpoints.in_flight
    assert t.checkpoints.asked == [3]
    assert t.rollback.keys == ("k11", "k12")
    assert [update.step for update in t.rollback.bad] == [4, 5]
    assert [s.step for s in t.checkpoints.states] == [1, 2, 3], "a bad update leaves nothing to save"


def test_a_run_that_has_rolled_back_says_so_and_saves_that_at_once():
    bad = (BadUpdate(4, "a loss is not finite", ("k11",)),)
    state = TrainState(step=3).rolled_back(["k11"])
    t = trainer(endless(batch("k1")), state=state, rolled_back=Rollback(Path("step-00000003"), bad, 0.25))
    t.run()
    event = t.sinks[0][0]
    assert (event["event"], event["step"], event["number"], event["keys"]) == ("rolled_back", 3, 1, ["k11"])
    assert (event["skipped_samples"], event["left_out_share"]) == (1, 0.25)
    assert event["updates"] == [{"step": 4, "reason": "a loss is not finite", "keys": ["k11"]}]
    saved = t.checkpoints.states[0]
    assert (saved.step, saved.skipped, saved.rollbacks) == (3, ("k11",), 1)


def test_a_run_that_rolls_back_says_how_much_is_left_out(caplog):
    asked = []

    def left_out(keys):
        asked.append(keys)
        return [LeftOut(3, 400), LeftOut(0, 200)]

    t = poisoned({4: "k12", 5: "k11"}, state=TrainState(skipped=("k7",)), left_out=left_out, config={"faults": ONE})
    assert t.run() is Outcome.ROLLED_BACK
    assert asked == [["k11", "k12", "k7"]]
    assert t.rollback.share == 3 / 600
    assert "without these 2 samples" in caplog.text
    assert "left out 0.5 % of all samples" in caplog.text


def test_a_rollback_that_would_leave_out_more_than_allowed_ends_the_run():
    counts = [LeftOut(0, 5000), LeftOut(31, 3000)]
    t = poisoned({4: "k12", 5: "k11"}, left_out=lambda keys: counts, config={"faults": ONE})
    with pytest.raises(
        NonFiniteError, match=r"31 of the 3000 samples of dataset 1; .*skip_fraction=0\.01 allows 30\. "
    ):
        t.run()
    assert t.checkpoints.asked == []


@pytest.mark.parametrize(
    ("fraction", "skipped", "total", "fits"),
    [
        (0.01, 100, 10_000, True),
        (0.01, 101, 10_000, False),
        (0.01, 10, 24, True),  # as of a thousand
        (0.01, 11, 24, False),
        (0.01, 6, 12, True),  # half of them stay
        (0.01, 7, 12, False),
        (0.01, 1, 1, False),
        (0.0, 0, 24, True),
        (0.0, 1, 5000, False),
    ],
)
def test_how_many_samples_a_rollback_may_leave_out(fraction, skipped, total, fits):
    objection = FaultsConfig(skip_fraction=fraction).objection([LeftOut(0, 10), LeftOut(skipped, total)])
    assert (objection == "") == fits, objection


def test_a_message_names_some_samples_and_counts_the_others():
    bad = (BadUpdate(4, "x", tuple(f"k{n:03d}" for n in range(NAMED + 5))),)
    assert told(bad).endswith(f"k{NAMED - 1:03d} and 5 more")


def test_a_changed_setting_is_an_event():
    t = trainer(endless(batch("k1")), changes={"optim.lr": (0.1, 0.01)})
    t.run()
    assert t.sinks[0][0]["event"] == "settings_changed"
    assert t.sinks[0][0]["settings"] == {"optim.lr": {"from": 0.1, "to": 0.01}}


def test_an_update_that_was_refused_does_not_move_the_average():
    ema = Ema([("weight", torch.tensor(1.0))], EmaConfig())
    t = poisoned({2: "k11", 3: "k12"}, ema=ema, config={"max_steps": 4})
    t.run()
    assert ema.updates == 2


def test_what_a_rollback_needs_is_kept_when_a_bad_update_is_saved():
    def batches():
        yield [batch("k1")]
        yield [batch("k11")]
        os.kill(os.getpid(), signal.SIGTERM)
        yield [batch("k11")]

    t = trainer(batches(), config={"save_every": 1})
    t.objective.poison["k11"] = float("nan")
    assert t.run() is Outcome.STOPPED
    assert [s.step for s in t.checkpoints.states] == [1, 3]
    assert t.checkpoints.kept == [1, 1]


def test_rollbacks_are_counted_over_the_whole_run():
    t = poisoned({1: "k11"}, state=TrainState(step=4, rollbacks=2), config={"faults": FaultsConfig(skips=0)})
    with pytest.raises(NonFiniteError, match="1 in a row after 2 rollbacks"):
        t.run()


def test_a_loss_far_above_its_median_is_not_applied():
    faults = FaultsConfig(skips=1, rollbacks=0, loss_above=5.0, loss_window=3)
    lists = ([batch("k40" if n == 5 else "k1")] for n in range(1, 100))
    t = trainer(lists, learning_rate=lambda step: 0.001, config={"faults": faults, "max_steps": 6})
    t.run()
    (event,) = [r for r in t.sinks[0] if r.get("event") == "update_skipped"]
    assert event["step"] == 4
    assert event["loss"] == pytest.approx(3 * 40 * (1 - 4 * 0.001 * 3))
    assert event["keys"] == ["k40"]
    assert len(t.state.losses) == 3
    assert t.engine.weight.item() == pytest.approx(1 - 5 * 0.001 * 3)


def test_a_row_of_bad_updates_goes_on_in_a_run_that_goes_on():
    state = TrainState(step=4, bad=(BadUpdate(4, "x", ("k10",)),), losses=(1.5, 2.5))
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    t = poisoned({1: "k11"}, state=state, config={"faults": FaultsConfig(skips=1, rollbacks=1)})
    assert t.run() is Outcome.ROLLED_BACK
    assert t.rollback.keys == ("k10", "k11")


def test_a_checkpoint_of_before_there_were_rollbacks_is_read():
    old = {"step": 3, "samples": 1, "tokens": 2, "seconds": 1.0, "skipped": ["k1"]}
    assert TrainState.from_dict(old) == TrainState(step=3, samples=1, tokens=2, seconds=1.0, skipped=("k1",))


def test_the_position_is_told_at_every_point_of_a_step_and_not_outside():
    places = []
    t = trainer(steps([batch("k1"), batch("k2", "k3")]), position=places.append, config={"max_steps": 1})
    t.run()
    assert places[:2] == ["after step 0, agreeing to go on", "step 1, waiting for data"]
    assert places[2].startswith("step 1, micro-batch 1 of 2, 1 x ")
    assert places[3].startswith("step 1, micro-batch 2 of 2, 2 x ")
    assert places[4:] == ["step 1, update", "after step 1, agreeing to go on", "after step 1, log", "", ""]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skips": -1}, "faults.skips=-1"),
        ({"loss_above": 1.0}, "loss_above=1.0"),
        ({"loss_window": 0}, "loss_window=0"),
        ({"skip_fraction": 0.6}, "skip_fraction=0.6: must be between 0 and 0.5"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        FaultsConfig(**values)


def test_too_many_damaged_records_end_the_run():
    t = trainer(endless(batch("k1", "k9", bad=["k9"])), bad_fraction=0.0, config={"log_every": 1})
    with pytest.raises(DataError, match="k9: damaged"):
        t.run()


def test_damaged_records_are_counted_over_all_starts_of_a_run():
    before = TrainState(step=2, samples=1998, bad_records=19)
    changes = {"bad_fraction": 0.01, "config": {"log_every": 1, "max_steps": 4}}
    with pytest.raises(DataError, match="21 of 2002 records are damaged"):
        trainer(endless(batch("k1", "k9", bad=["k9"])), state=before, **changes).run()
    assert TrainState.from_dict(before.to_dict()).bad_records == 19


def test_a_bad_record_is_reported_by_key_and_moves_no_other_sample():
    t = trainer(steps([batch("k1", "k9", bad=["k9"]), batch("k3")]), config={"max_steps": 1})
    t.run()
    assert records(t)[0]["loss_video"] == pytest.approx((1 + 3) / 2)
    assert records(t)[0]["bad_records"] == 1
    (event,) = [r for r in t.sinks[0] if r.get("event") == "bad_record"]
    assert "k9: damaged" in event["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_that_it_fell_into_is_saved(number):
    def batches():
        for n in range(6):
            if n == 1:
                os.kill(os.getpid(), number)
            yield [batch("k1")]

    before = signal.getsignal(number)
    t = trainer(batches(), config={"log_every": 10, "save_every": 0})
    assert t.run() is Outcome.STOPPED
    assert [s.step for s in t.checkpoints.states] == [2]
    assert not t.checkpoints.in_flight
    assert [r["step"] for r in records(t)] == [1, 2]
    assert signal.getsignal(number) is before


def test_signals_are_held_until_the_last_checkpoint_is_complete():
    class Slow(Saves):
        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().wait()

    t = trainer(endless(batch("k1")), checkpoints=Slow())
    assert t.run() is Outcome.STOPPED
    assert not t.checkpoints.in_flight


def test_a_second_interrupt_ends_what_is_going_on():
    def batches():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield [batch("k1")]

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a script
    with pytest.raises(KeyboardInterrupt):
        trainer(batches()).run()
    assert signal.getsignal(signal.SIGINT) is before


def interrupted(model, step):
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


@pytest.mark.parametrize(("settings", "saved"), [({"eval_every": 2}, [2]), ({"evaluate_first": True}, [])])
def test_a_signal_during_an_evaluation_is_acted_on_before_another_step(settings, saved):
    t = trainer(endless(batch("k1")), evaluators={"heldout": interrupted}, config={"save_every": 0, **settings})
    assert t.run() is Outcome.STOPPED
    assert [s.step for s in t.checkpoints.states] == saved
    assert t.state.step == sum(saved)
    assert [s.samples for s in t.checkpoints.states] == saved


def test_an_error_in_the_middle_completes_the_checkpoint_that_is_being_written():
    def batches():
        yield [batch("k1")]
        raise OSError("the data is gone")

    t = trainer(batches(), config={"save_every": 1})
    with pytest.raises(OSError, match="the data is gone"):
        t.run()
    assert events(t) == [("checkpoint", 1)]
    assert t.checkpoints.settled == [1]


def test_an_evaluation_that_was_owed_when_the_run_ended_comes_first():
    seen = []
    evaluators = {name: lambda model, step, name=name: seen.append((name, step)) or {} for name in ("a", "b")}
    config = {"eval_every": 3}
    t = trainer(
        endless(batch("k1")), evaluators=evaluators, evaluated={(3, "a")}, config=config, state=TrainState(step=3)
    )
    t.run()
    assert seen == [("b", 3), ("a", 6), ("b", 6)]


def test_a_run_whose_last_evaluation_is_owed_is_not_finished():
    t = trainer(endless(), evaluators={"a": lambda model, step: {}}, state=TrainState(step=6))
    assert not t.finished
    assert t.run() is Outcome.DONE
    assert t.finished
    assert events(t) == [("a", 6)]


def test_a_signal_before_the_last_evaluation_leaves_the_run_unfinished():
    def batches():
        yield [batch("k1")]
        os.kill(os.getpid(), signal.SIGTERM)
        yield [batch("k1")]

    t = trainer(batches(), evaluators={"a": lambda model, step: {}}, config={"max_steps": 2})
    assert t.run() is Outcome.STOPPED
    assert [s.step for s in t.checkpoints.states] == [2]
    assert ("a", 2) not in events(t)


def test_evaluations_run_after_the_checkpoint_of_their_step_on_the_averaged_weights():
    seen = []
    average = Ema([("weight", torch.tensor(7.0))], EmaConfig())
    average.update = lambda shards: None
    t = trainer(
        endless(batch("k1")),
        ema=average,
        evaluators={"heldout": lambda model, step: seen.append((step, model(1.0).item())) or {"loss_video": 0.5}},
        config={"eval_every": 3, "evaluate_first": True},
    )
    t.run()
    assert seen == [(0, 7.0), (3, 7.0), (6, 7.0)]
    assert [e for e, _ in events(t)] == ["heldout", "checkpoint", "heldout", "checkpoint", "heldout"]
    assert t.engine.weight.item() != 7.0


def failing(model, step):
    raise RuntimeError("no such prompt")


def test_an_evaluation_that_fails_is_reported_and_training_goes_on():
    t = trainer(endless(batch("k1")), evaluators={"samples": failing}, config={"eval_every": 3})
    assert t.run() is Outcome.DONE
    reported = [r for r in t.sinks[0] if r.get("event") == "evaluation_failed"]
    assert [r["message"] for r in reported] == ["RuntimeError: no such prompt"] * 2


def told_to_all(model, step):
    error = DataError("clip 7 is damaged")
    error.agreed = True
    raise error


def test_on_several_ranks_only_a_failure_that_all_of_them_know_lets_training_go_on():
    t = trainer(endless(batch("k1")), evaluators={"heldout": told_to_all}, world=World(size=2))
    assert t.run() is Outcome.DONE
    assert events(t)[-1] == ("evaluation_failed", 6)
    alone = trainer(endless(batch("k1")), evaluators={"samples": failing}, world=World(size=2))
    with pytest.raises(RuntimeError, match="no such prompt"):
        alone.run()


def test_a_run_that_goes_on_says_so_unless_there_is_nothing_to_do():
    going_on = {"resumed": {"after": "a hang"}}
    t = trainer(endless(batch("k1")), state=TrainState(step=3), **going_on)
    t.run()
    assert t.sinks[0][0] == {"event": "resumed", "step": 3, "after": "a hang", "time": t.sinks[0][0]["time"]}
    over = trainer(endless(batch("k1")), state=TrainState(step=6), **going_on)
    over.run()
    assert not [e for e in events(over) if e[0] == "resumed"]


def test_a_strict_run_ends_with_a_failing_evaluation():
    strict = {"eval_every": 3, "strict_evaluation": True}
    t = trainer(endless(batch("k1")), evaluators={"samples": failing}, config=strict)
    with pytest.raises(RuntimeError, match="no such prompt"):
        t.run()
    assert [s.step for s in t.checkpoints.states] == [3]


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", 0), ("log_every", 0), ("save_every", -1), ("keep_last", -1), ("keep_every", -1), ("eval_every", -1)],
)
def test_a_setting_out_of_its_bound_is_named(name, value):
    with pytest.raises(ConfigError, match=rf"train\.{name}={value}"):
        TrainConfig(run_dir="x", **{name: value})


def test_state_survives_being_written_down():
    state = TrainState(step=3, samples=12, tokens=99, seconds=1.5, skipped=("a", "b"))
    assert TrainState.from_dict(state.to_dict()) == state


RUN = {
    "seed": 1,
    "optim": {"lr": 0.1, "betas": [0.9, 0.99]},
    "train": {"save_every": 5, "run_dir": "a"},
    "data": {"loader": {"num_workers": 2}, "datasets": [{"path": "x"}]},
}


def test_settings_that_do_not_change_the_result_may_change_on_resume():
    other = {**RUN, "train": {"save_every": 9, "run_dir": "b"}, "data": {**RUN["data"], "loader": {"num_workers": 7}}}
    check_same_run(defining_settings(RUN), defining_settings(other), "run/step-3")


def test_what_decides_over_an_update_defines_the_run_and_what_ends_it_does_not():
    train = {"save_every": 5, "faults": {"skips": 3, "rollbacks": 2, "loss_above": None, "skip_fraction": 0.01}}
    assert defining_settings({"train": train}) == {"train.faults.skips": 3, "train.faults.loss_above": None}


def test_a_checkpoint_of_another_run_is_refused_with_every_difference():
    other = {**RUN, "seed": 2, "optim": {"lr": 0.2, "betas": [0.9, 0.99]}}
    with pytest.raises(CheckpointError) as error:
        check_same_run(defining_settings(RUN), defining_settings(other), "run/step-3")
    assert "optim.lr: 0.1 in the checkpoint, 0.2 now" in str(error.value)
    assert "seed: 1 in the checkpoint, 2 now" in str(error.value)
    assert "betas" not in str(error.value)


def test_steps_that_wait_for_data_are_told_of_from_the_second_record_on():
    t = trainer(dawdling(0.1), config={"log_every": 1, "max_steps": 3, "save_every": 0})
    t.run()
    assert [e for e in all_events(t) if e[0] == "data_stall"] == [("data_stall", 2), ("data_stall", 3)]


def test_a_bad_last_update_sends_the_run_back_too():
    t = poisoned({6: "k11"}, config={"faults": FaultsConfig(skips=0)})
    assert t.run() is Outcome.ROLLED_BACK
    assert [s.step for s in t.checkpoints.states] == [3]


def test_a_signal_that_falls_into_a_bad_update_is_acted_on_and_the_rollback_comes_with_the_next_start():
    def batches():
        os.kill(os.getpid(), signal.SIGTERM)
        yield [batch("k11")]

    config = {"faults": FaultsConfig(skips=0)}
    t = trainer(batches(), state=TrainState(step=2), config=config)
    t.objective.poison["k11"] = float("nan")
    assert t.run() is Outcome.STOPPED
    (saved,) = t.checkpoints.states
    second = trainer(endless(batch("k1")), state=saved, config=config)
    assert second.run() is Outcome.ROLLED_BACK
    assert second.rollback.keys == ("k11",)

"""The training loop and nothing else: when things happen. How is the affair of objective, engine and sinks."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from ltx2_train.batch import Batch
from ltx2_train.data.loader import check_bad_records
from ltx2_train.diffusion.objective import Objective
from ltx2_train.distributed.engine import Engine, StepResult
from ltx2_train.distributed.world import World
from ltx2_train.errors import ConfigError, Ltx2Error, NonFiniteError
from ltx2_train.rng import BatchRng
from ltx2_train.train.checkpoint import Checkpointer, Saved
from ltx2_train.train.ema import Ema
from ltx2_train.train.faults import BadUpdate, FaultsConfig, LeftOut, Reason, Rollback, told
from ltx2_train.train.metrics import Metrics
from ltx2_train.train.signals import Signals
from ltx2_train.train.sinks import Sink
from ltx2_train.train.state import Changes, TrainState

logger = logging.getLogger(__name__)

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: saved after a signal; the same command goes on from there


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long, how often, and where to."""

    run_dir: str
    """Directory of the run: configuration, metrics, checkpoints, evaluations."""
    max_steps: int = 1000
    """Optimizer updates of the whole run, resumptions included."""
    log_every: int = 10
    """Steps between records; the first and the last step and every saved or evaluated one are recorded too."""
    save_every: int = 500
    """Steps between checkpoints; 0: only at the end. A signal saves too."""
    keep_last: int = 2
    """Newest checkpoints that stay; older ones are removed once a newer one is complete. 0: all stay."""
    keep_every: int = 0
    """Checkpoints at multiples of this step stay for good; 0: none."""
    eval_every: int = 0
    """Steps between evaluations, each after the checkpoint of its step where one is due; 0: none on the way."""
    evaluate_first: bool = False
    """Evaluate before the first step, to have something to compare with."""
    evaluate_last: bool = True
    """Evaluate after the last step."""
    strict_evaluation: bool = False
    """True: an evaluation that fails ends the run. False: it is reported and training goes on. With several ranks this
    is so for what all of them can know of: a failure of one in the middle of the model ends the run either way."""
    resume: str = "auto"
    """auto: go on from the newest complete checkpoint in run_dir, if there is one; never: start at step 0 in an empty
    run_dir; a path: go on from that checkpoint. Checkpoints note what they began with: never or a path given again goes on
    from the newest of them."""
    change: list[str] = field(default_factory=list)
    """Settings, or patterns of them (optim.*), that may differ from those of the checkpoint: the run goes on under the new
    ones, and an event says so. Without this the run is refused."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """What is done about updates that are not finite, too large or too far off."""
    hang_seconds: float = 1200.0
    """Longest time that a rank may spend in a micro-batch, an update or a wait for data. Then the run is taken to hang: it
    says where every rank is and ends with code 70, so that a launcher starts it again. Compiling falls into the first
    micro-batch. 0: for ever."""

    def __post_init__(self) -> None:
        least_values = {
            "max_steps": 1,
            "log_every": 1,
            "save_every": 0,
            "keep_last": 0,
            "keep_every": 0,
            "eval_every": 0,
        }
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be {least} or more")
        if not self.hang_seconds >= 0:
            raise ConfigError(f"train.hang_seconds={self.hang_seconds}: must be above 0, or 0 for no limit")
        if not self.resume:
            raise ConfigError("train.resume is empty: auto, never or the path of a checkpoint")


class Outcome(StrEnum):
    DONE = "done"
    STOPPED = "stopped"  # by a signal, after saving
    ROLLED_BACK = "rolled back"  # `Trainer.rollback` says where to; a trainer built from there goes on


Evaluator = Callable[[Callable[..., Any], int], dict[str, Any]]  # (model, step) -> an event's fields; all ranks call it


@dataclass(kw_only=True)
class Trainer:
    """One run. Built by the command line from parts that know nothing of each other."""

    config: TrainConfig
    seed: int
    world: World
    engine: Engine
    objective: Objective
    batches: Iterable[Sequence[Batch]]
    """One list per step, from `state.step` on: this rank's micro-batches."""
    learning_rate: Callable[[int], float]
    metrics: Metrics
    checkpoints: Checkpointer
    state: TrainState = field(default_factory=TrainState)
    ema: Ema | None = None
    sinks: Sequence[Sink] = ()
    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    evaluated: set[tuple[int, str]] = field(default_factory=set)
    """(step, name) of the evaluations that are done; what is due at `state.step` and not among them is done first."""
    bad_fraction: float = 1.0
    """Damaged records per record read from which the run ends with an error."""
    left_out: Callable[[Sequence[str]], list[LeftOut]] = lambda keys: []
    """How much of each dataset is left out with these samples."""
    changes: Changes = field(default_factory=dict)
    """Settings that differ from those of the checkpoint that the run goes on from."""
    job: dict[str, Any] = field(default_factory=dict)
    """The run's configuration as plain values, kept in every checkpoint."""
    flops: Callable[[Batch], float] = lambda batch: 0.0
    """Floating-point operations of training on one micro-batch."""
    recomputed_flops: Callable[[Batch], float] = lambda batch: 0.0
    """Those that its backward, which has just run, did again."""
    rolled_back: Rollback | None = None
    """The rollback that this trainer goes on from."""
    resumed: dict[str, Any] | None = None
    """What is told of a run that goes on from a checkpoint; None of one that starts."""
    position: Callable[[str], None] = lambda where: None
    """Told where in a step this rank is; told an empty string where it may take any time."""
    rollback: Rollback | None = field(default=None, init=False)
    """Where to go back to, after `Outcome.ROLLED_BACK`."""

    def __post_init__(self) -> None:
        self._started = time.perf_counter() - self.state.seconds
        self._bad_records: list[str] = []
        self._warm = False  # readers start and kernels are compiled in the first window: its times say nothing

    def run(self) -> Outcome:
        """Trains to `max_steps`, to a signal or to a rollback, and leaves a complete checkpoint.

        Raises `NonFiniteError` naming the samples of bad updates where another rollback is not allowed; nothing of them is
        applied. Whatever ends the run, a checkpoint that is being written is completed.
        """
        with Signals() as signals:
            try:
                if self.changes:
                    differences = {name: {"from": old, "to": new} for name, (old, new) in self.changes.items()}
                    self._emit({"event": "settings_changed", "settings": differences})
                if self.rolled_back is not None:
                    self._record_rollback(self.rolled_back)
                elif self.resumed is not None and not self.finished:
                    self._emit({"event": "resumed"} | self.resumed)
                self._run_steps(signals)
                self._report_saved(self.checkpoints.wait())
            except Exception:  # the other ranks may know nothing of it: nothing is asked of them
                self._report_saved(self.checkpoints.settle())
                raise
            finally:
                self.position("")
        if self.rollback is not None:
            return Outcome.ROLLED_BACK
        return Outcome.DONE if self.finished else Outcome.STOPPED

    @property
    def finished(self) -> bool:
        """Whether the last step is done, and what is to be evaluated after it."""
        return self.state.step >= self.config.max_steps and not self._owed() and not self._must_go_back()

    def _run_steps(self, signals: Signals) -> None:
        config, batches = self.config, iter(self.batches)
        if self._owed():
            self.evaluate()
        stop = self._told_to_stop(signals)
        while not stop and (self._must_go_back() or self.state.step < config.max_steps):
            if self._must_go_back():
                self.rollback = self._go_back()
                return
            self.train_step(batches)
            stop = self._told_to_stop(signals)
            if self._must_go_back() and not stop:
                continue
            save, evaluate = stop or self._save_due(), bool(self._owed()) and not stop
            if save or evaluate or self._due(config.log_every) or self.state.step == 1:
                self.log()
            if save:
                self.save()
            if evaluate:
                self.evaluate()
                stop = self._told_to_stop(signals)
                if stop and not save:
                    self.save()

    def train_step(self, batches: Iterator[Sequence[Batch]]) -> None:
        """One optimizer update over the micro-batches that the plan gives this rank."""
        step, begin = self.state.step, time.perf_counter()
        self.position(f"step {step + 1}, waiting for data")
        micro_batches = [batch.to(self.world.device) for batch in next(batches)]
        data_seconds = time.perf_counter() - begin
        rngs = [BatchRng(self.seed, step, batch.positions) for batch in micro_batches]
        counts = self._counts(micro_batches, rngs)
        values, shares, bound = [], [], self.config.faults.highest_loss(self.state.losses)
        for i, (batch, rng) in enumerate(zip(micro_batches, rngs, strict=True)):
            self.position(f"step {step + 1}, micro-batch {i + 1} of {len(micro_batches)}, {_spelled(batch)}")
            last = i == len(micro_batches) - 1
            losses = self.objective(self.engine.model, batch, rng)
            share = losses.total(counts)
            shares.append(share.detach())
            share = share * self._factor_below(bound, shares) if last else share
            self.engine.backward(spread_non_finite(share), last=last)
            self.metrics.record_losses(losses)
            self._record_batch(batch)
            values.append((losses.video.detach(), losses.audio.detach()))
        lr = self.learning_rate(step)
        self.position(f"step {step + 1}, update")
        result = self.engine.step(lr=lr)
        self.state = self._judged(result, bound, shares, micro_batches, values)
        if self.ema is not None and result.applied:
            self.ema.update(self.engine.shards())
        seconds = time.perf_counter() - begin
        self.metrics.record_step(seconds=seconds, data_seconds=data_seconds, grad_norm=result.norm, lr=lr)

    def log(self) -> None:
        """One record of the steps since the last one."""
        self.position(f"after step {self.state.step}, log")
        record = self.metrics.flush()
        counted = {name: record[name] for name in ("samples", "tokens", "bad_records")}
        self.state = self.state.after(**counted)
        self._emit(record)
        for event in self.metrics.lag if self._warm else []:
            self._emit(event)
        self._warm = True
        if record["bad_records"]:
            self._report_bad_records()
        self._report_saved(self.checkpoints.poll())

    def save(self) -> None:
        """A checkpoint of this step, written while training goes on."""
        self.position("")
        self.state = self.state.after(seconds=self._elapsed() - self.state.seconds)
        self._report_saved(self.checkpoints.wait())
        average = self.ema.state() if self.ema is not None else {}
        extra = {"train": self.state.to_dict(), **average}
        good = self.state.bad[0].step - 1 if self.state.bad else self.state.step
        self.checkpoints.save(self.state.step, self.engine, extra, self.job, back_to=good)

    def _report_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            size = round(saved.num_bytes / 2**20, 1)
            event = {"event": "checkpoint", "step": saved.step, "path": str(saved.directory)}
            self._emit(event | {"mib": size, "seconds": round(saved.seconds, 2)})

    def evaluate(self) -> None:
        """Runs the evaluations owed at this step on the averaged weights."""
        self.position("")
        self._report_saved(self.checkpoints.wait())  # complete first: nothing that happens here can cost it
        average = self.engine.swapped(self.ema.weights()) if self.ema is not None else contextlib.nullcontext()
        with average, torch.no_grad():
            for name in self._owed():
                self._emit(self._evaluate(name))
                self.evaluated.add((self.state.step, name))

    def _evaluate(self, name: str) -> dict[str, Any]:
        """An evaluation's event. A failure is raised if the run is strict, or if other ranks may know nothing of it:
        they may wait in a collective that this one will never call.
        """
        try:
            return {"event": name} | self.evaluators[name](self.engine.model, self.state.step)
        except Exception as error:
            everywhere = self.world.size == 1 or (isinstance(error, Ltx2Error) and error.agreed)
            if self.config.strict_evaluation or not everywhere:
                raise
            logger.exception("evaluation %s failed at step %d; training goes on", name, self.state.step)
            return {"event": "evaluation_failed", "name": name, "message": f"{type(error).__name__}: {error}"}

    def _owed(self) -> list[str]:
        """The evaluations that are due at this step and not done."""
        config, step = self.config, self.state.step
        due = self._due(config.eval_every, last=config.evaluate_last) if step else config.evaluate_first
        return [name for name in self.evaluators if due and (step, name) not in self.evaluated]

    def _counts(self, micro_batches: Sequence[Batch], rngs: Sequence[BatchRng]) -> Tensor:
        """(2,) samples of the whole step, on all ranks, that have a video and an audio loss."""
        counts = [self.objective.counts(batch, rng) for batch, rng in zip(micro_batches, rngs, strict=True)]
        return self.world.data_sum(torch.stack(counts).sum(dim=0).to(self.world.device))

    def _record_batch(self, batch: Batch) -> None:
        self.metrics.record_batch(batch, self.flops(batch), self.recomputed_flops(batch))
        self._bad_records += [f"step {self.state.step + 1}: {message}" for message in batch.errors]

    def _report_bad_records(self) -> None:
        """Every rank's bad records of the window, as events. Called on all ranks together."""
        messages, self._bad_records = self._gathered(self._bad_records), []
        for message in messages:
            self._emit({"event": "bad_record", "message": message})
        check_bad_records(self.state.bad_records, self.state.samples, self.bad_fraction, messages[0])

    def _factor_below(self, bound: float, shares: Sequence[Tensor]) -> Tensor | float:
        """1, or NaN where the step's loss is above the bound: a gradient that is not finite is not applied.

        All ranks see the same sum, and the host does not wait for it.
        """
        if bound == math.inf:
            return 1.0
        return torch.where(self._step_loss(shares) > bound, torch.nan, 1.0)

    def _step_loss(self, shares: Sequence[Tensor]) -> Tensor:
        """() the loss of the whole step, on all ranks the same."""
        return self.world.data_sum(torch.stack(list(shares)).sum())

    def _judged(
        self,
        result: StepResult,
        bound: float,
        shares: Sequence[Tensor],
        batches: Sequence[Batch],
        values: Sequence[tuple[Tensor, Tensor]],
    ) -> TrainState:
        """The state after this step. A bad update is reported."""
        faults = self.config.faults
        window = faults.loss_window if faults.loss_above is not None else 0
        if result.applied:
            return self.state.applied(float(self._step_loss(shares)) if window else 0.0, window)
        bad = [key for batch, pair in zip(batches, values, strict=True) for key in _bad_keys(batch.keys, *pair)]
        named, loss = self._gathered(bad), float(self._step_loss(shares))
        if named:
            reason = Reason.loss
        elif loss > bound:
            reason = Reason.spike
        else:
            reason = Reason.norm if math.isfinite(result.norm) else Reason.gradient
        keys = named or self._gathered([key for batch in batches for key in batch.keys])
        update = BadUpdate(self.state.step + 1, reason.value, tuple(keys))
        fields = {"reason": reason.value, "grad_norm": result.norm, "loss": loss, "keys": keys}
        self._emit({"event": "update_skipped"} | fields)
        return self.state.refused(update)

    def _must_go_back(self) -> bool:
        return len(self.state.bad) > self.config.faults.skips

    def _go_back(self) -> Rollback:
        """Where to go on from, without the samples of the bad updates. Raises `NonFiniteError` where that is not allowed."""
        self.position("")
        self._report_saved(self.checkpoints.wait())
        bad, faults = self.state.bad, self.config.faults
        keys = {key for update in bad for key in update.keys}
        left_out = self.left_out(sorted(keys.union(self.state.skipped)))
        objection, directory = faults.objection(left_out), None
        if self.state.rollbacks < faults.rollbacks and not objection:
            directory = self.checkpoints.last_before(bad[0].step - 1)
        if directory is not None:
            share = sum(n for n, _ in left_out) / max(1, sum(total for _, total in left_out))
            logger.warning("%s. Rolling back to %s without these %d samples", told(bad), directory, len(keys))
            logger.warning("rollbacks have left out %.3g %% of all samples", 100 * share)
            return Rollback(directory, bad, share)
        why = f"after {self.state.rollbacks} rollbacks" if self.state.rollbacks else "without a rollback"
        raise NonFiniteError(
            f"{told(bad)}. {len(bad)} in a row {why} (train.faults.skips={faults.skips}, rollbacks={faults.rollbacks}, each "
            f"to a checkpoint); the last checkpoint stays. {objection}{'. ' if objection else ''}Look at the samples with "
            "data_prep.show; then start the same command again with them in data.skip, or with a lower optim.lr and "
            "train.change=[optim.lr]"
        )

    def _record_rollback(self, rollback: Rollback) -> None:
        """Says what was done, and saves at once: a run that is killed here must not meet the same samples again."""
        self._emit(rollback.event(self.state.rollbacks))
        self.save()

    def _gathered(self, mine: list[str]) -> list[str]:
        """What is told of samples on all ranks, in the order of ranks. Of ranks that share samples, one is heard."""
        told = mine if self.world.counts_samples else []
        return [item for items in self.world.gather_objects(told) for item in items]

    def _told_to_stop(self, signals: Signals) -> bool:
        """Whether any rank had a signal, so that all of them stop at the same step."""
        self.position(f"after step {self.state.step}, agreeing to go on")
        stop = signals.received
        if self.world.size > 1:
            stop = bool(self.world.all_sum(torch.tensor([float(stop)], device=self.world.device)).item())
        if stop:
            logger.warning("told to stop: step %d is saved, then the run ends", self.state.step)
        return stop

    def _save_due(self) -> bool:
        """Bad updates leave nothing new to save, and must not drive the last good checkpoint out."""
        if self.state.bad and self.state.step < self.config.max_steps:
            return False
        return self._due(self.config.save_every)

    def _due(self, every: int, *, last: bool = True) -> bool:
        if self.state.step >= self.config.max_steps:
            return last
        return every > 0 and self.state.step % every == 0

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _emit(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.log({"step": self.state.step, "time": round(self._elapsed(), 3)} | record)


def spread_non_finite(loss: Tensor) -> Tensor:
    """The loss, with a NaN gradient if it is not finite.

    A loss can overflow while its gradient stays finite. With this the gradient norm, which all ranks share and which
    the engine checks anyway, tells of both, without another collective or a wait for the device.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def _bad_keys(keys: Sequence[str], *losses: Tensor) -> list[str]:
    finite = torch.stack([torch.isfinite(loss) for loss in losses]).all(dim=0).tolist()
    return [key for key, fine in zip(keys, finite, strict=True) if not fine]


def _spelled(batch: Batch) -> str:
    """A micro-batch in words: how many samples of which bucket."""
    return f"{len(batch)} x {batch.bucket}"

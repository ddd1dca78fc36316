"""`ltx2-evaluate RUN --follow`: evaluates the checkpoints of a run in a job of its own, while the run goes on."""

import argparse
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2_train.cli.schema import TrainJob
    from ltx2_train.distributed.world import World
    from ltx2_train.train.signals import Signals
    from ltx2_train.train.sinks import Sink

logger = logging.getLogger(__name__)

HELD = ".follow"  # in the run directory: the lock of whoever follows, and the checkpoint that is being read
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


Evaluate = Callable[[argparse.Namespace, "World"], Iterable[str]]  # the lines to print of one evaluation
Identity = tuple[str, int]  # name of a checkpoint, and when its manifest was written (ns)


@dataclass(frozen=True, slots=True)
class Look:
    """What is to be done next: say `lines`, then evaluate `checkpoint`, or end, or wait."""

    lines: list[str]
    checkpoint: Path | None
    ended: bool


def follow(options: argparse.Namespace, world: "World", evaluate: Evaluate) -> Iterable[str]:
    """The lines to print, until the run's last checkpoint is evaluated or a signal comes. All ranks walk through them."""
    from ltx2_train.cli.schema import CONFIG_NAME, load_job, plain
    from ltx2_train.distributed.lock import lock_directory
    from ltx2_train.distributed.world import agreed
    from ltx2_train.evals.files import FOLLOW_NAME
    from ltx2_train.train.signals import ASKING, Signals
    from ltx2_train.train.sinks import open_evaluation_sinks

    agreed(world, lambda: check(options))
    run, taken = options.run, f"{options.run}: another job follows it ({{holder}}). Wait for its end or stop it"
    with Signals(insisting=ASKING) as signals:
        if not _all_see(run / CONFIG_NAME, world):
            lacking = "" if _all_see(run, world) else f"; {run} itself is not there (is the path right?)"
            yield f"waits for {run / CONFIG_NAME}, which ltx2-train writes{lacking}"
        while not _all_see(run / CONFIG_NAME, world):
            if _told(signals, world):
                return
            signals.wait(options.poll_seconds)
        with lock_directory(run / HELD, world, taken):
            job = agreed(world, lambda: load_job(run))
            place = run / "evals" / FOLLOW_NAME
            sinks = open_evaluation_sinks(job.sinks, run, place, settings=plain(job), is_main=world.is_main)
            try:
                yield from Follower(options, world, signals, sinks, evaluate).lines()
            finally:
                for sink in sinks:
                    sink.close()


def check(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for options that do not go with --follow."""
    from ltx2_train.errors import ConfigError
    from ltx2_train.train.checkpoint import MANIFEST

    if (options.run / MANIFEST).exists():
        raise ConfigError(f"{options.run} with --follow: that is one checkpoint. Name the run directory to follow it")
    if options.out is not None:
        raise ConfigError("--out with --follow: what is in RUN/evals says which steps are measured. Leave it out")
    if not options.poll_seconds > 0:
        raise ConfigError(f"--poll-seconds {options.poll_seconds}: must be above 0")


@dataclass
class Follower:
    """Evaluates each complete checkpoint of a run once."""

    options: argparse.Namespace
    world: "World"
    signals: "Signals"
    sinks: "Sequence[Sink]"
    evaluate: Evaluate
    tried: set[Identity] = field(default_factory=set)
    """The checkpoints that this process is done with, whatever came of them."""
    waiting: set[int] = field(default_factory=set)
    """Steps that were known to wait for their evaluation when it last looked."""
    told: set[int] = field(default_factory=set)
    """Steps about which all has been said."""

    def __post_init__(self) -> None:
        self.run: Path = self.options.run
        self.begin = time.perf_counter()
        self.before = max(_saved_steps(self.run), default=-1)

    def lines(self) -> Iterable[str]:
        from ltx2_train.distributed.world import agreed

        agreed(self.world, lambda: _clear(self.run / HELD) if self.world.is_main else None)
        yield f"follows {self.run}, looking for checkpoints every {self.options.poll_seconds:g} s"
        while not _told(self.signals, self.world):
            look = agreed(self.world, lambda: self.look() if self.world.is_main else None)
            look = self.world.broadcast_object(look)
            assert look is not None
            yield from look.lines
            if look.checkpoint is not None:
                yield from self._evaluate(look.checkpoint)
            elif look.ended:
                yield f"{self.run} has ended, and its checkpoints are evaluated"
                return
            else:
                self.signals.wait(self.options.poll_seconds)
        yield "told to stop"

    def look(self) -> Look:
        """What the run directory asks for now."""
        from ltx2_train.cli.schema import load_job
        from ltx2_train.train.checkpoint import complete_checkpoints

        job = load_job(self.run)  # a run may have been made longer
        found = {}
        for checkpoint in complete_checkpoints(self.run):
            with suppress(FileNotFoundError):  # removed since it was listed
                found[_step(checkpoint)] = (checkpoint, _identity(checkpoint))
        lines = self._left_to_the_run(job, found) + self._measured_before(job, found)
        waiting = [step for step, (_, identity) in found.items() if not self._done(job, step, identity)]
        lines += self._gone({step for step in _saved_steps(self.run) if step > self.before} | self.waiting, found)
        self.waiting = set(waiting)
        choose = max if self.options.newest_first else min
        chosen = found[choose(waiting)][0] if waiting else None
        return Look(lines, chosen, not waiting and max(found, default=-1) >= job.train.max_steps)

    def _done(self, job: "TrainJob", step: int, identity: Identity) -> bool:
        """Whether nothing is to be done about a checkpoint."""
        return identity in self.tried or self._runs_own(job, step) or self._measured(job, step, identity)

    def _measured(self, job: "TrainJob", step: int, identity: Identity) -> bool:
        """Whether the files of a checkpoint's evaluation are there, and not older than it is."""
        from ltx2_train.evals.heldout import heldout_path
        from ltx2_train.evals.samples import samples_directory

        places = self._places(job)
        files = [heldout_path(place, step) for place in places]
        files += [samples_directory(place, step) / "samples.json" for place in places if self.options.samples]
        return all(path.exists() and path.stat().st_mtime_ns >= identity[1] for path in files)

    def _places(self, job: "TrainJob") -> list[Path]:
        """Of the held-out datasets that are evaluated, in their order: where in the run their evaluations lie."""
        from ltx2_train.evals.files import dataset_directory

        count = 1 if self.options.data else max(1, len(job.evaluation.datasets))
        return [dataset_directory(self.run, number) for number in range(count)]

    def _runs_own(self, job: "TrainJob", step: int) -> bool:
        """Whether the run samples this step itself, into the same folder."""
        config, evaluation = job.train, job.evaluation
        if not self.options.samples or evaluation.samples is None or not evaluation.datasets:
            return False
        if step >= config.max_steps:
            return config.evaluate_last
        return config.eval_every > 0 and step % config.eval_every == 0

    def _left_to_the_run(self, job: "TrainJob", found: Iterable[int]) -> list[str]:
        own = [step for step in sorted(found) if self._runs_own(job, step) and step not in self.told]
        self.told |= set(own)
        return [f"step {step}  left to the run, which samples it itself (evaluation.samples)" for step in own]

    def _measured_before(self, job: "TrainJob", found: Mapping[int, tuple[Path, Identity]]) -> list[str]:
        """Says which checkpoints have their files from before this start, whatever those measured."""
        before = [
            step
            for step, (_, identity) in sorted(found.items())
            if step not in self.told and identity not in self.tried and self._measured(job, step, identity)
        ]
        self.told |= set(before)
        return [f"step {step}  measured before: {self.run / 'evals'} has its files, which stay" for step in before]

    def _gone(self, saved: set[int], found: Iterable[int]) -> list[str]:
        """Says which checkpoints were removed before their turn."""
        from ltx2_train.evals.heldout import heldout_path

        lines = []
        for step in sorted(saved - set(found) - self.told):
            self.told.add(step)
            if any(_step_named(name) == step for name, _ in self.tried) or heldout_path(self.run, step).exists():
                continue
            message = "removed before its evaluation (train.keep_last)"
            lines.append(f"step {step}  {message}")
            self._log({"event": "evaluation_left_out", "step": step, "message": message})
        return lines

    def _evaluate(self, checkpoint: Path) -> Iterator[str]:
        """One evaluation. What fails in it is told, unless other ranks may know nothing of it."""
        from ltx2_train.errors import Ltx2Error

        step = _step(checkpoint)
        try:
            with held(checkpoint, self.run / HELD, self.world) as place:
                options = copy(self.options)
                options.run = place
                self._note(checkpoint)
                yield from self.evaluate(options, self.world)
            self._log_figures(step)
        except Exception as error:
            self._note(checkpoint)
            if self.world.size > 1 and not (isinstance(error, Ltx2Error) and error.agreed):
                raise
            logger.debug("evaluation of %s failed", checkpoint, exc_info=True)
            message = f"{type(error).__name__}: {error}"
            self._log({"event": "evaluation_failed", "step": step, "message": message})
            yield f"step {step}  evaluation failed, going on: {message}"

    def _note(self, checkpoint: Path) -> None:
        """That this checkpoint has had its turn; one that is gone is known by its name alone."""
        try:
            self.tried.add(_identity(checkpoint))
        except OSError:
            self.tried.add((checkpoint.name, 0))

    def _log_figures(self, step: int) -> None:
        """The events of an evaluation, as the run itself would have logged them."""
        from ltx2_train.cli.schema import load_job
        from ltx2_train.evals import files, heldout, samples

        if not self.world.is_main:
            return
        for number, run in enumerate(self._places(load_job(self.run))):
            if not heldout.heldout_path(run, step).exists():
                continue  # the checkpoint is of a time at which the run had fewer datasets
            found = json.loads(heldout.heldout_path(run, step).read_text(encoding="utf-8"))
            kinds = {name: heldout.event_figures(found[name]) for name in ("raw", "ema") if name in found}
            weights = "ema" if "ema" in kinds else "raw"
            name = files.event_name("heldout", number)
            self._log({"event": name, "step": step, "weights": weights, **kinds.pop(weights), **kinds})
            if self.options.samples:
                place = samples.samples_directory(run, step)
                summary = json.loads((place / "samples.json").read_text(encoding="utf-8"))
                name = files.event_name("samples", number)
                self._log({"event": name, "step": step, **samples.event_figures(summary, place)})

    def _log(self, event: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.log(event | {"time": round(time.perf_counter() - self.begin, 3)})


@contextmanager
def held(checkpoint: Path, place: Path, world: "World") -> Iterator[Path]:
    """The checkpoint under `place` while the context lasts, whatever the run does with it: a second name of each file.

    It takes no room on the disk. Where the file system has no hard links, the checkpoint itself is given, with a warning.
    Raises `CheckpointError` on all ranks when it is gone already.
    """
    from ltx2_train.distributed.world import agreed

    links = place / checkpoint.name
    try:
        found = agreed(world, lambda: _link(checkpoint, links) if world.is_main else None)
        found = world.broadcast_object(found)
        assert found is not None
        yield found
    finally:
        if world.is_main:
            shutil.rmtree(links, ignore_errors=True)


def _link(checkpoint: Path, links: Path) -> Path:
    from ltx2_train.errors import CheckpointError
    from ltx2_train.train.checkpoint import MANIFEST

    try:
        links.mkdir()
        for path in sorted(checkpoint.rglob("*")):
            name = links / path.relative_to(checkpoint)
            name.mkdir() if path.is_dir() else os.link(path, name)
        (links / MANIFEST).stat()
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} was removed before it could be read. Raise train.keep_last") from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        logger.warning("%s: no hard links here (%s); the run may remove it while it is read", checkpoint, error)
        return checkpoint
    return links


def _clear(place: Path) -> None:
    """Removes what a job that was killed had held."""
    for links in place.glob("step-*"):
        shutil.rmtree(links)


def _saved_steps(run: Path) -> set[int]:
    """The steps whose checkpoints the run says to have completed."""
    from ltx2_train.evals.runrecord import METRICS_NAME, json_lines

    path = run / METRICS_NAME
    lines = json_lines(path) if path.exists() else []
    return {line["step"] for line in lines if line.get("event") == "checkpoint"}


def _step(checkpoint: Path) -> int:
    return _step_named(checkpoint.name)


def _step_named(name: str) -> int:
    return int(name.removeprefix("step-"))


def _identity(checkpoint: Path) -> Identity:
    """A checkpoint that is saved anew under the same step is another one."""
    from ltx2_train.train.checkpoint import MANIFEST

    return checkpoint.name, (checkpoint / MANIFEST).stat().st_mtime_ns


def _all_see(path: Path, world: "World") -> bool:
    return all(world.gather_objects(path.exists()))


def _told(signals: "Signals", world: "World") -> bool:
    """Whether any rank was told to stop, so that all of them end together."""
    return any(world.gather_objects(signals.received))

"""The training program as a user starts it, `launch/torchrun.sh -m ltx2_train.cli.train ...`, watched and killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ltx2_train.train.checkpoint import PARTIAL, checkpoint_directory, complete_checkpoints
from tests.proofs.exactness import ROOT, descendants, records

PATIENCE = 600.0  # s for anything that is waited for, on a machine that does other things too
GLANCE = 0.02  # s between two looks at a run directory

Seen = set[tuple[int, int, str]]  # (step, position in the global batch, sample id)


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a run: its launcher, and what was written while it lasted."""

    launcher: subprocess.Popen
    run: Path
    log: Path
    witness: Path

    def said(self) -> str:
        """What all its processes said."""
        return self.log.read_text()

    def samples(self) -> Seen:
        """What it trained on, and what it was about to train on when it ended."""
        lines = [line for path in sorted(self.witness.iterdir()) for line in path.read_text().splitlines()]
        steps = [json.loads(line) for line in lines]
        return {(step["step"], position, key) for step in steps for position, key in step["samples"]}

    def wait(self) -> int:
        """The exit code of the launcher."""
        try:
            return self.launcher.wait(PATIENCE)
        finally:
            self.kill()

    def finish(self) -> None:
        """Waits for its end. Raises `SystemExit` unless that is a good one."""
        if code := self.wait():
            raise SystemExit(f"{self.run} ended with {code}:\n{self.said()[-3000:]}")

    def until(self, is_so: Callable[[], bool], what: str, glance: float = GLANCE) -> None:
        """Looks until it is so. Raises `SystemExit` when the program ends before that, or it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise SystemExit(f"{self.run}: waited in vain for {what}:\n{self.said()[-3000:]}")
            time.sleep(glance)

    def workers(self) -> list[int]:
        """The processes that train, which torchrun started."""
        return descendants(self.launcher.pid)

    def kill(self) -> None:
        """SIGKILL to the launcher and all its processes, at once; nothing where they have ended."""
        kill_all([self.launcher.pid, *self.workers()] if self.launcher.poll() is None else [])
        self.launcher.wait()


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start(processes: int, run: Path, settings: list[str]) -> Start:
    """Starts the program in the run directory that the settings name; logs and witnesses lie beside that."""
    place = next(
        run.with_name(f"{run.name}.{i}") for i in range(10**6) if not run.with_name(f"{run.name}.{i}").exists()
    )
    witness = place / "witness"
    witness.mkdir(parents=True)
    path = os.pathsep.join([str(Path(__file__).with_name("witness")), str(ROOT)])
    mine = {"NPROC": str(processes), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment = os.environ | mine | {"PYTHONPATH": path, "WITNESS": str(witness)}
    command = [str(ROOT / "launch" / "torchrun.sh"), "-m", "ltx2_train.cli.train", *settings]
    with (place / "log").open("w") as log:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
    return Start(launcher, run, place / "log", witness)


def last_step(run: Path) -> int:
    """The last step that is logged whole; 0 without one."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    steps = [record["step"] for record in map(json.loads, lines) if "event" not in record]
    return max(steps, default=0)


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    return max((int(path.name.split("-")[1]) for path in complete_checkpoints(run)), default=0)


def half_written(run: Path) -> dict[str, int]:
    """Files of checkpoints that are not complete, with their bytes."""
    return dict(_sizes(run / "checkpoints"))


def _sizes(root: Path) -> Iterator[tuple[str, int]]:
    for path in root.glob(f"{PARTIAL}step-*/*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            yield f"{path.parent.name}/{path.name}", path.stat().st_size


def kill_in_a_step(begun: Start, saved: int) -> str:
    """SIGKILL to one of the processes, as the kernel does when memory is short, after checkpoint `saved`."""
    begun.until(lambda: checkpoint_directory(begun.run, saved).is_dir(), f"checkpoint {saved}")
    logged = last_step(begun.run)
    begun.until(lambda: last_step(begun.run) > logged, f"step {logged + 1}")
    kill_all(begun.workers()[-1:])
    code = begun.wait()
    return f"one process killed after step {last_step(begun.run)} was logged; torchrun ended with {code}"


def kill_in_a_write(begun: Start, saved: int, written: int) -> str:
    """SIGKILL to all processes while checkpoint `written` is half on disk and `saved` is the newest complete one."""
    begun.until(lambda: checkpoint_directory(begun.run, saved).is_dir(), f"checkpoint {saved}")
    pids = [begun.launcher.pid, *begun.workers()]
    partial = f"{PARTIAL}{checkpoint_directory(begun.run, written).name}/"
    begun.until(
        lambda: any(name.startswith(partial) and size for name, size in half_written(begun.run).items()),
        f"the first bytes of checkpoint {written}",
        glance=0.001,
    )
    kill_all(pids)
    begun.launcher.wait()
    left = {name: size for name, size in half_written(begun.run).items() if name.startswith(partial)}
    if not left or checkpoint_directory(begun.run, written).exists():
        raise TooLate(f"{begun.run}: checkpoint {written} was complete before the signal came")
    return f"all killed with {len(left)} files, {sum(left.values()):,} bytes in {partial} and no manifest of theirs"


class TooLate(Exception):
    """What was to be interrupted was over already."""


def stop(begun: Start, saved: int) -> str:
    """SIGTERM to the launcher, as a scheduler sends it, after checkpoint `saved`."""
    begun.until(lambda: checkpoint_directory(begun.run, saved).is_dir(), f"checkpoint {saved}")
    logged = last_step(begun.run)
    begun.until(lambda: last_step(begun.run) > logged, f"step {logged + 1}")
    begun.launcher.send_signal(signal.SIGTERM)
    code = begun.wait()
    if newest_step(begun.run) != last_step(begun.run):
        raise SystemExit(f"{begun.run}: stopped at step {last_step(begun.run)}, saved {newest_step(begun.run)}")
    return f"told to stop, saved step {newest_step(begun.run)} and ended with {code}"


def largest_difference(first: Path, second: Path, names: tuple[str, ...], steps: int) -> float:
    """Relative, over the named figures of steps 1 to `steps`, each of which both runs have logged once."""
    a, b = records(first), records(second)
    for run, found in ((first, a), (second, b)):
        if (numbers := [record["step"] for record in found]) != list(range(1, steps + 1)):
            raise SystemExit(f"{run}: it has steps {numbers} instead of 1 to {steps}")
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in names if x[name] is not None]
    return max(abs(x - y) / abs(x) for x, y in pairs)

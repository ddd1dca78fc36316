"""A run is killed again and again at random, and loses nothing but the steps since its last checkpoint.

python -m tests.proofs.soak [--kills 20] [--seed 0] [--engines fsdp2,zero3] [--processes 1,2] [--out FILE]

Trains the tiny model through `launch/torchrun.sh`, kills all its processes with SIGKILL at a random moment, in a step or in
the middle of a checkpoint, and starts it again, on a number of processes drawn anew each time. Prints one JSON line per kill
and one per engine, and exits non-zero when one of these does not hold:
- a checkpoint that was said to be complete is there after the kill, and the run goes on from the newest;
- less than two intervals between checkpoints are done again;
- a step that is done again has the loss it had (1e-4 relative, fp32: the number of processes changes the order of sums);
- at the end every step stands in metrics.jsonl once.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx2_train.train.checkpoint import complete_checkpoints
from tests.proofs.exactness import BOUND, descendants, settings, start, write_data

SAVE_EVERY = 5
LONGEST = 4.0  # s from the first step of a start to its kill
PATIENCE = 240.0  # s for a start to make its first step, on a machine that does other things too


@dataclass
class Soak:
    """One run under one engine, and what was seen of it."""

    engine: str
    data: Path
    run: Path
    losses: dict[int, float] = field(default_factory=dict)
    """Of every step, as it was logged first."""
    difference: float = 0.0
    """Largest relative difference of a loss from the first one of its step."""
    again: list[int] = field(default_factory=list)
    """Steps that each kill cost."""

    def start(self, processes: int) -> subprocess.Popen:
        more = ("train.max_steps=1000000", f"train.save_every={SAVE_EVERY}", "train.keep_last=3")
        return start(processes, *settings(self.data, self.run, *more, f"engine.backend={self.engine}"))

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, now."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def steps(self) -> list[int]:
        return [record["step"] for record in self.records() if "event" not in record]

    def newest(self) -> int:
        """The step of the newest complete checkpoint; 0 without one."""
        return max((int(path.name.split("-")[1]) for path in complete_checkpoints(self.run)), default=0)

    def mark(self) -> tuple[int, int]:
        """Changes when metrics.jsonl does. A start begins by cutting it back to its checkpoint."""
        path = self.run / "metrics.jsonl"
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else (0, 0)

    def await_step(self, process: subprocess.Popen, step: int, before: tuple[int, int]) -> None:
        """Until this start logs the step. `before`: the mark before the start."""
        deadline = time.monotonic() + PATIENCE
        while self.mark() == before or max(self.steps(), default=0) < step:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.engine}: the run ended, or did not come to step {step} (see {self.run})")
            time.sleep(0.05)

    def compare(self) -> None:
        """Holds every logged loss against the first one of its step."""
        for record in self.records():
            if "event" not in record:
                first = self.losses.setdefault(record["step"], record["loss"])
                self.difference = max(self.difference, abs(record["loss"] - first) / abs(first))

    def kill(self, number: int, processes: int, wait: float) -> dict[str, Any]:
        """One start and its end."""
        begin, before = self.newest(), self.mark()
        process = self.start(processes)
        try:
            self.await_step(process, begin + 1, before)
            time.sleep(wait)
        finally:
            kill_all(process)
        self.compare()
        told = max((r["step"] for r in self.records() if r.get("event") == "checkpoint"), default=0)
        last, newest = max(self.steps()), self.newest()
        if newest < told or last - newest >= 2 * SAVE_EVERY:
            raise SystemExit(
                f"{self.engine}, kill {number}: step {last}, checkpoint {told} was told of, {newest} is there"
            )
        self.again.append(last - newest)
        seen = {"processes": processes, "from_step": begin, "killed_at_step": last, "checkpoint": newest}
        return {"engine": self.engine, "kill": number, **seen, "steps_again": last - newest}

    def finish(self, processes: int) -> dict[str, Any]:
        """The last start is stopped in order. Gives the figures of all of them."""
        goal, before = self.newest() + SAVE_EVERY, self.mark()
        process = self.start(processes)
        try:
            self.await_step(process, goal, before)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
        finally:
            kill_all(process)
        self.compare()
        steps = self.steps()
        if steps != list(range(1, steps[-1] + 1)):
            raise SystemExit(f"{self.engine}: metrics.jsonl has not every step once")
        if self.difference > BOUND:
            raise SystemExit(f"{self.engine}: a step that was done again has another loss, by {self.difference:.1e}")
        figures = {"kills": len(self.again), "steps": steps[-1], "most_steps_again": max(self.again)}
        mean = round(sum(self.again) / len(self.again), 2)
        return {"engine": self.engine, **figures, "mean_steps_again": mean, "difference": self.difference}


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and its workers; nothing where they have ended."""
    if process.poll() is None:
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def soak(engine: str, data: Path, run: Path, kills: int, sizes: list[int], seed: int) -> list[dict[str, Any]]:
    """The kills of one engine and their figures, printed as they come."""
    draw, state = random.Random(f"{seed} {engine}"), Soak(engine, data, run)
    lines = []
    for number in range(1, kills + 1):
        lines.append(state.kill(number, draw.choice(sizes), draw.uniform(0, LONGEST)))
        print(json.dumps(lines[-1]), flush=True)
    begin = time.monotonic()
    lines.append(state.finish(draw.choice(sizes)) | {"last_start_seconds": round(time.monotonic() - begin, 1)})
    print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each engine")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the numbers of processes")
    parser.add_argument("--engines", default="fsdp2,zero3")
    parser.add_argument("--processes", default="1,2", help="numbers of processes that are drawn from")
    parser.add_argument("--out", type=Path, help="the printed lines, as a file")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "latents")
        for engine in arguments.engines.split(","):
            sizes = [int(size) for size in arguments.processes.split(",")]
            lines += soak(engine, data, Path(folder) / engine, arguments.kills, sizes, arguments.seed)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

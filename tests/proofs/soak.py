"""One run is killed again and again at random, and is still the run that nothing interrupts.

python -m tests.proofs.soak [--kills 20] [--seed 0] [--engines fsdp2,zero3] [--processes 1,2] [--out FILE]

Trains the tiny model through `launch/torchrun.sh`, kills all its processes with SIGKILL at a random moment, in a step or in
the middle of a checkpoint, and starts it again, under an engine and on a number of processes that are drawn anew each time.
At the end the same steps are trained straight on one process. Prints a row per kill and one of the whole, and exits non-zero
when one of these does not hold:
- a checkpoint that was said to be complete is there after the kill, and the next start goes on from the newest;
- less than two intervals between checkpoints are done again;
- every start is trained on the samples of the straight run: the same ids at the same places of the same steps;
- every loss that was ever logged, of steps that are done again too, is that of the straight run (1e-4 relative, fp32: the
  number of processes changes the order of sums);
- at the end every step stands in metrics.jsonl once.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.proofs.exactness import BOUND, records, settings, write_data
from tests.proofs.program import Seen, Start, half_written, last_step, newest_step, start

SAVE_EVERY = 5
MOST_STEPS = 12  # that a start makes before it is killed


@dataclass
class Soak:
    """One run, and what was seen of it."""

    data: Path
    run: Path
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) as logged, of every start."""
    samples: Seen = field(default_factory=set)
    """Of every start."""
    again: list[int] = field(default_factory=list)
    """Steps that each kill cost."""

    def settings(self, engine: str, *more: str) -> list[str]:
        lengths = ("train.max_steps=1000000", f"train.save_every={SAVE_EVERY}", "train.keep_last=3")
        return settings(self.data, self.run, *lengths, f"engine.backend={engine}", *more)

    def mark(self) -> tuple[int, int]:
        """Changes when metrics.jsonl does. A start begins by cutting it back to its checkpoint."""
        path = self.run / "metrics.jsonl"
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else (0, 0)

    def begin(self, engine: str, processes: int, steps: int) -> Start:
        """Starts the program and waits until it has logged so many steps of its own."""
        saved, before = newest_step(self.run), self.mark()
        begun = start(processes, self.run, self.settings(engine))
        begun.until(lambda: self.mark() != before and last_step(self.run) >= saved + steps, f"step {saved + steps}")
        if saved and f"(step {saved})" not in begun.said():
            begun.kill()
            raise SystemExit(f"a start did not go on from step {saved}:\n{begun.said()[-3000:]}")
        return begun

    def note(self, begun: Start) -> None:
        """What a start that has ended was trained on, and the losses that stand in the log."""
        self.samples |= begun.samples()
        self.losses += [(record["step"], record["loss"]) for record in steps_of(self.run)]

    def kill(self, engine: str, processes: int, moment: float) -> dict[str, Any]:
        """One start and its end, `moment` steps after its first: within a step, however fast the machine is."""
        saved = newest_step(self.run)
        begun = self.begin(engine, processes, steps=1 + int(moment))
        time.sleep(moment % 1 * steps_of(self.run)[-1]["step_seconds"])
        begun.kill()
        self.note(begun)
        told = max((r["step"] for r in whole_records(self.run) if r.get("event") == "checkpoint"), default=0)
        last, newest = last_step(self.run), newest_step(self.run)
        if newest < told or last - newest >= 2 * SAVE_EVERY:
            raise SystemExit(f"step {last}, checkpoint {told} was told of, {newest} is there")
        self.again.append(max(0, last - newest))  # a checkpoint may be complete before its step is logged
        seen = {"from": saved, "killed at": last, "checkpoint": newest, "again": self.again[-1]}
        return {"engine": engine, "processes": processes} | seen | {"in a write": bool(half_written(self.run))}

    def finish(self, engine: str, processes: int) -> int:
        """The last start is stopped in order; its last step."""
        begun = self.begin(engine, processes, steps=SAVE_EVERY)
        begun.launcher.send_signal(signal.SIGTERM)
        begun.wait()
        self.note(begun)
        steps = [record["step"] for record in records(self.run)]
        if steps != list(range(1, newest_step(self.run) + 1)):
            raise SystemExit("metrics.jsonl has not every step up to the last checkpoint once")
        return steps[-1]

    def compare(self, steps: int) -> dict[str, Any]:
        """Trains the same steps straight on one process, and holds against them what was seen."""
        straight = Soak(self.data, self.run.with_name("straight"))
        begun = start(1, straight.run, straight.settings("fsdp2", f"train.max_steps={steps}"))
        begun.finish()
        expected = {record["step"]: record["loss"] for record in records(straight.run)}
        compared = [(expected[step], loss) for step, loss in self.losses if step in expected]
        wanted = begun.samples()
        found = {entry for entry in self.samples if entry[0] < steps}
        difference = max(abs(one - other) / abs(one) for one, other in compared)
        figures = {"kills": len(self.again), "steps": steps, "losses": len(compared), "difference": difference}
        again = {"steps again": sum(self.again), "at most": max(self.again)}
        holds = found == wanted and difference <= BOUND
        return figures | again | {"samples": len(found), "ids identical": found == wanted, "holds": holds}


def whole_records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl: a kill may have cut the last."""
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().split("\n")[:-1]]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in whole_records(run) if "event" not in record]


def line(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.1e}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, engines and numbers of processes")
    parser.add_argument("--engines", default="fsdp2,zero3", help="engines that are drawn from")
    parser.add_argument("--processes", default="1,2", help="numbers of processes that are drawn from")
    parser.add_argument("--out", type=Path, help="the rows, as lines of JSON")
    arguments = parser.parse_args()
    draw, begin, rows = random.Random(arguments.seed), time.monotonic(), list[dict[str, Any]]()
    engines, sizes = arguments.engines.split(","), [int(size) for size in arguments.processes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(write_data(Path(folder) / "latents"), Path(folder) / "run")
        for number in range(1, arguments.kills + 1):
            row = soak.kill(draw.choice(engines), draw.choice(sizes), draw.uniform(0, MOST_STEPS))
            rows.append({"kill": number} | row | {"seconds": round(time.monotonic() - begin)})
            print(line(rows[-1]), flush=True)
        steps = soak.finish(draw.choice(engines), draw.choice(sizes))
        rows.append(soak.compare(steps) | {"seconds": round(time.monotonic() - begin)})
    print(line(rows[-1]))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0 if rows[-1]["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

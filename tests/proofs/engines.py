"""Every arrangement of processes trains the same model, and goes on exactly after it is killed: shown with figures.

python -m tests.proofs.engines [--out FILE]

Two tables, fp32 on gloo, of the tiny audio-video model on generated latents:
- parity: each arrangement against one process over 8 steps, full and LoRA: largest relative difference of losses and
  gradient norms, and of the moving average's tensors at the end;
- kills: {FSDP2, ZeRO-3} on two processes x {kill -9 in a step, kill -9 in a checkpoint write, SIGTERM} x resumed on
  {2, 1, 4} processes, against the same steps straight. Sample ids are identical; losses and norms are bit-equal on as
  many processes, and within the bound on others, where sums are taken in another order.
An arrangement that this installation lacks is a failure. Exits non-zero when a bound is broken. About ten minutes on
two cores.
"""

import argparse
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ltx2_train.distributed.engine import EngineConfig
from ltx2_train.distributed.fsdp2 import saved_weights
from ltx2_train.distributed.world import World
from ltx2_train.model import build
from ltx2_train.model.build import initial_weights
from ltx2_train.rng import generator
from ltx2_train.testing import run_on_ranks
from ltx2_train.train.checkpoint import checkpoint_directory, newest_complete
from tests.proofs.exactness import records, settings, write_data

STEPS, SAVE_EVERY = 8, 3
BOUND = 1e-4  # relative, fp32
LOSSES, NORMS = ("loss", "loss_video", "loss_audio"), ("grad_norm",)
MODES = {"full": (), "LoRA": ("lora=all", "lora.rank=4")}

ARRANGEMENTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "FSDP2 x2": (2, ()),
    "FSDP2 x4": (4, ()),
    "HSDP 2x2": (4, ("engine.replicate=2",)),
    "ZeRO-3 x2": (2, ("engine.backend=zero3",)),
    "Ulysses x2": (2, ("engine.sequence=2",)),
    "FSDP2 x2 with Ulysses x2": (4, ("engine.sequence=2",)),
    "ZeRO-3 x2 with Ulysses x2": (4, ("engine.backend=zero3", "engine.sequence=2")),
}

BACKENDS = {"FSDP2": "engine.backend=fsdp2", "ZeRO-3": "engine.backend=zero3"}
KILLED_ON, RESUMED_ON = 2, (2, 1, 4)
FAULT_STEP = 4  # counted from 0; nothing is saved between it and the checkpoint before
FAULTS = {"kill -9 in a step": SAVE_EVERY, "kill -9 in a checkpoint write": SAVE_EVERY, "SIGTERM": FAULT_STEP + 1}
"""What happens, and the step of the checkpoint that is left."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the whole training program on some ranks."""

    directory: Path
    data: Path
    more: tuple[str, ...]

    def settings(self) -> list[str]:
        lengths = [f"train.max_steps={STEPS}", f"optim.total_steps={STEPS}", f"train.save_every={SAVE_EVERY}"]
        return settings(self.data, self.directory, *lengths, *self.more)


Seen = set[tuple[int, int, str]]  # (step, position in the global batch, sample id)


def train_all(world: World, runs: list[Run], fault: str | None = None) -> list[Seen]:
    """Trains the runs one after the other, from wherever each stands; the samples that this rank saw."""
    from ltx2_train.cli.train import train
    from tests.unit.cli.commands import composed

    seen = []
    for run in runs:
        with patch.object(build, "initial_weights", perturbed), watched(fault) as samples:
            train(composed(*run.settings()), world)
        seen.append(samples)
    return seen


def perturbed(model: nn.Module, config: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Weights as of a trained model: none of them zero, so that a gradient reaches every parameter from the first step."""
    for name, tensor in initial_weights(model, config, seed):
        yield name, tensor + 0.05 * torch.randn(tensor.shape, generator=generator("perturbed", name))


@contextmanager
def watched(fault: str | None) -> Iterator[Seen]:
    """Notes every sample that is trained on; sends the fault's signal to the last rank in the middle of a step."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from ltx2_train.train.trainer import Trainer

    record, finish, seen = Trainer._record_batch, FileSystemWriter.finish, Seen()

    def recorded(trainer: Any, batch: Any) -> None:
        step, world = trainer.state.step, trainer.world
        seen.update((step, position, key) for position, key in zip(batch.positions, batch.keys, strict=True))
        if fault in SIGNALS and step == FAULT_STEP and world.rank == world.size - 1:
            await_checkpoint(trainer.checkpoints.run_dir)
            os.kill(os.getpid(), SIGNALS[fault])
        record(trainer, batch)

    def finished(writer: Any, *args: Any, **kwargs: Any) -> None:
        if fault == "kill -9 in a checkpoint write" and f"{2 * SAVE_EVERY:08d}" in str(writer.path):
            os.kill(os.getpid(), signal.SIGKILL)
        finish(writer, *args, **kwargs)

    with patch.object(Trainer, "_record_batch", recorded), patch.object(FileSystemWriter, "finish", finished):
        yield seen


def await_checkpoint(run_dir: Path) -> None:
    """Checkpoints are written while training goes on: the first must be complete to be gone on from."""
    deadline = time.monotonic() + 120
    while not checkpoint_directory(run_dir, SAVE_EVERY).is_dir():
        assert time.monotonic() < deadline, "the first checkpoint was never completed"
        time.sleep(0.02)


SIGNALS = {"kill -9 in a step": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


def on_ranks(size: int, runs: list[Run], fault: str | None = None) -> list[Seen]:
    """The samples of each run, over all ranks."""
    by_rank = run_on_ranks(train_all, size, runs, fault, timeout=600)
    return [set().union(*seen) for seen in zip(*by_rank, strict=True)]


def largest_difference(first: Path, second: Path, names: tuple[str, ...]) -> float:
    """Relative, over the named figures of all steps."""
    a, b = records(first), records(second)
    steps = [record["step"] for record in b]
    if steps != list(range(1, STEPS + 1)):
        raise SystemExit(f"{second}: it has steps {steps} instead of 1 to {STEPS}")
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in names if x[name] is not None]
    return max(abs(x - y) / abs(x) for x, y in pairs)


def average_difference(first: Path, second: Path) -> float:
    """Between two runs' moving averages at the end: largest, of each tensor relative to its largest element."""
    a, b = (dict(saved_weights(checkpoint_directory(run, STEPS), averaged="ema")) for run in (first, second))
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-12)).item() for n in a)


def prove_parity(home: Path, data: Path) -> Iterator[dict[str, Any]]:
    """One claim per arrangement and mode."""
    reference = next(iter(ARRANGEMENTS))
    for name, (size, more) in ARRANGEMENTS.items():
        if lacking := missing(more):
            yield {"arrangement": name, "not there": lacking, "holds": False}
            continue
        runs = {mode: Run(home / f"{name}-{mode}".replace(" ", "-"), data, (*more, *MODES[mode])) for mode in MODES}
        try:
            on_ranks(size, list(runs.values()))
        except Exception as error:
            yield {"arrangement": name, "failed": last_line(error), "holds": False}
            continue
        for mode, run in runs.items() if name != reference else ():
            one = home / f"{reference}-{mode}".replace(" ", "-")
            yield compared(name, mode, one, run.directory)


def compared(name: str, mode: str, one: Path, other: Path) -> dict[str, Any]:
    figures = {
        "loss": largest_difference(one, other, LOSSES),
        "norm": largest_difference(one, other, NORMS),
        "ema": average_difference(one, other),
    }
    return {"arrangement": name, "mode": mode} | figures | {"holds": max(figures.values()) <= BOUND}


def missing(more: tuple[str, ...]) -> str:
    """What an arrangement needs and is not there."""
    asked = dict(setting.removeprefix("engine.").split("=") for setting in more)
    if lacking := asked.keys() - {field.name for field in fields(EngineConfig)}:
        return f"engine.{lacking.pop()}"
    return "deepspeed" if asked.get("backend") == "zero3" and find_spec("deepspeed") is None else ""


def prove_kills(home: Path, data: Path) -> Iterator[dict[str, Any]]:
    """One claim per engine, fault and number of processes that go on."""
    engines = {name: more for name, more in BACKENDS.items() if not missing((more,))}
    yield from (
        {"engine": name, "not there": missing((BACKENDS[name],)), "holds": False}
        for name in BACKENDS
        if name not in engines
    )
    straight = {name: Run(home / f"{name}-straight", data, (more,)) for name, more in engines.items()}
    seen = dict(zip(straight, on_ranks(KILLED_ON, list(straight.values())), strict=True))
    killed = {(name, fault): kill(home, data, name, fault) for name in engines for fault in FAULTS}
    for size in RESUMED_ON:
        resumed = {cell: copied(run, f"on{size}") for cell, run in killed.items()}
        gone_on = on_ranks(size, list(resumed.values()))
        for (name, fault), samples in zip(resumed, gone_on, strict=True):
            claim = {"engine": name, "fault": fault, "resumed on": size}
            one, other = straight[name].directory, resumed[name, fault].directory
            yield claim | went_on(one, other, seen[name], samples, FAULTS[fault], exact=size == KILLED_ON)


def kill(home: Path, data: Path, name: str, fault: str) -> Run:
    """A run on two processes that the fault has ended."""
    run = Run(home / f"{name}-{fault}".replace(" ", "-"), data, (BACKENDS[name],))
    try:
        on_ranks(KILLED_ON, [run], fault)
    except Exception as error:
        if fault == "SIGTERM":
            raise
        print(f"  {name}, {fault}: {last_line(error)}", flush=True)
    left = newest_complete(run.directory)
    if left != checkpoint_directory(run.directory, FAULTS[fault]):
        raise SystemExit(f"{name}, {fault}: {left} is the newest checkpoint, step {FAULTS[fault]} was expected")
    return run


def copied(run: Run, suffix: str) -> Run:
    directory = run.directory.with_name(f"{run.directory.name}-{suffix}")
    shutil.copytree(run.directory, directory)
    return Run(directory, run.data, run.more)


def went_on(one: Path, other: Path, expected: Seen, samples: Seen, start: int, *, exact: bool) -> dict[str, Any]:
    """How a resumed run compares with a straight one."""
    same = samples == {entry for entry in expected if entry[0] >= start}
    figures = {"loss": largest_difference(one, other, LOSSES), "norm": largest_difference(one, other, NORMS)}
    holds = same and max(figures.values()) <= (0 if exact else BOUND)
    return {"samples": len(samples), "ids identical": same} | figures | {"holds": holds}


def last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][:100]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the lines here, as JSON")
    parser.add_argument("--only", choices=["parity", "kills"], help="one of the two tables")
    arguments = parser.parse_args()
    begin, claims = time.monotonic(), []
    tables = {"parity": prove_parity, "kills": prove_kills}
    with tempfile.TemporaryDirectory() as directory:
        data = write_data(Path(directory) / "latents")
        for name, prove in tables.items():
            for claim in prove(Path(directory), data) if arguments.only in (None, name) else ():
                print(line(claim), flush=True)
                claims.append(claim)
    held = sum(claim["holds"] for claim in claims)
    print(f"{held} of {len(claims)} hold (bound {BOUND:g}, relative), {time.monotonic() - begin:.0f} s")
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(claim) + "\n" for claim in claims))
    if held < len(claims):
        raise SystemExit(1)


def line(claim: dict[str, Any]) -> str:
    """A row of the table."""
    widths = {"arrangement": 26, "engine": 8, "mode": 6, "fault": 30}
    return "  ".join(
        str(value).ljust(widths[key])
        if key in widths
        else f"{key} {value:.1e}"
        if isinstance(value, float)
        else f"{key} {value}"
        for key, value in claim.items()
    )


if __name__ == "__main__":
    main()

"""Every arrangement of processes trains the same model, and goes on exactly after it is killed: shown with figures.

python -m tests.proofs.engines [--only parity,kills,damage,lora] [--out FILE]

Four tables, on gloo, of the tiny audio-video model (of small_30m in the last) on generated latents:
- parity: each arrangement against one process over 8 steps, fp32, full and LoRA: largest relative difference of losses and
  gradient norms, and of the moving average's tensors at the end. In processes that this one starts;
- kills: `launch/torchrun.sh -m ltx2_train.cli.train ...` as a user starts it, {FSDP2, ZeRO-3} on two processes x {SIGKILL to
  one process in a step, SIGKILL to all while a checkpoint is half on disk, SIGTERM} x gone on with on {2, 1, 4} processes,
  against the same 16 steps straight. Sample ids are identical; losses and norms are bit-equal on as many processes, and
  within the bound on others, where sums are taken in another order;
- damage: a bit of the newest checkpoint is flipped; the program says so, goes on from the one before, and ends with the
  same bits;
- lora: rank 32 beside a bf16 base against full training of the same model, 5 steps on one process: peak memory above that of
  the start, size of a checkpoint; the base is bit-equal before and after.
An arrangement that this installation lacks is a failure. Exits non-zero when a bound is broken.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ltx2_train.distributed.engine import EngineConfig
from ltx2_train.distributed.saved import saved_weights
from ltx2_train.distributed.world import World
from ltx2_train.model import build
from ltx2_train.model.build import initial_weights
from ltx2_train.model.config import named_config
from ltx2_train.record import Bucket
from ltx2_train.rng import generator
from ltx2_train.testing import run_on_ranks
from ltx2_train.testing.shards import random_sample, write_latent_dataset
from ltx2_train.train.checkpoint import checkpoint_directory, complete_checkpoints
from ltx2_train.train.metrics import peak_memory_gb
from tests.proofs.exactness import settings, write_data
from tests.proofs.program import (
    Seen,
    Start,
    TooLate,
    kill_in_a_step,
    kill_in_a_write,
    largest_difference,
    newest_step,
    start,
    stop,
)

STEPS = 8
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
KILLED_STEPS, SAVE_EVERY = 16, 4
FAULTS = {
    "kill -9 in a step": partial(kill_in_a_step, saved=SAVE_EVERY),
    "kill -9 in a checkpoint write": partial(kill_in_a_write, saved=SAVE_EVERY, written=2 * SAVE_EVERY),
    "SIGTERM": partial(stop, saved=SAVE_EVERY),
}
TRIES = 5  # to come while a checkpoint is being written
LORA_STEPS = 5


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the whole training program on some ranks."""

    directory: Path
    data: Path
    more: tuple[str, ...]

    def settings(self, steps: int = STEPS, save_every: int = 0) -> list[str]:
        lengths = [f"train.max_steps={steps}", f"optim.total_steps={steps}", f"train.save_every={save_every}"]
        return settings(self.data, self.directory, *lengths, *self.more)


def train_all(world: World, runs: list[Run]) -> None:
    """Trains the runs one after the other."""
    from ltx2_train.cli.train import train
    from tests.unit.cli.commands import composed

    for run in runs:
        with patch.object(build, "initial_weights", perturbed):
            train(composed(*run.settings()), world)


def perturbed(model: nn.Module, config: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Weights as of a trained model: none of them zero, so that a gradient reaches every parameter from the first step."""
    for name, tensor in initial_weights(model, config, seed):
        yield name, tensor + 0.05 * torch.randn(tensor.shape, generator=generator("perturbed", name))


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
            run_on_ranks(train_all, size, list(runs.values()), timeout=600)
        except Exception as error:
            yield {"arrangement": name, "failed": last_line(error), "holds": False}
            continue
        for mode, run in runs.items() if name != reference else ():
            one = home / f"{reference}-{mode}".replace(" ", "-")
            yield compared(name, mode, one, run.directory)


def compared(name: str, mode: str, one: Path, other: Path) -> dict[str, Any]:
    figures = {
        "loss": largest_difference(one, other, LOSSES, STEPS),
        "norm": largest_difference(one, other, NORMS, STEPS),
        "ema": average_difference(one, other),
    }
    return {"arrangement": name, "mode": mode} | figures | {"holds": max(figures.values()) <= BOUND}


def missing(more: tuple[str, ...]) -> str:
    """What an arrangement needs and is not there."""
    asked = dict(setting.removeprefix("engine.").split("=") for setting in more)
    if lacking := asked.keys() - {field.name for field in fields(EngineConfig)}:
        return f"engine.{lacking.pop()}"
    return "deepspeed" if asked.get("backend") == "zero3" and find_spec("deepspeed") is None else ""


def begin(processes: int, run: Run) -> Start:
    """Starts the program on a run of the length that is killed."""
    return start(processes, run.directory, run.settings(KILLED_STEPS, SAVE_EVERY))


def straight(home: Path, data: Path, name: str) -> tuple[Run, Seen]:
    """The run of an engine that nothing interrupts, and what it was trained on."""
    run = Run(home / f"{name}-straight", data, (BACKENDS[name],))
    begun = begin(KILLED_ON, run)
    begun.finish()
    return run, begun.samples()


def prove_kills(home: Path, data: Path) -> Iterator[dict[str, Any]]:
    """One claim per engine, fault and number of processes that go on."""
    for name, more in BACKENDS.items():
        if lacking := missing((more,)):
            yield {"engine": name, "not there": lacking, "holds": False}
            continue
        whole, expected = straight(home, data, name)
        for fault in FAULTS:
            run, before = killed(home, data, name, fault)
            if not before <= expected:
                raise SystemExit(f"{run.directory}: trained on samples that the straight run never met")
            for size in RESUMED_ON:
                claim = {"engine": name, "fault": fault, "resumed on": size}
                yield claim | went_on(whole, copied(run, f"on{size}"), expected, size)


def killed(home: Path, data: Path, name: str, fault: str) -> tuple[Run, Seen]:
    """A run on two processes that the fault has ended, and what it was trained on."""
    for number in range(TRIES):
        run = Run(home / f"{name}-{fault}-{number}".replace(" ", "-"), data, (BACKENDS[name],))
        begun = begin(KILLED_ON, run)
        try:
            evidence = FAULTS[fault](begun)
        except TooLate as late:
            print(f"  {late}; once more", flush=True)
            continue
        print(f"  {name}, {fault}: {evidence}", flush=True)
        return run, begun.samples()
    raise SystemExit(f"{name}, {fault}: too late {TRIES} times")


def copied(run: Run, suffix: str) -> Run:
    directory = run.directory.with_name(f"{run.directory.name}-{suffix}")
    shutil.copytree(run.directory, directory)
    return Run(directory, run.data, run.more)


def went_on(whole: Run, run: Run, expected: Seen, size: int) -> dict[str, Any]:
    """Goes on with a killed run on `size` processes, and compares it with the straight one."""
    saved = newest_step(run.directory)
    begun = begin(size, run)
    begun.finish()
    if f"(step {saved})" not in begun.said():
        raise SystemExit(f"{run.directory} did not go on from step {saved}:\n{begun.said()[-3000:]}")
    samples = begun.samples()
    same = samples == {entry for entry in expected if entry[0] >= saved}
    one, other = whole.directory, run.directory
    figures = {kind: largest_difference(one, other, n, KILLED_STEPS) for kind, n in (("loss", LOSSES), ("norm", NORMS))}
    holds = same and max(figures.values()) <= (0 if size == KILLED_ON else BOUND)
    counts = {"from step": saved, "samples": len(samples), "ids identical": same}
    return counts | figures | {"holds": holds}


def prove_damage(home: Path, data: Path) -> Iterator[dict[str, Any]]:
    """One claim per engine: a flipped bit is found, told of, and costs the steps since the checkpoint before."""
    for name, more in BACKENDS.items():
        if lacking := missing((more,)):
            yield {"engine": name, "not there": lacking, "holds": False}
            continue
        whole = Run(home / f"{name}-sound", data, (more,))
        begin(KILLED_ON, whole).finish()
        run = copied(whole, "damaged")
        newest, before = complete_checkpoints(run.directory)[:2]
        hurt = flip(newest)
        begun = begin(KILLED_ON, run)
        begun.finish()
        told = next((text for text in begun.said().splitlines() if "DAMAGED CHECKPOINT" in text), "")
        print("  " + told.replace(str(home), "..."), flush=True)
        is_told = hurt.name in told and f"going on from {before}" in begun.said()
        difference = largest_difference(whole.directory, run.directory, LOSSES + NORMS, KILLED_STEPS)
        claim = {"engine": name, "damaged": f"{newest.name}/{hurt.name}", "gone on from": before.name}
        yield claim | {"loss and norm": difference, "holds": is_told and difference == 0}


def flip(checkpoint: Path) -> Path:
    """Flips one bit in the middle of the checkpoint's last shard."""
    shard = max(checkpoint.glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    return shard


def prove_lora(home: Path, data: Path) -> Iterator[dict[str, Any]]:
    """One claim per engine and mode, of a model that is large enough for its weights to show in the memory."""
    config = named_config("small_30m")
    widths = (config.video_connector_width, config.audio_connector_width)
    samples = [random_sample(f"s{i:02d}", Bucket(3, 2, 2, 13), text_widths=widths) for i in range(16)]
    write_latent_dataset(home / "wide", samples)
    saved: dict[tuple[str, str], float] = {}
    for name, more in BACKENDS.items():
        if lacking := missing((more,)):
            yield {"engine": name, "not there": lacking, "holds": False}
            continue
        for mode, lora in (("full", ()), ("LoRA", ("lora=all", "lora.rank=32"))):
            place = home / f"{name}-bf16-{mode}"
            small = ("data.plan.max_samples=1", "data.plan.micro_batches_per_step=1", "ema=null")
            run = Run(place, home / "wide", (more, "model=small_30m", "engine.precision=bf16", *small, *lora))
            ((above, moved, frozen),) = run_on_ranks(memory, 1, run, timeout=600)
            (event,) = [event for event in events(place) if event["event"] == "checkpoint"]
            saved[name, mode] = event["mib"]
            figures = {"MiB above start": round(above), "MiB saved": round(event["mib"]), "frozen tensors": frozen}
            holds = not moved and (mode == "full" or (frozen > 0 and event["mib"] < saved[name, "full"]))
            yield {"engine": name, "mode": mode} | figures | {"moved": moved, "holds": holds}


def memory(world: World, run: Run) -> tuple[float, int, int]:
    """Of a run: its peak in MiB above what the process held, and how many of how many frozen tensors have moved."""
    from ltx2_train.cli import train as program
    from tests.unit.cli.commands import composed

    job, held, open_engine = composed(*run.settings(LORA_STEPS)), peak_memory_gb("cpu"), program.open_engine
    engines, before = [], dict[str, str]()

    def opened(*args: Any, **kwargs: Any) -> Any:
        engines.append(open_engine(*args, **kwargs))
        before.update(frozen(engines[0]))
        return engines[0]

    with patch.object(program, "open_engine", opened):
        program.train(job, world)
    above = 1024 * (peak_memory_gb("cpu") - held)
    after = frozen(engines[0])
    assert before.keys() == after.keys()
    return above, sum(before[name] != after[name] for name in after), len(after)


def frozen(engine: Any) -> dict[str, str]:
    """Hashes of the frozen tensors' bits, on rank 0."""
    trained = {name for name, _ in engine.shards()}
    return {
        name: sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in engine.full_weights()
        if name not in trained and tensor.numel()
    }


def events(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "event" in line]


def last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][:100]


TABLES = {"parity": prove_parity, "kills": prove_kills, "damage": prove_damage, "lora": prove_lora}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the lines here, as JSON")
    parser.add_argument("--only", default=",".join(TABLES), help="tables, separated by commas")
    arguments = parser.parse_args()
    begun, claims = time.monotonic(), []
    with tempfile.TemporaryDirectory() as directory:
        data = write_data(Path(directory) / "latents")
        for name in arguments.only.split(","):
            print(f"{name}:", flush=True)
            for claim in TABLES[name](Path(directory), data):
                print(line(claim), flush=True)
                claims.append({"table": name} | claim)
            print(f"  {time.monotonic() - begun:.0f} s so far", flush=True)
    held = sum(claim["holds"] for claim in claims)
    print(f"{held} of {len(claims)} hold (bound {BOUND:g}, relative), {time.monotonic() - begun:.0f} s")
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

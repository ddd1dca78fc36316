"""A run is a function of (config, seed): shown on whole programs, with figures.

python -m tests.proofs.exactness [--out FILE]

Trains the tiny model on generated latents through `launch/torchrun.sh` and prints one JSON line per claim:
- one process, killed with SIGKILL and resumed, against the same steps straight: bit-equal losses and weights;
- one process against two and four (gloo), same global batches: identical sample keys and sigmas, largest relative
  difference of losses and gradient norms;
- killed on two processes, resumed on one, against one straight.
Exits non-zero when a bound is broken.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ltx2_train.cli.train import open_datasets
from ltx2_train.data.loader import Loader, LoaderConfig
from ltx2_train.data.plan import Plan
from ltx2_train.diffusion.objective import Objective
from ltx2_train.distributed.saved import saved_weights
from ltx2_train.distributed.world import World
from ltx2_train.model.build import transformer_config
from ltx2_train.record import Bucket
from ltx2_train.rng import BatchRng
from ltx2_train.testing import run_on_ranks
from ltx2_train.testing.shards import random_sample, write_latent_dataset
from ltx2_train.train.checkpoint import complete_checkpoints

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED = 6, 3
BOUND = 1e-4  # relative, fp32
COMPARED = ("loss", "loss_video", "loss_audio", "grad_norm")


def settings(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "model=tiny",
        f"data.datasets.0.path={data}",
        "data.plan.max_samples=2",
        "data.plan.micro_batches_per_step=4",
        "data.loader.num_workers=0",
        "objective.caption_dropout=0.2",
        f"train.max_steps={STEPS}",
        "train.log_every=1",
        f"train.save_every={SAVED}",
        "train.keep_last=0",
        "train.evaluate_last=false",
        f"train.run_dir={run}",
        "optim.lr=1e-3",
        "optim.warmup_steps=2",
        f"optim.total_steps={STEPS}",
        "sinks.wandb=false",
        *more,
    ]


def write_data(directory: Path) -> Path:
    """Clips of two sizes, some without sound, some single images, texts of three lengths."""
    buckets = [Bucket(3, 2, 2, 13)] * 5 + [Bucket(2, 1, 2, 9)] * 3 + [Bucket(3, 2, 2, 0), Bucket(1, 2, 2, 0)]
    samples = [
        random_sample(f"s{i:03d}", buckets[i % len(buckets)], text_length=3 + i % 3, text_widths=(40, 20))
        for i in range(120)
    ]
    directory.mkdir(parents=True)
    write_latent_dataset(directory, samples)
    return directory


def start(processes: int, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"NPROC": str(processes), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = [str(ROOT / "launch" / "torchrun.sh"), "-m", "ltx2_train.cli.train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(processes: int, *arguments: str) -> None:
    code = start(processes, *arguments).wait(timeout=600)
    if code:
        raise SystemExit(f"{processes} processes ended with {code}: {' '.join(arguments)}")


def kill_after_checkpoint(processes: int, run: Path, *arguments: str) -> int:
    """SIGKILL to every process as soon as a checkpoint is complete; returns its step."""
    process = start(processes, *arguments)
    deadline = time.monotonic() + 300
    while not complete_checkpoints(run):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the run ended before it was killed")
        time.sleep(0.005)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return max(int(path.name.split("-")[1]) for path in complete_checkpoints(run))


def descendants(pid: int) -> list[int]:
    """torchrun gives its workers sessions of their own, so a process group does not reach them."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines())}
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [further for child in found for further in descendants(child)]


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def largest_difference(first: Path, second: Path) -> float:
    """Relative, over all compared figures of all steps. Raises when the runs have other steps."""
    a, b = records(first), records(second)
    if [r["step"] for r in a] != list(range(1, STEPS + 1)) or len(a) != len(b):
        raise SystemExit(f"steps {[r['step'] for r in a]} against {[r['step'] for r in b]}")
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in COMPARED if x[name] is not None]
    return max(abs(x - y) / abs(x) for x, y in pairs)


def same_weights(first: Path, second: Path) -> bool:
    """Bit-equal weights and averages in the last checkpoints of two runs."""
    for averaged in (None, "ema"):
        a, b = (dict(saved_weights(max(complete_checkpoints(run)), averaged=averaged)) for run in (first, second))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return False
    return True


def draws(world: World, data: str) -> list[list[tuple[int, str, float, float]]]:
    """(position, key, video sigma, audio sigma) of every sample that this rank sees, per step."""
    from tests.unit.cli.commands import composed

    job = composed(*settings(Path(data), Path("unused")))
    datasets, _ = open_datasets(job, transformer_config(job.model))
    plan = Plan([d.index for d in datasets], None, job.data.plan)
    objective = Objective(job.objective, datasets[0].null_text, True)
    loader = Loader(datasets, plan, world.rank, world.size, 0, LoaderConfig(num_workers=0))
    steps = []
    for step, batches in zip(range(STEPS), loader, strict=False):
        rows = []
        for batch in batches:
            task = objective.prepare(batch, BatchRng(job.seed, step, batch.positions))
            sigmas = zip(task.video.sigma.tolist(), task.audio.sigma.tolist(), strict=True)
            rows += [(p, k, v, a) for p, k, (v, a) in zip(batch.positions, batch.keys, sigmas, strict=True)]
        steps.append(rows)
    return steps


def drawn(size: int, data: Path) -> list[list[tuple[int, str, float, float]]]:
    """The same, of all ranks together, in the order of the global batch."""
    by_rank = run_on_ranks(draws, size, str(data))
    return [sorted(row for rank in by_rank for row in rank[step]) for step in range(STEPS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the lines here")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory:
        claims = prove(Path(directory))
    lines = [json.dumps(claim) for claim in claims]
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    if not all(claim["holds"] for claim in claims):
        raise SystemExit(1)


def prove(home: Path) -> list[dict[str, Any]]:
    data, one = write_data(home / "latents"), home / "one"
    finish(1, *settings(data, one))
    killed = home / "killed"
    step = kill_after_checkpoint(1, killed, *settings(data, killed, "train.max_steps=100000"))
    first = min(complete_checkpoints(killed))
    finish(1, *settings(data, killed, f"train.resume={first}"))
    difference, bits = largest_difference(one, killed), same_weights(one, killed)
    claims: list[dict[str, Any]] = [
        {
            "claim": f"{STEPS} steps straight == SIGKILL (at checkpoint {step}) + resume from step {SAVED}, one process",
            "largest_relative_difference": difference,
            "weights_bit_equal": bits,
            "holds": difference == 0 and bits,
        }
    ]
    expected = drawn(1, data)
    for size in (2, 4):
        run = home / f"on{size}"
        finish(size, *settings(data, run))
        difference, same = largest_difference(one, run), drawn(size, data) == expected
        claims.append(
            {
                "claim": f"1 process == {size} processes, {STEPS} steps",
                "samples": sum(map(len, expected)),
                "keys_and_sigmas_identical": same,
                "largest_relative_difference": difference,
                "holds": same and difference <= BOUND,
            }
        )
    moved = home / "moved"
    step = kill_after_checkpoint(2, moved, *settings(data, moved, "train.max_steps=100000"))
    finish(1, *settings(data, moved, f"train.resume={min(complete_checkpoints(moved))}"))
    difference = largest_difference(one, moved)
    claim = f"killed on 2 processes (SIGKILL at checkpoint {step}), resumed on 1 from step {SAVED} == 1 straight"
    claims.append({"claim": claim, "largest_relative_difference": difference, "holds": difference <= BOUND})
    return claims


if __name__ == "__main__":
    main()

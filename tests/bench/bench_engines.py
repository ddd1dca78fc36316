"""A LoRA step of a released architecture under each recompute policy and with ZeRO-3's weights in host memory.

python -m tests.bench.bench_engines [--model ltx2_19b] [--clip 768x512x121] [--only full,zero3] [--steps 4] [--out FILE]

For a machine with GPUs: one process per GPU, each case a start of its own, so that no case sees another's memory. Rank 32,
bf16 base, one clip with sound per process. Weights are random; each tensor is drawn on the device, sharded and dropped.
Prints, per case, as the run's own metrics have them: seconds of a step (median, the first left out), peak memory of the
fullest device, MFU, HFU, and the peak of host memory. What does not fit the device is said; any other failure makes the
exit status 1. `--model tiny` without a GPU rehearses all of it on the CPU.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ltx2_train import geometry
from ltx2_train.distributed.world import World, close_world, init_world
from ltx2_train.model import build, named_config
from ltx2_train.record import Bucket
from ltx2_train.testing.shards import random_sample, write_latent_dataset

ROOT = Path(__file__).resolve().parents[2]
FPS, CAPTION_TOKENS = 24.0, 128
CASES = {
    "none": ("engine=gpu", "engine.recompute=none"),
    "every_n": ("engine=gpu", "engine.recompute=every_n"),
    "selective": ("engine=gpu", "engine.recompute=selective"),
    "budget": ("engine=gpu", "engine.recompute=budget", "engine.recompute_budget_gb=40"),
    "full": ("engine=gpu", "engine.recompute=full"),
    "zero3": ("engine=zero3", "engine.offload=all"),
}
SHOWN = ("step_seconds", "peak_memory_gb", "host_gb", "tflops_per_second", "mfu", "hfu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ltx2_19b", help="a named configuration")
    parser.add_argument("--clip", default="768x512x121", help="width x height x frames")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--steps", type=int, default=4, help="the first is left out of the figures")
    parser.add_argument("--out", type=Path, help="also write the lines here, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a start of its own measures
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments)
        return 0
    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "CPU, a rehearsal: no figure below is one of a GPU"
    print(f"{arguments.model}, LoRA rank 32, {arguments.clip}, on {device}", flush=True)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        write_clips(Path(folder) / "latents", arguments.model, arguments.clip)
        for case in arguments.only.split(","):
            lines.append({"case": case} | started(case, arguments, Path(folder)))
            print(row(lines[-1]), flush=True)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(line | {"device": device}) + "\n" for line in lines))
    return int(any("failed" in line for line in lines))


def write_clips(directory: Path, model: str, clip: str) -> None:
    """Latents of clips of this size, with sound, and text features as wide as the model's."""
    width, height, frames = map(int, clip.split("x"))
    config = named_config(model)
    height, width = geometry.latent_size(height), geometry.latent_size(width)
    bucket = Bucket(geometry.latent_frames(frames), height, width, geometry.audio_latent_length(frames, FPS))
    widths = (config.video_connector_width, config.audio_connector_width)
    length = min(CAPTION_TOKENS, build.context_tokens(build.ModelConfig(name=model)))
    names = [f"clip{i:02d}" for i in range(16)]
    write_latent_dataset(
        directory, [random_sample(n, bucket, text_length=length, text_widths=widths, fps=FPS) for n in names]
    )


def started(case: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a start of its own measures."""
    given = ["--model", arguments.model, "--steps", str(arguments.steps), "--case", case, "--folder", str(folder)]
    command = [str(ROOT / "launch" / "torchrun.sh"), "-m", "tests.bench.bench_engines", *given]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if answer.returncode == 0:
        return json.loads((folder / f"{case}.json").read_text())
    if "OutOfMemoryError" in answer.stderr or "out of memory" in answer.stderr:
        return {"does not fit": True}
    return {"failed": answer.stderr.strip()[-2000:]}


def measure(arguments: argparse.Namespace) -> None:
    """Trains some steps and leaves the figures of the run's metrics."""
    from ltx2_train.cli.train import train
    from tests.unit.cli.commands import composed

    world, run = init_world(), arguments.folder / arguments.case
    common = settings(arguments.model, arguments.folder / "latents", run, arguments.steps, world.size)

    def drawn(model: nn.Module, *_: Any) -> Iterator[tuple[str, Tensor]]:
        return random_weights(model, world)

    try:
        with patch.object(build, "initial_weights", drawn):
            train(composed(*CASES[arguments.case], *common), world)
    finally:
        close_world()
    if world.is_main:
        (arguments.folder / f"{arguments.case}.json").write_text(json.dumps(figures(run)))


def settings(model: str, data: Path, run: Path, steps: int, processes: int) -> list[str]:
    return [
        f"model={model}",
        "model.train_connectors=false",
        "lora=all",
        "lora.rank=32",
        f"data.datasets.0.path={data}",
        "data.plan.max_samples=1",
        "data.plan.max_tokens=1000000",
        f"data.plan.micro_batches_per_step={processes}",
        "data.loader.num_workers=0",
        "ema=null",
        f"train.run_dir={run}",
        f"train.max_steps={steps}",
        "train.log_every=1",
        "train.save_every=0",
        "train.evaluate_last=false",
        "sinks.wandb=false",
    ]


def random_weights(model: nn.Module, world: World) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every parameter, drawn where it is used, one at a time and on all ranks the same."""
    generator = torch.Generator(world.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        yield name, 0.02 * torch.randn(parameter.shape, device=world.device, generator=generator)


def figures(run: Path) -> dict[str, Any]:
    """Medians over the steps but the first; peaks as they were at the end."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    records = [line for line in lines if "event" not in line]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"host_gb": host, "peak_memory_gb": records[-1]["peak_memory_gb"]}
    for name in ("step_seconds", "tflops_per_second", "mfu", "hfu"):
        values = [record[name] for record in records[1:] if record.get(name) is not None]
        found[name] = statistics.median(values) if values else None
    return found


def row(line: dict[str, Any]) -> str:
    """A row of the table."""
    if "step_seconds" not in line:
        return f"{line['case']:<10} " + "  ".join(f"{name}: {value}" for name, value in line.items() if name != "case")
    shown = (f"{name} {'-' if line[name] is None else format(line[name], '.3g')}" for name in SHOWN)
    return f"{line['case']:<10} " + "  ".join(shown)


if __name__ == "__main__":
    sys.exit(main())

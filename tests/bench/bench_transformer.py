"""Forward + backward of our transformer against diffusers', with the same weights, paired in one run.

python -m tests.bench.bench_transformer [--pairs 8] [--threads 2]

Prints, per configuration, the median of ours, of theirs and of the pairwise ratio ours / theirs, and the memory that each
adds at its peak (measured in a process of its own). Speed is shown here and asserted nowhere.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from ltx2_train.model import Transformer, named_config
from ltx2_train.model.init import initial_tensor
from tests.peers.diffusers_transformer import peer_arguments, peer_of, random_inputs

CASES = {  # batch, video latent grid, audio steps, text tokens
    "demo": (16, (6, 2, 2), 43, 16),
    "small_30m": (4, (6, 4, 4), 43, 64),
}


def ours(name: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(named_config(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(initial_tensor(key, parameter.shape, 0) + 0.02 * torch.randn(parameter.shape))
    return model


def step(call) -> float:
    """Seconds of one forward + backward."""
    start = time.perf_counter()
    video, audio = call()
    (video.square().mean() + audio.square().mean()).backward()
    return time.perf_counter() - start


def calls(name: str):
    model = ours(name)
    peer = peer_of(model)
    video, audio = random_inputs(model.config, *CASES[name])
    arguments = peer_arguments(video, audio)
    return (lambda: model(video, audio)), (lambda: peer(**arguments, return_dict=False))


def compare(name: str, pairs: int) -> dict[str, float]:
    mine, theirs = calls(name)
    for _ in range(2):
        step(mine), step(theirs)
    times = [(step(mine), step(theirs)) for _ in range(pairs)]
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in times),
        "diffusers_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }


def status(field: str) -> float:
    """A memory figure of this process, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak(name: str, which: int) -> float:
    """Megabytes that a forward + backward adds to this process at its peak, weights and gradients not counted."""
    call = calls(name)[which]
    for _ in range(2):
        step(call)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    step(call)
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(arguments.peak[0], int(arguments.peak[1])))
        return
    for name in CASES:
        figures = compare(name, arguments.pairs)
        for key, which in (("ours_peak_mb", 0), ("diffusers_peak_mb", 1)):
            command = [sys.executable, "-m", "tests.bench.bench_transformer", "--peak", name, str(which)]
            figures[key] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rounded = {key: round(value, 2) for key, value in figures.items()}
        print(json.dumps({"config": name, "parameters": sum(p.numel() for p in ours(name).parameters()), **rounded}))


if __name__ == "__main__":
    main()

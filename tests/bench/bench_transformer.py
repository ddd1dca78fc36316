"""Forward + backward of our transformer against diffusers', with the same weights, paired in one run.

python -m tests.bench.bench_transformer [--pairs 8] [--threads 2]

Prints, per configuration, the median of ours, of theirs and of the pairwise ratio ours / theirs, and the memory that each
forward keeps for its backward, which decides the peak. Speed is shown here and asserted nowhere.
"""

import argparse
import json
import statistics
import time
from functools import cache

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


@cache
def models(name: str) -> tuple[Transformer, torch.nn.Module]:
    model = ours(name)
    return model, peer_of(model)


def calls(name: str):
    model, peer = models(name)
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


def saved_mb(name: str, which: int) -> float:
    """Megabytes that a forward keeps for its backward: distinct storages of saved tensors, parameters left out.

    What the process holds says little at these sizes: the allocator keeps freed memory.
    """
    call = calls(name)[which]
    parameters = {p.untyped_storage().data_ptr() for p in models(name)[which].parameters()}
    saved: dict[int, int] = {}
    keep = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(saved.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in CASES:
        figures = compare(name, arguments.pairs)
        figures |= {"ours_saved_mb": saved_mb(name, 0), "diffusers_saved_mb": saved_mb(name, 1)}
        rounded = {key: round(value, 2) for key, value in figures.items()}
        print(json.dumps({"config": name, "parameters": sum(p.numel() for p in ours(name).parameters()), **rounded}))


if __name__ == "__main__":
    main()

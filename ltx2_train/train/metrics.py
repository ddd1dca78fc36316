"""Numbers of the run: kept on the device as tensors, and brought together by one collective when a record is due."""

import resource
import sys
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ltx2_train.batch import Batch
from ltx2_train.diffusion.objective import Losses
from ltx2_train.distributed.world import World

SIGMA_BINS = 10
_SUMS = (  # added up over micro-batches and ranks
    "samples",
    "tokens",
    "flops",
    "recomputed_flops",
    "bad_records",
    "retried_reads",
    "seconds",
)
_PER_RANK = (
    "step_seconds",
    "data_seconds",
    "peak_memory_gb",
)  # one slot per rank: the slowest and the fullest are told
STRAGGLES = 1.2  # step time of the slowest rank over the median from which it is named
STALLS = 0.1  # share of its step time that a rank waits for data from which it is named
NOTICED = 0.05  # s per step from which it is worth a line


class Metrics:
    """Collects one window of steps; `flush` gives its record and opens the next.

    Losses are means over all samples of the window on all ranks, per modality and per tenth of the sigma range. A
    stream that is given or missing has weight 0 and is in no bin. Of ranks that share samples, one counts them.
    """

    def __init__(self, world: World, device: torch.device | str = "cpu", peak_flops: float | None = None):
        self.world, self.device, self.peak_flops = world, device, peak_flops
        self.lag: list[dict[str, Any]] = []  # events of the last window: ranks that hold the others up
        self._open()

    def _open(self) -> None:
        # (modality, bin, (count, sum)); fp64, so that neither the order of ranks nor a long window shows
        self.bins = torch.zeros(2, SIGMA_BINS, 2, dtype=torch.float64, device=self.device)
        self.sums = dict.fromkeys(_SUMS, 0.0)
        self.per_rank = dict.fromkeys(_PER_RANK, 0.0)
        self.latest: dict[str, float] = {}
        self.weights = (1.0, 1.0)
        self.steps = 0

    def record_losses(self, losses: Losses) -> None:
        """Adds the samples of one micro-batch. Stays on the device."""
        self.weights = (losses.weight_video, losses.weight_audio)
        if not self.world.counts_samples:
            return
        self.bins[0] += _binned(losses.video, losses.has_video, losses.sigma_video)
        self.bins[1] += _binned(losses.audio, losses.has_audio, losses.sigma_audio)

    def record_batch(self, batch: Batch, flops: float = 0.0, recomputed_flops: float = 0.0) -> None:
        """Counts the samples, tokens, bad records and retried reads of one micro-batch.

        `flops` that training needs, `recomputed_flops` that its backward ran again.
        """
        if not self.world.counts_samples:
            return
        self.sums["samples"] += len(batch)
        self.sums["tokens"] += len(batch) * batch.bucket.tokens
        self.sums["bad_records"] += len(batch.errors)
        self.sums["retried_reads"] += batch.retried_reads
        self.sums["flops"] += flops
        self.sums["recomputed_flops"] += recomputed_flops

    def record_step(self, *, seconds: float, data_seconds: float, **latest: float) -> None:
        """Closes one step: its times, and values of which the last stands for the window (`grad_norm`, `lr`)."""
        self.steps += 1
        self.sums["seconds"] += seconds
        self.per_rank["step_seconds"] += seconds
        self.per_rank["data_seconds"] += data_seconds
        self.latest |= latest

    def flush(self) -> dict[str, Any]:
        """The record of the window, equal on all ranks: one all-reduce and one copy to the host."""
        self.per_rank["peak_memory_gb"] = peak_memory_gb(self.device)
        bins, sums, per_rank = self._reduce()
        record = self._losses(bins) | self.latest | self._speed(sums, per_rank)
        self.lag = lag(per_rank["step_seconds"], per_rank["data_seconds"], max(self.steps, 1))
        self._open()
        return record

    def _reduce(self) -> tuple[Tensor, dict[str, float], dict[str, list[float]]]:
        slots = torch.zeros(len(_PER_RANK), self.world.size, dtype=torch.float64)
        slots[:, self.world.rank] = torch.tensor([self.per_rank[name] for name in _PER_RANK])
        host = torch.cat([torch.tensor([self.sums[n] for n in _SUMS], dtype=torch.float64), slots.flatten()])
        total = self.world.all_sum(torch.cat([self.bins.flatten(), host.to(self.device)])).cpu()
        bins, sums, slots = total.split([self.bins.numel(), len(_SUMS), slots.numel()])
        rows = slots.view(len(_PER_RANK), -1).tolist()
        named_sums = dict(zip(_SUMS, sums.tolist(), strict=True))
        return bins.view_as(self.bins), named_sums, dict(zip(_PER_RANK, rows, strict=True))

    def _losses(self, bins: Tensor) -> dict[str, Any]:
        video, audio = (_mean(*stream.sum(dim=0).tolist()) for stream in bins)
        total = sum(w * x for w, x in zip(self.weights, (video, audio), strict=True) if x is not None)
        video_rows, audio_rows = ([[int(n), _mean(n, s)] for n, s in stream.tolist()] for stream in bins)
        rows = {"video": video_rows, "audio": audio_rows}
        return {"loss": total, "loss_video": video, "loss_audio": audio, "sigma_bins": rows}

    def _speed(self, sums: dict[str, float], per_rank: dict[str, list[float]]) -> dict[str, Any]:
        seconds = sums["seconds"] / self.world.size
        rate = 1.0 / seconds if seconds > 0 else 0.0
        speed = {
            "samples": int(sums["samples"]),
            "tokens": int(sums["tokens"]),
            "bad_records": int(sums["bad_records"]),
            "retried_reads": int(sums["retried_reads"]),
            "tokens_per_second": sums["tokens"] * rate,
            "samples_per_second": sums["samples"] * rate,
            "step_seconds": seconds / max(self.steps, 1),
            "data_seconds": max(per_rank["data_seconds"]) / max(self.steps, 1),
            "peak_memory_gb": max(per_rank["peak_memory_gb"]),
            "tflops_per_second": sums["flops"] * rate / 1e12,
        }
        if self.peak_flops is not None:
            peak = self.peak_flops * self.world.size
            speed["mfu"] = sums["flops"] * rate / peak
            speed["hfu"] = (sums["flops"] + sums["recomputed_flops"]) * rate / peak
        return speed


def lag(step_seconds: list[float], data_seconds: list[float], steps: int = 1) -> list[dict[str, Any]]:
    """Events for what is out of bounds in a window of steps: a rank slower than the others, a rank that waits for data.

    Seconds per rank, of the whole window. Ranks wait for each other in every step, so that a slow device shows in the step
    times of all; what a rank does alone, such as reading, shows in its own.
    """
    events: list[dict[str, Any]] = []
    slowest, waiting = (seconds.index(max(seconds)) for seconds in (step_seconds, data_seconds))
    behind = step_seconds[slowest] - median(step_seconds)
    if behind > max((STRAGGLES - 1) * median(step_seconds), NOTICED * steps):
        times = {"step_seconds": step_seconds[slowest] / steps, "median_seconds": median(step_seconds) / steps}
        events.append({"event": "straggler", "rank": slowest, **times})
    if data_seconds[waiting] > max(STALLS * step_seconds[waiting], NOTICED * steps):
        share = data_seconds[waiting] / step_seconds[waiting]
        events.append(
            {"event": "data_stall", "rank": waiting, "data_seconds": data_seconds[waiting] / steps, "share": share}
        )
    return events


def peak_memory_gb(device: torch.device | str) -> float:
    """Largest memory so far in GiB: allocated on a CUDA device, resident in the process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _binned(loss: Tensor, weight: Tensor, sigma: Tensor) -> Tensor:
    """(bins, 2): number of samples and sum of their losses per tenth of [0, 1]; those of weight 0 are left out."""
    index = (sigma.detach().float() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
    member = torch.nn.functional.one_hot(index, SIGMA_BINS).double() * weight.detach().double()[:, None]
    counted = torch.where(weight > 0, loss.detach().double(), 0.0)  # a bad record's loss may be anything
    return torch.stack([member.sum(dim=0), (member * counted[:, None]).sum(dim=0)], dim=-1)


def _mean(count: float, total: float) -> float | None:
    return total / count if count else None

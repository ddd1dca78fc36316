"""Held-out loss: fixed clips, fixed noise, fixed sigmas. The same noise on any device and any number of ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ltx2_train.batch import Batch, collate
from ltx2_train.data.datasets import LatentDataset
from ltx2_train.diffusion.objective import Objective
from ltx2_train.distributed.world import agreed
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.evals.estimate import Estimate
from ltx2_train.evals.files import write_json
from ltx2_train.evals.identity import Identity, clips_identity, dtype_name
from ltx2_train.record import Bucket
from ltx2_train.rng import BatchRng, derive_seed

MODALITIES = ("video", "audio")


class WorldLike(Protocol):
    """What of the ranks is needed here."""

    @property
    def rank(self) -> int: ...

    @property
    def data_rank(self) -> int: ...

    @property
    def data_size(self) -> int: ...

    @property
    def counts_samples(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def all_sum(self, tensor: Tensor) -> Tensor: ...

    def gather_objects(self, value: Any) -> list[Any]: ...


@dataclass(kw_only=True, slots=True)
class HeldoutConfig:
    """What is measured. Two measurements can be compared when all of this is the same."""

    clips: int = 32
    """Clips of the held-out split, spread evenly over it."""
    batch_size: int = 8
    """Clips per forward; the result does not depend on it beyond rounding."""
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Noise levels, the same for both streams."""
    seed: int = 0
    """Seed of the noise; that of a clip follows from its key alone."""

    def __post_init__(self) -> None:
        for name in ("clips", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.heldout.{name}={getattr(self, name)}: must be >= 1")
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            raise ConfigError(f"evaluation.heldout.sigmas={self.sigmas}: need at least one, each in (0, 1]")


@dataclass(frozen=True, slots=True)
class HeldoutLosses:
    """Losses (clips, sigmas) fp64 per modality; NaN where a clip lacks it, infinite where a loss is not finite."""

    keys: tuple[str, ...]
    sigmas: tuple[float, ...]
    video: Tensor
    audio: Tensor
    identity: Identity | None = None
    """What they are of; None: not known."""

    def mean(self, modality: str) -> Estimate:
        """Over clips, of each clip's mean over sigmas."""
        return Estimate.mean_of(getattr(self, modality).mean(dim=1))

    def by_sigma(self, modality: str) -> list[Estimate]:
        return [Estimate.mean_of(column) for column in getattr(self, modality).unbind(1)]

    def figures(self) -> dict[str, Any]:
        """The mean losses and those by sigma, as an event has them."""
        return event_figures(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file, each clip's losses included, so that two measurements can be paired."""
        plain: dict[str, Any] = {"identity": None if self.identity is None else dict(self.identity)}
        plain |= {"clips": len(self.keys), "sigmas": list(self.sigmas), "keys": list(self.keys)}
        for modality in MODALITIES:
            values = getattr(self, modality)
            plain[modality] = {
                "mean": _plain_mean(self.mean(modality)),
                "by_sigma": [_plain_mean(estimate) for estimate in self.by_sigma(modality)],
                "per_clip": [x if math.isfinite(x) else None for x in values.mean(dim=1).tolist()],
            }
        return plain


def event_figures(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Of one kind of weights, as heldout-STEP.json has it: the mean losses and those by sigma, as an event has them."""
    sigmas = [f"{sigma:g}" for sigma in plain["sigmas"]]
    by_sigma = {m: {s: row["mean"] for s, row in zip(sigmas, plain[m]["by_sigma"], strict=True)} for m in MODALITIES}
    return {**{f"loss_{m}": plain[m]["mean"]["mean"] for m in MODALITIES}, "by_sigma": by_sigma}


def _plain_mean(estimate: Estimate) -> dict[str, Any]:
    """As files of held-out losses spell it."""
    plain = estimate.to_dict()
    return {"mean": plain.pop("value"), **plain}


class Heldout:
    """Measures a model on held-out clips. Called by all ranks together; every rank runs the same number of forwards.

    The clips are cut into micro-batches of one bucket, whatever the number of ranks; ranks take them in turn, and one
    that has none left repeats the first without counting it.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        objective: Objective,
        config: HeldoutConfig,
        world: WorldLike,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is what the models compute in."""
        self.dataset, self.objective, self.config, self.world = dataset, objective, config, world
        self.dtype = dtype
        self.indices = spread(len(dataset), config.clips, dataset.location)
        self.groups = by_bucket(self.indices, dataset.index.bucket, config.batch_size)

    @property
    def identity(self) -> Identity:
        """What is measured, whatever the weights and the number of ranks."""
        streams = sorted(str(stream.value) for stream in self.objective.config.streams)
        measured = {"sigmas": list(self.config.sigmas), "seed": self.config.seed, "streams": streams}
        return clips_identity(self.dataset, self.indices) | measured | {"dtype": dtype_name(self.dtype)}

    @property
    def num_forwards(self) -> int:
        """Calls of the model that one measurement takes, on every rank."""
        return len(share(self.groups, self.world)) * len(self.config.sigmas)

    @torch.no_grad()
    def measure(self, model: Callable[..., Any]) -> HeldoutLosses:
        """The losses of `model`, the same numbers on all ranks.

        Raises `DataError` on all ranks, before the model is called, when a clip of any of them cannot be read.
        """
        turns = share(self.groups, self.world)
        batches = agreed(self.world, lambda: [self._batch(group) for group, _ in turns])
        sums = torch.zeros(3, len(self.indices), len(self.config.sigmas), dtype=torch.float64)
        rows = {index: row for row, index in enumerate(self.indices)}
        for (group, counted), (batch, rng) in zip(turns, batches, strict=True):
            losses = self._losses(model, batch.to(self.world.device), rng)
            if counted:
                sums[:, [rows[index] for index in group]] = losses
        video, audio, has = self.world.all_sum(sums.to(self.world.device)).cpu()
        has_video, has_audio = has.long() & 1 > 0, has.long() & 2 > 0
        return HeldoutLosses(
            keys=tuple(self.dataset.index.key(index) for index in self.indices),
            sigmas=tuple(self.config.sigmas),
            video=video.where(video.isfinite(), math.inf).where(has_video, math.nan),
            audio=audio.where(audio.isfinite(), math.inf).where(has_audio, math.nan),
            identity=self.identity,
        )

    def _losses(self, model: Callable[..., Any], batch: Batch, rng: BatchRng) -> Tensor:
        """(3, clips, sigmas) fp64: video and audio losses, and which of them are there (1 video + 2 audio)."""
        columns = []
        for sigma in self.config.sigmas:
            losses = self.objective(model, batch, rng, sigma=sigma)
            columns.append(torch.stack([losses.video, losses.audio, losses.has_video + 2 * losses.has_audio]))
        return torch.stack(columns, dim=-1).double().cpu()

    def _batch(self, group: Sequence[int]) -> tuple[Batch, BatchRng]:
        """The clips of a group, and noise that follows from their keys, on whatever device it is measured."""
        samples = [self.dataset.read(index) for index in group]
        batch = collate(samples, range(len(samples)), samples[0].bucket)
        keys = [derive_seed("heldout", sample.key) for sample in samples]
        return batch, BatchRng(self.config.seed, 0, keys, drawn_on="cpu")


def spread(available: int, wanted: int, name: str) -> list[int]:
    """`wanted` numbers below `available`, evenly spread: all of them when there are no more."""
    if available < 1:
        raise DataError(f"{name} holds no samples to evaluate on. Encode a held-out split with data_prep.encode")
    count = min(available, wanted)
    return [i * available // count for i in range(count)]


def by_bucket(indices: Sequence[int], bucket_of: Callable[[int], Bucket], size: int) -> list[list[int]]:
    """The indices in groups of at most `size` that share a bucket, in the order of buckets."""
    buckets: dict[Bucket, list[int]] = {}
    for index in indices:
        buckets.setdefault(bucket_of(index), []).append(index)
    return [group[i : i + size] for _, group in sorted(buckets.items()) for i in range(0, len(group), size)]


def share(groups: Sequence[list[int]], world: WorldLike) -> list[tuple[list[int], bool]]:
    """This rank's group of every turn, and whether it counts: all ranks have as many, some repeat the first.

    Ranks that share samples take the same groups, which count for one of them.
    """
    places = range(world.data_rank, math.ceil(len(groups) / world.data_size) * world.data_size, world.data_size)
    counts = world.counts_samples
    return [(groups[place], counts) if place < len(groups) else (groups[0], False) for place in places]


def heldout_path(directory: Path, step: int) -> Path:
    """Where a run directory keeps the held-out losses of a step."""
    return directory / "evals" / heldout_name(step)


def heldout_name(step: int) -> str:
    return f"heldout-{step:08d}.json"


def write_heldout(
    heldout: Heldout,
    path: Path,
    step: int,
    measured: Mapping[str, HeldoutLosses],
    told: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the losses of a step to `path`, by the kind of weights, on the first rank. All ranks call it.

    `told`: what the file says beside them.
    """

    def write() -> None:
        if heldout.world.rank == 0:
            plain = {weights: losses.to_dict() for weights, losses in measured.items()}
            write_json(path, {"step": step, **told, **plain})

    agreed(heldout.world, write)


def heldout_evaluator(
    heldout: Heldout,
    directory: Path,
    *,
    weights: str = "ema",
    others: Mapping[str, Callable[[], AbstractContextManager[None]]] = MappingProxyType({}),
) -> Callable[[Callable[..., Any], int], dict[str, Any]]:
    """For the trainer: measures, writes the step's file, and gives the event's figures.

    `weights`: the kind that the model is called with. `others`: further kinds by name, each with the block in which the
    same model has them; their figures stand in the event under their name.
    """

    def evaluate(model: Callable[..., Any], step: int) -> dict[str, Any]:
        measured = {}
        for name, in_place in others.items():
            with in_place():
                measured[name] = heldout.measure(model)
        measured[weights] = heldout.measure(model)
        write_heldout(heldout, heldout_path(directory, step), step, measured)
        forwards = heldout.num_forwards * len(measured)
        figures = {name: losses.figures() for name, losses in measured.items()}
        return {"weights": weights, "forwards": forwards, **figures.pop(weights), **figures}

    return evaluate


def paired_change(before: dict[str, Any], after: dict[str, Any], modality: str) -> Estimate | None:
    """Mean difference after - before over the clips that have the modality; None if they cannot be compared.

    They can where they are of the same clips, known by their content, with the same noise at the same noise levels. Two
    that do not say what they are of are compared by the names of their clips.
    Not measured where a loss of either is not finite: the clips that did not diverge would hide it.
    The noise being the same, a clip's own difficulty drops out, and the interval is far narrower than that of either.
    """
    if any(before.get(name) != after.get(name) for name in ("identity", "sigmas", "keys")):
        return None
    for name, mean in (("first", before[modality]["mean"]), ("later", after[modality]["mean"])):
        if mean["mean"] is None and mean["count"]:
            return Estimate.missing(f"the {name} loss is {mean['note']}")
    pairs = zip(before[modality]["per_clip"], after[modality]["per_clip"], strict=True)
    return Estimate.mean_of(
        torch.tensor([b - a for a, b in pairs if a is not None and b is not None], dtype=torch.float64)
    )

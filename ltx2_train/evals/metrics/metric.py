"""What a metric on a set of clips is, and the two kinds that most of them are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.evals.estimate import Array, Estimate, bootstrap
from ltx2_train.evals.film import Film


class Part(StrEnum):
    """What a metric can need of a clip."""

    video_latents = "video latents"
    audio_latents = "audio latents"
    motion = "a moving picture"
    sound = "sound"


@dataclass(frozen=True, slots=True)
class Clip:
    """A sampled or a real clip: its film, and normalised latents (128, F, H, W) and (8, T, 16) on the CPU."""

    film: Film
    video_latents: Tensor | None = None
    audio_latents: Tensor | None = None

    @property
    def parts(self) -> frozenset[Part]:
        """What this clip has."""
        found = {
            Part.video_latents: self.video_latents is not None,
            Part.audio_latents: self.audio_latents is not None,
            Part.motion: self.film.moves,
            Part.sound: self.film.waveform is not None,
        }
        return frozenset(part for part, there in found.items() if there)


@dataclass(frozen=True, slots=True)
class Rows:
    """What was measured on a set of clips: `values` (N, numbers) fp64, and the clip that each row is a sample of (N,).

    Several rows of one clip come from one caption and several seeds.
    """

    values: Array
    clips: Sequence[int]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a metric is built with."""

    tolerance: float = 0.08
    """Seconds within which an event that is seen and one that is heard are one."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where a metric that has a network of its own puts it."""


class Metric(Protocol):
    """A figure of a set of clips. Ranks measure their clips; the rows of all of them are summarised together."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """What the figure is in; empty: a number without one."""

    @property
    def needs(self) -> frozenset[Part]:
        """A clip without one of these is passed over; `measure` may rely on them."""

    @property
    def compares(self) -> bool:
        """True: a figure of sampled against real clips. False: one of each set by itself."""

    def measure(self, clip: Clip) -> Sequence[float] | None:
        """The clip's row, as many finite numbers for every clip; None where there is nothing to measure in it."""

    def summarise(self, rows: Rows, real: Rows) -> Estimate:
        """The figure of one row or more. `real` is for those that compare, and then has a row or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerClip:
    """One number per clip; the figure is their mean, or another `statistic` of them."""

    name: str
    unit: str
    needs: frozenset[Part]
    of: Callable[[Clip], float | None]
    statistic: Callable[[Array], np.floating | float] = np.mean
    compares: bool = False

    def measure(self, clip: Clip) -> Sequence[float] | None:
        value = self.of(clip)
        return None if value is None else (value,)

    def summarise(self, rows: Rows, real: Rows) -> Estimate:
        values = rows.values[:, 0]
        return bootstrap(lambda drawn: float(self.statistic(values[drawn])), rows.clips)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """(part, whole) of every clip; the figure is the sum of the parts over the sum of the wholes."""

    name: str
    unit: str
    needs: frozenset[Part]
    of: Callable[[Clip], tuple[float, float] | None]
    compares: bool = False

    def measure(self, clip: Clip) -> Sequence[float] | None:
        return self.of(clip)

    def summarise(self, rows: Rows, real: Rows) -> Estimate:
        return bootstrap(lambda drawn: share(rows.values, drawn), rows.clips)


def share(values: Array, drawn: NDArray[np.int64]) -> float:
    """Sum of the first column over the sum of the second, of the drawn rows; NaN where that is 0."""
    part, whole = values[drawn].sum(axis=0)
    return float(part / whole) if whole else float("nan")

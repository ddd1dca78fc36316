"""Updates that went wrong: how many are passed over, and when the run goes back and leaves their samples out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

from ltx2_train.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class FaultsConfig:
    """What is done about bad updates: a loss or gradient that is not finite, a gradient norm above engine.skip_above, or a
    loss that jumps. None of them is ever applied."""

    skips: int = 3
    """Bad updates in a row that are passed over. With one more the run rolls back: it goes on from the newest checkpoint
    that a good update followed, without the samples of the bad ones."""
    rollbacks: int = 2
    """Rollbacks of the whole run, resumptions included; where another one is due, the run ends with an error."""
    loss_above: float | None = None
    """A loss above this multiple of the median of the last `loss_window` applied updates is bad. null: none is."""
    loss_window: int = 64
    """Applied updates whose losses make the median; before there are as many, no loss is too high."""

    def __post_init__(self) -> None:
        for name, least in (("skips", 0), ("rollbacks", 0), ("loss_window", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"train.faults.{name}={getattr(self, name)}: must be {least} or more")
        if self.loss_above is not None and not self.loss_above > 1:
            raise ConfigError(f"train.faults.loss_above={self.loss_above}: must be above 1, or null for none")

    def highest_loss(self, recent: Sequence[float]) -> float:
        """The bound on the next loss, given those of the last applied updates; infinite where there is none."""
        if self.loss_above is None or len(recent) < self.loss_window:
            return math.inf
        return self.loss_above * median(recent)


class Reason(StrEnum):
    """Why an update was bad."""

    loss = "a loss is not finite"
    gradient = "the gradient is not finite though every loss is finite"
    norm = "the gradient norm is above engine.skip_above"
    spike = "the loss is above train.faults.loss_above times its median"


@dataclass(frozen=True, slots=True)
class BadUpdate:
    """An update that was not applied. `keys`: of the samples whose loss is not finite, else of all samples of the step."""

    step: int  # the number it would have had
    reason: str
    keys: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"keys": list(self.keys)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BadUpdate":
        return cls(**{**values, "keys": tuple(values["keys"])})


@dataclass(frozen=True, slots=True)
class Rollback:
    """Where a run goes back to, and the updates that sent it there."""

    directory: Path
    bad: tuple[BadUpdate, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The samples that are left out from now on."""
        return tuple(sorted({key for update in self.bad for key in update.keys}))

    def event(self, number: int) -> dict[str, Any]:
        """What metrics.jsonl says of it. The lines of the steps that are done again are gone, so all of it stands here."""
        updates = [update.to_dict() for update in self.bad]
        samples = {"skipped_samples": len(self.keys), "keys": list(self.keys)}
        return {"event": "rolled_back", "number": number, "from_step": self.bad[-1].step, **samples, "updates": updates}


def told(bad: Sequence[BadUpdate]) -> str:
    """A streak of bad updates in words, with its samples."""
    keys = sorted({key for update in bad for key in update.keys})
    steps = ", ".join(str(update.step) for update in bad)
    return f"step {steps}: {bad[0].reason}; nothing was applied. Samples: {', '.join(keys)}"

"""Updates that went wrong: how many are passed over, and when the run goes back and leaves their samples out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ltx2_train.errors import ConfigError

FEWEST = 1000  # samples that a smaller dataset counts as: a share of few would be none
NAMED = 20  # samples that a message lists; metrics.jsonl has all of them


@dataclass(kw_only=True, slots=True)
class FaultsConfig:
    """What is done about bad updates: a loss or gradient that is not finite, a gradient norm above engine.skip_above, or a
    loss that jumps. None of them is ever applied."""

    skips: int = 3
    """Bad updates in a row that are passed over. With one more the run rolls back: it goes on from the newest checkpoint
    that a good update followed, without the samples of the bad ones."""
    rollbacks: int = 2
    """Rollbacks of the whole run, resumptions included; where another one is due, the run ends with an error."""
    skip_fraction: float = 0.01
    """Share of a dataset's samples that rollbacks may leave out, all together; one that would leave out more ends the run
    with an error, because it is hardly the samples that are at fault. Datasets of fewer than a thousand count as a
    thousand, and half of the samples stay in any case."""
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
        if not 0 <= self.skip_fraction <= 0.5:
            raise ConfigError(f"train.faults.skip_fraction={self.skip_fraction}: must be between 0 and 0.5")

    def highest_loss(self, recent: Sequence[float]) -> float:
        """The bound on the next loss, given those of the last applied updates; infinite where there is none."""
        if self.loss_above is None or len(recent) < self.loss_window:
            return math.inf
        return self.loss_above * median(recent)

    def objection(self, left_out: Sequence["LeftOut"]) -> str:
        """Why so many samples may not be left out; empty where they may."""
        for i, (skipped, total) in enumerate(left_out):
            allowed = int(min(self.skip_fraction * max(total, FEWEST), total / 2))
            if skipped > allowed:
                return (
                    f"Rollbacks would leave out {skipped} of the {total} samples of dataset {i}; "
                    f"train.faults.skip_fraction={self.skip_fraction} allows {allowed}"
                )
        return ""


class LeftOut(NamedTuple):
    """Of one dataset: the samples that rollbacks leave out, and all that there are without `data.skip`."""

    skipped: int
    total: int


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
    """Where a run goes back to, the updates that sent it there, and the share of all samples left out from there on."""

    directory: Path
    bad: tuple[BadUpdate, ...]
    share: float

    @property
    def keys(self) -> tuple[str, ...]:
        """The samples that are left out from now on."""
        return tuple(sorted({key for update in self.bad for key in update.keys}))

    def event(self, number: int) -> dict[str, Any]:
        """What metrics.jsonl says of it. The lines of the steps that are done again are gone, so all of it stands here."""
        updates = [update.to_dict() for update in self.bad]
        samples = {"skipped_samples": len(self.keys), "left_out_share": self.share, "keys": list(self.keys)}
        return {"event": "rolled_back", "number": number, "from_step": self.bad[-1].step, **samples, "updates": updates}


def told(bad: Sequence[BadUpdate]) -> str:
    """A streak of bad updates in words, with its samples, or the first of very many."""
    keys = sorted({key for update in bad for key in update.keys})
    steps = ", ".join(str(update.step) for update in bad)
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"step {steps}: {bad[0].reason}; nothing was applied. Samples: {', '.join(keys[:NAMED])}{more}"

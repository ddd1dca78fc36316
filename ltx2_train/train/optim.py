"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass
from enum import StrEnum

from ltx2_train.errors import ConfigError


class Schedule(StrEnum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Linear warm-up, constant to `decay_start`, then the tail that `schedule` names. AdamW's own: engine.optimizer."""

    lr: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly from lr / warmup_steps to lr. 0: none."""
    schedule: Schedule = Schedule.constant
    """What follows `decay_start`: constant (nothing), cosine or linear, down to `floor` at total_steps."""
    total_steps: int = 1000
    """Length of the schedule in steps; conf/ ties it to train.max_steps. Not read by the constant schedule."""
    decay_start: float = 0.0
    """Share of total_steps after which the tail begins, in [0, 1). Between warm-up and tail the rate is constant."""
    floor: float = 0.0
    """Share of lr that is left at total_steps and after it, in [0, 1]."""

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.schedule)
        _require(self.lr > 0, f"optim.lr={self.lr}: must be above 0")
        _require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}: must be 0 or more")
        _require(self.total_steps >= 1, f"optim.total_steps={self.total_steps}: must be 1 or more")
        _require(0 <= self.decay_start < 1, f"optim.decay_start={self.decay_start}: must lie in [0, 1)")
        _require(0 <= self.floor <= 1, f"optim.floor={self.floor}: must lie in [0, 1]")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of update number `step` (from 0). A function of the step alone: nothing is saved, nothing drifts."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * warm * (config.floor + (1 - config.floor) * _tail(step, config))


def _tail(step: int, config: OptimConfig) -> float:
    """1 before the tail begins, 0 at its end and after it."""
    if config.schedule is Schedule.constant:
        return 1.0
    begin = config.decay_start * config.total_steps
    progress = min(1.0, max(0.0, (step - begin) / (config.total_steps - begin)))
    return 1.0 - progress if config.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))

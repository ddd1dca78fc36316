"""An exponential moving average of the trained weights, kept as shards like the weights themselves."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltx2_train.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """How long the average remembers."""

    decay: float = 0.999
    """Share of the average that stays at an update, once it is warm; about 1 / (1 - decay) steps are averaged."""
    ramp: bool = True
    """Update n (from 0) uses min(decay, (1 + n) / (10 + n)), so that the initial weights are soon forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay={self.decay}: must lie in [0, 1)")


class Ema:
    """The average of an engine's shards, fp32, on their device. Elementwise, so it does not depend on the sharding."""

    def __init__(self, shards: Iterable[tuple[str, Tensor]], config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self._average = {name: shard.detach().float().clone() for name, shard in shards}

    def decay(self) -> float:
        """Share of the average that stays at the next update."""
        n = self.updates
        return min(self.config.decay, (1 + n) / (10 + n)) if self.config.ramp else self.config.decay

    @torch.no_grad()
    def update(self, shards: Iterable[tuple[str, Tensor]]) -> None:
        """Moves the average towards the weights."""
        current = dict(shards)
        assert current.keys() == self._average.keys(), "the average is of other parameters"
        weights = [current[name] for name in self._average]
        torch._foreach_lerp_(list(self._average.values()), weights, 1.0 - self.decay())
        self.updates += 1

    def weights(self) -> dict[str, Tensor]:
        """The live average by parameter name, for `Engine.swapped`."""
        return self._average

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: part of the `extra` of `Engine.save`, and the template of `Engine.load`."""
        return {"ema": self._average, "ema_updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `Engine.load`'s answer to `state()`: the tensors were filled in place."""
        self.updates = int(state["ema_updates"])

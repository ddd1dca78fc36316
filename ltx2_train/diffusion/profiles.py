"""Sampler profiles: everything that decides how a model is sampled, under one name that goes into the checkpoint."""

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from ltx2_train.diffusion.choice import chosen
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.sigmas import (
    DISTILLED,
    MAX_TOKENS,
    linear_quadratic_schedule,
    ltx2_schedule,
    shifted_schedule,
)
from ltx2_train.errors import ConfigError


class Schedule(StrEnum):
    """Names of the sigma schedules."""

    ltx2 = "ltx2"
    shifted = "shifted"
    linear_quadratic = "linear_quadratic"
    distilled = "distilled"


class TokenRule(StrEnum):
    """From how many tokens a schedule's shift follows."""

    fixed = "fixed"
    actual = "actual"


@dataclass(kw_only=True, slots=True)
class SamplerProfile:
    """How a model is sampled: the same in training evaluations and on the command line."""

    name: str
    """What it is called."""
    steps: int = 30
    """Euler steps, one forward each."""
    schedule: Schedule = Schedule.ltx2
    """ltx2: shifted, and stretched to end at 0.1 before 0; shifted: not stretched; linear_quadratic; distilled: the
    fixed eight steps of distilled models."""
    tokens: TokenRule = TokenRule.fixed
    """fixed: the shift of 4096 tokens for every clip, as the released models are used; actual: that of the clip's own
    video token count (audio's where there is no video), as in training."""
    video: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance of the video stream."""
    audio: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance of the audio stream."""

    def __post_init__(self) -> None:
        self.schedule = chosen(Schedule, self.schedule, "schedule")
        self.tokens = chosen(TokenRule, self.tokens, "tokens")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: must be >= 1")
        if self.schedule == Schedule.distilled and self.steps != len(DISTILLED) - 1:
            raise ConfigError(f"steps={self.steps}: the distilled schedule has {len(DISTILLED) - 1}")

    def sigmas(self, tokens: int) -> Tensor:
        """(steps + 1,) fp32, from 1 down to 0, for a clip of `tokens` tokens."""
        shift_tokens = tokens if self.tokens == TokenRule.actual else MAX_TOKENS
        if self.schedule == Schedule.ltx2:
            return ltx2_schedule(self.steps, shift_tokens)
        if self.schedule == Schedule.shifted:
            return shifted_schedule(self.steps, shift_tokens)
        if self.schedule == Schedule.linear_quadratic:
            return linear_quadratic_schedule(self.steps)
        return torch.tensor(DISTILLED)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        plain = asdict(self)
        return plain | {"schedule": self.schedule.value, "tokens": self.tokens.value}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "SamplerProfile":
        """What `to_dict` wrote. Raises `ConfigError` on a field that is missing, unknown or out of its bound."""
        guidance = {name: _from_fields(GuidanceConfig, plain.get(name, {}), name) for name in ("video", "audio")}
        return _from_fields(cls, {**plain, **guidance}, "sampler profile")


def _from_fields(owner: type, plain: dict[str, Any], name: str) -> Any:
    known = {f.name for f in fields(owner)}
    if unknown := set(plain) - known:
        raise ConfigError(f"{name}: unknown fields {sorted(unknown)}; known are {sorted(known)}")
    try:
        return owner(**plain)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error


def _released(name: str, steps: int, stg_block: int) -> SamplerProfile:
    """The setting in which a released (not distilled) model is used."""
    video, audio = (
        GuidanceConfig(cfg=cfg, stg=1.0, stg_blocks=[stg_block], modality=3.0, rescale=0.7) for cfg in (3.0, 7.0)
    )
    return SamplerProfile(name=name, steps=steps, video=video, audio=audio)


PROFILES: dict[str, SamplerProfile] = {
    p.name: p
    for p in (
        _released("ltx2_2.0", steps=40, stg_block=29),
        _released("ltx2_2.3", steps=30, stg_block=28),
        _released("ltx2_2.5", steps=30, stg_block=28),
        # For a small model trained from scratch: its own shift, down to 0 evenly, and text guidance alone.
        SamplerProfile(
            name="demo",
            steps=24,
            schedule=Schedule.shifted,
            tokens=TokenRule.actual,
            video=GuidanceConfig(cfg=2.0),
            audio=GuidanceConfig(cfg=2.0),
        ),
    )
}


def profile(name: str) -> SamplerProfile:
    """A copy of the profile of that name. Raises `ConfigError` naming the known ones."""
    if name not in PROFILES:
        raise ConfigError(f"sampler profile {name!r}: not known; choose one of {', '.join(PROFILES)}")
    return SamplerProfile.from_dict(PROFILES[name].to_dict())

"""Where training sigmas are drawn, and the descending sigmas of sampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ltx2_train.diffusion.choice import chosen
from ltx2_train.errors import ConfigError

# The line through (1024 tokens, 0.95) and (4096 tokens, 2.05). It is not clamped on either side.
BASE_TOKENS, BASE_SHIFT = 1024, 0.95
MAX_TOKENS, MAX_SHIFT = 4096, 2.05

# Quantiles of the standard normal that the stretched law maps to sigma 0 and 1.
LOW_QUANTILE = -2.5758  # 0.5 %
HIGH_QUANTILE = 3.0902  # 99.9 %

# The beta schedule: quantiles of a symmetric beta distribution pick from a table of shifted sigmas.
BETA_SHAPE, BETA_SHIFT, BETA_TABLE = 0.6, 2.37, 10_000

DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
DISTILLED_REFINE = (0.909375, 0.725, 0.421875, 0.0)  # second stage, after latent upsampling


def training_shift(tokens: int) -> float:
    """The shift mu of a stream with `tokens` tokens: more tokens need more noise to hide the same structure.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 5.3.2, in the linear form of the LTX models.
    """
    return BASE_SHIFT + (MAX_SHIFT - BASE_SHIFT) * (tokens - BASE_TOKENS) / (MAX_TOKENS - BASE_TOKENS)


class SigmaDistribution(Protocol):
    """Where the sigma of a training sample comes from."""

    def from_draws(self, tokens: int, normal: Tensor, uniform: Tensor, choice: Tensor) -> Tensor:
        """Sigmas of the shape of the draws: one standard normal and two uniform numbers in [0, 1) for each."""

    def sample(self, n: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        """(n,) fp32 sigmas in [0, 1] on the generator's device."""


def _draws(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    device = generator.device if generator is not None else "cpu"
    normal = torch.randn(n, generator=generator, device=device)
    uniform, choice = torch.rand(2, n, generator=generator, device=device)
    return normal, uniform, choice


@dataclass(frozen=True, slots=True)
class ShiftedLogitNormal:
    """Logit-normal about the training shift, stretched so that its outer quantiles reach 0 and 1, mixed with uniform.

    Source: logit-normal sampling of Esser et al. 2024 (arXiv:2403.03206), eq. 19.
    """

    std: float = 1.0
    eps: float = 1e-3  # smallest sigma: what falls below is reflected
    uniform_probability: float = 0.1

    def from_draws(self, tokens: int, normal: Tensor, uniform: Tensor, choice: Tensor) -> Tensor:
        mu = training_shift(tokens)
        low, high = (1 / (1 + math.exp(-(mu + q * self.std))) for q in (LOW_QUANTILE, HIGH_QUANTILE))
        stretched = (torch.sigmoid(mu + self.std * normal) - low) / (high - low)
        reflected = torch.where(stretched >= self.eps, stretched, 2 * self.eps - stretched).clamp(0, 1)
        return torch.where(choice < self.uniform_probability, self.eps + (1 - self.eps) * uniform, reflected)

    def sample(self, n: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        return self.from_draws(tokens, *_draws(n, generator))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform in [low, high), whatever the number of tokens."""

    low: float = 0.0
    high: float = 1.0

    def from_draws(self, tokens: int, normal: Tensor, uniform: Tensor, choice: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * uniform

    def sample(self, n: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
        return self.from_draws(tokens, *_draws(n, generator))


class SigmaLaw(StrEnum):
    """Names of the sigma distributions."""

    shifted_logit_normal = "shifted_logit_normal"
    uniform = "uniform"


@dataclass(kw_only=True, slots=True)
class SigmaConfig:
    """Where training sigmas are drawn."""

    law: SigmaLaw = SigmaLaw.shifted_logit_normal
    """Distribution of sigma."""
    std: float = 1.0
    """Standard deviation before the logistic function (shifted_logit_normal)."""
    eps: float = 1e-3
    """Smallest sigma drawn (shifted_logit_normal)."""
    uniform_probability: float = 0.1
    """Share of the draws that are uniform instead (shifted_logit_normal)."""
    low: float = 0.0
    """Lower end (uniform)."""
    high: float = 1.0
    """Upper end (uniform)."""

    def __post_init__(self) -> None:
        self.law = chosen(SigmaLaw, self.law, "sigma.law")
        if not self.std > 0:
            raise ConfigError(f"sigma.std={self.std}: must be > 0")
        if not 0 <= self.eps < 0.5:
            raise ConfigError(f"sigma.eps={self.eps}: must be in [0, 0.5)")
        if not 0 <= self.uniform_probability <= 1:
            raise ConfigError(f"sigma.uniform_probability={self.uniform_probability}: must be in [0, 1]")
        if not 0 <= self.low < self.high <= 1:
            raise ConfigError(f"sigma.low={self.low}, sigma.high={self.high}: need 0 <= low < high <= 1")

    def build(self) -> SigmaDistribution:
        if self.law is SigmaLaw.uniform:
            return Uniform(self.low, self.high)
        return ShiftedLogitNormal(self.std, self.eps, self.uniform_probability)


def shifted_schedule(steps: int, tokens: int = MAX_TOKENS) -> Tensor:
    """(steps + 1,) fp32 from 1 down to 0: equal steps, moved towards noise by the training shift of `tokens`.

    Raises `ConfigError` where the shift presses two of them together.
    """
    left, against = _even(steps), math.exp(-training_shift(tokens))
    return _in_fp32(left / (left + (1 - left) * against), tokens)


def ltx2_schedule(steps: int, tokens: int = MAX_TOKENS, *, terminal: float = 0.1) -> Tensor:
    """The shifted schedule, stretched so that the last sigma before 0 is `terminal`. (steps + 1,) fp32.

    The released pipelines leave `tokens` at 4096 whatever the size of the clip. One step has nothing to stretch.
    """
    if _checked(steps) == 1:
        return shifted_schedule(steps, tokens)
    left, against = _even(steps)[:-1], math.exp(-training_shift(tokens))
    distance = (1 - left) / (left + (1 - left) * against)  # 1 - sigma, but for a factor that the stretching cancels
    return _in_fp32(torch.cat([1 - distance * ((1 - terminal) / distance[-1]), distance.new_zeros(1)]), tokens)


def _even(steps: int) -> Tensor:
    """(steps + 1,) from 1 down to 0, in fp64: the shift of many tokens leaves differences that fp32 does not have."""
    return torch.linspace(1, 0, _checked(steps) + 1, dtype=torch.float64)


def _in_fp32(sigmas: Tensor, tokens: int) -> Tensor:
    """The fp64 sigmas as samplers follow them. Raises `ConfigError` where two of them fall together."""
    rounded = sigmas.float()
    if not (rounded.diff() < 0).all():
        raise ConfigError(
            f"steps={len(sigmas) - 1} for {tokens} tokens: two sigmas of the schedule are the same number in fp32; take "
            "fewer steps, the shift of fewer tokens (tokens=fixed), or schedule=ltx2, which is stretched apart"
        )
    return rounded


def linear_quadratic_schedule(steps: int, threshold: float = 0.025, linear_steps: int | None = None) -> Tensor:
    """Small equal steps down to 1 - `threshold`, then quadratically growing ones to 0. (steps + 1,) fp32.

    Source: Polyak et al. 2024, "Movie Gen" (arXiv:2410.13720), section 3.4.2.
    """
    if _checked(steps) == 1:
        return torch.tensor([1.0, 0.0])
    linear = steps // 2 if linear_steps is None else linear_steps
    rest = steps - linear
    defect = linear - threshold * steps
    a = defect / (linear * rest**2)
    b = threshold / linear - 2 * defect / rest**2
    progress = [i * threshold / linear for i in range(linear)]
    progress += [a * i * i + b * i + a * linear**2 for i in range(linear, steps)]
    return 1 - torch.tensor([*progress, 1.0])


def beta_schedule(steps: int) -> Tensor:
    """Dense towards both ends: sigmas of a shifted table at the quantiles of Beta(0.6, 0.6), then 0. (steps + 1,) fp32.

    Raises `ConfigError` for so many steps that two of them would fall on one entry. Source: Lee et al. 2024, "Beta
    sampling is all you need" (arXiv:2407.12173).
    """
    from scipy.stats import beta

    quantiles = beta.ppf([1 - i / steps for i in range(_checked(steps))], BETA_SHAPE, BETA_SHAPE)
    entries = torch.from_numpy(quantiles).mul(BETA_TABLE - 1).round()
    if len(entries.unique()) < steps:
        raise ConfigError(f"steps={steps}: the beta schedule has no more than {len(entries.unique())} distinct sigmas")
    odds = math.exp(BETA_SHIFT)
    table = (entries + 1) / BETA_TABLE
    return torch.cat([odds / (odds + 1 / table - 1), torch.zeros(1)]).float()


def custom_schedule(sigmas: Sequence[float]) -> Tensor:
    """(n,) fp32: the given sigmas. Raises `ConfigError` unless they descend strictly within [0, 1]; they may end above 0."""
    if len(sigmas) < 2:
        raise ConfigError(
            f"custom_sigmas={list(sigmas)}: a schedule needs at least 2, where it starts and where it ends"
        )
    for sigma in sigmas:
        if not 0 <= sigma <= 1:
            raise ConfigError(f"custom_sigmas: {sigma} is not in [0, 1], where 1 is noise and 0 is data")
    schedule = torch.tensor(sigmas, dtype=torch.float32)
    for (sigma, sigma_next), apart in zip(pairwise(sigmas), (schedule.diff() < 0).tolist(), strict=True):
        if not apart:
            raise ConfigError(
                f"custom_sigmas: {sigma} is followed by {sigma_next}; each must be lower than the one before"
            )
    return schedule


def _checked(steps: int) -> int:
    if steps < 1:
        raise ConfigError(f"steps={steps}: a schedule needs at least 1")
    return steps

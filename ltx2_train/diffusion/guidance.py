"""Guidance: how several predictions of the model are made into one, and which of them that needs."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ltx2_train.diffusion.choice import chosen
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import (
    SKIP_A2V,
    SKIP_AUDIO_SELF_ATTN,
    SKIP_V2A,
    SKIP_VIDEO_SELF_ATTN,
    Perturbation,
)

SIGMA_SLACK = 1e-6  # sigmas are fp32: 0.725 is a little more


class TextGuidance(StrEnum):
    """In which direction `cfg` leads."""

    plain = "plain"
    zero_star = "zero_star"
    apg = "apg"


class GuidanceScale(StrEnum):
    """How the numbers of `cfg` and `modality` are meant."""

    reference = "reference"
    paper = "paper"


@dataclass(kw_only=True, slots=True)
class GuidanceConfig:
    """How strongly one stream is guided. The defaults do not guide."""

    cfg: float | None = None
    """Weight of the prompt against the negative context. None: off."""
    stg: float = 0.0
    """Weight against the prediction with self-attention skipped in `stg_blocks`; 0 = off."""
    stg_blocks: list[int] = field(default_factory=list)
    """Transformer blocks whose self-attention is skipped for `stg`."""
    modality: float | None = None
    """Weight against the prediction without the other stream. None: off."""
    rescale: float = 0.0
    """How far the standard deviation is brought back to that of the unguided prediction: 0 = not, 1 = fully."""
    scale: GuidanceScale = GuidanceScale.reference
    """reference: `cfg` and `modality` are neutral at 1, as the released models' programs count them; paper: neutral at
    0, the s_t and s_m of the paper, which are one less."""
    text: TextGuidance = TextGuidance.plain
    """plain: away from the negative prediction; zero_star: away from its projection on the positive one; apg: the part
    along the positive prediction is weighted by `apg_parallel`, and the whole is at most `apg_threshold` long."""
    apg_parallel: float = 1.0
    """Weight of the part of the text guidance along the prediction, which saturates; 1 = as without apg, 0 = left out."""
    apg_threshold: float = 0.0
    """Longest text guidance before it is weighted, as the norm over a sample's stream; 0 = no bound (apg)."""
    sigma_low: float = 0.0
    """Guidance acts where sigma is at least this."""
    sigma_high: float = 1.0
    """Guidance acts where sigma is at most this."""
    skip_step: int = 0
    """After a step that computes the stream, so many steps use its denoised latents again; 0 = every step computes."""

    def __post_init__(self) -> None:
        self.scale = chosen(GuidanceScale, self.scale, "scale")
        self.text = chosen(TextGuidance, self.text, "text")
        for name in ("cfg", "stg", "modality", "apg_parallel", "apg_threshold"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name}={value}: must be a finite number")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"rescale={self.rescale}: must be in [0, 1]")
        if any(block < 0 for block in self.stg_blocks):
            raise ConfigError(f"stg_blocks={self.stg_blocks}: block numbers start at 0")
        if self.stg != 0 and not self.stg_blocks:
            raise ConfigError(f"stg={self.stg}: needs stg_blocks, the blocks whose self-attention is skipped")
        if self.apg_threshold < 0:
            raise ConfigError(f"apg_threshold={self.apg_threshold}: must be >= 0, where 0 is no bound")
        if self.text is not TextGuidance.apg and (self.apg_parallel, self.apg_threshold) != (1, 0):
            raise ConfigError(f"apg_parallel, apg_threshold: have no effect with text={self.text}; set text=apg")
        if not 0 <= self.sigma_low < self.sigma_high <= 1:
            raise ConfigError(
                f"sigma_low={self.sigma_low}, sigma_high={self.sigma_high}: need 0 <= sigma_low < sigma_high <= 1"
            )
        if self.skip_step < 0:
            raise ConfigError(f"skip_step={self.skip_step}: must be >= 0")

    @property
    def text_weight(self) -> float:
        """Factor of the difference between the predictions with the prompt and with the negative context; 0 = off."""
        return self._weight(self.cfg)

    @property
    def modality_weight(self) -> float:
        """Factor of the difference between the predictions with and without the other stream; 0 = off."""
        return self._weight(self.modality)

    def _weight(self, value: float | None) -> float:
        neutral = 1 if self.scale is GuidanceScale.reference else 0
        return 0.0 if value is None else value - neutral

    def at(self, sigma: float) -> "GuidanceConfig":
        """Itself where `sigma` lies in its interval, one that does not guide elsewhere.

        Source: Kynkäänniemi et al. 2024 (arXiv:2404.07724).
        """
        if self.sigma_low - SIGMA_SLACK <= sigma <= self.sigma_high + SIGMA_SLACK:
            return self
        return replace(self, cfg=None, stg=0.0, modality=None, rescale=0.0)

    def computes(self, step: int) -> bool:
        """Whether the stream is computed at a step, counted from 0; else its last denoised latents are used again."""
        return step % (self.skip_step + 1) == 0


def combine(
    cond: Tensor, uncond: Tensor | None, perturbed: Tensor | None, isolated: Tensor | None, guidance: GuidanceConfig
) -> Tensor:
    """One denoised tensor from up to four, in the dtype of `cond`; the arithmetic is fp32. None: that term is left out.

    `uncond`: with the negative context. `perturbed`: with self-attention skipped in some blocks. `isolated`: without
    the exchange between the streams. Rescaling, zero_star and apg take sums over the *whole* tensor: hand in one sample
    at a time.

    Sources: Ho and Salimans 2022 (arXiv:2207.12598), eq. 6; spatiotemporal skip guidance, Hyung et al. 2024
    (arXiv:2411.18664); rescale, Lin et al. 2023 (arXiv:2305.08891), eq. 15-16; modality guidance (arXiv:2601.03233).
    """
    base = cond.float()
    guided = base
    if uncond is not None and guidance.text_weight != 0:
        guided = guided + guidance.text_weight * text_direction(base, uncond.float(), guidance)
    for other, weight in ((perturbed, guidance.stg), (isolated, guidance.modality_weight)):
        if other is not None and weight != 0:
            guided = guided + weight * (base - other.float())
    if guidance.rescale != 0:
        guided = guided * (guidance.rescale * _deviation_ratio(base, guided) + (1 - guidance.rescale))
    return guided.to(cond.dtype)


def _deviation_ratio(base: Tensor, guided: Tensor) -> Tensor:
    """std of `base` over that of `guided`; 1 where `guided` is the same everywhere, as silence that is given can be."""
    deviation = guided.std()
    return torch.where(deviation > 0, base.std() / deviation, 1.0)


def text_direction(cond: Tensor, uncond: Tensor, guidance: GuidanceConfig) -> Tensor:
    """Where text guidance leads, of one sample in fp32.

    Sources: zero_star, Fan et al. 2025 (arXiv:2503.18886); apg, Sadat et al. 2024 (arXiv:2410.02416).
    """
    if guidance.text is TextGuidance.zero_star:
        return cond - uncond * ((cond * uncond).sum() / (uncond.square().sum() + 1e-8))
    direction = cond - uncond
    if guidance.text is TextGuidance.apg:
        if guidance.apg_threshold > 0:
            direction = direction * (guidance.apg_threshold / direction.norm()).clamp(max=1)
        along = cond * ((direction * cond).sum() / cond.square().sum().clamp_min(1e-12))
        direction = direction - (1 - guidance.apg_parallel) * along
    return direction


class Pass(NamedTuple):
    """One of the predictions that guidance needs."""

    name: str  # of the argument of `combine`
    negative: bool
    perturbation: list[Perturbation]


def needed_passes(video: GuidanceConfig | None, audio: GuidanceConfig | None) -> list[Pass]:
    """The passes that the guidance of the streams needs, in the order cond, uncond, perturbed, isolated.

    None for a stream that does not run; alone, a stream is isolated already.
    """
    streams = [stream for stream in (video, audio) if stream is not None]
    passes = [Pass("cond", False, [])]
    if any(stream.text_weight != 0 for stream in streams):
        passes.append(Pass("uncond", True, []))
    kinds = ((SKIP_VIDEO_SELF_ATTN, video), (SKIP_AUDIO_SELF_ATTN, audio))
    skipped: list[Perturbation] = [(kind, list(s.stg_blocks)) for kind, s in kinds if s is not None and s.stg != 0]
    if skipped:
        passes.append(Pass("perturbed", False, skipped))
    if len(streams) == 2 and any(stream.modality_weight != 0 for stream in streams):
        passes.append(Pass("isolated", False, [(SKIP_A2V, None), (SKIP_V2A, None)]))
    return passes

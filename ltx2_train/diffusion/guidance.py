"""Guidance: several predictions of the model made into one, and the guider that turns a model into a denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ltx2_train.diffusion.conditioning import StreamConditioning
from ltx2_train.diffusion.path import to_denoised
from ltx2_train.diffusion.sampler import Streams
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import (
    SKIP_A2V,
    SKIP_AUDIO_SELF_ATTN,
    SKIP_V2A,
    SKIP_VIDEO_SELF_ATTN,
    Modality,
    Perturbation,
    Perturbations,
    Velocity,
)


def combine(
    cond: Tensor,
    uncond: Tensor | None,
    perturbed: Tensor | None,
    isolated: Tensor | None,
    *,
    cfg: float,
    stg: float,
    modality: float,
    rescale: float,
) -> Tensor:
    """One denoised tensor from up to four, in the dtype of `cond`; the arithmetic is fp32. None: that term is left out.

    `uncond`: with the negative context. `perturbed`: with self-attention skipped in some blocks. `isolated`: without
    the exchange between the streams. `cfg` and `modality` are neutral at 1, `stg` and `rescale` at 0. `rescale` moves
    the standard deviation of the *whole* tensor towards that of `cond`: hand in one sample at a time.

    Sources: Ho and Salimans 2022 (arXiv:2207.12598), eq. 6; spatiotemporal skip guidance, Hyung et al. 2024
    (arXiv:2411.18664); rescale, Lin et al. 2023 (arXiv:2305.08891), eq. 15-16; modality guidance (arXiv:2601.03233).
    """
    base = cond.float()
    guided = base
    for other, strength in ((uncond, cfg - 1), (perturbed, stg), (isolated, modality - 1)):
        if other is not None and strength != 0:
            guided = guided + strength * (base - other.float())
    if rescale != 0:
        guided = guided * (rescale * base.std() / guided.std() + (1 - rescale))
    return guided.to(cond.dtype)


@dataclass(kw_only=True, slots=True)
class GuidanceConfig:
    """How strongly one stream is guided. The defaults do not guide."""

    cfg: float = 1.0
    """Weight of the prompt against the negative context; 1 = off."""
    stg: float = 0.0
    """Weight against the prediction with self-attention skipped in `stg_blocks`; 0 = off."""
    stg_blocks: list[int] = field(default_factory=list)
    """Transformer blocks whose self-attention is skipped for `stg`."""
    modality: float = 1.0
    """Weight against the prediction without the other stream; 1 = off."""
    rescale: float = 0.0
    """How far the standard deviation is brought back to that of the unguided prediction: 0 = not, 1 = fully."""

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"rescale={self.rescale}: must be in [0, 1]")
        if any(block < 0 for block in self.stg_blocks):
            raise ConfigError(f"stg_blocks={self.stg_blocks}: block numbers start at 0")
        if self.stg != 0 and not self.stg_blocks:
            raise ConfigError(f"stg={self.stg}: needs stg_blocks, the blocks whose self-attention is skipped")


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
    if any(stream.cfg != 1 for stream in streams):
        passes.append(Pass("uncond", True, []))
    kinds = ((SKIP_VIDEO_SELF_ATTN, video), (SKIP_AUDIO_SELF_ATTN, audio))
    skipped: list[Perturbation] = [(kind, list(s.stg_blocks)) for kind, s in kinds if s is not None and s.stg != 0]
    if skipped:
        passes.append(Pass("perturbed", False, skipped))
    if len(streams) == 2 and any(stream.modality != 1 for stream in streams):
        passes.append(Pass("isolated", False, [(SKIP_A2V, None), (SKIP_V2A, None)]))
    return passes


class Contexts(NamedTuple):
    """Text features of B requests, positive and negative, padded to one length L."""

    positive: Tensor  # (B, L, W)
    negative: Tensor  # (B, L, W)
    mask: Tensor | None  # (2 B, L), of the positive ones, then of the negative ones; None: all rows are valid


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInputs:
    """What the model is told about one stream of B requests, beside the noisy tokens and the sigma."""

    conditioning: StreamConditioning
    positions: Tensor  # (B or 1, n, T, 2)
    contexts: Contexts
    guidance: GuidanceConfig
    keyframes_mask: Tensor | None = None  # (B, T, 1)


class Guider:
    """A denoiser made of a model and guidance: `(noisy, sigma) -> denoised`, all needed passes in one forward.

    The latents are handed to the model in `dtype`; the state, the sigmas and the guidance stay fp32.
    """

    def __init__(
        self,
        model: Callable[[Modality | None, Modality | None, Perturbations | None], Velocity],
        video: StreamInputs | None,
        audio: StreamInputs | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.passes = needed_passes(*(None if inputs is None else inputs.guidance for inputs in (video, audio)))
        self.video = None if video is None else _PassInputs.build(video, self.passes, dtype)
        self.audio = None if audio is None else _PassInputs.build(audio, self.passes, dtype)

    def __call__(self, noisy: Streams, sigma: Tensor) -> Streams:
        """Denoised tokens of both streams. `sigma` () is on the CPU."""
        video = None if self.video is None else self.video.modality(noisy.video, sigma, self.dtype)
        audio = None if self.audio is None else self.audio.modality(noisy.audio, sigma, self.dtype)
        batch_size = len(next(tokens for tokens in noisy if tokens is not None))
        velocity = self.model(video, audio, self._perturbations(batch_size))
        return Streams(
            video=None if self.video is None else self.video.guided(noisy.video, velocity.video, sigma),
            audio=None if self.audio is None else self.audio.guided(noisy.audio, velocity.audio, sigma),
        )

    def _perturbations(self, batch_size: int) -> Perturbations | None:
        if not any(p.perturbation for p in self.passes):
            return None
        return [p.perturbation for p in self.passes for _ in range(batch_size)]


@dataclass(frozen=True, slots=True)
class _PassInputs:
    """One stream's inputs, repeated for every pass once, so that a step only adds what changes."""

    inputs: StreamInputs
    passes: list[Pass]
    positions: Tensor
    context: Tensor
    context_mask: Tensor | None
    timestep_index: Tensor | None
    keyframes_mask: Tensor | None

    @classmethod
    def build(cls, inputs: StreamInputs, passes: list[Pass], dtype: torch.dtype) -> "_PassInputs":
        times = len(passes)
        positions, contexts = inputs.positions, inputs.contexts
        return cls(
            inputs=inputs,
            passes=passes,
            # One row serves all passes, and stays the same tensor object: RoPE tables are cached by it.
            positions=positions if len(positions) == 1 else positions.repeat(times, 1, 1, 1),
            context=torch.cat([contexts.negative if p.negative else contexts.positive for p in passes]).to(dtype),
            context_mask=_mask_of(contexts, passes),
            timestep_index=_repeated(inputs.conditioning.index, times),
            keyframes_mask=_repeated(inputs.keyframes_mask, times),
        )

    def modality(self, noisy: Tensor | None, sigma: Tensor, dtype: torch.dtype) -> Modality:
        """`noisy` (B, T, C) as the input of all passes."""
        assert noisy is not None, "a stream with inputs needs tokens"
        times, conditioning = len(self.passes), self.inputs.conditioning
        return Modality(
            latent=noisy.to(dtype).repeat(times, 1, 1),
            sigma=conditioning.sigma(sigma).to(noisy.device, non_blocking=True).repeat(times),
            timesteps=conditioning.timesteps(sigma).to(noisy.device, non_blocking=True).repeat(times, 1),
            timestep_index=self.timestep_index,
            positions=self.positions,
            context=self.context,
            context_mask=self.context_mask,
            keyframes_mask=self.keyframes_mask,
        )

    def guided(self, noisy: Tensor | None, velocity: Tensor | None, sigma: Tensor) -> Tensor:
        """One denoised tensor (B, T, C) fp32 from the velocities (passes * B, T, C)."""
        assert noisy is not None, "a stream with inputs needs tokens"
        assert velocity is not None, "the model answers for every stream that it was given"
        conditioning = self.inputs.conditioning
        token_sigma = conditioning.per_token(conditioning.timesteps(sigma).to(noisy.device, non_blocking=True))
        chunks = zip(self.passes, velocity.chunk(len(self.passes)), strict=True)
        denoised = {p.name: to_denoised(noisy, chunk, token_sigma) for p, chunk in chunks}
        return _combine_each(denoised, self.inputs.guidance)


def _combine_each(denoised: dict[str, Tensor], guidance: GuidanceConfig) -> Tensor:
    """`combine`, one sample at a time: rescaling takes a standard deviation that must not see the batch-mates."""
    names = ("cond", "uncond", "perturbed", "isolated")
    rows = zip(*(denoised[n].unbind() if n in denoised else [None] * len(denoised["cond"]) for n in names), strict=True)
    strengths = {name: getattr(guidance, name) for name in ("cfg", "stg", "modality", "rescale")}
    return torch.stack([combine(*row, **strengths) for row in rows])


def _repeated(tensor: Tensor | None, times: int) -> Tensor | None:
    return None if tensor is None else tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _mask_of(contexts: Contexts, passes: Sequence[Pass]) -> Tensor | None:
    """(passes * B, L): the masks of the contexts, in pass order."""
    if contexts.mask is None:
        return None
    positive, negative = contexts.mask.chunk(2)
    return torch.cat([negative if p.negative else positive for p in passes])

"""The training objective: from a micro-batch to one unreduced velocity loss per sample and stream."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from ltx2_train import geometry
from ltx2_train.batch import Batch
from ltx2_train.diffusion.choice import chosen
from ltx2_train.diffusion.conditioning import (
    CONDITIONS,
    Conditioning,
    ConditioningConfig,
    ConditioningKind,
    StreamConditioning,
    check_conditioning,
    context_mask,
    draw_conditioning,
    keyframes_mask,
)
from ltx2_train.diffusion.path import to_noisy, velocity_of
from ltx2_train.diffusion.sigmas import SigmaConfig, SigmaDistribution
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import SKIP_A2V, SKIP_V2A, Modality, Perturbations, Stream, Velocity
from ltx2_train.model.patchify import patchify_audio, patchify_video
from ltx2_train.record import TextFeatures
from ltx2_train.rng import BatchRng

Model = Callable[[Modality | None, Modality | None, Perturbations | None], Velocity]


class SigmaCoupling(StrEnum):
    """How the sigmas of a sample's two streams hang together."""

    shared = "shared"
    independent = "independent"
    mixture = "mixture"


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What is learned."""

    sigma: SigmaConfig = field(default_factory=SigmaConfig)
    """Where sigmas are drawn."""
    coupling: SigmaCoupling = SigmaCoupling.shared
    """shared: one sigma for both streams, as in sampling, from the video token count (audio's where there is no video);
    independent: each stream draws its own from its own token count; mixture: a share of the samples is shared."""
    shared_probability: float = 0.5
    """Share of the samples with one sigma for both streams (mixture)."""
    weight_video: float = 1.0
    """Weight of the video loss."""
    weight_audio: float = 1.0
    """Weight of the audio loss."""
    conditioning: list[ConditioningConfig] = field(default_factory=list)
    """What is given clean, to which share of the samples. Empty: everything is generated from text."""
    caption_dropout: float = 0.0
    """Share of the samples whose caption is replaced by the null context, which text guidance needs."""
    streams: list[Stream] = field(default_factory=lambda: [Stream.video, Stream.audio])
    """The streams that the model runs. One alone: the other is not even passed, and there is no exchange."""

    def __post_init__(self) -> None:
        self.coupling = chosen(SigmaCoupling, self.coupling, "coupling")
        self.streams = [chosen(Stream, stream, "streams") for stream in self.streams]
        if not self.streams or len(set(self.streams)) < len(self.streams):
            raise ConfigError(f"streams={[str(s) for s in self.streams]}: name video, audio or both, each once")
        for name in ("shared_probability", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be in [0, 1]")
        self._check_weights()
        self._check_conditioning()

    def _check_weights(self) -> None:
        for name in ("weight_video", "weight_audio"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be >= 0")
        if not sum(getattr(self, f"weight_{stream}") for stream in self.streams) > 0:
            raise ConfigError("weight_video, weight_audio: 0 for all streams that run; nothing would be learned")

    def _check_conditioning(self) -> None:
        check_conditioning(self.conditioning)
        for config in self.conditioning:
            needed = [Stream.video] if config.kind == ConditioningKind.first_frame else list(Stream)
            if not set(needed) <= set(self.streams):
                listed = " and ".join(needed)
                raise ConfigError(f"conditioning.kind={config.kind}: needs {listed} in streams")


@dataclass(frozen=True, slots=True)
class Losses:
    """Velocity losses of one micro-batch, per sample and fp32, and what is needed to add them up.

    `has_*` (B,) are 1 where a stream counts: it is there, is not given, and its record is good. Where it is 0 the loss
    and its gradient are exactly 0.
    """

    video: Tensor  # (B,)
    audio: Tensor  # (B,)
    has_video: Tensor  # (B,)
    has_audio: Tensor  # (B,)
    sigma_video: Tensor  # (B,)
    sigma_audio: Tensor  # (B,)
    weight_video: float
    weight_audio: float

    def counts(self) -> Tensor:
        """(2,): how many samples count in the video and in the audio loss."""
        return torch.stack([self.has_video.sum(), self.has_audio.sum()])

    def total(self, counts: Tensor) -> Tensor:
        """This micro-batch's share of the step's loss. `counts` (2,) are those of the whole step, over all ranks:
        the sum of the shares over micro-batches and ranks is the weighted sum of both streams' means over samples.
        """
        video_count, audio_count = counts.to(self.video.device, non_blocking=True).clamp(min=1)
        video = self.weight_video * (self.video * self.has_video).sum() / video_count
        return video + self.weight_audio * (self.audio * self.has_audio).sum() / audio_count


@dataclass(frozen=True, slots=True)
class StreamTask:
    """What the model is asked about one stream, and the answer. `modality` None: the stream does not run."""

    modality: Modality | None
    target: Tensor  # (B, T, C) velocity
    denoise_mask: Tensor | None  # (B, T): 0 for tokens that are given and do not count; None: all count
    has: Tensor  # (B,)
    sigma: Tensor  # (B,)

    def loss(self, velocity: Tensor | None) -> Tensor:
        """(B,) fp32 mean squared error over generated tokens and channels; exactly 0 where `has` is 0."""
        if velocity is None:
            return torch.zeros_like(self.has)
        per_token = (velocity.float() - self.target).square().mean(-1)
        if self.denoise_mask is None:
            return per_token.mean(1) * self.has
        counted = (self.denoise_mask > 0).float()
        return (per_token * counted).sum(1) / counted.sum(1).clamp(min=1) * self.has


@dataclass(frozen=True, slots=True)
class Task:
    """Both streams of a micro-batch, ready for the model."""

    video: StreamTask
    audio: StreamTask
    perturbations: Perturbations | None


class Objective:
    """Flow matching on both streams: noise the batch, ask the model for velocities, measure them.

    `null_text`: the encoder's output for the empty caption, needed for caption dropout. `keyframe_marker`: mark the
    tokens of the first latent frame, as sampling does, for a model that has the marker.
    Every draw is a function of (seed, step, position) under its own name, so that no setting moves another's draws.
    """

    def __init__(self, config: ObjectiveConfig, null_text: TextFeatures | None, keyframe_marker: bool) -> None:
        if config.caption_dropout > 0 and null_text is None:
            raise ConfigError(f"caption_dropout={config.caption_dropout}: there is no null context; give one or set 0")
        self.config = config
        self.null_text = null_text
        self.keyframe_marker = keyframe_marker
        self.distribution = config.sigma.build()

    def __call__(self, model: Model, batch: Batch, rng: BatchRng, *, sigma: Tensor | float | None = None) -> Losses:
        """The losses of `model` on a micro-batch.

        `sigma`, a number or (B,) on the CPU, stands for the drawn ones of both streams: for evaluation.
        """
        task = self.prepare(batch, rng, sigma=sigma)
        velocity = model(task.video.modality, task.audio.modality, task.perturbations)
        return Losses(
            video=task.video.loss(velocity.video),
            audio=task.audio.loss(velocity.audio),
            has_video=task.video.has,
            has_audio=task.audio.has,
            sigma_video=task.video.sigma,
            sigma_audio=task.audio.sigma,
            weight_video=self.config.weight_video,
            weight_audio=self.config.weight_audio,
        )

    def counts(self, batch: Batch, rng: BatchRng) -> Tensor:
        """(2,): what `Losses.counts` will say, from the same draws and without running the model."""
        given = draw_conditioning(self.config.conditioning, batch.bucket, rng, batch.video.device)
        has_video = self._has(Stream.video, batch.has_video, given.video)
        has_audio = self._has(Stream.audio, batch.has_audio, given.audio)
        return torch.stack([has_video.sum(), has_audio.sum()])

    def prepare(self, batch: Batch, rng: BatchRng, *, sigma: Tensor | float | None = None) -> Task:
        """Sigmas, noise, conditioning and context of a micro-batch. Nothing here waits for the device."""
        device, bucket = batch.video.device, batch.bucket
        given = draw_conditioning(self.config.conditioning, bucket, rng, device)
        sigma_video, sigma_audio = (
            self._sigmas(batch, rng, given) if sigma is None else _fixed_sigmas(sigma, len(batch))
        )
        video_text, audio_text, text_mask = self._context(batch, rng)
        video_task = self._stream_task(
            Stream.video,
            clean=patchify_video(batch.video),
            present=batch.has_video,
            given=given.video,
            sigma=sigma_video if bucket.frames else torch.zeros(len(batch)),
            rng=rng,
            positions=_video_positions(batch),
            context=video_text,
            context_mask=text_mask,
            keyframes_mask=keyframes_mask(bucket, len(batch), device) if self.keyframe_marker else None,
        )
        audio_task = self._stream_task(
            Stream.audio,
            clean=patchify_audio(batch.audio),
            present=batch.has_audio,
            given=given.audio,
            sigma=sigma_audio if bucket.audio_steps else torch.zeros(len(batch)),
            rng=rng,
            positions=geometry.batch_audio_positions(max(bucket.audio_steps, 1), device),
            context=audio_text,
            context_mask=text_mask,
        )
        return Task(video_task, audio_task, self._perturbations(batch))

    def _stream_task(
        self,
        stream: Stream,
        *,
        clean: Tensor,
        present: Tensor,
        given: StreamConditioning,
        sigma: Tensor,
        rng: BatchRng,
        **fields: Tensor | None,
    ) -> StreamTask:
        """Noise one stream: `clean` (B, T, C), `present` (B,), `sigma` (B,) on the CPU; `fields` are the modality's."""
        device, has = clean.device, self._has(stream, present, given)
        if stream not in self.config.streams:
            return StreamTask(modality=None, target=clean, denoise_mask=None, has=has, sigma=torch.zeros_like(has))
        # A placeholder may hold anything. A good record is left alone: its NaN must reach the loss, to be named there.
        clean = clean.masked_fill((present == 0)[:, None, None], 0)
        noise = rng.normal(f"noise.{stream}", clean.shape[1:], device)
        timesteps = given.timesteps(sigma).to(device, non_blocking=True)
        stream_sigma = given.sigma(sigma).to(device, non_blocking=True)
        modality = Modality(
            latent=to_noisy(clean, noise, given.per_token(timesteps)),
            sigma=stream_sigma,
            timesteps=timesteps,
            timestep_index=given.index,
            **fields,  # type: ignore[arg-type]  # checked by the two callers above
        )
        return StreamTask(
            modality=modality,
            target=velocity_of(clean, noise),
            denoise_mask=given.denoise_mask() if given.regions else None,
            has=has,
            sigma=stream_sigma,
        )

    def _has(self, stream: Stream, present: Tensor, given: StreamConditioning) -> Tensor:
        """(B,) fp32: 1 where the stream of a sample counts in the loss."""
        runs = float(stream in self.config.streams)
        return present * (~given.given).float().to(present.device, non_blocking=True) * runs

    def _sigmas(self, batch: Batch, rng: BatchRng, given: Conditioning) -> tuple[Tensor, Tensor]:
        """Sigmas (B,) of video and audio, on the CPU. Beside a given stream they may follow a law of their own."""
        video, audio = self._coupled_sigmas(batch, rng)
        for config in self.config.conditioning:
            if config.sigma is None:
                continue
            if CONDITIONS[config.kind].generated is Stream.video:
                own = self._draw_sigma(Stream.video, batch.bucket.video_tokens, rng, config.sigma.build())
                video = torch.where(given.audio.given, own, video)
            else:
                own = self._draw_sigma(Stream.audio, batch.bucket.audio_steps, rng, config.sigma.build())
                audio = torch.where(given.video.given, own, audio)
        return video, audio

    def _coupled_sigmas(self, batch: Batch, rng: BatchRng) -> tuple[Tensor, Tensor]:
        video = self._draw_sigma(Stream.video, batch.bucket.video_tokens, rng, self.distribution)
        audio = self._draw_sigma(Stream.audio, batch.bucket.audio_steps, rng, self.distribution)
        without_video = batch.bucket.frames == 0 or Stream.video not in self.config.streams
        if without_video or self.config.coupling == SigmaCoupling.independent:
            return video, audio
        if self.config.coupling == SigmaCoupling.shared:
            return video, video
        return video, torch.where(rng.uniform("sigma.coupling") < self.config.shared_probability, video, audio)

    def _draw_sigma(self, stream: Stream, tokens: int, rng: BatchRng, law: SigmaDistribution) -> Tensor:
        uniform, choice = rng.uniform(f"sigma.{stream}.uniform", (2,)).unbind(1)
        return law.from_draws(tokens, rng.normal(f"sigma.{stream}.normal", ()), uniform, choice)

    def _context(self, batch: Batch, rng: BatchRng) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text features of both streams (B, L, W) and their mask, with the null context where a caption is dropped."""
        video, audio, lengths = batch.video_text, batch.audio_text, list(batch.text_lengths)
        if self.config.caption_dropout > 0 and self.null_text is not None:
            dropped = rng.uniform("caption_dropout") < self.config.caption_dropout
            null = self.null_text
            lengths = [len(null.video) if drop else n for drop, n in zip(dropped.tolist(), lengths, strict=True)]
            video = _with_null(video, null.video, dropped, max(lengths))
            audio = _with_null(audio, null.audio, dropped, max(lengths))
        return video, audio, context_mask(lengths, video.device)

    def _perturbations(self, batch: Batch) -> Perturbations | None:
        """No exchange between the streams of a sample that has only one of them."""
        if batch.bucket.signature == "va" or len(self.config.streams) == 1:
            return None
        return [[(SKIP_A2V, None), (SKIP_V2A, None)] for _ in batch.keys]


def _fixed_sigmas(sigma: Tensor | float, num_samples: int) -> tuple[Tensor, Tensor]:
    both = torch.as_tensor(sigma, dtype=torch.float32).expand(num_samples)
    return both, both


def _video_positions(batch: Batch) -> Tensor:
    bucket, device = batch.bucket, batch.video.device
    if bucket.frames == 0:
        return geometry.batch_video_positions(1, 1, 1, (1.0,), device)
    return geometry.batch_video_positions(bucket.frames, bucket.height, bucket.width, batch.fps, device)


def _with_null(features: Tensor, null: Tensor, dropped: Tensor, length: int) -> Tensor:
    """`features` (B, L, W) cut or padded to `length` rows, with `null` (L0, W) in the place of the dropped ones."""
    features = pad(features, (0, 0, 0, length - features.shape[1]))
    rows = pad(null[:length], (0, 0, 0, length - len(null[:length]))).to(features, non_blocking=True)
    return torch.where(dropped.to(features.device, non_blocking=True)[:, None, None], rows, features)

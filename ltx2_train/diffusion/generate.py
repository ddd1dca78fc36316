"""The one way from prompts to latents, for training evaluations and the command line alike. Callers decode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ltx2_train import geometry
from ltx2_train.diffusion.conditioning import (
    Conditioning,
    Region,
    context_mask,
    keyframes_mask,
    no_conditioning,
)
from ltx2_train.diffusion.guider import Contexts, Guider, StreamInputs
from ltx2_train.diffusion.path import to_noisy
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.diffusion.sampler import Streams, holding, per_stream, restoring
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import Modality, Perturbations, Velocity
from ltx2_train.model.patchify import patchify_audio, patchify_video, unpatchify_audio, unpatchify_video
from ltx2_train.record import Bucket, TextFeatures
from ltx2_train.rng import generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One clip to be generated. What it becomes depends on nothing but itself, the model and the profile."""

    text: TextFeatures
    negative: TextFeatures  # the null context, or the features of a negative prompt
    frames: int = 1  # pixel frames, 8k + 1
    height: int = 32  # pixels, a multiple of 32
    width: int = 32
    fps: float = 24.0
    seed: int = 0
    has_video: bool = True  # False: sound alone, `frames / fps` seconds long
    has_audio: bool = True
    first_frame: Tensor | None = None  # (128, 1, H, W) clean latent of the first frame
    given_video: Tensor | None = None  # (128, F, H, W) clean latents: only sound is generated
    given_audio: Tensor | None = None  # (8, T, 16) clean latents: only the picture is generated

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ConfigError(f"fps={self.fps}: must be > 0")
        if not (self.has_video or self.has_audio):
            raise ConfigError("has_video, has_audio: a request needs at least one of them")
        bucket = self.bucket
        grid = (geometry.VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width)
        _check_shape("first_frame", self.first_frame, (grid[0], min(grid[1], 1), *grid[2:]))
        _check_shape("given_video", self.given_video, grid)
        _check_shape(
            "given_audio", self.given_audio, (geometry.AUDIO_CHANNELS, bucket.audio_steps, geometry.AUDIO_BINS)
        )
        video_is_given = not self.has_video or self.given_video is not None
        if video_is_given and (not self.has_audio or self.given_audio is not None):
            raise ConfigError("given_video, given_audio: everything is given; there is nothing to generate")

    @property
    def bucket(self) -> Bucket:
        """The latent sizes. Raises `DataError` where the video codec cannot have the size."""
        grid = (0, 0, 0)
        if self.has_video:
            rows, columns = geometry.latent_size(self.height, "height"), geometry.latent_size(self.width, "width")
            grid = (geometry.latent_frames(self.frames), rows, columns)
        return Bucket(*grid, geometry.audio_latent_length(self.frames, self.fps) if self.has_audio else 0)


@dataclass(frozen=True, slots=True)
class Generated:
    """Clean latents of the requests, fp32, in their order; None for a stream that they do not have."""

    video: Tensor | None  # (B, 128, F, H, W)
    audio: Tensor | None  # (B, 8, T, 16)


# Not inference_mode: positions are cached across calls, and an inference tensor in the cache would break training.
@torch.no_grad()
def generate(
    model: Callable[[Modality | None, Modality | None, Perturbations | None], Velocity],
    requests: Request | Sequence[Request],
    profile: SamplerProfile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    keyframe_marker: bool = True,
    passes_at_once: int | None = None,
) -> Generated:
    """The latents of requests of one size, together in one batch.

    `dtype` is what the model is fed; the state stays fp32. `keyframe_marker`: mark the first latent frame's tokens, as
    a model that has the marker was trained; others ignore it. `passes_at_once`: most passes of guidance in one forward
    (`Guider`). Raises `ConfigError` when the requests differ in size.
    """
    requests = [requests] if isinstance(requests, Request) else list(requests)
    device, bucket = torch.device(device), _common_bucket(requests)
    given = _conditioning(requests, bucket, device)
    clean = Streams(_clean_video(requests, bucket, device), _clean_audio(requests, bucket, device))
    denoise_mask = Streams(given.video.denoise_mask(), given.audio.denoise_mask())
    draw = _noise_of(requests, clean)
    noisy = per_stream(to_noisy, clean, draw(), denoise_mask)
    video, audio = _inputs(requests, bucket, given, profile, keyframe_marker)
    restore = restoring(clean, denoise_mask)
    denoise = holding(Guider(model, video, audio, dtype, passes_at_once), restore)
    sampled = profile.integrate(denoise, noisy, _sigmas_from_noise(profile, bucket), draw, restore)
    return Generated(
        video=None if sampled.video is None else _video_grid(sampled.video, bucket),
        audio=None if sampled.audio is None else unpatchify_audio(sampled.audio),
    )


def _common_bucket(requests: Sequence[Request]) -> Bucket:
    buckets = sorted({request.bucket for request in requests})
    if len(buckets) != 1:
        sizes = ", ".join(map(str, buckets)) or "none"
        raise ConfigError(f"requests of latent sizes {sizes}: generate those of one size together, the others apart")
    return buckets[0]


def _conditioning(requests: Sequence[Request], bucket: Bucket, device: torch.device) -> Conditioning:
    """What the requests give. A first frame is given to those that have one, a whole stream likewise."""
    given = no_conditioning(bucket, len(requests), device)
    if bucket.frames:
        with_first_frame = torch.tensor([request.first_frame is not None for request in requests])
        given.video.keep(Region.first_frame, with_first_frame)
    given.video.given |= torch.tensor([request.given_video is not None for request in requests])
    given.audio.given |= torch.tensor([request.given_audio is not None for request in requests])
    return given


def _clean_video(requests: Sequence[Request], bucket: Bucket, device: torch.device) -> Tensor | None:
    """(B, T, 128) fp32: what is given, zeros elsewhere."""
    if not bucket.frames:
        return None
    clean = torch.zeros(len(requests), geometry.VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width)
    for row, request in zip(clean, requests, strict=True):
        if request.given_video is not None:
            row.copy_(request.given_video)
        if request.first_frame is not None:
            row[:, :1] = request.first_frame
    return patchify_video(clean).to(device)


def _clean_audio(requests: Sequence[Request], bucket: Bucket, device: torch.device) -> Tensor | None:
    if not bucket.audio_steps:
        return None
    clean = torch.zeros(len(requests), geometry.AUDIO_CHANNELS, bucket.audio_steps, geometry.AUDIO_BINS)
    for row, request in zip(clean, requests, strict=True):
        if request.given_audio is not None:
            row.copy_(request.given_audio)
    return patchify_audio(clean).to(device)


def _noise_of(requests: Sequence[Request], clean: Streams) -> Callable[[], Streams]:
    """A function that draws standard normal noise of the shape of `clean`, each request's from its own seed.

    The noise is drawn on the CPU, so that a seed means the same on every device. The first draw is what generation starts
    from; the following ones are for samplers that add noise on the way.
    """
    sources = {stream: [generator(r.seed, f"sample.{stream}") for r in requests] for stream in clean._fields}

    def drawn(stream: str, like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in sources[stream]]).to(like.device)

    return lambda: Streams(drawn("video", clean.video), drawn("audio", clean.audio))


def _sigmas_from_noise(profile: SamplerProfile, bucket: Bucket) -> Tensor:
    sigmas = profile.sigmas(bucket.schedule_tokens)
    if sigmas[0] != 1:
        raise ConfigError(
            f"sampler profile {profile.name}: starts at sigma {sigmas[0]:.6g}, to refine latents; what starts from noise "
            "needs a schedule that starts at 1"
        )
    return sigmas


def _inputs(
    requests: Sequence[Request], bucket: Bucket, given: Conditioning, profile: SamplerProfile, keyframe_marker: bool
) -> tuple[StreamInputs | None, StreamInputs | None]:
    """What the model is told about each stream."""
    device, video, audio = given.video.device, None, None
    if bucket.frames:
        rates = tuple(float(request.fps) for request in requests)
        grid = (bucket.frames, bucket.height, bucket.width)
        video = StreamInputs(
            conditioning=given.video,
            positions=geometry.batch_video_positions(*grid, rates, device),
            keyframes_mask=keyframes_mask(bucket, len(requests), device) if keyframe_marker else None,
            guidance=profile.video,
            contexts=_contexts([r.text.video for r in requests], [r.negative.video for r in requests], device),
        )
    if bucket.audio_steps:
        audio = StreamInputs(
            conditioning=given.audio,
            positions=geometry.batch_audio_positions(bucket.audio_steps, device),
            guidance=profile.audio,
            contexts=_contexts([r.text.audio for r in requests], [r.negative.audio for r in requests], device),
        )
    return video, audio


def _contexts(texts: Sequence[Tensor], negatives: Sequence[Tensor], device: torch.device) -> Contexts:
    """Positive and negative contexts, padded to one length so that they fit in one forward."""
    lengths = [len(rows) for rows in (*texts, *negatives)]
    padded = torch.stack([pad(rows.float(), (0, 0, 0, max(lengths) - len(rows))) for rows in (*texts, *negatives)])
    positive, negative = padded.to(device).chunk(2)
    return Contexts(positive, negative, context_mask(lengths, device))


def _video_grid(tokens: Tensor, bucket: Bucket) -> Tensor:
    return unpatchify_video(tokens, bucket.frames, bucket.height, bucket.width)


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tuple(tensor.shape) != shape or 0 in shape):
        raise ConfigError(f"{name}: shape {tuple(tensor.shape)}; the request needs {shape}")

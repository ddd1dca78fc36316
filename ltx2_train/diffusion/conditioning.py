"""What of a sample is given clean and what is to be generated. A new training mode is a new entry of `CONDITIONS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from ltx2_train.diffusion.choice import chosen
from ltx2_train.diffusion.sigmas import SigmaConfig
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import Stream
from ltx2_train.record import Bucket
from ltx2_train.rng import BatchRng


class ConditioningKind(StrEnum):
    """What can be given."""

    first_frame = "first_frame"
    given_audio = "given_audio"
    given_video = "given_video"


@dataclass(kw_only=True, slots=True)
class ConditioningConfig:
    """One thing that is given to a share of the samples."""

    kind: ConditioningKind = ConditioningKind.first_frame
    """What is given: first_frame, given_audio (the whole audio, clean at sigma 0) or given_video."""
    probability: float = 1.0
    """Share of the samples. given_audio and given_video exclude each other; theirs add up to at most 1."""
    sigma: SigmaConfig | None = None
    """Where the sigmas of the other stream are drawn for these samples (given_audio, given_video). None: as for all. What a
    given stream tells is needed where the other one is nearly all noise; drawn as for all, few samples are."""

    def __post_init__(self) -> None:
        self.kind = chosen(ConditioningKind, self.kind, "conditioning.kind")
        if self.sigma is not None and CONDITIONS[self.kind].generated is None:
            raise ConfigError(f"conditioning.{self.kind}.sigma: no other stream belongs to it; leave it out")
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"conditioning.{self.kind}.probability={self.probability}: must be in [0, 1]")


class Region(StrEnum):
    """A part of the video tokens that can be given by itself; where it lies follows from the bucket alone."""

    first_frame = "first_frame"


@dataclass(slots=True)
class StreamConditioning:
    """What of one stream is given, for the B samples of a batch.

    Which tokens lie in a region is the same for all samples and steps of a bucket; which samples are given the region
    is in the values. So a sample has a few distinct timesteps, nobody has to search for them, and the index of tokens
    is one cached tensor per geometry.
    """

    bucket: Bucket
    device: torch.device
    given: Tensor  # (B,) bool, on the CPU: the whole stream is clean, its sigma 0
    regions: dict[Region, Tensor] = field(default_factory=dict)  # (B,) bool, on the CPU: who is given the region

    def keep(self, region: Region, samples: Tensor) -> None:
        """Give a region to `samples` (B,) bool, on the CPU."""
        if samples.any():
            self.regions[region] = samples | self.regions.get(region, torch.zeros_like(samples))

    @property
    def index(self) -> Tensor | None:
        """(B, T) int64, on the device: which of a sample's K levels a token has. None: there is but one."""
        if not self.regions:
            return None
        return _region_index(tuple(self.regions), self.bucket, len(self.given), self.device)

    def levels(self) -> Tensor:
        """(B, K) fp32, on the CPU: the denoise mask of tokens in no region, the first, the second, both, ..."""
        levels = torch.ones(len(self.given), 1)
        for samples in self.regions.values():
            levels = torch.cat([levels, levels * (~samples[:, None]).float()], dim=1)
        return levels

    def sigma(self, sigma: Tensor) -> Tensor:
        """The stream's noise level (B,) from the drawn or scheduled one, (B,) or (): 0 where the stream is given."""
        return sigma * (~self.given).float()

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Distinct token sigmas (B, K) fp32 on the CPU; with `index`, the compact form that the model takes."""
        return self.sigma(sigma)[:, None] * self.levels()

    def per_token(self, values: Tensor) -> Tensor:
        """(B, K) on the device to one value per token, (B, T); (B, 1) where all tokens are alike."""
        return values if self.index is None else values.gather(1, self.index)

    def denoise_mask(self) -> Tensor:
        """1 where a token is to be generated, 0 where it is given: (B, T), or (B, 1) where all tokens are alike."""
        return self.per_token(self.timesteps(torch.ones(())).to(self.device, non_blocking=True))


@lru_cache(maxsize=256)
def _region_index(regions: tuple[Region, ...], bucket: Bucket, num_samples: int, device: torch.device) -> Tensor:
    """(B, T) int64: token t is in the i-th region where bit i of its number is set. One object per geometry."""
    bits = [(_region_tokens(region, bucket).long() << i) for i, region in enumerate(regions)]
    return torch.stack(bits).sum(0).expand(num_samples, -1).contiguous().to(device)


def _region_tokens(region: Region, bucket: Bucket) -> Tensor:
    """(T,) bool: which video tokens lie in the region."""
    match region:
        case Region.first_frame:
            return torch.arange(max(bucket.video_tokens, 1)) < max(bucket.height * bucket.width, 1)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What of both streams is given. A stream that the bucket lacks is one token, never given."""

    bucket: Bucket
    video: StreamConditioning
    audio: StreamConditioning


def _give_first_frame(conditioning: Conditioning, samples: Tensor) -> None:
    if conditioning.bucket.frames > 1:  # a single frame is the whole sample: there would be nothing left to learn
        conditioning.video.keep(Region.first_frame, samples)


def _give_audio(conditioning: Conditioning, samples: Tensor) -> None:
    if conditioning.bucket.signature == "va":
        conditioning.audio.given |= samples


def _give_video(conditioning: Conditioning, samples: Tensor) -> None:
    if conditioning.bucket.signature == "va":
        conditioning.video.given |= samples


@dataclass(frozen=True, slots=True)
class Condition:
    """How a kind of conditioning is given. Kinds of one `group` exclude each other: they share one draw per sample.

    `give` leaves every sample something to generate: where nothing would be left, it gives nothing. `generated`: the
    stream that is left where the whole other one is given.
    """

    group: str
    give: Callable[[Conditioning, Tensor], None]
    generated: Stream | None = None


CONDITIONS: dict[ConditioningKind, Condition] = {
    ConditioningKind.first_frame: Condition("first_frame", _give_first_frame),
    ConditioningKind.given_audio: Condition("given_stream", _give_audio, Stream.video),
    ConditioningKind.given_video: Condition("given_stream", _give_video, Stream.audio),
}


def check_conditioning(configs: Sequence[ConditioningConfig]) -> None:
    """Raises `ConfigError` when a kind stands twice or the probabilities of one group add up to more than 1."""
    kinds = [config.kind for config in configs]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"conditioning: {', '.join(kinds)}: each kind may stand once")
    for group in {CONDITIONS[kind].group for kind in kinds}:
        members = [config for config in configs if CONDITIONS[config.kind].group == group]
        if sum(config.probability for config in members) > 1 + 1e-9:
            listed = ", ".join(f"{config.kind} {config.probability}" for config in members)
            raise ConfigError(f"conditioning: {listed}: these exclude each other, so their sum must be at most 1")


def no_conditioning(bucket: Bucket, num_samples: int, device: torch.device) -> Conditioning:
    """Everything is to be generated."""
    streams = (StreamConditioning(bucket, device, torch.zeros(num_samples, dtype=torch.bool)) for _ in range(2))
    return Conditioning(bucket, *streams)


def draw_conditioning(
    configs: Sequence[ConditioningConfig], bucket: Bucket, rng: BatchRng, device: torch.device
) -> Conditioning:
    """What is given to each sample of a micro-batch."""
    conditioning = no_conditioning(bucket, len(rng.positions), device)
    taken: dict[str, float] = {}
    for config in configs:
        condition = CONDITIONS[config.kind]
        low = taken.get(condition.group, 0.0)
        taken[condition.group] = low + config.probability
        draw = rng.uniform(f"conditioning.{condition.group}")
        condition.give(conditioning, (draw >= low) & (draw < low + config.probability))
    return conditioning


@lru_cache(maxsize=256)
def keyframes_mask(bucket: Bucket, num_samples: int, device: torch.device) -> Tensor:
    """(B, T, 1) fp32 marker of the tokens that stand for a single pixel frame: those of the first latent frame."""
    return _region_tokens(Region.first_frame, bucket).float()[None, :, None].expand(num_samples, -1, -1).to(device)


def context_mask(lengths: Sequence[int], device: torch.device | str) -> Tensor | None:
    """(B, L) int64 mask of valid text rows, L the longest; None where all are equally long: no mask is needed."""
    if len(set(lengths)) == 1:
        return None
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return valid.long().to(device, non_blocking=True)

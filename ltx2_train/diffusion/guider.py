"""The guider: a model and guidance made into a denoiser."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ltx2_train.diffusion.conditioning import StreamConditioning
from ltx2_train.diffusion.guidance import GuidanceConfig, Pass, combine, needed_passes
from ltx2_train.diffusion.path import to_denoised
from ltx2_train.diffusion.sampler import Streams
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import Modality, Perturbations, SharedContext, Velocity

OFF = GuidanceConfig()


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
    """A denoiser made of a model and guidance: `(noisy, sigma) -> denoised`. It serves one generation.

    A step runs the passes that guidance needs at its sigma, all in one forward, or `passes_at_once` in each: less memory
    and the same result. A sharded model needs equally many forwards on all ranks: bound the passes only where ranks with
    guidance intervals have the same sigmas. All passes and steps share their texts (`SharedContext`). The latents are
    handed to the model in `dtype`; the state, the sigmas and the guidance stay fp32.
    """

    def __init__(
        self,
        model: Callable[[Modality | None, Modality | None, Perturbations | None], Velocity],
        video: StreamInputs | None,
        audio: StreamInputs | None,
        dtype: torch.dtype = torch.float32,
        passes_at_once: int | None = None,
    ) -> None:
        """Raises `ConfigError` for a `passes_at_once` below 1."""
        if passes_at_once is not None and passes_at_once < 1:
            raise ConfigError(f"passes_at_once={passes_at_once}: must be >= 1, or None for all of a step together")
        self.model, self.passes_at_once = model, passes_at_once
        self._streams = [None if inputs is None else _Stream(inputs, dtype) for inputs in (video, audio)]
        self._step = 0
        self._last = Streams(None, None)

    def __call__(self, noisy: Streams, sigma: Tensor) -> Streams:
        """Denoised tokens (B, T, C) fp32 of both streams. `sigma` () is on the CPU. Every call is a step."""
        runs = [stream is not None and stream.guidance.computes(self._step) for stream in self._streams]
        self._step += 1
        if any(runs):
            self._last = self._denoise(noisy, sigma, runs)
        return self._last

    def _denoise(self, noisy: Streams, sigma: Tensor, runs: list[bool]) -> Streams:
        """The streams that run; the others serve them as they are, and keep their last result."""
        strengths = [
            None if stream is None else stream.guidance.at(float(sigma)) if run else OFF
            for stream, run in zip(self._streams, runs, strict=True)
        ]
        predicted: list[dict[str, Tensor]] = [{}, {}]
        for passes in _in_groups(needed_passes(*strengths), self.passes_at_once):
            video, audio = (
                None if stream is None else stream.modality(tokens, sigma, passes, enabled=run)
                for stream, tokens, run in zip(self._streams, noisy, runs, strict=True)
            )
            velocities = self.model(video, audio, _perturbations(passes, noisy))
            for stream, tokens, velocity, found in zip(self._streams, noisy, velocities, predicted, strict=True):
                if stream is not None:
                    found |= stream.denoised(tokens, velocity, sigma, passes)
        combined = [
            _combine_each(found, own) if run and own is not None else last
            for found, own, run, last in zip(predicted, strengths, runs, self._last, strict=True)
        ]
        return Streams(*combined)


class _Stream:
    """One stream's inputs for any passes; what several passes repeat is repeated once."""

    def __init__(self, inputs: StreamInputs, dtype: torch.dtype) -> None:
        self.inputs, self.guidance, self.dtype = inputs, inputs.guidance, dtype
        contexts = inputs.contexts
        masks = (None, None) if contexts.mask is None else contexts.mask.chunk(2)
        self.positive = SharedContext(contexts.positive.to(dtype), masks[0])
        self.negative = SharedContext(contexts.negative.to(dtype), masks[1])
        self._repeats: dict[int, _Repeated] = {}

    def modality(self, noisy: Tensor | None, sigma: Tensor, passes: Sequence[Pass], *, enabled: bool) -> Modality:
        """`noisy` (B, T, C) as the input of all passes."""
        assert noisy is not None, "a stream with inputs needs tokens"
        times, conditioning = len(passes), self.inputs.conditioning
        if times not in self._repeats:
            self._repeats[times] = _Repeated.of(self.inputs, times)
        repeated = self._repeats[times]
        return Modality(
            latent=noisy.to(self.dtype).repeat(times, 1, 1),
            sigma=conditioning.sigma(sigma).to(noisy.device, non_blocking=True).repeat(times),
            timesteps=conditioning.timesteps(sigma).to(noisy.device, non_blocking=True).repeat(times, 1),
            timestep_index=repeated.timestep_index,
            positions=repeated.positions,
            context=tuple(self.negative if one.negative else self.positive for one in passes),
            keyframes_mask=repeated.keyframes_mask,
            enabled=enabled,
        )

    def denoised(
        self, noisy: Tensor | None, velocity: Tensor | None, sigma: Tensor, passes: Sequence[Pass]
    ) -> dict[str, Tensor]:
        """(B, T, C) fp32 of every pass, by name, from the velocities (passes * B, T, C)."""
        assert noisy is not None, "a stream with inputs needs tokens"
        assert velocity is not None, "the model answers for every stream that it was given"
        conditioning = self.inputs.conditioning
        token_sigma = conditioning.per_token(conditioning.timesteps(sigma).to(noisy.device, non_blocking=True))
        parts = zip(passes, velocity.chunk(len(passes)), strict=True)
        return {one.name: to_denoised(noisy, part, token_sigma) for one, part in parts}


class _Repeated(NamedTuple):
    """What of a stream's inputs is the same in all passes and steps. RoPE tables are cached by the object of positions."""

    positions: Tensor
    timestep_index: Tensor | None
    keyframes_mask: Tensor | None

    @classmethod
    def of(cls, inputs: StreamInputs, times: int) -> "_Repeated":
        positions = inputs.positions
        return cls(
            positions=positions if len(positions) == 1 else positions.repeat(times, 1, 1, 1),
            timestep_index=_repeated(inputs.conditioning.index, times),
            keyframes_mask=_repeated(inputs.keyframes_mask, times),
        )


def _repeated(tensor: Tensor | None, times: int) -> Tensor | None:
    return None if tensor is None else tensor.repeat(times, *[1] * (tensor.ndim - 1))


def _in_groups(passes: list[Pass], most: int | None) -> Iterator[list[Pass]]:
    """The passes in as few groups of at most `most` as there can be, of sizes that differ by one at most."""
    groups = 1 if most is None else -(-len(passes) // most)
    bounds = [len(passes) * i // groups for i in range(groups + 1)]
    return (passes[start:stop] for start, stop in pairwise(bounds))


def _perturbations(passes: Sequence[Pass], noisy: Streams) -> Perturbations | None:
    """One list for each of the passes * B rows; None where nothing is perturbed."""
    if not any(one.perturbation for one in passes):
        return None
    batch_size = len(next(tokens for tokens in noisy if tokens is not None))
    return [one.perturbation for one in passes for _ in range(batch_size)]


def _combine_each(denoised: dict[str, Tensor], guidance: GuidanceConfig) -> Tensor:
    """`combine`, one sample at a time: rescaling takes a standard deviation that must not see the batch-mates."""

    def combined(row: int) -> Tensor:
        others = [denoised[name][row] if name in denoised else None for name in ("uncond", "perturbed", "isolated")]
        return combine(denoised["cond"][row], others[0], others[1], others[2], guidance=guidance)

    return torch.stack([combined(row) for row in range(len(denoised["cond"]))])

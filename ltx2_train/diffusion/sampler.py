"""The sampler: integrates noise to data. Knows denoisers, not models, guidance or text."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ltx2_train.diffusion.path import to_velocity


class Streams(NamedTuple):
    """The state of sampling: tokens (B, T, C) of each stream; None for a stream that is not there."""

    video: Tensor | None
    audio: Tensor | None


State = TypeVar("State", Tensor, Streams)
Denoiser = Callable[[State, Tensor], State]  # (noisy, sigma ()) -> denoised


def sample_euler(denoise: Denoiser, noisy: State, sigmas: Tensor) -> State:
    """Integrate from sigmas[0] down to sigmas[-1] in len(sigmas) - 1 Euler steps, all streams together.

    `noisy` is one tensor or the `Streams`; `sigmas` descend and stay on the CPU, so that no step waits for the device.
    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without its second-order correction.
    """
    for sigma, sigma_next in pairwise(sigmas):
        noisy = _for_each(_euler_step, noisy, denoise(noisy, sigma), sigma=sigma, sigma_next=sigma_next)
    return noisy


def holding(denoise: Denoiser, clean: State, denoise_mask: State) -> Denoiser:
    """`denoise`, with what is given put back: denoised * mask + clean * (1 - mask).

    `denoise_mask` (B, T) or (B, 1) per stream: 1 = to be generated, 0 = given, between: in part.
    """

    def held(noisy: State, sigma: Tensor) -> State:
        return _for_each(_blend, denoise(noisy, sigma), clean, denoise_mask)

    return held


def _euler_step(noisy: Tensor, denoised: Tensor, *, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return noisy + (sigma_next - sigma) * to_velocity(noisy, denoised, sigma)


def _blend(denoised: Tensor, clean: Tensor, denoise_mask: Tensor) -> Tensor:
    mask = denoise_mask[..., None]
    return denoised * mask + clean * (1 - mask)


def _for_each(function: Callable[..., Tensor], *states: Any, **settings: Tensor) -> Any:
    """`function` of tensors, or of each stream that is there."""
    if isinstance(states[0], Tensor):
        return function(*states, **settings)
    return Streams(*(None if parts[0] is None else function(*parts, **settings) for parts in zip(*states, strict=True)))

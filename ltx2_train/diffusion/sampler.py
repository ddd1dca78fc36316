"""The samplers: each integrates noise to data. They know denoisers, not models, guidance or text.

A sampler follows the schedule's sigmas s, s', ... with a state x and the denoiser's answer x0 = D(x, s). Sigmas stay on
the CPU, so that no step waits for the device. Held tokens stay: the denoiser answers with what is given (`holding`), and
samplers that add noise put it back after every step (`restoring`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ltx2_train.diffusion.path import to_velocity
from ltx2_train.errors import ConfigError


class Streams(NamedTuple):
    """The state of sampling: tokens (B, T, C) of each stream; None for a stream that is not there."""

    video: Tensor | None
    audio: Tensor | None


State = TypeVar("State", Tensor, Streams)
Denoiser = Callable[[State, Tensor], State]  # (noisy, sigma ()) -> denoised
Draw = Callable[[], State]  # standard normal noise of the state's shape, new at every call
Restore = Callable[[State], State]  # puts what is given back into a state

# res_2s works in log sigma, which has no 0: it goes down to here, and the denoiser's answer there is the result.
LOG_FLOOR = 0.0011
BONG_MAX_STEP, BONG_MIN_SIGMA = 0.5, 0.03  # in log sigma, and in sigma
MAX_NOISE_SHARE = 0.9999


class Sampler(StrEnum):
    """Names of the samplers."""

    euler = "euler"
    euler_ancestral = "euler_ancestral"
    heun = "heun"
    res_2s = "res_2s"
    gradient_estimating = "gradient_estimating"


DEFAULT_ETA = {Sampler.euler_ancestral: 1.0, Sampler.res_2s: 0.5}  # of the samplers that add noise
TWO_CALLS = (Sampler.heun, Sampler.res_2s)  # of the denoiser in one step


@dataclass(kw_only=True, slots=True)
class SamplerSettings:
    """What single samplers leave open."""

    eta: float | None = None
    """How much of the noise is drawn anew (euler_ancestral, res_2s): 0 = none, 1 = all of it. None: 1 for
    euler_ancestral, 0.5 for res_2s."""
    s_noise: float = 1.0
    """Factor on the noise that euler_ancestral adds; 1 keeps the noise level that the model expects."""
    gamma: float = 2.0
    """How far gradient_estimating goes from the last velocity to this one: 1 = to it (Euler), 2 = as far again."""
    bong: bool = True
    """Whether res_2s moves the start of a step to where its noised middle would have come from."""

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ConfigError(f"settings.eta={self.eta}: must be in [0, 1]")
        if not 0 <= self.s_noise < math.inf:
            raise ConfigError(f"settings.s_noise={self.s_noise}: must be >= 0 and finite")
        if not 0 < self.gamma < math.inf:
            raise ConfigError(f"settings.gamma={self.gamma}: must be > 0 and finite")

    def eta_of(self, sampler: Sampler) -> float:
        """The share of new noise; 0 for a sampler that adds none."""
        return DEFAULT_ETA.get(sampler, 0.0) if self.eta is None else self.eta


def restoring(clean: State, denoise_mask: State) -> Restore:
    """A function that puts what is given back into a state: state * mask + clean * (1 - mask).

    `denoise_mask` (B, T) or (B, 1) per stream: 1 = to be generated, 0 = given, between: in part.
    """
    return lambda state: per_stream(_blend, state, clean, denoise_mask)


def nothing_given(state: State) -> State:
    """The state as it is."""
    return state


def holding(denoise: Denoiser, restore: Restore) -> Denoiser:
    """`denoise`, with what is given put back into its answer."""
    return lambda noisy, sigma: restore(denoise(noisy, sigma))


def sample_euler(denoise: Denoiser, noisy: State, sigmas: Tensor) -> State:
    """Integrate from sigmas[0] down to sigmas[-1] in len(sigmas) - 1 Euler steps, all streams together. First order.

    `noisy` is one tensor or the `Streams`. Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without its
    second-order correction.
    """
    for sigma, sigma_next in pairwise(sigmas):
        velocity = per_stream(to_velocity, noisy, denoise(noisy, sigma), sigma=sigma)
        noisy = per_stream(_moved, noisy, velocity, by=_change(sigma, sigma_next))
    return noisy


def sample_euler_ancestral(
    denoise: Denoiser,
    noisy: State,
    sigmas: Tensor,
    draw: Draw,
    restore: Restore = nothing_given,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> State:
    """Euler steps that go too far down and come back up by noise of `draw`; `eta` = 0 is Euler itself. First order.

    Source: ancestral sampling of Song et al. 2020 (arXiv:2011.13456), appendix F, on the straight path.
    """
    for sigma, sigma_next in pairwise(sigmas):
        keep, move, noise = ancestral_coefficients(sigma.item(), sigma_next.item(), eta)
        noisy = per_stream(_weighted, noisy, denoise(noisy, sigma), keep=keep, move=move)
        if noise * s_noise > 0:
            noisy = per_stream(_moved, noisy, draw(), by=noise * s_noise)
        noisy = restore(noisy)
    return noisy


def ancestral_coefficients(sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    """The weights of state, denoised and noise in a step of `sample_euler_ancestral`."""
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    scale = (1 - sigma_next) / (1 - down)  # back to the signal that belongs to sigma_next
    noise = math.sqrt(max(sigma_next**2 - (down * scale) ** 2, 0.0))
    return scale * down / sigma, scale * (1 - down / sigma), noise


def sample_heun(denoise: Denoiser, noisy: State, sigmas: Tensor) -> State:
    """Second-order steps by the mean of the velocities at both ends; two calls a step, one for a step that ends at 0.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
    """
    for sigma, sigma_next in pairwise(sigmas):
        velocity = per_stream(to_velocity, noisy, denoise(noisy, sigma), sigma=sigma)
        change = _change(sigma, sigma_next)
        if sigma_next > 0:
            ahead = per_stream(_moved, noisy, velocity, by=change)
            end = per_stream(to_velocity, ahead, denoise(ahead, sigma_next), sigma=sigma_next)
            velocity = per_stream(torch.lerp, velocity, end, weight=0.5)
        noisy = per_stream(_moved, noisy, velocity, by=change)
    return noisy


def sample_gradient_estimating(denoise: Denoiser, noisy: State, sigmas: Tensor, *, gamma: float = 2.0) -> State:
    """Euler steps by a velocity that goes on from the last one: last + gamma * (this - last). First order unless 1.5.

    A step that ends at 0 takes the denoiser's answer as it is. Source: Permenter and Yuan 2023 (arXiv:2306.04848),
    algorithm 2.
    """
    last = None
    for sigma, sigma_next in pairwise(sigmas):
        velocity = per_stream(to_velocity, noisy, denoise(noisy, sigma), sigma=sigma)
        estimated = velocity
        if last is not None and sigma_next > 0:
            estimated = per_stream(_weighted, last, velocity, keep=1 - gamma, move=gamma)
        noisy = per_stream(_moved, noisy, estimated, by=_change(sigma, sigma_next))
        last = velocity
    return noisy


def sample_res_2s(
    denoise: Denoiser,
    noisy: State,
    sigmas: Tensor,
    draw: Draw,
    restore: Restore = nothing_given,
    *,
    eta: float = 0.5,
    bong: bool = True,
) -> State:
    """Exponential steps in log sigma with one inner stage, the state in fp64; two calls a step and a last one at the end.

    Noise of `draw` replaces the share `eta` of what is left, in the middle and at the end of every step: a share of each
    step, however short, so that very many steps make the samples more alike. Second order where `eta` is 0. The denoiser
    is handed the state in the dtype of `noisy`, which is that of the result too.

    Source: Zhang et al. 2023, "Improved order analysis and design of exponential integrator for diffusion models
    sampling" (arXiv:2308.02157), the single-step scheme with c2 = 1/2.
    """
    dtype = next(tensor.dtype for tensor in _tensors(noisy))
    state = per_stream(Tensor.double, noisy)

    def denoise_at(state: State, sigma: float) -> State:
        answer = denoise(per_stream(Tensor.to, state, dtype=dtype), torch.tensor(sigma, dtype=sigmas.dtype))
        return per_stream(Tensor.double, answer)

    levels = log_levels(sigmas.tolist())
    for sigma, sigma_next in pairwise(levels):
        step, middle = math.log(sigma / sigma_next), math.sqrt(sigma * sigma_next)
        half_weight, first_weight, second_weight = res_2s_weights(step)
        first = denoise_at(state, sigma)
        half = per_stream(torch.lerp, state, first, weight=half_weight)
        half = restore(_with_new_noise(state, half, sigma, middle, draw, eta))
        if bong and step < BONG_MAX_STEP and sigma > BONG_MIN_SIGMA:
            state = per_stream(start_of, half, first, weight=half_weight)
        second = denoise_at(half, middle)
        whole = per_stream(_two_stages, state, first, second, first_weight=first_weight, second_weight=second_weight)
        state = restore(_with_new_noise(state, whole, sigma, sigma_next, draw, eta))
    if sigmas[-1] == 0:
        state = denoise_at(state, levels[-1])
    return per_stream(Tensor.to, state, dtype=dtype)


def log_levels(sigmas: list[float]) -> list[float]:
    """The sigmas that have a logarithm: a 0 at the end is replaced by `LOG_FLOOR`, or left out below that."""
    if sigmas[-1] > 0:
        return sigmas
    return sigmas[:-1] + [LOG_FLOOR] * (sigmas[-2] > LOG_FLOOR)


def res_2s_weights(step: float) -> tuple[float, float, float]:
    """How far the middle goes to the first answer, and how far the end goes to the first and to the second.

    `step` = ln(s / s'). With phi1(z) = (e^z - 1) / z and phi2(z) = (e^z - 1 - z) / z^2 they are step * a21,
    step * b1 and step * b2, where a21 = phi1(-step / 2) / 2, b2 = 2 phi2(-step) and b1 = phi1(-step) - b2.
    """
    second = 2 * (math.expm1(-step) + step) / step
    return -math.expm1(-step / 2), -math.expm1(-step) - second, second


def start_of(half: Tensor, first: Tensor, *, weight: float) -> Tensor:
    """The start from which the way to `first` leads to `half` after the share `weight`: lerp(start, first, weight).

    The fixed point of start <- half - weight * (first - start), which the reference repeats a hundred times.
    """
    return (half - weight * first) / (1 - weight)


def _with_new_noise(state: State, arrived: State, sigma: float, sigma_next: float, draw: Draw, eta: float) -> State:
    """`arrived` at `sigma_next`, with the share `eta` of its noise drawn anew; signal and noise level stay."""
    up = min(sigma_next * eta, sigma_next * MAX_NOISE_SHARE)
    if up == 0:
        return arrived
    kept = math.sqrt(sigma_next**2 - up**2)
    levels = {"sigma": sigma, "sigma_next": sigma_next, "kept": kept, "up": up}
    return per_stream(_renoised, state, arrived, draw(), **levels)


def _renoised(
    state: Tensor, arrived: Tensor, noise: Tensor, *, sigma: float, sigma_next: float, kept: float, up: float
) -> Tensor:
    velocity = (state - arrived) / (sigma - sigma_next)
    clean = state - sigma * velocity
    return (1 - sigma_next) * clean + kept * (clean + velocity) + up * _standardized(noise.double())


def _standardized(noise: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the tokens and channels of each sample."""
    mean, deviation = noise.mean((-2, -1), keepdim=True), noise.std((-2, -1), keepdim=True)
    return (noise - mean) / deviation


def _two_stages(state: Tensor, first: Tensor, second: Tensor, *, first_weight: float, second_weight: float) -> Tensor:
    return state + first_weight * (first - state) + second_weight * (second - state)


def _moved(state: Tensor, direction: Tensor, *, by: float) -> Tensor:
    return state + by * direction


def _weighted(state: Tensor, other: Tensor, *, keep: float, move: float) -> Tensor:
    return keep * state + move * other


def _change(sigma: Tensor, sigma_next: Tensor) -> float:
    return (sigma_next - sigma).item()


def _blend(state: Tensor, clean: Tensor, denoise_mask: Tensor) -> Tensor:
    """What is given in full comes back bit by bit, whatever the state holds there."""
    mask = denoise_mask[..., None]
    blended = torch.where(mask == 1, state, state * mask + clean * (1 - mask))
    return torch.where(mask == 0, clean, blended)


def _tensors(state: Tensor | Streams) -> list[Tensor]:
    """The tensors of a state."""
    return [state] if isinstance(state, Tensor) else [tensor for tensor in state if tensor is not None]


def per_stream(function: Callable[..., Tensor], *states: Any, **settings: Any) -> Any:
    """`function` of tensors, or of each stream that is there."""
    if isinstance(states[0], Tensor):
        return function(*states, **settings)
    return Streams(*(None if parts[0] is None else function(*parts, **settings) for parts in zip(*states, strict=True)))

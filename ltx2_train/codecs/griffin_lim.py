"""Log-mel back to a waveform without weights: band energies spread over frequencies, phases found by iteration."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ltx2_train.codecs.mel import LogMel

ITERATIONS = 32
MOMENTUM = 0.99
REFINEMENTS = 16  # multiplicative updates of the spectrum after the clamped pseudo-inverse
TINY = 1e-8


def vocode(mel: Tensor, front: LogMel, iterations: int = ITERATIONS) -> Tensor:
    """Log-mel (B, ..., T, bins) of `front` to a waveform (B, ..., hop * T) at its rate, a function of the mel alone."""
    length, clips = front.hop * mel.shape[-2], mel.reshape(-1, *mel.shape[-2:])
    # one by one: a clip fits the processor's cache, a batch is three times slower
    waveforms = [griffin_lim(mel_to_magnitudes(clip, front), front, length, iterations) for clip in clips]
    return torch.stack(waveforms).reshape(*mel.shape[:-2], length)


def mel_to_magnitudes(mel: Tensor, front: LogMel) -> Tensor:
    """Log-mel (..., T, bins) to non-negative magnitudes (..., n_fft / 2 + 1, T) whose bands come close to it.

    What lies on the floor is silence, so the floor is subtracted. The start is the pseudo-inverse of the bands with
    negative values cut off; multiplicative updates keep it non-negative and bring it nearer.
    Source: Lee and Seung, "Algorithms for non-negative matrix factorization" (2001), eq. 4, with the bands fixed.
    """
    filters = front.filters(mel.device)
    bands = (mel.exp() - front.floor).clamp(min=0)
    spectrum = (bands @ _pseudo_inverse(front).to(mel.device)).clamp(min=TINY)
    wanted = bands @ filters.T
    for _ in range(REFINEMENTS):
        spectrum = spectrum * wanted / (spectrum @ filters @ filters.T).clamp(min=TINY)
    return spectrum.transpose(-1, -2)


def griffin_lim(magnitudes: Tensor, front: LogMel, length: int, iterations: int = ITERATIONS) -> Tensor:
    """Magnitudes (..., n_fft / 2 + 1, T) to the waveform (..., length) whose spectrum comes close to them.

    Every channel starts from the same random phases, so channels that share a source stay coherent.
    Source: Perraudin, Balazs, Sondergaard, "A fast Griffin-Lim algorithm" (2013), algorithm 2.
    """
    generator = torch.Generator().manual_seed(0)
    turns = torch.rand(magnitudes.shape[-2:], generator=generator).to(magnitudes.device)
    phases = torch.polar(torch.ones_like(turns), 2 * math.pi * turns).expand(magnitudes.shape)
    previous = torch.zeros_like(phases)
    for _ in range(iterations):
        rebuilt = front.stft(front.istft(magnitudes * phases, length))[..., : magnitudes.shape[-1]]
        ahead = rebuilt - MOMENTUM / (1 + MOMENTUM) * previous
        power = ahead.real.square() + ahead.imag.square()  # several times faster than abs() of complex numbers
        phases, previous = ahead * power.clamp(min=TINY**2).rsqrt(), rebuilt
    return front.istft(magnitudes * phases, length)


@lru_cache(maxsize=4)
def _pseudo_inverse(front: LogMel) -> Tensor:
    return torch.linalg.pinv(front.filters().double()).float()

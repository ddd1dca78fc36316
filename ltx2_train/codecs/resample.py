"""Waveforms brought to another rate and to two channels."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ltx2_train.errors import DataError

LOWPASS_WIDTH = 6  # zero crossings of the sinc on each side
ROLLOFF = 0.99  # cut-off as a share of the lower Nyquist frequency
SURROUND = 1 / math.sqrt(2)  # -3 dB, for the centre and every surround channel
SURROUND_PAIRS = {6: [4], 8: [4, 6]}  # channels -> where the left one of each surround pair stands


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """(..., N) at `from_rate` to (..., ceil(N * to_rate / from_rate)) at `to_rate`, both in Hz; fp32.

    A windowed-sinc interpolator (Hann window, width 6, roll-off 0.99), the default of torchaudio. Equal rates return
    the waveform unchanged. Raises `DataError` for a rate that is not positive.
    Source: J. O. Smith, "Digital Audio Resampling".
    """
    if from_rate < 1 or to_rate < 1:
        raise DataError(f"cannot resample from {from_rate} to {to_rate} Hz; rates are whole numbers >= 1")
    if from_rate == to_rate:
        return waveform
    common = math.gcd(from_rate, to_rate)
    old, new = from_rate // common, to_rate // common
    kernels, reach = _kernels(old, new)
    flat = waveform.float().reshape(-1, 1, waveform.shape[-1])
    padded = torch.nn.functional.pad(flat, (reach, reach + old))
    phases = torch.nn.functional.conv1d(padded, kernels.to(flat.device), stride=old)
    length = math.ceil(new * waveform.shape[-1] / old)
    return phases.transpose(1, 2).reshape(len(flat), -1)[:, :length].reshape(*waveform.shape[:-1], length)


@lru_cache(maxsize=16)
def _kernels(old: int, new: int) -> tuple[Tensor, int]:
    """Filters (new, 1, taps), one per output phase, and how many input samples they reach to the left."""
    cutoff = min(old, new) * ROLLOFF
    reach = math.ceil(LOWPASS_WIDTH * old / cutoff)
    taps = torch.arange(-reach, reach + old, dtype=torch.float64) / old
    phases = -torch.arange(new, dtype=torch.float64)[:, None] / new
    crossings = ((phases + taps) * cutoff).clamp(-LOWPASS_WIDTH, LOWPASS_WIDTH)
    window = torch.cos(crossings * math.pi / LOWPASS_WIDTH / 2) ** 2
    return (torch.sinc(crossings) * window * (cutoff / old)).float()[:, None], reach


def to_stereo(waveform: Tensor) -> Tensor:
    """(..., channels, N) to (..., 2, N).

    Mono is doubled. 5.1 and 7.1 (L, R, C, LFE, then surround pairs) are mixed with centre and surrounds at -3 dB,
    normalised by the sum of the gains, without LFE. Other layouts: their mean in both channels.
    """
    channels = waveform.shape[-2]
    if channels == 0:
        raise DataError("an audio track without channels. Drop the track or repair the file")
    if channels == 2:
        return waveform
    if channels not in SURROUND_PAIRS:
        return waveform.mean(dim=-2, keepdim=True).repeat_interleave(2, dim=-2)
    centre, pairs = waveform[..., 2:3, :], SURROUND_PAIRS[channels]
    surround = torch.stack([waveform[..., left : left + 2, :] for left in pairs]).sum(dim=0)
    gains = 1 + SURROUND * (1 + len(pairs))
    return (waveform[..., :2, :] + SURROUND * (centre + surround)) / gains

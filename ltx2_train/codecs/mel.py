"""Waveform to log-mel spectrogram: the front end of the audio codecs."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ltx2_train.codecs.resample import resample
from ltx2_train.errors import DataError

LINEAR_HZ = 200 / 3  # Hz per mel below the break of the Slaney scale
BREAK_HZ = 1000.0
BREAK_MEL = BREAK_HZ / LINEAR_HZ
LOG_STEP = math.log(6.4) / 27  # growth of log frequency per mel above the break


@dataclass(frozen=True, slots=True, kw_only=True)
class LogMel:
    """Log-mel magnitudes as the released LTX-2 audio codec sees them: Hann window, centred frames, Slaney bands."""

    sample_rate: int = 16000
    n_fft: int = 1024
    window: int | None = None  # samples under the Hann window, in the middle of a frame; None: all n_fft
    hop: int = 160
    bins: int = 64
    lowest_hz: float = 0.0
    highest_hz: float = 8000.0
    floor: float = 1e-5  # magnitudes below count as silence; 1e-5 is the released value

    @property
    def silence(self) -> float:
        """The smallest value a bin can have."""
        return math.log(self.floor)

    def __call__(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(..., N) at `sample_rate` to (..., 1 + N' // hop, bins) fp32, N' being the length at the front end's rate.

        Raises `DataError` when the waveform is shorter than half a window.
        """
        at_rate = resample(waveform.float(), sample_rate, self.sample_rate)
        if at_rate.shape[-1] <= self.n_fft // 2:
            seconds, needed = at_rate.shape[-1] / self.sample_rate, (self.n_fft // 2 + 1) / self.sample_rate
            raise DataError(f"{seconds:.4f} s of audio; the mel front end needs at least {needed:.4f} s. Drop the clip")
        mel = self.magnitudes(at_rate).transpose(-1, -2) @ self.filters(at_rate.device)
        return mel.clamp(min=self.floor).log()

    def magnitudes(self, waveform: Tensor) -> Tensor:
        """(..., N) at the front end's rate to magnitudes (..., n_fft / 2 + 1, T)."""
        return self.stft(waveform).abs()

    def stft(self, waveform: Tensor) -> Tensor:
        """(..., N) to the complex spectrum (..., n_fft / 2 + 1, T); frames are centred, edges reflected."""
        flat = waveform.reshape(-1, waveform.shape[-1])
        size, window = self._window(waveform.device)
        spectrum = torch.stft(flat, self.n_fft, self.hop, size, window, center=True, return_complex=True)
        return spectrum.reshape(*waveform.shape[:-1], *spectrum.shape[-2:])

    def istft(self, spectrum: Tensor, length: int) -> Tensor:
        """Complex spectrum (..., n_fft / 2 + 1, T) to a waveform (..., length), by least squares."""
        flat = spectrum.reshape(-1, *spectrum.shape[-2:])
        size, window = self._window(spectrum.device)
        waveform = torch.istft(flat, self.n_fft, self.hop, size, window, center=True, length=length)
        return waveform.reshape(*spectrum.shape[:-2], length)

    def _window(self, device: torch.device) -> tuple[int, Tensor]:
        size = self.window or self.n_fft
        return size, torch.hann_window(size, device=device)

    def filters(self, device: torch.device | str = "cpu") -> Tensor:
        """Triangular bands (n_fft / 2 + 1, bins), each of unit area over frequency."""
        return _filters(self.sample_rate, self.n_fft, self.bins, self.lowest_hz, self.highest_hz).to(device)


def hz_to_mel(hz: float) -> float:
    """The Slaney scale: linear up to 1 kHz, logarithmic above."""
    return hz / LINEAR_HZ if hz < BREAK_HZ else BREAK_MEL + math.log(hz / BREAK_HZ) / LOG_STEP


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of `hz_to_mel`."""
    return torch.where(mel < BREAK_MEL, mel * LINEAR_HZ, BREAK_HZ * torch.exp((mel - BREAK_MEL) * LOG_STEP))


@lru_cache(maxsize=8)
def _filters(sample_rate: int, n_fft: int, bins: int, lowest_hz: float, highest_hz: float) -> Tensor:
    mels = torch.linspace(hz_to_mel(lowest_hz), hz_to_mel(highest_hz), bins + 2, dtype=torch.float64)
    edges = mel_to_hz(mels)
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    area = 2 / (edges[2:] - edges[:-2])
    return (torch.minimum(rising, falling).clamp(min=0) * area).float()

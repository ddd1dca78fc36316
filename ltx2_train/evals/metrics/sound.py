"""Is there sound, how loud is it, and is it cut off?"""

import numpy as np

from ltx2_train.codecs.resample import resample
from ltx2_train.evals.estimate import Array
from ltx2_train.evals.metrics.metric import Clip, Part, PerClip, Settings, Share

SOUND = frozenset({Part.sound})
SILENCE_DBFS = -60.0  # RMS of both channels together; 0 dBFS is a square wave at full scale
WINDOW = 0.05  # s
POWER_FLOOR = 1e-20  # -200 dB, for the logarithm
FULL_SCALE = 1 - 2**-15  # the largest value that 16 bits hold

# ITU-R BS.1770-4, Annex 1, tables 1 and 2: K-weighting at 48 kHz, a shelf for the head and a high-pass (b, a).
LOUDNESS_RATE = 48_000
SHELF = (
    (1.53512485958697, -2.69169618940638, 1.19839281085285),
    (1.0, -1.69065929318241, 0.73248077421585),
)
HIGH_PASS = ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621))
LOUDNESS_OFFSET = -0.691  # so that 997 Hz at full scale in one channel is -3.01 LUFS
BLOCK = 0.4  # s, each overlapping the one before by three quarters
ABSOLUTE_GATE = -70.0  # LUFS
RELATIVE_GATE = -10.0  # LU below the blocks that pass the first gate


def silence(settings: Settings) -> Share:
    """Share of the time that is silent."""
    return Share(name="silence", unit="of the time", needs=SOUND, of=_silent_windows)


def silent_clips(settings: Settings) -> PerClip:
    """Share of the clips that are silent from beginning to end."""
    return PerClip(name="silent_clips", unit="of the clips", needs=SOUND, of=_is_silent)


def clipping(settings: Settings) -> Share:
    """Share of the samples that are at full scale."""
    return Share(name="clipping", unit="of the samples", needs=SOUND, of=_clipped_samples)


def loudness(settings: Settings) -> PerClip:
    """Mean integrated loudness of the clips that are loud enough to have one."""
    return PerClip(name="loudness", unit="LUFS", needs=SOUND, of=_loudness)


def _silent_windows(clip: Clip) -> tuple[float, float]:
    levels = window_levels(_samples(clip), clip.film.sample_rate)
    return float((levels < SILENCE_DBFS).sum()), float(len(levels))


def _is_silent(clip: Clip) -> float:
    silent, windows = _silent_windows(clip)
    return float(silent == windows)


def _clipped_samples(clip: Clip) -> tuple[float, float]:
    samples = _samples(clip)
    return float((np.abs(samples) >= FULL_SCALE).sum()), float(samples.size)


def _loudness(clip: Clip) -> float | None:
    return integrated_loudness(_samples(clip), clip.film.sample_rate)


def _samples(clip: Clip) -> Array:
    assert clip.film.waveform is not None
    return clip.film.waveform.double().cpu().numpy()


def window_levels(samples: Array, sample_rate: int) -> Array:
    """(windows,) dBFS: the RMS of (channels, N) in windows of 50 ms; what is left at the end is a shorter one."""
    size = round(WINDOW * sample_rate)
    pieces = [samples[:, i : i + size] for i in range(0, samples.shape[1], size)]
    powers = np.array([np.mean(piece**2) for piece in pieces])
    return 10 * np.log10(np.maximum(powers, POWER_FLOOR))


def integrated_loudness(samples: Array, sample_rate: int) -> float | None:
    """Gated loudness of (channels, N), all at the front, in LUFS. None where no block of 400 ms is above -70 LUFS.

    Other rates than 48 kHz are brought there first. Source: ITU-R BS.1770-4, Annex 1.
    """
    import torch
    from scipy.signal import lfilter

    at_rate = resample(torch.from_numpy(samples), sample_rate, LOUDNESS_RATE).double().numpy()
    weighted = lfilter(*HIGH_PASS, lfilter(*SHELF, at_rate, axis=-1), axis=-1)
    powers = _block_powers(weighted)
    loud = powers[_lufs(powers) > ABSOLUTE_GATE]
    if not len(loud):
        return None
    return float(_lufs(loud[_lufs(loud) > float(_lufs(loud.mean())) + RELATIVE_GATE].mean()))


def _block_powers(weighted: Array) -> Array:
    """(blocks,) mean square of every block of (channels, N), summed over the channels."""
    size = round(BLOCK * LOUDNESS_RATE)
    starts = range(0, weighted.shape[1] - size + 1, size // 4)
    return np.array([np.square(weighted[:, i : i + size]).mean(axis=1).sum() for i in starts])


def _lufs(power: Array) -> Array:
    return LOUDNESS_OFFSET + 10 * np.log10(np.maximum(power, POWER_FLOOR))

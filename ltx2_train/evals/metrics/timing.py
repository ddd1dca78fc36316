"""Do sound and picture agree in time?"""

import numpy as np

from ltx2_train.evals import sync
from ltx2_train.evals.metrics.metric import Clip, Part, PerClip, Settings, Share

BOTH = frozenset({Part.motion, Part.sound})


def onset_f1(settings: Settings) -> Share:
    """F1 of impacts seen and onsets heard. Made for things that bounce before a still background."""

    def counts(clip: Clip) -> tuple[float, float]:
        return sync.match_counts(clip.film.impacts, clip.film.onsets, settings.tolerance)

    return Share(name="onset_f1", unit="", needs=BOTH, of=counts)


def sync_peaks_f1(settings: Settings) -> Share:
    """F1 of peaks of motion and onsets heard, for any footage."""

    def counts(clip: Clip) -> tuple[float, float]:
        peaks = sync.motion_peaks(clip.film.motion_energy, clip.film.fps)
        return sync.match_counts(peaks, clip.film.onsets, settings.tolerance)

    return Share(name="sync_peaks_f1", unit="", needs=BOTH, of=counts)


def sync_lag(settings: Settings) -> PerClip:
    """Median over clips of the lag, regardless of its sign, at which motion and sound agree best."""

    def of(clip: Clip) -> float | None:
        both = _curves(clip)
        return None if both is None else 1000 * abs(sync.lag(both))

    return PerClip(name="sync_lag", unit="ms", needs=BOTH, of=of, statistic=np.median)


def sync_correlation(settings: Settings) -> PerClip:
    """Mean over clips of the correlation of motion and sound as they are."""

    def of(clip: Clip) -> float | None:
        both = _curves(clip)
        return None if both is None else sync.correlation(both)

    return PerClip(name="sync_correlation", unit="", needs=BOTH, of=of)


def _curves(clip: Clip) -> sync.Curves | None:
    return sync.curves(clip.film.motion_energy, clip.film.onset_strength, clip.film.fps)

"""Are sound and picture in step? Impacts seen, onsets heard, matched one to one, and what chance would give.

Impacts are for clips in which one bright or coloured thing falls and bounces before a still background. For any footage
the energy of motion stands beside the strength of onsets: their correlation, its lag, and their peaks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.codecs.mel import LogMel
from ltx2_train.errors import DataError

CONTRAST = 0.25  # of the range [-1, 1], against the median of the pixel's row over time
MIN_AREA = 0.004  # of the frame; a frame with less of the thing does not place it
LOWER_PART = 0.55  # an impact lies below this share of the height
PROMINENCE = 3 / 64  # of the height: how far the thing must rise again

MEL_FLOOR = 1e-2  # as the embedded codec
RISE_FRAMES = 2
MIN_RISE = 0.15  # nats, mean over the bins
RELATIVE_RISE = 0.3  # of the clip's largest
ONSET_DISTANCE = 12  # mel frames
ONSET_DELAY = 0.007  # s; a window of 64 ms sees a click before its centre reaches it (measured on clips of known times)

STILL = 1e-6  # a curve that varies less carries nothing
SMOOTHING = 0.03  # s, standard deviation: about a frame, so that curves of 24 and of 100 values a second can meet
LONGEST_LAG = 1.0  # s, and no more than half of the clip
PEAK_PROMINENCE = 0.3  # of the curve's range: smaller peaks of motion are not counted
PEAK_DISTANCE = 0.1  # s

TOLERANCE = 0.08  # s
CHANCE_SHIFTS = 20


@dataclass(frozen=True, slots=True)
class SyncResult:
    """Agreement of impacts and onsets over a set of clips, micro-averaged. Times in seconds."""

    tolerance: float
    num_clips: int
    num_impacts: int
    num_onsets: int
    num_matched: int
    f1: float | None  # None without any event
    chance: float | None  # F1 of the same sets with the sound of other clips; None for a single clip
    mean_error: float | None  # mean absolute difference of matched pairs; None without any
    offset: float | None  # median of onset - impact over matched pairs; None without any


def impacts(video: Tensor, fps: float) -> list[float]:
    """Times (s) at which the thing in `video` (3, F, H, W) in [-1, 1] turns from falling to rising.

    A peak of its height curve within its flanks; the exact time is where two lines through the flanks meet.
    """
    from scipy.signal import find_peaks

    rows = _centroid_rows(video)
    height, usable = video.shape[2], np.isfinite(rows)
    if usable.sum() < 5:
        return []
    frames = np.arange(len(rows))
    filled = np.interp(frames, frames[usable], rows[usable])
    peaks, _ = find_peaks(filled, height=LOWER_PART * height, prominence=PROMINENCE * height)
    return [_vertex(filled, int(peak)) / fps for peak in peaks]


def _centroid_rows(video: Tensor) -> NDArray[np.float64]:
    """Mean row of what stands out from the background, per frame; NaN where too little does."""
    pixels = video.detach().float().cpu().clamp(-1, 1)
    background = pixels.movedim(2, 1).flatten(2).median(dim=2).values[:, None, :, None]
    excess = (pixels - background).abs().amax(dim=0) - CONTRAST
    weights = excess.clamp(min=0).sum(dim=2).double()
    area = (excess > 0).float().mean(dim=(1, 2))
    centres = torch.arange(video.shape[2], dtype=torch.float64) + 0.5
    rows = (weights * centres).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    return torch.where(area >= MIN_AREA, rows, torch.nan).numpy()


def _vertex(rows: NDArray[np.float64], peak: int) -> float:
    """Where the line through two frames before the peak meets that through two behind it, within a frame of it."""
    before, after = peak - 1, peak + 1
    if before < 1 or after > len(rows) - 2:
        return float(peak)
    falling, rising = rows[before] - rows[before - 1], rows[after + 1] - rows[after]
    if falling - rising < 1e-6:
        return float(peak)
    meeting = (rows[after] - rising * after - rows[before] + falling * before) / (falling - rising)
    return float(np.clip(meeting, peak - 1, peak + 1))


def onsets(mel: Tensor, front: LogMel | None = None) -> list[float]:
    """Times (s) at which sound sets in, from log-mel (2, T, M) of `front` (the embedded codec's by default)."""
    from scipy.signal import find_peaks

    front = front or LogMel(floor=MEL_FLOOR)
    rise = _rise(mel, front)
    if not len(rise):
        return []
    peaks, _ = find_peaks(rise, height=max(MIN_RISE, RELATIVE_RISE * rise.max()), distance=ONSET_DISTANCE)
    return [peak * front.hop / front.sample_rate + ONSET_DELAY for peak in peaks]


def _rise(mel: Tensor, front: LogMel) -> NDArray[np.float64]:
    """How much each frame of (2, T, M) lies above the one two before, mean over the bins; empty if too short.

    A window far over the end of the sound sees it reflected, which sounds like an onset: the frames of the last quarter
    of a window are left out.
    """
    values = mel.detach().double().cpu().clamp(min=float(np.log(MEL_FLOOR))).amax(dim=0)
    values = values[: max(0, len(values) - math.ceil(front.n_fft / 4 / front.hop))]
    if len(values) <= RISE_FRAMES:
        return np.empty(0)
    rise = np.zeros(len(values))
    rise[RISE_FRAMES:] = (values[RISE_FRAMES:] - values[:-RISE_FRAMES]).clamp(min=0).mean(dim=1).numpy()
    return rise


def waveform_onsets(waveform: Tensor, sample_rate: int) -> list[float]:
    """Times (s) at which sound sets in, from a waveform (2, N)."""
    return onsets(LogMel(floor=MEL_FLOOR)(waveform, sample_rate))


# -- any footage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curves:
    """Motion and sound of a clip on one time axis (T,), each of mean 0 and variance 1, `step` s apart."""

    motion: NDArray[np.float64]
    sound: NDArray[np.float64]
    step: float


def motion_energy(video: Tensor) -> Tensor:
    """(F - 1,) mean absolute difference of successive frames of (3, F, H, W) in [-1, 1], as a share of that range."""
    pixels = video.detach().float().cpu()
    return torch.stack([(b - a).abs().mean() / 2 for a, b in pairwise(pixels.unbind(1))]).double()


def onset_strength(waveform: Tensor, sample_rate: int) -> Tensor:
    """(T,) nats: the rise of the log-mel spectrum of (2, N), one value per hop of 10 ms; empty if it is too short."""
    front = LogMel(floor=MEL_FLOOR)
    return torch.from_numpy(_rise(front(waveform, sample_rate), front))


def curves(energy: Tensor, strength: Tensor, fps: float) -> Curves | None:
    """`motion_energy` and `onset_strength` smoothed and standardised; None where one of them stands still.

    A change between two frames is seen when the second appears.
    """
    from scipy.ndimage import gaussian_filter1d

    front = LogMel()
    step = front.hop / front.sample_rate
    times = np.arange(len(strength)) * step + ONSET_DELAY
    seen = np.interp(times, (np.arange(len(energy)) + 1) / fps, energy.numpy()) if len(energy) else np.zeros(len(times))
    both = [gaussian_filter1d(curve, SMOOTHING / step) for curve in (seen, strength.numpy())] if len(times) else []
    if not both or any(curve.std() < STILL for curve in both):
        return None
    motion, sound = ((curve - curve.mean()) / curve.std() for curve in both)
    return Curves(motion, sound, step)


def correlation(both: Curves) -> float:
    """Correlation of motion and sound at lag 0, in [-1, 1]."""
    return float(np.mean(both.motion * both.sound))


def lag(both: Curves) -> float:
    """How much later (s) sound must be taken for motion and sound to agree best: > 0 where the sound comes late.

    The place of the largest cross-correlation, each divided by the whole length, so that short overlaps do not win.
    """
    num = len(both.motion)
    reach = min(round(LONGEST_LAG / both.step), num // 2)
    padded = np.pad(both.sound, reach)
    agreement = [both.motion @ padded[reach + k : reach + k + num] for k in range(-reach, reach + 1)]
    return (int(np.argmax(agreement)) - reach) * both.step


def motion_peaks(energy: Tensor, fps: float) -> list[float]:
    """Times (s) at which motion is greatest: peaks of `motion_energy` that stand out of its range."""
    from scipy.signal import find_peaks

    values = np.pad(energy.numpy(), 1) if len(energy) else np.zeros(1)  # a peak may lie at an end
    spread = float(np.ptp(values[1:-1])) if len(energy) else 0.0
    if spread < STILL:
        return []
    distance = max(1, round(PEAK_DISTANCE * fps))
    peaks, _ = find_peaks(values, prominence=PEAK_PROMINENCE * spread, distance=distance)
    return [int(peak) / fps for peak in peaks]


# -- agreement ---------------------------------------------------------------------------------------------------------


def match(first: Sequence[float], second: Sequence[float], tolerance: float) -> list[float]:
    """Differences second - first of pairs within `tolerance` s, nearest pairs first, every time used once."""
    pairs = sorted(
        (abs(b - a), i, j) for i, a in enumerate(first) for j, b in enumerate(second) if abs(b - a) <= tolerance
    )
    used_first: set[int] = set()
    used_second: set[int] = set()
    differences = []
    for _, i, j in pairs:
        if i not in used_first and j not in used_second:
            used_first.add(i)
            used_second.add(j)
            differences.append(second[j] - first[i])
    return differences


def match_counts(seen: Sequence[float], heard: Sequence[float], tolerance: float) -> tuple[float, float]:
    """Twice the matches and the events of a clip: over clips, the ratio of their sums is F1."""
    return 2.0 * len(match(seen, heard, tolerance)), float(len(seen) + len(heard))


def f1_score(
    seen: Sequence[Sequence[float]], heard: Sequence[Sequence[float]], tolerance: float = TOLERANCE
) -> float | None:
    """F1 of one-to-one matches within `tolerance` s, micro-averaged over clips; None when there are no events at all."""
    counts = [match_counts(a, b, tolerance) for a, b in zip(seen, heard, strict=True)]
    events = sum(whole for _, whole in counts)
    return sum(part for part, _ in counts) / events if events else None


def chance_f1(
    seen: Sequence[Sequence[float]],
    heard: Sequence[Sequence[float]],
    tolerance: float = TOLERANCE,
    shifts: int = CHANCE_SHIFTS,
    clips: Sequence[int] | None = None,
) -> float | None:
    """Mean F1 with the sound of another clip: the list of sounds rotated by 1, 2, ... clips. None for a single clip.

    `clips`: which clip each is a sample of; two samples of one clip are never put together.
    """
    clips = range(len(seen)) if clips is None else clips
    scores = []
    for k in range(1, min(shifts, len(heard) - 1) + 1):
        pairs = [(i, (i + k) % len(heard)) for i in range(len(seen)) if clips[i] != clips[(i + k) % len(heard)]]
        score = f1_score([seen[i] for i, _ in pairs], [heard[j] for _, j in pairs], tolerance)
        if score is not None:
            scores.append(score)
    return float(np.mean(scores)) if scores else None


def compare(
    seen: Sequence[Sequence[float]],
    heard: Sequence[Sequence[float]],
    tolerance: float = TOLERANCE,
    clips: Sequence[int] | None = None,
) -> SyncResult:
    """Agreement of impact and onset times (s), one list per clip each. Raises `DataError` for unequal numbers.

    `clips`: as in `chance_f1`.
    """
    if len(seen) != len(heard):
        raise DataError(f"{len(seen)} clips seen and {len(heard)} heard; need the same clips in the same order")
    differences = [d for a, b in zip(seen, heard, strict=True) for d in match(a, b, tolerance)]
    return SyncResult(
        tolerance=tolerance,
        num_clips=len(seen),
        num_impacts=sum(map(len, seen)),
        num_onsets=sum(map(len, heard)),
        num_matched=len(differences),
        f1=f1_score(seen, heard, tolerance),
        chance=chance_f1(seen, heard, tolerance, clips=clips),
        mean_error=float(np.mean(np.abs(differences))) if differences else None,
        offset=float(np.median(differences)) if differences else None,
    )

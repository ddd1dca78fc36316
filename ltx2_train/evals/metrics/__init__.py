"""Metrics by name, and their figures over sampled and real clips."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ltx2_train.errors import ConfigError, DataError
from ltx2_train.evals.estimate import Estimate
from ltx2_train.evals.metrics import latents, picture, sound, timing
from ltx2_train.evals.metrics.metric import Clip, Metric, Part, Rows, Settings

__all__ = [
    "Clip",
    "Measured",
    "Metric",
    "Part",
    "Rows",
    "Settings",
    "build_metrics",
    "check_names",
    "figures",
    "measure",
    "names",
    "register",
]

Measured = Mapping[str, Sequence[float] | None]  # rows of one clip by the metric's name

_BUILDERS: dict[str, Callable[[Settings], Metric]] = {
    **{f"frechet_{stream}": latents.frechet(stream) for stream in ("video", "audio")},
    **{f"diversity_{stream}": latents.diversity(stream) for stream in ("video", "audio")},
    **{f"seed_diversity_{stream}": latents.seed_diversity(stream) for stream in ("video", "audio")},
    "onset_f1": timing.onset_f1,
    "sync_lag": timing.sync_lag,
    "sync_correlation": timing.sync_correlation,
    "sync_peaks_f1": timing.sync_peaks_f1,
    "motion": picture.motion,
    "silence": sound.silence,
    "silent_clips": sound.silent_clips,
    "clipping": sound.clipping,
    "loudness": sound.loudness,
}


def register(name: str, build: Callable[[Settings], Metric]) -> None:
    """Makes a metric known by `name`. Raises `ConfigError` when the name is taken."""
    if name in _BUILDERS:
        raise ConfigError(f"metric {name!r} is there already. Give yours another name")
    _BUILDERS[name] = build


def names() -> list[str]:
    """Of all metrics that are known."""
    return list(_BUILDERS)


def check_names(asked: Sequence[str]) -> None:
    """Raises `ConfigError` for a name that is not known or stands twice."""
    if unknown := [name for name in asked if name not in _BUILDERS]:
        raise ConfigError(f"metrics={','.join(unknown)}: not known. Choose from {', '.join(_BUILDERS)}")
    if len(set(asked)) < len(asked):
        raise ConfigError(f"metrics={','.join(asked)}: a name stands there twice. Name each once")


def build_metrics(asked: Sequence[str], settings: Settings) -> list[Metric]:
    """The metrics of these names. Raises `ConfigError` as `check_names`."""
    check_names(asked)
    return [_BUILDERS[name](settings) for name in asked]


def measure(metrics: Sequence[Metric], clip: Clip) -> dict[str, list[float] | None]:
    """The rows of one clip. Raises `DataError` for a number that is not finite."""
    return {metric.name: _row(metric, clip) for metric in metrics}


def _row(metric: Metric, clip: Clip) -> list[float] | None:
    row = metric.measure(clip) if metric.needs <= clip.parts else None
    if row is not None and not np.isfinite(row).all():
        raise DataError(
            f"metric {metric.name} gave {list(row)} for a clip: each must be a finite number. Look at the clip's mp4, or "
            "leave the metric out"
        )
    return None if row is None else [float(value) for value in row]


def figures(
    metrics: Sequence[Metric], sampled: Sequence[Measured], real: Sequence[Measured], clips: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """By name: the unit and the estimates of the sampled clips and, of metrics that do not compare, of the real ones.

    `clips`: which clip each of `sampled` is a sample of; `real` has one per clip, in the order of their numbers.
    """
    found = {}
    for metric in metrics:
        of_sampled = _rows(metric, sampled, clips)
        of_real = _rows(metric, real, range(len(real)))
        found[metric.name] = {"unit": metric.unit, "sampled": _estimate(metric, of_sampled, of_real).to_dict()}
        if not metric.compares:
            found[metric.name]["real"] = _estimate(metric, of_real, of_real).to_dict()
    return found


def _rows(metric: Metric, measured: Sequence[Measured], clips: Sequence[int]) -> Rows:
    seen = [(row, clip) for rows, clip in zip(measured, clips, strict=True) if (row := rows[metric.name]) is not None]
    return Rows(np.array([row for row, _ in seen], dtype=np.float64), [clip for _, clip in seen])


def _estimate(metric: Metric, rows: Rows, real: Rows) -> Estimate:
    if not len(rows.values) or (metric.compares and not len(real.values)):
        return Estimate.missing(f"no clip has {' and '.join(sorted(metric.needs))} that it can be measured on")
    return metric.summarise(rows, real)

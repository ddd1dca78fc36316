"""One page for several runs: what was set differently, and what came of it, side by side."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ltx2_train.errors import DataError
from ltx2_train.evals.charts import Level, Series, line_chart
from ltx2_train.evals.embedding import Media
from ltx2_train.evals.heldout import MODALITIES
from ltx2_train.evals.history import (
    best_losses,
    estimate_line,
    estimate_text,
    figures_of,
    film_cell,
    loss_line,
)
from ltx2_train.evals.identity import Identity, differences, heldout_of, samples_of
from ltx2_train.evals.report import MEDIA_BYTES, change, duration, loss_text, render, smooth
from ltx2_train.evals.runrecord import RunRecord, read_run

RUN_DIR = "train.run_dir"  # differs always and says nothing
MOST_RUNS = 8  # as many colours can be told apart


def write_comparison(
    directories: Sequence[Path],
    path: Path,
    settings: Sequence[Mapping[str, str]],
    *,
    media_bytes: int = MEDIA_BYTES,
) -> Path:
    """Write the page of several runs to `path`. `settings`: of each run, flat, by dotted names.

    Raises `DataError` for more runs than colours, or one without metrics.
    """
    if len(directories) > MOST_RUNS:
        raise DataError(f"{len(directories)} runs: a page compares at most {MOST_RUNS}. Name fewer of them")
    runs, media = [read_run(directory) for directory in directories], Media(media_bytes)
    names = short_names(directories)
    pairs = list(zip(names, runs, strict=True))
    values = {
        "title": " · ".join(names),
        "facts": [f"{len(runs)} runs"],
        "runs": [{"name": name, "style": _style(i), "facts": _facts(run)} for i, (name, run) in enumerate(pairs)],
        "notes": _notes(pairs),
        "settings": differing(settings),
        "figures": figure_rows(runs),
        "heldout": _heldout_charts(pairs),
        "metric_charts": _metric_charts(pairs),
        "curves": _training_charts(pairs),
        "again": _samples(pairs, media),
        "media": media,
    }
    return render("comparison.html.j2", values, path)


def _notes(pairs: "Sequence[Named]") -> list[str]:
    """What of the evaluations is not in the page, and which runs were not measured on the same clips, or not alike."""
    told = [f"{name}: {note}" for name, run in pairs for note in run.notes]
    told += [
        f"{name}: the losses and samples of {one} are not in this page." for name, run in pairs for one in run.further
    ]
    for words, of in (("held-out loss", _heldout_identity), ("samples", _samples_identity)):
        (first, known), *others = [(name, of(run)) for name, run in pairs if of(run)] or [("", {})]
        told += [
            f"{name}: {words} of other clips or settings than those of {first} ({differences(known, one)})."
            for name, one in others
            if one != known
        ]
    return told


def _heldout_identity(run: RunRecord) -> Identity:
    return heldout_of(run.heldout[-1]) if run.heldout else {}


def _samples_identity(run: RunRecord) -> Identity:
    return samples_of(run.samples) if run.samples else {}


def short_names(directories: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell all runs apart; a run that is given twice has one name twice."""
    parts = [directory.resolve().parts for directory in directories]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return ["/".join(one) for one in parts]


def differing(settings: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, with each run's value; a dash where a run has none."""
    names = dict.fromkeys(name for one in settings for name in one if name != RUN_DIR)
    rows = [{"name": name, "values": [one.get(name, "–") for one in settings]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1]


def figure_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """What came out at the last evaluation of each run; a dash where a run does not have it."""
    rows = [_row(f"held-out loss, {modality}", "", runs, _final_loss, modality) for modality in MODALITIES]
    units = {name: entries[-1][1]["unit"] for run in runs for name, entries in figures_of(run).items()}
    rows += [_row(name, unit, runs, _final_figure, name) for name, unit in units.items()]
    return [row for row in rows if any(value != "–" for value in row["values"])]


def _row(name: str, unit: str, runs: Sequence[RunRecord], of: Any, key: Any) -> dict[str, Any]:
    return {"name": name, "unit": unit, "values": [of(run, key) for run in runs]}


def _final_loss(run: RunRecord, modality: str) -> str:
    """With its step, and how far it lies from the first evaluation."""
    if not run.heldout:
        return "–"
    first, last = (best_losses(run.heldout[i])[modality]["mean"] for i in (0, -1))
    if last["mean"] is None:
        return "–"
    text = f"{loss_text(last)} at step {run.heldout[-1]['step']}"
    known = len(run.heldout) > 1 and first["mean"] is not None
    return f"{text}, {change(first['mean'], last['mean'])} than at step {run.heldout[0]['step']}" if known else text


def _final_figure(run: RunRecord, name: str) -> str:
    entries = figures_of(run).get(name)
    text = estimate_text(entries[-1][1]["sampled"]) if entries else "–"
    return f"{text} at step {entries[-1][0]}" if entries and text != "–" else text


def _style(i: int) -> str:
    return f"run{i}"


def _facts(run: RunRecord) -> str:
    if not run.steps:
        return "no step was logged"
    return f"{run.steps[-1]['step']:,} steps, {duration(run.steps[-1]['time'])}"


# -- charts ------------------------------------------------------------------------------------------------------------

Named = tuple[str, RunRecord]


def _heldout_charts(pairs: Sequence[Named]) -> list[dict[str, str]]:
    found = []
    for modality in MODALITIES:
        lines = []
        for i, (name, run) in enumerate(pairs):
            entries = [(e["step"], best_losses(e)[modality]["mean"]) for e in run.heldout]
            lines.append(loss_line(entries, name, _style(i)))
        found.append((f"Held-out loss, {modality}", lines, "held-out loss", True))
    return _drawn(found)


def _metric_charts(pairs: Sequence[Named]) -> list[dict[str, str]]:
    """Onset F1 and every other figure over steps."""
    names = dict.fromkeys(name for _, run in pairs for name in figures_of(run))
    found = []
    for metric in names:
        lines = [estimate_line(figures_of(run).get(metric, []), name, _style(i)) for i, (name, run) in enumerate(pairs)]
        found.append((metric, lines, "sampled", False))
    return _drawn(found)


def _training_charts(pairs: Sequence[Named]) -> list[dict[str, str]]:
    keys = [(f"Training loss, {m}, running mean", f"loss_{m}", "loss") for m in MODALITIES]
    keys += [("Gradient norm before clipping", "grad_norm", "norm"), ("Learning rate", "lr", "rate")]
    keys += [("Throughput", "tokens_per_second", "tokens/s")]
    found = [
        (title, [_curve(run, key, name, i) for i, (name, run) in enumerate(pairs)], unit, True)
        for title, key, unit in keys
    ]
    return _drawn(found)


def _curve(run: RunRecord, key: str, name: str, i: int) -> Series:
    points = [(line["step"], line[key]) for line in run.steps if isinstance(line.get(key), int | float)]
    return Series(name, [x for x, _ in points], smooth([y for _, y in points]), f"{_style(i)} thinner")


def _drawn(found: Sequence[tuple[str, list[Series], str, bool]]) -> list[dict[str, str]]:
    charts = []
    for title, lines, unit, from_zero in found:
        svg = line_chart(lines, x_label="step", y_label=unit, from_zero=from_zero, levels=_baseline(lines))
        charts.append({"title": title, "svg": svg})
    return [chart for chart in charts if chart["svg"]]


def _baseline(lines: Sequence[Series]) -> list[Level]:
    """The untrained model, where the runs that were measured at step 0 agree on it."""
    values = [line.y[0] for line in lines if len(line.x) > 1 and line.x[0] == 0]
    alike = values and max(values) - min(values) <= 1e-3 * abs(statistics.fmean(values))
    return [Level("step 0, untrained", values[0], "before")] if alike else []


# -- samples -----------------------------------------------------------------------------------------------------------


def _samples(pairs: Sequence[Named], media: Media) -> list[dict[str, Any]]:
    """A row per clip of the data and seed that runs share, or one has: the newest sample of each run, then the real clip."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    real: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, run in pairs:
        newest = next((s for s in reversed(run.sampled) if s.shown), None)
        for clip in newest.shown if newest else []:
            key = (_samples_identity(run).get("data"), clip["key"], clip.get("seed"))
            row = rows.setdefault(key, {"caption": clip["caption"], "seed": clip.get("seed"), "cells": []})
            assert newest is not None
            row["cells"].append(film_cell(clip["sampled"], f"{name}, step {newest.step}", newest, media))
            if clip.get("real", {}).get("media") and key not in real:
                real[key] = film_cell(clip["real"], "real", newest, media)
    for key, cell in real.items():
        rows[key]["cells"].append(cell)
    return list(rows.values())

"""One page for several runs: what was set differently, and what came of it, side by side."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltx2_train.errors import DataError
from ltx2_train.evals.charts import Level, Series, line_chart
from ltx2_train.evals.embedding import Media
from ltx2_train.evals.heldout import MODALITIES
from ltx2_train.evals.history import (
    KINDS,
    best_kind,
    estimate_line,
    estimate_text,
    figures_of,
    film_cell,
    first_name,
    loss_line,
    losses_of,
)
from ltx2_train.evals.identity import Identity, differences, heldout_of, samples_of
from ltx2_train.evals.report import MEDIA_BYTES, change, duration, loss_text, render, smooth
from ltx2_train.evals.runrecord import RunRecord, read_run

RUN_DIR = "train.run_dir"  # differs always and says nothing
HELD_OUT = "evaluation.datasets.0"  # where the data lie that the page's evaluations are of
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
        "notes": _notes(pairs, settings),
        "settings": differing(settings),
        "figures": figure_rows(pairs),
        "heldout": _heldout_charts(pairs),
        "metric_charts": _metric_charts(pairs),
        "curves": _training_charts(pairs),
        "again": _samples(pairs, media),
        "media": media,
    }
    return render("comparison.html.j2", values, path)


def _notes(pairs: "Sequence[Named]", settings: Sequence[Mapping[str, str]]) -> list[str]:
    """What of the evaluations is not in the page, and which runs were not measured on the same clips, or not alike."""
    told = [f"{name}: {note}" for name, run in pairs for note in run.notes]
    told += [
        f"{name}: the losses and samples of {one} are not in this page." for name, run in pairs for one in run.further
    ]
    for words, of in (("Held-out loss", _heldout_identity), ("Samples and their figures", _samples_identity)):
        first, *others = measured_alike(pairs, of) or [[]]
        told += [
            f"{words}: {names_of(pairs, group)} cannot be compared with {names_of(pairs, first)} "
            f"({_difference(pairs, settings, of, first[0], group[0])}). They stand apart in tables and charts."
            for group in others
        ]
    return told


def _difference(
    pairs: "Sequence[Named]", settings: Sequence[Mapping[str, str]], of: "IdentityOf", first: int, other: int
) -> str:
    """In words, and where the data differ with their places, as the settings of the runs name them."""
    known, one = (of(pairs[i][1]) for i in (first, other))
    text, places = differences(known, one), [settings[i].get(HELD_OUT) for i in (other, first)]
    if known.get("data") == one.get("data") or None in places or places[0] == places[1]:
        return text
    return f"{text}; by their settings {places[0]} instead of {places[1]}"


def measured_alike(pairs: "Sequence[Named]", of: "IdentityOf") -> list[list[int]]:
    """The numbers of the runs whose measurement is of the same, in the order of their first; those without are in none."""
    groups: list[tuple[Identity, list[int]]] = []
    for i, (_, run) in enumerate(pairs):
        identity = of(run)
        group = next((group for known, group in groups if known == identity), None)
        if group is not None:
            group.append(i)
        elif identity:
            groups.append((identity, [i]))
    return [group for _, group in groups]


def names_of(pairs: "Sequence[Named]", group: Sequence[int]) -> str:
    """The names of some runs, as in a sentence."""
    *names, last = [pairs[i][0] for i in group]
    return f"{', '.join(names)} and {last}" if names else last


def _heldout_identity(run: RunRecord) -> Identity:
    return {**heldout_of(run.heldout[-1]), "weights": KINDS[best_kind(run)]} if run.heldout else {}


def _samples_identity(run: RunRecord) -> Identity:
    return samples_of(run.samples) if run.samples else {}


def short_names(directories: Sequence[Path]) -> list[str]:
    """Of every path the shortest ending that no other has; a run that is given twice has one name twice."""
    parts = [directory.resolve().parts for directory in directories]
    return [_short_name(one, set(parts) - {one}) for one in parts]


def _short_name(parts: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    for depth in range(1, len(parts)):
        if all(other[-depth:] != parts[-depth:] for other in others):
            return "/".join(parts[-depth:])
    return str(Path(*parts))


def differing(settings: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, with each run's value; a dash where a run has none."""
    names = dict.fromkeys(name for one in settings for name in one if name != RUN_DIR)
    rows = [{"name": name, "values": [one.get(name, "–") for one in settings]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1]


def figure_rows(pairs: "Sequence[Named]") -> list[dict[str, Any]]:
    """What came out at the last evaluation of each run; a dash where a run does not have it.

    Where the runs were not all measured alike, those that were have rows of their own under a heading, and the others'
    cells are empty.
    """
    rows: list[dict[str, Any]] = []
    for words, of, rows_of in (
        ("held-out loss", _heldout_identity, _loss_rows),
        ("samples", _samples_identity, _sample_rows),
    ):
        groups = measured_alike(pairs, of)
        for group in groups:
            found = rows_of([run if i in group else None for i, (_, run) in enumerate(pairs)])
            heading = [{"heading": f"{words} of {names_of(pairs, group)}"}] if len(groups) > 1 and found else []
            rows += heading + found
    return rows


def _loss_rows(runs: "Sequence[RunRecord | None]") -> list[dict[str, Any]]:
    kind = next(KINDS[best_kind(run)] for run in runs if run)
    rows = [_row(f"held-out loss, {modality} ({kind})", "", runs, _final_loss, modality) for modality in MODALITIES]
    return _with_values(rows)


def _sample_rows(runs: "Sequence[RunRecord | None]") -> list[dict[str, Any]]:
    units = {name: entries[-1][1]["unit"] for run in runs if run for name, entries in figures_of(run).items()}
    return _with_values([_row(name, unit, runs, _final_figure, name) for name, unit in units.items()])


def _with_values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if any(value not in ("–", "") for value in row["values"])]


def _row(name: str, unit: str, runs: "Sequence[RunRecord | None]", of: Any, key: Any) -> dict[str, Any]:
    return {"name": name, "unit": unit, "values": ["" if run is None else of(run, key) for run in runs]}


def _final_loss(run: RunRecord, modality: str) -> str:
    """With its step, and how far it lies from the first evaluation."""
    (first_step, first), (last_step, last) = (losses_of(run, best_kind(run))[i] for i in (0, -1))
    before, after = (losses[modality]["mean"] for losses in (first, last))
    if after["mean"] is None:
        return "–"
    text = f"{loss_text(after)} at step {last_step}"
    known = first is not last and before["mean"] is not None
    return f"{text}, {change(before['mean'], after['mean'])} than at step {first_step}" if known else text


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
IdentityOf = Callable[[RunRecord], Identity]


def _heldout_charts(pairs: Sequence[Named]) -> list[dict[str, str]]:
    """A chart per modality, of the runs that were measured alike."""
    found = []
    groups = measured_alike(pairs, _heldout_identity)
    for group in groups:
        for modality in MODALITIES:
            lines = []
            for i in group:
                name, run = pairs[i]
                entries = [(step, losses[modality]["mean"]) for step, losses in losses_of(run, best_kind(run))]
                lines.append(loss_line(entries, name, _style(i)))
            found.append((_title(f"Held-out loss, {modality}", pairs, group, groups), lines, "held-out loss", True))
    return _drawn(found)


def _metric_charts(pairs: Sequence[Named]) -> list[dict[str, str]]:
    """Onset F1 and every other figure over steps, of the runs that were measured alike."""
    found = []
    groups = measured_alike(pairs, _samples_identity)
    for group in groups:
        figures = {i: figures_of(pairs[i][1]) for i in group}
        for metric in dict.fromkeys(name for own in figures.values() for name in own):
            lines = [estimate_line(own.get(metric, []), pairs[i][0], _style(i)) for i, own in figures.items()]
            found.append((_title(metric, pairs, group, groups), lines, "sampled", False))
    return _drawn(found)


def _title(words: str, pairs: Sequence[Named], group: Sequence[int], groups: Sequence[Sequence[int]]) -> str:
    """Names the runs of a chart where it is not of all that were measured."""
    return f"{words}: {names_of(pairs, group)}" if len(groups) > 1 else words


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
    """The model before training, where the runs that were measured at step 0 agree on it."""
    values = [line.y[0] for line in lines if len(line.x) > 1 and line.x[0] == 0]
    alike = values and max(values) - min(values) <= 1e-3 * abs(statistics.fmean(values))
    return [Level(first_name(0), values[0], "before")] if alike else []


# -- samples -----------------------------------------------------------------------------------------------------------


def _samples(pairs: Sequence[Named], media: Media) -> list[dict[str, Any]]:
    """A row per clip of the data and seed: the newest sample of each run that has it, then the real clip.

    The rows come in groups of those that the same runs have, most runs first, under a heading where there are several.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    real: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, (name, run) in enumerate(pairs):
        newest = next((s for s in reversed(run.sampled) if s.shown), None)
        for clip in newest.shown if newest else []:
            key = (_samples_identity(run).get("data"), clip["key"], clip.get("seed"))
            row = rows.setdefault(key, {"caption": clip["caption"], "seed": clip.get("seed"), "cells": [], "runs": []})
            assert newest is not None
            row["cells"].append(film_cell(clip["sampled"], f"{name}, step {newest.step}", newest, media))
            row["runs"].append(i)
            if clip.get("real", {}).get("media") and key not in real:
                real[key] = film_cell(clip["real"], "real", newest, media)
    for key, cell in real.items():
        rows[key]["cells"].append(cell)
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows.values():
        groups.setdefault(tuple(row["runs"]), []).append(row)
    return [
        {"heading": _shared(pairs, group) if len(groups) > 1 else "", "rows": found}
        for group, found in sorted(groups.items(), key=lambda item: -len(item[0]))
    ]


def _shared(pairs: Sequence[Named], group: Sequence[int]) -> str:
    names = names_of(pairs, group)
    return f"{names}, from the same noise" if len(group) > 1 else f"{names} alone: no other run sampled these"

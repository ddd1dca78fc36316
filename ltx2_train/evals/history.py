"""How a run's evaluations changed from step to step: losses, sync, figures, and the same caption sampled again."""

from collections.abc import Sequence
from typing import Any

from ltx2_train.evals.charts import Level, Series, StepMark, line_chart
from ltx2_train.evals.embedding import Media
from ltx2_train.evals.heldout import MODALITIES
from ltx2_train.evals.runrecord import RunRecord, Sampled

COLUMNS = 8  # steps side by side; of more the first, the last and others evenly between are shown
Chart = dict[str, str]
Marks = Sequence[StepMark]


KINDS = {"ema": "averaged weights", "raw": "trained weights"}


def best_kind(run: RunRecord) -> str:
    """Of which weights the losses are that stand for a run: the moving average where its newest evaluation has one."""
    return "ema" if run.heldout[-1].get("ema") else "raw"


def losses_of(run: RunRecord, kind: str) -> list[tuple[int, dict[str, Any]]]:
    """(step, losses) of every evaluation that measured that kind of weights. Kinds are never mixed in one series."""
    return [(entry["step"], entry[kind]) for entry in run.heldout if entry.get(kind)]


def first_name(step: int) -> str:
    """What the first measurement is called. At step 0 the weights may be drawn, or released ones."""
    return "step 0, before training" if step == 0 else f"step {step}, the first"


def spread_out(entries: Sequence[Any]) -> list[Any]:
    """At most `COLUMNS` of them, the first and the last among them."""
    if len(entries) <= COLUMNS:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


# -- losses ------------------------------------------------------------------------------------------------------------


def heldout_charts(run: RunRecord, marks: Marks) -> list[Chart]:
    """Held-out loss over steps per modality, of both kinds of weights, and by sigma. Needs two evaluations."""
    if len(run.heldout) < 2:
        return []
    charts = []
    for modality in MODALITIES:
        charts.append((f"{modality}, over steps", _over_steps(run, modality, marks)))
    for modality in MODALITIES:
        charts.append((f"{modality} by sigma, over steps", _by_sigma_over_steps(run, modality, marks)))
    return [{"title": title, "svg": svg} for title, svg in charts if svg]


def loss_line(entries: Sequence[tuple[float, dict[str, Any]]], name: str, style: str) -> Series:
    """A line with its band, of (step or sigma, estimate with `mean`, `low` and `high`); without a value: left out."""
    return _line([(step, one["mean"], one["low"], one["high"]) for step, one in entries], name, style)


def _line(points: Sequence[tuple[float, float | None, float | None, float | None]], name: str, style: str) -> Series:
    seen = [
        (x, y, y if low is None else low, y if high is None else high) for x, y, low, high in points if y is not None
    ]
    x, y, low, high = (list(column) for column in zip(*seen, strict=True)) if seen else ([], [], [], [])
    return Series(name, x, y, style, low, high)


def _bare(line: Series) -> Series:
    """Without its band: several of them in one chart hide each other."""
    return Series(line.name, line.x, line.y, line.style)


def _over_steps(run: RunRecord, modality: str, marks: Marks) -> str:
    kind = best_kind(run)
    entries = [(step, losses[modality]["mean"]) for step, losses in losses_of(run, kind)]
    lines = [loss_line(entries, KINDS[kind], modality)]
    if kind == "ema":
        raw = [(step, losses[modality]["mean"]) for step, losses in losses_of(run, "raw")]
        lines.append(_bare(loss_line(raw, KINDS["raw"], f"{modality} raw")))
    first = entries[0][1]["mean"]
    levels = [] if first is None else [Level(first_name(entries[0][0]), first, "before")]
    return line_chart(lines, x_label="step", y_label="held-out loss", levels=levels, marks=marks)


def _by_sigma_over_steps(run: RunRecord, modality: str, marks: Marks) -> str:
    """A line per noise level, of the evaluations that have the newest one's."""
    measured = losses_of(run, best_kind(run))
    sigmas = measured[-1][1]["sigmas"]
    alike = [(step, losses) for step, losses in measured if losses["sigmas"] == sigmas]
    lines = []
    for i, sigma in enumerate(sigmas):
        found = [(step, losses[modality]["by_sigma"][i]) for step, losses in alike]
        style = f"{modality} level{5 * i // len(sigmas)}"
        lines.append(_bare(loss_line(found, f"sigma {sigma:g}", style)))
    return line_chart(lines, x_label="step", y_label="held-out loss", marks=marks)


# -- figures of samples ------------------------------------------------------------------------------------------------


def number_of(side: dict[str, Any]) -> str:
    """Of how many clips the figures of sync are, and of how many samples of each where there are several."""
    clips, samples = side["clips"], side.get("samples", side["clips"])
    return f"{clips} clips" if samples == clips else f"{samples} samples of {clips} clips"


def sync_chart(run: RunRecord, marks: Marks) -> str:
    """Onset F1 over steps with its interval, chance, and the real clips; empty before two evaluations have it."""
    found = [(s.step, s.found["sync"]["sampled"]) for s in run.sampled if s.found.get("sync")]
    if len(found) < 2:
        return ""
    sampled = _line([(step, one["f1"], one.get("low"), one.get("high")) for step, one in found], "sampled", "ink")
    chance = [(step, one["chance"]) for step, one in found if one["chance"] is not None]
    lines = [sampled, Series("chance", [x for x, _ in chance], [y for _, y in chance], "chance")]
    real = next(s.found["sync"]["real"]["f1"] for s in reversed(run.sampled) if s.found.get("sync"))
    named = [("real, through the codec", real, "real"), (first_name(found[0][0]), found[0][1]["f1"], "before")]
    levels = [Level(name, value, style) for name, value, style in named if value is not None]
    drawn = [line for line in lines if line.y]
    return line_chart(drawn, x_label="step", y_label="onset F1", levels=levels, marks=marks)


def figures_of(run: RunRecord) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """(step, entry of samples.json) of every figure, whatever its name, in the order in which the newest has them."""
    names = dict.fromkeys(name for s in reversed(run.sampled) for name in s.found.get("metrics") or {})
    return {
        name: [(s.step, s.found["metrics"][name]) for s in run.sampled if name in (s.found.get("metrics") or {})]
        for name in names
    }


def metrics_table(run: RunRecord) -> dict[str, Any] | None:
    """A row per figure: of the newest step, with its interval, of the real clips, and of earlier steps in their order.

    What is to be said of the newest stands once, with the names of the figures that it is about.
    """
    found = figures_of(run)
    if not found:
        return None
    *earlier, last = spread_out(sorted({step for entries in found.values() for step, _ in entries}))
    rows: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    for name, entries in found.items():
        by_step, (_, newest) = dict(entries), entries[-1]
        cells = [estimate_text(by_step[last]["sampled"]) if last in by_step else ""]
        cells += [estimate_text(newest["real"]) if newest.get("real") else ""]
        cells += [estimate_text(by_step[s]["sampled"], interval=False) if s in by_step else "" for s in earlier]
        rows.append({"name": name, "unit": newest["unit"], "cells": cells})
        if note := newest["sampled"].get("note"):
            notes.setdefault(note, []).append(name)
    columns = [f"step {last}", "real", *(f"step {step}" for step in earlier)]
    return {"columns": columns, "rows": rows, "notes": [{"text": k, "names": ", ".join(v)} for k, v in notes.items()]}


def metric_charts(run: RunRecord, marks: Marks) -> list[Chart]:
    """A chart over steps of every figure that two evaluations have."""
    charts = []
    for name, entries in figures_of(run).items():
        line = estimate_line(entries, "sampled", "ink")
        if len(line.x) > 1:
            levels = [Level(first_name(line.x[0]), line.y[0], "before")]  # type: ignore[arg-type]
            real = (entries[-1][1].get("real") or {}).get("value")
            levels += [Level("real", real, "real")] if real is not None else []
            label = entries[-1][1]["unit"] or name
            svg = line_chart([line], x_label="step", y_label=label, from_zero=False, levels=levels, marks=marks)
            charts.append({"title": name, "svg": svg})
    return charts


def estimate_line(entries: Sequence[tuple[int, dict[str, Any]]], name: str, style: str) -> Series:
    """The sampled clips' figure over steps, with its interval."""
    found = [(step, entry["sampled"]) for step, entry in entries]
    return _line([(step, one["value"], one.get("low"), one.get("high")) for step, one in found], name, style)


def estimate_text(estimate: dict[str, Any], *, interval: bool = True) -> str:
    """A figure's value, and its interval, in three digits; a dash where there is none."""
    if estimate.get("value") is None:
        return "–"
    low, high = estimate.get("low"), estimate.get("high")
    bounds = f" [{low:.3g}, {high:.3g}]" if interval and low is not None and high is not None else ""
    return f"{estimate['value']:.3g}{bounds}".replace("-", "−")


# -- the same caption again --------------------------------------------------------------------------------------------


def rows_over_time(run: RunRecord, media: Media) -> dict[str, Any] | None:
    """A row per caption: its sample at the evaluated steps, then the real clip. Needs two evaluations with samples."""
    sampled = [s for s in run.sampled if s.shown]
    if len(sampled) < 2:
        return None
    chosen = spread_out(sampled)
    rows = [_row(clip, chosen, sampled[-1], media) for clip in sampled[-1].shown]
    return {"rows": rows, "steps": len(chosen), "of": len(sampled), "place": str(run.directory / "evals")}


def _row(clip: dict[str, Any], chosen: Sequence[Sampled], newest: Sampled, media: Media) -> dict[str, Any]:
    cells = []
    for one in chosen:
        match = next((c for c in one.shown if _same(c, clip)), None)
        if match is not None:
            cells.append(film_cell(match["sampled"], f"step {one.step}", one, media, newest=one is newest))
    if clip.get("real", {}).get("media"):
        cells.append(film_cell(clip["real"], "real", newest, media))
    return {"caption": clip["caption"], "seed": clip.get("seed"), "cells": cells}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["key"], one.get("seed")) == (other["key"], other.get("seed"))


def film_cell(
    side: dict[str, Any], title: str, sampled: Sampled, media: Media, *, newest: bool = False
) -> dict[str, Any]:
    """A film if the page has room for it, else its frames, else its path."""
    film = media.embed(sampled.directory / side["media"])
    stand_in = None
    if film.id is None and side.get("strip"):
        stand_in = media.picture(sampled.directory / side["strip"])
    return {"title": title, "film": film, "strip": stand_in, "newest": newest}

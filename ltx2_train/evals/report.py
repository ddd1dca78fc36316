"""One page that tells what a run did: curves, held-out losses, samples with sound. It needs no other file."""

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ltx2_train.errors import DataError
from ltx2_train.evals.charts import Mark, Series, StepMark, bars, line_chart, number, waveform
from ltx2_train.evals.embedding import Media
from ltx2_train.evals.heldout import MODALITIES, paired_change
from ltx2_train.evals.history import (
    KINDS,
    best_kind,
    first_name,
    heldout_charts,
    loss_line,
    losses_of,
    metric_charts,
    metrics_table,
    number_of,
    rows_over_time,
    sync_chart,
)
from ltx2_train.evals.incidents import incident_list, incidents, step_marks
from ltx2_train.evals.runrecord import RunRecord, Sampled, read_run

REPORT_NAME = "report.html"
MEDIA_BYTES = 32_000_000  # of one page: a mail server takes it, a browser opens it at once
SIGMA_GROUPS = 5  # the ten bins of the metrics, two by two: enough points in each for a readable curve
QUIET = 0.02  # amplitude: a waveform below this is not drawn any larger
CURVE_POINTS = 80  # windows that a run is averaged over for the sigma curves


def write_report(directory: Path, path: Path | None = None, *, media_bytes: int = MEDIA_BYTES) -> Path:
    """Write the page of the run in `directory` (to `directory/report.html`) and return where it lies.

    `media_bytes`: the most that films and pictures may take in it.
    """
    run, media = read_run(directory), Media(media_bytes)
    events = incidents(run)
    marks = step_marks(events)
    values = {
        "title": run.name,
        "facts": _facts(run),
        "tiles": headline(run) + _wait_tile(run),
        "samples": _samples(run, media, marks),
        "history": rows_over_time(run, media),
        "metrics": metrics_table(run),
        "metric_charts": metric_charts(run, marks),
        "notes": _notes(run),
        "heldout": _heldouts(run, marks),
        "curves": _curves(run, marks),
        "incidents": incident_list(events),
        "config": run.config,
        "media": media,
    }
    return render("report.html.j2", values, path or directory / REPORT_NAME)


def render(template: str, values: dict[str, Any], path: Path) -> Path:
    """Write a page, whole or not at all, and the folders that it lies in. Raises `DataError` where that cannot be."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ltx2_train.evals", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["loss"] = loss_text
    page = environment.get_template(template).render(**values)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise DataError(
            f"{path}: the page cannot be written there ({error.strerror}). Name a file with --out"
        ) from error
    return path


# -- header ------------------------------------------------------------------------------------------------------------


def _facts(run: RunRecord) -> list[str]:
    """The line under the title."""
    if not run.steps:
        return ["no step was logged"]
    last = run.steps[-1]
    facts = [f"{last['step']:,} steps", duration(last["time"])]
    rates = _column(run.steps, "tokens_per_second")
    return facts + ([f"{number(statistics.median(rates))} tokens/s"] if rates else [])


def headline(run: RunRecord) -> list[dict[str, str]]:
    """The figures that come first: what was learned, and whether picture and sound agree."""
    tiles = []
    if run.heldout:
        tiles += [tile for modality in MODALITIES if (tile := _loss_tile(run, modality))]
    samples = run.samples or {}
    if samples.get("sync"):
        sampled = samples["sync"]["sampled"]
        note = f"chance {figure(sampled['chance'])}, ±{sampled['tolerance_ms']:.0f} ms, {number_of(sampled)}"
        value = figure(sampled["f1"])
        tiles.append({"label": "sound meets picture (onset F1)", "value": value, "note": note, "style": "ink"})
    return tiles


def _loss_tile(run: RunRecord, modality: str) -> dict[str, str]:
    """The last held-out loss of a modality, beside the first one; nothing where the clips do not have it."""
    kind = best_kind(run)
    measured = losses_of(run, kind)
    before, after = (losses[modality]["mean"] for _, losses in (measured[0], measured[-1]))
    tile = {"label": f"held-out loss, {modality}", "value": "–", "style": modality}
    if after["mean"] is None:
        return tile | {"note": after["note"]} if after["count"] else {}
    tile |= {"value": f"{after['mean']:.3f}", "note": KINDS[kind]}
    if len(measured) > 1 and before["mean"] is not None:
        tile["note"] += f", from {before['mean']:.3f}: {change(before['mean'], after['mean'])}"
    return tile


def _wait_tile(run: RunRecord) -> list[dict[str, str]]:
    waits, steps = _column(run.steps, "data_seconds"), _column(run.steps, "step_seconds")
    if not sum(steps):
        return []
    share = f"{100 * sum(waits) / sum(steps):.1f}%"
    return [{"label": "waiting for data", "value": share, "note": "of the time of a step", "style": "ink"}]


def loss_text(estimate: dict[str, Any]) -> str:
    """A mean with the half-width of its interval; what is missing is left out."""
    if estimate["mean"] is None:
        return "–"
    half = f" ± {(estimate['high'] - estimate['low']) / 2:.4f}" if estimate["low"] is not None else ""
    return f"{estimate['mean']:.4f}{half}"


def change(before: float, after: float) -> str:
    """How much `after` lies below or above `before`, in words."""
    percent = 100 * (after - before) / before if before else 0.0
    return f"{abs(percent):.0f}% {'lower' if percent < 0 else 'higher'}"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _column(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if isinstance(line.get(key), int | float)]


# -- held-out loss -----------------------------------------------------------------------------------------------------


def _heldouts(run: RunRecord, marks: Sequence[StepMark]) -> list[dict[str, Any]]:
    """The losses on every held-out dataset, the run's first one first, each with its title."""
    found = [("Held-out loss", _heldout(run, marks))]
    found += [(f"Held-out loss, {name}", _heldout(one, marks)) for name, one in run.further.items()]
    return [{"title": title, **losses} for title, losses in found if losses]


def _notes(run: RunRecord) -> list[str]:
    """What of the evaluations is not in the page, or is joined with less than certainty."""
    told = list(run.notes)
    for name, one in run.further.items():
        told += [f"{name}: {note}" for note in one.notes]
        if one.sampled:
            told.append(f"{name}: its samples are not in this page; they lie in {one.directory / 'evals'}.")
    return told


def _heldout(run: RunRecord, marks: Sequence[StepMark]) -> dict[str, Any] | None:
    """Table rows, a chart per modality of the first against the last measurement, and charts over steps."""
    if not run.heldout:
        return None
    measured = losses_of(run, best_kind(run))
    drawn = [_heldout_chart(m, measured) for m in MODALITIES] + heldout_charts(run, marks)
    charts = [chart for chart in drawn if chart["svg"]]
    rows = [_heldout_row(run, entry, kind) for entry in run.heldout for kind in ("raw", "ema") if entry.get(kind)]
    return {"rows": rows, "clips": _counted(measured[-1][1]), "charts": charts}


def _counted(losses: dict[str, Any]) -> str:
    """How many clips there are, in how many of them a modality is, and what is to be said about the means."""
    means = {modality: losses[modality]["mean"] for modality in MODALITIES}
    told = [f"{losses['clips']} clips"]
    told += [f"{name} in {one['count']} of them" for name, one in means.items() if one["count"] < losses["clips"]]
    notes = dict.fromkeys(one["note"] for one in means.values() if one["count"] and one["note"])
    return ", ".join(told) + (f" ({'; '.join(notes)})" if notes else "")


def _heldout_row(run: RunRecord, entry: dict[str, Any], kind: str) -> dict[str, Any]:
    """Losses of one measurement, and how they differ from the first of the same kind of weights, clip by clip."""
    step, losses = entry["step"], entry[kind]
    first_step, first = losses_of(run, kind)[0]
    row: dict[str, Any] = {"step": step, "weights": KINDS[kind], "baseline": step == run.heldout[0]["step"]}
    for modality in MODALITIES:
        paired = paired_change(first, losses, modality) if step != first_step else None
        text = (
            f"{paired.value:+.4f} ± {paired.half_width:.4f}".replace("-", "−")
            if paired and paired.half_width is not None
            else paired.note
            if paired
            else ""
        )
        row[modality] = {**losses[modality]["mean"], "change": text}
    return row


def _heldout_chart(modality: str, measured: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, str]:
    def line(losses: dict[str, Any], name: str, style: str) -> Series:
        return loss_line(list(zip(losses["sigmas"], losses[modality]["by_sigma"], strict=True)), name, style)

    (first_step, first), (last_step, last) = measured[0], measured[-1]
    lines = [line(last, f"step {last_step}", modality)]
    if len(measured) > 1:
        lines.insert(0, line(first, first_name(first_step), "before"))
    return {
        "title": f"{modality}, by sigma",
        "svg": line_chart(lines, x_label="sigma (1 = noise)", y_label="held-out loss"),
    }


# -- training curves ---------------------------------------------------------------------------------------------------


def _curves(run: RunRecord, marks: Sequence[StepMark]) -> list[dict[str, str]]:
    """All charts of the training itself; those without data are left out."""
    losses = [s for m in MODALITIES for s in _loss_lines(run.steps, m)]
    charts = [("Training loss", losses, "loss")]
    charts += [(f"Training loss by sigma, {m}", _sigma_lines(run.steps, m), "loss") for m in MODALITIES]
    for title, key, unit in (
        ("Gradient norm before clipping", "grad_norm", "norm"),
        ("Learning rate", "lr", "rate"),
        ("Throughput", "tokens_per_second", "tokens/s"),
    ):
        charts.append((title, _plain_line(run.steps, key), unit))
    charts.append(("Seconds per step", _time_lines(run.steps), "s"))
    drawn = [(title, line_chart(lines, x_label="step", y_label=unit, marks=marks)) for title, lines, unit in charts]
    return [{"title": title, "svg": svg} for title, svg in drawn if svg]


def _loss_lines(lines: Sequence[dict[str, Any]], modality: str) -> list[Series]:
    """The loss as logged, faint, under its running mean."""
    found = _plain_line(lines, f"loss_{modality}")
    return [
        line
        for one in found
        for line in (
            Series("", one.x, one.y, f"{modality} raw", faint=True),
            Series(modality, one.x, smooth(one.y), modality),
        )
    ]


def smooth(values: Sequence[float]) -> list[float]:
    """Means over centred windows of a thirtieth of the run: no lag, and a constant stays what it is."""
    half = len(values) // 60
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _sigma_lines(lines: Sequence[dict[str, Any]], modality: str) -> list[Series]:
    """Mean loss of each group of sigma bins over windows of steps."""
    binned = [(line["step"], line["sigma_bins"][modality]) for line in lines if modality in line.get("sigma_bins", {})]
    if not binned:
        return []
    window = max(1, math.ceil(len(binned) / CURVE_POINTS))
    chunks = [binned[i : i + window] for i in range(0, len(binned), window)]
    per_group = len(binned[0][1]) // SIGMA_GROUPS
    series = []
    for group in range(SIGMA_GROUPS):
        bounds = range(group * per_group, (group + 1) * per_group)
        points = [(chunk[-1][0], _weighted_mean([bins[b] for _, bins in chunk for b in bounds])) for chunk in chunks]
        seen = [(x, y) for x, y in points if y is not None]
        name = f"{group / SIGMA_GROUPS:.1f}–{(group + 1) / SIGMA_GROUPS:.1f}"
        if seen:
            series.append(Series(name, [x for x, _ in seen], [y for _, y in seen], f"{modality} level{group}"))
    return series


def _weighted_mean(counts_and_means: Sequence[Sequence[float]]) -> float | None:
    pairs = [(count, mean) for count, mean in counts_and_means if count]
    return sum(c * m for c, m in pairs) / sum(c for c, _ in pairs) if pairs else None


def _plain_line(lines: Sequence[dict[str, Any]], key: str) -> list[Series]:
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    return [Series(key, [x for x, _ in points], [y for _, y in points], "ink")] if points else []


def _time_lines(lines: Sequence[dict[str, Any]]) -> list[Series]:
    names = {"step_seconds": ("whole step", "ink"), "data_seconds": ("waiting for data", "audio")}
    found = [(one, *names[key]) for key in names for one in _plain_line(lines, key)]
    return [Series(name, one.x, one.y, style) for one, name, style in found]


# -- samples -----------------------------------------------------------------------------------------------------------


def _samples(run: RunRecord, media: Media, marks: Sequence[StepMark]) -> dict[str, Any] | None:
    """Cards of the newest step's shown clips, sync figures and the contact sheet."""
    if not run.sampled:
        return None
    newest = run.sampled[-1]
    found = newest.found
    cards = [card(clip, newest, media) for clip in newest.shown]
    return {
        **{key: found.get(key) for key in ("step", "weights", "profile", "count")},
        "clips": cards,
        "sync": _sync(found.get("sync")),
        "sync_chart": sync_chart(run, marks),
        "sheet": media.picture(newest.directory / found["sheet"]) if found.get("sheet") else None,
    }


def card(clip: dict[str, Any], sampled: Sampled, media: Media) -> dict[str, Any]:
    """A sampled clip and the real one, drawn to one scale."""
    sides = {name: clip[name] for name in ("sampled", "real") if clip.get(name)}
    loudest = max(QUIET, *(peak for side in sides.values() for peak in side.get("peaks", [])), 0.0)
    shown = [_side(side, name, sampled, media, loudest) for name, side in sides.items() if side.get("media")]
    return {"caption": clip["caption"], "seed": clip.get("seed"), "sides": shown}


def _side(side: dict[str, Any], title: str, sampled: Sampled, media: Media, loudest: float) -> dict[str, Any]:
    events = (("impacts", "impact"), ("onsets", "onset"))
    marks = [Mark(time, style) for name, style in events for time in side.get(name) or []]
    film = media.embed(sampled.directory / side["media"])
    pictures = {
        name: media.picture(sampled.directory / side[name]) if side.get(name) else None for name in ("strip", "mel")
    }
    return {
        "title": title,
        "film": film,
        "waveform": waveform(side["peaks"], side["seconds"], marks, loudest) if side.get("peaks") else "",
        "seconds": side["seconds"],
        **pictures,
    }


def _sync(sync: dict[str, Any] | None) -> dict[str, Any] | None:
    if not sync:
        return None
    sampled, real = sync["sampled"], sync["real"]
    rows = [
        ("sampled", sampled["f1"], sampled.get("low"), sampled.get("high"), "ink"),
        ("chance", sampled["chance"], None, None, "before"),
        ("real, through the codec", real["f1"], real.get("low"), real.get("high"), "before"),
    ]
    told = {name: {key: figure(side[key]) for key in ("f1", "chance")} for name, side in sync.items()}
    table = [{"name": name, "of": number_of(sync[name]), **sync[name], **told[name]} for name in ("sampled", "real")]
    return {
        "svg": bars([row for row in rows if row[1] is not None]),
        "rows": table,
        "tolerance_ms": sampled["tolerance_ms"],
    }

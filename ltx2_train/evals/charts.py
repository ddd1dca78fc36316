"""Line charts, bars and waveforms as inline SVG, coloured by the page they stand in: light and dark alike."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 34


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart. `style` is its CSS class; `low` and `high` draw a band; a `faint` one has no legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment on a time axis: an impact that was seen, an onset that was heard."""

    seconds: float
    style: str


@dataclass(frozen=True, slots=True)
class StepMark:
    """Something that happened at a place of the x axis. `style` is its CSS class, `text` what the pointer is told."""

    x: float
    style: str
    text: str


@dataclass(frozen=True, slots=True)
class Level:
    """A dashed line over the whole width: what the other lines are held against."""

    name: str
    y: float
    style: str


@dataclass(slots=True)
class _Axes:
    """Maps data to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: list[float] = field(default_factory=list)
    y_ticks: list[float] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = True,
    levels: Sequence[Level] = (),
    marks: Sequence[StepMark] = (),
) -> str:
    """An SVG with axes, one line per series and, read by the page's script, the values under the pointer.

    Points that are not finite interrupt a line. Marks outside the range of x are left out. No data at all gives an empty
    string.
    """
    drawn = [s for s in series if any(map(math.isfinite, s.y))]
    if not drawn:
        return ""
    axes = _axes(drawn, from_zero, [level.y for level in levels])
    label = escape(f"{y_label} against {x_label}")
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" {_hover_data(drawn, axes)}>'
    ]
    parts += _grid(axes, x_label, y_label)
    parts += [_step_mark(mark, axes) for mark in marks if axes.x_range[0] <= mark.x <= axes.x_range[1]]
    parts += [_level(level, axes) for level in levels]
    for one in drawn:
        parts += [_band(one, axes)] if len(one.low) else []
        parts += [f'<polyline class="line {one.style}" points="{points}"/>' for points in _runs(one.x, one.y, axes)]
        parts += _dots(one, axes) if len(one.x) <= 12 and not one.faint else []
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>')
    return "".join(parts) + _legend([s for s in drawn if not s.faint], levels)


def bars(rows: Sequence[tuple[str, float, float | None, float | None, str]], *, maximum: float = 1.0) -> str:
    """Horizontal bars: (label, value, low, high, style) each; low and high, where given, draw the interval."""
    line, start, end = 34, 190, WIDTH - 60
    scale = (end - start) / maximum
    parts = [f'<svg class="chart bars" viewBox="0 0 {WIDTH} {line * len(rows) + 4}" role="img" aria-label="bars">']
    for i, (label, value, low, high, style) in enumerate(rows):
        y, width = line * i + 10, max(value, 0) * scale
        parts.append(f'<text class="bar-label" x="{start - 12}" y="{y + 10}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="track" x="{start}" y="{y}" width="{end - start}" height="12" rx="3"/>')
        parts.append(f'<rect class="fill {style}" x="{start}" y="{y}" width="{width:.1f}" height="12" rx="3"/>')
        if low is not None and high is not None:
            ends = f"M{start + low * scale:.1f} {y + 17}H{start + high * scale:.1f}"
            parts.append(f'<path class="whisker" d="{ends}"/>')
        parts.append(f'<text class="bar-value" x="{end + 10}" y="{y + 10}">{value:.2f}</text>')
    return "".join(parts) + "</svg>"


def waveform(peaks: Sequence[float], seconds: float, marks: Sequence[Mark], loudest: float = 1.0) -> str:
    """A mirrored outline of `peaks` (evenly spaced over `seconds`) with vertical marks; stretches to its box.

    `loudest` fills the height; what is louder is cut.
    """
    n, heights = max(len(peaks), 2), [19 * min(peak / loudest, 1.0) for peak in peaks]
    upper = [f"{100 * i / (n - 1):.2f},{20 - height:.2f}" for i, height in enumerate(heights)]
    lower = [f"{100 * i / (n - 1):.2f},{20 + height:.2f}" for i, height in enumerate(heights)]
    parts = ['<svg class="wave" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label="waveform">']
    parts.append(f'<polygon class="outline" points="{" ".join(upper + lower[::-1])}"/>')
    parts += [_mark(mark, seconds) for mark in marks]
    return "".join(parts) + "</svg>"


def _mark(mark: Mark, seconds: float) -> str:
    x = 100 * mark.seconds / seconds if seconds > 0 else 0.0
    y1, y2 = (0, 14) if mark.style == "impact" else (26, 40)
    return f'<line class="mark {mark.style}" x1="{x:.2f}" x2="{x:.2f}" y1="{y1}" y2="{y2}"/>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A figure short enough for an axis or a tile: 12,3k / 0.512 / 1.2e-5."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "–"
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            scale = 1e3 if suffix == "k" else bound
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _axes(series: Sequence[Series], from_zero: bool, levels: Sequence[float]) -> _Axes:
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in (*s.y, *s.low, *s.high, *levels) if math.isfinite(y)]
    low, high = min(xs), max(xs)
    bottom, top = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
    top = top if top > bottom else bottom + 1.0
    y_ticks = ticks(bottom, top + (top - bottom) * 0.08, 4)
    axes = _Axes(
        (low, high if high > low else low + 1.0),
        (bottom, max(top + 0.02 * (top - bottom), y_ticks[-1])),
        y_ticks=y_ticks,
    )
    axes.x_ticks = ticks(*axes.x_range, 6)
    return axes


def _grid(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in axes.y_ticks:
        y = axes.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in axes.x_ticks:
        parts.append(f'<text x="{axes.x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="axis-label" x="{right}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="axis-label" x="{LEFT + 4}" y="{TOP + 2}">{escape(y_label)}</text>')
    return parts


def _runs(x: Sequence[float], y: Sequence[float], axes: _Axes) -> list[str]:
    """The points of each unbroken stretch of finite values."""
    runs: list[list[str]] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            runs[-1].append(f"{axes.x(a):.1f},{axes.y(b):.1f}")
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]


def _band(one: Series, axes: _Axes) -> str:
    upper = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(one.x, one.high, strict=True)]
    lower = [f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(one.x, one.low, strict=True)]
    return f'<polygon class="band {one.style}" points="{" ".join(upper + lower[::-1])}"/>'


def _dots(one: Series, axes: _Axes) -> list[str]:
    pairs = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
    return [f'<circle class="dot {one.style}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3"/>' for x, y in pairs]


def _step_mark(mark: StepMark, axes: _Axes) -> str:
    """A thin line with a wide one over it that takes the pointer."""
    x = f"{axes.x(mark.x):.1f}"
    lines = (f'<line class="{kind}" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for kind in ("thin", "wide"))
    return f'<g class="event {mark.style}"><title>{escape(mark.text)}</title>{"".join(lines)}</g>'


def _level(level: Level, axes: _Axes) -> str:
    y = f"{axes.y(level.y):.1f}"
    return f'<line class="level {level.style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'


def _legend(named: Sequence[Series], levels: Sequence[Level]) -> str:
    if len(named) + len(levels) < 2:
        return ""
    entries = [f'<span class="key {s.style}"><i></i>{escape(s.name)}</span>' for s in named]
    entries += [f'<span class="key dashed {s.style}"><i></i>{escape(s.name)}</span>' for s in levels]
    return f'<div class="legend">{"".join(entries)}</div>'


def _hover_data(series: Sequence[Series], axes: _Axes) -> str:
    named = [s for s in series if not s.faint]
    lines = [{"name": s.name, "style": s.style, "x": list(s.x), "y": [number(y) for y in s.y]} for s in named]
    data = {"left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "range": axes.x_range, "lines": lines}
    return f"data-chart='{escape(json.dumps(data, separators=(',', ':')))}'"

"""The page of the bounce proof: its tables, the curves as SVG, the sampled clips as strips of frames over their sound."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.codecs.mel import LogMel
from ltx2_train.media.video import to_frames
from ltx2_train.media.write import write_mp4, write_png

Pixels = NDArray[np.uint8]

STRIP_FRAMES = 10
SEEN, HEARD = (255, 214, 64), (64, 220, 255)  # ticks: impacts, onsets
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # silent to loud
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 280, 56, 130, 14, 40
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099")
ROWS = {
    "joint": "picture and sound generated together",
    "chance": "the same pictures with the sounds of other clips",
    "no_av_attention": "trained without attention between the streams",
    "a2v": "picture generated for real sound",
    "v2a": "sound generated for a real picture",
}


def write_strip(
    path: Path, film: Tensor, waveform: Tensor, fps: float, seen: Sequence[float], heard: Sequence[float]
) -> None:
    """Frames of a clip (3, F, H, W) over the log-mel of its sound (2, N), left to right in time, with ticks between."""
    places = np.round((np.arange(STRIP_FRAMES) + 0.5) / STRIP_FRAMES * film.shape[1] - 0.5).astype(int)
    frames = np.concatenate(list(to_frames(film[:, places])), axis=1)
    width, seconds = frames.shape[1], film.shape[1] / fps
    ticks = np.full((10, width, 3), 16, dtype=np.uint8)
    for times, rows, colour in ((seen, slice(0, 5), SEEN), (heard, slice(5, 10), HEARD)):
        for time in times:
            at = min(int(time / seconds * width), width - 2)
            ticks[rows, at : at + 2] = colour
    write_png(path, np.concatenate([frames, ticks, _mel_picture(waveform, width)], axis=0))


def write_film(path: Path, film: Tensor, waveform: Tensor, fps: float, sample_rate: int) -> None:
    """The clip itself, (3, F, H, W) with (2, N), four times as large so that players show its pixels."""
    large = film.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    write_mp4(path, large, fps, waveform, sample_rate)


def _mel_picture(waveform: Tensor, width: int) -> Pixels:
    """(32, width, 3): the log-mel, low tones below, stretched to `width`."""
    mel = LogMel(floor=1e-2)(waveform, LogMel(floor=1e-2).sample_rate).mean(dim=0).T.flip(0).numpy()
    shade = (mel - mel.min()) / max(mel.max() - mel.min(), 1.0)
    columns = (np.arange(width) / width * shade.shape[1]).astype(int)
    shade = shade.reshape(32, -1, shade.shape[1]).mean(axis=1)[:, columns]
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shade, stops, [colour[i] for colour in HEAT]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


Line = tuple[str, Sequence[float], Sequence[float]]  # name, x, y


def chart(lines: Sequence[Line], x_label: str, y_label: str, y_top: float | None = None) -> str:
    """A line chart from zero as a stand-alone SVG."""
    x_low, x_high = min(min(x) for _, x, _ in lines), max(max(x) for _, x, _ in lines)
    top = y_top or max(max(y) for _, _, y in lines)

    def place(x: float, y: float) -> str:
        across = (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)
        return f"{LEFT + across:.1f},{HEIGHT - BOTTOM - min(y / top, 1) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for i in range(5):
        value, (_, y) = top * i / 4, place(x_low, top * i / 4).split(",")
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in (x_low, (x_low + x_high) / 2, x_high):
        x, _ = place(value, 0).split(",")
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for i, (name, xs, ys) in enumerate(lines):
        points = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[i]}" stroke-width="1.5"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{TOP + 16 + 18 * i}" fill="{COLOURS[i]}">{name}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">{x_label}; {y_label}</text></svg>')
    return "\n".join(parts) + "\n"


def write(directory: Path, figures: dict[str, Any], strips: dict[str, list[Path]]) -> None:
    """bounce.md in `directory` and its pictures in the folder bounce beside it."""
    pictures = directory / "bounce"
    pictures.mkdir(parents=True, exist_ok=True)
    for group, paths in strips.items():
        for i, path in enumerate(paths):
            for one in (path, path.with_suffix(".mp4")):
                if one.exists():
                    shutil.copyfile(one, pictures / f"{group}-{i}{one.suffix}")
    (pictures / "loss.svg").write_text(_loss_chart(figures["training"]))
    (pictures / "guidance.svg").write_text(_guidance_chart(figures["modality_guidance"]))
    text = "\n".join(
        [
            *_opening(figures),
            *_events(figures),
            *_guidance(figures),
            *_training(figures),
            *_strips(strips),
        ]
    )
    (directory / "bounce.md").write_text(text + "\n")


def _loss_chart(training: dict[str, Any]) -> str:
    names = {"joint": "with exchange", "no_av_attention": "without"}
    lines = []
    for run, name in names.items():
        for stream in ("video", "audio"):
            rows = [row for row in training[run]["losses"] if row[stream] is not None]
            steps, values = [r["step"] for r in rows], [r[stream] for r in rows]
            width = max(1, len(values) // 60)
            starts = range(0, len(values) - width + 1, width)
            smooth = [sum(values[i : i + width]) / width for i in starts]
            lines.append((f"{stream}, {name}", [steps[i + width - 1] for i in starts], smooth))
    return chart(lines, "step", "training loss")


def _guidance_chart(curve: list[dict[str, Any]]) -> str:
    scales = [row["scale"] for row in curve]
    lines = [("onset F1", scales, [row["mean"] for row in curve]), ("chance", scales, [row["chance"] for row in curve])]
    return chart(lines, "modality guidance", "F1 within 50 ms", 1.0)


def _cell(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _opening(figures: dict[str, Any]) -> list[str]:
    clips, seeds = figures["num_clips"], figures["seeds"]
    seen, unseen = figures["captions"]["train"], figures["captions"]["heldout"]
    lines = [
        "# The click falls on the impact",
        "",
        "A small audio-video model of the published architecture, trained from scratch on clips of a bouncing ball.",
        "Every impact clicks; no caption tells when. Whether the clicks of *generated* clips fall on their impacts shows",
        "whether the streams listen to each other. All of it, from nothing: `make proof-bounce`.",
        "",
        f"Onset F1 within {figures['tolerance_ms']} ms: impacts are upward turns of the tracked ball, clicks are peaks of",
        f"onset strength, matched one to one. {clips} held-out clips give captions, sounds and pictures; {seeds} sampling",
        "seeds each, one training seed, no guidance. Intervals of 95 %, from drawing these clips anew; for chance the range",
        f"of 95 % of the shuffles. Of the world's {len(unseen) + len(seen)} captions {len(unseen)} are held out with",
        "all their clips: training never sees these prompts.",
        "",
        f"Written by `{figures['command']}` at commit {' and '.join(figures['commits'])}.",
        "",
        "| | F1 within 50 ms | within 80 ms |",
        "|---|---|---|",
    ]
    wide = figures["onset_f1_80_ms"]
    lines += [f"| {words} | {_cell(figures['onset_f1'][name])} | {_cell(wide[name])} |" for name, words in ROWS.items()]
    return [*lines, f"| real held-out clips through the codec | {_cell(figures['real'])} | |", ""]


def _events(figures: dict[str, Any]) -> list[str]:
    lines = [
        "A model that shows no balls has few events and a low F1 by chance alone, so the events are counted beside it.",
        "",
        "| | clips | impacts | onsets | matched | mean error | shuffled F1 of the same clips |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures["events"].items():
        error = "" if row["mean_error_ms"] is None else f"{row['mean_error_ms']} ms"
        counts = " | ".join(str(row[key]) for key in ("clips", "impacts", "onsets", "matched"))
        lines.append(f"| {name} | {counts} | {error} | {_cell(figures['chance_of'][name])} |")
    return [*lines, ""]


def _guidance(figures: dict[str, Any]) -> list[str]:
    lines = [
        "## Modality guidance",
        "",
        "Both streams guided away from the prediction without the exchange; 1 is off.",
        "",
        "| scale | clips | F1 within 50 ms | shuffled | impacts per clip | onsets per clip |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["modality_guidance"]:
        each = " | ".join(f"{row[name] / row['clips']:.2f}" for name in ("impacts", "onsets"))
        lines.append(f"| {row['scale']:g} | {row['clips']} | {_cell(row)} | {row['chance']:.3f} | {each} |")
    return [*lines, "", "![F1 against modality guidance](bounce/guidance.svg)", ""]


def _training(figures: dict[str, Any]) -> list[str]:
    minutes = ", ".join(f"{stage} {value:g}" for stage, value in figures["minutes"].items())
    steps = figures["training"]["joint"]["steps"]
    taken = ", ".join(f"{name} {run['minutes']:g}" for name, run in figures["training"].items())
    return [
        "## Training",
        "",
        f"{steps} steps each, one core each. Minutes that the steps took: {taken}; that a stage took, from (its last)",
        f"start to end: {minutes}.",
        "",
        "![training losses](bounce/loss.svg)",
        "",
    ]


def _strips(strips: dict[str, list[Path]]) -> list[str]:
    lines = [
        "## Clips",
        "",
        "Ten frames over the sound, time from left to right; between them the impacts that were seen (yellow) and the",
        "clicks that were heard (blue). The first held-out captions, not chosen; each opens with sound.",
        "",
    ]
    for group, paths in strips.items():
        lines += [f"{ROWS.get(group, 'real held-out clips through the codec')}:", ""]
        shown = [i for i, path in enumerate(paths) if path.exists()]
        lines += [f"[![{group} {i}](bounce/{group}-{i}.png)](bounce/{group}-{i}.mp4)" for i in shown] + [""]
    return lines

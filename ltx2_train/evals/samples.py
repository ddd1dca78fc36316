"""Clips sampled from held-out captions, beside the real ones: for eye and ear, and to measure sync."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.codecs.audio import AudioCodec
from ltx2_train.codecs.video import VideoCodec
from ltx2_train.data.datasets import LatentDataset
from ltx2_train.diffusion.generate import Generated, Request, generate
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.distributed.world import agreed
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.evals.files import write_json
from ltx2_train.evals.heldout import WorldLike, by_bucket, share, spread
from ltx2_train.evals.sync import TOLERANCE, compare, impacts, match, waveform_onsets
from ltx2_train.geometry import SPACE_SCALE, pixel_frames
from ltx2_train.media.video import to_frames
from ltx2_train.media.write import write_mp4, write_png
from ltx2_train.record import Sample, TextFeatures

STRIP_FRAMES = 8
THUMBNAIL = 64  # pixels, the height of a frame in strips and on the contact sheet
SHEET_COLUMNS = 2
SHEET_CLIPS = 64
GAP = 4  # pixels between clips of the contact sheet
HEAT = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))  # dark to bright
PEAKS = 240  # points of a drawn waveform
RESAMPLINGS = 1000  # of the bootstrap over clips

Pixels = NDArray[np.uint8]


@dataclass(kw_only=True, slots=True)
class SamplesConfig:
    """How many clips are sampled, and what is kept of them."""

    clips: int = 16
    """Held-out captions to sample, spread evenly over the split."""
    shown: int = 4
    """How many of them become mp4 files, beside the real clip."""
    batch_size: int = 16
    """Clips sampled together."""
    seed: int = 0
    """Seed of the first clip's noise; the next ones count up."""

    def __post_init__(self) -> None:
        for name, least in (("clips", 1), ("shown", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"evaluation.samples.{name}={getattr(self, name)}: must be >= {least}")


@dataclass(frozen=True, slots=True)
class Film:
    """A decoded clip: `video` (3, F, H, W) in [-1, 1], `waveform` (2, N) in [-1, 1], either of them None."""

    video: Tensor | None
    waveform: Tensor | None
    fps: float
    sample_rate: int

    @property
    def seconds(self) -> float:
        if self.video is not None:
            return self.video.shape[1] / self.fps
        return self.waveform.shape[1] / self.sample_rate if self.waveform is not None else 0.0


@dataclass(frozen=True, slots=True)
class Codecs:
    """Latents to what can be seen and heard."""

    video: VideoCodec
    audio: AudioCodec
    tile: tuple[int, int] | None = None
    """(size, overlap) in pixels of pieces that the picture is decoded in, for a video codec that can."""

    @torch.no_grad()
    def decode(self, video: Tensor | None, audio: Tensor | None, fps: float) -> Film:
        """The film of one clip's latents (128, F, H, W) and (8, T, 16)."""
        pieces: dict[str, Any] = {} if self.tile is None else {"tile": self.tile}
        return Film(
            video=None if video is None else self.video.decode(video[None], **pieces)[0].clamp(-1, 1).cpu(),
            waveform=None if audio is None else self.audio.decode(audio[None])[0].clamp(-1, 1).cpu(),
            fps=fps,
            sample_rate=self.audio.sample_rate,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the model is asked: the profile stored with it, the null context, what it is fed."""

    profile: SamplerProfile
    negative: TextFeatures
    keyframe_marker: bool = True
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class _Task:
    """What a rank samples in one turn. `counted`: False where it only keeps the other ranks company."""

    indices: list[int]
    references: list[Sample]
    requests: list[Request]
    counted: bool


_Clips = dict[int, tuple[dict[str, Any], Pixels | None]]  # entries of samples.json and strips, by sample


class Samples:
    """Samples a model on held-out captions. All ranks call it together, and all sample the same number of batches.

    Clips that have both modalities and move are taken where there are any, so that sound and picture can be compared.
    """

    def __init__(
        self, dataset: LatentDataset, sampling: Sampling, codecs: Codecs, config: SamplesConfig, world: WorldLike
    ) -> None:
        self.dataset, self.sampling, self.codecs, self.config, self.world = dataset, sampling, codecs, config, world
        candidates = _talking_clips(dataset)
        chosen = spread(len(candidates), config.clips, dataset.location)
        self.indices = [candidates[i] for i in chosen]
        self.groups = by_bucket(self.indices, dataset.index.bucket, config.batch_size)

    def run(self, model: Callable[..., Any], directory: Path, *, step: int, weights: str) -> dict[str, Any]:
        """Sample, decode, measure and write everything into `directory`; the contents of its samples.json.

        Only the model runs in all ranks together, so only the model stands between reading and the rest: what fails in
        those is raised on all ranks.
        """
        tasks = agreed(self.world, self._read)
        latents = [self._sample(model, task.requests) for task in tasks]
        found = agreed(self.world, lambda: self._clips(tasks, latents, directory))
        everyone = {i: clip for part in self.world.gather_objects(found) for i, clip in part.items()}
        clips = [everyone[index][0] for index in self.indices]
        summary = {"step": step, "weights": weights, "profile": self.sampling.profile.name, "count": len(clips)}
        summary |= {"clips": clips, "sync": sync_figures(clips), "sheet": None}

        def write() -> None:
            if self.world.rank == 0:
                summary["sheet"] = _write_sheet(directory, [everyone[index][1] for index in self.indices])
                write_json(directory / "samples.json", summary)

        agreed(self.world, write)
        return summary

    def _read(self) -> list["_Task"]:
        """This rank's tasks, one per turn."""
        tasks = []
        for group, counted in share(self.groups, self.world):
            references = [self.dataset.read(index) for index in group]
            requests = [
                request_like(r, self.sampling.negative, self._seed(i)) for i, r in zip(group, references, strict=True)
            ]
            tasks.append(_Task(group, references, requests, counted))
        return tasks

    def _sample(self, model: Callable[..., Any], requests: Sequence[Request]) -> Generated:
        return generate(
            model,
            requests,
            self.sampling.profile,
            device=self.world.device,
            dtype=self.sampling.dtype,
            keyframe_marker=self.sampling.keyframe_marker,
        )

    def _clips(self, tasks: Sequence["_Task"], latents: Sequence[Generated], directory: Path) -> "_Clips":
        found: _Clips = {}
        for task, generated in zip(tasks, latents, strict=True):
            if not task.counted:
                continue
            for row, (index, reference) in enumerate(zip(task.indices, task.references, strict=True)):
                video, audio = (x[row] if x is not None else None for x in (generated.video, generated.audio))
                film = self.codecs.decode(video, audio, reference.fps)
                found[index] = self._clip(index, reference, film, directory)
        return found

    def _seed(self, index: int) -> int:
        return self.config.seed + self.indices.index(index)

    def _clip(self, index: int, reference: Sample, film: Film, directory: Path) -> tuple[dict[str, Any], Pixels | None]:
        """The clip's entry in samples.json, and its strip for the contact sheet. Writes media if it is shown."""
        place = self.indices.index(index)
        real = self.codecs.decode(reference.video, reference.audio, reference.fps)
        entry: dict[str, Any] = {"key": reference.key, "caption": reference.caption, "seed": self._seed(index)}
        for name, one in (("sampled", film), ("real", real)):
            entry[name] = events(one) | {"seconds": one.seconds}
            if place < self.config.shown:
                entry[name] |= write_film(one, directory, f"{place:03d}-{name}")
        return entry, strip(film.video) if film.video is not None else None


def _talking_clips(dataset: LatentDataset) -> list[int]:
    """Numbers of the samples with moving picture and sound; all samples where there are none."""
    buckets = dataset.index.buckets
    talking = {i for i, bucket in enumerate(buckets) if bucket.frames > 1 and bucket.audio_steps > 0}
    chosen = [i for i in range(len(dataset)) if int(dataset.index.bucket_ids[i]) in talking]
    return chosen or list(range(len(dataset)))


def request_like(reference: Sample, negative: TextFeatures, seed: int) -> Request:
    """A request for the reference's caption at the reference's size. Raises `DataError` for sound without picture."""
    bucket = reference.bucket
    if not bucket.frames:
        raise DataError(f"{reference.key} has no picture; samples are asked for at the size of clips that have one")
    return Request(
        text=reference.text,
        negative=negative,
        frames=pixel_frames(bucket.frames),
        height=bucket.height * SPACE_SCALE,
        width=bucket.width * SPACE_SCALE,
        fps=reference.fps,
        seed=seed,
        has_audio=bucket.audio_steps > 0,
    )


def samples_directory(directory: Path, step: int) -> Path:
    """Where a run directory keeps the samples of a step."""
    return directory / "evals" / f"samples-{step:08d}"


def samples_evaluator(
    samples: Samples, directory: Path, *, weights: str = "ema"
) -> Callable[[Callable[..., Any], int], dict[str, Any]]:
    """For the trainer: samples into `evals/samples-STEP/` and gives the event's figures."""

    def evaluate(model: Callable[..., Any], step: int) -> dict[str, Any]:
        summary = samples.run(model, samples_directory(directory, step), step=step, weights=weights)
        sync = (summary["sync"] or {}).get("sampled", {})
        return {"weights": weights, "count": summary["count"], "onset_f1": sync.get("f1"), "chance": sync.get("chance")}

    return evaluate


# -- sound and picture -------------------------------------------------------------------------------------------------


def events(film: Film) -> dict[str, list[float]]:
    """Times (s) of impacts seen and onsets heard; only what the film has."""
    found = {}
    if film.video is not None and film.video.shape[1] > 1:
        found["impacts"] = [round(t, 4) for t in impacts(film.video, film.fps)]
    if film.waveform is not None:
        found["onsets"] = [round(t, 4) for t in waveform_onsets(film.waveform, film.sample_rate)]
    return found


def sync_figures(clips: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Onset F1, chance, counts and a bootstrap interval, of the sampled and of the real clips; None without sound."""
    figures = {name: _figures([clip[name] for clip in clips]) for name in ("sampled", "real")}
    return figures if all(figures.values()) else None  # type: ignore[return-value]


def _figures(sides: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    pairs = [(side["impacts"], side["onsets"]) for side in sides if "impacts" in side and "onsets" in side]
    if not pairs:
        return None
    result = compare([seen for seen, _ in pairs], [heard for _, heard in pairs])
    low, high = _bootstrap(pairs)
    return {
        "clips": result.num_clips,
        "tolerance_ms": 1000 * result.tolerance,
        "f1": result.f1,
        "low": low,
        "high": high,
        "chance": result.chance,
        "impacts": result.num_impacts,
        "onsets": result.num_onsets,
        "matched": result.num_matched,
        "mean_error_ms": _milliseconds(result.mean_error),
        "offset_ms": _milliseconds(result.offset),
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _bootstrap(pairs: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """95 % interval of the F1, by drawing the clips anew. Each clip brings its matches and its events."""
    counts = np.array([(2 * len(match(a, b, TOLERANCE)), len(a) + len(b)) for a, b in pairs], dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(counts), size=(RESAMPLINGS, len(counts)))
    matched, total = counts[draws].sum(axis=1).T
    low, high = np.quantile(np.divide(matched, total, out=np.zeros_like(matched), where=total > 0), (0.025, 0.975))
    return float(low), float(high)


# -- pictures and files ------------------------------------------------------------------------------------------------


def write_film(film: Film, directory: Path, name: str) -> dict[str, Any]:
    """Write `name`.mp4 and its pictures; file names and drawn peaks, as samples.json keeps them."""
    entry: dict[str, Any] = {}
    if film.video is not None:
        write_mp4(directory / f"{name}.mp4", film.video, film.fps, film.waveform, film.sample_rate)
        write_png(directory / f"{name}-strip.png", strip(film.video))
        entry = {"media": f"{name}.mp4", "strip": f"{name}-strip.png"}
    if film.waveform is not None:
        write_png(directory / f"{name}-mel.png", mel_picture(film.waveform, film.sample_rate))
        entry |= {"mel": f"{name}-mel.png", "peaks": peaks(film.waveform)}
    return entry


def strip(video: Tensor) -> Pixels:
    """(H, W, 3): frames of a clip (3, F, H, W) from left to right, evenly spread in time, at thumbnail height."""
    places = torch.linspace(0, video.shape[1] - 1, min(STRIP_FRAMES, video.shape[1])).round().long()
    frames = video[:, places]
    if frames.shape[2] > THUMBNAIL:
        width = round(frames.shape[3] * THUMBNAIL / frames.shape[2])
        size = (THUMBNAIL, width)
        frames = torch.nn.functional.interpolate(frames.movedim(1, 0), size, mode="area").movedim(0, 1)
    return np.concatenate(list(to_frames(frames)), axis=1)


def mel_picture(waveform: Tensor, sample_rate: int) -> Pixels:
    """(bins, steps, 3): the log-mel spectrogram of (2, N), channels averaged, low tones below."""
    from ltx2_train.codecs.mel import LogMel

    mel = LogMel(floor=1e-2)(waveform, sample_rate).mean(dim=0).T.flip(0)
    shade = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1.0)
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shade.numpy(), stops, [colour[i] for colour in HEAT]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def peaks(waveform: Tensor) -> list[float]:
    """The largest absolute value in each of `PEAKS` equal stretches of (2, N)."""
    loudest = waveform.abs().amax(dim=0)
    return [round(float(part.max()), 3) for part in loudest.tensor_split(min(PEAKS, len(loudest)))]


def _write_sheet(directory: Path, strips: Sequence[Pixels | None]) -> str | None:
    shown = [one for one in strips if one is not None][:SHEET_CLIPS]
    if not shown:
        return None
    write_png(directory / "sheet.png", contact_sheet(shown))
    return "sheet.png"


def contact_sheet(strips: Sequence[Pixels]) -> Pixels:
    """Strips in columns, one clip each, on a dark ground; shorter ones are padded."""
    height, width = (max(one.shape[axis] for one in strips) for axis in (0, 1))
    rows = math.ceil(len(strips) / SHEET_COLUMNS)
    columns = min(SHEET_COLUMNS, len(strips))
    shape = (rows * (height + GAP) - GAP, columns * (width + 2 * GAP) - 2 * GAP, 3)
    sheet = np.full(shape, 24, dtype=np.uint8)
    for i, one in enumerate(strips):
        y, x = i // SHEET_COLUMNS * (height + GAP), i % SHEET_COLUMNS * (width + 2 * GAP)
        sheet[y : y + one.shape[0], x : x + one.shape[1]] = one
    return sheet

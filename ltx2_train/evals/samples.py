"""Clips sampled from held-out captions, beside the real ones: for eye and ear, and to measure sync."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.codecs.audio import AudioCodec
from ltx2_train.codecs.residence import at_work, rest
from ltx2_train.codecs.video import VideoCodec
from ltx2_train.data.datasets import LatentDataset
from ltx2_train.diffusion.generate import Generated, Request, generate
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.distributed.lock import lock_directory
from ltx2_train.distributed.world import agreed
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.evals.estimate import bootstrap
from ltx2_train.evals.film import Film
from ltx2_train.evals.heldout import WorldLike, by_bucket, share, spread
from ltx2_train.evals.identity import clips_identity, digest, dtype_name
from ltx2_train.evals.metrics import Clip, Measured, Settings, build_metrics, check_names, figures, measure, names
from ltx2_train.evals.metrics.metric import share as share_of
from ltx2_train.evals.sync import TOLERANCE, compare, match_counts
from ltx2_train.evals.unfinished import Done, Unfinished
from ltx2_train.geometry import AUDIO_STEPS_PER_SECOND, SPACE_SCALE, pixel_frames
from ltx2_train.media.video import to_frames
from ltx2_train.media.write import write_mp4, write_png, write_wav
from ltx2_train.model.modality import Stream
from ltx2_train.record import Bucket, Sample, TextFeatures

STRIP_FRAMES = 8
THUMBNAIL = 64  # pixels, the height of a frame in strips and on the contact sheet
SHEET_COLUMNS = 2
SHEET_CLIPS = 64
GAP = 4  # pixels between clips of the contact sheet
HEAT = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))  # dark to bright
PEAKS = 240  # points of a drawn waveform
Pixels = NDArray[np.uint8]


@dataclass(kw_only=True, slots=True)
class SamplesConfig:
    """How many clips are sampled, and what is kept of them."""

    clips: int = 16
    """Held-out captions to sample, spread evenly over the split."""
    shown: int = 4
    """How many of them become mp4 files (wav where there is sound alone), beside the real clip."""
    batch_size: int = 16
    """Clips sampled together."""
    seed: int = 0
    """Seed of the first clip's noise; the next ones count up."""
    seeds: int = 1
    """Samples of every caption, each from noise of its own."""
    tolerance_ms: float = 1000 * TOLERANCE
    """Milliseconds within which what is seen and what is heard are one event."""
    metrics: list[str] | None = None
    """Names of the figures that are made of the clips, as docs/evaluation.md lists them. null: all; []: none."""

    def __post_init__(self) -> None:
        for name, least in (("clips", 1), ("shown", 0), ("batch_size", 1), ("seeds", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"evaluation.samples.{name}={getattr(self, name)}: must be >= {least}")
        if not self.tolerance_ms > 0:
            raise ConfigError(f"evaluation.samples.tolerance_ms={self.tolerance_ms}: must be > 0 milliseconds")
        check_names(self.metrics or [])

    @property
    def tolerance(self) -> float:
        """Seconds."""
        return self.tolerance_ms / 1000


@dataclass(frozen=True, slots=True)
class Codecs:
    """Latents to what can be seen and heard."""

    video: VideoCodec
    audio: AudioCodec
    tile: tuple[int, int] | None = None
    """(size, overlap) in pixels of pieces that the picture is decoded in, for a video codec that can."""

    @property
    def movable(self) -> tuple[VideoCodec, AudioCodec]:
        """What goes to a device to work, and leaves it again."""
        return self.video, self.audio

    @torch.no_grad()
    def decode(self, video: Tensor | None, audio: Tensor | None, fps: float) -> Film:
        """The film of one clip's latents (128, F, H, W) and (8, T, 16).

        Raises `DataError` naming the stream that does not come out as finite numbers.
        """
        pieces: dict[str, Any] = {} if self.tile is None else {"tile": self.tile}
        return Film(
            video=None if video is None else _shown("video", self.video.decode(video[None], **pieces)[0]),
            waveform=None if audio is None else _shown("audio", self.audio.decode(audio[None])[0]),
            fps=fps,
            sample_rate=self.audio.sample_rate,
        )


def _shown(name: str, decoded: Tensor) -> Tensor:
    """Pixels or sound in [-1, 1], on the CPU. Clamping would keep NaN, which is shown black and measured as good sound."""
    if not decoded.isfinite().all():
        raise DataError(
            f"the {name} codec gave NaN or infinity. Look whether its weights are whole; if they are, the latents are far "
            "from any that it knows: take other weights of the model, or weaker guidance"
        )
    return decoded.clamp(-1, 1).cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the model is asked: the profile stored with it, the null context, what it is fed, what it was trained to make."""

    profile: SamplerProfile
    negative: TextFeatures
    streams: frozenset[Stream] = frozenset(Stream)
    keyframe_marker: bool = True
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class _Take:
    """One sample to be made: of which of the chosen clips, by which of its seeds."""

    number: int  # of the sample; all clips by their first seed come first
    clip: int
    reference: Sample
    request: Request


class Samples:
    """Samples a model on held-out captions. All ranks call it together, and all sample the same number of batches.

    They are asked for in the streams that the model was trained on, and compared with these of the real clips. Clips that
    have all of them and move are taken where there are any, so that sound and picture can be compared.
    """

    def __init__(
        self, dataset: LatentDataset, sampling: Sampling, codecs: Codecs, config: SamplesConfig, world: WorldLike
    ) -> None:
        self.dataset, self.sampling, self.codecs, self.config, self.world = dataset, sampling, codecs, config, world
        rest(*codecs.movable)  # until there is something to decode, the room is the model's
        self.indices = _chosen_clips(dataset, config.clips, sampling.streams)
        chosen_metrics = names() if config.metrics is None else config.metrics
        self.metrics = build_metrics(chosen_metrics, Settings(config.tolerance, world.device))
        self.taken_up = 0  # samples of the last run that an earlier one, broken off, had made

    def run(
        self,
        model: Callable[..., Any],
        directory: Path,
        *,
        step: int,
        weights: str,
        origin: Mapping[str, Any] | None = None,
        told: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Sample, decode, measure and write everything into `directory`; the contents of its samples.json.

        That file is written last and holds all of it or is not there. `origin` tells what the weights are, by their
        content: then samples that the same weights and settings had made when a run was broken off are not made again.
        `told`: what samples.json says beside the figures.
        Only the model runs in all ranks together, so only the model stands between reading and the rest: what fails in
        those is raised on all ranks. Raises `ConfigError` on all of them while another process writes there.
        """
        taken = (
            f"{directory}: another evaluation is writing there ({{holder}}). Wait for its end or stop it, or name another "
            "directory (--out)"
        )
        with lock_directory(directory, self.world, taken):
            unfinished = Unfinished(directory, self._settings(step, weights, origin))
            done = self._run(model, unfinished, anew=origin is None)
            summary = {**told, **self._summary([done[number] for number in sorted(done)], step, weights)}
            agreed(self.world, lambda: self._write(summary, done, unfinished) if self.world.rank == 0 else None)
            return summary

    def _run(self, model: Callable[..., Any], unfinished: Unfinished, *, anew: bool) -> dict[int, Done]:
        """All samples. Those that are done are not finished again, but sampled beside others of their group that are not."""
        done = self._done(unfinished, anew=anew)
        self.taken_up = len(done)
        mine: dict[int, Done] = {}
        for group, counted in self._turns(done):
            takes = agreed(self.world, partial(self._read, group))
            generated = self._sample(model, [take.request for take in takes])
            missing = {take.number for take in takes if counted and take.number not in done}
            mine |= agreed(self.world, partial(self._finish, takes, missing, generated, unfinished))
        return done | {number: one for part in self.world.gather_objects(mine) for number, one in part.items()}

    def _done(self, unfinished: Unfinished, *, anew: bool) -> dict[int, Done]:
        """What the first rank finds done."""
        found = agreed(self.world, lambda: unfinished.open(anew=anew) if self.world.rank == 0 else {})
        return dict(self.world.gather_objects(found)[0])

    def _settings(self, step: int, weights: str, origin: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a sample follows from."""
        sampling, manifest = self.sampling, self.dataset.manifest
        return {
            "weights": [origin, step, weights],
            "sampling": [
                sampling.profile.to_dict(),
                sampling.keyframe_marker,
                str(sampling.dtype),
                sorted(sampling.streams),
            ],
            "data": [self.dataset.location, manifest.shards, self.indices],
            "codecs": [self.codecs.video.name, self.codecs.audio.name, self.codecs.tile],
            "config": asdict(self.config),
            "metrics": [[metric.name, metric.unit] for metric in self.metrics],
        }

    def _turns(self, done: Container[int]) -> list[tuple[list[int], bool]]:
        """The samples of this rank turn by turn, and whether they count: groups of which some are not `done`.

        Groups are cut without regard to what is done: the bits of a sample depend on what is computed beside it.
        In a turn all ranks run the same modules at every step, or the ranks of a sharded model would wait for each other:
        clips of the same streams, and of the same size where the profile's passes of guidance follow from it.
        """
        alike: dict[tuple[bool, bool, int], list[list[int]]] = {}
        for group in by_bucket(range(len(self.indices) * self.config.seeds), self._bucket, self.config.batch_size):
            if all(number in done for number in group):
                continue
            bucket = self._bucket(group[0])
            tokens = bucket.schedule_tokens if self.sampling.profile.passes_follow_tokens else 0
            alike.setdefault((bucket.frames > 0, bucket.audio_steps > 0, tokens), []).append(group)
        return [turn for groups in alike.values() for turn in share(groups, self.world)]

    def _bucket(self, number: int) -> Bucket:
        bucket = self.dataset.index.bucket(self.indices[number % len(self.indices)])
        return _bucket_of(bucket, self.sampling.streams)

    def _read(self, numbers: Sequence[int]) -> list[_Take]:
        takes = []
        for number in numbers:
            clip = number % len(self.indices)
            reference = self.dataset.read(self.indices[clip])
            request = request_like(reference, self.sampling.negative, self.config.seed + number, self.sampling.streams)
            takes.append(_Take(number, clip, reference, request))
        return takes

    def _sample(self, model: Callable[..., Any], requests: Sequence[Request]) -> Generated:
        return generate(
            model,
            requests,
            self.sampling.profile,
            device=self.world.device,
            dtype=self.sampling.dtype,
            keyframe_marker=self.sampling.keyframe_marker,
        )

    def _finish(
        self, takes: Sequence[_Take], missing: Container[int], generated: Generated, unfinished: Unfinished
    ) -> dict[int, Done]:
        """Decode, measure and keep what is missing of that which was sampled together."""
        done = {}
        rows = [(row, take) for row, take in enumerate(takes) if take.number in missing]
        with at_work(self.world.device, *(self.codecs.movable if rows else ())):
            for row, take in rows:
                video, audio = (x[row].cpu() if x is not None else None for x in (generated.video, generated.audio))
                done[take.number] = self._clip(take, video, audio, unfinished)
                unfinished.keep(take.number, done[take.number])
        return done

    def _clip(self, take: _Take, video: Tensor | None, audio: Tensor | None, unfinished: Unfinished) -> Done:
        """A sample's entry in samples.json, its rows of the metrics, its strip; writes media if it is shown.

        The real clip stands beside the sample of the first seed.
        """
        reference = take.reference
        _check_finite(reference.key, video, audio)
        sides = {"sampled": (video, audio)}
        if take.number == take.clip:
            sides["real"] = (
                reference.video if take.request.has_video else None,
                reference.audio if take.request.has_audio else None,
            )
        entry: dict[str, Any] = {"key": reference.key, "caption": reference.caption, "seed": take.request.seed}
        rows: dict[str, Measured] = {}
        for name, latents in sides.items():
            try:
                film = self.codecs.decode(*latents, reference.fps)
            except DataError as error:
                raise DataError(f"{reference.key}, {name}: {error}") from error
            entry[name] = events(film) | {"seconds": film.seconds}
            rows[name] = measure(self.metrics, Clip(film, *latents))
            if take.number < self.config.shown:
                entry[name] |= write_film(film, unfinished.place, f"{take.number:03d}-{name}")
            if name == "sampled":
                picture = strip(film.video) if film.video is not None else None
        return Done(clip=take.clip, entry=entry, rows=rows, strip=picture)

    def _summary(self, done: Sequence[Done], step: int, weights: str) -> dict[str, Any]:
        """What samples.json holds, but for the sheet."""
        sampled, real = ([one.rows[name] for one in done if name in one.rows] for name in ("sampled", "real"))
        clips, entries = [one.clip for one in done], [one.entry for one in done]
        return {
            "step": step,
            "weights": weights,
            "profile": self.sampling.profile.name,
            "identity": samples_identity(
                self.dataset, self.sampling.profile, self.sampling.streams, self.config, weights, self.sampling.dtype
            ),
            "count": len(done),
            "clips": entries,
            "sync": sync_figures(entries, self.config.tolerance, clips),
            "metrics": figures(self.metrics, sampled, real, clips),
            "sheet": None,
        }

    def _write(self, summary: dict[str, Any], done: Mapping[int, Done], unfinished: Unfinished) -> None:
        summary["sheet"] = _write_sheet(unfinished.place, [done[number].strip for number in sorted(done)])
        unfinished.close("samples.json", summary)


def _check_finite(key: str, video: Tensor | None, audio: Tensor | None) -> None:
    for name, latents in (("video", video), ("audio", audio)):
        if latents is not None and not latents.isfinite().all():
            raise DataError(
                f"{key}: the sampled {name} latents are not finite. Look at the held-out loss of these weights, and "
                "evaluate an earlier checkpoint"
            )


def _talking_clips(dataset: LatentDataset, streams: frozenset[Stream]) -> list[int]:
    """Numbers of the samples with a moving picture and sound, as far as they are among `streams`.

    Where there are none, of all samples that have one of these. Raises `DataError` where there are none of those either.
    """
    buckets = [_bucket_of(bucket, streams) for bucket in dataset.index.buckets]
    usable = {i for i, bucket in enumerate(buckets) if bucket.signature}
    still = {i for i in usable if buckets[i].frames <= 1} if Stream.video in streams else set()
    silent = {i for i in usable if not buckets[i].audio_steps} if Stream.audio in streams else set()
    for wanted in (usable - still - silent, usable):
        if chosen := [i for i in range(len(dataset)) if int(dataset.index.bucket_ids[i]) in wanted]:
            return chosen
    raise DataError(
        f"{dataset.location} holds no samples with {' or '.join(sorted(streams, reverse=True))}, which the model was "
        "trained to make. Name another held-out dataset, or set evaluation.samples=null"
    )


def _bucket_of(bucket: Bucket, streams: frozenset[Stream]) -> Bucket:
    """The latent sizes of the streams that are made."""
    grid = (bucket.frames, bucket.height, bucket.width) if Stream.video in streams else (0, 0, 0)
    return Bucket(*grid, bucket.audio_steps if Stream.audio in streams else 0)


def _chosen_clips(dataset: LatentDataset, wanted: int, streams: frozenset[Stream]) -> list[int]:
    candidates = _talking_clips(dataset, streams)
    return [candidates[i] for i in spread(len(candidates), wanted, dataset.location)]


def samples_identity(
    dataset: LatentDataset,
    profile: SamplerProfile,
    streams: frozenset[Stream],
    config: SamplesConfig,
    weights: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What samples are of, whatever the step. Known before there is a model."""
    return {
        **clips_identity(dataset, _chosen_clips(dataset, config.clips, streams)),
        "streams": sorted(streams),
        "seed": config.seed,
        "seeds": config.seeds,
        "tolerance_ms": config.tolerance_ms,
        "profile": profile.name,
        "profile_settings": digest(profile.to_dict()),
        "weights": weights,
        "dtype": dtype_name(dtype),
    }


def request_like(
    reference: Sample, negative: TextFeatures, seed: int, streams: frozenset[Stream] = frozenset(Stream)
) -> Request:
    """A request for the reference's caption at the reference's size, in those of its streams that are among `streams`.

    Raises `DataError` where it has none of them.
    """
    bucket = _bucket_of(reference.bucket, streams)
    if not bucket.signature:
        raise DataError(f"{reference.key} has no {' or '.join(sorted(streams, reverse=True))} to sample the like of")
    common: dict[str, Any] = {"text": reference.text, "negative": negative, "seed": seed}
    if not bucket.frames:  # sound alone, of as many steps
        return Request(**common, frames=bucket.audio_steps, fps=float(AUDIO_STEPS_PER_SECOND), has_video=False)
    return Request(
        **common,
        frames=pixel_frames(bucket.frames),
        height=bucket.height * SPACE_SCALE,
        width=bucket.width * SPACE_SCALE,
        fps=reference.fps,
        has_audio=bucket.audio_steps > 0,
    )


def samples_directory(directory: Path, step: int) -> Path:
    """Where a run directory keeps the samples of a step."""
    return directory / "evals" / samples_name(step)


def samples_name(step: int) -> str:
    return f"samples-{step:08d}"


def samples_evaluator(
    samples: Samples, directory: Path, *, weights: str = "ema"
) -> Callable[[Callable[..., Any], int], dict[str, Any]]:
    """For the trainer: samples into `evals/samples-STEP/` and gives the event's figures."""

    def evaluate(model: Callable[..., Any], step: int) -> dict[str, Any]:
        place = samples_directory(directory, step)
        return event_figures(samples.run(model, place, step=step, weights=weights), place)

    return evaluate


def event_figures(summary: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """What an event tells of the samples.json in `place`."""
    sync = (summary["sync"] or {}).get("sampled", {})
    values = {name: figure["sampled"]["value"] for name, figure in summary["metrics"].items()}
    onsets = {"onset_f1": sync.get("f1"), "chance": sync.get("chance")}
    told = {"weights": summary["weights"], "count": summary["count"], "directory": str(place)}
    return {**told, **onsets, "metrics": values}


# -- sound and picture -------------------------------------------------------------------------------------------------


def events(film: Film) -> dict[str, list[float]]:
    """Times (s) of impacts seen and onsets heard; only what the film has."""
    found = {}
    if film.moves:
        found["impacts"] = [round(t, 4) for t in film.impacts]
    if film.waveform is not None:
        found["onsets"] = [round(t, 4) for t in film.onsets]
    return found


def sync_figures(
    entries: Sequence[dict[str, Any]], tolerance: float, clips: Sequence[int]
) -> dict[str, dict[str, Any]] | None:
    """Onset F1, chance, counts and a bootstrap interval, of the sampled and of the real clips; None without sound.

    F1 is None where there is no event at all, neither seen nor heard.
    `entries` as in samples.json; `clips`: which clip each is a sample of.
    """
    found = {}
    for name in ("sampled", "real"):
        sides = [(entry[name], clip) for entry, clip in zip(entries, clips, strict=True) if name in entry]
        found[name] = _sync_of([side for side, _ in sides], tolerance, [clip for _, clip in sides])
    return found if all(found.values()) else None  # type: ignore[return-value]


def _sync_of(sides: Sequence[dict[str, Any]], tolerance: float, clips: Sequence[int]) -> dict[str, Any] | None:
    whole = [i for i, side in enumerate(sides) if "impacts" in side and "onsets" in side]
    if not whole:
        return None
    seen, heard = ([sides[i][name] for i in whole] for name in ("impacts", "onsets"))
    numbers = [clips[i] for i in whole]
    result = compare(seen, heard, tolerance, numbers)
    counts = np.array([match_counts(a, b, tolerance) for a, b in zip(seen, heard, strict=True)])
    score = bootstrap(lambda drawn: share_of(counts, drawn), numbers)
    return {
        "clips": len(set(numbers)),
        "samples": result.num_clips,
        "tolerance_ms": 1000 * result.tolerance,
        "f1": result.f1,
        "low": score.low,
        "high": score.high,
        "chance": result.chance,
        "impacts": result.num_impacts,
        "onsets": result.num_onsets,
        "matched": result.num_matched,
        "mean_error_ms": _milliseconds(result.mean_error),
        "offset_ms": _milliseconds(result.offset),
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


# -- pictures and files ------------------------------------------------------------------------------------------------


def write_film(film: Film, directory: Path, name: str) -> dict[str, Any]:
    """Write `name`.mp4, or .wav, and its pictures; file names and drawn peaks, as samples.json keeps them."""
    entry: dict[str, Any] = {}
    if film.video is not None:
        write_mp4(directory / f"{name}.mp4", film.video, film.fps, film.waveform, film.sample_rate)
        write_png(directory / f"{name}-strip.png", strip(film.video))
        entry = {"media": f"{name}.mp4", "strip": f"{name}-strip.png"}
    elif film.waveform is not None:
        write_wav(directory / f"{name}.wav", film.waveform, film.sample_rate)
        entry = {"media": f"{name}.wav"}
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

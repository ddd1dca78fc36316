"""Requests held against the model and the files they name: clips that can be made, and which rank makes which."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.errors import ConfigError, DataError, Ltx2Error
from ltx2_train.evals.receipts import check_free, media_of, read_receipt
from ltx2_train.evals.requests import MEDIA, SIZES, Asked, ClipRequest, OutputFormat
from ltx2_train.geometry import AUDIO_STEPS_PER_SECOND, TIME_SCALE, audio_latent_length, latent_frames, latent_size
from ltx2_train.media.probe import IMAGE_SUFFIXES, MediaInfo, TruncatedError, probe
from ltx2_train.model.modality import Stream
from ltx2_train.record import Bucket

LATENT_STEP = 1 / AUDIO_STEPS_PER_SECOND  # s; less sound than this is not missed
LEAST_STEPS = 2  # of sound: one is less than the window that a spectrogram is made audible with
FILMS = "any film that FFmpeg reads (mp4, mov, mkv, webm, ...)"
TAKEN = {  # what the fields that name files take
    "image": f"{', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}, or the first frame of {FILMS}",
    "audio": "any sound that FFmpeg reads (wav, flac, mp3, m4a, ogg, ...), or that of a film",
    "video": FILMS,
}
RECEIPT_VERSION = 1  # raise when the same request would be made otherwise: everything is made again then


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What requests are held against."""

    identity: Mapping[str, Any]
    """What decides on the clips beside the requests: plain values. Where they change, everything is made again."""
    streams: frozenset[Stream]
    """What the model was trained to make."""
    size: Callable[[], Mapping[str, Any]]
    """Frames, width, height and fps where they are not given. Called only then."""
    profile: Callable[[ClipRequest], SamplerProfile]
    """How a request is sampled. Raises `ConfigError`."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip that can be made: its size and profile are decided, and the files that it names are there."""

    where: str
    request: ClipRequest
    profile: SamplerProfile
    has_video: bool
    has_audio: bool
    digest: str
    """Of all that it follows from."""
    contents: Mapping[str, str]
    """Of the files that it names, by field: digests of what they held when it was planned."""

    @property
    def name(self) -> str:
        return self.request.file_name

    @property
    def bucket(self) -> Bucket:
        return _bucket(self.request, self.has_video, self.has_audio)

    @property
    def frames(self) -> int:
        assert self.request.frames is not None
        return self.request.frames

    @property
    def fps(self) -> float:
        assert self.request.fps is not None
        return self.request.fps

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    @property
    def files(self) -> list[str]:
        """Its media, as they are called in their directory; pictures of their own are numbered in a folder."""
        listed = []
        for kind in self.request.format or ():
            is_folder = kind == OutputFormat.png
            pictures = [f"{self.name}/{place:05d}.png" for place in range(self.frames)]
            listed += pictures if is_folder else [f"{self.name}.{kind}"]
        return listed

    def told(self, directory: Path) -> str:
        """Its media in `directory`, for a message: pictures in a folder of their own as one pattern."""
        kinds = dict.fromkeys(self.request.format or ())
        names = [f"{self.name}/*.png" if kind == OutputFormat.png else f"{self.name}.{kind}" for kind in kinds]
        return ", ".join(str(directory / name) for name in names)


class State(StrEnum):
    """What became of a clip."""

    made = "made"
    there = "there"  # from an earlier time
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one clip that was asked for. `detail`: its files, or the reason why there are none."""

    where: str
    name: str
    state: State
    detail: str


def plan(asked: Sequence[Asked], ground: Ground, directory: Path) -> tuple[list[Clip], list[Outcome]]:
    """The clips to be made, and what is known of the others: those that are there, and those that cannot be made.

    Raises `ConfigError` for a directory that cannot be written.
    """
    _check_directory(directory)
    clips, outcomes = [], []
    for one in asked:
        try:
            clip = _clip(one, ground)
            if read_receipt(directory, clip.name, clip.digest) is not None:
                outcomes.append(Outcome(one.where, clip.name, State.there, clip.told(directory)))
                continue
            check_free(directory, clip.name, clip.files)
            clips.append(clip)
        except (Ltx2Error, OSError) as error:
            outcomes.append(Outcome(one.where, one.request.file_name, State.failed, str(error)))
    eaten = _eaten(clips, directory)
    return [clip for clip in clips if clip.name not in eaten], outcomes + list(eaten.values())


def _check_directory(directory: Path) -> None:
    """Raises where nothing can be written into a directory that may have to be made."""
    found = next((place for place in (directory, *directory.absolute().parents) if os.path.lexists(place)), Path("/"))
    if not found.is_dir():
        raise ConfigError(f"--out {directory}: {found} is no directory. Name another place")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {directory}: {found} cannot be written. Name another place, or allow it")


def _eaten(clips: Sequence[Clip], directory: Path) -> dict[str, Outcome]:
    """The clips whose given files would be written over or removed by a clip to be made, by name."""
    place = directory.resolve()
    written = {place / file: clip for clip in clips for file in (*clip.files, *media_of(directory, clip.name))}
    eaten = {}
    for clip in clips:
        for field in MEDIA:
            path = getattr(clip.request, field)
            if path is not None and (other := written.get(Path(path).resolve())) is not None:
                detail = (
                    f"{field}={path}: a file that this command writes ({other.where}), and it would be lost. "
                    "Give the clip another name, or another --out"
                )
                eaten[clip.name] = Outcome(clip.where, clip.name, State.failed, detail)
    return eaten


def _clip(one: Asked, ground: Ground) -> Clip:
    request = one.request
    has_video, has_audio = _streams(request, ground.streams)
    profile = ground.profile(request)
    request = _sized(request, ground, has_video)
    if has_video and has_audio and request.frames == 1 and not _asks_for_sound(request):
        request, has_audio = replace(request, silent=True), False
    if request.format is None:
        request = replace(request, format=[(OutputFormat.mp4 if has_video else OutputFormat.wav).value])
    _bucket(request, has_video, has_audio)
    contents = {name: _contents(path) for name in MEDIA if (path := getattr(request, name)) is not None}
    digest = _digest(request, profile, ground.identity, contents)
    return Clip(one.where, request, profile, has_video, has_audio, digest, contents)


def _streams(request: ClipRequest, streams: frozenset[Stream]) -> tuple[bool, bool]:
    """Which streams the clip has. Raises where the model lacks one that is asked for."""
    has_video, has_audio = Stream.video in streams, Stream.audio in streams and not request.silent
    for name, stream in (("audio", Stream.audio), ("video", Stream.video), ("image", Stream.video)):
        if getattr(request, name) and len(streams) == 1 and (name != "image" or stream not in streams):
            raise ConfigError(
                f"{name}={getattr(request, name)}: this model was trained to make {_named(streams)} alone. Leave it out"
            )
    if not has_video and not has_audio:
        raise ConfigError("silent: this model was trained to make sound alone, so nothing would be left. Leave it out")
    needs = {"mp4": has_video, "png": has_video, "wav": has_audio}
    if missing := [name for name in request.format or () if not needs[name]]:
        raise ConfigError(f"format={missing[0]}: this model was trained to make {_named(streams)} alone. Leave it out")
    return has_video, has_audio


def _asks_for_sound(request: ClipRequest) -> bool:
    """Whether its sound is given, to be written by itself, or all that is generated."""
    return bool(request.audio or request.video or OutputFormat.wav in (request.format or ()))


def _named(streams: frozenset[Stream]) -> str:
    return " and ".join(stream.value for stream in sorted(streams, reverse=True))


def _sized(request: ClipRequest, ground: Ground, has_video: bool) -> ClipRequest:
    """The request with all of its sizes, after a look into its files."""
    video = None if request.video is None else _readable("video", request.video)
    audio = None if request.audio is None else _readable("audio", request.audio)
    if request.image is not None:
        _readable("image", request.image)
    if video is not None and request.fps is None:
        request = replace(request, fps=video.fps)
    needed = SIZES if has_video else ("frames", "fps")
    if any(getattr(request, name) is None for name in needed):
        size = ground.size()
        request = replace(request, **{name: size[name] for name in needed if getattr(request, name) is None})
    if video is not None and video.frames == 1 and request.frames != 1 and not request.fit:
        raise DataError(
            f"{video.name}: a still picture, and the clip has {request.frames} frames. Give it as image, to be the first "
            "of them, or give a film"
        )
    if video is not None:
        request = _within(request, "video", video, lambda frames, fps: video.frames_at(fps) >= frames)
    if audio is not None:
        request = _within(request, "audio", audio, lambda frames, fps: _missing(audio, frames, fps) <= LATENT_STEP)
    if request.image is not None and request.frames == 1:
        raise ConfigError("image: it would be the only frame of the clip. Ask for more frames, or leave it out")
    return request


def _readable(field: str, path: str) -> MediaInfo:
    """What the file of a field holds. Raises `DataError` where that is not what the field takes."""
    called = f"{field}={path}"
    if not Path(path).is_file():
        raise DataError(f"{called}: no such file. Correct its path in the request")
    try:
        info = probe(path, name=called)
    except TruncatedError:
        raise
    except DataError as error:
        raise DataError(f"{error}. {field} takes {TAKEN[field]}") from error
    if not (info.has_audio if field == "audio" else info.has_video):
        kind = "sound" if field == "audio" else "picture"
        raise DataError(f"{called}: no {kind} in it. Name another file; {field} takes {TAKEN[field]}")
    return info


def _missing(info: MediaInfo, frames: int, fps: float) -> float:
    """Seconds of a clip that a file has no sound for."""
    return info.missing_audio(0.0, frames / fps)


def _within(request: ClipRequest, field: str, info: MediaInfo, reaches: Callable[[int, float], bool]) -> ClipRequest:
    """The request with as many frames as the given file reaches. Raises `DataError` where that is fewer than asked for."""
    frames, fps = request.frames, request.fps
    assert frames is not None
    assert fps is not None
    if reaches(frames, fps):
        return request
    fitting = next((n for n in range(_whole(frames), 0, -TIME_SCALE) if reaches(n, fps)), None)
    if request.fit and fitting is not None:
        return replace(request, frames=fitting)
    lack = f"{frames} frames at {fps:g} per second are {frames / fps:.2f} s"
    if field == "audio":
        lack += f", and {_missing(info, frames, fps):.2f} s of sound are missing"
    else:
        lack += f", and it has {info.frames_at(fps)} frames at that rate"
    action = "Give a longer file" if fitting is None else f"Ask for frames={fitting}, or for fit, which does so"
    raise DataError(f"{info.name}: too short: {lack}. {action}")


def _whole(frames: int) -> int:
    """The largest 8k + 1 up to `frames`."""
    return (frames - 1) // TIME_SCALE * TIME_SCALE + 1


def _bucket(request: ClipRequest, has_video: bool, has_audio: bool) -> Bucket:
    """The latent sizes. Raises `DataError` naming the nearest size that the codecs can have."""
    assert request.frames is not None
    assert request.fps is not None
    grid = (0, 0, 0)
    if has_video:
        assert request.height is not None
        assert request.width is not None
        rows, columns = latent_size(request.height, "height"), latent_size(request.width, "width")
        grid = (latent_frames(request.frames), rows, columns)
    steps = audio_latent_length(request.frames, request.fps) if has_audio else 0
    if has_audio and steps < LEAST_STEPS:
        silent = ", or for silent" if has_video and not _asks_for_sound(request) else ""
        enough = _frames_with_sound(request.fps, TIME_SCALE if has_video else 1)
        raise DataError(
            f"{request.frames} frames at {request.fps:g} per second are too short for sound (latent steps: {steps}, must "
            f"be >= {LEAST_STEPS}). Ask for {enough} frames or more{silent}"
        )
    return Bucket(*grid, steps)


def _frames_with_sound(fps: float, stride: int) -> int:
    """The fewest frames, 1 and a multiple of `stride`, whose sound can be decoded."""
    frames = math.ceil(((LEAST_STEPS - 0.5) * LATENT_STEP * fps - 1) / stride) * stride + 1
    return frames if audio_latent_length(frames, fps) >= LEAST_STEPS else frames + stride


def check_contents(clip: Clip) -> None:
    """Raises `DataError` where a file that the clip names holds something else than when it was planned."""
    for name, digest in clip.contents.items():
        path = getattr(clip.request, name)
        if _contents(path) != digest:
            raise DataError(
                f"{name}={path}: changed since the requests were read, so nothing is written that would be believed to be "
                "made of it. Do it again"
            )


def _digest(
    request: ClipRequest, profile: SamplerProfile, identity: Mapping[str, Any], contents: Mapping[str, str]
) -> str:
    """Of all that a clip follows from; of the files that it names their `contents`, wherever they lie."""
    plain = asdict(request) | {"name": None, "profile": profile.to_dict(), "identity": dict(identity), **contents}
    text = json.dumps([RECEIPT_VERSION, plain], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Batch:
    """Clips that are sampled together: of one size, with one profile."""

    clips: tuple[Clip, ...]

    @cached_property
    def cost(self) -> int:
        """What sampling them takes, in tokens through a denoiser."""
        return sum(clip.bucket.tokens * clip.profile.calls for clip in self.clips)


def share(clips: Sequence[Clip], batch_size: int, num_ranks: int) -> list[list[Batch]]:
    """The batches of every rank: as even as whole batches allow, the same on every machine.

    A size of which there are few clips is spread over the ranks rather than sampled together on one. The dearest
    batches are given away first, each to the rank that has least to do.
    """
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        alike = json.dumps([str(clip.bucket), clip.profile.to_dict()], sort_keys=True)
        groups.setdefault(alike, []).append(clip)
    batches = []
    for group in groups.values():
        size = min(batch_size, -(-len(group) // num_ranks))
        batches += [Batch(tuple(group[i : i + size])) for i in range(0, len(group), size)]
    ranks: list[list[Batch]] = [[] for _ in range(num_ranks)]
    for batch in sorted(batches, key=lambda b: -b.cost):
        min(ranks, key=lambda rank: sum(b.cost for b in rank)).append(batch)
    return ranks

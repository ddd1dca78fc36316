"""What a user asks for: requests read from a file, held against the model and the files they name, and shared by ranks."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from ltx2_train.diffusion.choice import chosen
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.errors import ConfigError, DataError, Ltx2Error
from ltx2_train.geometry import AUDIO_STEPS_PER_SECOND, TIME_SCALE, audio_latent_length, latent_frames, latent_size
from ltx2_train.media.probe import MediaInfo, probe
from ltx2_train.media.write import PARTIAL
from ltx2_train.model.modality import Stream
from ltx2_train.record import Bucket

SIZES = ("frames", "width", "height", "fps")
MEDIA = ("image", "audio", "video")  # fields that name files
PROMPT_CHARACTERS = 60  # of a prompt in a file name
PROMPT_BYTES = 180  # of the same, for letters that take several
NAME_BYTES = 230  # of a file name without suffix: file systems take 255, and files that are being written need some
LATENT_STEP = 1 / AUDIO_STEPS_PER_SECOND  # s; less sound than this is not missed
MAX_CRF = 51  # the coarsest quality of H.264
RECEIPT_VERSION = 1  # raise when the same request would be made otherwise: everything is made again then


class OutputFormat(StrEnum):
    """What a clip is written as."""

    mp4 = "mp4"
    wav = "wav"
    png = "png"


@dataclass(kw_only=True, slots=True)
class ClipRequest:
    """A clip as a user asks for it. What is None follows from the model, its data or the given files."""

    prompt: str
    """What to show."""
    negative: str = ""
    """What guidance pushes away from."""
    seed: int = 0
    """Of the noise. A seed means the same on every device, in every batch."""
    count: int = 1
    """Clips of this request, with seeds that count up."""
    frames: int | None = None
    """Pixel frames, 8k + 1."""
    width: int | None = None
    """Pixels, a multiple of 32."""
    height: int | None = None
    """Pixels, a multiple of 32."""
    fps: float | None = None
    """Frames per second; None: those of `video` where it is given."""
    image: str | None = None
    """File with the first frame."""
    image_crf: int | None = None
    """Compress the first frame as H.264 of this quality before it is encoded: frames of films are so. None: not."""
    audio: str | None = None
    """File with the sound, to which a picture is generated."""
    video: str | None = None
    """File with the picture, to which sound is generated."""
    silent: bool = False
    """No sound."""
    fit: bool = False
    """Cut the frames to what `audio` or `video` have, where that is less."""
    profile: str | None = None
    """Sampler profile; None: that of the model."""
    steps: int | None = None
    """Steps of the sampler; None: those of the profile."""
    format: list[str] | None = None
    """mp4, wav, png (a folder of pictures); None: mp4, and wav of a model without pictures."""
    name: str | None = None
    """How its files are called, with "-SEED" behind it; None: the beginning of the prompt."""

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name))
        if not self.prompt.strip():
            raise ConfigError("prompt: empty. Say what to show")
        for name, least in (("count", 1), ("steps", 1), ("frames", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name}={value}: must be >= {least}")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps={self.fps}: must be > 0")
        self._check_name()
        self.format = None if self.format is None else [chosen(OutputFormat, x, "format").value for x in self.format]
        if self.format == []:
            raise ConfigError(f"format: empty; give some of {', '.join(OutputFormat)}")
        self._check_givens()

    def _check_name(self) -> None:
        """Raises for a name that no file can have, or that would leave the folder."""
        if self.name is not None and (not self.name or Path(self.name).name != self.name or self.name[0] == "."):
            raise ConfigError(f"name={self.name!r}: must be a file name without folders that does not begin with a dot")
        if (size := len(self.file_name.encode())) > NAME_BYTES:
            raise ConfigError(
                f"name: {self.file_name[:20]!r}... takes {size} bytes with its seed; must be <= {NAME_BYTES}. Shorten it"
            )

    def _check_givens(self) -> None:
        """Raises for things that exclude each other, or leave nothing to generate."""
        pairs = (("video", "audio"), ("video", "image"), ("video", "silent"), ("audio", "silent"))
        for one, other in pairs:
            if getattr(self, one) and getattr(self, other):
                raise ConfigError(f"{one} and {other}: they exclude each other. Give one of them")
        if self.image_crf is not None and (not self.image or not 0 <= self.image_crf <= MAX_CRF):
            raise ConfigError(f"image_crf={self.image_crf}: must be in [0, {MAX_CRF}], and beside an image")
        if self.fit and not (self.audio or self.video):
            raise ConfigError(
                "fit: there is nothing to cut the frames to. Give audio or video with it, or leave it out"
            )
        if self.silent and "wav" in (self.format or ()):
            raise ConfigError("format=wav: a silent clip has no sound to write. Leave out wav, or silent")

    @property
    def file_name(self) -> str:
        """Of its files, without suffix. A prompt that is cut leaves a mark, so that no two prompts share a name."""
        return f"{self.name or _slug(self.prompt)}-{self.seed}"


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "negative", "image", "audio", "video", "profile", "name"), (str,)),
    **dict.fromkeys(("seed", "count", "frames", "width", "height", "image_crf", "steps"), (int,)),
    **dict.fromkeys(("silent", "fit"), (bool,)),
    "fps": (int, float),
    "format": (list,),
}
_NEEDED = ("prompt", "negative", "seed", "count", "silent", "fit")  # never None


def _check_type(name: str, value: Any) -> None:
    if value is None and name not in _NEEDED:
        return
    kinds = _TYPES[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
        raise ConfigError(f"{name}={value!r}: must be {wanted[kinds[-1]]}")
    if isinstance(value, str):
        _check_text(name, value)


def _check_text(name: str, value: str) -> None:
    """Raises for what cannot be written as UTF-8, and for what no path can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        letter = value[error.start]
        raise ConfigError(f"{name}: letter {error.start + 1} is {letter!r}, which UTF-8 has not. Correct it") from error
    if "\0" in value and name in ("name", *MEDIA):
        raise ConfigError(f"{name}={value!r}: a NUL, which no file name has. Leave it out")


def _slug(prompt: str) -> str:
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-") or "sample"
    cut = words[:PROMPT_CHARACTERS].encode()[:PROMPT_BYTES].decode(errors="ignore")
    return words if cut == words else f"{cut.strip('-')}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"


@dataclass(frozen=True, slots=True)
class Asked:
    """One clip that is asked for, and the place where that stands, for messages."""

    where: str
    request: ClipRequest


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    line: int
    fields: dict[str, Any]
    lines: dict[str, int]  # of the fields


def read_requests(path: Path, defaults: Mapping[str, Any]) -> list[Asked]:
    """The clips of a file: JSON objects, one per line (.jsonl), or a list of them (.yaml, .yml, .json).

    `defaults` are the fields that an entry leaves out. Files that an entry names lie relative to `path`. Raises
    `ConfigError` naming the line for what is no request, for unknown fields and for values of the wrong kind.
    """
    readers = {".jsonl": _jsonl, ".yaml": _yaml, ".yml": _yaml, ".json": _yaml}
    if path.suffix not in readers:
        raise ConfigError(f"{path}: requests come as {', '.join(readers)}. Rename the file, or write it so")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give a text file with requests") from error
    asked = [one for entry in readers[path.suffix](text, path) for one in _asked(entry, path, defaults)]
    if not asked:
        raise ConfigError(f'{path}: no requests in it. Write one per line, such as {{"prompt": "a red ball"}}')
    return asked


def _jsonl(text: str, path: Path) -> Iterator[_Entry]:
    for number, line in enumerate(text.split("\n"), 1):  # JSON allows the other separators of lines inside of strings
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=_without_repeats)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: no JSON ({error}). Write one object per line") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path}:{number}: {found!r} is no request. Write an object with a prompt")
        yield _Entry(number, found, dict.fromkeys(found, number))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _yaml(text: str, path: Path) -> Iterator[_Entry]:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        listing = loader.get_single_node()
        if not isinstance(listing, yaml.SequenceNode):
            raise ConfigError(f'{path}: no list of requests. Begin every request with "- prompt: ..."')
        for node in listing.value:
            line = node.start_mark.line + 1
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(f'{path}:{line}: {node.value!r} is no request. Write "- prompt: ..."')
            lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
            if len(lines) < len(node.value):
                raise ConfigError(f"{path}:{line}: a field stands twice. Keep one of them")
            found = loader.construct_document(node)
            yield _Entry(line, {str(name): value for name, value in found.items()}, lines)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML ({error}). Correct it") from error


def _asked(entry: _Entry, path: Path, defaults: Mapping[str, Any]) -> list[Asked]:
    known = [f.name for f in fields(ClipRequest)]
    for name in entry.fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            line = entry.lines.get(name, entry.line)
            raise ConfigError(f"{path}:{line}: unknown field {name!r}{hint}. The fields: {', '.join(known)}")
    where = f"{path}:{entry.line}"
    return expanded(where, _suiting(defaults, entry.fields) | _placed(entry.fields, path.parent))


def _suiting(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults without those about files that the request has not."""
    named = {name for name in MEDIA if (dict(defaults) | dict(given)).get(name)}
    needs = {"fit": {"audio", "video"}, "image_crf": {"image"}}
    return {name: value for name, value in defaults.items() if name not in needs or needs[name] & named}


def _placed(given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields with files relative to a folder, and formats between commas as a list."""
    placed = {n: str(folder / v) if n in MEDIA and isinstance(v, str) else v for n, v in given.items()}
    if isinstance(placed.get("format"), str):
        placed["format"] = split_formats(placed["format"])
    return placed


def split_formats(text: str) -> list[str]:
    """Formats between commas."""
    return [name.strip() for name in text.split(",")]


def expanded(where: str, given: Mapping[str, Any]) -> list[Asked]:
    """The clips of one request: `count` of them, with seeds that count up. Raises `ConfigError` naming `where`."""
    if "prompt" not in given:
        raise ConfigError(f"{where}: a request without a prompt. Say what to show: prompt")
    try:
        request = ClipRequest(**given)
        return [Asked(where, replace(request, seed=request.seed + i, count=1)) for i in range(request.count)]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_names(asked: Sequence[Asked]) -> None:
    """Raises `ConfigError` where two clips would go into the same files."""
    first: dict[str, str] = {}
    for one in asked:
        name = one.request.file_name
        if name in first:
            raise ConfigError(
                f"{one.where}: its files would be called {name!r}, as those of {first[name]}. "
                "Give one of them another seed, or a name"
            )
        first[name] = one.where


# -- planning ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What requests are held against."""

    identity: Mapping[str, Any]
    """What decides on the clips beside the requests: plain values. Where they change, everything is made again."""
    streams: frozenset[Stream]
    """What the model makes."""
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


class State(StrEnum):
    """What became of a clip."""

    made = "made"
    there = "there"  # from an earlier time
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one clip that was asked for. `detail`: its first file, or the reason why there is none."""

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
            if (receipt := read_receipt(directory, clip)) is not None:
                first = str(directory / next(iter(receipt["files"])))
                outcomes.append(Outcome(one.where, clip.name, State.there, first))
                continue
            check_free(directory, clip)
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
    for stream, guidance in (("video", profile.video), ("audio", profile.audio)):
        if len(ground.streams) == 1 and stream in ground.streams and guidance.modality_weight != 0:
            raise ConfigError(
                f"profile {profile.name} guides {stream} by the other stream (modality {guidance.modality:g}), and this "
                f"model makes {stream} alone. Name a profile without that"
            )
    request = _sized(request, ground, has_video)
    if request.format is None:
        request = replace(request, format=[(OutputFormat.mp4 if has_video else OutputFormat.wav).value])
    _bucket(request, has_video, has_audio)
    return Clip(one.where, request, profile, has_video, has_audio, _digest(request, profile, ground.identity))


def _streams(request: ClipRequest, streams: frozenset[Stream]) -> tuple[bool, bool]:
    """Which streams the clip has. Raises where the model lacks one that is asked for."""
    has_video, has_audio = Stream.video in streams, Stream.audio in streams and not request.silent
    for name, stream in (("audio", Stream.audio), ("video", Stream.video), ("image", Stream.video)):
        if getattr(request, name) and len(streams) == 1 and (name != "image" or stream not in streams):
            raise ConfigError(
                f"{name}={getattr(request, name)}: this model makes {_named(streams)} alone. Leave it out"
            )
    if not has_video and not has_audio:
        raise ConfigError("silent: this model makes sound alone, so nothing would be left. Leave it out")
    needs = {"mp4": has_video, "png": has_video, "wav": has_audio}
    if missing := [name for name in request.format or () if not needs[name]]:
        raise ConfigError(f"format={missing[0]}: this model makes {_named(streams)} alone. Leave it out")
    return has_video, has_audio


def _named(streams: frozenset[Stream]) -> str:
    return " and ".join(stream.value for stream in sorted(streams, reverse=True))


def _sized(request: ClipRequest, ground: Ground, has_video: bool) -> ClipRequest:
    """The request with all of its sizes, after a look into its files."""
    video = None if request.video is None else _readable(request.video, "picture")
    audio = None if request.audio is None else _readable(request.audio, "sound")
    if request.image is not None:
        _readable(request.image, "picture")
    if video is not None and request.fps is None:
        request = replace(request, fps=video.fps)
    needed = SIZES if has_video else ("frames", "fps")
    if any(getattr(request, name) is None for name in needed):
        size = ground.size()
        request = replace(request, **{name: size[name] for name in needed if getattr(request, name) is None})
    if video is not None:
        request = _within(request, "video", video, lambda frames, fps: video.frames_at(fps) >= frames)
    if audio is not None:
        request = _within(request, "audio", audio, lambda frames, fps: _missing(audio, frames, fps) <= LATENT_STEP)
    if request.image is not None and request.frames == 1:
        raise ConfigError("image: it would be the only frame of the clip. Ask for more frames, or leave it out")
    return request


def _readable(path: str, kind: str) -> MediaInfo:
    """What a file holds. Raises `DataError` where it has not that."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file. Correct its path in the request")
    info = probe(path)
    if not (info.has_video if kind == "picture" else info.has_audio):
        raise DataError(f"{path}: no {kind} in it. Name another file")
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
    if has_audio and not steps:
        needed = LATENT_STEP / 2 * request.fps
        raise DataError(f"{request.frames} frames at {request.fps:g} per second are too short for sound. "
                        f"Ask for more than {needed:.0f} frames, or for silent")  # fmt: skip
    return Bucket(*grid, steps)


def _digest(request: ClipRequest, profile: SamplerProfile, identity: Mapping[str, Any]) -> str:
    """Of all that a clip follows from; of the files that it names their contents, wherever they lie."""
    plain = asdict(request) | {"name": None, "profile": profile.to_dict(), "identity": dict(identity)}
    plain |= {name: _contents(path) for name in MEDIA if (path := getattr(request, name)) is not None}
    text = json.dumps([RECEIPT_VERSION, plain], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- receipts ----------------------------------------------------------------------------------------------------------


def receipt_path(directory: Path, clip: Clip) -> Path:
    """The small file beside a clip's media that is written last: where it is, the media are whole."""
    return directory / f"{clip.name}.json"


def read_receipt(directory: Path, clip: Clip) -> dict[str, Any] | None:
    """The receipt of exactly this clip, if its files are there in full size; else None."""
    receipt = _listing(receipt_path(directory, clip))
    if receipt is None or receipt.get("digest") != clip.digest or not receipt["files"]:
        return None
    try:
        is_whole = all((directory / name).stat().st_size == size for name, size in receipt["files"].items())
    except OSError:  # one of them is gone
        return None
    return receipt if is_whole else None


def begun_path(directory: Path, name: str) -> Path:
    """The list of the media that a clip of that name removes and places, there while it does so."""
    return directory / f".{name}{PARTIAL}" / "files.json"


def media_of(directory: Path, name: str) -> list[str]:
    """The media that an earlier clip of that name left: what its receipt lists, or the list of one that was killed.

    Nothing else in the directory is ours to remove.
    """
    receipt = directory / f"{name}.json"
    found = _listing(receipt if os.path.lexists(receipt) else begun_path(directory, name))
    own = re.compile(rf"{re.escape(name)}(\.mp4|\.wav|/\d{{5,}}\.png)")
    return [file for file in (found or {"files": {}})["files"] if own.fullmatch(file)]


def check_free(directory: Path, clip: Clip) -> None:
    """Raises `ConfigError` where something that no earlier clip left lies where this one would be written."""
    action = "Give the clip another name, or another --out, or move that away"
    receipt, folder = receipt_path(directory, clip), directory / clip.name
    if os.path.lexists(receipt) and "digest" not in (_listing(receipt) or {}):
        raise ConfigError(f"{receipt}: there already, and not written by this program. {action}")
    own, wanted = set(media_of(directory, clip.name)), clip.files
    if OutputFormat.png in (clip.request.format or ()):
        inside = [f"{clip.name}/{entry.name}" for entry in folder.iterdir()] if folder.is_dir() else [clip.name]
        wanted = [*wanted, *inside]
    foreign = next((file for file in wanted if file not in own and os.path.lexists(directory / file)), None)
    if foreign is not None:
        raise ConfigError(f"{directory / foreign}: there already, and no receipt of this program lists it. {action}")


def _listing(path: Path) -> dict[str, Any] | None:
    """A file of ours that lists media with their sizes; None where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None


# -- sharing -----------------------------------------------------------------------------------------------------------


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

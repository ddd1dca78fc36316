"""What a user asks for: a request, and requests read from a file."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from ltx2_train.diffusion.choice import chosen
from ltx2_train.diffusion.profiles import is_file
from ltx2_train.errors import ConfigError

SIZES = ("frames", "width", "height", "fps")
MEDIA = ("image", "audio", "video")  # fields that name files
PROMPT_CHARACTERS = 60  # of a prompt in a file name
PROMPT_BYTES = 180  # of the same, for letters that take several
NAME_BYTES = 230  # of a file name without suffix: file systems take 255, and files that are being written need some
MAX_CRF = 51  # the coarsest quality of H.264


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
    """Sampler profile, by name or the place of a .yaml file; None: that of the model."""
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
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"fps={self.fps}: must be > 0, and no infinity")
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
    placed = {n: str(folder / v) if _is_place(n, v) else v for n, v in given.items()}
    if isinstance(placed.get("format"), str):
        placed["format"] = split_formats(placed["format"])
    return placed


def _is_place(name: str, value: Any) -> bool:
    return isinstance(value, str) and (name in MEDIA or (name == "profile" and is_file(value)))


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

"""What a media file holds, found out in one pass over its packets, and whether all of it is there.

All times are in seconds from the first video frame that is shown (from the first sample of a file without video).
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx2_train.errors import DataError

Source = str | Path | bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")  # and WebP: RIFF....WEBP
SIXTEEN_TO_EIGHT = 257  # white is 65535 and 255
GRID_TOLERANCE = 0.25  # share of a frame's time by which a frame may miss the grid of a constant rate
MAX_DENOMINATOR = 1001  # frame rates are fractions such as 30000/1001
DURATION_SLACK = 0.1  # seconds that a file may end before its header says so
JITTER = 0.01  # seconds by which time stamps of sound may disagree with its samples before a gap is believed
EXACT_FORMATS = ("matroska", "mp4", "flv", "flac", "aiff")  # their header states a duration that is not a guess
STRICT = {"err_detect": "explode"}  # decoders raise where they would conceal an error


class NoSuchFileError(DataError):
    """The file is not where it was named."""


class TruncatedError(DataError):
    """The file ends before its header says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """What a media file holds. `frames` is 0 without video; a still image is one frame at 1 frame per second."""

    name: str
    frames: int = 0
    rate: Fraction = Fraction(0)  # frames per second; the mean rate where frames come at varying times
    times: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(0), repr=False, compare=False
    )  # s, of each frame
    origin: float = 0.0  # when the first frame is shown, in seconds on the container's own clock
    width: int = 0  # as shown: after rotation, with square pixels
    height: int = 0
    rotation: int = 0  # degrees counter-clockwise by which stored frames are turned for display
    is_variable: bool = False  # frames do not follow a constant rate
    is_image: bool = False
    video_codec: str = ""
    audio_codec: str = ""
    sample_rate: int = 0  # Hz; 0 without audio
    channels: int = 0
    audio_start: float = 0.0  # first and last moment of sound, seconds from the first frame
    audio_end: float = 0.0
    audio_gaps: tuple[tuple[float, float], ...] = ()  # (from, to) in between where the track has no sound

    @property
    def fps(self) -> float:
        return float(self.rate)

    @property
    def has_video(self) -> bool:
        return self.frames > 0

    @property
    def has_audio(self) -> bool:
        return self.channels > 0

    @property
    def duration(self) -> float:
        """Seconds of picture, or of sound where there is no picture."""
        if not self.has_video:
            return self.audio_end - self.audio_start
        return float(self.times[-1]) + 1 / self.fps

    def frames_at(self, fps: float) -> int:
        """Frames of the clip on a constant grid of `fps`."""
        if self.is_image or (fps == self.fps and not self.is_variable):
            return self.frames
        return max(1, int(self.duration * fps + GRID_TOLERANCE))

    def missing_audio(self, start: float, duration: float) -> float:
        """Seconds of the window that have no sound because the track starts later, ends earlier or has gaps."""
        first, last = max(start, self.audio_start), min(start + duration, self.audio_end)
        gaps = sum(max(0.0, min(last, end) - max(first, begin)) for begin, end in self.audio_gaps)
        return min(duration, max(0.0, duration - max(0.0, last - first - gaps)))


def source_name(source: Source, name: str | None = None) -> str:
    """How messages call a source."""
    return name or (str(source) if not isinstance(source, bytes) else f"{len(source)} bytes in memory")


def is_image(source: Source) -> bool:
    """True for a still image, by its file name or its first bytes."""
    if not isinstance(source, bytes):
        return Path(source).suffix.lower() in IMAGE_SUFFIXES
    return source.startswith(IMAGE_MAGIC) or (source[:4] == b"RIFF" and source[8:12] == b"WEBP")


def file_or_bytes(source: Source) -> Any:
    """What the decoders open: a path as text, or bytes as a file."""
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


@contextmanager
def opened(source: Source, name: str) -> Iterator[Any]:
    """An open PyAV container whose decoders raise on damage. Every PyAV error becomes a `DataError` naming the file."""
    import av

    try:
        with av.open(file_or_bytes(source), metadata_errors="ignore") as container:
            for stream in container.streams:
                if stream.type in ("video", "audio"):
                    stream.codec_context.options = STRICT
                    stream.codec_context.thread_type = "SLICE" if stream.type == "video" else "NONE"
            yield container
    except (av.error.FFmpegError, av.error.FileNotFoundError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{name}: damaged or no media file ({reason}). Repair or re-encode it, or leave it out"
        ) from error


def picture_stream(container: Any) -> Any:
    """The first video stream that is not cover art, or None."""
    streams = (s for s in container.streams.video if "attached_pic" not in (s.disposition.name or ""))
    return next(streams, None)


def sound_stream(container: Any) -> Any:
    """The first audio stream, or None."""
    return next(iter(container.streams.audio), None)


def probe(source: Source, *, name: str | None = None, decode: bool = False) -> MediaInfo:
    """What the file holds, from its packets. `decode` also decodes all of it, which finds damage inside frames.

    Raises `DataError` naming the file for one that cannot be read, is cut short (expected and found counts are named) or
    holds neither video nor audio.
    """
    label = source_name(source, name)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise NoSuchFileError(f"{label}: no such file. Correct the path in the metadata")
    if is_image(source):
        return _probe_image(source, label)
    with opened(source, label) as container:
        picture, sound = picture_stream(container), sound_stream(container)
        if picture is None and sound is None:
            raise DataError(f"{label}: neither a video nor an audio track. Leave it out")
        tracks = {s.index: _Track() for s in (picture, sound) if s is not None}
        for packet in container.demux([s for s in (picture, sound) if s is not None]):
            tracks[packet.stream_index].add(packet, decode)
        _check_complete(container, picture, sound, tracks, label)
        return _describe(container, picture, sound, tracks, label)


@dataclass(slots=True)
class _Track:
    """Packets of one stream, in file order."""

    pts: list[int] = field(default_factory=list)  # of packets that are shown
    end: int = 0  # when the last one ends, in the stream's time base
    gaps: list[tuple[int, int]] = field(default_factory=list)  # (from, to) between packets, in the stream's time base
    is_end_known: bool = False  # whether the packet before says how long it lasts
    packets: int = 0  # whole ones, shown or not
    corrupt: int = 0
    decoded: int = 0
    rotation: int = 0
    first_frame: Any = None

    def add(self, packet: Any, decode: bool) -> None:
        if packet.size:
            self.corrupt += packet.is_corrupt
            self.packets += not packet.is_corrupt
            stamp = packet.dts if packet.pts is None else packet.pts
            if not packet.is_discard:
                self._place(packet, stamp)
        if not self.corrupt and (decode or (self.first_frame is None and packet.stream.type == "video")):
            self._decode(packet)

    def _place(self, packet: Any, stamp: int | None) -> None:
        """Take note of when the packet is heard or seen; what has no time stamp follows the packet before."""
        if stamp is not None:
            if self.is_end_known and (stamp - self.end) * packet.time_base > JITTER:
                self.gaps.append((self.end, stamp))
            self.pts.append(stamp)
        begin = self.end if stamp is None else stamp
        self.end = max(self.end, begin + (packet.duration or 0))
        self.is_end_known = bool(packet.duration)

    def _decode(self, packet: Any) -> None:
        for frame in packet.decode():
            self.decoded += 1
            self.first_frame = self.first_frame or frame


def _check_complete(container: Any, picture: Any, sound: Any, tracks: dict[int, _Track], label: str) -> None:
    """Raises `DataError` when the container promises more than it holds."""
    advice = "Copy or download it again, or leave it out"
    for stream in (picture, sound):
        if stream is None:
            continue
        track, kind = tracks[stream.index], "frames" if stream is picture else "audio packets"
        if track.corrupt or (track.packets < stream.frames and not _ends_as_told(container, stream, track)):
            expected = stream.frames or "more"
            raise TruncatedError(f"{label}: truncated: {expected} {kind} expected, {track.packets} there. {advice}")
    if container.duration and any(kind in container.format.name for kind in EXACT_FORMATS):
        expected = container.duration / 1e6
        ends = [tracks[s.index].end * float(s.time_base) for s in (picture, sound) if s is not None]
        two_frames = 2 / picture.average_rate if picture is not None and picture.average_rate else 0
        slack = max(DURATION_SLACK, float(two_frames))
        if max(ends) < expected - slack and len(container.streams) == len(ends):
            raise TruncatedError(f"{label}: truncated: {expected:.2f} s expected, {max(ends):.2f} s there. {advice}")


def _ends_as_told(container: Any, stream: Any, track: _Track) -> bool:
    """True for sound that lasts as long as its header says: `stream.frames` often counts its samples or bytes.

    Only mov, mp4 and aiff tell the length of the track exactly; elsewhere nothing can be said, which is True.
    """
    if stream.type != "audio":
        return False
    if not any(kind in container.format.name for kind in ("mp4", "aiff")):
        return True
    told = (stream.start_time or 0) + (stream.duration or 0)
    return bool(stream.duration) and (told - track.end) * stream.time_base < 1e-3


def _describe(container: Any, picture: Any, sound: Any, tracks: dict[int, _Track], label: str) -> MediaInfo:
    fields: dict[str, Any] = {"name": label}
    if picture is not None and tracks[picture.index].pts:
        fields |= _describe_video(picture, tracks[picture.index], label)
    if sound is not None and tracks[sound.index].pts and sound.codec_context.channels:
        fields |= _describe_audio(sound, tracks[sound.index], fields.get("origin"))
    if "frames" not in fields and "channels" not in fields:
        raise DataError(f"{label}: its tracks hold neither a frame nor a sample. Leave it out")
    return MediaInfo(**fields)


def _describe_video(stream: Any, track: _Track, label: str) -> dict[str, Any]:
    if track.first_frame is None:
        codec = stream.codec_context.name
        raise DataError(f"{label}: no frame of its {codec} video can be decoded. Remove or re-encode it")
    seconds = np.sort(np.array(track.pts, dtype=np.float64)) * float(stream.time_base)
    times = seconds - seconds[0]
    rate, is_variable = constant_rate(times, [stream.average_rate, stream.guessed_rate])
    rotation = track.first_frame.rotation % 360
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = round(track.first_frame.width * aspect), track.first_frame.height
    return {
        "frames": len(times),
        "rate": rate,
        "times": times,
        "origin": float(seconds[0]),
        "width": height if rotation in (90, 270) else width,
        "height": width if rotation in (90, 270) else height,
        "rotation": rotation,
        "is_variable": is_variable,
        "video_codec": stream.codec_context.codec.canonical_name,
    }


def _describe_audio(stream: Any, track: _Track, origin: float | None) -> dict[str, Any]:
    base = float(stream.time_base)
    first = min(track.pts) * base
    start = first if stream.start_time is None else max(first, stream.start_time * base)  # behind the encoder's priming
    origin = start if origin is None else origin
    return {
        "origin": origin,
        "audio_codec": stream.codec_context.codec.canonical_name,
        "sample_rate": stream.codec_context.sample_rate,
        "channels": stream.codec_context.channels,
        "audio_start": start - origin,
        "audio_end": track.end * base - origin,
        "audio_gaps": tuple((begin * base - origin, end * base - origin) for begin, end in track.gaps),
    }


def constant_rate(times: NDArray[np.float64], candidates: list[Fraction | None]) -> tuple[Fraction, bool]:
    """The frame rate of frames shown at `times` (s, from 0), and whether it varies.

    The rate is the first candidate, or else the mean rate, whose grid every frame meets within a quarter of a frame;
    where there is none it is the mean rate and frames come at varying times.
    """
    known = [rate for rate in candidates if rate]
    if len(times) < 2 or times[-1] <= 0:
        return (known[0] if known else Fraction(1)), False
    mean = Fraction((len(times) - 1) / times[-1]).limit_denominator(MAX_DENOMINATOR)
    grid = np.arange(len(times))
    for rate in [*known, mean]:
        if rate and np.abs(times * float(rate) - grid).max() <= GRID_TOLERANCE:
            return rate, False
    return mean, True


def _probe_image(source: Source, label: str) -> MediaInfo:
    image = open_image(source, label)
    return MediaInfo(
        name=label,
        frames=1,
        rate=Fraction(1),
        times=np.zeros(1),
        width=image.width,
        height=image.height,
        is_image=True,
        video_codec=(image.info.get("format_name") or "image").lower(),
    )


def open_image(source: Source, label: str) -> Any:
    """A Pillow image in sRGB, turned upright; what is transparent lies on black, and 16 bits become 8.

    Raises `DataError` naming the file for a damaged one.
    """
    from PIL import Image, ImageCms, ImageOps

    try:
        with Image.open(file_or_bytes(source)) as opened_image:
            name, profile = opened_image.format, opened_image.info.get("icc_profile")
            upright = ImageOps.exif_transpose(opened_image)
            may_be_profiled = upright.mode in ("RGB", "RGBA")
            upright = _on_black(_eight_bit(upright))
            if profile and may_be_profiled:
                srgb = ImageCms.createProfile("sRGB")
                source_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
                upright = ImageCms.profileToProfile(upright, source_profile, srgb) or upright
            image = upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, ImageCms.PyCMSError) as error:
        raise DataError(f"{label}: damaged image ({error}). Replace it or leave it out") from error
    image.info["format_name"] = name
    return image


def _eight_bit(image: Any) -> Any:
    """A picture of 16-bit grey in 8 bits: Pillow itself would make everything but the darkest white."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) / SIXTEEN_TO_EIGHT).round().clip(0, 255).astype(np.uint8))


def _on_black(image: Any) -> Any:
    """What is seen of a picture before black; Pillow itself would show what lies hidden where it is transparent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")

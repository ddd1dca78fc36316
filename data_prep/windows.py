"""Raw records become windows: clips in the size of their bucket, cut in time, each beside the sound that it has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from data_prep.buckets import choose
from data_prep.dropped import Dropped, EmptyCaption, drop, drop_reason
from data_prep.encode_config import LATENT_STEP, EncodeConfig
from data_prep.raw import caption_of, member, raw_json, source_of, truth_of, unread
from data_prep.tables import add
from data_prep.tars import Members, read_tar
from ltx2_train.codecs.resample import to_stereo
from ltx2_train.errors import DataError
from ltx2_train.geometry import AUDIO_STEPS_PER_SECOND, audio_latent_length
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import MediaInfo, probe
from ltx2_train.media.video import VideoFile, to_tensor


@dataclass(frozen=True, slots=True)
class Window:
    """One future sample: everything but its latents and text features."""

    key: str
    source: str
    caption: str
    fps: float
    frames: Tensor | None  # (3, F, H, W) fp32 in [-1, 1]
    waveform: Tensor | None  # (2, N) fp32
    rate: int  # Hz
    meta: dict[str, Any]


def shard_windows(
    url: str, config: EncodeConfig, counts: dict[str, int], dropped: list[dict[str, str]], decode: bool
) -> Iterator[Window]:
    """The windows of all records of a raw shard; dropped records are counted and named with their reason."""
    for key, members in read_tar(url):
        add(counts, "clips_read")
        try:
            yield from clip_windows(key, members, config, counts, decode)
        except DataError as error:
            reason = drop_reason(error)
            add(counts, f"dropped_{reason}")
            dropped.append(drop(key, reason, str(error), shard=url))


def clip_windows(
    key: str, members: Members, config: EncodeConfig, counts: dict[str, int], decode: bool = False
) -> Iterator[Window]:
    """The windows of one raw record. Raises `DataError` with the reason why it has none.

    `decode`: look for damage inside frames first; of packed shards this is known.
    """
    fields = raw_json(key, members, config.key_map)
    for extension in unread(members, config.key_map):
        add(counts, f"members_not_read_(.{extension})")
    caption = caption_of(key, members, fields, config.key_map)
    if not caption and config.empty_caption is EmptyCaption.DROP:
        raise Dropped("empty_caption", "no caption; --empty-caption=keep keeps such clips for the null context")
    video, audio = (member(members, role, config.key_map) for role in ("video", "audio"))
    shown = probe(video, name=key, decode=decode) if video is not None else None
    sound = audio if audio is not None else video
    heard = probe(audio, name=key, decode=decode) if audio is not None else shown
    heard = _told_bounds(heard, fields) if heard is not None and heard.has_audio else None
    base = Window(key, source_of(key, fields), caption, 0.0, None, None, 0, {"truth": truth_of(fields)})
    if shown is not None and shown.has_video and video is not None:
        yield from _video_windows(base, video, shown, sound, heard, config, counts)
    elif heard is not None and sound is not None:
        yield from _audio_windows(base, sound, heard, config, counts)
    else:
        raise Dropped("no_video_and_no_audio", f"members: {', '.join(sorted(members))}; --key-map says which is which")


def _video_windows(
    base: Window,
    video: bytes,
    shown: MediaInfo,
    sound: bytes | None,
    heard: MediaInfo | None,
    config: EncodeConfig,
    counts: dict[str, int],
) -> Iterator[Window]:
    fps = shown.fps if config.fps is None or shown.is_image else config.fps
    frames = shown.frames_at(fps)
    bucket = choose(config.buckets, shown.width, shown.height, frames)
    if bucket is None:
        sizes = "; ".join(map(str, config.buckets))
        raise Dropped("too_short", f"{base.key}: {frames} frames at {fps:.3f} fps; buckets: {sizes}")
    if shown.is_variable:
        add(counts, "variable_frame_rate")
    pieces, rest = divmod(frames, bucket.frames)
    if rest:
        add(counts, "remainder_frames", rest)
    with VideoFile(video, info=shown) as file:
        for piece in range(pieces):
            start = piece * bucket.frames / fps
            waveform = _window_sound(sound, heard, start, bucket.frames, fps, config, counts)
            yield replace(
                base,
                key=_window_key(base.key, piece, pieces),
                fps=fps,
                frames=to_tensor(file.frames(start, bucket.frames, fps, (bucket.width, bucket.height))),
                waveform=waveform,
                rate=heard.sample_rate if heard is not None else 0,
                meta=_window_meta(base, start, bucket.frames / fps, (shown.width, shown.height)),
            )


def _window_sound(
    sound: bytes | None,
    heard: MediaInfo | None,
    start: float,
    frames: int,
    fps: float,
    config: EncodeConfig,
    counts: dict[str, int],
) -> Tensor | None:
    """The stereo waveform beside a window; None where there is no sound or too little of it."""
    steps = audio_latent_length(frames, fps)
    if heard is None or sound is None or not steps:
        return None
    if not _is_heard(heard, start, frames / fps, config, counts):
        return None
    # As much sound as the latent steps cover: what lies beside the window's edge is heard, not invented.
    return to_stereo(read_audio(sound, start=start, duration=steps * LATENT_STEP, info=heard)[0])


def _is_heard(heard: MediaInfo, start: float, length: float, config: EncodeConfig, counts: dict[str, int]) -> bool:
    """Whether a window has enough sound; what is missing is counted."""
    limit = max(config.audio_tolerance, LATENT_STEP)
    missing = heard.missing_audio(start, length)
    if missing > limit:
        is_gap = replace(heard, audio_gaps=()).missing_audio(start, length) <= limit
        add(counts, f"audio_{'with_gaps' if is_gap else 'too_short'}_treated_as_missing")
    elif missing > LATENT_STEP:
        add(counts, "audio_padded")
    return missing <= limit


def _audio_windows(
    base: Window, sound: bytes, heard: MediaInfo, config: EncodeConfig, counts: dict[str, int]
) -> Iterator[Window]:
    length = config.audio_only_seconds
    if length is None:
        raise Dropped("audio_only", f"{base.key}: sound without picture; --audio-only-seconds keeps such records")
    pieces = int(heard.audio_end / length + 1e-6)
    if not pieces:
        raise Dropped("too_short", f"{base.key}: {heard.audio_end:.2f} s of sound; --audio-only-seconds is {length}")
    if rest := round(1000 * (heard.audio_end - pieces * length)):
        add(counts, "remainder_audio_milliseconds", rest)
    heard_pieces = [i for i in range(pieces) if _is_heard(heard, i * length, length, config, counts)]
    if not heard_pieces:
        raise Dropped("no_sound_in_any_window", f"{base.key}: gaps in its track reach into every window")
    for piece in heard_pieces:
        waveform, rate = read_audio(sound, start=piece * length, duration=length, info=heard)
        yield replace(
            base,
            key=_window_key(base.key, piece, pieces),
            fps=float(AUDIO_STEPS_PER_SECOND),
            waveform=to_stereo(waveform),
            rate=rate,
            meta=_window_meta(base, piece * length, length, None),
        )


def _window_key(key: str, piece: int, pieces: int) -> str:
    return key if pieces == 1 else f"{key}-w{piece:04d}"


def _window_meta(base: Window, start: float, length: float, size: tuple[int, int] | None) -> dict[str, Any]:
    meta = base.meta | {"source": base.source, "start": round(start, 6), "duration": round(length, 6)}
    return meta | ({"source_size": list(size)} if size else {})


def _told_bounds(heard: MediaInfo, fields: Mapping[str, Any]) -> MediaInfo:
    """Where there truly is sound, as the raw record tells it: the sound of a cut segment is padded to its length."""
    start = max(heard.audio_start, float(fields.get("audio_start", heard.audio_start)))
    end = min(heard.audio_end, float(fields.get("audio_end", heard.audio_end)))
    gaps = fields.get("audio_gaps")
    told = tuple((float(begin), float(end)) for begin, end in gaps) if gaps else heard.audio_gaps
    return replace(heard, audio_start=start, audio_end=end, audio_gaps=told)

"""Pack media files and their captions into raw WebDataset shards: for each clip its media and a json.

Input is a folder (captions from `NAME.txt` beside each file) or a CSV, JSON or JSONL file with the columns `video` (also
called `media_path`), `audio` and `caption`; paths are relative to that file, other columns are kept as the clip's truth.
Files with a constant frame rate that last at most --max-seconds are stored byte for byte. Others are cut into consecutive
segments of constant frame rate: near-lossless H.264, sound as FLAC cut by time stamps. Every file is decoded once to find
damage. What is dropped is named with its reason in `dropped.jsonl`. A killed run continues where it was; shards of other
files are never overwritten, unless by --replace.
"""

import json
import tempfile
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import console
from data_prep.buckets import PixelBucket, choose, parse_buckets
from data_prep.dropped import DROPPED_NAME, Dropped, EmptyCaption, drop, drop_reason
from data_prep.jobs import Job, Report, fingerprint, run_jobs
from data_prep.raw import AUDIO_SUFFIXES, PACK_NAME, VIDEO_SUFFIXES
from data_prep.rows import Row, read_rows
from data_prep.tables import add, table, total
from data_prep.tars import Members, write_json, write_jsonl, write_tar
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import MediaInfo, probe
from ltx2_train.media.video import VideoFile
from ltx2_train.media.write import write_flac, write_mp4

SEGMENT_CRF = 10  # x264 quality of re-encoded segments: near lossless
CHUNK_FRAMES = 32  # of a segment held at once


@dataclass(kw_only=True, slots=True)
class PackConfig:
    """How files become raw records."""

    max_seconds: float = 20.0
    """Longest clip stored as it is; longer ones are cut into segments of this many seconds."""
    min_seconds: float = 0.0
    """Shortest segment that is kept at the end of a long file, in seconds; what is shorter is counted as remainder."""
    clips_per_shard: int = 256
    """Files per raw shard."""
    empty_caption: EmptyCaption = EmptyCaption.DROP
    """What becomes of a clip without a caption."""
    buckets: list[PixelBucket] = field(default_factory=list)
    """Where given, clips and segments too short for all of them are dropped."""
    decode: bool = True
    """Decode every file once: finds damage inside frames, which the containers' tables do not show."""

    def __post_init__(self) -> None:
        if not self.max_seconds > 0:
            raise ConfigError(f"max_seconds: {self.max_seconds}; need more than 0")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ConfigError(f"min_seconds: {self.min_seconds}; need 0 to max_seconds ({self.max_seconds})")
        if self.clips_per_shard < 1:
            raise ConfigError(f"clips_per_shard: {self.clips_per_shard}; need at least 1")


def pack(source: Path, out: Path, config: PackConfig, workers: int = 1, replace: bool = False) -> dict[str, int]:
    """Pack the files that `source` names into shards under `out`; returns the counts. See the module's text.

    `replace`: remove the shards of other files from `out`, where they are else an error.
    """
    rows = read_rows(source, out)
    size = config.clips_per_shard
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    jobs = [_job(f"shard-{i:06d}", group, source) for i, group in enumerate(groups)]
    reports = run_jobs(pack_shard, jobs, out, _settings(config), config, workers, replace, finished_by=(PACK_NAME,))
    counts = total([{"files": len(rows), "kept": 0}, *(report.counts for report in reports)])
    write_jsonl(out / DROPPED_NAME, (row for report in reports for row in report.dropped))
    shards = {name: digest for report in reports for name, digest in report.outputs.items()}
    write_json(out / PACK_NAME, {"shards": shards, "counts": counts, "settings": _settings(config)})
    return counts


def _job(name: str, rows: list[Row], source: Path) -> Job:
    mark = fingerprint([_identity(row) for row in rows])
    return Job(name, mark, rows, (f"{name}.tar",), str(source.resolve()))


def _settings(config: PackConfig) -> dict[str, Any]:
    return {
        "max_seconds": config.max_seconds,
        "min_seconds": config.min_seconds,
        "clips_per_shard": config.clips_per_shard,
        "empty_caption": config.empty_caption.value,
        "buckets": ";".join(map(str, config.buckets)),
        "decode": config.decode,
    }


def _identity(row: Row) -> list[Any]:
    """What a finished shard depends on: the metadata of a clip, and size and time of its files."""
    files = [path for path in (row.video, row.audio) if path is not None and path.exists()]
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [row.key, row.source, row.caption, row.truth, row.fault, states]


# --- one shard ---


def pack_shard(job: Job, directory: Path, config: PackConfig) -> Report:
    """Write the raw shard of a group of files."""
    counts: dict[str, int] = {}
    dropped: list[dict[str, str]] = []
    keys: list[str] = []

    def records() -> Iterator[tuple[str, Members]]:
        for row in job.payload:
            try:
                for key, members in pack_clip(row, config, counts):
                    keys.append(key)
                    add(counts, "kept")
                    yield key, members
            except DataError as error:
                add(counts, f"dropped_{drop_reason(error)}")
                dropped.append(drop(row.source, drop_reason(error), str(error)))

    digest = write_tar(directory / f"{job.name}.tar", records())
    if not keys:
        (directory / f"{job.name}.tar").unlink()
    return Report({f"{job.name}.tar": digest} if keys else {}, counts, dropped, keys)


def pack_clip(row: Row, config: PackConfig, counts: dict[str, int]) -> Iterator[tuple[str, Members]]:
    """The raw records of one file: itself, or its segments. Raises `Dropped` with the reason."""
    if row.fault is not None:
        raise Dropped(*row.fault)
    if not row.caption and config.empty_caption is EmptyCaption.DROP:
        raise Dropped("empty_caption", "no caption; --empty-caption=keep packs such clips for the null context")
    video, audio = _inspect(row, config)
    shown = video if video is not None and video.has_video else None
    heard = audio or (video if video is not None and video.has_audio else None)
    whole = shown or heard
    if whole is None:
        raise Dropped("no_video_and_no_audio", f"{row.source}: neither")
    if shown is not None and config.buckets and choose(config.buckets, shown.width, shown.height, shown.frames) is None:
        shortest = min(bucket.frames for bucket in config.buckets)
        raise Dropped("too_short", f"{shown.frames} frames; the shortest bucket has {shortest}")
    if shown is not None and shown.is_variable:
        add(counts, "variable_frame_rate")
    if (whole.duration <= config.max_seconds and not (shown is not None and shown.is_variable)) or whole.is_image:
        yield row.key, _whole(row, shown, heard)
    else:
        add(counts, "files_cut_or_resampled")
        yield from _segments(row, shown, heard, config, counts)


def _inspect(row: Row, config: PackConfig) -> tuple[MediaInfo | None, MediaInfo | None]:
    """What the video and the audio file hold. Raises `Dropped` for a damaged one."""
    infos: list[MediaInfo | None] = []
    for path in (row.video, row.audio):
        try:
            infos.append(None if path is None else probe(path, decode=config.decode))
        except DataError as error:
            raise Dropped(drop_reason(error), str(error)) from error
    if infos[1] is not None and not infos[1].has_audio:
        raise Dropped("no_audio_in_audio_file", f"{row.audio}: no audio track")
    return infos[0], infos[1]


def _whole(row: Row, shown: MediaInfo | None, heard: MediaInfo | None) -> Members:
    """The record of a file stored byte for byte; sound that has no suffix of a sound file becomes FLAC."""
    members = Members()
    facts: dict[str, Any] = {"start": 0.0, "recoded": False, "variable_frame_rate": False}
    if shown is not None and row.video is not None:
        members[_picture_suffix(row.video)] = row.video.read_bytes()
    sound = row.audio or (row.video if shown is None else None)  # else it lies in the picture's file
    if heard is not None and sound is not None:
        if sound.suffix.lower() in AUDIO_SUFFIXES and not heard.has_video:
            members[sound.suffix[1:].lower()] = sound.read_bytes()
        else:
            members["flac"] = _sound_segment(sound, heard, 0.0, heard.audio_end)
            facts |= {"recoded": True} | _sound_bounds(heard, 0.0, heard.audio_end)
    return members | {"json": _json(row, shown, heard, facts)}


def _picture_suffix(path: Path) -> str:
    """The member's name. Raises `Dropped` for one that would not be taken for a picture when it is encoded."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise Dropped("unknown_suffix", f"{path}: videos and images end in {' '.join(VIDEO_SUFFIXES)}. Convert it")
    return path.suffix[1:].lower()


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a file is cut: piece i starts at `i * seconds`."""

    seconds: float
    frames: int  # in all, on the constant grid; 0 without a picture
    step: int  # frames of a whole piece
    fps: float
    duration: float

    @classmethod
    def of(cls, shown: MediaInfo | None, heard: MediaInfo | None, max_seconds: float) -> "_Cut":
        if shown is None:
            assert heard is not None
            return cls(max_seconds, 0, 0, 0.0, heard.audio_end)
        step = max(1, int(max_seconds * shown.fps))
        return cls(step / shown.fps, shown.frames_at(shown.fps), step, shown.fps, shown.duration)

    def pieces(self) -> Iterator[tuple[int, int, float, float]]:
        """(number, frames, start in seconds, length in seconds) of each piece; the last one may be shorter."""
        count = -(-self.frames // self.step) if self.step else -int(-self.duration // self.seconds)
        for piece in range(count):
            frames = min(self.step, self.frames - piece * self.step)
            start = piece * self.seconds
            yield piece, frames, start, frames / self.fps if self.step else min(self.seconds, self.duration - start)


def _segments(
    row: Row, shown: MediaInfo | None, heard: MediaInfo | None, config: PackConfig, counts: dict[str, int]
) -> Iterator[tuple[str, Members]]:
    """The records of a file cut at multiples of `max_seconds`; a last piece that is too short is counted."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        picture = stack.enter_context(VideoFile(row.video, info=shown)) if shown is not None and row.video else None
        for piece, frames, start, length in _Cut.of(shown, heard, config.max_seconds).pieces():
            if _is_remainder(shown, frames, length, config):
                name = "remainder_frames" if shown is not None else "remainder_audio_milliseconds"
                add(counts, name, frames or round(1000 * length))
                continue
            members = Members()
            if picture is not None:
                members["mp4"] = _picture_segment(Path(folder) / "segment.mp4", picture, start, frames)
            sounds = heard is not None and heard.missing_audio(start, length) < length
            if heard is not None and sounds:
                sound = row.audio or row.video or Path()
                members["flac"] = _sound_segment(sound, heard, start, length)
            facts = _segment_facts(shown, heard if sounds else None, start, length)
            yield f"{row.key}-{piece:04d}", members | {"json": _json(row, shown, heard if sounds else None, facts)}


def _picture_segment(path: Path, picture: VideoFile, start: float, frames: int) -> bytes:
    fps = picture.info.fps
    write_mp4(path, _chunks(picture, start, frames, fps), fps, crf=SEGMENT_CRF)
    return path.read_bytes()


def _sound_segment(sound: Path, heard: MediaInfo, start: float, length: float) -> bytes:
    waveform, rate = read_audio(sound, start=start, duration=length, info=heard)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "segment.flac"
        write_flac(path, waveform, rate)
        return path.read_bytes()


def _is_remainder(shown: MediaInfo | None, frames: int, seconds: float, config: PackConfig) -> bool:
    if seconds < config.min_seconds:
        return True
    return (
        shown is not None and bool(config.buckets) and choose(config.buckets, shown.width, shown.height, frames) is None
    )


def _segment_facts(shown: MediaInfo | None, heard: MediaInfo | None, start: float, length: float) -> dict[str, Any]:
    facts: dict[str, Any] = {"start": round(start, 6), "recoded": True}
    facts["variable_frame_rate"] = shown is not None and shown.is_variable
    return facts | (_sound_bounds(heard, start, length) if heard is not None else {})


def _sound_bounds(heard: MediaInfo, start: float, length: float) -> dict[str, Any]:
    """Where there truly is sound in a segment, whose file is padded to its length; in seconds from its start."""
    bounds = {"audio_start": max(0.0, heard.audio_start - start), "audio_end": min(length, heard.audio_end - start)}
    gaps = [(max(0.0, begin - start), min(length, end - start)) for begin, end in heard.audio_gaps]
    inside = [[round(begin, 6), round(end, 6)] for begin, end in gaps if begin < end]
    return {name: round(time, 6) for name, time in bounds.items()} | ({"audio_gaps": inside} if inside else {})


def _chunks(picture: VideoFile, start: float, count: int, fps: float) -> Iterator[Any]:
    """Frames of a segment in pieces, with even height and width as H.264 needs them."""
    for at in range(0, count, CHUNK_FRAMES):
        frames = picture.frames(start + at / fps, min(CHUNK_FRAMES, count - at), fps)
        yield frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]


def _json(row: Row, shown: MediaInfo | None, heard: MediaInfo | None, facts: dict[str, Any]) -> bytes:
    fields: dict[str, Any] = {"caption": row.caption, "source": row.source, "truth": row.truth, **facts}
    if shown is not None:
        fields |= {"fps": shown.fps, "width": shown.width, "height": shown.height, "video_codec": shown.video_codec}
    if heard is not None:
        fields |= {"sample_rate": heard.sample_rate, "channels": heard.channels, "audio_codec": heard.audio_codec}
    return json.dumps(fields, ensure_ascii=False).encode()


def _add_options(parser: ArgumentParser) -> None:
    defaults = PackConfig()
    parser.add_argument("source", type=Path, help="folder of media files, or a .csv, .json or .jsonl file")
    parser.add_argument("--out", type=Path, required=True, help="directory for the raw shards")
    parser.add_argument("--max-seconds", type=float, default=defaults.max_seconds, help="longer files are cut")
    parser.add_argument("--min-seconds", type=float, default=defaults.min_seconds, help="shortest last segment kept")
    parser.add_argument("--clips-per-shard", type=int, default=defaults.clips_per_shard, help="files per raw shard")
    parser.add_argument("--buckets", default="", help='"WxHxF;WxHxF": drop what is too short for all of them')
    policies = [policy.value for policy in EmptyCaption]
    parser.add_argument("--empty-caption", choices=policies, default="drop", help="clips without a caption")
    text = "decode every file once to find damage inside frames"
    parser.add_argument("--decode", action=BooleanOptionalAction, default=True, help=text)
    console.add_replace(parser)
    console.add_workers(parser)


def main(argv: Sequence[str] | None = None) -> None:
    parser = console.parser("pack", __doc__ or "", "python -m data_prep.pack world/metadata.jsonl --out raw")
    _add_options(parser)
    options = parser.parse_args(argv)
    config = PackConfig(
        max_seconds=options.max_seconds,
        min_seconds=options.min_seconds,
        clips_per_shard=options.clips_per_shard,
        empty_caption=EmptyCaption(options.empty_caption),
        buckets=parse_buckets(options.buckets) if options.buckets else [],
        decode=options.decode,
    )
    counts = pack(options.source, options.out, config, options.workers, options.replace)
    print(table(f"packed into {options.out}", counts))
    if any(name.startswith("dropped") for name in counts):
        print(f"each dropped file and its reason: {options.out / DROPPED_NAME}")


if __name__ == "__main__":
    console.run(main)

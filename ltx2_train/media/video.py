"""Frames in: exact, upright, at a constant rate, resized while they are decoded.

decord reads first (fast and frame-exact); PyAV reads what decord cannot, such as AV1.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.errors import DataError
from ltx2_train.media.probe import MediaInfo, Source, file_or_bytes, open_image, opened, picture_stream, probe

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 28  # of source frames held at once while resizing

Frames = NDArray[np.uint8]  # (F, H, W, 3)
Places = NDArray[np.int64]


class FrameReader(Protocol):
    """Random access to the frames of one file, in the order of their time stamps."""

    def read(self, indices: Places) -> Frames:
        """The frames at these places, which ascend and may repeat."""

    def close(self) -> None: ...


class VideoFile:
    """An open video whose frames are read by time. Use it as a context manager, or `read_video` for one clip."""

    def __init__(self, source: Source, *, info: MediaInfo | None = None, name: str | None = None) -> None:
        self.info = info or probe(source, name=name)
        if not self.info.has_video:
            raise DataError(f"{self.info.name}: no video track. Give a file with video, or leave the column empty")
        self._source = source
        self._reader: FrameReader | None = None

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._reader is not None:
            self._reader.close()

    def frames(self, start: float, count: int, fps: float, size: tuple[int, int] | None = None) -> Frames:
        """(count, H, W, 3): the frames shown nearest to `start + i / fps` seconds, resized to `size` = (width, height).

        `size` is filled by covering it and cropping the centre. Raises `DataError` when the file cannot be decoded.
        """
        indices = nearest_frames(self.info, start, count, fps)
        step = max(1, CHUNK_BYTES // (self.info.width * self.info.height * 3))
        parts = [self._fitted(self._read(indices[at : at + step]), size) for at in range(0, count, step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read(self, indices: Places) -> Frames:
        """Frames at these places, by decord; by PyAV from the first file on that decord fails at."""
        self._reader = self._reader or _open_reader(self._source, self.info)
        try:
            return self._reader.read(indices)
        except DecordError as error:
            log.info("%s: decord fails (%s); PyAV reads it", self.info.name, error)
            self._reader.close()
            self._reader = _PyavReader(self._source, self.info)
            return self._reader.read(indices)

    def _fitted(self, frames: Frames, size: tuple[int, int] | None) -> Frames:
        """`frames` at `size`, or at the size they are shown at."""
        shown = (self.info.width, self.info.height)
        if size is None:
            return frames if frames.shape[2:0:-1] == shown else cover(frames, shown, shown)
        return cover(frames, shown, size)


def read_video(
    source: Source,
    *,
    start: float = 0.0,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    info: MediaInfo | None = None,
    name: str | None = None,
) -> tuple[Tensor, float]:
    """The clip (3, F, H, W) fp32 in [-1, 1] and its frames per second.

    `start` is in seconds from the first frame, `frames` defaults to all that follow, `fps` to the file's own (mean) rate,
    `size` (width, height) to its own. Raises `DataError` for a damaged or truncated file, naming it.
    """
    with VideoFile(source, info=info, name=name) as video:
        rate = fps or video.info.fps
        count = frames or video.info.frames_at(rate) - round(start * rate)
        return to_tensor(video.frames(start, count, rate, size)), rate


def to_tensor(frames: Frames) -> Tensor:
    """Frames (F, H, W, 3) uint8 to (3, F, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def to_frames(video: Tensor) -> Frames:
    """(3, F, H, W) in [-1, 1] to frames (F, H, W, 3) uint8; out-of-range values are clamped."""
    pixels = video.detach().float().add(1.0).mul(127.5).round_().clamp_(0, 255)
    return np.ascontiguousarray(pixels.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy())


def nearest_frames(info: MediaInfo, start: float, count: int, fps: float) -> NDArray[np.int64]:
    """Places of the frames shown nearest to `start + i / fps` seconds, i < count. Raises `DataError` past the ends."""
    first, available = round(start * fps), info.frames_at(fps)
    if count < 1 or first < 0 or first + count > available:
        raise DataError(f"{info.name}: {count} frames from {start:.2f} s asked; it has {available} at {fps:.3f} fps")
    if info.is_image or (fps == info.fps and not info.is_variable):
        return first + np.arange(count)
    times = start + np.arange(count) / fps
    after = np.searchsorted(info.times, times).clip(1, info.frames - 1)
    before_is_nearer = times - info.times[after - 1] <= info.times[after] - times
    return np.where(before_is_nearer, after - 1, after) if info.frames > 1 else np.zeros(count, dtype=np.int64)


def cover(frames: Frames, shown: tuple[int, int], size: tuple[int, int]) -> Frames:
    """Frames resized (bicubic, antialiased) to cover `size` = (width, height), then cropped to it at the centre.

    `shown` is the (width, height) at which the frames are to be seen: it differs from theirs where pixels are not square.
    """
    (width, height), (to_width, to_height) = shown, size
    if to_width * height >= to_height * width:
        scaled = (height * to_width // width, to_width)
    else:
        scaled = (to_height, width * to_height // height)
    if frames.shape[1:3] != scaled:
        planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(planes, size=scaled, mode="bicubic", antialias=True)
        frames = resized.permute(0, 2, 3, 1).numpy()
    top, left = (scaled[0] - to_height) // 2, (scaled[1] - to_width) // 2
    return np.ascontiguousarray(frames[:, top : top + to_height, left : left + to_width])


def _open_reader(source: Source, info: MediaInfo) -> FrameReader:
    """The reader for a file: decord, and PyAV where decord fails or counts other frames than the container shows."""
    if info.is_image:
        return _ImageReader(source, info)
    if info.video_codec != "av1":
        try:
            reader = _DecordReader(source, info)
            if reader.frames == info.frames:
                return reader
            log.info("%s: decord counts %d frames, the container %d", info.name, reader.frames, info.frames)
        except (DecordError, ImportError) as error:
            log.info("%s: decord cannot read it (%s); PyAV does", info.name, error)
    return _PyavReader(source, info)


class _ImageReader:
    def __init__(self, source: Source, info: MediaInfo) -> None:
        self._frame = np.asarray(open_image(source, info.name))

    def read(self, indices: Places) -> Frames:
        return np.repeat(self._frame[None], len(indices), axis=0)

    def close(self) -> None:
        self._frame = self._frame[:0]


class DecordError(Exception):
    """decord cannot open or decode a file. PyAV may, or says what is wrong with it."""


class _DecordReader:
    """decord turns frames upright by itself."""

    def __init__(self, source: Source, info: MediaInfo) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._file = file_or_bytes(source)  # decord reads from it as long as it lives
        with _decord_errors():
            self._video = decord.VideoReader(self._file, ctx=decord.cpu(0), num_threads=1)
        self.frames = len(self._video)

    def read(self, indices: Places) -> Frames:
        with _decord_errors():
            return self._video.get_batch(indices.tolist()).asnumpy()

    def close(self) -> None:
        del self._video


@contextmanager
def _decord_errors() -> Iterator[None]:
    """decord's own errors, which are plain exceptions or RuntimeErrors of several lines, as a `DecordError` of one."""
    import decord

    try:
        yield
    except (RuntimeError, decord.base.DECORDError) as error:
        raise DecordError(str(error).strip().splitlines()[-1] if str(error) else "no message") from error


class _PyavReader:
    """Decodes forward and starts again from the beginning for an earlier frame: exact for every codec and container."""

    def __init__(self, source: Source, info: MediaInfo) -> None:
        self._source, self._info = source, info
        self._context: Any = None
        self._restart()

    def _restart(self) -> None:
        self.close()
        self._context = opened(self._source, self._info.name)
        container = self._context.__enter__()
        self._decoder = container.decode(picture_stream(container))
        self._place, self._frame = -1, None

    def read(self, indices: Places) -> Frames:
        return np.stack([self._at(int(i)) for i in indices])

    def _at(self, index: int) -> Frames:
        if index < self._place:
            self._restart()
        while self._place < index:
            self._frame = self._next()
            self._place += 1
        pixels = self._frame.to_ndarray(format="rgb24")  # type: ignore[attr-defined]
        return np.rot90(pixels, self._info.rotation // 90)

    def _next(self) -> Any:
        import av

        try:
            return next(self._decoder)
        except StopIteration:
            counts = f"{self._info.frames} frames expected, {self._place + 1} decoded"
            raise DataError(f"{self._info.name}: {counts}. Repair it or leave it out") from None
        except av.error.FFmpegError as error:
            what = f"frame {self._place + 1} cannot be decoded ({error})"
            raise DataError(f"{self._info.name}: {what}. Repair it or leave it out") from error

    def close(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

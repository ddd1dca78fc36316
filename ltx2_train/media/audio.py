"""Sound in, through PyAV, on the time axis of the picture: sample 0 belongs to the first video frame."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.errors import DataError
from ltx2_train.media.probe import JITTER, MediaInfo, Source, opened, probe, sound_stream

PREROLL = 0.25  # seconds decoded before a window, so that the decoder has settled when it begins
INEXACT_FORMATS = (
    "mp3",
    "aac",
)  # bare streams: after a seek their time stamps are guesses, so they are never sought in
SMALL_SEEK = 1.0  # seconds below which decoding from the start is cheaper than a seek


def read_audio(
    source: Source,
    *,
    start: float = 0.0,
    duration: float | None = None,
    info: MediaInfo | None = None,
    name: str | None = None,
) -> tuple[Tensor, int]:
    """The waveform (channels, N) fp32 in [-1, 1] and its rate in Hz, all channels, not resampled.

    The window begins `start` seconds after the first video frame and lasts `duration` (default: to the end of the sound);
    N is exactly `round(duration * rate)`. Where the track has no sound (it starts later, ends earlier, has a gap) stand
    zeros; `MediaInfo.missing_audio` says how much that is. Raises `DataError` for a file without audio or a damaged one.
    """
    info = info or probe(source, name=name)
    if not info.has_audio:
        raise DataError(f"{info.name}: no audio track. Treat the clip as one without audio")
    rate = info.sample_rate
    length = round((info.audio_end - start if duration is None else duration) * rate)
    window = np.zeros((info.channels, max(0, length)), dtype=np.float32)
    with opened(source, info.name) as container:
        _fill(window, container, sound_stream(container), info, start)
    return torch.from_numpy(window), rate


def _fill(window: NDArray[np.float32], container: Any, stream: Any, info: MediaInfo, start: float) -> None:
    """Write the decoded samples of the stream into `window` (channels, N) at the places their time stamps name."""
    rate, begin = info.sample_rate, info.origin + start
    if start > SMALL_SEEK and container.format.name not in INEXACT_FORMATS:
        container.seek(int((begin - PREROLL) / float(stream.time_base)), stream=stream)
    cursor: int | None = None  # where the next sample belongs
    for frame in container.decode(stream):
        if frame.sample_rate != rate or frame.layout.nb_channels != info.channels:
            raise DataError(f"{info.name}: the audio changes from {rate} Hz, {info.channels} channels to "
                            f"{frame.sample_rate} Hz, {frame.layout.nb_channels}. Re-encode it")  # fmt: skip
        if frame.pts is not None:
            place = round((float(frame.pts * frame.time_base) - begin) * rate)
            cursor = place if cursor is None or abs(place - cursor) > JITTER * rate else cursor
        cursor = cursor or 0
        if cursor >= window.shape[1]:
            return
        samples = to_float(frame)
        first, last = max(0, cursor), min(window.shape[1], cursor + samples.shape[1])
        if last > first:
            window[:, first:last] = samples[:, first - cursor : last - cursor]
        cursor += samples.shape[1]


def to_float(frame: Any) -> NDArray[np.float32]:
    """Samples of a PyAV frame as (channels, N) fp32 in [-1, 1], whatever its format and layout."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32)

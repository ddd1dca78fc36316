"""Media files out: H.264 + AAC mp4, wav, flac and png. Every file appears whole or not at all."""

import os
import tempfile
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.errors import DataError
from ltx2_train.media.probe import MAX_DENOMINATOR
from ltx2_train.media.video import to_frames

LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
BT601 = {"colorspace": 6, "color_primaries": 6, "color_trc": 6, "color_range": 1}  # what the conversion from RGB uses
AUDIO_BIT_RATE = 128_000
X264 = {
    "x264-params": "mbtree=0"
}  # with the macroblock tree, x264 now and then gives other bytes for the same frames (tried)
AAC = {"aac_coder": "fast"}  # on clicks it is faster and, measured, a thousand times closer than the default search
AAC_RATES = (
    48000,
    44100,
    32000,
    24000,
    22050,
    16000,
    12000,
    11025,
    8000,
    64000,
    88200,
    96000,
)  # Hz, as it can be written
PARTIAL = ".partial"  # suffix of files that are being written


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    os.chmod(partial, 0o644)
    try:
        yield Path(partial)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def write_mp4(
    path: str | Path,
    video: Tensor | NDArray[np.uint8] | Iterable[NDArray[np.uint8]],
    fps: float | Fraction,
    waveform: Tensor | NDArray[np.float32] | None = None,
    sample_rate: int = 16000,
    *,
    crf: int = 18,
    preset: str = "veryfast",
) -> None:
    """Write H.264 (yuv420p, x264 quality `crf`: 0 is lossless, 18 looks so) and AAC, playable while it loads.

    `video` is (3, F, H, W) in [-1, 1], frames (F, H, W, 3) uint8, or pieces of such frames, with even H and W; `waveform`
    (channels, N) in [-1, 1], None for a file without an audio track. Raises `DataError` for other shapes or values that
    are not finite.
    """
    import av

    pieces = iter([to_frames(_finite(video, "video"))] if isinstance(video, Tensor) else _pieces(video))
    frames = next(pieces)
    if frames.ndim != 4 or frames.shape[3] != 3 or not len(frames) or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise DataError(f"{path}: frames {tuple(frames.shape)}; H.264 needs (F >= 1, even H, even W, 3)")
    rate = Fraction(fps).limit_denominator(MAX_DENOMINATOR)
    options = {"movflags": "+faststart"}
    with atomic(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        picture = container.add_stream("libx264", rate=rate, options={"preset": preset, "crf": str(crf), **X264})
        picture.height, picture.width, picture.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        picture.codec_context.thread_count = 1
        for name, value in BT601.items():
            setattr(picture.codec_context, name, value)
        sound = None
        if waveform is not None:
            samples = _samples(waveform, path)
            sound = container.add_stream("aac", rate=sample_rate, layout=LAYOUTS[len(samples)], options=AAC)
            sound.bit_rate = AUDIO_BIT_RATE
        for packet in _encoded_frames(picture, chain([frames], pieces), rate):
            container.mux(packet)
        if sound is not None:
            for packet in _encoded_samples(sound, samples, sample_rate):
                container.mux(packet)


def write_flac(path: str | Path, waveform: Tensor | NDArray[np.float32], sample_rate: int) -> None:
    """Write (channels, N) in [-1, 1] as 24-bit FLAC: up to 8 channels."""
    import av

    samples = _samples(waveform, path)
    whole = (samples.astype(np.float64) * (2**31 - 1)).clip(-(2**31), 2**31 - 1).astype(np.int32)
    with atomic(path) as partial, av.open(str(partial), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=sample_rate, layout=LAYOUTS[len(samples)], format="s32")
        for packet in _encoded_samples(stream, whole.T.reshape(1, -1), sample_rate, "s32", LAYOUTS[len(samples)]):
            container.mux(packet)


def write_wav(path: str | Path, waveform: Tensor | NDArray[np.float32], sample_rate: int) -> None:
    """Write (channels, N) in [-1, 1] as 16-bit PCM; louder values are clipped."""
    samples = _samples(waveform, path)
    with atomic(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").T.tobytes())


def write_png(path: str | Path, image: Tensor | NDArray[np.uint8]) -> None:
    """Write (3, H, W) in [-1, 1] or (H, W, 3) uint8 as an sRGB picture."""
    from PIL import Image

    pixels = to_frames(_finite(image, "image")[:, None])[0] if isinstance(image, Tensor) else image
    with atomic(path) as partial:
        Image.fromarray(pixels).save(partial, format="png")


def _pieces(video: NDArray[np.uint8] | Iterable[NDArray[np.uint8]]) -> Iterable[NDArray[np.uint8]]:
    return [video] if isinstance(video, np.ndarray) else video


def _encoded_frames(stream: Any, pieces: Iterable[NDArray[np.uint8]], rate: Fraction) -> Iterator[Any]:
    import av

    for place, pixels in enumerate(chain.from_iterable(pieces)):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = place, 1 / rate
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _encoded_samples(
    stream: Any, samples: NDArray[Any], rate: int, sample_format: str = "fltp", layout: str | None = None
) -> Iterator[Any]:
    import av

    layout = layout or LAYOUTS[len(samples)]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=sample_format, layout=layout)
    # Without a time stamp the encoder's priming samples are not marked in the file, and the sound comes late by them.
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    yield from stream.encode(frame)
    yield from stream.encode(None)


def _samples(waveform: Tensor | NDArray[np.float32], path: str | Path) -> NDArray[np.float32]:
    samples = waveform.detach().float().cpu().numpy() if isinstance(waveform, Tensor) else waveform
    if samples.ndim != 2 or len(samples) not in LAYOUTS or not samples.shape[1] or not np.isfinite(samples).all():
        raise DataError(f"{path}: waveform {samples.shape}; need finite samples (1 to {max(LAYOUTS)} channels, N >= 1)")
    return samples


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{name}: NaN or infinity in the pixels. Do not write what was not generated well")
    return tensor

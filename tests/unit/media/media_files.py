"""Small media files of every kind that the readers must cope with."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

FPS, RATE = 24, 16000
CLICKS = (0.2, 0.55)  # s


def ramp_frames(count: int = 25, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Frames (F, H, W, 3) whose mean brightness is their number times 8: each one can be told from the others."""
    frames = np.full((count, height, width, 3), 16, dtype=np.uint8)
    frames += (np.arange(count, dtype=np.uint8) * 8)[:, None, None, None]
    frames[:, :8, :8] = 250  # which corner is which
    return frames


def click_waveform(seconds: float = 25 / FPS, rate: int = RATE, channels: int = 2) -> NDArray[np.float32]:
    """Decaying tones that begin at `CLICKS`: (channels, N)."""
    time = np.arange(round(seconds * rate)) / rate
    sound = np.zeros_like(time)
    for start in CLICKS:
        since = np.maximum(time - start, 0)
        sound += (time >= start) * np.exp(-since / 0.03) * np.cos(2 * np.pi * 1050 * since)
    return np.repeat(0.5 * sound[None], channels, axis=0).astype(np.float32)


def encode_frames(
    path: Path,
    frames: NDArray[np.uint8],
    *,
    codec: str = "libx264",
    stamps: Sequence[int] | None = None,
    base: Fraction = Fraction(1, FPS),
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """A file with a video track alone, whose frames have the given time stamps in units of `base`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base, stream.codec_context.thread_count = base, 1
        if rotation:
            stream.set_display_rotation(rotation)
        for place, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = stamps[place] if stamps is not None else place, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def encode_sound(
    path: Path,
    waveform: NDArray[np.float32],
    *,
    codec: str = "pcm_s16le",
    rate: int = RATE,
    hole: tuple[float, float] = (0, 0),
) -> Path:
    """A file of (channels, N) samples in blocks of 20 ms, without the blocks that begin inside `hole` (s)."""
    samples = waveform if codec == "aac" else (waveform * 32767).astype(np.int16)
    layout, sample_format = {1: "mono", 2: "stereo"}[len(samples)], "fltp" if codec == "aac" else "s16"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        for at in range(0, samples.shape[1], rate // 50):
            if not hole[0] <= at / rate < hole[1]:
                block = samples[:, at : at + rate // 50]
                planes = np.ascontiguousarray(block if codec == "aac" else block.T.reshape(1, -1))
                frame = av.AudioFrame.from_ndarray(planes, format=sample_format, layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def flip_bits(content: bytes, count: int = 40) -> bytes:
    """The bytes of an mp4 with bits flipped inside its media data."""
    damaged, rng = bytearray(content), np.random.default_rng(0)
    for place in rng.integers(content.find(b"mdat") + 64, len(content), count):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)

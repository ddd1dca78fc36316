"""Which codecs and text encoder turn media and captions into what a shard holds: the embedded ones, or released ones."""

import multiprocessing
from dataclasses import dataclass
from functools import lru_cache

import torch

from ltx2_train.cli.contexts import context_encoder
from ltx2_train.codecs import AudioCodec, VideoCodec, build_audio_codec, build_video_codec
from ltx2_train.text import Quantisation, TextEncoder, build_text_encoder


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """Which codecs and text encoder a process builds, and for which device."""

    video: str
    audio: str
    vocoder: str | None
    text: str
    text_weights: str | None
    text_dtype: torch.dtype | None
    connectors: str | None  # None: features are stored
    quantisation: Quantisation
    widths: tuple[int | None, int | None]
    device: str
    video_dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Codecs:
    """What turns media into latents and captions into features. Each process builds its own once."""

    video: VideoCodec
    audio: AudioCodec
    text: TextEncoder
    device: str = "cpu"


def process_device(device: str) -> str:
    """`device`, or for "cuda" in a worker process the GPU of its number, in turn."""
    if device != "cuda" or multiprocessing.parent_process() is None:
        return device
    number = int(multiprocessing.current_process().name.rpartition("-")[2])
    return f"cuda:{(number - 1) % torch.cuda.device_count()}"


@lru_cache(maxsize=1)
def build_codecs(choice: CodecChoice) -> Codecs:
    """Codecs and text encoder of a process. The weights of a released text encoder are read with its first caption."""
    text = build_text_encoder(
        choice.text,
        *choice.widths,
        weights=choice.text_weights,
        device=choice.device,
        dtype=choice.text_dtype,
        quantisation=choice.quantisation,
    )
    if choice.connectors is not None:
        text = context_encoder(text, choice.connectors, choice.device)
    return Codecs(
        build_video_codec(choice.video, device=choice.device, dtype=choice.video_dtype),
        build_audio_codec(choice.audio, choice.vocoder, device=choice.device),
        text,
        choice.device,
    )

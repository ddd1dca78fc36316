"""How raw records become latent records: the settings, the codecs they ask for, and what of them stands in the manifest."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from data_prep.buckets import PixelBucket
from data_prep.codec_choice import CodecChoice, Codecs, process_device
from data_prep.dropped import EmptyCaption
from data_prep.raw import KEY_MAP
from data_prep.splits import HoldoutBy, code_version
from ltx2_train.codecs import EMBEDDED as EMBEDDED_CODECS
from ltx2_train.errors import ConfigError
from ltx2_train.geometry import AUDIO_STEPS_PER_SECOND
from ltx2_train.record import TextCache
from ltx2_train.text import EMBEDDED as EMBEDDED_TEXT
from ltx2_train.text import Quantisation

LATENT_STEP = 1 / AUDIO_STEPS_PER_SECOND  # s


class Dtype(StrEnum):
    """Of the tensors in the latent shards."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def torch(self) -> torch.dtype:
        return {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}[self]


@dataclass(kw_only=True, slots=True)
class EncodeConfig:
    """How raw records become latent records. What changes them stands in the manifest."""

    buckets: list[PixelBucket]
    """Sizes that clips are brought to."""
    video_codec: str = "dct"
    """Name of the video codec, or the file or folder of a released one."""
    audio_codec: str = "dct"
    """Name of the audio codec, or the file or folder of a released one."""
    vocoder: str | None = None
    """The file or folder of a released vocoder, where it is not that of the audio codec. Encoding does not run it."""
    text_encoder: str = "hashed"
    """Name of the text encoder, or the local folder of the language model of a released one."""
    text_weights: str | None = None
    """The file or folder with the text projection of a released text encoder."""
    text_cache: TextCache = TextCache.FEATURES
    """What is stored of a caption: features, or the context behind the connectors."""
    connectors: str | None = None
    """The file or folder with the connectors, for text_cache=context; None: text_weights, one file with all."""
    text_quantisation: Quantisation = Quantisation.NONE
    """Of the released text encoder's language model."""
    video_text_width: int | None = None
    """Width of the text features beside the video; None: what the text encoder gives."""
    audio_text_width: int | None = None
    """Width of the text features beside the audio; None: what the text encoder gives."""
    fps: float | None = None
    """Frames per second that clips are brought to; None keeps each clip's own mean rate."""
    audio_tolerance: float = 0.25
    """Seconds by which sound may be shorter than its window and is padded; beyond, the window has no audio."""
    audio_only_seconds: float | None = None
    """Window length of records with sound alone, in seconds; None drops them."""
    empty_caption: EmptyCaption = EmptyCaption.KEEP
    """What becomes of records without a caption."""
    holdout: float = 0.0
    """Share of the source files, or captions, that is held out, by the hash of their names."""
    holdout_count: int = 0
    """Instead of a share: how many are held out."""
    holdout_by: HoldoutBy = HoldoutBy.SOURCE
    """Whether source files are held out, or captions."""
    key_map: dict[str, list[str]] = field(default_factory=dict)
    """Member extensions of `video`, `audio`, `caption` and `json`; what is not given keeps its default."""
    dtype: Dtype = Dtype.BF16
    """Of latents and text features on disk."""
    device: str = "cpu"
    """Where the codecs and the text encoder run; "cuda": a GPU for each process, in turn."""
    codec_dtype: Dtype | None = None
    """What a released video codec computes in; None: bf16 on a GPU, fp32 elsewhere. Audio is always fp32."""
    chunk_frames: int | None = None
    """Pixel frames that a released video codec takes at once, for clips that do not fit; None: the whole clip."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout: {self.holdout}; need a share in [0, 1)")
        if self.holdout_count < 0 or (self.holdout_count and self.holdout):
            raise ConfigError("holdout, holdout_count: give one of them, not negative")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"fps: {self.fps}; need more than 0")
        if self.audio_tolerance < 0:
            raise ConfigError(f"audio_tolerance: {self.audio_tolerance} s; need 0 or more")
        if self.audio_only_seconds is not None and self.audio_only_seconds < LATENT_STEP:
            raise ConfigError(f"audio_only_seconds: {self.audio_only_seconds}; need at least {LATENT_STEP}")
        if unknown := sorted(set(self.key_map) - set(KEY_MAP)):
            raise ConfigError(f"key_map: {unknown[0]!r} is none of {', '.join(KEY_MAP)}")
        if self.chunk_frames is not None and (self.chunk_frames < 8 or self.chunk_frames % 8):
            raise ConfigError(f"chunk_frames: {self.chunk_frames}; need a multiple of 8")
        if self.chunk_frames is not None and self.video_codec in EMBEDDED_CODECS:
            raise ConfigError(f"chunk_frames: the video codec {self.video_codec!r} takes whole clips; leave it away")
        if self.text_cache is TextCache.CONTEXT and self.text_weights is None and self.connectors is None:
            raise ConfigError("text_cache: a context needs connectors; give --connectors, the file that holds them")

    @property
    def video_dtype(self) -> Dtype | None:
        """What a released video codec computes in; the embedded one takes no notice."""
        if self.video_codec in EMBEDDED_CODECS:
            return None
        return self.codec_dtype or _dtype_on(self.device)

    @property
    def text_dtype(self) -> Dtype | None:
        """What a released text encoder computes in, and the connectors behind it; the embedded one takes no notice."""
        return None if self.text_encoder in EMBEDDED_TEXT else _dtype_on(self.device)


def choice_of(config: EncodeConfig) -> CodecChoice:
    """What `config` says of codecs and text encoder."""
    is_context = config.text_cache is TextCache.CONTEXT
    return CodecChoice(
        video=config.video_codec,
        audio=config.audio_codec,
        vocoder=config.vocoder,
        text=config.text_encoder,
        text_weights=config.text_weights,
        text_dtype=config.text_dtype.torch if config.text_dtype else None,
        connectors=config.connectors or config.text_weights if is_context else None,
        quantisation=config.text_quantisation,
        widths=(config.video_text_width, config.audio_text_width),
        device=process_device(config.device),
        video_dtype=config.video_dtype.torch if config.video_dtype else None,
    )


def _dtype_on(device: str) -> Dtype:
    return Dtype.BF16 if device.startswith("cuda") else Dtype.FP32


def settings_of(config: EncodeConfig, codecs: Codecs) -> dict[str, Any]:
    """What the latents depend on, as it stands in the manifest. Another value is another dataset.

    Files are known by what they hold and not by where they lie.
    """
    fields = asdict(config) | {
        "buckets": ";".join(map(str, config.buckets)),
        "dtype": config.dtype.value,
        "codec_dtype": config.video_dtype,
        "empty_caption": config.empty_caption.value,
        "holdout_by": config.holdout_by.value,
        "key_map": KEY_MAP | config.key_map,
        "crop": "centre",
        "resize": "bicubic, antialiased, covering",
        "video_codec": codecs.video.name,
        "audio_codec": codecs.audio.name,
        "text_encoder": codecs.text.name,
        "text_dtype": config.text_dtype,
        "text_cache": config.text_cache.value,
        "text_quantisation": config.text_quantisation.value,
        "video_text_width": codecs.text.video_width,
        "audio_text_width": codecs.text.audio_width,
        "code_version": code_version(),
    }
    for name in ("device", "chunk_frames", "vocoder", "text_weights", "connectors"):
        del fields[name]
    return fields


def released_paths(config: EncodeConfig) -> dict[str, str]:
    """Where the released components lie, by setting: for sampling, to find them again."""
    named = {name: getattr(config, name) for name in ("video_codec", "audio_codec", "text_encoder")}
    paths = {name: value for name, value in named.items() if value not in (*EMBEDDED_CODECS, *EMBEDDED_TEXT)}
    paths |= {name: getattr(config, name) for name in ("vocoder", "text_weights", "connectors")}
    return {name: str(Path(path).resolve()) for name, path in paths.items() if path is not None}

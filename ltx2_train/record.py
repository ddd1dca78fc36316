"""What a latent shard holds: the record of one sample, its bucket, and the manifest that says where it came from.

A record is two tar members that share a key:
`KEY.safetensors`  `video` (128, F, H, W), `audio` (8, T, 16), `video_text` (L, Wv), `audio_text` (L, Wa): only the valid
                   text rows, in order; `video` or `audio` is absent when the sample has none. Which rows these are, the
                   manifest says (`TextCache`)
`KEY.json`         caption, fps, source and whatever the preparation wants to keep (ground truth, crop, duration), and the
                   CRC-32 of the record, so that flipped bits are found when it is read
"""

import json
import zlib
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ltx2_train.errors import DataError

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.safetensors"
NULL_TEXT_NAME = "null_text.safetensors"
MANIFEST_VERSION = 1
UNKNOWN = "unknown:"  # in front of the name of a codec or text encoder that made a dataset and is no longer there
CHECKSUM = "crc32"  # field of the json member: of the safetensors bytes followed by the json without this field


class TextCache(StrEnum):
    """What the text rows of a dataset are."""

    FEATURES = "features"  # before the connectors, one row per text token
    CONTEXT = "context"  # behind them: the model is built without connectors


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Latent sizes that samples of one micro-batch share. `frames` = 0: no video; `audio_steps` = 0: no audio."""

    frames: int
    height: int
    width: int
    audio_steps: int

    @property
    def signature(self) -> str:
        """Which modalities are there: "va", "v" or "a"."""
        return "v" * (self.frames > 0) + "a" * (self.audio_steps > 0)

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of one sample over both modalities."""
        return self.video_tokens + self.audio_steps

    @property
    def schedule_tokens(self) -> int:
        """What a sampler's sigmas follow: the tokens of the picture, or of sound alone its steps."""
        return self.video_tokens or self.audio_steps

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}+{self.audio_steps}"


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Valid text rows of one caption, per modality: `video` (L, Wv), `audio` (L, Wa); see `TextCache`."""

    video: Tensor
    audio: Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One decoded record."""

    key: str
    video: Tensor | None
    audio: Tensor | None
    text: TextFeatures
    fps: float
    caption: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def bucket(self) -> Bucket:
        frames, height, width = self.video.shape[1:] if self.video is not None else (0, 0, 0)
        return Bucket(frames, height, width, self.audio.shape[1] if self.audio is not None else 0)


def encode_record(sample: Sample) -> dict[str, bytes]:
    """Tar members of a sample, by extension. The tensors keep their dtype."""
    tensors = {"video_text": sample.text.video, "audio_text": sample.text.audio}
    tensors |= {name: t for name, t in (("video", sample.video), ("audio", sample.audio)) if t is not None}
    saved = save_safetensors({name: t.contiguous() for name, t in tensors.items()})
    meta = {**sample.meta, "caption": sample.caption, "fps": sample.fps}
    return {"safetensors": saved, "json": _to_json({**meta, CHECKSUM: _checksum(saved, meta)})}


def _to_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()


def _checksum(tensors: bytes, fields: dict[str, Any]) -> int:
    return zlib.crc32(_to_json(fields), zlib.crc32(tensors))


def decode_record(key: str, tensors: bytes, meta: bytes) -> Sample:
    """The sample of two tar members. Raises `DataError` naming the key when bytes or values are damaged."""
    try:
        fields = json.loads(meta)
        stated = fields.pop(CHECKSUM, None)  # a record that another program wrote may have none
        if stated is not None and stated != _checksum(tensors, fields):
            raise ValueError("its checksum does not match its bytes")
        loaded = load_safetensors(tensors)
        sample = Sample(
            key=key,
            video=loaded.get("video"),
            audio=loaded.get("audio"),
            text=TextFeatures(loaded["video_text"], loaded["audio_text"]),
            fps=float(fields.pop("fps")),
            caption=fields.pop("caption"),
            meta=fields,
        )
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{key}: damaged record ({error}). Re-run data_prep.encode for its shard") from error
    _check_record(sample)
    return sample


def _check_record(sample: Sample) -> None:
    text = sample.text
    named = {"video": sample.video, "audio": sample.audio, "video_text": text.video, "audio_text": text.audio}
    for name, tensor in named.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise DataError(f"{sample.key}: {name} holds NaN or infinity. Re-run data_prep.encode for its shard")
    if sample.video is None and sample.audio is None:
        raise DataError(f"{sample.key}: neither video nor audio in the record")
    if text.video.shape[0] != text.audio.shape[0] or text.video.shape[0] < 1:
        raise DataError(
            f"{sample.key}: {len(text.video)} video and {len(text.audio)} audio text rows; need the same, >= 1"
        )


def _why_no_dataset(directory: Path) -> str:
    """What a directory without a manifest is instead, and what to do."""
    if below := sorted(path.parent for depth in ("*", "*/*") for path in directory.glob(f"{depth}/{MANIFEST_NAME}")):
        return f"{directory} is the folder around datasets. Name one of them: {', '.join(map(str, below[:8]))}"
    if any(any(directory.glob(trace)) for trace in ("*.tar*", "settings.json")):  # shards, or what was begun here
        return f"{directory} is no finished latent dataset. Run data_prep.encode to its end"
    return f"{directory} holds no latent dataset. Name one that data_prep.encode wrote: train or heldout in its --out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Where the shards of a dataset came from. Stored as `manifest.json`; a mismatch with a model or codec is refused."""

    video_codec: str  # name and version, e.g. "dct-1", or the fingerprint of a released VAE
    audio_codec: str
    text_encoder: str
    video_text_width: int
    audio_text_width: int
    code_version: str
    text_cache: str = TextCache.FEATURES
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # buckets, crop, audio rate, dtype: as given to data_prep.encode
    shards: dict[str, str] = field(default_factory=dict)  # shard file name -> SHA-256
    counts: dict[str, int] = field(default_factory=dict)  # samples kept, and dropped by reason
    version: int = MANIFEST_VERSION

    def save(self, directory: Path) -> None:
        partial = directory / f"{MANIFEST_NAME}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1, sort_keys=True))
        partial.replace(directory / MANIFEST_NAME)

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        path = Path(directory) / MANIFEST_NAME
        if not path.exists():
            raise DataError(f"{path} is missing: {_why_no_dataset(Path(directory))}")
        try:
            manifest = cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: not a manifest of this program ({error}). Re-run data_prep.encode") from error
        if manifest.version != MANIFEST_VERSION:
            raise DataError(
                f"{path}: version {manifest.version}; this program reads {MANIFEST_VERSION}. Re-run data_prep.encode"
            )
        return manifest

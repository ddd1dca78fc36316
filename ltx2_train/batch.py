"""Samples of one bucket, collated. Fixed shapes, no Python objects on the device, and nothing that depends on a rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ltx2_train.geometry import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS
from ltx2_train.record import Bucket, Sample, TextFeatures


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. A modality that the bucket lacks is a single zero token, so that every rank runs the same modules.

    `has_video`, `has_audio` (B,) fp32 are 1 where the modality is there and counts in the loss; a bad record has 0 in both.
    """

    keys: tuple[str, ...]
    positions: tuple[int, ...]  # places in the global batch of the step: the key of all randomness
    bucket: Bucket
    video: Tensor  # (B, 128, F, H, W)
    audio: Tensor  # (B, 8, T, 16)
    video_text: Tensor  # (B, L, Wv), valid rows first, zeros behind
    audio_text: Tensor  # (B, L, Wa)
    text_lengths: tuple[int, ...]
    fps: tuple[float, ...]
    has_video: Tensor
    has_audio: Tensor
    errors: tuple[str, ...] = ()  # one message per bad record, each naming its key
    retried_reads: int = 0  # attempts at reading these samples that failed and were made again

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device, copied asynchronously from pinned memory."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def collate(samples: Sequence[Sample], positions: Sequence[int], bucket: Bucket, errors: Sequence[str] = ()) -> Batch:
    """Stack samples of one bucket; a bad record stands here as its `placeholder`, its message in `errors`."""
    length = max(len(s.text.video) for s in samples)
    good = torch.tensor([not s.meta.get("bad", False) for s in samples], dtype=torch.float32)
    return Batch(
        keys=tuple(s.key for s in samples),
        positions=tuple(positions),
        bucket=bucket,
        video=torch.stack([_or_zeros(s.video, (VIDEO_CHANNELS, 1, 1, 1)) for s in samples]).float(),
        audio=torch.stack([_or_zeros(s.audio, (AUDIO_CHANNELS, 1, AUDIO_BINS)) for s in samples]).float(),
        video_text=torch.stack([_pad_rows(s.text.video, length) for s in samples]).float(),
        audio_text=torch.stack([_pad_rows(s.text.audio, length) for s in samples]).float(),
        text_lengths=tuple(len(s.text.video) for s in samples),
        fps=tuple(s.fps for s in samples),
        has_video=good * (bucket.frames > 0),
        has_audio=good * (bucket.audio_steps > 0),
        errors=tuple(errors),
    )


def placeholder(key: str, bucket: Bucket, null_text: TextFeatures, fps: float = 1.0) -> Sample:
    """What stands in the place of a bad record: zeros of the right shape with weight 0, so that no other sample moves."""
    video = torch.zeros(VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width) if bucket.frames else None
    audio = torch.zeros(AUDIO_CHANNELS, bucket.audio_steps, AUDIO_BINS) if bucket.audio_steps else None
    return Sample(key, video, audio, null_text, fps, meta={"bad": True})


def _or_zeros(tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape) if tensor is None else tensor


def _pad_rows(rows: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, length - len(rows)))

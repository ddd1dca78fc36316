"""Windows become samples: their media go through the codecs in batches, their captions through the text encoder."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_prep.codec_choice import Codecs
from data_prep.encode_config import EncodeConfig
from data_prep.windows import Window
from ltx2_train.errors import DataError
from ltx2_train.record import Sample, TextFeatures

BATCH_VALUES = 1 << 24  # pixel values of the windows that go through the video codec together
BATCH_WINDOWS = 8  # more only misses the caches
CAPTIONS_TOGETHER = 64  # distinct ones that the text encoder is handed at once
TEXT_KEPT = 1 << 28  # bytes of the text of captions that may come again


def encode_windows(windows: Iterator[Window], codecs: Codecs, config: EncodeConfig) -> Iterator[Sample]:
    """The samples of windows, in their order.

    Windows of one shape that follow each other share the codecs' calls; captions wait for each other, so that many share
    the text encoder's.
    """
    texts: dict[str, TextFeatures] = {}
    waiting: list[_Latents] = []
    for batch in _batches(windows):
        latents = zip(batch, _encode_video(batch, codecs, config), _encode_audio(batch, codecs), strict=True)
        waiting += [
            (replace(w, frames=None, waveform=None), _stored(v, config), _stored(a, config)) for w, v, a in latents
        ]
        if len({window.caption for window, *_ in waiting} - texts.keys()) >= CAPTIONS_TOGETHER:
            yield from _samples(waiting, texts, codecs, config)
            waiting = []
    yield from _samples(waiting, texts, codecs, config)


_Latents = tuple[Window, Tensor | None, Tensor | None]  # a window without its media, its video, its audio


def _samples(
    waiting: Sequence[_Latents], texts: dict[str, TextFeatures], codecs: Codecs, config: EncodeConfig
) -> Iterator[Sample]:
    _encode_text([window.caption for window, *_ in waiting], texts, codecs, config)
    for window, video, audio in waiting:
        sample = Sample(
            key=window.key,
            video=video,
            audio=audio,
            text=texts[window.caption],
            fps=window.fps,
            caption=window.caption,
            meta=window.meta,
        )
        check_finite(sample)
        yield sample


def _batches(windows: Iterator[Window]) -> Iterator[list[Window]]:
    """Consecutive windows of a bounded number of pixel values."""
    batch: list[Window] = []
    values = 0
    for window in windows:
        size = window.frames.numel() if window.frames is not None else 0
        if batch and (len(batch) == BATCH_WINDOWS or values + size > BATCH_VALUES):
            yield batch
            batch, values = [], 0
        batch.append(window)
        values += size
    if batch:
        yield batch


def _encode_text(captions: Sequence[str], texts: dict[str, TextFeatures], codecs: Codecs, config: EncodeConfig) -> None:
    """Put the features of the captions into `texts`; those that are there already are not encoded again."""
    if sum(text.video.nbytes + text.audio.nbytes for text in texts.values()) > TEXT_KEPT:
        for caption in texts.keys() - set(captions):
            del texts[caption]
    new = [caption for caption in dict.fromkeys(captions) if caption not in texts]
    for caption, text in zip(new, codecs.text.encode(new) if new else [], strict=True):
        texts[caption] = _stored_text(text, config)


def _stored_text(text: TextFeatures, config: EncodeConfig) -> TextFeatures:
    return TextFeatures(text.video.to(config.dtype.torch), text.audio.to(config.dtype.torch))


def _encode_video(batch: Sequence[Window], codecs: Codecs, config: EncodeConfig) -> list[Tensor | None]:
    def call(places: list[int]) -> Tensor:
        stacked = torch.stack([frames for i in places if (frames := batch[i].frames) is not None])
        if config.chunk_frames is None:
            return codecs.video.encode(stacked.to(codecs.device)).cpu()
        return codecs.video.encode(stacked, chunk_frames=config.chunk_frames).cpu()  # type: ignore[call-arg]

    return _by_shape([None if w.frames is None else tuple(w.frames.shape) for w in batch], call)


def _encode_audio(batch: Sequence[Window], codecs: Codecs) -> list[Tensor | None]:
    def call(places: list[int]) -> Tensor:
        stacked = torch.stack([waveform for i in places if (waveform := batch[i].waveform) is not None])
        return codecs.audio.encode(stacked.to(codecs.device), batch[places[0]].rate).cpu()

    return _by_shape([None if w.waveform is None else (w.rate, *w.waveform.shape) for w in batch], call)


def _by_shape(shapes: list[Any], call: Any) -> list[Tensor | None]:
    """`call(places)` for the places of each shape, its rows put back in order; None where the shape is None."""
    groups: dict[Any, list[int]] = {}
    for place, shape in enumerate(shapes):
        if shape is not None:
            groups.setdefault(shape, []).append(place)
    result: list[Tensor | None] = [None] * len(shapes)
    with torch.inference_mode():
        for places in groups.values():
            for place, row in zip(places, call(places), strict=True):
                result[place] = row
    return result


def _stored(latents: Tensor | None, config: EncodeConfig) -> Tensor | None:
    return None if latents is None else latents.to(config.dtype.torch)


def check_finite(sample: Sample) -> None:
    """Raises `DataError` naming the key for latents with NaN or infinity: they are refused, not written."""
    text = sample.text
    named = {"video": sample.video, "audio": sample.audio, "video text": text.video, "audio text": text.audio}
    for name, tensor in named.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{sample.key}: the codec gave NaN or infinity in its {name}; nothing is written. "
                            "Look at the clip with data_prep.show, or use --dtype fp32")  # fmt: skip

"""What made latents and text features that are already there: the names for the manifest, and the null context."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_prep.dropped import Dropped
from data_prep.precomputed import SUFFIX, TEXT, Entry, evenly, list_folder, text_features
from ltx2_train.data.datasets import load_null_text
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.record import UNKNOWN, TextFeatures
from ltx2_train.text import TextEncoder

log = logging.getLogger(__name__)

PROBES = 32  # captions that are looked at to learn the widths of the text features and the null context
SAME_ROW = 1 / 64  # largest difference, relative to a row's root mean square, that bf16 kernels explain


@dataclass(frozen=True, slots=True)
class KnownText:
    """What is known of a text encoder: its name, and its features of the empty caption, which may have no row."""

    name: str
    null: TextFeatures

    @property
    def video_width(self) -> int:
        return self.null.video.shape[1]

    @property
    def audio_width(self) -> int:
        return self.null.audio.shape[1]


@dataclass(frozen=True, slots=True)
class Origin:
    """What made a folder's latents and text features, as far as finishing a dataset asks."""

    video_codec: str  # its name
    audio_codec: str
    text: KnownText
    paths: dict[str, str]  # where the released components lie, by setting: for sampling, to find them again


def known_origin(
    folder: Path,
    video_codec: str,
    audio_codec: str,
    text_encoder: str,
    text_weights: str | None = None,
    null_context: Path | None = None,
    device: str = "cpu",
) -> Origin:
    """What made the caches of a `.precomputed` folder, from the paths or names that the user gives.

    The null context comes from `null_context`; else from the folder, where that can be seen there (`common_first_row`);
    else from the text encoder on `device`, in bf16, where its path is given; else it has no row, which is said.
    """
    texts = list(_probe_texts(list_folder(folder).entries))
    widths = _widths(texts, folder)
    encoder = None if text_encoder.startswith(UNKNOWN) else _text_encoder(text_encoder, text_weights, widths, device)
    null = read_null_context(null_context) if null_context is not None else common_first_row(texts)
    if null is None and encoder is not None:
        [null] = encoder.encode([""])
    if null is None:
        null = TextFeatures(*(torch.zeros(0, width) for width in widths))
        log.warning(_NO_NULL)
    if (found := (null.video.shape[1], null.audio.shape[1])) != widths:
        raise ConfigError(
            f"{null_context}: a null context of widths {found}; the text features of {folder} have {widths}. "
            "Give that of the text encoder that made them"
        )
    name = _unknown(text_encoder, "text encoder") if encoder is None else encoder.name
    video, audio = _codec_name(video_codec, "video"), _codec_name(audio_codec, "audio")
    given = {
        "video_codec": video_codec,
        "audio_codec": audio_codec,
        "text_encoder": text_encoder,
        "text_weights": text_weights,
    }
    paths = {name: str(Path(value).resolve()) for name, value in given.items() if value and Path(value).exists()}
    return Origin(video, audio, KnownText(name, null), paths)


_NO_NULL = (
    "The features of the empty caption are not known: caption dropout and guidance away from the empty caption cannot be "
    "used with this dataset. The same command with --null-context FILE adds them; nothing is imported again"
)


def _codec_name(value: str, kind: str) -> str:
    from ltx2_train.codecs import name_of_audio_codec, name_of_video_codec

    if value.startswith(UNKNOWN):
        return _unknown(value, f"{kind} codec")
    return name_of_video_codec(value) if kind == "video" else name_of_audio_codec(value)


def _unknown(value: str, kind: str) -> str:
    if not value.removeprefix(UNKNOWN).strip():
        raise ConfigError(
            f"{kind}: {value!r} has no name. Write unknown:NAME with a name that tells this one from others"
        )
    return value


def _text_encoder(value: str, weights: str | None, widths: tuple[int, int], device: str) -> TextEncoder:
    from ltx2_train.text import build_text_encoder

    # bf16 as the reference's captions, and half of the memory: it is one row at most
    return build_text_encoder(value, *widths, weights=weights, device=device, dtype=torch.bfloat16)


def _probe_texts(entries: list[Entry]) -> Iterator[TextFeatures]:
    """Readable captions among a few that are spread over the folder; damaged ones are named when they are imported."""
    for entry in evenly(entries, PROBES):
        try:
            yield text_features(entry.files[TEXT])
        except Dropped:
            continue


def _widths(texts: Sequence[TextFeatures], folder: Path) -> tuple[int, int]:
    """The widths of most captions."""
    counts = Counter((text.video.shape[1], text.audio.shape[1]) for text in texts)
    if not counts:
        raise DataError(
            f"{folder}: none of {PROBES} files in {TEXT}/ can be read. Is it a folder of the LTX-2 trainer?"
        )
    return counts.most_common(1)[0][0]


def common_first_row(texts: Sequence[TextFeatures]) -> TextFeatures | None:
    """The null context, as far as captions themselves show it; None where they do not.

    Every caption opens with the same token and the language model is causal, so the first row knows of nothing else;
    from 2.3 on features are made token by token, and the empty caption is that token alone: its features are the first
    row of any other. In 2.0 each caption is normalised as a whole, and both streams have the same features. Here the row
    is taken only when the streams have different widths and different captions do agree in it.
    """
    texts = [text for text in texts if text.video.shape[1] != text.audio.shape[1]]
    if len({(len(text.video), text.video[-1].float().sum().item()) for text in texts}) < 2:
        return None
    first = TextFeatures(texts[0].video[:1].clone(), texts[0].audio[:1].clone())
    agree = all(_is_row(text.video[:1], first.video) and _is_row(text.audio[:1], first.audio) for text in texts)
    return first if agree else None


def _is_row(row: Tensor, first: Tensor) -> bool:
    if row.shape != first.shape:
        return False
    scale = first.float().square().mean().sqrt()
    return bool((row.float() - first.float()).square().mean().sqrt() <= SAME_ROW * scale)


def read_null_context(path: Path) -> TextFeatures:
    """Features of the empty caption from `null_text.safetensors` of a dataset, or a `.pt` of a `conditions` folder."""
    if not path.exists():
        raise DataError(f"{path}: no such file. Name a null_text.safetensors, or a .pt of the empty caption")
    if path.suffix == SUFFIX:
        return text_features(path)
    return load_null_text(path.parent) if path.is_file() else load_null_text(path)

"""Captions to text features. `build_text_encoder` and `load_feature_extractor` are the doors."""

from pathlib import Path

import torch

from ltx2_train.errors import ConfigError
from ltx2_train.text.context import ContextEncoder, connectors_mark
from ltx2_train.text.encoder import TextEncoder
from ltx2_train.text.features import (
    FeatureExtractor,
    fingerprint_of,
    has_projection,
    load_feature_extractor,
    projection_name,
)
from ltx2_train.text.gemma import Quantisation
from ltx2_train.text.hashed import NAME as HASHED_NAME
from ltx2_train.text.hashed import HashedTextEncoder
from ltx2_train.text.released import ReleasedTextEncoder

__all__ = [
    "ContextEncoder",
    "FeatureExtractor",
    "HashedTextEncoder",
    "Quantisation",
    "ReleasedTextEncoder",
    "TextEncoder",
    "build_text_encoder",
    "connectors_mark",
    "fingerprint_of",
    "has_projection",
    "load_feature_extractor",
    "projection_name",
]

EMBEDDED = ("hashed", HASHED_NAME)
HASHED_WIDTH = 128


def build_text_encoder(
    name: str | Path,
    video_width: int | None = None,
    audio_width: int | None = None,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantisation: Quantisation = Quantisation.NONE,
) -> TextEncoder:
    """The text encoder of a name ("hashed" or its versioned form), or of the local folder of a language model.

    The latter needs `weights`, the released file or folder with its text projection; widths that are given are held
    against it. The embedded one needs widths alone (128 by default). Raises `ConfigError` and `CheckpointError`.
    """
    if str(name) in EMBEDDED:
        if weights is not None:
            raise ConfigError(
                f"text encoder: {name} has no weights; leave {weights} away, or give a language model's folder"
            )
        return HashedTextEncoder(
            HASHED_WIDTH if video_width is None else video_width, HASHED_WIDTH if audio_width is None else audio_width
        )
    if not Path(name).is_dir():
        raise ConfigError(
            f"text encoder: {str(name)!r} is neither {' nor '.join(map(repr, EMBEDDED))} nor a folder that is here. "
            "Give the local folder of the language model that a released checkpoint was trained with"
        )
    if weights is None:
        raise ConfigError(
            f"text encoder: {name} needs the file with the text projection too; give the released weights"
        )
    encoder = ReleasedTextEncoder(name, weights, device=device, dtype=dtype, quantisation=quantisation)
    found, asked = (encoder.video_width, encoder.audio_width), (video_width, audio_width)
    if any(wanted not in (None, width) for wanted, width in zip(asked, found, strict=True)):
        raise ConfigError(f"text encoder: {weights} gives features of widths {found}; asked for are {asked}")
    return encoder

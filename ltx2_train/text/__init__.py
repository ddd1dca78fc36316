"""Captions to text features. `build_text_encoder` is the door."""

from ltx2_train.errors import ConfigError
from ltx2_train.text.encoder import TextEncoder
from ltx2_train.text.hashed import NAME as HASHED_NAME
from ltx2_train.text.hashed import HashedTextEncoder


def build_text_encoder(name: str, video_width: int, audio_width: int) -> TextEncoder:
    """The text encoder of a name ("hashed" or its versioned form). Raises `ConfigError` naming what is supported."""
    if name not in ("hashed", HASHED_NAME):
        raise ConfigError(f"text encoder: {name!r} is not supported; use 'hashed' or {HASHED_NAME!r}")
    return HashedTextEncoder(video_width, audio_width)

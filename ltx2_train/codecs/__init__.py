"""Pixels and waveforms to latents and back. `build_video_codec` and `build_audio_codec` are the doors."""

from ltx2_train.codecs.audio import AudioCodec
from ltx2_train.codecs.dct import DctAudioCodec, DctVideoCodec
from ltx2_train.codecs.video import VideoCodec
from ltx2_train.errors import ConfigError

EMBEDDED = ("dct", DctVideoCodec.name)


def build_video_codec(name: str) -> VideoCodec:
    """The video codec of a name ("dct" or its versioned form). Raises `ConfigError` naming what is supported."""
    _check_name(name, "video codec")
    return DctVideoCodec()


def build_audio_codec(name: str) -> AudioCodec:
    """The audio codec of a name ("dct" or its versioned form). Raises `ConfigError` naming what is supported."""
    _check_name(name, "audio codec")
    return DctAudioCodec()


def _check_name(name: str, kind: str) -> None:
    if name not in EMBEDDED:
        raise ConfigError(f"{kind}: {name!r} is not supported; use one of {', '.join(map(repr, EMBEDDED))}")

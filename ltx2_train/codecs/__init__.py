"""Pixels and waveforms to latents and back. The functions here are the doors; what they load comes from local files."""

from pathlib import Path

import torch

from ltx2_train.codecs import ltx2
from ltx2_train.codecs.audio import AudioCodec
from ltx2_train.codecs.dct import DctAudioCodec, DctVideoCodec
from ltx2_train.codecs.ltx2_audio import Ltx2AudioCodec, audio_codec_name, has_audio_codec, load_audio_codec
from ltx2_train.codecs.ltx2_video import Ltx2VideoCodec, has_video_codec, load_video_codec, video_codec_name
from ltx2_train.codecs.upsampler import Upsampler, load_upsampler
from ltx2_train.codecs.video import VideoCodec
from ltx2_train.errors import ConfigError

__all__ = [
    "AudioCodec",
    "Ltx2AudioCodec",
    "Ltx2VideoCodec",
    "Upsampler",
    "VideoCodec",
    "audio_codec_name",
    "build_audio_codec",
    "build_video_codec",
    "contents_of_audio_codec",
    "contents_of_video_codec",
    "has_audio_codec",
    "has_video_codec",
    "load_audio_codec",
    "load_upsampler",
    "load_video_codec",
    "name_of_audio_codec",
    "name_of_video_codec",
    "video_codec_name",
]

RELEASED = "ltx2-"  # how names of loaded codecs begin
EMBEDDED = ("dct", DctVideoCodec.name)


def build_video_codec(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VideoCodec:
    """The video codec of a name: "dct", its versioned form, or the path of a released video VAE.

    Raises `ConfigError` when the name is neither, and as `load_video_codec`.
    """
    if name in EMBEDDED:
        return DctVideoCodec()
    return load_video_codec(_existing(name, "video codec"), device=device, dtype=dtype)


def build_audio_codec(name: str, vocoder: str | None = None, *, device: torch.device | str = "cpu") -> AudioCodec:
    """The audio codec of a name: "dct", its versioned form, or the path of a released audio VAE.

    `vocoder` is the file of the vocoder where it is another one. Raises `ConfigError` when a name is neither, and as
    `load_audio_codec`.
    """
    if name in EMBEDDED:
        return DctAudioCodec()
    voice = None if vocoder is None else _existing(vocoder, "vocoder")
    return load_audio_codec(_existing(name, "audio codec"), voice, device=device)


def name_of_video_codec(name: str) -> str:
    """The `name` of what `build_video_codec` makes of a name or path, for which little is read. Raises likewise."""
    return DctVideoCodec.name if name in EMBEDDED else video_codec_name(_existing(name, "video codec"))


def name_of_audio_codec(name: str) -> str:
    """The `name` of what `build_audio_codec` makes of a name or path, for which little is read. Raises likewise."""
    return DctAudioCodec.name if name in EMBEDDED else audio_codec_name(_existing(name, "audio codec"))


def contents_of_video_codec(name: str) -> str:
    """What stands for all of the video codec of a name or path: for its decoder too, unlike `name_of_video_codec`.

    It does not depend on where the weights lie. Raises as `build_video_codec`.
    """
    if name in EMBEDDED:
        return DctVideoCodec.name
    return ltx2.whole_fingerprint(ltx2.open_component(_existing(name, "video codec"), "vae"))


def contents_of_audio_codec(name: str, vocoder: str | None = None) -> list[str]:
    """As `contents_of_video_codec`, of the audio codec and of the vocoder behind it, where there is one."""
    if name in EMBEDDED:
        return [DctAudioCodec.name]
    path = _existing(name, "audio codec")
    found = [ltx2.whole_fingerprint(ltx2.open_component(path, "audio_vae"))]
    voice = path if vocoder is None else _existing(vocoder, "vocoder")
    if vocoder is not None or ltx2.has_component(voice, "vocoder"):
        found.append(ltx2.whole_fingerprint(ltx2.open_component(voice, "vocoder")))
    return found


def _existing(name: str, kind: str) -> Path:
    path = Path(name)
    if name.startswith(RELEASED) and not path.exists():
        raise ConfigError(f"{kind}: {name} is a released one, known by its weights. Give the path of its file")
    if not path.exists():
        names = ", ".join(map(repr, EMBEDDED))
        raise ConfigError(
            f"{kind}: {name!r} is neither one of {names} nor a file or folder. Give the path of a released file"
        )
    return path

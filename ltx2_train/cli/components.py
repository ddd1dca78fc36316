"""The frozen parts around a model, found on this machine: the codecs that made its latents, and its text encoder.

A dataset knows them by name, which for released ones is a fingerprint; where their files lie is a setting of this machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ltx2_train.errors import ConfigError
from ltx2_train.record import Manifest, TextCache

if TYPE_CHECKING:
    import torch

    from ltx2_train.evals.samples import Codecs
    from ltx2_train.text import TextEncoder

PATHS = "paths"  # of a manifest's settings: where data_prep.encode found the released parts


@dataclass(kw_only=True, slots=True)
class ComponentsConfig:
    """Where the released parts lie on this machine. What is left open lies where data_prep.encode found it."""

    video_codec: str | None = None
    """File or folder with the video VAE."""
    audio_codec: str | None = None
    """File or folder with the audio VAE."""
    vocoder: str | None = None
    """File or folder with the vocoder; null: beside the audio VAE."""
    text_encoder: str | None = None
    """Local folder of the language model."""
    text_weights: str | None = None
    """File or folder with the text projection."""
    connectors: str | None = None
    """File or folder with the connectors, where the data hold contexts; null: text_weights."""


def resolved(config: ComponentsConfig, recorded: Mapping[str, Any]) -> ComponentsConfig:
    """`config`, and what it leaves open from `recorded`, by the same names."""
    return ComponentsConfig(**{f.name: getattr(config, f.name) or recorded.get(f.name) for f in fields(config)})


@dataclass(frozen=True, slots=True)
class Components:
    """Codecs and text encoder, opened when they are asked for and held against what a dataset was made with."""

    places: ComponentsConfig
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Names that they must have, as in a manifest. Empty: any."""
    device: "torch.device | str" = "cpu"

    @classmethod
    def of(cls, config: ComponentsConfig, manifest: Manifest, device: "torch.device | str" = "cpu") -> "Components":
        """Those that made a dataset."""
        from ltx2_train.data.datasets import PROVENANCE

        names = {name: getattr(manifest, name) for name in PROVENANCE}
        return cls(resolved(config, manifest.settings.get(PATHS, {})), names, device)

    def codecs(self, tile: tuple[int, int] | None = None) -> "Codecs":
        """Video and audio codec, of released ones the video codec in bf16 on a GPU and all else in fp32.

        `tile`: (size, overlap) in pixels, to decode pictures in pieces. Raises `ConfigError` when their place is not known
        or other ones lie there, or for a tile where the video codec has none.
        """
        import torch

        from ltx2_train.codecs import Ltx2VideoCodec, build_audio_codec, build_video_codec
        from ltx2_train.evals.samples import Codecs

        dtype = torch.bfloat16 if torch.device(self.device).type == "cuda" else None
        video = build_video_codec(self._place("video_codec"), device=self.device, dtype=dtype)
        audio = build_audio_codec(self._place("audio_codec"), vocoder=self.places.vocoder, device=self.device)
        self._check("video_codec", video.name)
        self._check("audio_codec", audio.name)
        if tile is not None and not isinstance(video, Ltx2VideoCodec):
            raise ConfigError(f"--tile: {video.name} decodes a clip as a whole. Leave it out")
        return Codecs(video, audio, tile)

    def text_encoder(self) -> "TextEncoder":
        """The text encoder, with the connectors behind it where the dataset holds contexts. Raises as `codecs`."""
        from ltx2_train.cli.contexts import context_encoder
        from ltx2_train.text import build_text_encoder

        widths = self.provenance.get("video_text_width"), self.provenance.get("audio_text_width")
        place = self._place("text_encoder")
        encoder = build_text_encoder(place, *widths, weights=self.places.text_weights, device=self.device)
        if self.provenance.get("text_cache") == TextCache.CONTEXT:
            path = self.places.connectors or self._place("text_weights")
            encoder = context_encoder(encoder, path, str(self.device))
        self._check("text_encoder", encoder.name)
        return encoder

    @property
    def contents(self) -> dict[str, Any]:
        """What stands for the weights of all parts, wherever they lie, in plain values; None of a part of no known place.

        Read are headers and the beginnings of tensors. Raises as `codecs` where a place holds something else.
        """
        from ltx2_train import codecs

        read: dict[str, Callable[[], Any]] = {
            "video_codec": lambda: codecs.contents_of_video_codec(self._place("video_codec")),
            "audio_codec": lambda: codecs.contents_of_audio_codec(self._place("audio_codec"), self.places.vocoder),
            "text_encoder": lambda: self.text_encoder().name,
        }
        return {part: content() if self._is_placed(part) else None for part, content in read.items()}

    def _is_placed(self, part: str) -> bool:
        from ltx2_train import codecs, text

        embedded = (*codecs.EMBEDDED, *text.EMBEDDED)
        return getattr(self.places, part) is not None or self.provenance.get(part) in embedded

    def _place(self, part: str) -> str:
        """Where a part lies, or the name of an embedded one."""
        from ltx2_train import codecs, text

        place, name = getattr(self.places, part), self.provenance.get(part)
        if place is not None:
            return str(place)
        if name in (*codecs.EMBEDDED, *text.EMBEDDED):
            return str(name)
        made = "" if name is None else f" (the data were made with {name!r})"
        raise ConfigError(f"{part}: where it lies is not known{made}. Say it with {_setting(part)}")

    def _check(self, part: str, found: str) -> None:
        wanted = self.provenance.get(part)
        if wanted is not None and found != wanted:
            raise ConfigError(
                f"{part}: {getattr(self.places, part)} is {found!r}, and the data were made with {wanted!r}. "
                f"Give the one that made them with {_setting(part)}, or encode the data again"
            )


def _setting(part: str) -> str:
    return f"components.{part}=PATH (ltx2-train) or --{part.replace('_', '-')} PATH (other programs)"

"""`ltx2-sample`: what lies in memory together, and how pictures are decoded."""

import weakref

import pytest
import torch

from ltx2_train.cli import sample
from ltx2_train.cli.components import Components, ComponentsConfig
from ltx2_train.diffusion.profiles import profile
from ltx2_train.errors import ConfigError
from ltx2_train.record import TextFeatures
from ltx2_train.testing.released import write_release

CLIP = ["--frames", "9", "--width", "64", "--height", "64", "--fps", "24"]


class Filled(Exception):
    """The model was asked for."""


class Encoder:
    def encode(self, captions: list[str]) -> list[TextFeatures]:
        return [TextFeatures(torch.zeros(1, 4), torch.zeros(1, 4)) for _ in captions]


class Source:
    """Stands for a run, and for what lies around its model."""

    title, profile, keyframe_marker, dtype = "it", profile("demo"), False, torch.float32

    def __init__(self) -> None:
        self.components = self
        self.encoder: weakref.ref[Encoder] | None = None

    def text_encoder(self) -> Encoder:
        encoder = Encoder()
        self.encoder = weakref.ref(encoder)
        return encoder

    @property
    def model(self) -> None:
        assert self.encoder is not None, "captions are encoded first"
        assert self.encoder() is None, "the encoder lies beside the model"
        raise Filled


def test_the_text_encoder_is_gone_when_the_model_is_filled(monkeypatch):
    monkeypatch.setattr(sample, "open_model", lambda options, device: Source())
    with pytest.raises(Filled):
        list(sample.sample(sample.parser().parse_args(["run", "--prompt", "a", *CLIP])))


@torch.no_grad()
def test_pictures_are_decoded_in_pieces_on_request(tmp_path):
    options = sample.parser().parse_args(["run", "--prompt", "a", "--tile", "64,32"])
    path = str(write_release(tmp_path, "2.3").video_vae)
    components = Components(ComponentsConfig(video_codec=path, audio_codec=path))
    latents = torch.randn(128, 1, 2, 3)
    whole, pieces = (components.codecs(tile).decode(latents, None, 24.0).video for tile in (None, options.tile))
    assert whole.shape == pieces.shape == (3, 1, 64, 96)
    assert not torch.equal(whole, pieces), "seams"
    with pytest.raises(ConfigError, match="--tile: dct-1 decodes a clip as a whole"):
        Components(ComponentsConfig(video_codec="dct", audio_codec="dct")).codecs(options.tile)

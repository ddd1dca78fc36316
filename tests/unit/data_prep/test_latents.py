"""Windows go through codecs and text encoder: in bounded memory, and no NaN gets out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data_prep import latents
from data_prep.buckets import parse_buckets
from data_prep.codec_choice import build_codecs
from data_prep.encode_config import EncodeConfig, choice_of
from data_prep.windows import Window
from ltx2_train.errors import DataError
from ltx2_train.record import TextFeatures


def test_text_that_is_kept_for_its_next_caption_is_bounded(monkeypatch):
    class Wide:
        def encode(self, captions):
            return [TextFeatures(torch.zeros(8, 16), torch.zeros(8, 16)) for _ in captions]

    monkeypatch.setattr(latents, "TEXT_KEPT", 10 * 2 * 8 * 16 * 2)  # ten captions in bf16
    codecs, config, texts = SimpleNamespace(text=Wide()), EncodeConfig(buckets=parse_buckets("64x64x1")), {}
    sizes = []
    for i in range(0, 60, 3):
        latents._encode_text([f"{i + j}" for j in range(3)], texts, codecs, config)
        sizes.append(len(texts))
    assert max(sizes) <= 10 + 3 + 2


def test_latents_with_nan_are_refused_at_the_write(config):
    class Broken:
        name = "broken"

        def encode(self, video):
            return torch.full((len(video), 128, 1, 2, 2), torch.nan)

    codecs = replace(build_codecs(choice_of(config)), video=Broken())
    window = Window("c7", "f", "x", 24.0, torch.zeros(3, 1, 64, 64), None, 0, {})
    with pytest.raises(DataError, match=r"c7: the codec gave NaN or infinity in its video; nothing is written"):
        list(latents.encode_windows(iter([window]), codecs, config))

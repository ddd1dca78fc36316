import os
import subprocess
import sys

import pytest
import torch

from ltx2_train.errors import ConfigError
from ltx2_train.text import build_text_encoder
from ltx2_train.text.hashed import HashedTextEncoder, tokens

CAPTION = "A red ball falls, without sound."


@pytest.fixture(scope="module")
def encoder():
    return HashedTextEncoder(video_width=256, audio_width=96)


def rows(encoder, caption: str) -> torch.Tensor:
    return encoder.encode([caption])[0].video


def test_words_and_punctuation_are_rows_behind_a_start_row(encoder):
    assert tokens(CAPTION)[1:] == ["a", "red", "ball", "falls", ",", "without", "sound", "."]
    features = encoder.encode([CAPTION])[0]
    assert features.video.shape == (9, 256)
    assert features.audio.shape == (9, 96)
    assert features.video.dtype == torch.float32


@pytest.mark.parametrize("caption", ["", "   \n"])
def test_the_empty_caption_is_the_start_row_alone(encoder, caption):
    features = encoder.encode([caption])[0]
    assert features.video.shape == (1, 256)
    torch.testing.assert_close(features.video, rows(encoder, CAPTION)[:1])


def test_features_have_about_unit_variance(encoder):
    features = torch.cat([f.video for f in encoder.encode([CAPTION, "Waves break on a beach while gulls cry above."])])
    assert features.square().mean() == pytest.approx(1, abs=0.1)


def test_other_processes_get_the_same_numbers(encoder):
    program = (
        "from ltx2_train.text import build_text_encoder\n"
        f"print(build_text_encoder('hashed', 256, 96).encode([{CAPTION!r}])[0].audio.double().sum().item())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert float(out.stdout) == pytest.approx(encoder.encode([CAPTION])[0].audio.double().sum().item(), abs=1e-4)


def test_the_numbers_belong_to_the_version():
    assert HashedTextEncoder(4, 4).name == "hashed-1"
    torch.testing.assert_close(
        HashedTextEncoder(4, 4).encode([""])[0].video,
        torch.tensor([[-0.05687, -0.83861, 0.14517, 0.83351]]),
        atol=1e-4,
        rtol=0,
    )


def test_the_same_word_is_recognised_wherever_it_stands(encoder):
    here, there = rows(encoder, "red ball")[1], rows(encoder, "one more red ball")[3]
    other = rows(encoder, "one more new ball")[3]
    assert torch.cosine_similarity(here, there, dim=0) > 0.7
    assert torch.cosine_similarity(here, other, dim=0) < 0.4


def test_words_that_share_letters_are_nearer_than_others():
    encoder = HashedTextEncoder(8192, 2)
    bounce, bounces, falls = (rows(encoder, word)[1] for word in ("bounce", "bounces", "falls"))
    assert torch.cosine_similarity(bounce, bounces, dim=0) > torch.cosine_similarity(bounce, falls, dim=0) + 0.05


def test_the_order_of_words_can_be_seen(encoder):
    one, two = rows(encoder, "red on blue").sum(dim=0), rows(encoder, "blue on red").sum(dim=0)
    assert (one - two).norm() > 1


def test_the_streams_get_different_features_of_their_width(encoder):
    same_width = HashedTextEncoder(64, 64).encode([CAPTION])[0]
    assert torch.cosine_similarity(same_width.video[:, :32].flatten(), same_width.audio[:, :32].flatten(), dim=0) < 0.6


def test_a_caption_does_not_depend_on_its_batch(encoder):
    torch.testing.assert_close(encoder.encode(["x", CAPTION])[1].video, rows(encoder, CAPTION))


def test_a_long_caption_is_cut_where_the_released_encoder_cuts(encoder):
    assert rows(encoder, "word " * 3000).shape == (1024, 256)


def test_the_encoder_says_how_much_of_a_caption_it_cuts(encoder):
    longest = "word " * 1023  # and the start row
    assert [encoder.rows_cut(caption) for caption in ("", CAPTION, longest, longest + "a, b")] == [0, 0, 0, 3]


def test_other_scripts_are_words_too():
    assert tokens("Крáсный мяч 球")[1:] == ["крáсный", "мяч", "球"]


def test_a_name_finds_the_encoder_and_faults_are_named():
    assert build_text_encoder("hashed", 8, 8).name == build_text_encoder("hashed-1", 8, 8).name == "hashed-1"
    with pytest.raises(ConfigError, match="gemma"):
        build_text_encoder("gemma", 8, 8)
    with pytest.raises(ConfigError, match="audio_width: 0"):
        build_text_encoder("hashed", 8, 0)

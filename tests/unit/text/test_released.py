"""The released text encoder: captions through a language model and a feature extractor, and who belongs to whom."""

import shutil

import pytest
import torch

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.model.weights import load_connectors
from ltx2_train.testing.released import GENERATIONS, write_release
from ltx2_train.text import (
    ContextEncoder,
    ReleasedTextEncoder,
    build_text_encoder,
    load_feature_extractor,
    projection_name,
)
from ltx2_train.text.gemma import Gemma, Tokenizer, open_gemma
from ltx2_train.weightfile import open_weights, write_weights
from tests.unit.text.tiny_gemma import edit_config, write_gemma

CAPTIONS = ["a red ball", "", "the dark floor falls and bounces , birds and rain over it .", "waves", "a red ball"]
LONG = "ball " * 3000
PARTS = ("transformer", "text_projection")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("text") / "gemma")


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    folder = write_gemma(tmp_path_factory.mktemp("text") / "gemma4", "gemma4_unified")
    return edit_config(folder, gemma_version="gemma4-12b-ltx-v1")


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("releases")
    return {name: write_release(directory, name, parts=PARTS) for name in GENERATIONS}


@pytest.fixture(params=GENERATIONS)
def encoder(request, gemma, gemma4, releases):
    folder = gemma4 if request.param == "2.5" else gemma
    return ReleasedTextEncoder(folder, releases[request.param].text_projection)


def padded_features(encoder, captions):
    """Features and mask of captions padded on the left to 1024 tokens, as the released pipelines compute them."""
    folder = open_gemma(encoder.folder.path)
    tokens = [Tokenizer(folder).cut(caption) for caption in captions]
    states, mask = Gemma(folder, dtype=torch.float32).hidden_states([*tokens, [2] * 1024])
    extract = load_feature_extractor(encoder.projection.source, dtype=torch.float32)
    video, audio = extract([layer[:-1] for layer in states], mask[:-1])
    return video, audio, mask[:-1]


def test_features_are_the_valid_rows_of_those_padded_to_1024(encoder):
    video, audio, mask = padded_features(encoder, CAPTIONS)
    for i, text in enumerate(encoder.encode(CAPTIONS)):
        assert len(text.video) == len(text.audio) == int(mask[i].sum()) == encoder.num_rows(CAPTIONS[i])
        torch.testing.assert_close(text.video, video[i, mask[i]], atol=2e-5, rtol=0)
        torch.testing.assert_close(text.audio, audio[i, mask[i]], atol=2e-5, rtol=0)
        assert text.video.shape[1:] + text.audio.shape[1:] == (encoder.video_width, encoder.audio_width)


def test_contexts_of_stored_rows_are_bit_equal_to_those_of_padded_features(encoder, releases):
    name = next(n for n, release in releases.items() if str(release.text_projection) == encoder.projection.source)
    connectors = load_connectors(releases[name].transformer, dtype=torch.float32)
    video, audio, mask = padded_features(encoder, CAPTIONS)
    with torch.no_grad():
        expected = connectors(video, audio, mask)
        for i, valid in enumerate(mask):
            rows = video[i : i + 1, valid], audio[i : i + 1, valid]
            found = connectors(*rows, torch.ones(1, int(valid.sum())), 1024)
            for ours, other in zip(found, expected, strict=True):
                assert ours.shape[1] == 1024
                assert torch.equal(ours, other[i : i + 1])


def test_the_empty_caption_is_the_row_of_bos(encoder):
    [null] = encoder.encode(["  "])
    assert len(null.video) == len(null.audio) == 1
    assert bool(torch.isfinite(null.video).all())


def test_an_order_of_captions_and_their_batches_change_nothing_but_rounding(encoder, monkeypatch):
    together = encoder.encode(CAPTIONS)
    monkeypatch.setattr("ltx2_train.text.released.BATCH_TOKENS", 8)
    for one, other in zip(together, reversed(encoder.encode(CAPTIONS[::-1])), strict=True):
        torch.testing.assert_close(one.video, other.video, atol=2e-5, rtol=0)


def test_tokens_over_1024_are_left_away_and_counted(encoder):
    whole = len(encoder.tokenizer(LONG))
    assert encoder.rows_cut(LONG) == whole - 1024 > 0
    assert encoder.num_rows(LONG) == 1024
    assert encoder.rows_cut(CAPTIONS[0]) == 0


def test_the_name_tells_language_models_and_projections_apart(encoder, gemma, releases, tmp_path):
    assert encoder.name == ReleasedTextEncoder(encoder.folder.path, encoder.projection.source).name
    first = ReleasedTextEncoder(gemma, releases["2.3"].text_projection).name
    other = ReleasedTextEncoder(write_gemma(tmp_path / "g", seed=1), releases["2.3"].text_projection).name
    assert first.startswith("gemma3:")
    assert first.split("+")[0] != other.split("+")[0]
    assert (
        first.split("+")[1] == other.split("+")[1] != ReleasedTextEncoder(gemma, releases["2.0"].text_projection).name
    )


def test_naming_an_encoder_reads_no_weights(gemma, releases, monkeypatch):
    monkeypatch.setattr("ltx2_train.text.gemma._load", None)
    monkeypatch.setattr("ltx2_train.text.features.Projection.read", None)
    encoder = ReleasedTextEncoder(gemma, releases["2.3"].text_projection)
    assert encoder.name.split("+")[1] == projection_name(releases["2.3"].text_projection)
    assert (encoder.name[:7], encoder.video_width, encoder.audio_width) == ("gemma3:", 40, 20)


def test_contexts_are_1024_rows_of_the_connectors(gemma, releases):
    features = ReleasedTextEncoder(gemma, releases["2.3"].text_projection)
    connectors = load_connectors(releases["2.3"].transformer, dtype=torch.float32)
    encoder = ContextEncoder(features, connectors, "0123456789abcdef")
    assert encoder.name == f"{features.name}+connectors:0123456789ab"
    found = encoder.encode(CAPTIONS)
    assert {tuple(text.video.shape) for text in found} == {(1024, 40)}
    assert not any(text.video.requires_grad for text in found)
    assert encoder.num_rows("") == 1
    assert encoder.rows_cut(LONG) == features.rows_cut(LONG)


# --- who belongs to whom ---


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 4}, r"takes 144 numbers per token, .* gives 5 hidden states of 36 = 180"),
        ({"hidden_size": 32}, r"takes 144 numbers per token, .* gives 4 hidden states of 32 = 128"),
        ({"hidden_size": 48, "num_hidden_layers": 2}, r"hidden states of 48, and .* on 36 \(caption_channels\)"),
    ],
)
def test_a_language_model_of_another_size_is_refused_naming_both(releases, tmp_path, sizes, message):
    folder = write_gemma(tmp_path / "other-gemma", **sizes)
    with pytest.raises(CheckpointError, match=message) as error:
        ReleasedTextEncoder(folder, releases["2.3"].text_projection)
    assert "other-gemma" in str(error.value)
    assert "ltx-2.3.safetensors" in str(error.value)


def test_2_5_takes_the_language_model_that_its_header_names(gemma, gemma4, releases, tmp_path):
    weights = releases["2.5"].text_projection
    for folder, found in ((gemma, "gemma3"), (_unnamed(gemma4, tmp_path), "gemma4_unified")):
        with pytest.raises(CheckpointError, match=rf"is '{found}', and .* text encoder 'gemma4-12b-ltx-v1'"):
            ReleasedTextEncoder(folder, weights)


def _unnamed(folder, tmp_path):
    """A Gemma 4 of somebody else."""
    shutil.copytree(folder, tmp_path / "google")
    return edit_config(tmp_path / "google", gemma_version=None)


def test_a_checkpoint_that_names_no_language_model_takes_gemma_3(gemma4, releases):
    with pytest.raises(CheckpointError, match=r"is 'gemma4_unified', and .*trained with Gemma 3"):
        ReleasedTextEncoder(gemma4, releases["2.3"].text_projection)


# --- the door ---


def test_the_door_takes_a_folder_and_a_file(gemma, releases):
    encoder = build_text_encoder(str(gemma), weights=str(releases["2.3"].text_projection))
    assert isinstance(encoder, ReleasedTextEncoder)
    assert build_text_encoder(gemma, 40, 20, weights=releases["2.3"].text_projection).name == encoder.name


def test_the_door_refuses_what_does_not_fit_with_the_next_action(gemma, releases):
    weights = releases["2.3"].text_projection
    with pytest.raises(ConfigError, match="needs the file with the text projection too"):
        build_text_encoder(gemma)
    with pytest.raises(ConfigError, match=r"gives features of widths \(40, 20\); asked for are \(40, 24\)"):
        build_text_encoder(gemma, 40, 24, weights=weights)
    with pytest.raises(ConfigError, match=r"neither 'hashed' nor 'hashed-1' nor a folder that is here"):
        build_text_encoder("gemma3:0123+features-v2:4567", weights=weights)
    with pytest.raises(ConfigError, match="hashed has no weights"):
        build_text_encoder("hashed", weights=weights)


def test_a_projection_with_nan_is_refused_when_it_is_read(gemma, releases, tmp_path):
    weights = open_weights(releases["2.3"].text_projection)
    tensors = {key: stored.read() for key, stored in weights.under("text_embedding_projection.").items()}
    tensors["audio_aggregate_embed.bias"][3] = torch.inf
    write_weights(tmp_path / "w.safetensors", {f"text_embedding_projection.{k}": t for k, t in tensors.items()}, {})
    with pytest.raises(CheckpointError, match=r"w\.safetensors: .*audio_aggregate_embed.bias"):
        ReleasedTextEncoder(gemma, tmp_path / "w.safetensors").encode(["a"])

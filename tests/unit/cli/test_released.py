"""What `ltx2-export` makes of a model of one's own is sampled as its run is: the same parts, profile, size and weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltx2_train.cli import export, sample
from ltx2_train.cli.components import ComponentsConfig
from ltx2_train.cli.released import SIZE, load_released
from ltx2_train.cli.runs import load_trained
from ltx2_train.errors import ConfigError
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import probe
from ltx2_train.media.video import read_video
from ltx2_train.testing.released import write_release
from ltx2_train.weightfile import open_weights, write_weights
from tests.unit.cli.commands import SMALL, TEXT_WIDTHS, ltx2_train, small_dataset

DATA_SIZE = {"frames": 9, "width": 32, "height": 32, "fps": 25.0}
KEYS = {"provenance", "sampler_profile", "clip_size", "text_tokens", "sampled_streams"}


def train(data: Path, run: Path, *settings: str) -> Path:
    places = (f"data.datasets.0.path={data}", f"train.run_dir={run}")
    assert ltx2_train(*SMALL, *places, "train.max_steps=2", "train.save_every=2", *settings) == 0
    return run


def exported(run: Path, form: str, out: Path) -> Path:
    assert export.main([str(run), "--to", form, "--out", str(out), "--dtype", "fp32"]) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run from scratch on data of the embedded parts, its weights as a file, a LoRA run on that file, and its LoRA."""
    folder = tmp_path_factory.mktemp("own")
    data = small_dataset(folder / "latents", text_encoder="hashed-1")
    base = exported(train(data, folder / "run", "optim.lr=3e-2"), "transformer", folder / "base.safetensors")
    adapters = ("lora=all", "lora.rank=2", "lora.alpha=16", "optim.lr=3e-2", "evaluation.profile=hq")
    exported(train(data, folder / "adapted", f"model.weights={base}", *adapters), "lora", folder / "lora.safetensors")
    return folder


def made(out: Path, *arguments: object) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Receipt, and pixels and waveform in -1 .. 1, of one clip of two steps."""
    options = ["--prompt", "a red ball", "--seed", "3", "--steps", "2", "--format", "png,wav", "--name", "clip"]
    assert sample.main([*map(str, arguments), *options, "--out", str(out)]) == 0
    frames = [read_video(path)[0] for path in sorted(out.glob("clip-3/*.png"))]
    waveform, _ = read_audio(out / "clip-3.wav")
    return json.loads((out / "clip-3.json").read_text()), torch.cat(frames, dim=1), waveform


def test_a_file_is_sampled_as_its_run_is(folder, tmp_path):
    of_run, *run = made(tmp_path / "run", folder / "run")
    of_file, *file = made(tmp_path / "file", folder / "base.safetensors")
    assert_alike(file, run)
    assert [of_file[name] for name in ("request", "profile")] == [of_run[name] for name in ("request", "profile")]


def test_a_file_with_a_lora_is_sampled_as_the_run_of_the_lora_is(folder, tmp_path):
    lora = ("--lora", f"{folder / 'lora.safetensors'}:1")
    _, *run = made(tmp_path / "run", folder / "adapted", "--profile", "demo")
    _, *file = made(tmp_path / "file", folder / "base.safetensors", *lora)
    _, *plain = made(tmp_path / "plain", folder / "base.safetensors")
    assert_alike(file, run)
    assert (plain[0] - run[0]).abs().max() > 0.05, "the LoRA changes the clip"


def assert_alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Up to the rounding of the weights' sums, and of pixels and samples in files."""
    for one, other, tolerance in zip(found, expected, (0.01, 2e-4), strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


@torch.no_grad()
def test_what_a_file_states_is_what_its_run_has(folder):
    own, trained = load_released(folder / "base.safetensors", ComponentsConfig()), load_trained(folder / "run")
    assert own.profile == trained.profile
    assert own.size == DATA_SIZE
    assert own.components.provenance.items() <= trained.provenance.items()
    weights = dict(trained.model.named_parameters())
    assert own.model.text_tokens == trained.model.text_tokens == 16
    assert all(torch.equal(p, weights[name]) for name, p in own.model.named_parameters())


def test_a_file_makes_what_its_run_was_trained_to_make(tmp_path, capsys):
    """Of a model with both streams whose sound no one trained."""
    data = small_dataset(tmp_path / "latents", text_encoder="hashed-1")
    run = train(data, tmp_path / "run", "objective.streams=[video]")
    file = exported(run, "transformer", tmp_path / "one.safetensors")
    command = [str(file), "--prompt", "a", "--steps", "1", "--out", str(tmp_path)]
    assert sample.main(command) == 0
    info = probe(tmp_path / "a-0.mp4")
    assert (info.has_video, info.has_audio) == (True, False)
    capsys.readouterr()
    assert sample.main([*command, "--seed", "1", "--profile", "hq"]) == sample.EXIT_NONE
    assert "hq: guides video by the other stream" in capsys.readouterr().err


def test_an_option_wins_over_what_a_file_states(folder, tmp_path):
    release = write_release(tmp_path, "2.3")
    given = ComponentsConfig(video_codec=str(release.video_vae), text_encoder="hashed")
    own = load_released(folder / "base.safetensors", given, profile_name="hq")
    assert own.profile.name == "hq"
    assert own.components.codecs().video.name.startswith("ltx2-")
    encoder = own.components.text_encoder()
    assert (encoder.video_width, encoder.audio_width) == TEXT_WIDTHS


def rewritten(source: Path, out: Path, **changed: str | None) -> Path:
    """A copy with another header: strings by key, None for what is not in it."""
    file = open_weights(source)
    before = {key: value if isinstance(value, str) else json.dumps(value) for key, value in file.metadata.items()}
    header = {key: value for key, value in {**before, **changed}.items() if value is not None}
    [path] = write_weights(out, dict(file), header)
    return path


def test_a_file_of_unknown_size_asks_for_one(folder, tmp_path):
    own = load_released(
        rewritten(folder / "base.safetensors", tmp_path / "x.safetensors", clip_size=None), ComponentsConfig()
    )
    with pytest.raises(ConfigError, match="Give --frames, --width, --height, --fps"):
        _ = own.size


def test_a_published_file_is_what_its_architecture_says_and_holds_its_parts(tmp_path):
    path = write_release(tmp_path, "2.3").transformer
    released = load_released(path, ComponentsConfig())
    places = released.components.places
    assert not KEYS & open_weights(path).metadata.keys()
    assert (released.fit.generation, released.profile.name, released.size) == ("2.3", "ltx2_2.3", SIZE)
    assert {places.video_codec, places.audio_codec, places.text_weights, places.connectors} == {str(path)}
    assert (places.text_encoder, places.vocoder, released.components.provenance) == (None, None, {})


def test_a_header_of_others_with_such_keys_is_none_of_ours(folder, tmp_path):
    strange = {
        "provenance": "a museum",
        "sampler_profile": '{"name": "mine"}',
        "clip_size": "[1]",
        "text_tokens": "all",
    }
    own = load_released(
        rewritten(folder / "base.safetensors", tmp_path / "x.safetensors", **strange), ComponentsConfig()
    )
    assert (own.profile.name, own.size, own.components.provenance) == ("ltx2_2.5", SIZE, {})
    assert own.model.text_tokens == 1024

"""Runs whose weights have been moved: they are known by their content, and everything goes on once the place is given."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ltx2_train.cli import evaluate, sample
from ltx2_train.cli.components import Components
from ltx2_train.cli.export import main as export
from ltx2_train.cli.runs import load_trained
from ltx2_train.cli.schema import load_job
from ltx2_train.cli.train import build_trainer, evaluators
from ltx2_train.data.datasets import open_dataset
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.testing.released import write_release
from tests.unit.cli.commands import SMALL, composed, ltx2_train, small_dataset

LORA = ("lora=attention", "lora.rank=2", "model.text_tokens=128", "train.save_every=2", "optim.schedule=constant")
UNKNOWN = dict.fromkeys(("video_codec", "audio_codec", "text_encoder"), "unknown:test")


def train(run: Path, weights: Path | str, data: Path, *settings: str) -> int:
    places = (f"data.datasets.0.path={data}", f"train.run_dir={run}", f"model.weights={weights}")
    return ltx2_train(*SMALL, *LORA, *places, "train.max_steps=2", *settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with weights, data and a run whose command named the weights by a relative path."""
    folder = tmp_path_factory.mktemp("moved")
    base = write_release(folder, "2.3").transformer
    data, here = small_dataset(folder / "latents", **UNKNOWN), Path.cwd()
    os.chdir(folder)
    try:
        assert train(folder / "run", base.name, data) == 0
    finally:
        os.chdir(here)
    return folder


def test_the_place_of_weights_is_noted_for_every_working_directory(place):
    assert load_job(place / "run").model.weights == str(place / "ltx-2.3.safetensors")


def test_a_run_whose_base_was_moved_is_filled_from_its_new_place(place, tmp_path, capsys):
    moved = (place / "ltx-2.3.safetensors").rename(tmp_path / "moved.safetensors")
    try:
        with pytest.raises(ConfigError, match="which is not there. Give --base"):
            load_trained(place / "run")
        trained = load_trained(place / "run", base=moved)
        assert next(trained.model.parameters()).device.type == "cpu"
        assert sample.main([str(place / "run"), "--prompt", "a", "--base", str(moved)]) == 2
        assert "where it lies is not known" in capsys.readouterr().err, "its codecs are unknown, its base is not"
        data = ["--data", str(place / "latents"), "--clips", "2"]
        assert evaluate.main([str(place / "run"), *data, "--base", str(moved)]) == 0
    finally:
        moved.rename(place / "ltx-2.3.safetensors")


def test_another_base_is_refused(place, tmp_path):
    other = write_release(tmp_path, "2.3", seed=1).transformer
    with pytest.raises(CheckpointError, match="not what .* started from"):
        load_trained(place / "run", base=other)


def test_a_base_beside_no_run_is_refused(place, capsys):
    weights = str(place / "ltx-2.3.safetensors")
    assert sample.main([weights, "--prompt", "a", "--base", weights]) == 2
    assert "is no run. Drop --base" in capsys.readouterr().err


def test_a_lora_to_start_from_is_known_by_its_content_and_not_needed_to_go_on(place, tmp_path, capsys):
    base, data, run = place / "ltx-2.3.safetensors", place / "latents", tmp_path / "run"
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert export([str(place / "run"), "--to", "lora", "--out", str(files[0])]) == 0
    assert export([str(place / "run"), "--to", "lora", "--out", str(files[1]), "--trigger", "other"]) == 0
    start = f"lora.weights={files[0]}"
    assert train(run, base, data, start) == 0
    moved = files[0].rename(tmp_path / "moved.safetensors")
    assert train(run, base, data, start, "train.max_steps=3") == 0, "gone"
    assert train(run, base, data, f"lora.weights={moved}", "train.max_steps=4") == 0, "elsewhere"
    capsys.readouterr()
    assert train(run, base, data, f"lora.weights={files[1]}", "train.max_steps=5") == 2, "another"
    assert "lora.weights" in capsys.readouterr().err
    assert train(tmp_path / "new", base, data, start) == 2, "a start needs it"


@pytest.mark.parametrize(
    ("given", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:.5", "a.safetensors", 0.5),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
    ],
)
def test_the_strength_of_a_lora_is_any_number(given, path, strength):
    assert sample._lora(given) == (Path(path), strength)


def test_codecs_are_opened_once_for_all_held_out_datasets(place, monkeypatch):
    opened: list[Components] = []
    monkeypatch.setattr(Components, "codecs", lambda self: opened.append(self) or SimpleNamespace(movable=()))
    job = composed("experiment=lora", f"model.weights={place / 'ltx-2.3.safetensors'}", "data.datasets.0.path=data")
    assert job.evaluation.samples is not None
    assert job.evaluation.samples.batch_size == 1, "of full-size clips"
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    dataset = open_dataset(place / "latents")
    found = evaluators(job, [dataset, dataset], False, world)
    assert {"samples", "samples_1"} <= found.keys()
    assert len(opened) == 1


class OneOfTwo(World):
    """A rank whose neighbour cannot open something."""

    def gather_objects(self, value: object) -> list[object]:
        return [value, (ConfigError, "the neighbour's file")]

    def broadcast_object(self, value: object) -> object:
        raise AssertionError("the neighbour never comes here")


def test_what_one_rank_cannot_open_stops_all_before_they_wait_for_it(place, tmp_path):
    weights, data = place / "ltx-2.3.safetensors", place / "latents"
    places = (f"data.datasets.0.path={data}", f"train.run_dir={tmp_path}", f"model.weights={weights}")
    world = OneOfTwo(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="the neighbour's file"):
        build_trainer(composed(*SMALL, *LORA, *places), world, lambda position: None)

"""A run of adapters out of its directory again: its checkpoints hold no base."""

import json
from pathlib import Path

import pytest
import torch

from ltx2_train.cli.runs import load_trained
from ltx2_train.distributed.saved import INDEX_FILE, saved_weights
from ltx2_train.model import initial_weights
from ltx2_train.train.checkpoint import checkpoint_directory
from tests.unit.cli.commands import SMALL, ltx2_train, small_dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    data, run = small_dataset(folder / "latents"), folder / "run"
    settings = ("lora=attention", "lora.rank=2", "train.max_steps=2", "model.train_connectors=false")
    assert ltx2_train(*SMALL, f"data.datasets.0.path={data}", f"train.run_dir={run}", *settings) == 0
    return run


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_model_of_adapters_is_its_initial_base_with_what_was_saved(run, weights):
    trained = load_trained(run, weights=weights)
    found = dict(trained.model.named_parameters())
    saved = dict(saved_weights(checkpoint_directory(run, 2), averaged="ema" if weights == "ema" else None))
    assert saved.keys() == {name for name in found if "lora_" in name}
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    for name, tensor in initial_weights(trained.model, trained.job.model, trained.job.seed):
        if name not in saved:
            assert torch.equal(found[name], tensor), name


def test_the_index_of_a_checkpoint_knows_every_frozen_tensor(run):
    index = json.loads((checkpoint_directory(run, 2) / INDEX_FILE).read_text())
    assert index["base"].keys() == index["shapes"].keys() - set(index["trained"])

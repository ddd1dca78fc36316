"""Files in the official layout go in and out unchanged; anything else is refused with what differs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx2_train.errors import CheckpointError
from ltx2_train.model import ModelConfig, build_model, initial_weights, load_transformer, save_transformer
from ltx2_train.model.weights import PREFIX
from tests.golden.transformer_cases import VARIANTS, inputs, tiny_header, tiny_model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_round_trip(tmp_path, variant: str):
    model = tiny_model(variant)
    save_transformer(tmp_path / "model.safetensors", model)
    loaded = load_transformer(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    video, audio, perturbations = inputs(variant, "joint-masks-stg")
    for a, b in zip(model(video, audio, perturbations), loaded(video, audio, perturbations), strict=True):
        assert torch.equal(a, b)
    rounded = load_transformer(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert {t.dtype for t in rounded.parameters()} == {torch.bfloat16}


def write(path, tensors: dict, header: dict | None):
    save_file(tensors, path, None if header is None else {"config": json.dumps({"transformer": header})})


def official_tensors() -> dict[str, torch.Tensor]:
    return {PREFIX + n: t.clone() for n, t in tiny_model("2.3").state_dict().items()}


def test_siblings_in_the_file_are_left_alone(tmp_path):
    siblings = {f"{PREFIX}video_embeddings_connector.learnable_registers": torch.ones(2, 2), "vae.x": torch.ones(1)}
    write(tmp_path / "m.safetensors", official_tensors() | siblings, tiny_header("2.3"))
    load_transformer(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}proj_out.bias"), "missing proj_out.bias"),
        (lambda t: t.update({f"{PREFIX}extra": torch.ones(1)}), "surplus extra"),
        (lambda t: t.update({f"{PREFIX}proj_out.bias": torch.ones(3)}), r"proj_out.bias is \[3\], needs \[8\]"),
    ],
)
def test_what_differs_is_named(tmp_path, change, message: str):
    tensors = official_tensors()
    change(tensors)
    write(tmp_path / "m.safetensors", tensors, tiny_header("2.3"))
    with pytest.raises(CheckpointError, match=message):
        load_transformer(tmp_path / "m.safetensors")


def test_a_file_without_an_architecture_or_not_safetensors_is_refused(tmp_path):
    write(tmp_path / "bare.safetensors", official_tensors(), None)
    with pytest.raises(CheckpointError, match="no `config`"):
        load_transformer(tmp_path / "bare.safetensors")
    torch.save({"a": 1}, tmp_path / "pickle.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_transformer(tmp_path / "pickle.safetensors")


def test_training_starts_from_a_file_with_its_connectors(tmp_path):
    source = build_model(ModelConfig(name="tiny"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter))
    tensors = {PREFIX + n.split(".", 1)[1]: t for n, t in source.state_dict().items()}
    write(tmp_path / "m.safetensors", tensors, source.config.to_header())
    config = ModelConfig(weights=str(tmp_path / "m.safetensors"))
    model = build_model(config)
    found = dict(initial_weights(model, config, seed=0))
    assert found.keys() == source.state_dict().keys()
    assert all(torch.equal(found[n], t) for n, t in source.state_dict().items())
    assert load_file(tmp_path / "m.safetensors").keys() == tensors.keys()

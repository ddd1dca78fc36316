"""Released files in every form give the same model, bit for bit; anything else is refused with what differs."""

import json
import logging
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx2_train.errors import CheckpointError
from ltx2_train.model import (
    ModelConfig,
    TransformerConfig,
    build_model,
    initial_weights,
    load_transformer,
    named_config,
    save_transformer,
)
from ltx2_train.model.build import official_key
from ltx2_train.model.config import CONFIGURATIONS
from ltx2_train.model.generation import generation_of
from ltx2_train.model.lora import LoraConfig, add_lora
from ltx2_train.model.weights import PREFIX, load_connectors, read_config, read_weights, released_dtype
from ltx2_train.testing.released import GENERATIONS, tiny_config, transformer_tensors, write_release
from ltx2_train.weightfile import FileTensor, open_weights, write_weights
from tests.golden.transformer_cases import VARIANTS, inputs, tiny_header, tiny_model
from tests.peers.diffusers_transformer import random_inputs


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_round_trip(tmp_path, variant: str):
    model = tiny_model(variant)
    save_transformer(tmp_path / "model.safetensors", model)
    assert open_weights(tmp_path / "model.safetensors").model_version == f"{variant[:3]}.0"
    loaded = load_transformer(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    video, audio, perturbations = inputs(variant, "joint-masks-stg")
    for a, b in zip(model(video, audio, perturbations), loaded(video, audio, perturbations), strict=True):
        assert torch.equal(a, b)
    rounded = load_transformer(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert {t.dtype for t in rounded.parameters()} == {torch.bfloat16}


def transformer_of(directory: Path, generation: str) -> Path:
    """A released file without what surrounds transformer and connectors."""
    return write_release(directory, generation, parts=("transformer",)).transformer


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_a_released_file_loads_as_it_is_and_runs(tmp_path, generation: str):
    release = write_release(tmp_path, generation)
    stored = load_file(release.transformer)
    model, connectors = load_transformer(release.transformer), load_connectors(release.transformer)
    loaded = {PREFIX + name: t for module in (model, connectors) for name, t in module.state_dict().items()}
    assert loaded.keys() == {key for key in stored if key.startswith(PREFIX)}
    for key, tensor in loaded.items():
        assert (tensor.dtype, tensor.device.type) == (released_dtype(key), "cpu")
        assert torch.equal(tensor, stored[key])
    config = model.config
    text = torch.randn(2, 7, config.video_connector_width), torch.randn(2, 7, config.audio_connector_width)
    contexts = connectors(*text, torch.ones(2, 7))
    assert [tuple(c.shape) for c in contexts] == [(2, 128, t.shape[-1]) for t in text]
    video, audio = random_inputs(config, batch=2, grid=(2, 2, 2), steps=3, text=4)
    whole = load_transformer(release.transformer, dtype=torch.float32)(video, audio)
    rounded = model(video, audio)
    for exact, rough in zip(whole, rounded, strict=True):
        assert exact.isfinite().all()
        assert (exact - rough).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_file_in_parts_is_the_same_model(tmp_path, generation: str):
    whole = open_weights(transformer_of(tmp_path, generation))
    metadata = {"config": json.dumps(whole.config()), "model_version": "2.3.0"}
    *parts, index = write_weights(tmp_path / "parts" / "m.safetensors", whole, metadata, max_bytes=100_000)
    assert len(parts) > 3
    for path in (index, index.parent):
        for load in (load_transformer, load_connectors):
            loaded, expected = load(path).state_dict(), load(whole.path).state_dict()
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(loaded[name], t) for name, t in expected.items())


def test_the_generation_is_told_by_the_architecture(tmp_path):
    assert [generation_of(named_config(n)) for n in ("ltx2_19b", "ltx2_3_22b", "ltx2_5_22b")] == list(GENERATIONS)
    assert [generation_of(TransformerConfig.from_header(tiny_header(v))) for v in VARIANTS[:4]] == [*GENERATIONS, "2.5"]
    assert {generation_of(named_config(n)) for n in CONFIGURATIONS} == set(GENERATIONS)
    mixed = tiny_config("2.3", use_keyframes_abs_pos_embedding=True)
    assert generation_of(mixed) == "unknown"
    write(tmp_path / "mixed.safetensors", transformer_tensors(mixed), mixed.to_header())
    assert generation_of(load_transformer(tmp_path / "mixed.safetensors").config) == "unknown"


def write(path: Path, tensors: dict, header: dict | None) -> Path:
    save_file(tensors, path, None if header is None else {"config": json.dumps({"transformer": header})})
    return path


def official_tensors() -> dict[str, torch.Tensor]:
    return {PREFIX + n: t.clone() for n, t in tiny_model("2.3").state_dict().items()}


def test_siblings_in_the_file_are_left_alone(tmp_path):
    siblings = {f"{PREFIX}video_embeddings_connector.learnable_registers": torch.ones(2, 2), "vae.x": torch.ones(1)}
    load_transformer(write(tmp_path / "m.safetensors", official_tensors() | siblings, tiny_header("2.3")))


CHANGES = [
    (lambda t: t.pop(f"{PREFIX}proj_out.bias"), "1 tensors do not fit .* missing proj_out.bias"),
    (lambda t: t.update({f"{PREFIX}extra": torch.ones(1)}), "surplus extra"),
    (lambda t: t.update({f"{PREFIX}proj_out.bias": torch.ones(3)}), r"proj_out.bias is \[3\], needs \[8\]"),
    (lambda t: [t.pop(k) for k in list(t) if "transformer_blocks.1" in k], r"and \d\d more$"),
    (lambda t: [t.pop(k) for k in list(t)] + [t.update({"vae.x": torch.ones(1)})], r"no transformer .* like 'vae.x'"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_differs_is_named(tmp_path, change, message: str):
    tensors = official_tensors()
    change(tensors)
    write(tmp_path / "m.safetensors", tensors, tiny_header("2.3"))
    with pytest.raises(CheckpointError, match=message):
        load_transformer(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "silu"}, r"activation_fn='silu' \(supported: 'gelu-approximate'\)"),
        ({"mixture_of_experts": 8, "dropout": None}, r"dropout=None .*; mixture_of_experts=8 \(unknown\)"),
        ({"rope_type": "spiral"}, "rope_type|spiral"),
        ({"cross_attention_dim": 7}, "cross_attention_dim=7 must equal heads x head width = 40"),
        ({f"x{i}": i for i in range(30)}, "and 10 more$"),
    ],
)
def test_an_architecture_that_is_not_ours_is_refused(tmp_path, change: dict, message: str):
    write(tmp_path / "m.safetensors", official_tensors(), tiny_header("2.3") | change)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["num_layers", "connector_num_layers", "audio_connector_num_layers"])
def test_more_blocks_than_tensors_are_refused_before_they_are_built(tmp_path, name: str, monkeypatch):
    path = transformer_of(tmp_path, "2.3")
    tensors, header = load_file(path), open_weights(path).config("transformer")
    write(path, tensors, header | {name: 500})
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self: pytest.fail("a module was built"))
    for load in (load_transformer, load_connectors, read_config):
        with pytest.raises(CheckpointError, match=rf"header states .*{name}=500, and it holds \d+ tensors"):
            load(path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_that_are_not_floating_point_are_refused(tmp_path, dtype):
    tensors = official_tensors()
    tensors[f"{PREFIX}proj_out.bias"] = tensors[f"{PREFIX}proj_out.bias"].to(dtype)
    write(tmp_path / "m.safetensors", tensors, tiny_header("2.3"))
    with pytest.raises(CheckpointError, match=f"1 weights are .* not read: proj_out.bias is {dtype}"):
        load_transformer(tmp_path / "m.safetensors")


def test_connectors_alone_are_no_transformer(tmp_path):
    path = transformer_of(tmp_path, "2.3")
    own = {key: t for key, t in load_file(path).items() if "_embeddings_connector." in key}
    write(tmp_path / "c.safetensors", own, open_weights(path).config("transformer"))
    load_connectors(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="text connectors and no transformer in it"):
        load_transformer(tmp_path / "c.safetensors")


def test_a_name_that_no_file_can_have_is_refused():
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_transformer(name)


def test_a_file_without_an_architecture_or_not_safetensors_is_refused(tmp_path):
    write(tmp_path / "bare.safetensors", official_tensors(), None)
    with pytest.raises(CheckpointError, match="no `config.transformer` in the header"):
        load_transformer(tmp_path / "bare.safetensors")
    torch.save({"a": 1}, tmp_path / "pickle.safetensors")
    with pytest.raises(CheckpointError, match="a pickle, not safetensors"):
        load_transformer(tmp_path / "pickle.safetensors")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a diffusers pipeline without a LTX2VideoTransformer3DModel"):
        load_transformer(tmp_path / "pipeline")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = transformer_of(tmp_path, "2.3")
    tensors, metadata = load_file(path), open_weights(path).config("transformer")
    tensors[f"{PREFIX}transformer_blocks.1.ff.net.2.weight"][3, 5] = float("nan")
    tensors[f"{PREFIX}audio_embeddings_connector.learnable_registers"][0, 0] = float("inf")
    write(path, tensors, metadata)
    with pytest.raises(CheckpointError, match=r"transformer_blocks.1.ff.net.2.weight: 1 of 6,400 values .* NaN or inf"):
        load_transformer(path)
    with pytest.raises(CheckpointError, match="audio_embeddings_connector.learnable_registers: 1 of 2,560"):
        load_connectors(path)


def test_fp8_weights_are_dequantised_with_a_notice(tmp_path, caplog):
    path = transformer_of(tmp_path, "2.3")
    tensors, header = load_file(path), open_weights(path).config("transformer")
    expected = {}
    for key in [key for key in tensors if key.endswith("to_q.weight") and "transformer_blocks" in key]:
        scale = tensors[key].float().abs().max() / 448
        tensors[key] = (tensors[key].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale"], tensors[key.replace(".weight", ".input_scale")] = scale, torch.tensor(1.0)
        expected[key.removeprefix(PREFIX)] = (tensors[key].float() * scale).bfloat16()
    with caplog.at_level(logging.WARNING):
        model = load_transformer(write(tmp_path / "fp8.safetensors", tensors, header))
    assert f"{len(expected)} of its weights are FP8; they are dequantised to bf16" in caplog.text
    assert len(expected) == 12
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_each_tensor_is_let_go_before_the_next_is_read(tmp_path, monkeypatch):
    """So that a converted model is in memory once, and not beside the file."""
    read, alive = FileTensor.read, []

    def watched(self: FileTensor) -> torch.Tensor:
        alive[:] = [value for value in alive if value() is not None]
        assert len(alive) <= 1, "the tensor before is being replaced by this one, all others are gone"
        value = read(self)
        alive.append(weakref.ref(value))
        return value

    path = transformer_of(tmp_path, "2.5")
    monkeypatch.setattr(FileTensor, "read", watched)
    load_transformer(path, dtype=torch.float64)
    load_connectors(path, dtype=torch.float64)


# --- what training starts from ---


def initial(config: ModelConfig, model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    given = initial_weights(model, config, seed)
    return {name: t if isinstance(t, torch.Tensor) else t.read() for name, t in given}


@pytest.mark.parametrize("streams", [["video", "audio"], ["video"], ["audio"]])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_training_starts_from_a_file_with_its_connectors(tmp_path, generation: str, streams: list[str]):
    path = transformer_of(tmp_path, generation)
    config = ModelConfig(weights=str(path), streams=streams)
    model, stored = build_model(config), load_file(path)
    found = initial(config, model)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], stored[official_key(name)]) for name in found)
    assert all(found[name].shape == t.shape for name, t in model.state_dict().items())


def test_adapters_are_new_and_the_base_is_read_through_them(tmp_path):
    path = transformer_of(tmp_path, "2.3")
    config = ModelConfig(weights=str(path))
    model, stored = add_lora(build_model(config), LoraConfig(rank=2)), load_file(path)
    found = initial(config, model)
    base = {name for name in found if "lora_" not in name}
    assert found.keys() == model.state_dict().keys()
    assert len(found) - len(base) == 2 * sum(".base_layer.weight" in name for name in base) > 0
    assert all(torch.equal(found[name], stored[official_key(name)]) for name in base)


def test_a_file_that_lacks_the_connectors_is_no_start(tmp_path):
    save_transformer(tmp_path / "m.safetensors", load_transformer(transformer_of(tmp_path, "2.3")))
    config = ModelConfig(weights=str(tmp_path / "m.safetensors"))
    with pytest.raises(CheckpointError, match="missing audio_embeddings_connector.learnable_registers"):
        initial(config, build_model(config))


def test_nothing_is_read_before_it_is_wanted(tmp_path, monkeypatch):
    path = transformer_of(tmp_path, "2.5")
    config, tensors = read_weights(path)
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("the file was opened again"))
    assert {name: t.shape for name, t in tensors.items()}["patchify_proj.weight"] == (40, 128)
    assert config.use_keyframes_abs_pos_embedding


def test_the_header_of_a_model_selects_the_text_feature_extractor(tmp_path):
    """The published implementation asks for all four keys, or none."""
    keys = {f"caption_projection_{n}_linear" for n in ("first", "second")} | {"caption_proj_input_norm"}
    for generation, expected in zip(GENERATIONS, (set(), keys, keys), strict=True):
        header = read_config(transformer_of(tmp_path / generation, generation)).to_header()
        assert {key for key in keys if header.get(key) is False} == expected

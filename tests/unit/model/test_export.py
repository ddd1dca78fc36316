"""Synthetic releases of every generation go out in every layout and come back to the last bit."""

import hashlib
import json

import pytest
import torch

from ltx2_train.errors import CheckpointError
from ltx2_train.model import Transformer, load_transformer
from ltx2_train.model.connector import Connectors
from ltx2_train.model.export import (
    DIFFUSERS_FILE,
    Base,
    Coverage,
    Provenance,
    adapted,
    cast,
    export_dtype,
    official_layout,
    stream_of,
    write_diffusers,
)
from ltx2_train.model.lora import linear_weights
from ltx2_train.model.lora_file import Adapter, held
from ltx2_train.model.weights import PREFIX, load_connectors
from ltx2_train.testing.released import write_release
from ltx2_train.weightfile import open_weights, write_weights
from tests.peers.diffusers_transformer import peer_arguments, random_inputs
from tests.unit.model.test_lora_file import adapters

GENERATIONS = ("2.0", "2.3", "2.5")
NAMES = ("patchify_proj", "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_ff.net.2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    def released(generation: str) -> Base:
        directory = tmp_path_factory.mktemp(f"release-{generation}")
        return Base(
            write_release(directory, generation, parts=("transformer", "text_projection", "vocoder")).transformer
        )

    return {generation: released(generation) for generation in GENERATIONS}


def changed(base: Base) -> dict:
    """The base with adapters, in its own dtypes."""
    tensors = adapted(base.tensors, adapters(Transformer(base.config), NAMES, scale=0.5))
    return {name: cast(tensor, export_dtype(name, base.tensors[name], None)) for name, tensor in tensors.items()}


def assert_bits(model, tensors):
    """Every parameter is the tensor of its name."""
    own = dict(model.named_parameters())
    assert own.keys() <= tensors.keys()
    for name, parameter in own.items():
        expected = tensors[name].read()
        assert parameter.dtype == expected.dtype, name
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_official_layout_comes_back_to_the_last_bit_with_its_siblings(tmp_path, bases, generation):
    base = bases[generation]
    tensors = changed(base)
    keys, header = official_layout(base.config, tensors, base, with_siblings=True)
    path = tmp_path / "whole.safetensors"
    write_weights(path, keys, header)
    assert_bits(load_transformer(path), tensors)
    assert_bits(load_connectors(path), tensors)
    before, after = open_weights(base.path), open_weights(path)
    assert after.keys() == before.keys()
    assert after.metadata == before.metadata
    changed_keys = {f"{PREFIX}{name}.weight" for name in NAMES}
    assert {key for key in before if not torch.equal(before[key].read(), after[key].read())} == changed_keys


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_transformers_file_has_its_own_sections_and_no_siblings(tmp_path, bases, generation):
    base = bases[generation]
    keys, header = official_layout(base.config, base.tensors, base, with_siblings=False)
    assert all(key.startswith(PREFIX) for key in keys)
    assert json.loads(header["config"]).keys() == {"transformer", "scheduler"}
    assert header["model_version"] == f"{generation}.0"
    write_weights(tmp_path / "transformer.safetensors", keys, header, max_bytes=100_000)
    assert len(list(tmp_path.glob("transformer-0*-of-0*.safetensors"))) > 2
    assert_bits(load_transformer(tmp_path), base.tensors)


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.no_grad()
def test_diffusers_loads_the_folder_and_computes_the_same(tmp_path, bases, generation):
    diffusers = pytest.importorskip("diffusers")
    base = bases[generation]
    tensors = changed(base)
    projections = base.projections
    files = write_diffusers(tmp_path / "out", base.config, tensors, projections, {"step": "1"})
    assert bool(projections) == (generation != "2.5"), "2.5 keeps the projections in a file of their own"
    assert len(files) == (2 if projections else 1)
    assert_bits(load_transformer(tmp_path / "out"), tensors)
    peer = diffusers.LTX2VideoTransformer3DModel.from_pretrained(
        str(tmp_path / "out"), subfolder="transformer", torch_dtype=torch.float32
    )
    model = load_transformer(tmp_path / "out", dtype=torch.float32)
    video, audio = random_inputs(model.config, batch=2, grid=(3, 2, 2), steps=5, text=4)
    theirs = peer(**peer_arguments(video, audio), return_dict=False)
    for ours, their in zip(model(video, audio), theirs, strict=True):
        torch.testing.assert_close(ours, their, atol=2e-5, rtol=0)


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
@torch.no_grad()
def test_diffusers_connectors_hold_connectors_and_projections(tmp_path, bases, generation):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    base = bases[generation]
    write_diffusers(tmp_path / "out", base.config, base.tensors, base.projections, {})
    peer, report = LTX2TextConnectors.from_pretrained(
        str(tmp_path / "out" / "connectors"), torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values())
    stored = open_weights(tmp_path / "out" / "connectors" / DIFFUSERS_FILE)
    assert stored.keys() == peer.state_dict().keys()
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in peer.state_dict().items())
    assert_bits(load_connectors(tmp_path / "out"), base.tensors)
    again = Base(tmp_path / "out")
    assert again.projections.keys() == base.projections.keys()
    folders = [open_weights(tmp_path / "out" / name).fingerprint for name in ("connectors", "transformer")]
    assert again.fingerprint == hashlib.sha256("".join(folders).encode()).hexdigest()
    with pytest.raises(CheckpointError, match="connectors alone"):
        Base(tmp_path / "out" / "connectors")


def test_a_folder_of_diffusers_goes_out_as_a_file_in_the_official_layout(tmp_path, bases):
    first = bases["2.3"]
    write_diffusers(tmp_path / "folder", first.config, first.tensors, first.projections, {})
    base = Base(tmp_path / "folder")
    keys, header = official_layout(base.config, base.tensors, base, with_siblings=True)
    write_weights(tmp_path / "file.safetensors", keys, header)
    assert_bits(load_transformer(tmp_path / "file.safetensors"), first.tensors)
    assert_bits(load_connectors(tmp_path / "file.safetensors"), first.tensors)
    assert open_weights(tmp_path / "file.safetensors").model_version == "2.3.0"


def test_a_quantised_base_goes_out_dequantised(tmp_path, bases):
    stored = {key: tensor.read() for key, tensor in open_weights(bases["2.3"].path).items()}
    name = "transformer_blocks.0.attn1.to_q"
    scale = torch.tensor(0.01)
    eighths = (stored[f"{PREFIX}{name}.weight"].float() / scale).to(torch.float8_e4m3fn)
    stored |= {f"{PREFIX}{name}.weight": eighths, f"{PREFIX}{name}.weight_scale": scale}
    header = bases["2.3"].metadata() | {"_quantization_metadata": "{}"}
    write_weights(tmp_path / "fp8.safetensors", stored, header)
    base = Base(tmp_path / "fp8.safetensors")
    keys, header = official_layout(base.config, changed(base), base, with_siblings=True)
    write_weights(tmp_path / "out.safetensors", keys, header)
    assert not any(key.endswith("weight_scale") for key in keys)
    assert "_quantization_metadata" not in header
    change = adapters(Transformer(base.config), NAMES, scale=0.5)[name].change()
    expected = ((eighths.float() * scale).bfloat16().float() + change).bfloat16()
    assert torch.equal(load_transformer(tmp_path / "out.safetensors").get_parameter(f"{name}.weight"), expected)


def test_a_killed_export_leaves_nothing_behind_in_the_next(tmp_path, bases):
    base = bases["2.3"]
    stale = tmp_path / ".out.partial" / "transformer" / "stale.safetensors"
    stale.parent.mkdir(parents=True)
    stale.touch()
    write_diffusers(tmp_path / "out", base.config, base.tensors, {}, {})
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert {p.name for p in (tmp_path / "out" / "transformer").iterdir()} == {"config.json", DIFFUSERS_FILE}


def test_tensors_are_written_as_the_base_has_them_and_else_as_published():
    table, matrix = "transformer_blocks.0.scale_shift_table", "transformer_blocks.0.attn1.to_q.weight"
    fp32, bf16 = held(torch.zeros(1)), held(torch.zeros(1, dtype=torch.bfloat16))
    assert export_dtype(table, bf16, None) is torch.bfloat16
    assert export_dtype(matrix, fp32, None) is torch.float32
    assert (export_dtype(table, None, None), export_dtype(matrix, None, None)) == (torch.float32, torch.bfloat16)
    assert export_dtype(matrix, bf16, torch.float32) is torch.float32
    assert export_dtype(table, fp32, torch.bfloat16) is torch.float32


def test_an_adapter_without_its_weight_is_refused(bases):
    lost = {"transformer_blocks.7.attn1.to_q": Adapter(held(torch.ones(2, 40)), held(torch.ones(40, 2)))}
    with pytest.raises(CheckpointError, match=r"no transformer_blocks\.7\.attn1\.to_q\.weight of shape \[40, 40\]"):
        adapted(bases["2.3"].tensors, lost)


def test_every_parameter_belongs_to_one_stream(bases):
    config = bases["2.3"].config
    with torch.device("meta"):
        names = [n for m in (Transformer(config), Connectors(config)) for n, _ in m.named_parameters()]
        alone = {
            stream: {
                n for n, _ in Transformer(config, video=stream == "video", audio=stream == "audio").named_parameters()
            }
            for stream in ("video", "audio")
        }
    found = {stream: {n for n in names if stream_of(n) == stream} for stream in ("video", "audio", "audio-video")}
    for stream, own in alone.items():
        assert own == {n for n in found[stream] if "connector" not in n}, (
            "a model of one stream has its parameters alone"
        )
    assert all("connector" not in n for n in found["audio-video"])


def test_coverage_names_idle_adapters_and_counts_what_changed_to_the_last_bit(bases):
    base = bases["2.3"]
    given = adapters(Transformer(base.config), NAMES)
    silent = Adapter(held(torch.ones(4, 80)), held(torch.zeros(20, 4)))
    given["transformer_blocks.1.audio_ff.net.2"] = silent
    coverage = Coverage(linear_weights(Transformer(base.config)))
    coverage.add_adapters(given)
    for name, tensor in adapted(base.tensors, given).items():
        coverage.watched(name, base.tensors[name], cast(tensor, base.tensors[name].dtype)).read()
    report = coverage.report()
    assert report["audio"]["zero_adapters"] == ["transformer_blocks.1.audio_ff.net.2"]
    assert report["audio"]["unchanged"] == report["audio"]["tensors"]
    assert report["video"]["tensors"] - report["video"]["unchanged"] == 2
    assert report["video"]["change_norm"] == pytest.approx(report["video"]["adapter_norm"], rel=1e-2)
    text = "\n".join(coverage.lines())
    assert "audio        no change: all 1 adapters are zero" in text
    assert "audio-video  no change: every tensor is bit-equal to the base" in text


def test_a_header_says_where_the_weights_come_from():
    origin = Provenance(step=7, weights="ema", base_generation="2.3", trigger_word="ball", reference_downscale_factor=2)
    assert origin.metadata() == {
        "step": "7",
        "weights": "ema",
        "base_generation": "2.3",
        "trigger_word": "ball",
        "reference_downscale_factor": "2",
    }

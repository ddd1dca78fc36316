"""What `ltx2-inspect` says of files of every kind is what is in them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx2_train.cli.inspect import main
from ltx2_train.model.diffusers_names import diffusers_config, to_diffusers
from ltx2_train.model.weights import PREFIX, fingerprint, load_transformer
from ltx2_train.testing.released import write_release
from ltx2_train.testing.released_codecs import upsampler_file
from ltx2_train.weightfile import open_weights, write_weights


def told(capsys, *arguments: object) -> dict:
    """The report as JSON."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def counts(report: dict) -> dict[str, tuple[int, int]]:
    return {one["name"]: (one["tensors"], one["parameters"]) for one in report["components"]}


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_a_monolith(capsys, tmp_path, generation: str):
    path = write_release(tmp_path, generation).transformer
    report, stored = told(capsys, path, "--hash"), load_file(path)
    assert (report["kind"], report["generation"]) == ("monolith", generation)
    assert report["model_version"] == f"{generation}.0"
    assert (report["unrecognised"], report["problems"]) == ([], [])
    assert sum(c[0] for c in counts(report).values()) == len(stored)
    assert sum(c[1] for c in counts(report).values()) == sum(t.numel() for t in stored.values())
    assert sum(one["bytes"] for one in report["components"]) == sum(t.nbytes for t in stored.values())
    tables = [
        t for k, t in stored.items() if k.startswith(PREFIX) and "_connector." not in k and "scale_shift_table" in k
    ]
    (transformer,) = [one for one in report["components"] if one["name"] == "transformer"]
    assert transformer["dtypes"]["F32"] == len(tables)
    assert report["fingerprint"] == open_weights(path).fingerprint
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_files_of_a_split_pack(capsys, tmp_path):
    release = write_release(tmp_path, "2.5")
    kinds = {name: told(capsys, getattr(release, name))["kind"] for name in release.__slots__}
    assert kinds == {
        "transformer": "split transformer",
        "text_projection": "text projection",
        "video_vae": "video VAE",
        "audio_vae": "audio VAE and vocoder",
        "vocoder": "audio VAE and vocoder",
    }
    report = told(capsys, release.transformer)
    assert (report["generation"], report["problems"]) == ("2.5", [])
    assert report["metadata"]["gemma_source_checkpoint"]["gemma_version"] == "gemma4-12b-ltx-v1"


def test_an_upsampler(capsys, tmp_path):
    report = told(capsys, upsampler_file(tmp_path / "up.safetensors", "x2"))
    assert (report["kind"], report["unrecognised"]) == ("upsampler", [])


def test_a_lora(capsys, tmp_path):
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(4, 40), f"{layer}.lora_B.weight": torch.ones(40, 4)}
    header = {"trigger": "a red ball", "reference_downscale_factor": "2"}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors", header)
    report = told(capsys, tmp_path / "lora.safetensors")
    assert (report["kind"], report["metadata"], report["problems"]) == ("LoRA", header, [])
    assert report["lora"] == {"form": "official", "layers": 1, "ranks": [4], "alphas": [2.0]}
    assert main([str(tmp_path / "lora.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "rank 4, alpha 2 as it is loaded, on 1 layers, official form" in text
    assert "trigger: a red ball" in text


def test_a_lora_with_half_of_an_adapter_says_so(capsys, tmp_path):
    save_file({"diffusion_model.a.to_q.lora_A.weight": torch.ones(4, 40)}, tmp_path / "lora.safetensors")
    (problem,) = told(capsys, tmp_path / "lora.safetensors")["problems"]
    assert "1 modules lack A or B: a.to_q" in problem


def test_quantised_weights_are_counted_as_parameters_once(capsys, tmp_path):
    path = write_release(tmp_path, "2.3", parts=("transformer",)).transformer
    before, tensors, file = told(capsys, path), load_file(path), open_weights(path)
    keys = [key for key in tensors if key.endswith("attn1.to_k.weight")]
    for key in keys:
        tensors[key], tensors[f"{key}_scale"] = tensors[key].to(torch.float8_e4m3fn), torch.tensor(1.0)
    save_file(tensors, path, {"config": json.dumps(file.config()), "model_version": "2.3.0"})
    report = told(capsys, path)
    assert (report["quantised"], report["problems"]) == (len(keys), [])
    assert {name: c[1] for name, c in counts(report).items()} == {name: c[1] for name, c in counts(before).items()}
    assert main([str(path)]) == 0
    assert f"{len(keys)} FP8 weights, dequantised to bf16" in capsys.readouterr().out


def test_weights_packed_in_another_way_are_told(capsys, tmp_path):
    path = write_release(tmp_path, "2.3", parts=("transformer",)).transformer
    tensors, file = load_file(path), open_weights(path)
    tensors[f"{PREFIX}proj_out.weight"] = torch.ones(128, 20, dtype=torch.uint8)
    save_file(tensors, path, {"config": json.dumps(file.config())})
    (problem,) = told(capsys, path)["problems"]
    assert "1 weights are quantised in a form that is not read: proj_out.weight is torch.uint8" in problem


def diffusers_pipeline(folder: Path, release: Path) -> Path:
    model = load_transformer(release)
    tensors = {to_diffusers(n): t for n, t in model.state_dict().items()}
    write_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors", tensors, {}, max_bytes=200_000)
    (folder / "transformer" / "config.json").write_text(json.dumps(diffusers_config(model.config)))
    (folder / "model_index.json").write_text("{}")
    (folder / "scheduler").mkdir()
    return folder


def test_a_folder_of_diffusers(capsys, tmp_path):
    release = write_release(tmp_path, "2.5", parts=("transformer",)).transformer
    folder = diffusers_pipeline(tmp_path / "pipeline", release)
    wanted = counts(told(capsys, release))["transformer"]
    for path, kind in ((folder, "diffusers pipeline"), (folder / "transformer", "diffusers component")):
        report = told(capsys, path)
        assert (report["kind"], report["generation"], report["model_version"]) == (kind, "2.5", None)
        assert counts(report) == {"transformer": wanted}
        assert report["files"] > 1
        assert report["problems"] == []
        assert report["fingerprint"] == open_weights(folder / "transformer").fingerprint == fingerprint(path)


def test_a_folder_of_diffusers_without_a_transformer(capsys, tmp_path):
    """As latent upsamplers are published."""
    part = tmp_path / "latent_upsampler"
    write_weights(part / "diffusion_pytorch_model.safetensors", {"final_conv.bias": torch.ones(3)}, {})
    (part / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    report = told(capsys, tmp_path, "--hash")
    assert (report["kind"], counts(report)) == ("diffusers pipeline", {"latent_upsampler": (1, 3)})
    file = open_weights(part)
    assert (report["fingerprint"], report["sha256"]) == (file.fingerprint, file.sha256())


def test_what_does_not_fit_is_told(capsys, tmp_path):
    path = write_release(tmp_path, "2.3", parts=("transformer",)).transformer
    tensors, header = load_file(path), open_weights(path).config()
    tensors["loss_scale"] = tensors.pop(f"{PREFIX}proj_out.bias")
    save_file(tensors, path, {"config": json.dumps(header)})
    report = told(capsys, path)
    assert report["unrecognised"] == ["loss_scale"]
    assert "1 tensors do not fit the architecture in its header: missing proj_out.bias" in report["problems"][0]
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "not recognised 1 keys: loss_scale" in text
    assert "model_version not stated" in text


def test_weights_as_the_reference_trainer_saves_them_are_recognised(capsys, tmp_path):
    path = write_release(tmp_path, "2.3", parts=("transformer",)).transformer
    tensors = {k.removeprefix(PREFIX): t for k, t in load_file(path).items() if "_embeddings_connector" not in k}
    save_file(tensors, tmp_path / "bare.safetensors")
    report = told(capsys, tmp_path / "bare.safetensors")
    assert report["kind"] == "transformer without prefix"
    assert (report["unrecognised"], report["generation"]) == ([], None)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), b"plain text, no weights"])
def test_bad_files_end_with_one_line(capsys, tmp_path, content: bytes):
    (tmp_path / "bad.safetensors").write_bytes(content)
    assert main([str(tmp_path / "bad.safetensors")]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("ltx2-inspect: ")
    assert out.err.count("\n") == 1


def test_help_teaches_without_torch():
    code = "import sys; from ltx2_train.cli import inspect as i; i.parser().print_help(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "fingerprint" in out
    assert out.strip().endswith("False")

"""`ltx2-export` on small runs: what a run holds comes out to the last bit, and what cannot be right is refused."""

import json
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx2_train.cli.export import FORMS, main
from ltx2_train.distributed.saved import saved_weights
from ltx2_train.model import load_transformer
from ltx2_train.model.export import Base
from ltx2_train.model.lora import fuse_lora, official_name, trained_adapters
from ltx2_train.model.lora_file import read_lora
from ltx2_train.model.weights import PREFIX, load_connectors
from ltx2_train.testing.released import Release, write_release
from ltx2_train.train.checkpoint import newest_complete
from ltx2_train.weightfile import open_weights
from tests.peers.diffusers_transformer import random_inputs
from tests.unit.cli.commands import SMALL, ltx2_train, small_dataset

STEPS = ("train.max_steps=2", "train.save_every=2", "model.text_tokens=128")
LORA = ("lora=all", "lora.rank=4", "lora.alpha=2")
SLOW = pytest.mark.slow
UNKNOWN_PARTS = dict.fromkeys(("video_codec", "audio_codec", "text_encoder"), "unknown:test")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def base(directory) -> Path:
    return write_release(directory, "2.3").transformer


@pytest.fixture(scope="module")
def train(directory):
    """A function that trains two steps and gives the run directory."""
    data = small_dataset(directory / "latents", **UNKNOWN_PARTS)

    def run(name: str, *settings: str) -> Path:
        target = directory / name
        places = (f"data.datasets.0.path={data}", f"train.run_dir={target}")
        assert ltx2_train(*SMALL, *STEPS, *places, *settings) == 0
        return target

    return run


@pytest.fixture(scope="module")
def lora(train, base) -> Path:
    return train("lora", f"model.weights={base}", *LORA)


@pytest.fixture(scope="module")
def full(train, base) -> Path:
    return train("full", f"model.weights={base}")


@pytest.fixture(scope="module")
def scratch(train) -> Path:
    return train("scratch", "ema=null")


@pytest.fixture(scope="module")
def merged_file(lora, directory) -> Path:
    return export(lora, "merged", directory / "out" / "merged.safetensors")


@pytest.fixture(scope="module")
def full_file(full, base, directory) -> Path:
    return export(full, "full", directory / "out" / "full.safetensors", "--base", str(base))


@cache
def stored(run: Path, averaged: str | None = "ema") -> dict[str, torch.Tensor]:
    return dict(saved_weights(newest_complete(run), averaged=averaged))


def export(run: Path, form: str, out: Path, *options: str) -> Path:
    assert main([str(run), "--to", form, "--out", str(out), *options]) == 0
    return out


def refused(capsys, *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def report(out: Path) -> dict[str, Any]:
    return json.loads(out.with_name(f"{out.name}.report.json").read_text())


def assert_holds(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """Transformer and connectors in `out`, as our loaders read them, are these tensors to the last bit."""
    found = {n: p for m in (load_transformer(out), load_connectors(out)) for n, p in m.named_parameters()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def expected_merge(run: Path, base: Path) -> dict[str, torch.Tensor]:
    """Base plus adapters, summed in fp32 and rounded once."""
    adapters = trained_adapters(stored(run).items(), scale=0.5)
    tensors = {name: tensor.read() for name, tensor in Base(base).tensors.items()}
    for module, adapter in adapters.items():
        weight = tensors[f"{module}.weight"]
        tensors[f"{module}.weight"] = (weight.float() + adapter.change()).to(weight.dtype)
    return tensors


def expected_full(run: Path, base: Path) -> dict[str, torch.Tensor]:
    """The run's average in the base's dtypes."""
    like = Base(base).tensors
    return {official_name(n): t.to(like[official_name(n)].dtype) for n, t in stored(run).items()}


# --- what comes out ---


def test_a_lora_has_the_official_keys_and_says_where_it_comes_from(lora, base, tmp_path):
    more = ("--trigger", "red ball", "--reference-downscale", "2")
    file = read_lora(export(lora, "lora", tmp_path / "l.safetensors", *more))
    assert len(file.adapters) == 2 * (6 * 4 + 2 * 2)
    assert all(key.startswith("diffusion_model.transformer_blocks.") for key in open_weights(file.path))
    for module, adapter in trained_adapters(stored(lora).items(), scale=0.5).items():
        assert torch.equal(file.adapters[module].a.read(), adapter.a.read().bfloat16())
        assert torch.equal(file.adapters[module].b.read(), (adapter.b.read() * 0.5).bfloat16())
    assert file.metadata["sampler_profile"]["name"] == "demo"
    assert {key: file.metadata[key] for key in file.metadata if key != "sampler_profile"} == {
        "provenance": {**UNKNOWN_PARTS, "video_text_width": 40, "audio_text_width": 20, "text_cache": "features"},
        "text_tokens": "128",
        "sampled_streams": ["audio", "video"],
        "clip_size": {"frames": 9, "width": 32, "height": 32, "fps": 25.0},
        "format": "pt",
        "rank": "4",
        "alpha": "2",
        "alpha_folded": "true",
        "step": "2",
        "weights": "ema",
        "base_generation": "2.3",
        "base_name": base.name,
        "base_fingerprint": open_weights(base).fingerprint,
        "trigger_word": "red ball",
        "reference_downscale_factor": "2",
    }


@torch.no_grad()
def test_both_lora_forms_fused_are_the_merged_model(lora, base, tmp_path):
    merged = load_transformer(export(lora, "merged", tmp_path / "m.safetensors", "--dtype", "fp32"))
    video, audio = random_inputs(merged.config, 2, (3, 2, 2), 5, 4)
    for form in ("lora", "lora-diffusers"):
        path = export(lora, form, tmp_path / f"{form}.safetensors", "--dtype", "fp32")
        fused = fuse_lora(load_transformer(base, dtype=torch.float32), path)
        for a, b in zip(fused(video, audio), merged(video, audio), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_base_and_adapters_are_summed_in_fp32_and_rounded_once(lora, base, merged_file):
    assert_holds(merged_file, expected_merge(lora, base))


def test_a_fine_tune_is_rounded_once(full, base, full_file):
    assert_holds(full_file, expected_full(full, base))


@pytest.mark.parametrize("form", ["diffusers", pytest.param("transformer", marks=SLOW)])
def test_base_and_adapters_come_out_in_every_layout(lora, base, tmp_path, form):
    out = export(lora, form, tmp_path / ("m" if form == "diffusers" else "m.safetensors"))
    assert_holds(out, expected_merge(lora, base))


@pytest.mark.parametrize("form", ["transformer", pytest.param("diffusers", marks=SLOW)])
def test_a_fine_tune_comes_out_in_every_layout(full, base, tmp_path, form):
    out = export(full, form, tmp_path / ("f" if form == "diffusers" else "f.safetensors"))
    assert_holds(out, expected_full(full, base))


@pytest.mark.parametrize("form", ["merged", "full"])
def test_siblings_and_header_of_the_base_are_kept(merged_file, full_file, base, form):
    before, after = open_weights(base), open_weights({"merged": merged_file, "full": full_file}[form])
    assert after.keys() == before.keys()
    assert not any("_orig_mod" in key or "lora_" in key for key in after)
    siblings = [key for key in before if not key.startswith(PREFIX)]
    assert {key.split(".")[0] for key in siblings} == {"vae", "audio_vae", "vocoder", "text_embedding_projection"}
    for key in siblings:
        assert torch.equal(before[key].read().view(torch.uint8), after[key].read().view(torch.uint8)), key
    assert {key: after.metadata[key] for key in before.metadata} == before.metadata
    assert after.metadata["base_fingerprint"] == before.fingerprint


def test_dtypes_are_those_of_the_base(full_file, base):
    before, after = open_weights(base), open_weights(full_file)
    assert {key: before[key].dtype for key in before} == {key: after[key].dtype for key in before}
    assert Counter(t.dtype for t in after.under(PREFIX).values())[torch.float32] == 2 * 6 + 2, "the tables"


def test_the_trained_weights_themselves_come_out_on_request(full, tmp_path):
    out = export(full, "transformer", tmp_path / "raw.safetensors", "--weights", "raw", "--dtype", "fp32")
    raw = stored(full, None)
    assert_holds(out, {official_name(name): tensor for name, tensor in raw.items()})
    assert open_weights(out).metadata["weights"] == "raw"
    assert any(not torch.equal(tensor, raw[name]) for name, tensor in stored(full).items())


@SLOW
def test_what_was_frozen_is_the_bases_to_the_last_bit(train, base, tmp_path):
    run = train("frozen", f"model.weights={base}", "model.train_connectors=false", "engine.precision=bf16")
    before, after = open_weights(base), open_weights(export(run, "full", tmp_path / "f.safetensors"))
    moved = {key for key in before if not torch.equal(before[key].read(), after[key].read())}
    assert moved
    assert all(key.startswith(PREFIX) and "connector" not in key for key in moved)


def test_a_run_from_scratch_needs_no_base(scratch, tmp_path, capsys):
    out = export(scratch, "full", tmp_path / "s.safetensors")
    assert "no base: transformer and connectors alone" in capsys.readouterr().out
    tensors = {official_name(name): tensor for name, tensor in stored(scratch, None).items()}
    tables = {name for name in tensors if "scale_shift_table" in name}
    assert_holds(out, {n: t if n in tables else t.bfloat16() for n, t in tensors.items()})
    metadata = open_weights(out).metadata
    assert (metadata["model_version"], metadata["weights"], metadata["base_generation"]) == ("2.5.0", "raw", "2.5")
    assert "base_fingerprint" not in metadata


def test_large_files_are_cut_and_load_again(full, base, tmp_path):
    export(full, "full", tmp_path / "cut" / "f.safetensors", "--max-shard-gb", "0.001")
    assert len(list((tmp_path / "cut").glob("f-*-of-*.safetensors"))) > 3
    assert_holds(tmp_path / "cut", expected_full(full, base))


def test_a_part_is_not_written_over(full, tmp_path, capsys):
    sharded = ("--to", "full", "--out", tmp_path / "f.safetensors", "--max-shard-gb", "0.001")
    for count in range(2, 40):  # however many parts there will be
        tmp_path.joinpath(f"f-00002-of-{count:05d}.safetensors").touch()
    before = set(tmp_path.iterdir())
    assert "exists. Move it away" in refused(capsys, full, *sharded)
    assert set(tmp_path.iterdir()) == before


def test_adapters_of_a_stream_that_was_not_trained_are_named(train, base, tmp_path, capsys):
    run = train("silent", f"model.weights={base}", *LORA, "objective.streams=[video]")
    out = export(run, "lora", tmp_path / "l.safetensors")
    assert "audio        no change: all 20 adapters are zero" in capsys.readouterr().out
    video, audio = (report(out)["streams"][stream] for stream in ("video", "audio"))
    assert (audio["adapted"], len(audio["zero_adapters"]), audio["adapter_norm"]) == (20, 20, 0.0)
    assert (video["adapted"], len(video["zero_adapters"])) == (20, 0)
    assert video["adapter_norm"] > 0


def test_the_report_counts_what_changed(full_file):
    written = report(full_file)
    assert written["files"] == {"full.safetensors": full_file.stat().st_size}
    for stream in ("video", "audio", "audio-video"):
        found = written["streams"][stream]
        assert 0 <= found["unchanged"] < found["tensors"]
        assert 0 < found["relative_change"] < 1


def test_a_card_tells_of_base_licence_training_and_data(lora, base, tmp_path):
    export(lora, "lora", tmp_path / "card" / "l.safetensors", "--card", "--trigger", "red ball")
    text = (tmp_path / "card" / "README.md").read_text()
    for fact in (
        "# l\n\nA LoRA in the official key form.",
        "For ComfyUI and the reference pipelines.",
        "`l.safetensors`",
        f"base: {base.name} (LTX 2.3)",
        open_weights(base).fingerprint,
        "carry the base's licence",
        "| LoRA rank, alpha | 4, 2 |",
        "- latents: 24 samples",
        "trigger word: red ball",
        "profile demo: 24 steps",
    ):
        assert fact in text
    assert str(tmp_path.parent) not in text, "no path of this machine is published"


def test_a_card_tells_of_stand_ins_and_of_a_base_from_scratch(directory):
    data, cards = small_dataset(directory / "by-stand-ins"), {}
    for name, before, form in (("scratch", None, "full"), ("own", "scratch", "merged"), ("other", "own", "lora")):
        start = before and directory / f"card-{before}" / "shown.safetensors"
        run, out = directory / f"stand-ins-{name}", directory / f"card-{name}" / "shown.safetensors"
        settings = () if start is None else (f"model.weights={start}", *LORA)
        places = (f"data.datasets.0.path={data}", f"train.run_dir={run}")
        assert ltx2_train(*SMALL, *STEPS, *places, *settings) == 0
        export(run, form, out, "--card")
        cards[name] = (out.parent / "README.md").read_text()
        assert "# shown\n" in cards[name]
        assert "stand-ins (video codec dct-1, audio codec dct-1, text encoder hashed-1/40+20)" in cards[name]
        assert "neither with released weights nor in ComfyUI" in cards[name]
        for wrong in ("For ComfyUI", "Used as the base is", "(LTX 2", "weights derived from LTX"):
            assert wrong not in cards[name]
    assert "These weights were trained from scratch" in cards["scratch"]
    assert "- base: shown.safetensors (architecture of LTX " in cards["own"]
    assert "the base is no released file, but was exported from a run that began from scratch" in cards["own"]
    assert "nothing says that the base is a released file" in cards["other"]


def test_a_card_of_a_run_from_scratch_claims_no_base(scratch, tmp_path):
    export(scratch, "transformer", tmp_path / "card" / "t.safetensors", "--card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert "Trained from scratch: it goes with the codecs and the text encoder that made its data." in text
    assert "the base" not in text


def test_a_card_shows_losses_and_samples_of_the_run(lora, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    samples = run / "evals" / "samples-00000002"
    samples.mkdir(parents=True)
    (samples / "000-sampled.mp4").write_bytes(b"film")
    (samples / "000-sampled-strip.png").write_bytes(b"picture")
    sampled = {"media": "000-sampled.mp4", "strip": "000-sampled-strip.png"}
    clips = [{"caption": "A red ball.", "sampled": sampled}, {"caption": "not shown", "sampled": {}}]
    (samples / "samples.json").write_text(json.dumps({"step": 2, "clips": clips}))
    mean = {"mean": {"mean": 1.25, "low": 1.0, "high": 1.5}}
    for step in (0, 1, 2):
        losses = {"step": step, "raw": {"video": mean, "audio": mean}}
        (run / "evals" / f"heldout-{step:08d}.json").write_text(json.dumps(losses))
    export(run, "lora", tmp_path / "card" / "l.safetensors", "--card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert "[A red ball.](samples/000-sampled.mp4)" in text
    assert "not shown" not in text
    assert (tmp_path / "card" / "samples" / "000-sampled.mp4").read_bytes() == b"film"
    assert "| step 0 | 1.2500 ± 0.2500 |" in text
    assert "| step 2 |" in text
    assert "| step 1 |" not in text


# --- what is refused ---


def test_another_base_is_refused(lora, directory, base, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other: Release = write_release(tmp_path / "other", "2.3", seed=1)
    out = tmp_path / "m.safetensors"
    assert "not what the run started from" in refused(
        capsys, lora, "--to", "merged", "--out", out, "--base", other.transformer
    )
    old = write_release(tmp_path / "other", "2.0").transformer
    assert "fingerprint" in refused(capsys, lora, "--to", "merged", "--out", out, "--base", old)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_base_that_was_moved_has_to_be_named(lora, base, tmp_path, capsys):
    moved = base.rename(tmp_path / "moved.safetensors")
    try:
        out = tmp_path / "m.safetensors"
        assert "is not there. Give --base" in refused(capsys, lora, "--to", "merged", "--out", out)
        assert_holds(export(lora, "merged", out, "--base", str(moved)), expected_merge(lora, moved))
    finally:
        moved.rename(base)


def test_a_form_that_the_run_has_not_is_refused(lora, full, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    for form in ("lora", "lora-diffusers", "merged"):
        assert "there are no adapters. Use --to full" in refused(capsys, full, "--to", form, "--out", out)
    assert "Use --to merged" in refused(capsys, lora, "--to", "full", "--out", out)


def test_nothing_is_written_over(lora, tmp_path, capsys):
    (tmp_path / "l.safetensors").touch()
    assert "exists. Move it away" in refused(capsys, lora, "--to", "lora", "--out", tmp_path / "l.safetensors")
    (tmp_path / "README.md").touch()
    (tmp_path / "n.safetensors.report.json").touch()
    assert "report.json exists" in refused(capsys, lora, "--to", "lora", "--out", tmp_path / "n.safetensors")
    assert "README.md exists" in refused(capsys, lora, "--to", "lora", "--out", tmp_path / "m.safetensors", "--card")


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_does_not_fit_the_form_is_refused(lora, tmp_path, capsys, form):
    name = "x.safetensors" if form == "diffusers" else "x.ckpt"
    assert "--out" in refused(capsys, lora, "--to", form, "--out", tmp_path / name)


def test_trained_connectors_are_not_left_out_without_a_word(scratch, tmp_path, capsys):
    message = refused(capsys, scratch, "--to", "diffusers", "--out", tmp_path / "d")
    assert "trained the connectors" in message
    assert not list(tmp_path.iterdir())


def test_an_average_that_the_run_has_not_is_refused(scratch, tmp_path, capsys):
    message = refused(capsys, scratch, "--to", "full", "--out", tmp_path / "x.safetensors", "--weights", "ema")
    assert "no moving average" in message


def test_a_damaged_checkpoint_is_refused(lora, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(lora, copy)
    file = next(newest_complete(copy).glob("*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert "the file is damaged" in refused(capsys, copy, "--to", "lora", "--out", tmp_path / "l.safetensors")


def test_weights_that_are_not_finite_are_refused(full, tmp_path, capsys, monkeypatch):
    def poisoned(*arguments, **settings):
        for name, tensor in saved_weights(*arguments, **settings):
            yield name, tensor * float("nan") if name.endswith("proj_out.bias") else tensor

    monkeypatch.setattr("ltx2_train.distributed.saved.saved_weights", poisoned)
    message = refused(capsys, full, "--to", "full", "--out", tmp_path / "f.safetensors")
    assert "proj_out.bias is not finite" in message
    assert not (tmp_path / "f.safetensors").exists()


@SLOW
def test_a_base_for_adapters_from_scratch_is_refused(train, directory, tmp_path, capsys):
    run = train("adapters", *LORA)
    sibling = export(train("donor"), "full", tmp_path / "donor.safetensors")
    message = refused(capsys, run, "--to", "merged", "--out", tmp_path / "m.safetensors", "--base", sibling)
    assert "beside weights from scratch" in message
    assert load_transformer(export(run, "merged", tmp_path / "m.safetensors")).config.num_layers == 2

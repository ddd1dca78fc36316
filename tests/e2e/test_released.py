"""Released parts from media files to a sampled clip: files in the published layout, tiny and with drawn numbers in them."""

import json
from pathlib import Path

import pytest
import torch

from data_prep import encode, pack, show, synth
from ltx2_train.cli import export, sample
from ltx2_train.data.datasets import open_dataset
from ltx2_train.media.probe import probe
from ltx2_train.model import load_transformer
from ltx2_train.testing.released import GEMMA, Release, write_release
from tests.unit.cli.commands import ltx2_train
from tests.unit.text.tiny_gemma import edit_config, write_gemma

PROMPT = ("--prompt", "a red ball falls", "--steps", "2", "--profile", "demo")  # the released ones name block 28
SIZE = ("--frames", "9", "--width", "64", "--height", "64", "--fps", "24")


def encoded(place: Path, release: Release, gemma: Path, *more: str) -> Path:
    """A latent dataset of eight short clips, through the released codecs and text encoder."""
    if not (place / "raw").exists():
        synth.main(["--out", str(place / "world"), "--clips", "8", "--width", "64", "--height", "64", "--frames", "17"])
        pack.main([str(place / "world" / "metadata.jsonl"), "--out", str(place / "raw")])
    out = place / f"latents-{len(more)}"
    parts = ["--video-codec", str(release.video_vae), "--audio-codec", str(release.audio_vae)]
    parts += ["--vocoder", str(release.vocoder), "--text-encoder", str(gemma)]
    parts += ["--text-weights", str(release.text_projection), *more]
    encode.main([str(place / "raw"), "--out", str(out), "--buckets", "64x64x17", "--dtype", "fp32", *parts])
    return out / "train"


def trained(data: Path, run: Path, release: Release, *more: str) -> Path:
    """A LoRA run of five steps beside the released weights."""
    settings = (
        "model.train_connectors=false",
        "lora=attention",
        "lora.rank=2",
        "optim.lr=1e-2",
        "optim.warmup_steps=1",
    )
    where = (f"data.datasets.0.path={data}", f"train.run_dir={run}", f"model.weights={release.transformer}")
    small = ("train.max_steps=5", "data.plan.max_samples=2", "data.loader.num_workers=0", "sinks.wandb=false")
    assert ltx2_train("model=tiny", "model.text_tokens=1024", *where, *settings, *small, *more) == 0
    return run


def sampled(capsys: pytest.CaptureFixture[str], *arguments: str) -> Path:
    assert sample.main(list(arguments)) == 0, capsys.readouterr().err
    path = Path(capsys.readouterr().out.splitlines()[-1].split("  (")[0])
    media = probe(path)
    assert (media.frames, media.width, media.height) == (9, 64, 64)
    assert media.sample_rate in (24000, 48000)
    return path


@pytest.fixture(scope="module", params=[pytest.param("2.0", marks=pytest.mark.slow), "2.3", "2.5"])
def place(request, tmp_path_factory):
    """(directory, release, folder of the language model, latent dataset, run)."""
    directory = tmp_path_factory.mktemp(f"released-{request.param}")
    release = write_release(directory, request.param)
    gemma = write_gemma(directory / "gemma", "gemma4_unified" if request.param == "2.5" else "gemma3")
    if request.param == "2.5":
        edit_config(gemma, gemma_version=GEMMA["gemma_version"])
    data = encoded(directory, release, gemma)
    return directory, release, gemma, data, trained(data, directory / "run", release)


def test_five_steps_are_taken_and_recorded(place):
    lines = [json.loads(line) for line in (place[4] / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_video"] for line in lines if "loss_video" in line and "step" in line]
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))


def test_a_run_is_sampled_with_the_parts_that_its_data_were_made_with(place, capsys):
    sampled(capsys, str(place[4]), *PROMPT, *SIZE)


def test_released_weights_are_sampled_as_they_are_and_with_the_exported_lora(place, capsys, tmp_path):
    _, release, gemma, _, run = place
    lora = tmp_path / "mine.safetensors"
    assert export.main([str(run), "--to", "lora", "--base", str(release.transformer), "--out", str(lora)]) == 0
    parts = ["--video-codec", str(release.video_vae), "--audio-codec", str(release.audio_vae), "--vocoder"]
    parts += [str(release.vocoder), "--text-encoder", str(gemma), "--text-weights", str(release.text_projection)]
    capsys.readouterr()
    plain = sampled(capsys, str(release.transformer), *PROMPT, *SIZE, *parts, "--out", str(tmp_path / "a"))
    adapted = sampled(
        capsys, str(release.transformer), *PROMPT, *SIZE, *parts, "--lora", f"{lora}:1.0", "--out", str(tmp_path / "b")
    )
    assert plain.read_bytes() != adapted.read_bytes()


def test_a_run_merged_into_its_base_is_the_run(place, capsys, tmp_path):
    _, release, _, _, run = place
    merged = tmp_path / "merged.safetensors"
    arguments = [
        str(run),
        "--to",
        "merged",
        "--base",
        str(release.transformer),
        "--out",
        str(merged),
        "--weights",
        "raw",
    ]
    assert export.main(arguments) == 0
    before, after = (load_transformer(path).state_dict() for path in (release.transformer, merged))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(".to_" in name for name in changed)


def test_latents_of_another_generation_are_refused_though_their_shapes_fit(place, tmp_path, capsys):
    _, _, gemma, _, _ = place
    first, second = (write_release(tmp_path / name, name, seed=seed) for seed, name in enumerate(("2.0", "2.3")))
    data = encoded(tmp_path, first, gemma, "--text-weights", str(place[1].text_projection))
    where = (f"data.datasets.0.path={data}", f"train.run_dir={tmp_path / 'run'}", f"model.weights={second.transformer}")
    assert ltx2_train("model=tiny", "model.text_tokens=1024", "sinks.wandb=false", "train.max_steps=1", *where) == 2
    assert "was encoded with" in capsys.readouterr().err  # a video VAE, or of 2.0 a text width, of another generation


def test_one_record_is_decoded_for_eye_and_ear(place, tmp_path):
    data = place[3]
    show.main([str(data), "--out", str(tmp_path)])
    assert list(tmp_path.glob("*.mp4"))


def test_stored_contexts_train_the_same_as_features(place, tmp_path):
    """Frozen connectors give the same whether they run at every step or once."""
    directory, release, gemma, data, _ = place
    contexts = encoded(directory, release, gemma, "--text-cache", "context", "--connectors", str(release.transformer))
    assert open_dataset(contexts).manifest.text_cache == "context"
    exact = ("train.log_every=1", "ema=null")
    first = trained(data, tmp_path / "a", release, *exact)
    second = trained(contexts, tmp_path / "b", release, *exact, "model.with_connectors=false")
    losses = [
        [json.loads(line).get("loss_video") for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (first, second)
    ]
    torch.testing.assert_close(*(torch.tensor([x for x in run if x is not None]) for run in losses), rtol=1e-5, atol=0)

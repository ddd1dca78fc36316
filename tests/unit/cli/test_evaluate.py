"""`ltx2-evaluate` on a run of the tiny model: figures of both kinds of weights, samples, a kill in the middle, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx2_train.cli import evaluate, runs, train
from ltx2_train.cli.components import Components
from ltx2_train.cli.schema import load_job
from ltx2_train.data.datasets import open_dataset
from ltx2_train.distributed import world as world_module
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError
from ltx2_train.evals.files import dataset_directory
from ltx2_train.evals.heldout import Heldout, heldout_path
from ltx2_train.evals.samples import SamplesConfig, samples_directory, samples_identity
from ltx2_train.model.modality import Stream
from ltx2_train.testing.shards import manifest_for, write_latent_dataset
from ltx2_train.testing.threads import on_ranks
from ltx2_train.train.checkpoint import MANIFEST, complete_checkpoints
from tests.unit.cli.commands import SMALL, ltx2_train, small_dataset, small_samples

WORLD = World(0, 1, 0, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[3]
HELD = ("train.max_steps=2", "train.save_every=2", "evaluation.samples=null", "evaluation.heldout.clips=4")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data and a run that was evaluated at its end."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = small_dataset(folder / "latents")
    places = (f"data.datasets.0.path={data}", f"train.run_dir={folder / 'run'}", f"evaluation.datasets=[{data}]")
    assert ltx2_train(*SMALL, *places, *HELD, "train.strict_evaluation=true") == 0
    return folder


def heldout(place: Path) -> dict:
    return json.loads((place / "run" / "evals" / "heldout-00000002.json").read_text())


def of_the_trainer(run: Path) -> Heldout:
    """What the run itself measures, put together as the trainer puts it together."""
    job = load_job(run)
    objective = train._plain_objective(job, marker=False)
    return Heldout(open_dataset(job.evaluation.datasets[0]), objective, job.evaluation.heldout, WORLD)


def test_training_and_the_program_measure_both_kinds_of_weights_alike(place, capsys):
    trained = heldout(place)
    assert set(trained) == {"step", "raw", "ema"}
    events = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in events if line.get("event") == "heldout"]
    assert event["loss_video"] == trained["ema"]["video"]["mean"]["mean"]
    assert event["raw"]["loss_video"] == trained["raw"]["video"]["mean"]["mean"]
    assert event["forwards"] == 2 * 5, "two kinds of weights, five sigmas, one batch"
    assert evaluate.main([str(place / "run")]) == 0
    said, again = capsys.readouterr().out, heldout(place)
    assert "raw weights: video" in said
    assert "ema weights: video" in said
    for weights in ("raw", "ema"):
        assert trained[weights]["identity"] == again[weights]["identity"] == of_the_trainer(place / "run").identity
        for modality in ("video", "audio"):
            first, second = trained[weights][modality]["per_clip"], again[weights][modality]["per_clip"]
            assert second == pytest.approx(first, rel=1e-5), f"{weights} {modality}"
    assert trained["raw"]["video"]["per_clip"] != pytest.approx(trained["ema"]["video"]["per_clip"], rel=1e-5)


def test_the_program_computes_in_the_precision_that_the_run_trains_in(place, tmp_path):
    data, run = place / "latents", tmp_path / "run"
    places = (f"data.datasets.0.path={data}", f"train.run_dir={run}", f"evaluation.datasets=[{data}]")
    assert ltx2_train(*SMALL, *places, *HELD, "train.strict_evaluation=true", "engine.precision=bf16") == 0
    trained = json.loads(heldout_path(run, 2).read_text())
    assert evaluate.main([str(run)]) == 0
    again = json.loads(heldout_path(run, 2).read_text())
    for weights in ("raw", "ema"):
        assert trained[weights]["identity"] == again[weights]["identity"]
        assert trained[weights]["identity"]["dtype"] == "bfloat16"
        first, second = (found[weights]["video"]["per_clip"] for found in (trained, again))
        assert second == pytest.approx(first, rel=1e-6)
    job = load_job(run)
    assert train._sampling(job, open_dataset(data), marker=False).dtype == torch.bfloat16


def test_figures_are_chosen_by_name_and_told_with_their_units(place, tmp_path, capsys):
    options = ["--samples", "2", "--seeds", "2", "--shown", "0", "--tolerance-ms", "50", "--out", str(tmp_path)]
    assert (
        evaluate.main([str(place / "run"), *options, "--metrics", "loudness,seed_diversity_audio,frechet_video"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert "LUFS" in rows["loudness"]
    assert "latent" in rows["seed_diversity_audio"]
    assert "4 clips of 512 wanted" not in rows["frechet_video"], "there are two real ones"
    assert "2 clips of 512 wanted" in rows["frechet_video"]
    written = tmp_path / "samples-00000002" / "samples.json"
    summary = json.loads(written.read_text())
    assert list(summary["metrics"]) == ["loudness", "seed_diversity_audio", "frechet_video"]
    assert summary["count"] == 4
    job = load_job(place / "run")
    dataset = open_dataset(job.evaluation.datasets[0])
    profile = train._sampling(job, dataset, marker=False).profile
    asked = SamplesConfig(clips=2, seeds=2, tolerance_ms=50)
    assert summary["identity"] == samples_identity(dataset, profile, frozenset(Stream), asked, "ema", torch.float32), (
        "as the trainer's"
    )
    other = [str(place / "run"), "--samples", "2", "--out", str(tmp_path)]
    assert evaluate.main(other) == 2
    said = capsys.readouterr().err
    assert "seeds 1 instead of 2, tolerance_ms 80.0 instead of 50.0" in said
    assert "give --seeds 2 --tolerance-ms 50 to measure the same again, or --out" in said
    assert json.loads(written.read_text()) == summary
    assert evaluate.parser().parse_args(["RUN", "--metrics", "none"]).metrics == []
    assert list(evaluate.metrics_table({})) == []


def test_what_holds_for_several_figures_is_said_once_below_them():
    def told(**notes: str) -> list[str]:
        figure = {"value": 1.0, "low": None, "high": None, "unit": "", "count": 4}
        table = {name: {"sampled": figure | {"note": note}, "unit": ""} for name, note in notes.items()}
        return [line.strip() for line in evaluate.metrics_table(table)][1:]

    assert [line.split()[0] for line in told(motion="few", silence="", hum="few")] == [
        "motion",
        "silence",
        "hum",
        "few",
    ]
    assert told(motion="few", silence="", hum="few")[-1] == "few (motion, hum)"
    assert told(motion="few", hum="few")[-1] == "few", "of all of them"
    assert told(motion="few", hum="rough")[0].endswith("few"), "of one alone it stands beside it"


@pytest.mark.slow
def test_an_evaluation_that_is_killed_leaves_nothing_half_written_and_is_taken_up(place, tmp_path, capsys):
    options = [str(place / "run"), "--samples", "5", "--batch-size", "1", "--metrics", "motion", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "ltx2_train.cli.evaluate", *options], env=environment) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*/unfinished-*/*.npz")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = len(list(tmp_path.glob("*/unfinished-*/*.npz")))
    assert 0 < done < 5
    written = tmp_path / "samples-00000002" / "samples.json"
    assert not written.exists()
    assert evaluate.main(options) == 0
    assert f"{done} clips taken up" in capsys.readouterr().out
    assert json.loads(written.read_text())["count"] == 5
    assert not list(tmp_path.glob("*/unfinished-*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metrics", "fvd"], "--metrics fvd: not known. Choose from"),
        (["--seeds", "0"], "--seeds 0: must be >= 1"),
        (["--samples", "-1"], "--samples -1: must be >= 1"),
        (["--tolerance-ms", "-1"], "--tolerance-ms -1.0: must be > 0"),
        (["--clips", "0"], "--clips 0: must be >= 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(place, capsys, options, said):
    assert evaluate.main([str(place / "run"), "--samples", "1", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model", "codecs"])
def test_what_cannot_be_opened_on_one_rank_ends_all_of_them(place, tmp_path, monkeypatch, part):
    owner, name = {"model": (runs, "_model"), "codecs": (Components, "codecs")}[part]
    works, broken = getattr(owner, name), []

    def fails_on_one(*args):
        broken.append(threading.get_ident())
        if broken[0] == threading.get_ident():
            raise CheckpointError("shard 3 cannot be read on this rank")
        return works(*args)

    monkeypatch.setattr(owner, name, fails_on_one)
    options = evaluate.parser().parse_args([str(place / "run"), "--samples", "1", "--out", str(tmp_path)])

    def failure(world):
        with pytest.raises(CheckpointError, match="shard 3") as caught:
            list(evaluate.evaluate(options, world))
        return caught.value.agreed

    assert on_ranks(2, failure) == [True, True]


def test_all_ranks_evaluate_the_checkpoint_that_the_first_one_found(place, monkeypatch):
    """The run saves between the look of one rank and that of the next; it would be another model on each."""
    (saved,) = complete_checkpoints(place / "run")
    looked, find = [], runs.find_checkpoint

    def found(directory):
        if directory == saved:
            return find(directory)
        looked.append(directory)
        return saved if len(looked) == 1 else saved.with_name("step-00000003")

    monkeypatch.setattr(runs, "find_checkpoint", found)
    options = evaluate.parser().parse_args([str(place / "run")])
    first, second = on_ranks(2, lambda world: list(evaluate.evaluate(options, world)))
    assert first == second
    assert len(looked) == 1


@pytest.mark.parametrize(("together", "said"), [(True, ""), (False, "ltx2-evaluate: it is gone\n")])
def test_an_error_of_all_ranks_is_told_by_the_first(monkeypatch, capsys, together, said):
    def fails(options, world):
        error = CheckpointError("it is gone")
        error.agreed = together
        raise error

    monkeypatch.setattr(evaluate, "evaluate", fails)
    monkeypatch.setattr(world_module, "init_world", lambda: World(1, 2, 1, torch.device("cpu")))
    assert evaluate.main(["RUN"]) == 2
    assert capsys.readouterr().err == said


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be computed."""

    def never(*args):
        raise AssertionError("a model was filled")

    monkeypatch.setattr(runs, "_model", never)


def test_another_measurement_does_not_replace_one_that_is_there(place, tmp_path, capsys, no_model):
    written = place / "run" / "evals" / "heldout-00000002.json"
    before = written.read_bytes()
    assert evaluate.main([str(place / "run"), "--clips", "1"]) == 2
    said = capsys.readouterr().err
    assert f"{written} is another measurement: this one has clips 1 instead of 4. It is not replaced: " in said
    assert "give --clips 4 to measure the same again, or --out with a folder" in said
    samples = [replace(sample, video=3 * sample.video) for sample in small_samples()]
    write_latent_dataset(tmp_path / "foreign", samples, manifest=manifest_for(samples[0]))
    assert evaluate.main([str(place / "run"), "--data", str(tmp_path / "foreign")]) == 2
    said = capsys.readouterr().err
    assert "this one has other data. It is not replaced: give --out with a folder" in said, "no option mends that"
    assert written.read_bytes() == before


def test_a_measurement_of_unknown_clips_is_not_replaced(place, tmp_path, capsys, no_model):
    run = shutil.copytree(place / "run", tmp_path / "run")
    written = run / "evals" / "heldout-00000002.json"
    found = json.loads(written.read_text())
    for weights in ("raw", "ema"):
        del found[weights]["identity"]
    written.write_text(json.dumps(found))
    assert evaluate.main([str(run)]) == 2
    assert "does not say what it was measured on" in capsys.readouterr().err


def test_another_folder_takes_another_measurement_of_all_held_out_datasets(place, tmp_path, monkeypatch, capsys):
    """And without that folder each goes where the run itself keeps it."""
    other = small_dataset(tmp_path / "other", count=7)
    load = runs.load_trained

    def of_two(*args, **settings):
        trained = load(*args, **settings)
        trained.job.evaluation.datasets.append(str(other))
        return trained

    monkeypatch.setattr(runs, "load_trained", of_two)
    run = shutil.copytree(place / "run", tmp_path / "run")
    (written,), before = list(run.glob("evals/*.json")), heldout(place)
    assert evaluate.main([str(run), "--clips", "1", "--out", str(tmp_path / "out")]) == 0
    name = "heldout-00000002.json"
    assert sorted(tmp_path.glob("out/**/*.json")) == [tmp_path / "out" / "dataset_1" / name, tmp_path / "out" / name]
    assert json.loads((tmp_path / "out" / "dataset_1" / name).read_text())["ema"]["keys"] == ["s000"]
    assert json.loads(written.read_text()) == before
    out = capsys.readouterr().out
    assert "step 2  held-out loss" in out
    assert "step 2  evaluation.datasets[1], held-out loss" in out
    options = evaluate.parser().parse_args([str(run), "--samples", "1"])
    places = [evaluate._places(options, run, number, 2) for number in (0, 1)]
    folders = [dataset_directory(run, number) for number in (0, 1)]
    assert places == [(heldout_path(folder, 2), samples_directory(folder, 2)) for folder in folders]


def test_a_folder_of_ones_own_keeps_what_was_measured_of_another_checkpoint(place, tmp_path, capsys):
    """Of the same step, the same clips and settings. In the run's own folder the same is replaced."""
    out, other = tmp_path / "out", shutil.copytree(place / "run", tmp_path / "other")
    options = ["--samples", "1", "--shown", "0", "--metrics", "none", "--out", str(out)]
    assert evaluate.main([str(place / "run"), *options]) == 0
    (newest,), (theirs,) = complete_checkpoints(place / "run"), complete_checkpoints(other)
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    assert sorted(str(path.relative_to(out)) for path in before) == [
        "heldout-00000002.json",
        "samples-00000002/samples.json",
    ]
    assert evaluate.main([str(other), "--out", str(out)]) == 0, "of the same weights, wherever they lie"
    with (theirs / MANIFEST).open("a") as file:
        file.write("\n")
    capsys.readouterr()
    for path in sorted(before):  # the losses, and when these are gone, the samples
        assert evaluate.main([str(other), *options]) == 2
        said = capsys.readouterr().err
        source = {name: found.resolve() for name, found in (("there", newest), ("here", theirs))}
        if path.parent == out:
            source["there"] = theirs.resolve()  # whose copy measured last
        assert re.search(
            rf"{path} is of {source['there']} \(manifest \w{{16}}\), and this is .* {source['here']} ", said
        )
        path.unlink()
    assert evaluate.main([str(other)]) == 0, "it was saved anew under its step"
    assert heldout_path(other, 2).stat().st_mtime_ns > heldout_path(place / "run", 2).stat().st_mtime_ns
    assert evaluate.main([str(other), "--out", str(heldout_path(place / "run", 2).parent)]) == 2
    assert re.search(r"heldout-00000002.json (is of|does not say of which weights it is)", capsys.readouterr().err)


def test_a_checkpoint_outside_a_run_has_no_place_for_results(place, tmp_path, capsys, no_model):
    (newest,) = complete_checkpoints(place / "run")
    lone = shutil.copytree(newest, tmp_path / "models" / newest.name)
    assert evaluate.main([str(lone)]) == 2
    assert "lies in no run directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    assert runs.run_directory(newest) == place / "run"
    assert evaluate.main([str(newest), "--follow"]) == 2
    assert "Name the run directory" in capsys.readouterr().err


def test_clips_of_another_codec_are_refused(place, tmp_path, capsys):
    other = small_dataset(tmp_path / "latents", video_codec="other-codec")
    assert evaluate.main([str(place / "run"), "--data", str(other)]) == 2
    said = capsys.readouterr().err
    assert "video_codec" in said
    assert "other-codec" in said


def test_a_run_without_a_complete_checkpoint_is_refused(place, tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2
    assert "has no complete checkpoint. Give a run directory" in capsys.readouterr().err
    for name, what in (("typo", "does not exist"), ("a_file", "is a file")):
        (tmp_path / "a_file").touch()
        assert evaluate.main([str(tmp_path / name)]) == 2
        assert f"{tmp_path / name} {what}. Give a run directory" in capsys.readouterr().err
    (newest,) = complete_checkpoints(place / "run")
    copy = tmp_path / "run" / "checkpoints" / newest.name
    copy.mkdir(parents=True)
    (copy / "config.json").write_bytes((newest / "config.json").read_bytes())
    assert evaluate.main([str(tmp_path / "run")]) == 2, "files, and no manifest"
    assert "has no complete checkpoint: the only one is damaged or incomplete" in capsys.readouterr().err
    shutil.copytree(newest, copy.with_name("step-00000001"))
    next(copy.with_name("step-00000001").glob("*.distcp")).unlink()
    assert evaluate.main([str(tmp_path / "run")]) == 2
    assert "all 2 are damaged or incomplete (messages above). Copy the run again" in capsys.readouterr().err

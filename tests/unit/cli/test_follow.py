"""`ltx2-evaluate RUN --follow`: every checkpoint once, none removed under its hands, no failure beyond its own step."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltx2_train.cli import evaluate, follow
from ltx2_train.cli.runs import run_directory
from ltx2_train.cli.schema import load_job
from ltx2_train.cli.train import _plain_objective
from ltx2_train.data.datasets import open_dataset
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError
from ltx2_train.evals.files import dataset_directory, write_json
from ltx2_train.evals.heldout import Heldout, heldout_path
from ltx2_train.evals.samples import samples_directory
from ltx2_train.train.checkpoint import checkpoint_directory, read_manifest, verify
from tests.unit.cli.commands import SMALL, ltx2_train, small_dataset

ROOT = Path(__file__).resolve().parents[3]
SUMMARY = {"weights": "ema", "count": 1, "sync": None, "metrics": {"loudness": {"sampled": {"value": -20.0}}}}
WORLD = World(0, 1, 0, torch.device("cpu"))
NOT_EVALUATED = ("train.evaluate_last=false", "evaluation.samples=null", "evaluation.heldout.clips=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps that evaluated nothing, with the checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("followed")
    data = small_dataset(folder / "latents")
    places = (f"data.datasets.0.path={data}", f"train.run_dir={folder / 'run'}", f"evaluation.datasets=[{data}]")
    assert ltx2_train(*SMALL, *places, *NOT_EVALUATED, "train.save_every=2") == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def quick(monkeypatch):
    """Evaluations that measure nothing and leave their files: for what is about their order and their ends."""

    def measure(options, world):
        step, place = read_manifest(options.run)["step"], run_directory(options.run)
        write_json(heldout_path(place, step), {"step": step, "raw": {}})
        if options.samples:
            write_json(samples_directory(place, step) / "samples.json", SUMMARY)
        yield f"step {step}  held-out"

    monkeypatch.setattr(evaluate, "evaluate", measure)
    monkeypatch.setattr("ltx2_train.evals.heldout.event_figures", lambda plain: {})
    return measure


def evaluated(run: Path) -> list[int]:
    return [int(path.stem.split("-")[1]) for path in sorted(run.glob("evals/heldout-*.json"))]


def followed(run: Path, *options: str) -> int:
    return evaluate.main([str(run), "--follow", "--poll-seconds", "0.05", *options])


def order(out: str) -> list[int]:
    return list(dict.fromkeys(int(step) for step in re.findall(r"step (\d+)  held-out", out)))


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evals" / "follow.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_checkpoint_is_evaluated_once_in_the_order_of_steps_until_the_run_has_ended(run, capsys):
    assert followed(run) == 0
    out = capsys.readouterr().out
    assert order(out) == [2, 4, 6]
    assert "has ended" in out
    assert not (run / follow.HELD).exists()
    of_step_4 = json.loads((run / "evals" / "heldout-00000004.json").read_text())
    (event,) = [e for e in events(run) if e["step"] == 4]
    assert event["loss_video"] == of_step_4["ema"]["video"]["mean"]["mean"]
    assert event["raw"]["by_sigma"]["audio"]["0.5"] == of_step_4["raw"]["audio"]["by_sigma"][2]["mean"]
    assert followed(run) == 0
    assert order(capsys.readouterr().out) == [], "nothing is measured twice"
    manifest = checkpoint_directory(run, 4) / "manifest.json"
    later = (run / "evals" / "heldout-00000004.json").stat().st_mtime + 5
    os.utime(manifest, (later, later))
    assert followed(run) == 0
    assert order(capsys.readouterr().out) == [4], "a checkpoint that was written anew is another one"


def test_what_has_its_files_is_left_and_told_of_once(run, capsys, quick):
    write_json(heldout_path(run, 4), {"step": 4, "raw": {}})
    assert followed(run) == 0
    out = capsys.readouterr().out
    assert order(out) == [2, 6]
    assert re.findall(r"step (\d+)  measured before", out) == ["4"]


def test_one_that_lags_may_take_the_newest_first(run, capsys, quick):
    assert followed(run, "--newest-first") == 0
    assert order(capsys.readouterr().out) == [6, 4, 2]


def test_a_damaged_checkpoint_is_told_and_the_others_are_evaluated(run, capsys):
    weights = next(checkpoint_directory(run, 4).rglob("*.distcp"))
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    assert followed(run) == 0
    out = capsys.readouterr().out
    assert evaluated(run) == [2, 6]
    job = load_job(run)
    own = Heldout(open_dataset(job.evaluation.datasets[0]), _plain_objective(job, False), job.evaluation.heldout, WORLD)
    for step in (2, 6):
        assert json.loads(heldout_path(run, step).read_text())["ema"]["identity"] == own.identity, "as the trainer's"
    assert re.search(r"step 4  evaluation failed, going on: CheckpointError: .*SHA-256", out)
    assert [e["step"] for e in events(run) if e["event"] == "evaluation_failed"] == [4]


def test_a_checkpoint_that_the_run_removes_meanwhile_stays_readable(run):
    checkpoint, place = checkpoint_directory(run, 2), run / follow.HELD
    place.mkdir()
    with follow.held(checkpoint, place, WORLD) as found:
        assert found != checkpoint
        shutil.rmtree(checkpoint)
        verify(found)
    assert list(place.iterdir()) == []
    with pytest.raises(CheckpointError, match="removed before it could be read"), follow.held(checkpoint, place, WORLD):
        raise AssertionError("it is gone")


def test_what_was_removed_before_its_turn_is_told(run, capsys, monkeypatch, quick):
    plain = follow.Follower.look

    def removing(self):
        found = plain(self)
        if found.checkpoint is not None and found.checkpoint.name.endswith("2"):
            shutil.rmtree(checkpoint_directory(run, 4))
        return found

    monkeypatch.setattr(follow.Follower, "look", removing)
    assert followed(run) == 0
    out = capsys.readouterr().out
    assert order(out) == [2, 6]
    assert out.count("step 4  removed before its evaluation") == 1
    assert [e["step"] for e in events(run) if e["event"] == "evaluation_left_out"] == [4]


def test_a_second_one_is_refused_and_a_killed_one_leaves_nothing_behind(run, capsys, quick):
    (run / follow.HELD / "step-00000002").mkdir(parents=True)
    lock = run / follow.HELD / ".lock"
    code = f"import fcntl; f = open({str(lock)!r}, 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7'); "
    code += "f.flush(); print('held', flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert followed(run) == 2
        assert "another job follows it (process 7)" in capsys.readouterr().err
        other.kill()
    assert followed(run) == 0
    assert not (run / follow.HELD).exists()


@pytest.mark.parametrize("begun", [True, False])
def test_of_a_run_that_has_not_begun_it_says_whether_its_folder_is_there(tmp_path, begun):
    """A path that is mistyped would be waited for as well."""
    place = tmp_path / "new"
    if begun:
        place.mkdir()
    lines = follow.follow(evaluate.parser().parse_args([str(place), "--follow"]), WORLD, evaluate.evaluate)
    said = next(iter(lines))
    lines.close()
    assert said.startswith(f"waits for {place / 'config.yaml'}, which ltx2-train writes")
    assert (f"{place} itself is not there" in said) is not begun


def test_on_a_signal_the_evaluation_is_finished_and_the_end_is_a_good_one(run, capsys, monkeypatch, quick):

    def interrupted(options, world):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from quick(options, world)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    assert followed(run) == 0
    assert evaluated(run) == [2]
    assert "told to stop" in capsys.readouterr().out


def test_a_second_signal_ends_it_at_once(run, monkeypatch):
    def interrupted_twice(options, world):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        yield "never said"

    monkeypatch.setattr(evaluate, "evaluate", interrupted_twice)
    assert followed(run) == evaluate.EXIT_INTERRUPTED
    assert evaluated(run) == []
    assert not (run / follow.HELD).exists()


def test_steps_that_the_run_samples_itself_are_left_to_it(run, capsys, quick):
    config = run / "config.yaml"
    text = config.read_text().replace("evaluate_last: false", "evaluate_last: true")
    config.write_text(re.sub(r"\n  samples: null", "\n  samples:\n    clips: 2", text))
    assert followed(run, "--samples", "1") == 0
    out = capsys.readouterr().out
    assert order(out) == [2, 4]
    assert "step 6  left to the run" in out
    told = [(e["step"], e["metrics"]) for e in events(run) if e["event"] == "samples"]
    assert told == [(2, {"loudness": -20.0}), (4, {"loudness": -20.0})]
    assert sorted(path.parent.name for path in run.glob("evals/*/samples.json")) == [
        "samples-00000002",
        "samples-00000004",
    ]


def test_every_held_out_dataset_is_evaluated_and_told_of(run, capsys, monkeypatch):
    """The first has been measured already; that does not stand for the second."""
    config = run / "config.yaml"
    (first,) = load_job(run).evaluation.datasets
    config.write_text(re.sub(r"( +)- " + re.escape(first), rf"\1- {first}\n\1- {first}", config.read_text()))

    def measure(options, world):
        step = read_manifest(options.run)["step"]
        for number in (0, 1):
            path = heldout_path(dataset_directory(run_directory(options.run), number), step)
            write_json(path, {"step": step, "raw": {"loss": number}})
        yield f"step {step}  held-out"

    monkeypatch.setattr(evaluate, "evaluate", measure)
    monkeypatch.setattr("ltx2_train.evals.heldout.event_figures", dict)
    for step in (2, 4, 6):
        write_json(heldout_path(run, step), {"step": step, "raw": {}})
    assert followed(run) == 0
    assert order(capsys.readouterr().out) == [2, 4, 6]
    told = [(e["event"], e["step"], e["loss"]) for e in events(run)]
    assert told == [(name, step, i) for step in (2, 4, 6) for i, name in enumerate(("heldout", "heldout_1"))]
    assert followed(run) == 0
    assert order(capsys.readouterr().out) == []


def test_a_folder_for_one_step_does_not_go_with_many(run, tmp_path, capsys):
    assert followed(run, "--out", str(tmp_path / "out")) == 2
    assert "--out with --follow" in capsys.readouterr().err

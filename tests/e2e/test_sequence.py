"""A whole run of `ltx2-train` whose two processes share the tokens of every sample."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.commands import SMALL, ltx2_train, small_dataset

ROOT = Path(__file__).resolve().parents[2]
EVALUATED = (
    "train.max_steps=4",
    "evaluation.heldout.clips=5",
    "evaluation.heldout.batch_size=2",
    "evaluation.samples.clips=3",
    "evaluation.samples.shown=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "latents")


def arguments(data: Path, run: Path, *more: str) -> tuple[str, ...]:
    sets = (f"data.datasets.0.path={data}", f"evaluation.datasets=[{data}]", f"train.run_dir={run}")
    return (*SMALL, *EVALUATED, *sets, *more)


def lines(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line.get("event") == event]


def share_every_sample(*settings: str) -> None:
    """A run of two processes that share the tokens of every sample."""
    command = [str(ROOT / "launch" / "torchrun.sh"), "-m", "ltx2_train.cli.train", *settings, "engine.sequence=2"]
    environment = os.environ | {"NPROC": "2", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


@pytest.mark.slow
def test_two_processes_that_share_every_sample_make_the_run_of_one(data, tmp_path):
    assert ltx2_train(*arguments(data, tmp_path / "one")) == 0
    share_every_sample(*arguments(data, tmp_path / "two"))
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("step", "samples", "tokens", "bad_records", "lr"):
            assert two[name] == one[name], name
        for name in ("loss", "loss_video", "loss_audio", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    (one,), (two,) = (lines(tmp_path / run, "heldout") for run in ("one", "two"))
    assert two["loss_video"] == pytest.approx(one["loss_video"], rel=1e-4)
    (one,), (two,) = (sorted((tmp_path / run / "evals").glob("samples-*/samples.json")) for run in ("one", "two"))
    clips = [[clip["key"] for clip in json.loads(path.read_text())["clips"]] for path in (one, two)]
    assert clips[0] == clips[1]


def test_more_ranks_a_sample_than_there_are_is_refused(data, tmp_path, capsys):
    assert ltx2_train(*arguments(data, tmp_path / "run", "engine.sequence=2")) == 2
    assert "engine.sequence=2: 1 processes do not fall into groups of 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_a_sample(data, tmp_path):
    """From one process to two that share every sample, and back."""
    straight, there, back = (tmp_path / name for name in ("straight", "there", "back"))
    assert ltx2_train(*arguments(data, straight)) == 0
    assert ltx2_train(*arguments(data, there, "train.max_steps=2")) == 0
    share_every_sample(*arguments(data, there))
    share_every_sample(*arguments(data, back, "train.max_steps=2"))
    assert ltx2_train(*arguments(data, back)) == 0
    for run in (there, back):
        for one, other in zip(lines(straight), lines(run), strict=True):
            assert (other["step"], other["samples"]) == (one["step"], one["samples"])
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)

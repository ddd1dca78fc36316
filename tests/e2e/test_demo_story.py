"""The demo's story on a handful of clips: interrupted once, told to its end, and what it leaves behind is usable."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2_train.cli import demo, evaluate, report, sample
from ltx2_train.media.probe import probe
from ltx2_train.train.checkpoint import newest_complete

SIZE = ["--clips", "24", "--steps", "3", "--samples", "2"]


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "ltx2_train.cli.demo", "--out", str(out), *SIZE]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(directory, what the interrupted attempt said and its exit status, what the second attempt said)."""
    out = tmp_path_factory.mktemp("demo")
    with subprocess.Popen(command(out), stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        said = []
        for line in first.stdout:
            said.append(line)
            if line.startswith("[2/6]"):
                first.terminate()
                break
        said += first.stdout.readlines()
    second = subprocess.run(command(out), capture_output=True, text=True)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    return out, ("".join(said), first.returncode), second.stdout


def test_an_interrupted_demo_says_so_and_goes_on(story):
    _, (said, code), second = story
    assert code == 130
    assert "The same command goes on from here" in said
    assert second.count("already done") == 1


def test_the_end_says_where_everything_lies(story):
    out, _, said = story
    assert "The demo is finished" in said
    for path in ("run/report.html", "latents", "world"):
        assert str(out / path) in said
        assert (out / path).exists()


def test_every_command_is_printed_as_one_would_type_it(story):
    modules = re.findall(r"^  \$ python -m (\S+)", story[2], re.MULTILINE)
    assert modules == [stage.module for stage in demo.story(demo.parser().parse_args(SIZE))]


def test_a_finished_demo_says_so_and_runs_nothing(story, capsys):
    assert demo.main(["--out", str(story[0]), *SIZE]) == 0
    said = capsys.readouterr().out
    assert said.count("already done") == 6
    assert "The demo is finished" in said


def test_other_options_are_refused_by_name(story, capsys):
    assert demo.main(["--out", str(story[0]), "--clips", "99"]) == 2
    assert "--clips 24" in capsys.readouterr().err


def test_the_run_holds_before_and_after_on_the_same_clips(story):
    before, after = (
        json.loads((story[0] / "run" / "evals" / f"heldout-{step:08d}.json").read_text()) for step in (0, 3)
    )
    assert before["ema"]["keys"] == after["ema"]["keys"]
    assert before["ema"]["sigmas"] == after["ema"]["sigmas"]
    assert set(after) == {"step", "source", "ema", "raw"}, "of the newest checkpoint, by ltx2-evaluate"


def test_the_report_plays_two_clips_beside_the_real_ones(story):
    page = (story[0] / "run" / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 4
    assert "Held-out loss" in page


def test_a_prompt_becomes_a_film_with_sound(story, tmp_path, capsys):
    run = story[0] / "run"
    assert (
        sample.main([str(run), "--prompt", "A blue ball", "--seed", "5", "--steps", "2", "--out", str(tmp_path)]) == 0
    )
    info = probe(tmp_path / "a-blue-ball-5.mp4")
    assert info.has_audio
    assert (info.width, info.height) == (64, 64)
    assert "a-blue-ball-5.mp4" in capsys.readouterr().out


def test_a_seed_gives_the_same_film_again(story, tmp_path):
    arguments = [str(story[0] / "run"), "--prompt", "A ball", "--steps", "2", "--count", "2", "--out"]
    for name in ("one", "two"):
        assert sample.main([*arguments, str(tmp_path / name)]) == 0
    for seed in (0, 1):
        films = [(tmp_path / name / f"a-ball-{seed}.mp4").read_bytes() for name in ("one", "two")]
        assert films[0] == films[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "40"], "nearest: 41"),
        (["--width", "60"], "nearest: 64"),
        (["--profile", "ltx3"], "ltx3"),
        (["--prompt", " "], "--prompt"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_the_nearest_that_can(story, arguments, message, capsys):
    assert sample.main([str(story[0] / "run"), "--prompt", "A ball", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_sampled(story, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(story[0] / "run", run)
    checkpoint = newest_complete(run)
    assert checkpoint is not None
    weights = next(checkpoint.glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert sample.main([str(run), "--prompt", "A ball"]) == 2
    assert weights.name in capsys.readouterr().err


@pytest.mark.parametrize("program", [evaluate, sample, report])
def test_a_directory_that_is_no_run_is_refused_by_name(program, tmp_path, capsys):
    more = ["--prompt", "A ball"] if program is sample else []
    assert program.main([str(tmp_path), *more]) == 2
    assert str(tmp_path) in capsys.readouterr().err

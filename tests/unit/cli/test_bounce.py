"""The bounce proof: what its two trainings are, and that its figures say what the events say."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from ltx2_train.model.build import transformer_config
from tests.proofs import bounce
from tests.unit.cli.commands import composed


def options(out: Path, **values) -> argparse.Namespace:
    return argparse.Namespace(**{"out": out, "docs": out / "docs", "clips": 16, "steps": 3, "samples": 4, **values})


def clips(impacts: list[list[float]], onsets: list[list[float]]) -> list[dict]:
    return [{"impacts": seen, "onsets": heard} for seen, heard in zip(impacts, onsets, strict=True)]


def test_both_trainings_differ_in_the_exchange_alone(tmp_path):
    """And the text features that the proof encodes have the widths that the model takes."""
    joint, apart = (composed(*command.arguments) for command in bounce.train_stages(options(tmp_path)))
    assert joint.train.run_dir != apart.train.run_dir
    assert not transformer_config(apart.model).use_audio_video_cross_attention
    apart.model.overrides["use_audio_video_cross_attention"] = True
    assert transformer_config(joint.model) == transformer_config(apart.model)
    assert (joint.objective, joint.optim, joint.data) == (apart.objective, apart.optim, apart.data)
    widths = (
        transformer_config(joint.model).video_connector_width,
        transformer_config(joint.model).audio_connector_width,
    )
    assert (f"--video-text-width={widths[0]}", f"--audio-text-width={widths[1]}") == bounce.WIDTHS


def test_a_stage_that_was_done_with_other_options_is_not_taken_for_done(tmp_path):
    command = bounce.Command("nothing", "this", ("--steps=2",))
    assert not bounce.is_done(tmp_path, command)
    bounce.write_json(bounce.done_path(tmp_path, "nothing"), {"arguments": command.arguments})
    assert bounce.is_done(tmp_path, command)
    with pytest.raises(SystemExit, match=r"other options \(--steps=2, --steps=3\)"):
        bounce.is_done(tmp_path, bounce.Command("nothing", "this", ("--steps=3",)))


def test_stages_that_run_side_by_side_have_times_of_their_own(tmp_path):
    quick = bounce.Command("quick", "timeit", ("-n1", "-r1", "pass"))
    slow = bounce.Command("slow", "timeit", ("-n1", "-r1", "-s", "import time", "time.sleep(2)"))
    assert bounce.run_side_by_side(tmp_path, [slow, quick]) == 0
    took = {name: json.loads(bounce.done_path(tmp_path, name).read_text())["seconds"] for name in ("slow", "quick")}
    assert took["quick"] < took["slow"]


def test_a_failed_stage_ends_the_program_and_is_done_again(tmp_path):
    failing = bounce.Command("failing", "timeit", ("-n1", "-r1", "raise ValueError"))
    assert bounce.run_side_by_side(tmp_path, [failing]) != 0
    assert not bounce.is_done(tmp_path, failing)


def test_a_set_of_another_model_or_size_is_sampled_again(tmp_path):
    draw, one = bounce.Draw("joint", "joint", 0), {"impacts": [], "onsets": []}
    assert not bounce.is_measured(options(tmp_path), draw, "abc")
    bounce.write_json(bounce.set_path(tmp_path, draw), {"model": "abc", "clips": [one] * 4})
    assert bounce.is_measured(options(tmp_path), draw, "abc")
    assert not bounce.is_measured(options(tmp_path), draw, "other")
    assert not bounce.is_measured(options(tmp_path, samples=5), draw, "abc")


def test_too_few_clips_to_exchange_sounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        bounce.main(["--samples=1"])
    assert "--samples: need at least 2" in capsys.readouterr().err


def test_clips_in_sync_have_f1_one_and_shuffled_ones_what_chance_gives():
    rng = np.random.default_rng(0)
    times = [[float(t)] for t in rng.uniform(0.3, 1.3, 200)]
    together = clips(times, [[t[0] + 0.03] for t in times])
    assert bounce.estimate([together]) == {"mean": 1.0, "low": 1.0, "high": 1.0}
    chance = bounce.shuffled([together])
    assert chance["mean"] == pytest.approx(0.1, abs=0.03)  # a window of 0.1 s in a second of possible times
    assert chance["low"] < chance["mean"] < chance["high"]
    apart = clips(times, [*times[1:], times[0]])
    assert chance["low"] <= bounce.estimate([apart])["mean"] <= chance["high"]


def test_events_that_have_no_partner_lower_the_score():
    one = clips([[0.5, 1.0]], [[0.5]])
    assert bounce.estimate([one])["mean"] == pytest.approx(2 / 3, abs=1e-4)
    assert bounce.tally([one]) == {
        "clips": 1, "impacts": 2, "onsets": 1, "matched": 1, "mean_error_ms": 0.0, "offset_ms": 0.0
    }  # fmt: skip
    assert bounce.estimate([clips([[]], [[]])])["mean"] == 0.0


def test_nothing_is_shuffled_into_its_own_place():
    rng = np.random.default_rng(0)
    assert all((bounce.derangement(5, rng) != np.arange(5)).all() for _ in range(200))

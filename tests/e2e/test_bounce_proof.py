"""The bounce proof on a handful of clips: all its stages run, none runs twice, and the page is made of its own figures."""

import json

import pytest

from ltx2_train.media.probe import probe
from tests.proofs import bounce


@pytest.mark.slow
def test_the_proof_runs_to_its_end_and_a_second_time_only_reads(tmp_path, monkeypatch, capsys):
    command = ["--out", str(tmp_path), "--docs", str(tmp_path / "docs"), "--clips=16", "--steps=2", "--samples=3"]
    assert bounce.main(command) == 0
    figures = json.loads((tmp_path / "docs" / "bounce.json").read_text())
    assert (figures["num_clips"], figures["tolerance_ms"]) == (3, 50)
    assert set(figures["onset_f1"]) == {"joint", "chance", "no_av_attention", "a2v", "v2a"}
    assert all(set(f1) == {"mean", "low", "high"} for f1 in figures["onset_f1"].values())
    assert figures["real"]["mean"] > 0.9
    assert figures["events"]["a2v"]["clips"] == 3 * len(bounce.SEEDS)
    assert len(figures["captions"]["heldout"]) == bounce.HELD_OUT_CAPTIONS
    assert not set(figures["captions"]["heldout"]) & set(figures["captions"]["train"])
    page = (tmp_path / "docs" / "bounce.md").read_text()
    assert all(name in page for name in ("bounce/guidance.svg", "bounce/loss.svg", "bounce/joint-0.png"))
    film = probe(tmp_path / "docs" / "bounce" / "v2a-1.mp4")
    assert (film.width, film.height, film.frames, film.has_audio) == (256, 256, 81, True)
    assert sum(f.stat().st_size for f in (tmp_path / "docs").rglob("*") if f.is_file()) < 4_000_000, (
        "films of noise included"
    )
    monkeypatch.setattr(bounce, "measure", None)  # what is done stays done: nothing is sampled, no program starts
    monkeypatch.setattr(bounce.subprocess, "Popen", None)
    capsys.readouterr()
    assert bounce.main(command) == 0
    assert "$" not in capsys.readouterr().out
    assert json.loads((tmp_path / "docs" / "bounce.json").read_text()) == figures

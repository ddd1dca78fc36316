"""The world is made of real files, and records can be looked at."""

import json

import pytest
import torch

from data_prep.encode import encode
from data_prep.show import main as show_main
from data_prep.show import show
from data_prep.synth import main as synth_main
from data_prep.synth import write_world
from ltx2_train.data.synthetic import WorldConfig
from ltx2_train.errors import DataError
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import probe
from ltx2_train.media.video import read_video


def rows(metadata):
    return [json.loads(line) for line in metadata.read_text().splitlines()]


def test_every_file_is_what_its_row_says(world):
    kinds = set()
    for row in rows(world):
        info = probe(world.parent / row["video"], decode=True)
        assert info.has_audio == row["has_audio"]
        assert info.frames == (1 if row["video"].endswith(".png") else 17)
        kinds.add((info.is_image, info.has_audio))
    assert kinds == {(True, False), (False, False), (False, True)}


def test_clicks_are_heard_when_the_ground_truth_says(tmp_path):
    metadata = write_world(tmp_path, 8, 11, WorldConfig())
    for row in rows(metadata):
        waveform, rate = read_audio(tmp_path / row["video"], duration=41 / 24)
        level = waveform.abs().amax(0)
        for time in row["impact_times"]:
            at = round(time * rate)
            before, after = level[max(0, at - 5 * rate // 1000 - 80) : at - 5 * rate // 1000], level[at : at + 80]
            assert after.max() > 4 * before.max()
            onset = int((level[at - 80 :] > max(before.max() * 2, after.max() / 8)).nonzero()[0]) + at - 80
            assert abs(onset / rate - time) < 0.005


def test_the_files_depend_on_the_seed_alone(tmp_path):
    a, b, c = (write_world(tmp_path / n, 2, seed, WorldConfig(frames=17)) for n, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert rows(a) == rows(b) != rows(c)
    names = [row["video"] for row in rows(a)]
    assert all((a.parent / n).read_bytes() == (b.parent / n).read_bytes() for n in names)


def test_a_latent_record_is_written_for_eye_and_ear(raw, tmp_path, config):
    encode([str(raw)], tmp_path / "latents", config)
    shown = show(str(tmp_path / "latents" / "train"), tmp_path / "shown", "clip-000000")
    assert shown.meta["source"].startswith("clip-000000")
    for path in shown.files:
        info = probe(path)
        assert info.has_video or info.has_audio


def test_a_raw_record_is_written_as_it_is_stored(world, raw, tmp_path, capsys):
    show_main([str(raw), "--record", "0", "--out", str(tmp_path)])
    first = rows(world)[0]
    assert (tmp_path / first["video"]).read_bytes() == (world.parent / first["video"]).read_bytes()
    assert first["caption"] in capsys.readouterr().out


def test_an_unknown_record_is_refused_with_the_bound(raw, tmp_path):
    with pytest.raises(DataError, match="no record 'nobody'; it has 14"):
        show(str(raw), tmp_path, "nobody")


def test_the_program_says_where_the_files_are(tmp_path, capsys):
    synth_main(
        ["--out", str(tmp_path), "--clips", "1", "--frames", "17", "--image-fraction", "1", "--silent-fraction", "0"]
    )
    assert "metadata.jsonl" in capsys.readouterr().out
    video, fps = read_video(tmp_path / "clip-000000.png")
    assert (video.shape, fps) == (torch.Size([3, 1, 64, 64]), 1.0)

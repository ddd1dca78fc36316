"""Files appear whole or not at all, and hold what was given."""

from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest
import torch

from ltx2_train.errors import DataError
from ltx2_train.media.probe import probe
from ltx2_train.media.video import read_video, to_tensor
from ltx2_train.media.write import atomic, write_mp4, write_png, write_wav
from tests.unit.media.media_files import FPS, RATE, click_waveform, ramp_frames


def test_tensors_frames_and_pieces_of_frames_make_the_same_file(tmp_path):
    frames = ramp_frames()
    for name, video in (("t", to_tensor(frames)), ("f", frames), ("p", iter([frames[:10], frames[10:]]))):
        write_mp4(tmp_path / f"{name}.mp4", video, FPS, torch.from_numpy(click_waveform()), RATE)
    contents = [(tmp_path / f"{name}.mp4").read_bytes() for name in "tfp"]
    assert contents[0] == contents[1] == contents[2]


def test_the_file_plays_while_it_loads(clip):
    content = clip.read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 23.976, 25, 12.5])
def test_frame_rates_survive(tmp_path, fps):
    write_mp4(tmp_path / "a.mp4", ramp_frames(), fps)
    info = probe(tmp_path / "a.mp4")
    assert info.fps == pytest.approx(float(fps), rel=1e-6)
    assert not info.is_variable
    assert not info.has_audio


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with suppress(RuntimeError), atomic(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    import os

    path = tmp_path / "a.wav"
    write_wav(path, click_waveform(), RATE)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_wav(path, click_waveform() * 0.5, RATE)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_pixels_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(DataError, match="NaN or infinity"):
        write_mp4(tmp_path / "a.mp4", torch.full((3, 2, 32, 32), torch.nan), FPS)
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(DataError, match="finite samples"):
        write_wav(tmp_path / "a.wav", np.full((2, 10), np.nan, dtype=np.float32), RATE)


def test_odd_sizes_are_refused_with_the_rule(tmp_path):
    with pytest.raises(DataError, match="even H, even W"):
        write_mp4(tmp_path / "a.mp4", torch.zeros(3, 2, 33, 32), FPS)


def test_a_picture_survives_exactly(tmp_path):
    image = ramp_frames(1)[0]
    write_png(tmp_path / "a.png", image)
    assert torch.equal(read_video(tmp_path / "a.png")[0][:, 0], to_tensor(image[None])[:, 0])

"""Frames come out exact, upright, at a constant rate and at the size asked for."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from ltx2_train.errors import DataError
from ltx2_train.media import video as video_module
from ltx2_train.media.probe import probe
from ltx2_train.media.video import VideoFile, cover, nearest_frames, read_video, to_frames, to_tensor
from tests.unit.media.media_files import FPS, encode_frames, ramp_frames


def numbers(video: torch.Tensor) -> list[int]:
    """Which frames of `ramp_frames` these are: their brightness says."""
    levels = ((video[:, :, 20:40, 20:40].mean((0, 2, 3)) + 1) * 127.5 - 16) / 8
    return levels.round().int().tolist()


def test_all_frames_in_order(clip):
    video, fps = read_video(clip)
    assert video.shape == (3, 25, 48, 64)
    assert (video.dtype, fps) == (torch.float32, 24.0)
    assert numbers(video) == list(range(25))
    assert (video - to_tensor(ramp_frames())).abs().max() < 0.15


def test_a_window_starts_at_its_time(clip):
    video, _ = read_video(clip, start=7 / 24, frames=9)
    assert numbers(video) == list(range(7, 16))


def test_another_rate_takes_the_nearest_frames(clip):
    video, fps = read_video(clip, fps=12)
    assert fps == 12
    assert numbers(video) == list(range(0, 25, 2))[: video.shape[1]]


def test_frames_beyond_the_end_are_refused(clip):
    with pytest.raises(DataError, match="20 frames from 0.50 s asked; it has 25"):
        read_video(clip, start=0.5, frames=20)


def test_varying_times_are_brought_to_a_constant_grid(tmp_path):
    stamps = [0, 1, 2, 10, 11, 12, 20, 21, 22]  # 24ths of a second
    path = encode_frames(tmp_path / "v.mp4", ramp_frames(9), stamps=[s * 1000 for s in stamps], base=Fraction(1, 24000))
    video, _ = read_video(path, fps=6)
    expected = [int(np.abs(np.array(stamps) - t).argmin()) for t in np.arange(video.shape[1]) * 4]
    assert numbers(video) == expected


def test_decord_and_pyav_give_the_same_frames(clip):
    info = probe(clip)
    readers = video_module._DecordReader(clip, info), video_module._PyavReader(clip, info)
    for places in ([3, 3, 9], [1, 24], [0]):  # backwards too
        first, second = (reader.read(np.array(places)) for reader in readers)
        assert np.array_equal(first, second)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_both_readers_turn_frames_upright(tmp_path, rotation):
    stored = ramp_frames(3, 64, 96)
    path = encode_frames(tmp_path / "r.mp4", stored, rotation=rotation)
    info = probe(path)
    expected = np.rot90(stored, rotation // 90, (1, 2)).astype(int)
    for reader in (video_module._DecordReader(path, info), video_module._PyavReader(path, info)):
        frames = reader.read(np.arange(3))
        assert frames.shape == expected.shape
        assert np.abs(frames - expected).mean() < 4


def test_av1_is_read_by_pyav(tmp_path):
    import av

    encoders = [name for name in ("libsvtav1", "libaom-av1") if name in av.codecs_available]
    if not encoders:
        pytest.skip("this PyAV has no AV1 encoder to write the test's file with")
    path = encode_frames(tmp_path / "a.mp4", ramp_frames(9, 64, 64), codec=encoders[0], options={"preset": "12"})
    with VideoFile(path) as file:
        frames = file.frames(0, 9, FPS)
        assert isinstance(file._reader, video_module._PyavReader)
    assert numbers(to_tensor(frames)) == list(range(9))


@pytest.mark.parametrize(("height", "width", "rotation"), [(64, 48, 0), (48, 64, 90)])
def test_sizes_that_decord_refuses_are_read_all_the_same(tmp_path, height, width, rotation):
    path = encode_frames(tmp_path / "a.mp4", ramp_frames(9, height, width), rotation=rotation)
    video, _ = read_video(path)
    assert video.shape == (3, 9, 64, 48)
    assert numbers(video) == list(range(9))


def test_pyav_takes_over_where_decord_fails(clip, monkeypatch):
    def fail(self, indices):
        raise video_module.DecordError("lost")

    monkeypatch.setattr(video_module._DecordReader, "read", fail)
    assert numbers(read_video(clip)[0]) == list(range(25))


def test_a_file_without_video_is_refused_by_name(tmp_path):
    from ltx2_train.media.write import write_wav

    write_wav(tmp_path / "a.wav", np.zeros((1, 1600), dtype=np.float32), 16000)
    with pytest.raises(DataError, match=r"a\.wav: no video track"):
        read_video(tmp_path / "a.wav")


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (96, 96), (32, 64)])
def test_resizing_covers_and_crops_the_centre(clip, size):
    video, _ = read_video(clip, frames=2, size=size)
    assert video.shape == (3, 2, size[1], size[0])


def test_resizing_keeps_shapes_round():
    frames = np.zeros((1, 60, 120, 3), dtype=np.uint8)
    y, x = np.mgrid[:60, :120]
    frames[0][(y - 30) ** 2 + (x - 60) ** 2 < 400] = 255
    seen = cover(frames, (120, 60), (32, 32))[0, :, :, 0] > 127
    assert abs(int(seen.any(0).sum()) - int(seen.any(1).sum())) <= 1


def test_pixels_that_are_not_square_are_shown_as_they_should_be():
    frames = np.zeros((1, 64, 32, 3), dtype=np.uint8)
    assert cover(frames, (64, 64), (64, 64)).shape == (1, 64, 64, 3)


def test_an_image_is_turned_upright(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(ramp_frames(1)[0]).save(path, exif=exif, quality=95)
    video, fps = read_video(path)
    assert (video.shape, fps) == ((3, 1, 64, 48), 1.0)
    assert video[:, 0, 2:6, -6:-2].mean() > 0.8  # the bright corner is now at the upper right


def test_nearest_frames_of_a_constant_rate_are_consecutive(clip):
    assert nearest_frames(probe(clip), 0.5, 5, 24).tolist() == [12, 13, 14, 15, 16]


def test_pixels_survive_the_way_to_a_tensor_and_back():
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(to_frames(to_tensor(frames)), frames)

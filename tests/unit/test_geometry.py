"""Latent sizes and positions equal the published ones."""

import weakref

import pytest
import torch

from ltx2_train import geometry
from ltx2_train.errors import DataError


@pytest.mark.parametrize(
    ("frames", "fps", "steps", "latents"),
    [(121, 24, 126, 16), (241, 24, 251, 31), (97, 25, 97, 13), (121, 25, 121, 16), (257, 30, 214, 33), (1, 24, 1, 1)],
)
def test_lengths(frames: int, fps: float, steps: int, latents: int):
    assert geometry.audio_latent_length(frames, fps) == steps
    assert geometry.latent_frames(frames) == latents
    assert geometry.pixel_frames(latents) == frames


def test_audio_length_rounds_ties_to_even():
    assert geometry.audio_latent_length(1, 50) == 0
    assert geometry.audio_latent_length(3, 50) == 2


def test_video_positions_are_seconds_and_pixels_in_token_order():
    positions = geometry.video_positions(17, 64, 96, 25.0)
    assert positions.shape == (3, 3 * 2 * 3, 2)
    assert positions.dtype is torch.float32
    time = positions[0].unflatten(0, (3, 6))[:, 0]
    torch.testing.assert_close(time, torch.tensor([[0, 1], [1, 9], [9, 17]]) / 25)
    assert positions[1, :7, 0].tolist() == [0, 0, 0, 32, 32, 32, 0]
    assert positions[2, :4].tolist() == [[0, 32], [32, 64], [64, 96], [0, 32]]


def test_audio_positions_are_causal():
    positions = geometry.audio_positions(3)
    torch.testing.assert_close(positions[0], torch.tensor([[0, 0.01], [0.01, 0.05], [0.05, 0.09]]))


def test_the_same_geometry_gives_the_same_tensor():
    device = torch.device("cpu")
    first = geometry.batch_video_positions(2, 1, 1, (24.0, 24.0), device)
    assert first is geometry.batch_video_positions(2, 1, 1, (24.0, 24.0), device)
    assert first.shape[0] == 1


def test_a_mixture_of_frame_rates_has_positions_per_sample_and_is_not_kept():
    arguments = (2, 1, 1, (24.0, 12.0), torch.device("cpu"))
    mixed = geometry.batch_video_positions(*arguments)
    torch.testing.assert_close(mixed[1, 0], 2 * mixed[0, 0])
    kept = weakref.ref(mixed)
    del mixed
    assert kept() is None


@pytest.mark.parametrize(("frames", "nearest"), [(8, 9), (2, 1), (120, 121), (0, 1)])
def test_an_impossible_frame_count_names_the_nearest(frames: int, nearest: int):
    with pytest.raises(DataError, match=f"nearest: {nearest}"):
        geometry.latent_frames(frames)


def test_an_impossible_size_names_the_nearest():
    with pytest.raises(DataError, match="width of 100 px.*nearest: 96"):
        geometry.video_positions(9, 64, 100, 24)

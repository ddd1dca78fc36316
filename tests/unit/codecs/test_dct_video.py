import hashlib
from importlib import resources

import pytest
import torch

from ltx2_train import geometry
from ltx2_train.codecs import build_video_codec, dct
from ltx2_train.data.synthetic import bounce_clip
from ltx2_train.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def codec():
    return dct.DctVideoCodec()


def world_videos(num_clips: int, seed: int = 0) -> torch.Tensor:
    videos = [torch.from_numpy(bounce_clip(seed + i).video) for i in range(num_clips)]
    return torch.stack(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def test_the_cosines_are_orthonormal():
    basis = dct.cosines(32, 32)
    torch.testing.assert_close(basis @ basis.T, torch.eye(32, dtype=torch.float64))


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (9, 64, 96), (41, 64, 64), (17, 160, 32)])
def test_latents_have_the_shape_of_the_released_codec_and_decode_to_the_clip(codec, frames, height, width):
    latents = codec.encode(torch.zeros(2, 3, frames, height, width))
    assert latents.shape == (2, 128, geometry.latent_frames(frames), height // 32, width // 32)
    assert latents.dtype == torch.float32
    assert codec.decode(latents).shape == (2, 3, frames, height, width)


def test_the_codec_is_causal(codec):
    video = torch.rand(1, 3, 17, 64, 64) * 2 - 1
    latents = codec.encode(video)
    torch.testing.assert_close(codec.encode(video[:, :, :9]), latents[:, :, :2])
    torch.testing.assert_close(codec.encode(video[:, :, :1]), latents[:, :, :1])


def test_every_latent_is_the_latent_of_what_it_decodes_to(codec):
    latents = torch.randn(2, 128, 3, 2, 1) * 0.05
    torch.testing.assert_close(codec.encode(codec.decode(latents).clamp(-1.5, 1.5)), latents, atol=1e-4, rtol=1e-4)


def test_a_still_picture_of_one_colour_comes_back_exactly(codec):
    video = torch.tensor([0.3, -0.8, 0.9])[None, :, None, None, None].expand(1, 3, 9, 64, 32)
    torch.testing.assert_close(codec.decode(codec.encode(video)), video, atol=2e-5, rtol=0)


def test_a_clip_is_encoded_the_same_whatever_stands_beside_it(codec):
    videos = world_videos(3)
    torch.testing.assert_close(codec.encode(videos)[1:2], codec.encode(videos[1:2]), atol=1e-5, rtol=1e-5)


def test_the_world_comes_back_recognisably(codec):
    videos = world_videos(16)
    errors = ((codec.decode(codec.encode(videos)).clamp(-1, 1) - videos) / 2).square().flatten(1).mean(dim=1)
    assert -10 * errors.log10().mean() > 23  # dB


def test_latents_of_the_world_have_unit_variance_on_average_in_both_bases(codec):
    latents = codec.encode(world_videos(64, seed=7000))
    for part in (latents[:, :, :1], latents[:, :, 1:]):
        variances = part.movedim(1, 0).flatten(1).var(dim=1)
        assert variances.mean() == pytest.approx(1, abs=0.15)
        assert variances.min() > 0.005  # half-whitening keeps small channels small, but not out of sight


def test_the_128_channels_are_different_patterns_and_still_ones_agree_between_the_bases(codec):
    block, first = codec.block.channels, codec.first.channels
    assert len(set(block)) == len(set(first)) == 128
    shared = set(block) & set(first)
    assert len(shared) >= 29
    assert all(block.index(pattern) == first.index(pattern) for pattern in shared)
    assert block[0] == first[0] == (0, 0, 0, 0)


def test_a_nearly_empty_channel_is_not_blown_up():
    norm = dct.Normalisation.of(torch.zeros(3), torch.tensor([0.0, 1e-6, 4.0]), floor=0.1)
    assert norm.scale.min() > 0.1
    torch.testing.assert_close(norm.scale[0], norm.scale[1])


def test_half_whitening_gives_unit_mean_variance():
    deviation = torch.tensor([0.5, 1.0, 4.0])
    norm = dct.Normalisation.of(torch.zeros(3), deviation, floor=0.1)
    after = deviation / norm.scale
    assert after.square().mean() == pytest.approx(1)
    assert (after[2] / after[1]).item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 10, 64, 64), "8k \\+ 1"),
        (torch.zeros(1, 3, 9, 60, 64), "height of 60 px"),
        (torch.zeros(1, 1, 9, 64, 64), "\\(B, 3, F, H, W\\)"),
        (torch.full((1, 3, 1, 32, 32), float("nan")), "nan"),
        (torch.full((1, 3, 1, 32, 32), 255.0), "255"),
        (torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8), "uint8"),
    ],
)
def test_unfit_video_is_refused_with_its_fault(codec, video, message):
    with pytest.raises(DataError, match=message):
        codec.encode(video)


def test_latents_of_another_codec_are_refused(codec):
    with pytest.raises(DataError, match="128"):
        codec.decode(torch.zeros(1, 16, 2, 2, 2))


def test_a_name_finds_the_codec_and_an_unknown_one_says_what_there_is():
    assert build_video_codec("dct").name == build_video_codec("dct-1").name == "dct-1"
    with pytest.raises(ConfigError, match=r"ltx2\.safetensors.*'dct'"):
        build_video_codec("ltx2.safetensors")


def test_the_statistics_belong_to_the_version():
    content = resources.files("ltx2_train.codecs").joinpath(dct.STATISTICS_FILE).read_bytes()
    digests = {1: "6b7eca7de48b21f1"}
    assert hashlib.sha256(content).hexdigest().startswith(digests[dct.VERSION]), "new statistics need a new VERSION"

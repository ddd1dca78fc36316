import pytest
import torch

from ltx2_train.diffusion.conditioning import (
    CONDITIONS,
    ConditioningConfig,
    ConditioningKind,
    check_conditioning,
    context_mask,
    draw_conditioning,
    keyframes_mask,
)
from ltx2_train.errors import ConfigError
from ltx2_train.record import Bucket
from ltx2_train.rng import BatchRng

CPU = torch.device("cpu")
CLIP, IMAGE, SILENT = Bucket(3, 2, 2, 5), Bucket(1, 2, 2, 1), Bucket(3, 2, 2, 0)


def draw(*kinds: tuple[str, float], bucket: Bucket = CLIP, n: int = 4000):
    configs = [ConditioningConfig(kind=kind, probability=p) for kind, p in kinds]
    return draw_conditioning(configs, bucket, BatchRng(0, 0, range(n)), CPU)


def test_every_kind_is_known_to_the_seam():
    assert set(CONDITIONS) == set(ConditioningKind)


def test_the_first_frame_is_given_to_its_share_of_the_samples():
    mask = draw(("first_frame", 0.3)).video.denoise_mask()
    assert (mask[:, 4:] == 1).all()
    assert ((mask[:, :4].sum(1) == 0) | (mask[:, :4].sum(1) == 4)).all()
    assert (mask[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_a_single_frame_is_never_given_whole():
    image = draw(("first_frame", 1.0), bucket=IMAGE)
    assert image.video.index is None
    assert (image.video.denoise_mask() == 1).all()


def test_nothing_is_given_where_nothing_would_be_left_to_generate():
    silent = draw(("given_video", 1.0), bucket=SILENT)
    assert not silent.video.given.any()


def test_given_streams_exclude_each_other_and_keep_their_shares():
    both = draw(("given_audio", 0.25), ("given_video", 0.4))
    assert not (both.audio.given & both.video.given).any()
    assert both.audio.given.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert both.video.given.float().mean().item() == pytest.approx(0.4, abs=0.03)
    halves = draw(("given_audio", 0.5), ("given_video", 0.5))
    assert (halves.audio.given | halves.video.given).all()


def test_one_condition_does_not_move_anothers_draws():
    alone, together = draw(("first_frame", 0.3)), draw(("given_audio", 0.5), ("first_frame", 0.3))
    assert torch.equal(alone.video.denoise_mask(), together.video.denoise_mask())


def test_the_few_timesteps_say_the_same_as_one_per_token():
    stream, sigma = draw(("first_frame", 0.5), n=6).video, torch.linspace(0.1, 0.9, 6)
    timesteps = stream.timesteps(sigma)
    assert timesteps.shape == (6, 2)
    expected = sigma[:, None] * stream.denoise_mask()
    torch.testing.assert_close(stream.per_token(timesteps), expected)


def test_the_token_index_is_one_object_per_geometry():
    """The model reads its values once per object, so they must not be remade in every step."""
    first, second = (
        draw_conditioning([ConditioningConfig(probability=0.5)], CLIP, BatchRng(0, step, range(6)), CPU).video
        for step in range(2)
    )
    assert not torch.equal(first.levels(), second.levels())
    assert first.index is second.index
    assert (first.index == first.index[0]).all()


def test_markers_and_masks_exist_only_where_they_say_something():
    assert keyframes_mask(CLIP, 2, CPU).sum((1, 2)).tolist() == [4, 4]
    assert keyframes_mask(CLIP, 2, CPU).shape == (2, 12, 1)
    assert context_mask([3, 3], CPU) is None
    assert context_mask([1, 3], CPU).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_impossible_shares_are_refused():
    with pytest.raises(ConfigError, match=r"given_audio 0\.7, given_video 0\.5"):
        check_conditioning(
            [
                ConditioningConfig(kind="given_audio", probability=0.7),
                ConditioningConfig(kind="given_video", probability=0.5),
            ]
        )
    with pytest.raises(ConfigError, match="each kind may stand once"):
        check_conditioning([ConditioningConfig(kind="first_frame")] * 2)
    with pytest.raises(ConfigError, match="choose one of first_frame"):
        ConditioningConfig(kind="last_frame")
    with pytest.raises(ConfigError, match=r"probability=1\.5"):
        ConditioningConfig(probability=1.5)

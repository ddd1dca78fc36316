import numpy as np
import pytest

from ltx2_train.data.synthetic import BALLS, SAMPLE_RATE, WorldConfig, bounce_clip
from ltx2_train.errors import ConfigError


def ball_rows(clip) -> np.ndarray:
    """Mean row of the ball's pixels, per frame."""
    away = np.abs(clip.video.astype(int) - np.array(BALLS[clip.color][0])).sum(axis=-1) < 30
    return (away * np.arange(clip.video.shape[1])[None, :, None]).sum(axis=(1, 2)) / away.sum(axis=(1, 2))


def test_a_clip_is_a_function_of_its_seed():
    one, again, other = bounce_clip(5), bounce_clip(5), bounce_clip(6)
    assert np.array_equal(one.video, again.video)
    assert np.array_equal(one.waveform, again.waveform)
    assert (one.caption, one.impact_times) == (again.caption, again.impact_times)
    assert not np.array_equal(one.video, other.video)


@pytest.mark.parametrize(
    ("width", "height", "frames", "fps"), [(64, 64, 41, 24.0), (128, 96, 33, 25.0), (64, 96, 121, 60.0)]
)
def test_a_clip_has_the_size_that_was_asked_for(width, height, frames, fps):
    clip = bounce_clip(1, WorldConfig(width=width, height=height, frames=frames, fps=fps))
    assert clip.video.shape == (frames, height, width, 3)
    assert clip.video.dtype == np.uint8
    assert clip.waveform.shape == (2, round(SAMPLE_RATE * frames / fps))
    assert clip.waveform.dtype == np.float32
    assert np.abs(clip.waveform).max() <= 1


def test_the_ball_is_lowest_at_the_impacts():
    for seed in range(20):
        clip = bounce_clip(seed)
        rows = ball_rows(clip)
        for time in clip.impact_times:
            assert rows[round(time * clip.fps)] > rows.max() - 6
        fall = rows[: int(clip.impact_times[0] * clip.fps) + 1]
        assert (np.diff(fall) > -0.5).all()  # it only falls before the first impact


def test_the_ball_accelerates_as_a_falling_body():
    clip = bounce_clip(0, WorldConfig(fps=96.0, frames=161, width=256, height=256))
    last = int(clip.impact_times[0] * 96)
    curvature = np.diff(ball_rows(clip)[last - 24 : last], 2).mean() * 96**2
    assert curvature == pytest.approx(350 * 4, rel=0.1)


def test_sound_sets_in_at_the_impacts_and_nowhere_else():
    for seed in range(20):
        clip = bounce_clip(seed)
        energy = np.abs(clip.waveform).max(axis=0)
        first = int(clip.impact_times[0] * SAMPLE_RATE)
        assert energy[: first - 1].max() == 0
        for time in clip.impact_times:
            at = int(time * SAMPLE_RATE)
            assert energy[at : at + 160].max() > 2 * energy[max(0, at - 160) : at].max()


def test_pitch_follows_the_colour_and_pan_the_place():
    for seed in range(12):
        clip = bounce_clip(seed)
        spectrum = np.abs(np.fft.rfft(clip.waveform.sum(axis=0)))
        loudest = spectrum.argmax() * SAMPLE_RATE / clip.waveform.shape[1]
        assert loudest == pytest.approx(BALLS[clip.color][1], rel=0.05)
        columns = np.abs(clip.video[0].astype(int) - np.array(BALLS[clip.color][0])).sum(axis=-1) < 30
        place = np.nonzero(columns)[1].mean() / 64
        left, right = np.square(clip.waveform).sum(axis=1)
        assert right / (left + right) == pytest.approx(np.sin(place * np.pi / 2) ** 2, abs=0.05)


def test_the_caption_says_what_is_seen_and_heard_but_not_when():
    clips = [bounce_clip(seed) for seed in range(300)]
    for clip in clips:
        assert clip.color in clip.caption
        assert clip.background in clip.caption
        assert BALLS[clip.color][2] in clip.caption
    assert len({clip.caption for clip in clips}) == 24  # colours x backgrounds: nothing else varies
    first_impacts = [clip.impact_times[0] for clip in clips if clip.color == "red"]
    assert np.std(first_impacts) > 0.2


def test_the_world_has_between_one_and_three_impacts_and_a_quiet_end():
    clips = [bounce_clip(seed) for seed in range(300)]
    counts = [len(clip.impact_times) for clip in clips]
    assert set(counts) == {1, 2, 3}
    assert 1.3 < np.mean(counts) < 1.7
    assert max(clip.impact_times[-1] for clip in clips) < 41 / 24 - 0.13


def test_silent_clips_and_images_come_in_their_shares():
    config = WorldConfig(silent_fraction=0.3, image_fraction=0.2)
    clips = [bounce_clip(seed, config) for seed in range(200)]
    images = [clip for clip in clips if len(clip.video) == 1]
    silent = [clip for clip in clips if len(clip.video) > 1 and not clip.has_audio]
    assert 25 <= len(images) <= 55
    assert 45 <= len(silent) <= 75
    assert all(clip.waveform is None and not clip.impact_times and "image" in clip.caption for clip in images)
    assert all(clip.waveform is None and clip.impact_times and "without sound" in clip.caption for clip in silent)


def test_a_world_of_one_frame_is_images():
    clip = bounce_clip(3, WorldConfig(frames=1))
    assert clip.video.shape == (1, 64, 64, 3)
    assert not clip.has_audio


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 9}, "a fall needs"),
        ({"width": 16}, "32 x 32"),
        ({"fps": 0.0}, "fps > 0"),
        ({"silent_fraction": 1.5}, "silent_fraction: 1.5"),
        ({"silent_fraction": 0.6, "image_fraction": 0.6}, "sum"),
    ],
)
def test_an_impossible_world_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        WorldConfig(**fields)

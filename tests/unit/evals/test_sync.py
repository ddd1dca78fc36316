import numpy as np
import pytest
import torch

from ltx2_train.codecs.dct import DctAudioCodec, DctVideoCodec
from ltx2_train.data.synthetic import WorldConfig, bounce_clip
from ltx2_train.errors import DataError
from ltx2_train.evals import sync

HELD_OUT = 4_000_000_000
NUM_CLIPS = 48


def video_of(clip) -> torch.Tensor:
    return torch.from_numpy(clip.video).permute(3, 0, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def clips():
    return [bounce_clip(HELD_OUT + i) for i in range(NUM_CLIPS)]


@pytest.fixture(scope="module")
def truth(clips):
    return [list(clip.impact_times) for clip in clips]


@pytest.fixture(scope="module")
def decoded(clips):
    """Impacts seen and onsets heard after the whole codec."""
    video_codec, audio_codec = DctVideoCodec(), DctAudioCodec()
    videos = video_codec.decode(video_codec.encode(torch.stack([video_of(clip) for clip in clips])))
    waveforms = torch.stack([torch.from_numpy(clip.waveform) for clip in clips])
    mels = audio_codec.decode_mel(audio_codec.encode(waveforms, 16000))
    return [sync.impacts(video, 24.0) for video in videos], [sync.onsets(mel) for mel in mels]


def test_impacts_are_seen_when_they_happen(clips, truth):
    seen = [sync.impacts(video_of(clip), clip.fps) for clip in clips]
    result = sync.compare(truth, seen, tolerance=0.02)
    assert result.f1 > 0.97
    assert abs(result.offset) < 0.003


def test_onsets_are_heard_when_they_happen(clips, truth):
    heard = [sync.waveform_onsets(torch.from_numpy(clip.waveform), 16000) for clip in clips]
    result = sync.compare(truth, heard, tolerance=0.02)
    assert result.f1 > 0.98
    assert abs(result.offset) < 0.003


def test_the_codec_keeps_the_time_of_impacts_and_onsets(truth, decoded):
    seen, heard = decoded
    assert sync.f1_score(truth, seen, 0.05) > 0.97
    assert sync.f1_score(truth, heard, 0.03) > 0.98
    assert sync.compare(truth, seen, 0.05).mean_error < 0.015


def test_decoded_clips_are_in_step_and_far_above_chance(decoded):
    near, wide = sync.compare(*decoded, tolerance=0.05), sync.compare(*decoded, tolerance=0.08)
    assert near.f1 > 0.97
    assert near.chance < 0.2
    assert 0.1 < wide.chance < 0.3


def test_sound_that_comes_later_and_later_is_less_and_less_in_step(decoded):
    seen, heard = decoded
    later = [[[time + delay for time in times] for times in heard] for delay in (0, 0.04, 0.12)]
    scores = [sync.f1_score(seen, times, 0.05) for times in later]
    assert scores[0] > scores[1] > scores[2]
    assert sync.f1_score(seen, [[time + 0.4 for time in times] for times in heard], 0.05) < 0.2
    assert sync.compare(seen, later[1], 0.08).offset == pytest.approx(0.04, abs=0.01)


def test_larger_frames_and_other_rates_are_read_too():
    config = WorldConfig(width=128, height=96, fps=30.0, frames=57)
    clips = [bounce_clip(HELD_OUT + i, config) for i in range(8)]
    seen = [sync.impacts(video_of(clip), clip.fps) for clip in clips]
    assert sync.f1_score([clip.impact_times for clip in clips], seen, 0.03) > 0.95


def bouncing(turn: int, size: int = 4) -> torch.Tensor:
    """A square that falls by 3 rows a frame and rises by 2, on a screen of 64 rows: the ways meet at frame 10.2."""
    video = torch.full((3, 21, 64, 16), -1.0)
    for frame in range(21):
        row = turn - 3 * (10 - frame) if frame <= 10 else turn + 1 - 2 * (frame - 10)
        video[:, frame, row : row + size, 6 : 6 + size] = 1.0
    return video


def test_an_impact_is_where_the_ways_meet_low_in_the_picture_of_something_that_has_a_size():
    assert sync.impacts(bouncing(40), 24.0) == [pytest.approx(10.2 / 24)]
    assert sync.impacts(bouncing(30), 24.0) == [], "in the upper half there is nothing to hit"
    assert sync.impacts(bouncing(40, size=1), 24.0) == [], "a speck of a thousandth of the frame"


def steps(*rises: tuple[int, float]) -> torch.Tensor:
    """Log-mel (2, 100, 64): silence that becomes louder by so many nats at these frames."""
    mel = torch.full((2, 100, 64), float(np.log(sync.MEL_FLOOR)))
    for frame, nats in rises:
        mel[:, frame:] += nats
    return mel


def test_an_onset_is_a_rise_that_can_be_heard_and_its_echo_is_none():
    at = lambda *frames: pytest.approx([frame / 100 + sync.ONSET_DELAY for frame in frames])  # noqa: E731
    assert sync.onsets(steps((40, 0.3))) == at(40)
    assert sync.onsets(steps((40, 0.05))) == []
    assert sync.onsets(steps((40, 1.0), (46, 0.6))) == at(40), "60 ms later"
    assert sync.onsets(steps((40, 1.0), (60, 0.6))) == at(40, 60)


@pytest.mark.parametrize("hz", [60.0, 200.0, 1000.0, 7000.0])
def test_sound_that_goes_on_to_the_end_sets_in_once(hz):
    """The end of the sound is no onset, though the window there sees it reflected."""
    for length in (32000, 31960, 31900):
        times = torch.arange(length) / 16000
        wave = 0.5 * torch.sin(2 * torch.pi * hz * times) * (times > 1.05)
        assert sync.waveform_onsets(wave.expand(2, -1), 16000) == [pytest.approx(1.05, abs=0.015)]


def test_a_click_just_before_the_end_is_heard():
    times = torch.arange(32000) / 16000
    for before in (0.1, 0.04, 0.02):
        since = times - (2 - before)
        wave = torch.sin(2 * torch.pi * 1000 * times) * torch.exp(-since.clamp(min=0) / 0.02) * (since >= 0)
        assert sync.waveform_onsets(wave.expand(2, -1), 16000) == [pytest.approx(2 - before, abs=0.01)]


def test_sound_in_one_channel_sets_in_as_much_as_in_both():
    wave = torch.zeros(2, 16000)
    wave[0, 8000:] = torch.sin(torch.arange(8000) * 0.4)
    both = sync.onset_strength(wave[[0, 0]], 16000)
    assert both.max() > sync.MIN_RISE
    assert torch.equal(sync.onset_strength(wave, 16000), both)


def test_a_change_is_seen_when_the_second_frame_appears():
    """10 frames a second, the change between frames 19 and 20, and sound that sets in at 2 s."""
    energy, strength = torch.zeros(40, dtype=torch.float64), torch.zeros(400, dtype=torch.float64)
    energy[19], strength[199] = 1.0, 1.0
    assert sync.motion_peaks(energy, 10.0) == [2.0]
    assert abs(sync.lag(sync.curves(energy, strength, 10.0))) <= 0.01


def test_small_movements_are_no_peaks():
    energy = torch.zeros(40, dtype=torch.float64)
    energy[[9, 19, 29]] = torch.tensor([0.1, 1.0, 0.5], dtype=torch.float64)
    assert sync.motion_peaks(energy, 10.0) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("length", "seen", "heard", "largest"), [(400, 1.0, 1.8, 1.0), (400, 1.0, 2.8, 1.0), (60, 0.05, 0.55, 0.3)]
)
def test_a_lag_is_looked_for_up_to_a_second_and_half_of_the_clip(length, seen, heard, largest):
    motion, sound = np.zeros((2, length))
    motion[round(seen * 100)] = sound[round(heard * 100)] = 1.0
    found = sync.lag(sync.Curves(motion - motion.mean(), sound - sound.mean(), 0.01))
    assert abs(found) <= largest
    assert (found == pytest.approx(heard - seen)) == (heard - seen <= largest)


def test_an_empty_picture_has_no_impacts_and_silence_no_onsets():
    assert sync.impacts(torch.zeros(3, 41, 64, 64), 24.0) == []
    assert sync.impacts(torch.zeros(3, 1, 64, 64), 24.0) == []
    assert sync.waveform_onsets(torch.zeros(2, 16000), 16000) == []
    assert sync.onsets(torch.zeros(2, 1, 64)) == []


def test_matching_is_one_to_one_and_nearest_first():
    assert sync.match([1.0], [0.97, 1.02], 0.05) == [pytest.approx(0.02)]
    assert sync.match([1.0, 1.04], [1.03], 0.05) == [pytest.approx(-0.01)]
    assert sync.match([1.0], [1.2], 0.05) == []
    assert sync.match([1.0], [1.5], 0.5) == [0.5], "the tolerance itself is within it"
    assert sync.match([], [1.0], 0.05) == []


def test_f1_counts_over_all_clips():
    seen, heard = [[1.0, 2.0], [0.5]], [[1.0], [0.9]]
    assert sync.f1_score(seen, heard, 0.05) == pytest.approx(2 * 1 / (3 + 2))
    assert sync.f1_score([[]], [[]], 0.05) is None


def test_the_error_has_no_sign_and_the_offset_has():
    result = sync.compare([[1.0], [2.0]], [[1.03], [1.97]], 0.05)
    assert (result.mean_error, result.offset) == (pytest.approx(0.03), pytest.approx(0.0))


def test_a_model_without_balls_is_seen_in_the_counts(truth):
    result = sync.compare([[] for _ in truth], truth)
    assert (result.num_impacts, result.num_matched, result.f1) == (0, 0, 0)
    assert result.mean_error is None
    assert result.offset is None


def test_chance_is_the_score_with_the_sound_of_other_clips():
    seen = [[0.2], [0.6], [1.0]]
    assert sync.chance_f1(seen, seen, 0.05) == 0
    assert sync.chance_f1([[0.5]] * 3, [[0.5]] * 3, 0.05) == 1
    assert sync.chance_f1([[0.5]], [[0.5]], 0.05) is None
    assert sync.chance_f1(seen, seen[1:] + seen[:1], 0.05) == 0.5, "the second of two rotations fits"


def test_samples_of_one_clip_are_no_chance_of_each_other():
    seen = [[0.2], [0.9]] * 2
    assert sync.chance_f1(seen, seen, 0.05, clips=[0, 1, 0, 1]) == 0
    assert sync.chance_f1(seen, seen, 0.05) == pytest.approx(1 / 3)


def test_chance_does_not_know_which_clips_are_paired(truth):
    turned = truth[7:] + truth[:7]
    whole = NUM_CLIPS - 1
    one = sync.chance_f1(truth, truth, 0.08, shifts=whole) * whole + sync.f1_score(truth, truth, 0.08)
    other = sync.chance_f1(truth, turned, 0.08, shifts=whole) * whole + sync.f1_score(truth, turned, 0.08)
    assert one == pytest.approx(other)


def test_unequal_sets_are_refused():
    with pytest.raises(DataError, match="2 clips seen and 1 heard"):
        sync.compare([[], []], [[]])

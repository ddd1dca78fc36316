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


def test_an_empty_picture_has_no_impacts_and_silence_no_onsets():
    assert sync.impacts(torch.zeros(3, 41, 64, 64), 24.0) == []
    assert sync.impacts(torch.zeros(3, 1, 64, 64), 24.0) == []
    assert sync.waveform_onsets(torch.zeros(2, 16000), 16000) == []
    assert sync.onsets(torch.zeros(2, 1, 64)) == []


def test_matching_is_one_to_one_and_nearest_first():
    assert sync.match([1.0], [0.97, 1.02], 0.05) == [pytest.approx(0.02)]
    assert sync.match([1.0, 1.04], [1.03], 0.05) == [pytest.approx(-0.01)]
    assert sync.match([1.0], [1.2], 0.05) == []
    assert sync.match([], [1.0], 0.05) == []


def test_f1_counts_over_all_clips():
    seen, heard = [[1.0, 2.0], [0.5]], [[1.0], [0.9]]
    assert sync.f1_score(seen, heard, 0.05) == pytest.approx(2 * 1 / (3 + 2))
    assert sync.f1_score([[]], [[]], 0.05) is None


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


def test_chance_does_not_know_which_clips_are_paired(truth):
    turned = truth[7:] + truth[:7]
    whole = NUM_CLIPS - 1
    one = sync.chance_f1(truth, truth, 0.08, shifts=whole) * whole + sync.f1_score(truth, truth, 0.08)
    other = sync.chance_f1(truth, turned, 0.08, shifts=whole) * whole + sync.f1_score(truth, turned, 0.08)
    assert one == pytest.approx(other)


def test_unequal_sets_are_refused():
    with pytest.raises(DataError, match="2 clips seen and 1 heard"):
        sync.compare([[], []], [[]])

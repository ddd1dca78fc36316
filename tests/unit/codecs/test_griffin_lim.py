import pytest
import torch

from ltx2_train.codecs import griffin_lim
from ltx2_train.codecs.dct import DctAudioCodec
from ltx2_train.codecs.mel import LogMel
from ltx2_train.data.synthetic import bounce_clip
from ltx2_train.evals import sync

FRONT = LogMel(floor=1e-2)


def world_mels(num_clips: int) -> torch.Tensor:
    return torch.stack([FRONT(torch.from_numpy(bounce_clip(i).waveform), 16000) for i in range(num_clips)])


def test_spread_bands_come_back_as_the_same_bands():
    mel = world_mels(2)
    again = (griffin_lim.mel_to_magnitudes(mel, FRONT).mT @ FRONT.filters() + FRONT.floor).log()
    assert (again - mel).abs().mean() < 0.05  # nats


def test_the_waveform_sounds_like_its_mel():
    mel = world_mels(2)
    heard = FRONT(griffin_lim.vocode(mel, FRONT), 16000)[:, :, : mel.shape[2]]
    assert (heard - mel).abs().mean() < 0.05


@pytest.mark.slow
def test_onsets_are_kept():
    codec = DctAudioCodec()
    clips = [bounce_clip(i) for i in range(6)]
    waveform = torch.stack([torch.from_numpy(clip.waveform) for clip in clips])
    heard = codec.decode(codec.encode(waveform, 16000))
    times = [sync.waveform_onsets(w, codec.sample_rate) for w in heard]
    result = sync.compare([clip.impact_times for clip in clips], times, tolerance=0.03)
    assert result.f1 > 0.95
    assert abs(result.offset) < 0.005


def test_the_waveform_is_a_function_of_the_mel_alone():
    mel = world_mels(2)
    both, alone = griffin_lim.vocode(mel, FRONT, iterations=4), griffin_lim.vocode(mel[1:], FRONT, iterations=4)
    torch.testing.assert_close(both[1:], alone)


def test_equal_channels_stay_equal():
    mel = world_mels(1)[:, :1].expand(-1, 2, -1, -1)
    left, right = griffin_lim.vocode(mel, FRONT, iterations=4)[0]
    torch.testing.assert_close(left, right)

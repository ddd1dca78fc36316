import math

import pytest
import torch

from ltx2_train import geometry
from ltx2_train.codecs import build_audio_codec, dct
from ltx2_train.data.synthetic import bounce_clip
from ltx2_train.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def codec():
    return dct.DctAudioCodec()


def world_waveforms(num_clips: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(bounce_clip(i).waveform) for i in range(num_clips)])


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize(("frames", "fps"), [(41, 24.0), (121, 24.0), (49, 25.0), (33, 29.97), (17, 60.0)])
def test_there_are_as_many_steps_as_the_picture_asks_for(codec, rate, frames, fps):
    waveform = torch.zeros(1, 2, round(rate * frames / fps))
    latents = codec.encode(waveform, rate)
    assert latents.shape == (1, 8, geometry.audio_latent_length(frames, fps), 16)
    assert latents.dtype == torch.float32
    assert codec.decode_mel(latents).shape == (1, 2, 4 * latents.shape[2] - 3, 64)


def test_silence_is_one_constant_and_stays_silence(codec):
    waveform = torch.zeros(1, 2, 16000)
    assert codec.mel(waveform, 16000).unique().tolist() == [pytest.approx(math.log(1e-2))]
    latents = codec.encode(waveform, 16000)
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents), atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode_mel(latents), torch.full((1, 2, 97, 64), math.log(1e-2)), atol=1e-4, rtol=0)
    assert codec.decode(latents).abs().max() < 1e-3


def test_the_world_comes_back_closely(codec):
    waveforms = world_waveforms(16)
    mel = codec.decode_mel(codec.encode(waveforms, 16000))
    assert (mel - codec.mel(waveforms, 16000)[:, :, : mel.shape[2]]).abs().mean() < 0.02  # nats


def test_sound_stays_on_its_side(codec):
    waveform = torch.zeros(1, 2, 16000)
    waveform[0, 0] = 0.3 * torch.sin(2 * math.pi * 440 / 16000 * torch.arange(16000))
    left, right = codec.decode_mel(codec.encode(waveform, 16000))[0]
    assert left.mean() > right.mean() + 0.1
    heard = codec.decode(codec.encode(waveform, 16000))[0].square().mean(dim=1)
    assert heard[0] > 10 * heard[1]


def test_latents_are_the_latents_of_what_they_decode_to():
    coefficients = torch.randn(2, 8, 5, 16)
    again = dct.analyse_mel(dct.synthesise_mel(coefficients))
    torch.testing.assert_close(again[:, :, 1:], coefficients[:, :, 1:], atol=1e-4, rtol=1e-4)


def test_the_first_step_is_the_first_mel_frame_alone():
    mel = torch.randn(1, 2, 9, 64)
    coefficients = dct.analyse_mel(mel)
    torch.testing.assert_close(dct.analyse_mel(mel[:, :, :1]), coefficients[:, :, :1])
    torch.testing.assert_close(dct.analyse_mel(mel[:, :, :5]), coefficients[:, :, :2])


def test_decoded_sound_is_as_long_as_its_mel(codec):
    assert codec.decode(torch.zeros(1, 8, 25, 16)).shape == (1, 2, 160 * (4 * 25 - 3))
    assert codec.sample_rate == 16000


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(1, 1, 16000), "to_stereo"),
        (torch.full((1, 2, 16000), float("nan")), "nan"),
        (torch.full((1, 2, 16000), 32767.0), "32767"),
        (torch.zeros(1, 2, 16000, dtype=torch.int16), "int16"),
        (torch.zeros(1, 2, 300), "at least 0.0321 s"),
    ],
)
def test_unfit_sound_is_refused_with_its_fault(codec, waveform, message):
    with pytest.raises(DataError, match=message):
        codec.encode(waveform, 16000)


def test_latents_of_another_codec_are_refused(codec):
    with pytest.raises(DataError, match="8, any, 16"):
        codec.decode_mel(torch.zeros(1, 8, 5, 12))


def test_an_unknown_name_says_what_there_is():
    assert build_audio_codec("dct").name == "dct-1"
    with pytest.raises(ConfigError, match="'dct'"):
        build_audio_codec("mp3")

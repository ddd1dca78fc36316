import math

import pytest
import torch

from ltx2_train.codecs.mel import LogMel, hz_to_mel, mel_to_hz
from ltx2_train.errors import DataError


def tone(hz: float, samples: int = 16000, rate: int = 16000) -> torch.Tensor:
    return torch.sin(2 * math.pi * hz / rate * torch.arange(samples, dtype=torch.float64)).float()


def test_the_scale_is_linear_below_1_khz_and_logarithmic_above():
    assert hz_to_mel(500) == pytest.approx(7.5)
    assert hz_to_mel(1000) == pytest.approx(15)
    assert hz_to_mel(6400) == pytest.approx(42)
    mels = torch.tensor([0.0, 7.5, 15.0, 42.0], dtype=torch.float64)
    torch.testing.assert_close(mel_to_hz(mels), torch.tensor([0.0, 500.0, 1000.0, 6400.0], dtype=torch.float64))


def test_every_band_has_unit_area():
    areas = LogMel(n_fft=16384).filters().sum(dim=0) * 16000 / 16384
    torch.testing.assert_close(areas, torch.ones(64), atol=0.01, rtol=0)


def test_a_tone_is_loudest_in_its_own_band():
    front = LogMel()
    for hz in (300, 1000, 2500, 6000):
        loudest = front(tone(hz)[None], 16000)[0, 50].argmax()
        assert loudest == front.filters()[round(hz * 1024 / 16000)].argmax()


def test_magnitudes_are_linear_in_the_sound():
    front, wave = LogMel(), tone(700)[None]
    torch.testing.assert_close(
        front(wave * math.e, 16000)[0, :, 20], front(wave, 16000)[0, :, 20] + 1, atol=1e-3, rtol=0
    )


def test_there_is_one_frame_per_hop_and_one_more():
    assert LogMel()(torch.zeros(2, 3, 1600), 16000).shape == (2, 3, 11, 64)
    assert LogMel()(torch.zeros(1599), 16000).shape == (10, 64)


@pytest.mark.parametrize("floor", [1e-5, 1e-2])
def test_silence_is_the_logarithm_of_the_floor(floor):
    front = LogMel(floor=floor)
    torch.testing.assert_close(front(torch.zeros(1000), 16000), torch.full((7, 64), math.log(floor)))
    assert front.silence == math.log(floor)


def test_the_spectrum_gives_the_sound_back():
    front, wave = LogMel(), torch.randn(2, 4000)
    torch.testing.assert_close(front.istft(front.stft(wave), 4000), wave, atol=1e-4, rtol=1e-4)


def test_another_rate_gives_the_same_picture():
    at_16, at_48 = (LogMel(floor=1e-3)(tone(700, rate, rate)[None], rate) for rate in (16000, 48000))
    torch.testing.assert_close(at_48[:, 5:-5], at_16[:, 5:-5], atol=0.02, rtol=0)


def test_too_short_a_sound_is_refused():
    with pytest.raises(DataError, match="at least"):
        LogMel()(torch.zeros(512), 16000)


def test_a_window_shorter_than_the_frame_stands_in_its_middle():
    front, wave = LogMel(n_fft=512, window=300, hop=100), torch.randn(2000)
    frame = wave[500 - 150 : 500 + 150] * torch.hann_window(300)  # frame 5
    padded = torch.nn.functional.pad(frame, (106, 106))
    torch.testing.assert_close(front.magnitudes(wave)[:, 5], torch.fft.rfft(padded).abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(front.istft(front.stft(wave), 2000), wave, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "front",
    [
        LogMel(),
        LogMel(sample_rate=24000, n_fft=512, hop=120, bins=40, lowest_hz=20.0, highest_hz=11000.0),
        LogMel(sample_rate=8000, n_fft=512, window=400, hop=100, bins=32, highest_hz=4000.0),
    ],
)
def test_agrees_with_torchaudio(front):
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        pytest.skip(f"torchaudio does not import here: {error}")
    wave = torch.randn(2, front.sample_rate) * 0.1
    theirs = torchaudio.transforms.MelSpectrogram(
        front.sample_rate,
        n_fft=front.n_fft,
        win_length=front.window,
        hop_length=front.hop,
        n_mels=front.bins,
        f_min=front.lowest_hz,
        f_max=front.highest_hz,
        power=1.0,
        norm="slaney",
        mel_scale="slaney",
    )(wave)
    ours = front(wave, front.sample_rate)
    torch.testing.assert_close(ours, theirs.clamp(min=1e-5).log().mT, atol=1e-4, rtol=1e-4)

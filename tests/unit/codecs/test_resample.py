import math

import pytest
import torch

from ltx2_train.codecs.resample import resample, to_stereo
from ltx2_train.errors import DataError


def tone(hz: float, rate: int, seconds: float = 0.5) -> torch.Tensor:
    return torch.sin(2 * math.pi * hz / rate * torch.arange(round(rate * seconds), dtype=torch.float64)).float()


@pytest.mark.parametrize(
    ("old", "new"), [(44100, 16000), (48000, 16000), (16000, 44100), (22050, 16000), (8000, 16000)]
)
def test_a_tone_stays_the_tone(old, new):
    out, expected = resample(tone(500, old), old, new), tone(500, new)
    assert len(out) == math.ceil(len(tone(500, old)) * new / old)
    inner = slice(200, min(len(out), len(expected)) - 200)
    torch.testing.assert_close(out[inner], expected[inner], atol=3e-3, rtol=0)


def test_what_the_new_rate_cannot_carry_is_removed():
    assert resample(tone(11000, 48000), 48000, 16000)[200:-200].abs().max() < 0.02


def test_the_level_is_kept():
    assert resample(torch.ones(4000), 44100, 16000)[100:-100].mean() == pytest.approx(1, abs=1e-3)


def test_leading_dimensions_are_kept_and_channels_do_not_mix():
    wave = torch.zeros(2, 2, 480)
    wave[0, 1] = 1
    out = resample(wave, 48000, 16000)
    assert out.shape == (2, 2, 160)
    assert out[0, 0].abs().max() == out[1].abs().max() == 0


def test_an_equal_rate_changes_nothing():
    wave = torch.randn(2, 100)
    assert resample(wave, 16000, 16000) is wave


def test_a_rate_of_zero_is_refused():
    with pytest.raises(DataError, match="0 to 16000"):
        resample(torch.zeros(2, 100), 0, 16000)


def test_agrees_with_torchaudio():
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        pytest.skip(f"torchaudio does not import here: {error}")
    wave = torch.randn(2, 5000)
    for old, new in ((44100, 16000), (48000, 16000), (16000, 24000)):
        theirs = torchaudio.functional.resample(wave, old, new)
        torch.testing.assert_close(resample(wave, old, new), theirs, atol=1e-5, rtol=1e-5)


def test_mono_is_doubled_and_stereo_kept():
    mono, stereo = torch.randn(1, 10), torch.randn(2, 10)
    torch.testing.assert_close(to_stereo(mono), mono.expand(2, -1))
    assert to_stereo(stereo) is stereo


@pytest.mark.parametrize(
    ("channels", "place", "left", "right"),
    [
        (6, 0, 1 / 2.414, 0),
        (6, 2, 0.707 / 2.414, 0.707 / 2.414),
        (6, 3, 0, 0),
        (6, 4, 0.707 / 2.414, 0),
        (6, 5, 0, 0.707 / 2.414),
        (8, 1, 0, 1 / 3.121),
        (8, 6, 0.707 / 3.121, 0),
        (8, 7, 0, 0.707 / 3.121),
        (4, 3, 0.25, 0.25),
    ],
)
def test_surround_is_mixed_by_its_gains(channels, place, left, right):
    wave = torch.zeros(channels, 5)
    wave[place] = 1
    torch.testing.assert_close(
        to_stereo(wave)[:, 0], torch.tensor([left, right], dtype=torch.float32), atol=1e-3, rtol=0
    )


def test_a_track_without_channels_is_refused():
    with pytest.raises(DataError, match="without channels"):
        to_stereo(torch.zeros(0, 10))

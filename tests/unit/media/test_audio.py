"""Sound stands where the picture is: sample 0 belongs to the first video frame."""

from fractions import Fraction

import av
import numpy as np
import pytest

from ltx2_train.errors import DataError
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import probe
from ltx2_train.media.write import write_flac, write_mp4, write_wav
from tests.unit.media.media_files import CLICKS, FPS, RATE, click_waveform, encode_frames, ramp_frames


def clicks_in(waveform: np.ndarray, rate: int) -> list[float]:
    """Where clicks begin, in seconds."""
    loud = np.abs(waveform).max(0) > 0.25
    starts = np.flatnonzero(loud)
    return [starts[i] / rate for i in range(len(starts)) if i == 0 or starts[i] - starts[i - 1] > rate // 10]


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_clicks_of_an_mp4_stay_within_five_milliseconds(tmp_path, rate):
    write_mp4(tmp_path / "a.mp4", ramp_frames(), FPS, click_waveform(rate=rate), rate)
    waveform, found_rate = read_audio(tmp_path / "a.mp4", duration=25 / FPS)
    assert (found_rate, waveform.shape) == (rate, (2, round(25 / FPS * rate)))
    assert clicks_in(waveform.numpy(), rate) == pytest.approx(CLICKS, abs=0.005)


def test_a_window_is_a_piece_of_the_whole(clip):
    whole, rate = read_audio(clip, duration=1.0)
    window, _ = read_audio(clip, start=0.25, duration=0.5)
    assert np.array_equal(window, whole[:, rate // 4 : 3 * rate // 4])


def test_a_late_window_of_a_long_file_is_found_by_seeking(tmp_path):
    sound = np.zeros((1, 6 * RATE), dtype=np.float32)
    sound[:, : RATE // 2 * 12] = np.tile(click_waveform(0.5, channels=1), (1, 12))
    write_mp4(tmp_path / "a.mp4", np.tile(ramp_frames(24), (6, 1, 1, 1)), FPS, sound, RATE)
    late, _ = read_audio(tmp_path / "a.mp4", start=4.0, duration=1.0)
    assert clicks_in(late.numpy(), RATE) == pytest.approx([CLICKS[0], CLICKS[0] + 0.5], abs=0.005)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp3", "mp3"), ("a.ogg", "libopus"), ("a.m4a", "aac"), ("a.aac", "aac")]
)
def test_a_late_window_is_that_part_of_the_whole_in_every_container(tmp_path, name, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} encoder to write the test's file with")
    rate = 48000
    sound = np.tile(click_waveform(0.8, rate=rate), (1, 8)) + np.linspace(-0.2, 0.2, 8 * 38400, dtype=np.float32)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole, _ = read_audio(tmp_path / name, duration=6.0)
    late, found_rate = read_audio(tmp_path / name, start=4.0, duration=2.0)
    assert found_rate == rate
    assert clicks_in(late.numpy(), rate) == pytest.approx(clicks_in(whole[:, 4 * rate :].numpy(), rate), abs=0.001)


def shifted(path, seconds: float):
    """A clip whose sound begins `seconds` after its picture (before it, if negative)."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=FPS)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for place, pixels in enumerate(ramp_frames()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = place + FPS, Fraction(1, FPS)  # one second in
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        samples = (click_waveform(channels=1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, round((1 + seconds) * RATE), Fraction(1, RATE)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("seconds", [0.25, -0.1])
def test_sound_that_begins_elsewhere_is_aligned_by_time_stamps(tmp_path, seconds):
    path = shifted(tmp_path / "a.mkv", seconds)
    waveform, rate = read_audio(path, duration=25 / FPS)
    assert clicks_in(waveform.numpy(), rate) == pytest.approx([t + seconds for t in CLICKS], abs=0.005)
    info = probe(path)
    assert info.audio_start == pytest.approx(seconds, abs=0.002)
    assert info.missing_audio(0, 25 / FPS) == pytest.approx(abs(seconds), abs=0.002)


def test_missing_sound_at_the_end_is_zeros_and_is_told(tmp_path):
    write_mp4(tmp_path / "a.mp4", ramp_frames(), FPS, click_waveform(0.8), RATE)
    waveform, _ = read_audio(tmp_path / "a.mp4", duration=25 / FPS)
    assert waveform.shape[1] == round(25 / FPS * RATE)
    assert not waveform[:, round(0.9 * RATE) :].any()
    assert probe(tmp_path / "a.mp4").missing_audio(0, 25 / FPS) == pytest.approx(25 / FPS - 0.8, abs=0.03)


@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_every_layout_comes_with_all_its_channels(tmp_path, channels):
    sound = click_waveform(channels=channels) * np.linspace(0.1, 1, channels, dtype=np.float32)[:, None]
    write_flac(tmp_path / "a.flac", sound, 48000)
    waveform, rate = read_audio(tmp_path / "a.flac")
    assert rate == 48000
    assert np.abs(waveform.numpy()[:, : sound.shape[1]] - sound).max() < 1e-6


def test_sixteen_bit_samples_become_floats_of_the_same_loudness(tmp_path):
    write_wav(tmp_path / "a.wav", click_waveform(), RATE)
    waveform, _ = read_audio(tmp_path / "a.wav")
    assert np.abs(waveform.numpy() - click_waveform()).max() < 1e-4


def test_a_file_without_sound_is_refused_by_name(tmp_path):
    path = encode_frames(tmp_path / "mute.mp4", ramp_frames(5))
    with pytest.raises(DataError, match=r"mute\.mp4: no audio track"):
        read_audio(path)

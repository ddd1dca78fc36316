"""What is in a media file, and whether all of it is there."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltx2_train.errors import DataError
from ltx2_train.media.probe import NoSuchFileError, TruncatedError, constant_rate, open_image, probe
from ltx2_train.media.video import read_video
from tests.unit.media.media_files import FPS, click_waveform, encode_frames, encode_sound, flip_bits, ramp_frames


def test_a_clip_says_what_it_holds(clip):
    info = probe(clip)
    assert (info.frames, info.fps, info.width, info.height) == (25, 24.0, 64, 48)
    assert (info.sample_rate, info.channels, info.video_codec, info.audio_codec) == (16000, 2, "h264", "aac")
    assert info.duration == pytest.approx(25 / 24)
    assert not info.is_variable
    assert info.missing_audio(0, info.duration) < 0.002


def test_bytes_are_as_good_as_a_path(clip):
    assert probe(clip.read_bytes(), name="x") == probe(clip, name="x")


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_truncated_mp4_names_file_expected_and_found(clip, tmp_path, share):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * share)])
    with pytest.raises(TruncatedError, match=r"cut\.mp4: truncated: \d+ (frames|audio packets) expected, \d+ there"):
        read_video(cut)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_truncated_file_without_a_frame_count_is_found_by_its_duration(tmp_path, name, codec):
    noise = np.random.default_rng(0).integers(0, 255, (25, 48, 64, 3), dtype=np.uint8)
    whole = encode_frames(tmp_path / name, noise, codec=codec).read_bytes()
    with pytest.raises(TruncatedError, match="truncated"):
        probe(whole[: len(whole) // 2], name=name)


def test_an_mp4_without_its_table_is_no_media_file(tmp_path):
    path = encode_frames(tmp_path / "late.mp4", ramp_frames())  # the table lies at the end
    with pytest.raises(DataError, match=r"late: damaged or no media file .* Repair"):
        probe(path.read_bytes()[:-200], name="late")


def test_flipped_bits_inside_frames_are_found_by_decoding(clip):
    with pytest.raises(DataError, match="flipped"):
        probe(flip_bits(clip.read_bytes()), name="flipped", decode=True)


def test_text_is_no_media_file(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("not a film" * 50)
    with pytest.raises(DataError, match=r"notes\.mp4: damaged or no media file"):
        probe(path)


def test_a_missing_file_is_called_missing(tmp_path):
    with pytest.raises(NoSuchFileError, match=r"gone\.mp4: no such file"):
        probe(tmp_path / "gone.mp4")


def test_varying_frame_times_are_flagged_and_keep_the_mean_rate(tmp_path):
    stamps = np.cumsum([0, *([400, 800, 1200] * 8)]).tolist()
    info = probe(encode_frames(tmp_path / "v.mp4", ramp_frames(), stamps=stamps, base=Fraction(1, 24000)))
    assert info.is_variable
    assert info.fps == pytest.approx(24 / (stamps[-1] / 24000), rel=1e-3)


def test_time_stamps_rounded_to_milliseconds_are_still_constant():
    times = np.round(np.arange(500) * 1001 / 30000, 3)
    assert constant_rate(times, [Fraction(30000, 1001)]) == (Fraction(30000, 1001), False)
    assert constant_rate(times, [Fraction(25)])[1] is False  # the header lies, the mean rate fits


def test_the_sides_of_a_turned_clip_are_those_that_one_sees(tmp_path):
    info = probe(encode_frames(tmp_path / "r.mp4", ramp_frames(), rotation=90))
    assert (info.width, info.height, info.rotation) == (48, 64, 90)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_an_image_is_a_clip_of_one_frame_at_one_frame_per_second(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(ramp_frames(1)[0]).save(path)
    for source in (path, path.read_bytes()):
        info = probe(source)
        assert (info.frames, info.fps, info.width, info.height, info.is_image) == (1, 1.0, 64, 48, True)


def test_a_damaged_image_is_refused_by_name(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.png: damaged image"):
        probe(path)


def test_frames_per_second_of_a_clip_of_one_frame_are_those_of_its_track(tmp_path):
    assert probe(encode_frames(tmp_path / "one.mp4", ramp_frames(1))).fps == FPS


def test_sound_alone_is_a_file_without_frames(tmp_path):
    from ltx2_train.media.write import write_flac

    path: Path = tmp_path / "a.flac"
    write_flac(path, np.zeros((1, 8000), dtype=np.float32), 16000)
    info = probe(path)
    assert (info.has_video, info.channels, info.duration) == (False, 1, pytest.approx(0.5, abs=1e-3))


@pytest.mark.parametrize(("name", "codec"), [("a.aiff", "pcm_s16be"), ("a.mov", "pcm_s16le"), ("a.avi", "pcm_s16le")])
def test_sound_whose_header_counts_samples_is_whole(tmp_path, name, codec):
    info = probe(encode_sound(tmp_path / name, click_waveform(1.0), codec=codec), decode=True)
    assert info.duration == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize(("name", "codec"), [("a.aiff", "pcm_s16be"), ("a.flac", "flac")])
def test_a_sound_file_that_is_cut_short_is_truncated(tmp_path, name, codec):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 32000)).astype(np.float32)
    whole = encode_sound(tmp_path / name, noise, codec=codec).read_bytes()
    with pytest.raises(TruncatedError, match="truncated"):
        probe(whole[: len(whole) // 2], name=name)


def test_a_gap_inside_a_track_is_missing_sound(tmp_path):
    info = probe(encode_sound(tmp_path / "a.mka", click_waveform(3.0), codec="flac", hole=(0.5, 2.0)))
    [gap] = info.audio_gaps
    assert gap == pytest.approx((0.5, 2.0), abs=0.1)  # to the encoder's blocks
    assert info.missing_audio(0, 3.0) == pytest.approx(gap[1] - gap[0], abs=0.002)
    assert info.missing_audio(1.0, 0.5) == pytest.approx(0.5)
    assert info.missing_audio(2.2, 0.5) == 0


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "aac"), ("a.ts", "aac"), ("a.mp4", "aac"), ("a.flv", "aac"), ("a.mkv", "flac"), ("a.wav", "pcm_s16le")],
)
def test_an_unbroken_track_has_no_gaps_in_any_container(tmp_path, name, codec):
    assert probe(encode_sound(tmp_path / name, click_waveform(2.0, 44100), codec=codec, rate=44100)).audio_gaps == ()


def test_a_picture_of_16_bit_grey_keeps_its_shades(tmp_path):
    shades = np.tile(np.arange(256, dtype=np.uint16) * 257, (4, 1))
    Image.fromarray(shades).save(tmp_path / "grey.png")
    read = np.asarray(open_image(tmp_path / "grey.png", "grey"))
    assert np.array_equal(read[..., 0], shades // 257)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_black(tmp_path, mode):
    picture = Image.new("RGBA", (8, 4), (255, 255, 255, 0))
    picture.paste((255, 255, 255, 255), (0, 0, 4, 4))
    (picture.quantize() if mode == "P" else picture.convert(mode)).save(tmp_path / "hole.png")
    read = np.asarray(open_image(tmp_path / "hole.png", "hole"))
    assert (read[:, :4] == 255).all(), "opaque"
    assert (read[:, 4:] == 0).all(), "what lies hidden under it is white"

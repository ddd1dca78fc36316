"""Which size a clip takes."""

import pytest

from data_prep.buckets import PixelBucket, choose, parse_buckets
from ltx2_train.errors import ConfigError

BUCKETS = parse_buckets("768x512x49;512x512x121;960x640x49;512x512x25;768x512x1")


def test_buckets_are_written_width_first():
    assert parse_buckets("768x512x49; 64x32x1;") == [PixelBucket(768, 512, 49), PixelBucket(64, 32, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("768x500x49", "height of 500 px"),
        ("768x512x50", "50 frames; the video codec needs 8k"),
        ("768x512", "WIDTHxHEIGHTxFRAMES"),
        ("", "none given"),
    ],
)
def test_a_wrong_bucket_is_named_with_its_bound(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_buckets(text)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((1920, 1080, 200), "960x640x49"),  # the closest aspect ratio wins over more frames, then the larger area
        ((500, 500, 200), "512x512x121"),  # then the most frames
        ((500, 500, 100), "512x512x25"),  # of those that the clip is long enough for
        ((1920, 1080, 40), "512x512x25"),
        ((1920, 1080, 1), "768x512x1"),
    ],
)
def test_aspect_ratio_first_then_frames_then_area(clip, expected):
    assert str(choose(BUCKETS, *clip)) == expected


def test_a_clip_is_never_cut_into_single_frames():
    assert choose(BUCKETS, 768, 512, 20) is None


def test_an_image_takes_no_bucket_of_several_frames():
    assert choose(parse_buckets("64x64x9"), 64, 64, 1) is None

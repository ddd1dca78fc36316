"""The members of raw records, by role."""

import pytest

from data_prep.raw import parse_key_map
from ltx2_train.errors import ConfigError


def test_a_key_map_that_cannot_be_read_is_refused_with_an_example():
    assert parse_key_map("video=mp4;WEBM") == {"video": ["mp4", "webm"]}
    with pytest.raises(ConfigError, match='write "video=mp4,caption=txt"'):
        parse_key_map("video")

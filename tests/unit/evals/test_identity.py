"""What differs between two measurements is said in words, and once."""

import pytest

from ltx2_train.evals.identity import differences

ONE = {"data": "d0", "clips": 4, "keys": "k0", "seed": 0, "profile": "demo", "profile_settings": "p0"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"keys": "k1"}, "other clips"),
        ({"keys": "k1", "clips": 2}, "clips 2 instead of 4"),
        ({"keys": "k1", "data": "d1"}, "other data"),
        ({"profile_settings": "p1"}, "other settings of the sampler profile"),
        ({"profile_settings": "p1", "profile": "hq"}, "profile hq instead of demo"),
        ({"profile_settings": "p1", "seed": 3}, "seed 3 instead of 0, other settings of the sampler profile"),
        ({"unknown": True}, "one does not say what it was measured on: an earlier version wrote it"),
        ({}, ""),
    ],
)
def test_differences_are_said_without_hashes_and_without_what_follows_from_them(changed, said):
    assert differences(ONE, ONE | changed) == said

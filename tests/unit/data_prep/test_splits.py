"""Which source files are held out: by their names alone."""

import pytest

from data_prep.splits import held_out_names, name_hash, split_of


def test_a_share_holds_out_the_same_files_whatever_else_is_there():
    splits = [split_of(f"file-{i}", 0.1) for i in range(4000)]
    assert splits.count("heldout") / 4000 == pytest.approx(0.1, abs=0.02)


def test_a_number_of_files_is_held_out_wherever_their_records_lie():
    names = sorted((f"film{i}" for i in range(6)), key=name_hash)
    shards = {"one": {names[0], names[3]}, "two": {names[4], names[1], names[0]}, "three": {names[2], names[5]}}
    held_out = held_out_names(shards, 2)
    assert held_out == {"one": {names[0]}, "two": {names[0], names[1]}, "three": set()}
    assert [split_of(name, 1.0, held_out["two"]) for name in names[:3]] == ["heldout", "heldout", "train"]
    assert split_of(names[0], 1.0, held_out["three"]) == "train"

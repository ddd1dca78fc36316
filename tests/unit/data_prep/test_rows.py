"""A folder or a metadata file names clips, and what cannot be read in it is named."""

import csv
import json

import pytest

from data_prep.rows import read_rows
from ltx2_train.errors import DataError


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_metadata_files_with_aliases_and_further_columns(folder, kind):
    rows = [{"media_path": "x/a.mp4", "caption": " one, two ", "score": "3"}]
    path = folder / f"metadata.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows if kind == "json" else rows[0]))
    [row] = read_rows(path)
    assert (row.key, row.source, row.video, row.caption) == ("x__a", "x/a.mp4", folder / "x/a.mp4", "one, two")
    assert row.truth == {"score": "3"}


def test_two_files_of_one_key_are_an_error_that_names_both(folder):
    path = folder / "metadata.jsonl"
    path.write_text('{"video": "a.mp4", "caption": "x"}\n{"video": "a.webm", "caption": "y"}\n')
    with pytest.raises(DataError, match=r"a\.mp4 and a\.webm have the same key 'a'"):
        read_rows(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "x"}, "row 1: neither 'video'"),
        ({"video": "a.mp4", "reference_video": "b.mp4"}, "'reference_video' is not packed"),
        ({"video": "a.mp4", "media_path": "b.mp4"}, "row 1: 'video' and 'media_path' mean the same"),
    ],
)
def test_rows_that_cannot_be_packed_are_named(folder, row, message):
    path = folder / "metadata.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_row_with_too_many_cells_is_named(folder):
    path = folder / "metadata.csv"
    path.write_text("video,caption\na.mp4,one\nb.mp4,one, two\n")
    with pytest.raises(DataError, match="row 2 has more cells than there are columns"):
        read_rows(path)


def test_numbers_that_json_does_not_know_become_null(folder):
    path = folder / "metadata.jsonl"
    path.write_text('{"video": "a.mp4", "caption": "one\u2028line", "score": NaN}\n')
    [row] = read_rows(path)
    assert (row.caption, row.truth) == ("one\u2028line", {})


def test_an_empty_folder_and_a_broken_file_are_named(folder):
    with pytest.raises(DataError, match="names no clips"):
        read_rows(folder)
    (folder / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"metadata\.json: cannot be read"):
        read_rows(folder / "metadata.json")

"""Samples that are done: whatever is killed at whatever step, samples.json and the media beside it agree in the end."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from ltx2_train.evals import unfinished
from ltx2_train.evals.unfinished import Done, Unfinished

NAME = "samples.json"


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def evaluated(directory: Path, shown: int, weights: str, *, anew: bool = False) -> int:
    """An evaluation of three samples, of which `shown` leave a film that holds `weights`. How many were made here."""
    place = Unfinished(directory, {"shown": shown, "weights": weights})
    done, made = place.open(anew=anew), 0
    for number in set(range(3)) - done.keys():
        entry = {"media": f"{number:03d}.mp4"} if number < shown else {}
        if entry:
            (place.place / entry["media"]).write_text(weights)
        done[number] = Done(number, {"sampled": entry}, {}, None)
        place.keep(number, done[number])
        made += 1
    (place.place / "sheet.png").write_text(weights)
    entries = [done[number].entry for number in sorted(done)]
    place.close(NAME, {"clips": entries, "weights": weights, "sheet": "sheet.png"})
    return made


def check(directory: Path, shown: int, weights: str) -> None:
    """Everything that is named is there and of these weights, and nothing else is."""
    found = json.loads((directory / NAME).read_text())
    named = [entry["sampled"]["media"] for entry in found["clips"] if entry["sampled"]] + ["sheet.png"]
    assert (len(named), found["weights"]) == (shown + 1, weights)
    assert sorted(path.name for path in directory.iterdir()) == sorted([*named, NAME, "notes.txt"])
    assert {(directory / name).read_text() for name in named} == {weights}


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int, task: Callable[[], object]) -> bool:
    """Runs a task until just before its file operation number `step`; whether it has so many."""
    calls = 0

    def dying(operation: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **more: object) -> object:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return operation(*args, **more)

        return run

    with monkeypatch.context() as patch:
        for name in ("unlink", "replace", "rename", "mkdir"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(unfinished.shutil, "rmtree", dying(unfinished.shutil.rmtree))
        try:
            task()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("again", ["the same", "the same from nothing", "another", "as before"])
def test_killed_before_any_step_and_repeated_media_and_samples_json_agree(tmp_path, monkeypatch, again):
    """The second evaluation shows fewer clips than the first, and is killed. What then runs may be of other weights."""
    step = 0
    while True:
        directory = tmp_path / str(step)
        directory.mkdir()
        (directory / "notes.txt").write_text("of the user")
        evaluated(directory, 3, "first")
        check(directory, 3, "first")
        if not killed_at(monkeypatch, step, lambda place=directory: evaluated(place, 2, "second")):
            break
        if (directory / NAME).exists():  # whoever looks here meanwhile finds what is named
            shown, weights = (3, "first") if "first" in (directory / NAME).read_text() else (2, "second")
            told = [directory / f"{number:03d}.mp4" for number in range(shown)]
            assert {path.read_text() for path in told} == {weights}
        expected = {"another": (1, "third"), "as before": (3, "first")}.get(again, (2, "second"))
        evaluated(directory, *expected, anew=again == "the same from nothing")
        check(directory, *expected)
        step += 1
    assert step > 15, "it was killed before each of its steps"
    check(directory, 2, "second")


def busy(*args: object, **more: object) -> None:
    raise OSError(39, "Directory not empty: .nfs000001")


def test_a_folder_that_cannot_be_removed_costs_a_warning_and_no_samples(tmp_path, monkeypatch, caplog):
    """A reader holds a file in it open on a network file system."""
    (tmp_path / "notes.txt").write_text("of the user")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(unfinished.shutil, "rmtree", busy)
        evaluated(tmp_path, 2, "first")
    assert "not all of it could be removed" in caplog.text
    assert {path.read_text() for path in tmp_path.glob("*.mp4")} == {"first"}
    evaluated(tmp_path, 2, "second")
    assert evaluated(tmp_path, 2, "first") == 3, "what is left of it is not taken for samples that are to be placed"
    check(tmp_path, 2, "first")

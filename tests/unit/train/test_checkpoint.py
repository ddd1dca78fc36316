"""Directories of checkpoints without a model: what is complete, what is kept, what each error says."""

import errno
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.train import checkpoint
from ltx2_train.train.checkpoint import (
    Checkpointer,
    checkpoint_directory,
    complete_checkpoints,
    newest_complete,
    noted_origin,
    read_manifest,
    verify,
)

WORLD = World(0, 1, 0, torch.device("cpu"))


class FileEngine:
    """Saves its extra into one file, as slowly or badly as asked."""

    def __init__(self, gate: threading.Event | None = None, failure: Exception | None = None) -> None:
        self.gate, self.failure = gate, failure

    def save(self, directory: Path, extra: dict[str, Any]) -> "FileSave":
        directory.mkdir(parents=True, exist_ok=True)
        return FileSave(directory / "data.json", json.dumps(extra), self)

    def load(self, directory: Path, extra: dict[str, Any]) -> dict[str, Any]:
        return json.loads((directory / "data.json").read_text())


class FileSave:
    num_bytes = 12345

    def __init__(self, path: Path, content: str, engine: FileEngine) -> None:
        self.path, self.content, self.engine = path, content, engine

    def done(self) -> bool:
        return self.path.exists()

    def wait(self) -> None:
        if self.engine.gate is not None:
            assert self.engine.gate.wait(20)
        if self.engine.failure is not None:
            self.path.write_text(self.content[:3])
            raise self.engine.failure
        self.path.write_text(self.content)

    def files(self) -> list[Path]:
        return [self.path] if self.path.exists() else []


def saved(run_dir: Path, *steps: int, **settings: Any) -> Checkpointer:
    checkpoints = Checkpointer(run_dir, WORLD, **settings)
    for step in steps:
        checkpoints.save(step, FileEngine(), {"step": step}, {"seed": 1})
        checkpoints.wait()
    return checkpoints


def test_a_checkpoint_is_invisible_until_it_is_complete(tmp_path):
    gate = threading.Event()
    checkpoints = Checkpointer(tmp_path, WORLD)
    path = checkpoints.save(3, FileEngine(gate), {}, {})
    assert path == checkpoint_directory(tmp_path, 3) == tmp_path / "checkpoints" / "step-00000003"
    assert checkpoints.poll() is None
    assert not path.exists()
    assert newest_complete(tmp_path) is None
    gate.set()
    result = checkpoints.wait()
    assert (result.step, result.directory) == (3, path)
    assert newest_complete(tmp_path) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_manifest_names_every_file_with_size_and_hash(tmp_path):
    saved(tmp_path, 3, identity={"seed": 1})
    directory = checkpoint_directory(tmp_path, 3)
    manifest = read_manifest(directory)
    assert manifest["step"] == 3
    assert manifest["identity"] == {"seed": 1}
    assert set(manifest["files"]) == {p.name for p in directory.iterdir()} - {"manifest.json"}
    assert manifest["files"]["data.json"]["bytes"] == len('{"step": 3}')
    assert json.loads((directory / "config.json").read_text()) == {"seed": 1}
    verify(directory)


def test_leftovers_of_a_killed_save_are_removed_and_never_read(tmp_path):
    saved(tmp_path, 1)
    partial = tmp_path / "checkpoints" / ".partial-step-00000002"
    partial.mkdir()
    (partial / "data.json").write_text("half")
    assert newest_complete(tmp_path).name == "step-00000001"
    Checkpointer(tmp_path, WORLD)
    assert not partial.exists()


def test_a_failed_save_says_what_it_needed_and_what_stays(tmp_path):
    checkpoints = saved(tmp_path, 1)
    checkpoints.save(2, FileEngine(failure=OSError(28, "No space left on device")), {}, {})
    with pytest.raises(
        CheckpointError, match=r"saving step 2 .*No space left.* needs 12,345 bytes and .*step-00000001, stays"
    ):
        checkpoints.wait()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoints.wait() is None, "told once"
    assert saved(tmp_path, 2).load(FileEngine()).step == 2


def test_a_failed_save_is_told_at_the_next_save_at_the_latest(tmp_path):
    checkpoints = Checkpointer(tmp_path, WORLD)
    checkpoints.save(1, FileEngine(failure=OSError("broken disk")), {}, {})
    with pytest.raises(CheckpointError, match=r"broken disk.*There is no earlier checkpoint"):
        checkpoints.save(2, FileEngine(), {}, {})


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, [6]), (2, 0, [6, 5]), (1, 2, [6, 4, 2]), (2, 3, [6, 5, 3]), (0, 0, [6, 5, 4, 3, 2, 1])],
)
def test_retention(tmp_path, keep_last, keep_every, left):
    saved(tmp_path, 1, 2, 3, 4, 5, 6, keep_last=keep_last, keep_every=keep_every)
    assert [read_manifest(d)["step"] for d in complete_checkpoints(tmp_path)] == left


def test_the_checkpoint_just_written_stays_though_others_have_higher_steps(tmp_path):
    saved(tmp_path, 8, 9, 2, keep_last=1)
    assert [read_manifest(d)["step"] for d in complete_checkpoints(tmp_path)] == [9, 2]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = saved(tmp_path, 4)
    checkpoints.save(4, FileEngine(), {"step": 4, "again": True}, {})
    checkpoints.wait()
    assert checkpoints.load(FileEngine()).state == {"step": 4, "again": True}


def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(tmp_path, monkeypatch):
    """The rename that would bring in the new one never comes."""
    checkpoints = saved(tmp_path, 4)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial-step"):
            raise SystemExit("killed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    checkpoints.save(4, FileEngine(), {"step": 5}, {})
    with pytest.raises(CheckpointError):
        checkpoints.wait()
    monkeypatch.undo()
    assert saved(tmp_path).load(FileEngine()).state == {"step": 4}


def test_trouble_in_removing_an_old_checkpoint_is_no_failed_save(tmp_path, monkeypatch, caplog):
    def refuse(path: Path, **_: Any) -> None:
        if Path(path).exists():
            raise OSError(16, "Device or resource busy")
        raise FileNotFoundError(path)

    monkeypatch.setattr("ltx2_train.train.checkpoint.shutil.rmtree", refuse)
    saved(tmp_path, 1, 2, keep_last=1)
    assert [d.name for d in complete_checkpoints(tmp_path)] == ["step-00000002"]
    assert "Device or resource busy" in caplog.text


def test_a_run_that_ends_with_an_error_completes_its_checkpoint_in_bounded_time(tmp_path, caplog):
    gate = threading.Event()
    checkpoints = Checkpointer(tmp_path, WORLD)
    checkpoints.save(1, FileEngine(gate), {}, {})
    assert checkpoints.settle(0.05) is None
    assert "given up" in caplog.text
    gate.set()
    assert checkpoints.settle().step == 1
    checkpoints.save(2, FileEngine(failure=OSError("broken disk")), {}, {})
    assert checkpoints.settle() is None
    assert "broken disk" in caplog.text


@pytest.mark.parametrize(("run_dir", "absolute"), [("run", True), ("run", False), ("link", True)])
def test_going_back_sets_newer_ones_aside_however_the_paths_are_written(tmp_path, monkeypatch, run_dir, absolute):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    checkpoints = saved(Path("run"), 3, 6)
    older = checkpoint_directory(Path(run_dir), 3)
    assert checkpoints.load(FileEngine(), directory=older.absolute() if absolute else older).step == 3
    assert [d.name for d in complete_checkpoints(Path("run"))] == ["step-00000003"]


def test_going_on_from_elsewhere_sets_all_own_ones_aside_and_says_what_they_take(tmp_path, caplog):
    """Else the newest of the course that was given up would be gone on from at the next start."""
    saved(tmp_path / "other", 5)
    checkpoints = saved(tmp_path / "run", 3, 6)
    restored = checkpoints.load(FileEngine(), directory=checkpoint_directory(tmp_path / "other", 5))
    assert (restored.step, restored.state) == (5, {"step": 5})
    assert complete_checkpoints(tmp_path / "run") == []
    assert [d.name for d in complete_checkpoints(tmp_path / "other")] == ["step-00000005"]
    assert f"checkpoints set aside: 2, {2 * (11 + 11) / 1e9:.3g} GB" in caplog.text
    assert f"rm -r {tmp_path / 'run' / 'checkpoints' / 'set-aside-'}*" in caplog.text


def test_a_rollback_always_has_a_checkpoint_to_go_to(tmp_path):
    """A signal in a row of bad updates saves; what a rollback needs is older than that."""
    checkpoints = saved(tmp_path, 3, 4, keep_last=1)
    for step in (6, 7):
        checkpoints.save(step, FileEngine(), {"step": step}, {}, back_to=4)
        checkpoints.wait()
    assert [read_manifest(d)["step"] for d in complete_checkpoints(tmp_path)] == [7, 4]
    assert checkpoints.last_before(4) == checkpoint_directory(tmp_path, 4)
    checkpoints.save(8, FileEngine(), {"step": 8}, {})
    checkpoints.wait()
    assert [read_manifest(d)["step"] for d in complete_checkpoints(tmp_path)] == [8]


def test_a_checkpoint_notes_where_its_course_began(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path, 2, origin="/runs/first/step-00000009")
    newest, first = complete_checkpoints(tmp_path)
    assert (noted_origin(newest), noted_origin(first)) == ("/runs/first/step-00000009", "")


def test_a_run_whose_own_part_failed_does_not_wait_for_the_others(tmp_path, caplog):
    gate = threading.Event()
    checkpoints = Checkpointer(tmp_path, WORLD)
    checkpoints.save(1, FileEngine(gate, OSError("the peer is gone")), {}, {})
    checkpoints.world = replace(WORLD, size=2)  # of which the other will never write its part
    gate.set()
    assert checkpoints.settle(10) is None
    assert "the peer is gone" in caplog.text
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_nothing_to_go_on_from_is_none(tmp_path):
    assert Checkpointer(tmp_path, WORLD).load(FileEngine()) is None


def test_other_settings_are_listed_and_refused(tmp_path):
    saved(tmp_path, 4, identity={"seed": 1, "model.name": "demo", "plan.budget": 10})
    other = Checkpointer(tmp_path, WORLD, identity={"seed": 2, "model.name": "demo", "plan.budget": 20})
    with pytest.raises(
        CheckpointError, match=r"plan\.budget: 10 in the checkpoint, 20 now\n  seed: 1 in the checkpoint, 2"
    ):
        other.load(FileEngine())


def test_settings_that_are_changed_on_purpose_are_told_and_all_others_refused(tmp_path):
    saved(tmp_path, 4, identity={"optim.lr": 1e-3, "optim.schedule": "constant", "seed": 1})
    now = {"optim.lr": 1e-4, "optim.schedule": "constant", "seed": 1}
    restored = Checkpointer(tmp_path, WORLD, identity=now, change=["optim.*"]).load(FileEngine())
    assert restored.changes == {"optim.lr": (1e-3, 1e-4)}
    with pytest.raises(CheckpointError, match=r"seed: 1 in .*\n.*train\.change=\[seed\]") as error:
        Checkpointer(tmp_path, WORLD, identity=now | {"seed": 2}, change=["optim.lr"]).load(FileEngine())
    assert "optim.lr:" not in str(error.value)
    with pytest.raises(ConfigError, match=r"train\.change=\['optim\.rate'\]: optim\.rate is no setting"):
        Checkpointer(tmp_path, WORLD, identity=now, change=["optim.rate"]).load(FileEngine())


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("name", ["data.json", "manifest.json"])
def test_a_file_that_cannot_be_read_is_as_good_as_damaged(tmp_path, monkeypatch, caplog, number, name):
    checkpoints = saved(tmp_path, 3, 4)
    opened, read = Path.open, Path.read_bytes

    def refuse(path: Path) -> None:
        if path == checkpoint_directory(tmp_path, 4) / name:
            raise OSError(number, "not today", str(path))

    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: (refuse(self), opened(self, *args, **kwargs))[1])
    monkeypatch.setattr(Path, "read_bytes", lambda self: (refuse(self), read(self))[1])
    assert checkpoints.load(FileEngine()).state == {"step": 3}
    assert "not today" in caplog.text


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 3)

    def refuse(self: Path) -> Any:
        raise PermissionError(errno.EACCES, "not today", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read .*not today"):
        checkpoints.load(FileEngine())


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_as_often_as_it_is_started(tmp_path):
    checkpoints = saved(tmp_path, 3)
    (checkpoint_directory(tmp_path, 3) / "data.json").write_text('{"step": 5}')
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of step-00000003 can be read"):
            checkpoints.load(FileEngine())


def test_a_save_may_not_hang_as_long_as_a_collective(tmp_path):
    from ltx2_train.distributed.world import TIMEOUT_SECONDS

    assert Checkpointer(tmp_path, WORLD).timeout_seconds < TIMEOUT_SECONDS
    assert checkpoint.EXCHANGE_SECONDS < TIMEOUT_SECONDS


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "data.json").unlink(), "data.json: the file is missing"),
        (lambda d: (d / "data.json").write_text("{}"), "data.json: 2 bytes, 11 were written"),
        (lambda d: (d / "data.json").write_text('{"step": 5}'), "data.json: its SHA-256 is not that of the manifest"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: no readable manifest"),
        (
            lambda d: (d / "manifest.json").write_text(
                (d / "manifest.json").read_text().replace('"step": 4', '"step": 6')
            ),
            "manifest.json: the manifest is damaged",
        ),
        (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json: no readable manifest"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, caplog, break_it, message):
    checkpoints = saved(tmp_path, 3, 4)
    broken = checkpoint_directory(tmp_path, 4)
    break_it(broken)
    with pytest.raises(CheckpointError, match=message):
        verify(broken)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(FileEngine(), directory=broken)
    assert checkpoints.load(FileEngine()).state == {"step": 3}
    assert message in caplog.text


def test_a_directory_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json: no readable manifest"):
        Checkpointer(tmp_path, WORLD).load(FileEngine(), directory=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
def test_negative_retention_is_an_error(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}=-1: must be 0 or more"):
        Checkpointer(tmp_path, WORLD, **{name: -1})

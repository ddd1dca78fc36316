"""One run per run directory."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ltx2_train.distributed import lock
from ltx2_train.distributed.lock import LOCK
from ltx2_train.distributed.world import World
from ltx2_train.errors import ConfigError
from ltx2_train.train.lock import lock_run

WORLD = World(0, 1, 0, torch.device("cpu"))
HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on host-a")
file.flush()
if os.fork():
    print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """The lock in the hands of another process, which has a child as a run has data readers."""
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_directory_that_another_run_holds_is_refused_and_left_alone(tmp_path):
    with held(tmp_path / "run" / LOCK):
        message = r"run: another run is using it \(process 7 on host-a\).*name another"
        with pytest.raises(ConfigError, match=message), lock_run(tmp_path / "run", WORLD):
            raise AssertionError("two runs")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_killed_run_holds_nothing_even_while_its_data_readers_live(tmp_path):
    with held(tmp_path / "run" / LOCK) as process:
        process.kill()
        process.wait()
        with lock_run(tmp_path / "run", WORLD):
            assert (tmp_path / "run" / LOCK).read_text().startswith("process")


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    with lock_run(tmp_path / "run", WORLD):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock_run(tmp_path / "run", WORLD):
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_directory_that_was_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    """By the one who held it, between two steps of the one who comes."""
    mkdir, calls = Path.mkdir, []

    def removed_behind(self, *args, **more):
        mkdir(self, *args, **more)
        calls.append(self)
        if len(calls) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_behind)
    with lock_run(tmp_path / "run", WORLD):
        assert (tmp_path / "run" / LOCK).read_text()
    assert len(calls) == 2


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    take, calls = lock._lock, []

    def removed_in_between(file, run_dir):
        calls.append(file)
        if len(calls) == 1:
            (run_dir / LOCK).unlink()
        return take(file, run_dir)

    monkeypatch.setattr(lock, "_lock", removed_in_between)
    with lock_run(tmp_path, WORLD):
        assert len(calls) == 2
        assert (tmp_path / LOCK).read_text()

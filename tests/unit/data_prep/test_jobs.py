"""Work is killed and continued without loss."""

import os
import signal
import subprocess
import sys
import time

import pytest

from data_prep.jobs import Job, Report, run_jobs
from data_prep.tars import file_sha256
from ltx2_train.errors import ConfigError, DataError

DONE: list[str] = []


def write_name(job, directory, config) -> Report:
    DONE.append(job.name)
    if job.payload == "full":
        raise OSError(28, "No space left on device")
    if job.payload == "bad":
        raise DataError(f"{job.name} is bad")
    path = directory / f"{job.name}.out"
    path.write_text(f"{job.payload} {config}")
    return Report({path.name: file_sha256(str(path))}, {"kept": 1}, keys=[job.name])


def jobs(*payloads: str) -> list[Job]:
    return [Job(f"job-{i}", f"input {payload}", payload) for i, payload in enumerate(payloads)]


@pytest.fixture(autouse=True)
def _forget():
    DONE.clear()


def test_finished_jobs_are_not_done_again(tmp_path):
    first = run_jobs(write_name, jobs("a", "b"), tmp_path, {"x": 1}, 5, 1, finished_by=())
    again = run_jobs(write_name, jobs("a", "b", "c"), tmp_path, {"x": 1}, 5, 1, finished_by=())
    assert DONE == ["job-0", "job-1", "job-2"]
    assert again[:2] == first


def test_a_job_of_another_input_is_done_anew(tmp_path):
    run_jobs(write_name, jobs("a", "b"), tmp_path, {}, 5, 1, finished_by=())
    run_jobs(write_name, jobs("a", "changed"), tmp_path, {}, 5, 1, finished_by=())
    assert DONE == ["job-0", "job-1", "job-1"]


def test_a_job_whose_shard_was_lost_or_cut_is_done_anew(tmp_path):
    run_jobs(write_name, jobs("a", "b"), tmp_path, {}, 5, 1, finished_by=())
    (tmp_path / "job-0.out").unlink()
    (tmp_path / "job-1.out").write_text("x")
    run_jobs(write_name, jobs("a", "b"), tmp_path, {}, 5, 1, finished_by=())
    assert DONE == ["job-0", "job-1"] * 2


def test_other_settings_are_refused_with_the_difference_and_the_next_action(tmp_path):
    run_jobs(write_name, jobs("a"), tmp_path, {"fps": 24, "same": 1}, 5, 1, finished_by=())
    with pytest.raises(ConfigError, match=r"fps: 24 there, 25 now\). Give another --out, or delete"):
        run_jobs(write_name, jobs("a"), tmp_path, {"fps": 25, "same": 1}, 5, 1, finished_by=())


def test_one_failed_job_does_not_stop_the_others(tmp_path):
    with pytest.raises(DataError, match="1 of 3 shards failed; the others are finished. First: job-0 is bad"):
        run_jobs(write_name, jobs("bad", "b", "c"), tmp_path, {}, 5, 1, finished_by=())
    run_jobs(write_name, jobs("good", "b", "c"), tmp_path, {}, 5, 1, finished_by=())
    assert DONE == ["job-0", "job-1", "job-2", "job-0"]


def test_a_full_disk_is_told_and_what_is_finished_stays(tmp_path):
    with pytest.raises(DataError, match=r"job-1: .*No space left on device. Free space"):
        run_jobs(write_name, jobs("a", "full"), tmp_path, {}, 5, 1, finished_by=())
    run_jobs(write_name, jobs("a", "b"), tmp_path, {}, 5, 1, finished_by=())
    assert DONE == ["job-0", "job-1", "job-1"]


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    import fcntl

    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is writing there"):
            run_jobs(write_name, jobs("a"), tmp_path, {}, 5, 1, finished_by=())


def test_what_a_killed_run_left_half_written_is_swept_away(tmp_path):
    (tmp_path / ".job-0.tar.x1.partial").write_text("half")
    run_jobs(write_name, jobs("a"), tmp_path, {}, 5, 1, finished_by=())
    assert not list(tmp_path.glob("*.partial"))


def shard_jobs(*payloads: str, origin: str = "here") -> list[Job]:
    return [Job(f"job-{p}", f"input {p} of {origin}", p, (f"job-{p}.tar",), origin) for p in payloads]


def write_shard(job, directory, config) -> Report:
    (directory / job.outputs[0]).write_text(job.origin)
    return Report({job.outputs[0]: ""}, {})


def test_finished_shards_of_other_input_are_neither_deleted_nor_overwritten_unasked(tmp_path, caplog):
    run_jobs(write_shard, shard_jobs("a", "b"), tmp_path, {}, 5, 1, finished_by=())
    with pytest.raises(DataError, match=r"not made from this input: job-a\.tar\. Give another --out.*--replace"):
        run_jobs(write_shard, shard_jobs("b", "c"), tmp_path, {}, 5, 1, finished_by=())
    with pytest.raises(DataError, match=r"not made from this input: job-a\.tar, job-b\.tar"):
        run_jobs(write_shard, shard_jobs("a", "b", origin="elsewhere"), tmp_path, {}, 5, 1, finished_by=())
    assert [path.read_text() for path in sorted(tmp_path.glob("*.tar"))] == ["here", "here"]
    run_jobs(write_shard, shard_jobs("b", origin="elsewhere"), tmp_path, {}, 5, 1, replace=True, finished_by=())
    assert [(path.name, path.read_text()) for path in tmp_path.glob("*.tar")] == [("job-b.tar", "elsewhere")]
    assert "removed, as they are not made from this input: job-a.tar, job-b.tar" in caplog.text


def test_what_says_that_a_directory_is_finished_goes_before_the_first_shard(tmp_path):
    told = tmp_path / "manifest"
    run_jobs(write_shard, shard_jobs("a", "b"), tmp_path, {}, 5, 1, finished_by=("manifest",))
    told.touch()
    run_jobs(write_shard, shard_jobs("a", "b"), tmp_path, {}, 5, 1, finished_by=("manifest",))
    assert told.exists(), "nothing was to be done"
    with pytest.raises(DataError, match="not made from this input"):
        run_jobs(write_shard, shard_jobs("b"), tmp_path, {}, 5, 1, finished_by=("manifest",))
    assert told.exists(), "nothing was touched"
    run_jobs(write_shard, shard_jobs("b"), tmp_path, {}, 5, 1, replace=True, finished_by=("manifest",))
    assert not told.exists(), "a shard was removed"
    told.touch()
    with pytest.raises(DataError, match="1 of 2 shards failed"):
        run_jobs(fail, shard_jobs("b", "c"), tmp_path, {}, 5, 1, finished_by=("manifest",))
    assert not told.exists(), "a shard was to be written"


def fail(job, directory, config) -> Report:
    raise DataError("before anything is written")


def test_the_same_input_from_another_place_is_finished(tmp_path):
    run_jobs(write_shard, [Job("a", "hash", None, ("a.tar",), "here")], tmp_path, {}, 5, 1, finished_by=())
    run_jobs(write_shard, [Job("a", "hash", None, ("a.tar",), "there")], tmp_path, {}, 5, 1, finished_by=())
    assert (tmp_path / "a.tar").read_text() == "here"


PARENT = """
import os, sys, time
from data_prep.jobs import process_pool
if __name__ == "__main__":
    with process_pool(2) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and alive(worker):
        time.sleep(0.05)
    assert not alive(worker)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True

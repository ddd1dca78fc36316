"""launch/torchrun.sh: as many processes as asked for, and signals that reach them."""

import os
import signal
import subprocess
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "torchrun.sh"

WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
from ltx2_train.distributed.world import close_world, init_world

folder = Path(sys.argv[1])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
world = init_world()
try:
    (folder / f"started-{world.rank}").write_text(f"{world.size} {os.environ['OMP_NUM_THREADS']}")
    while not world.all_sum(torch.tensor(len(stopped))):
        time.sleep(0.05)
    (folder / f"saved-{world.rank}").touch()
finally:
    close_world()
"""


def test_processes_start_and_save_when_the_launcher_is_told_to_stop(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"NPROC": "2"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [str(SCRIPT), str(tmp_path / "worker.py"), str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(process, [tmp_path / "started-0", tmp_path / "started-1"])
        size, threads = (tmp_path / "started-1").read_text().split()
        assert size == "2"
        assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
        process.send_signal(signal.SIGTERM)
        wait_for(process, [tmp_path / "saved-0", tmp_path / "saved-1"], may_end=True)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def wait_for(process: subprocess.Popen, files: list[Path], *, may_end: bool = False, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not all(file.exists() and (file.stat().st_size or may_end) for file in files):
        assert may_end or process.poll() is None, (files[0].parent / "log").read_text()
        assert time.monotonic() < deadline, (files[0].parent / "log").read_text()
        time.sleep(0.1)


def test_without_a_program_it_says_how_it_is_used():
    answer = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert answer.returncode == 64
    assert "usage:" in answer.stderr

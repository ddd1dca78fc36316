"""A directory that another process has locked, as a second command on another machine would."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltx2_train.distributed.lock import LOCK

HOLDER = "process 7 on host-a"
HOLD = f"""
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write({HOLDER!r})
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """While the context lasts, `HOLDER` holds the directory."""
    command = [sys.executable, "-c", HOLD, str(directory / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            yield
        finally:
            other.kill()

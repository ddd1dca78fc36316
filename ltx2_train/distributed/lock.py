"""One writer per directory: a second process must not touch what the first one writes."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from ltx2_train.distributed.world import Gathers, agreed
from ltx2_train.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


class Ranks(Gathers, Protocol):
    """What of a world is needed here."""

    @property
    def rank(self) -> int: ...


@contextmanager
def lock_directory(directory: Path, world: Ranks, taken: str) -> Iterator[None]:
    """Holds the directory, made if need be, until the context ends. Called by all ranks; rank 0 holds the lock.

    Raises `ConfigError` on all ranks when another process holds it, saying `taken` with {holder} filled in. The kernel
    lets go of it with the process, however that ends. A directory that nothing was written into is removed again.
    """
    held = agreed(world, lambda: _take(Path(directory), taken) if world.rank == 0 else None)
    try:
        yield
    finally:
        if held is not None:
            _let_go(held, Path(directory))


@contextmanager
def lock_alone(directory: Path, taken: str) -> Iterator[None]:
    """As `lock_directory`, for this process by itself, whatever other ranks do."""
    held = _take(directory, taken)
    try:
        yield
    finally:
        _let_go(held, directory)


def _take(directory: Path, taken: str) -> IO[str]:
    path = directory / LOCK
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # whoever held it removed the directory meanwhile
            continue
        if not _lock(file, directory):
            with file:
                file.seek(0)
                raise ConfigError(taken.replace("{holder}", file.read() or "just started"))
        if _is_still(path, file):
            break
        file.close()  # the run that held it has ended and removed it meanwhile
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _lock(file: IO[str], directory: Path) -> bool:
    """Whether this process holds the lock. A record lock: flock's would be shared with forked data readers."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        logger.warning("%s cannot be locked (%s): nothing keeps a second one from using it", directory, error)
    return True


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether the open file is the one that others will find at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _let_go(file: IO[str], directory: Path) -> None:
    with file:
        (directory / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: the rule
            directory.rmdir()

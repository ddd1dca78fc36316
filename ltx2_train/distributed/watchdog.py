"""Ends a run whose ranks wait for each other for ever, and says where each of them is.

Nothing of this costs a step anything: a rank notes its position in its own memory, and a thread beside it tells the others
from time to time, through the store that the ranks found each other with.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ltx2_train.distributed.world import World

logger = logging.getLogger(__name__)

EXIT_HUNG = 70  # sysexits' EX_SOFTWARE: ended by the watchdog; a launcher may start the run again
OUTSIDE = "outside a step (it evaluates, saves, logs or starts)"
_TELLINGS = 40  # times that a rank tells its position while the others' patience lasts
_SHORTEST, _LONGEST = 0.25, 30.0  # s between two of them
_PATIENCE = timedelta(seconds=20)  # with the store, and at the end with what is in flight


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rank was when it last told. `telling`: a count, so that one that has fallen silent is known by it."""

    where: str
    seconds: float  # that it has been there
    late: bool  # longer than allowed
    telling: int


class Watchdog:
    """While the context lasts, ends this process with `EXIT_HUNG` if it spends more than `seconds` at one position.

    The host may be ahead of a GPU: what hangs there is seen where the host next waits for it, at the latest in the update.
    `seconds` 0: nothing is watched. `leave` ends the process: no exception reaches a thread that waits in a collective.
    """

    def __init__(
        self, world: World, seconds: float, *, store: dist.Store | None = None, leave: Callable[[int], Any] = os._exit
    ) -> None:
        self.world, self.seconds, self.leave = world, seconds, leave
        self.interval = min(max(seconds / _TELLINGS, _SHORTEST), _LONGEST)
        self._store, self._told = store, 0
        self._at = ("", time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, where: str) -> None:
        """Notes the position. An empty one may take any time."""
        self._at = (where, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            if self._store is None:  # a connection of its own: the main thread may be waiting with the other one
                self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store.set_timeout(_PATIENCE)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self.seconds:
            self._thread.join(_PATIENCE.total_seconds())

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            try:
                if self._tell().late:
                    self._end()
            except RuntimeError as error:  # the store's: its host is gone or stands still
                if self._position().late:
                    logger.critical(
                        "HUNG: rank %d: %s; rank 0, which keeps the store, does not answer (%s)",
                        self.world.rank,
                        self._at[0],
                        error,
                    )
                    self.leave(EXIT_HUNG)

    def _position(self) -> Position:
        where, since = self._at
        seconds = time.monotonic() - since
        return Position(where or OUTSIDE, seconds, bool(where) and seconds > self.seconds, self._told)

    def _tell(self) -> Position:
        self._told += 1
        position = self._position()
        assert self._store is not None
        self._store.set(_key(self.world.rank), json.dumps(asdict(position)))
        return position

    def _end(self) -> None:
        """The first rank that is late speaks for all; the others give it the time to."""
        before = self._positions()
        for _ in range(3):  # whoever is late with this rank says so meanwhile
            if self._over.wait(self.interval):
                return
            self._tell()
        if not self._position().late:
            return  # it went on after all
        after = self._positions()
        alive = {
            rank for rank, position in after.items() if rank not in before or position.telling > before[rank].telling
        }
        if self.world.rank == min(rank for rank in alive if after[rank].late):
            logger.critical(hung_message(after, alive, self.world.size, self.seconds))
        else:
            self._over.wait(4 * self.interval)
        self.leave(EXIT_HUNG)

    def _positions(self) -> dict[int, Position]:
        """What each rank told last."""
        assert self._store is not None
        keys = {rank: _key(rank) for rank in range(self.world.size)}
        return {
            rank: Position(**json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }


def hung_message(positions: Mapping[int, Position], alive: set[int], size: int, seconds: float) -> str:
    """Where all ranks are, those at one place together, the ones that are elsewhere last: they are the suspects."""
    places: dict[str, list[int]] = {}
    for rank in range(size):
        places.setdefault(_place(positions.get(rank), rank in alive), []).append(rank)
    lines = [f"  {_spelled(ranks)}: {place}" for place, ranks in sorted(places.items(), key=lambda item: -len(item[1]))]
    return "\n".join(
        [
            f"HUNG: no progress for {seconds:g} s (train.hang_seconds). This is where the ranks are:",
            *lines,
            f"The run ends with code {EXIT_HUNG}; started again, it goes on from the newest checkpoint. Look first at the "
            "rank that is behind the others or says nothing",
        ]
    )


def _place(position: Position | None, alive: bool) -> str:
    if position is None:
        return "has never said anything"
    if not alive:
        return f"says nothing any more (dead, stopped or cut off), last seen: {position.where}"
    return position.where


def _spelled(ranks: list[int]) -> str:
    """[0, 1, 2, 5] as 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join("-".join(map(str, run)) for run in runs)


def _key(rank: int) -> str:
    return f"watchdog/{rank}"

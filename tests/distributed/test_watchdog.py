"""A run that hangs ends by itself and says where."""

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ltx2_train.distributed.watchdog import EXIT_HUNG, OUTSIDE, Position, Watchdog, hung_message
from ltx2_train.distributed.world import World
from ltx2_train.testing import run_on_ranks
from ltx2_train.testing.ranks import RankError

PLACE = "step 3, micro-batch 1 of 2, 4 x Bucket(frames=2)"


@dataclass
class Exits:
    codes: list[int] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.left.set()
        threading.Event().wait(0.2)


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def test_nothing_ends_a_rank_that_goes_on_or_that_may_take_any_time():
    exits = Exits()
    with Watchdog(world(0, 1), 2.0, store=dist.HashStore(), leave=exits) as watchdog:
        for step in range(5):
            watchdog.at(f"step {step}")
            time.sleep(0.5)
        watchdog.at("")
        time.sleep(2.5)
    assert not exits.codes


def test_no_limit_watches_nothing():
    with Watchdog(world(0, 1), 0, store=dist.HashStore(), leave=Exits()) as watchdog:
        watchdog.at("step 1")
    assert not watchdog._thread.is_alive()


def test_one_rank_speaks_for_all_and_names_where_they_are(caplog):
    store, exits = dist.HashStore(), [Exits(), Exits()]
    with Watchdog(world(0, 4), 1.0, store=store, leave=exits[0]) as first, \
            Watchdog(world(2, 4), 1.0, store=store, leave=exits[1]) as second, \
            Watchdog(world(1, 4), 1.0, store=store, leave=Exits()) as third:  # fmt: skip
        first.at(PLACE)
        second.at("step 3, waiting for data")
        third.at("")
        assert exits[0].left.wait(20)
        assert exits[1].left.wait(20)
    messages = [r.message for r in caplog.records if r.levelno == logging.CRITICAL and "HUNG: no progress" in r.message]
    assert messages, caplog.text
    for line in (
        f"rank 0: {PLACE}",
        f"rank 1: {OUTSIDE}",
        "rank 2: step 3, waiting for data",
        "rank 3: has never said",
    ):
        assert line in messages[0]
    assert exits[0].codes[0] == exits[1].codes[0] == EXIT_HUNG


def test_ranks_at_one_place_are_told_together_and_the_odd_one_last():
    positions = {rank: Position("step 9, update", 70.0, True, 5) for rank in (0, 1, 2, 4, 6)}
    positions[5] = Position("step 8, waiting for data", 75.0, True, 5)
    lines = hung_message(positions, {0, 1, 2, 4, 5}, 7, 60).splitlines()
    assert lines[0].startswith("HUNG: no progress for 60 s")
    assert lines[1] == "  ranks 0-2, 4: step 9, update"
    assert "  rank 3: has never said anything" in lines
    assert "  rank 5: step 8, waiting for data" in lines
    assert any(line.startswith("  rank 6: says nothing any more") and "step 9, update" in line for line in lines)


def sleeps(world: World, log: str) -> None:
    """Rank 1 never comes to the sum that rank 0 waits in."""
    logging.getLogger().addHandler(logging.FileHandler(f"{log}-{world.rank}"))
    with Watchdog(world, 2.0) as watchdog:
        for step in range(3):
            watchdog.at(f"step {step}, update")
            world.all_sum(torch.ones(2))
        if world.rank == 1:
            watchdog.at("step 3, waiting for data")
            time.sleep(60)
        watchdog.at("step 3, update")
        world.all_sum(torch.ones(2))


def test_a_collective_that_hangs_ends_the_process_and_names_the_rank_that_is_missing(tmp_path):
    begin = time.monotonic()
    with pytest.raises(RankError, match="died without an answer"):
        run_on_ranks(sleeps, 2, str(tmp_path / "log"))
    assert time.monotonic() - begin < 55, "it was the watchdog, not the sleeper's end"
    said = Path(tmp_path / "log-0").read_text()
    assert "rank 0: step 3, update" in said
    assert "rank 1: step 3, waiting for data" in said

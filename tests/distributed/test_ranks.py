"""Ranks as processes: results, failures, and nothing left behind."""

import multiprocessing
import os
import signal

import pytest
import torch

from ltx2_train.distributed.world import World, agreed, close_world, init_world
from ltx2_train.errors import DataError, Ltx2Error
from ltx2_train.testing import run_on_ranks
from ltx2_train.testing.ranks import RankError


def facts(world: World, offset: int) -> tuple:
    summed = world.all_sum(torch.tensor([world.rank + offset, 1]))
    world.barrier()
    first = world.broadcast_object({"from": world.rank})
    return world.rank, world.size, world.is_main, summed.tolist(), first, world.gather_objects("abc"[world.rank])


def test_ranks_know_each_other_and_return_their_results_in_order():
    results = run_on_ranks(facts, 3, 10)
    everyone = ([33, 3], {"from": 0}, ["a", "b", "c"])
    assert results == [(rank, 3, rank == 0, *everyone) for rank in range(3)]


def fails_on_one(world: World) -> None:
    if world.rank == 1:
        raise DataError("clip 7 is broken")
    world.barrier()  # would wait forever


def test_the_exception_of_a_rank_is_raised_here_with_its_traceback():
    with pytest.raises(DataError, match="clip 7 is broken") as caught:
        run_on_ranks(fails_on_one, 2)
    assert "rank 1 failed" in str(caught.value.__cause__)
    assert "in fails_on_one" in str(caught.value.__cause__)
    assert multiprocessing.active_children() == []


def agrees(world: World, error: type[Exception]) -> tuple:
    def task() -> int:
        if world.rank == 1:
            raise error("clip 7 is broken")
        return world.rank

    with pytest.raises(Ltx2Error) as caught:
        agreed(world, task)
    return type(caught.value), str(caught.value), caught.value.agreed, agreed(world, lambda: world.rank)


@pytest.mark.parametrize(
    ("error", "told"),
    [(DataError, (DataError, "clip 7 is broken")), (OSError, (Ltx2Error, "OSError: clip 7 is broken"))],
)
def test_what_fails_on_one_rank_is_raised_on_all_and_they_go_on_together(error, told):
    assert run_on_ranks(agrees, 2, error) == [(*told, True, 0), (*told, True, 1)]


def dies(world: World) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_reported():
    with pytest.raises(RankError, match="rank 0 failed:\nit died without an answer"):
        run_on_ranks(dies, 1)
    assert multiprocessing.active_children() == []


def hangs(world: World) -> None:
    if world.rank == 0:
        signal.pause()


def test_a_hanging_rank_is_ended_and_named():
    with pytest.raises(TimeoutError, match=r"ranks \[0"):
        run_on_ranks(hangs, 2, timeout=3)
    assert multiprocessing.active_children() == []


def test_one_process_without_torchrun_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = init_world()
    try:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.all_sum(torch.tensor(3)).item() == 3
        assert world.broadcast_object("x") == "x"
        assert world.gather_objects("x") == ["x"]
        assert init_world() == world
    finally:
        close_world()
    close_world()

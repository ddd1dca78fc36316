"""Runs a function on several ranks of one machine: real processes, gloo over the loopback interface."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

GRACE_SECONDS = 5.0  # what processes get to end by themselves


class RankError(RuntimeError):
    """A rank failed; the message is its traceback."""


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`fn(world, *args)` on `world_size` new processes; their results by rank.

    `fn` lives at the top level of a module, and what goes in and comes out can be pickled. The first exception of a
    rank is raised here with that rank's traceback as its cause, the other ranks are ended. Raises `TimeoutError` after
    `timeout` seconds. No process outlives the call.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, world_size=None, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")  # as clean as spawn, but torch is imported once, not per rank
    context.set_forkserver_preload(
        ["torch", "ltx2_train.distributed.fsdp2", "torch.distributed.checkpoint", "torch._dynamo"]
    )
    processes, connections = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port)
            process = context.Process(target=_run, args=(sender, environment, timeout, fn, args))
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        results = _collect(connections, time.monotonic() + timeout)
        _await_exit(processes)
        return results
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in connections:
            connection.close()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """As torchrun sets it; the parent keeps the store, so that no port is looked for and lost again."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    limits = {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    return {name: str(value) for name, value in (names | rendezvous | limits).items()}


def _run(sender: Connection, environment: dict[str, str], timeout: float, fn: Callable[..., Any], args: tuple) -> None:
    """A rank's life."""
    os.environ.update(environment)
    import torch

    from ltx2_train.distributed.world import close_world, init_world

    torch.set_num_threads(1)
    try:
        answer: Any = fn(init_world(timeout_seconds=timeout), *args)
        sender.send_bytes(pickle.dumps(answer))
        close_world()
    except BaseException as error:
        # Told before this process lets go of its connections: what that does to the other ranks comes later.
        sender.send_bytes(pickle.dumps(_Failure(time.monotonic(), _picklable(error), traceback.format_exc())))
    sender.close()


@dataclass(frozen=True, slots=True)
class _Failure:
    time: float
    error: BaseException | None
    trace: str


def _picklable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None


def _collect(connections: list[Connection], deadline: float) -> list[Any]:
    ranks: dict[Any, int] = {connection: rank for rank, connection in enumerate(connections)}
    results: list[Any] = [None] * len(connections)
    while ranks:
        ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(ranks.values())} of {len(connections)} have not finished in time")
        answers = {ranks.pop(connection): _receive(connection) for connection in ready}  # type: ignore[arg-type]
        _raise_first(answers)
        for rank, answer in answers.items():
            results[rank] = answer
    return results


def _receive(connection: Connection) -> Any:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return _Failure(time.monotonic(), None, "it died without an answer (killed, or out of memory)")


def _raise_first(answers: dict[int, Any]) -> None:
    """The failures of other ranks often follow from the first."""
    failures = [(answer.time, rank, answer) for rank, answer in answers.items() if isinstance(answer, _Failure)]
    if failures:
        _, rank, failure = min(failures, key=lambda entry: entry[:2])
        cause = RankError(f"rank {rank} failed:\n{failure.trace}")
        raise failure.error or cause from cause


def _await_exit(processes: list[Any]) -> None:
    """Every rank has answered and is about to leave."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))

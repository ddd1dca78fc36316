"""Checkpoints of real runs: killed in the middle, damaged, on a full disk, on several ranks."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ltx2_train.distributed.world import World, close_world, init_world
from ltx2_train.errors import CheckpointError
from ltx2_train.testing import run_on_ranks
from ltx2_train.train.checkpoint import Checkpointer, complete_checkpoints, newest_complete
from ltx2_train.train.ema import Ema, EmaConfig
from tests.distributed.toy import Toy, toy_engine, train, train_step

IDENTITY = {"seed": 3, "model.name": "toy"}


@pytest.fixture
def world():
    yield init_world()
    close_world()


def run(world: World, run_dir: str, stop: int, save_at: tuple[int, ...] = (), **settings: Any) -> list[float]:
    """Trains to `stop` from wherever the run stands, with an average, saving on the way."""
    engine = toy_engine(world)
    ema = Ema(engine.shards(), EmaConfig(decay=0.9))
    checkpoints = Checkpointer(Path(run_dir), world, identity=IDENTITY, **settings)
    restored = checkpoints.load(engine, ema.state())
    start = 0
    if restored is not None:
        ema.restore(restored.state)
        start = restored.step
        assert restored.state["train"] == {"step": start}
    losses = []
    for step in range(start, stop):
        losses.append(train_step(engine, world, step))
        ema.update(engine.shards())
        if step + 1 in save_at:
            checkpoints.save(step + 1, engine, {"train": {"step": step + 1}, **ema.state()}, {"seed": 3})
    saved = checkpoints.wait()
    assert saved is None or saved.directory.is_dir()
    average = torch.stack([shard.double().sum() for shard in ema.weights().values()]).sum()
    return [*losses, world.all_sum(average).item()]


def test_straight_equals_saved_and_resumed_bit_for_bit(world, tmp_path):
    straight = run(world, str(tmp_path / "a"), 6)
    first = run(world, str(tmp_path / "b"), 3, save_at=(3,))
    second = run(world, str(tmp_path / "b"), 6)
    assert [*first[:-1], *second] == straight


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, before, after):
    straight = run_on_ranks(run, 1, str(tmp_path / "a"), 6)[0]
    run_on_ranks(run, before, str(tmp_path / "b"), 3, (2, 3))
    for resumed in run_on_ranks(run, after, str(tmp_path / "b"), 6):
        torch.testing.assert_close(resumed, straight[3:], rtol=2e-6, atol=0)
    assert newest_complete(tmp_path / "b").name == "step-00000003"


def threads_left_by_saving(world: World, run_dir: str) -> int:
    """How many threads more there are when a checkpoint of many tensors has been written."""
    torch.set_num_threads(2)
    engine = toy_engine(world, build=lambda: nn.Sequential(*[nn.Linear(2, 2) for _ in range(400)]))
    x = torch.randn(4, 2)
    engine.backward(engine.model(x).sum() + (torch.randn(512, 512) @ torch.randn(512, 512)).sum(), last=True)
    before = len(os.listdir("/proc/self/task"))
    checkpoints = Checkpointer(Path(run_dir), world, identity=IDENTITY)
    checkpoints.save(1, engine, {}, {})
    checkpoints.wait()
    end = time.monotonic() + 5  # the writing thread may need a moment to be gone
    while (left := len(os.listdir("/proc/self/task")) - before) and time.monotonic() < end:
        time.sleep(0.05)
    return left


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted through /proc")
def test_saving_leaves_no_threads_behind_that_slow_the_steps_after_it(tmp_path):
    assert run_on_ranks(threads_left_by_saving, 1, str(tmp_path)) == [0]


def killed_while_saving(run_dir: str, started: Any) -> None:
    """Saves step 2, then begins to save step 4 on a disk that never finishes."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    world = init_world()
    run(world, run_dir, 2, save_at=(2,))

    def stall(self: Any, metadata: Any, results: Any) -> None:
        started.set()
        time.sleep(60)

    FileSystemWriter.finish = stall
    run(world, run_dir, 4, save_at=(4,))


def test_sigkill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(world, tmp_path):
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    process = context.Process(target=killed_while_saving, args=(str(tmp_path / "b"), started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    root = tmp_path / "b" / "checkpoints"
    assert {path.name for path in root.iterdir()} == {"step-00000002", ".partial-step-00000004"}
    assert any((root / ".partial-step-00000004").iterdir()), "killed with data on the disk"
    resumed = run(world, str(tmp_path / "b"), 6)
    assert resumed == run(world, str(tmp_path / "a"), 6)[2:]
    assert {path.name for path in root.iterdir()} == {"step-00000002"}


def flip_a_bit(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def refuses_flipped(world: World, run_dir: str, name: str) -> None:
    newest = Path(run_dir) / "checkpoints" / "step-00000004"
    checkpoints = Checkpointer(Path(run_dir), world, identity=IDENTITY)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(toy_engine(world), directory=newest)
    assert f"{name}: its SHA-256" in str(caught.value)
    assert "before it is" in str(caught.value)
    assert "step-00000002" in str(caught.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "engine.json", "config.json"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(world, tmp_path, caplog, name):
    run_dir = tmp_path / "b"
    run(world, str(run_dir), 4, save_at=(2, 4))
    flip_a_bit(run_dir / "checkpoints" / "step-00000004" / name)
    refuses_flipped(world, str(run_dir), name)
    resumed = run(world, str(run_dir), 6, save_at=(4, 6))
    assert resumed == run(world, str(tmp_path / "a"), 6)[2:]
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert name in caplog.text
    assert [d.name for d in complete_checkpoints(run_dir)] == ["step-00000006", "step-00000004"]


def test_two_ranks_agree_about_damage_that_one_of_them_reads(tmp_path):
    run_on_ranks(run, 2, str(tmp_path), 4, (2, 4))
    for name in ("__0_0.distcp", "__1_0.distcp"):
        shutil.copytree(tmp_path, tmp_path.with_name(name))
        flip_a_bit(tmp_path.with_name(name) / "checkpoints" / "step-00000004" / name)
        run_on_ranks(refuses_flipped, 2, str(tmp_path.with_name(name)), name)
    resumed = run_on_ranks(run, 2, str(tmp_path.with_name("__1_0.distcp")), 6)
    assert len(resumed[0]) == 5, "both went on from step 2"


def hindered(world: World, run_dir: str) -> tuple[str, int]:
    """On rank 1 alone a file cannot be read, and later not even the note of a finished part be written."""
    from ltx2_train.train import checkpoint

    read, write = checkpoint._hash, checkpoint._write_whole

    def unreadable(path: Path) -> str:
        if path.name == "__1_0.distcp" and path.parent.name == "step-00000004":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    def unwritable(path: Path, value: Any) -> None:
        if path.name == checkpoint._marker(1):
            raise OSError(errno.EROFS, "Read-only file system")
        write(path, value)

    checkpoint._hash, checkpoint._write_whole = unreadable, unwritable
    engine, checkpoints = toy_engine(world), Checkpointer(Path(run_dir), world, identity=IDENTITY)
    restored = checkpoints.load(engine, {})
    checkpoints.save(3, engine, {}, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.wait()
    return str(caught.value), restored.step


def test_what_one_rank_cannot_read_or_write_all_of_them_know(tmp_path):
    run_on_ranks(run, 2, str(tmp_path), 4, (2, 4))
    first, second = run_on_ranks(hindered, 2, str(tmp_path))
    assert first == second
    message, step = first
    assert step == 2
    assert "saving step 3" in message
    assert "rank 1: [Errno 30] Read-only file system" in message, "and not that rank 0 has waited in vain"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(world, tmp_path):
    run(world, str(tmp_path), 2, save_at=(2,))
    flip_a_bit(tmp_path / "checkpoints" / "step-00000002" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="none of step-00000002 can be read"):
        run(world, str(tmp_path), 4)


@pytest.mark.parametrize("name", ["__0_0.distcp", "manifest.json", "engine.json"])
def test_a_checkpoint_with_a_missing_or_short_file_is_passed_over(world, tmp_path, name):
    run(world, str(tmp_path), 4, save_at=(2, 4))
    broken = tmp_path / "checkpoints" / "step-00000004" / name
    broken.write_bytes(broken.read_bytes()[:-1])
    assert newest_complete(tmp_path).name == "step-00000002"
    broken.unlink()
    assert newest_complete(tmp_path).name == "step-00000002"


def fills_the_disk(world: World, run_dir: str, full_on: int) -> list[float]:
    """Rank `full_on` cannot write more than a little from step 4 on; the run goes on, and saves again later."""
    engine, checkpoints = toy_engine(world), Checkpointer(Path(run_dir), world, identity=IDENTITY)
    train(engine, world, 0, 2)
    checkpoints.save(2, engine, {}, {})
    checkpoints.wait()
    if world.rank == full_on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    train(engine, world, 2, 4)
    checkpoints.save(4, engine, {}, {})
    with pytest.raises(
        CheckpointError, match=r"saving step 4 in .* failed: .*It needs [\d,]+ bytes and [\d,]+ are free"
    ):
        checkpoints.wait()
    world.barrier()
    names = {path.name for path in (Path(run_dir) / "checkpoints").iterdir()}
    assert names == {"step-00000002"}, "nothing of the failed one stays, the good one does"
    world.barrier()
    if world.rank == full_on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(4, engine, {}, {})
    assert checkpoints.wait().step == 4
    return train(engine, world, 4, 6)


@pytest.mark.parametrize(("size", "full_on"), [(1, 0), (2, 0), (2, 1)])
def test_a_write_that_fails_costs_no_checkpoint(tmp_path, size, full_on):
    run_on_ranks(fills_the_disk, size, str(tmp_path), full_on)
    assert newest_complete(tmp_path).name == "step-00000004"


def one_save_fails(world: World, run_dir: str) -> list[str]:
    """Rank 1 hears of the failure of rank 0 when it asks next, though its own part was fine."""
    from ltx2_train.train import checkpoint

    engine, checkpoints = toy_engine(world), Checkpointer(Path(run_dir), world)
    if world.is_main:
        checkpoint._sync = lambda directory: (_ for _ in ()).throw(OSError("the disk is gone"))
    checkpoints.save(1, engine, {}, {})
    messages = []
    while not messages:
        try:
            checkpoints.poll()
            time.sleep(0.02)
        except CheckpointError as error:
            messages = [str(error), str(error.agreed)]
    world.barrier()
    return messages


def test_a_failed_save_ends_the_run_on_all_ranks_together(tmp_path):
    first, second = run_on_ranks(one_save_fails, 2, str(tmp_path))
    assert first == second
    assert "the disk is gone" in first[0]
    assert first[1] == "True"


def test_a_disk_that_is_full_for_the_manifest_costs_no_checkpoint(world, tmp_path, monkeypatch):
    from ltx2_train.train import checkpoint

    engine, checkpoints = toy_engine(world), Checkpointer(tmp_path, world)
    checkpoints.save(1, engine, {}, {})
    checkpoints.wait()

    def full(path: Path, value: Any) -> None:
        if path.name == checkpoint.MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    write = checkpoint._write_whole
    monkeypatch.setattr(checkpoint, "_write_whole", full)
    checkpoints.save(2, engine, {}, {})
    with pytest.raises(CheckpointError, match="No space left on device.*step-00000001, stays"):
        checkpoints.save(3, engine, {}, {})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_retention_keeps_the_newest_the_milestones_and_always_the_last(world, tmp_path):
    engine = toy_engine(world)
    checkpoints = Checkpointer(tmp_path, world, keep_last=1, keep_every=4)
    for step in range(1, 7):
        checkpoints.save(step, engine, {}, {})
        checkpoints.wait()
        assert newest_complete(tmp_path).name == f"step-{step:08d}"
    assert [d.name for d in complete_checkpoints(tmp_path)] == ["step-00000006", "step-00000004"]
    everything = Checkpointer(tmp_path, world, keep_last=0)
    everything.save(7, engine, {}, {})
    everything.wait()
    assert len(complete_checkpoints(tmp_path)) == 3


def test_a_checkpoint_of_another_run_is_an_error_and_not_a_new_start(world, tmp_path):
    run(world, str(tmp_path), 2, save_at=(2,))
    other = Checkpointer(tmp_path, world, identity=IDENTITY | {"seed": 4})
    with pytest.raises(CheckpointError, match="seed: 3 in the checkpoint, 4 now"):
        other.load(toy_engine(world))


def test_a_checkpoint_of_another_model_is_an_error_and_not_a_new_start(world, tmp_path):
    run(world, str(tmp_path), 2, save_at=(2,))
    with pytest.raises(CheckpointError, match=r"parameter enter\.weight: \[6, 4\] in the checkpoint"):
        Checkpointer(tmp_path, world, identity=IDENTITY).load(toy_engine(world, WiderToy))


class WiderToy(Toy):
    def __init__(self) -> None:
        super().__init__(width=8)


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(world, tmp_path):
    run(world, str(tmp_path), 4, save_at=(2, 4))
    engine = toy_engine(world)
    checkpoints = Checkpointer(tmp_path, world, identity=IDENTITY)
    restored = checkpoints.load(engine, directory=tmp_path / "checkpoints" / "step-00000002")
    assert restored.step == 2
    assert newest_complete(tmp_path) == restored.directory
    assert [p.name[:23] for p in (tmp_path / "checkpoints").glob("set-aside-*")] == ["set-aside-step-00000004"]


def test_training_goes_on_while_a_checkpoint_is_written(world, tmp_path, monkeypatch):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    finish = FileSystemWriter.finish
    monkeypatch.setattr(FileSystemWriter, "finish", lambda self, **kwargs: (time.sleep(0.5), finish(self, **kwargs))[1])
    engine, checkpoints = toy_engine(world), Checkpointer(tmp_path, world)
    checkpoints.save(1, engine, {}, {})
    assert checkpoints.poll() is None
    train(engine, world, 0, 1)
    assert newest_complete(tmp_path) is None, "invisible while it is written"
    saved = checkpoints.wait()
    assert saved.num_bytes > 1000
    assert checkpoints.poll() is None, "told once"

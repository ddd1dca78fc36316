"""Whole runs of `ltx2-train` on the tiny model: what is promised of a run, kept from the command line to the last bit."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx2_train.cli.train import open_datasets, train
from ltx2_train.data.plan import Plan
from ltx2_train.distributed.saved import saved_weights
from ltx2_train.distributed.world import World
from ltx2_train.errors import Ltx2Error
from ltx2_train.model.build import transformer_config
from ltx2_train.testing import run_on_ranks
from ltx2_train.testing.shards import write_latent_dataset
from ltx2_train.train.checkpoint import complete_checkpoints, verify
from ltx2_train.train.trainer import EXIT_STOPPED
from tests.unit.cli.commands import SMALL, composed, ltx2_train, small_dataset, small_samples

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"time", "step_seconds", "data_seconds", "tokens_per_second", "samples_per_second", "tflops_per_second"}
HOST = TIMES | {"peak_memory_gb"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "latents")


def arguments(data: Path, run: Path, *more: str) -> tuple[str, ...]:
    return (*SMALL, f"data.datasets.0.path={data}", f"train.run_dir={run}", *more)


def records(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The steps of a run as logged, or its events of one kind, without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in HOST} for line in lines if line.get("event") == event]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def assert_same_state(a: Path, b: Path) -> None:
    """Bit-equal weights and averages in two checkpoints."""
    for averaged in (None, "ema"):
        first, second = (dict(saved_weights(d, averaged=averaged)) for d in (a, b))
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """Six steps without an interruption."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert ltx2_train(*arguments(data, run)) == 0
    return run


def test_a_run_leaves_what_it_promises(straight):
    assert [r["step"] for r in records(straight)] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records(straight, "checkpoint")] == [3, 6]
    assert (straight / "config.yaml").exists()
    for directory in complete_checkpoints(straight):
        verify(directory)
        assert json.loads((directory / "config.json").read_text())["optim"]["lr"] == 1e-3
    assert not (straight / "wandb").exists()


def test_three_steps_and_three_more_are_six_steps_to_the_last_bit(data, straight, tmp_path):
    run = tmp_path / "run"
    assert ltx2_train(*arguments(data, run, "train.max_steps=3")) == 0
    assert ltx2_train(*arguments(data, run)) == 0
    assert records(run) == records(straight)
    assert_same_state(checkpoint(run, 6), checkpoint(straight, 6))


def test_going_on_from_an_older_checkpoint_logs_no_step_twice(data, straight, tmp_path):
    run = tmp_path / "run"
    assert ltx2_train(*arguments(data, run)) == 0
    assert ltx2_train(*arguments(data, run, f"train.resume={checkpoint(run, 3)}")) == 0
    assert records(run) == records(straight)
    assert_same_state(checkpoint(run, 6), checkpoint(straight, 6))


def test_a_saved_configuration_makes_the_same_run_elsewhere(straight, tmp_path):
    run = tmp_path / "again"
    flags = ("--config-dir", str(straight), "--config-name", "config")
    assert ltx2_train(*flags, f"train.run_dir={run}") == 0
    assert records(run) == records(straight)


def test_a_finished_run_given_again_does_nothing(data, straight):
    before = (straight / "metrics.jsonl").read_text()
    assert ltx2_train(*arguments(data, straight)) == 0
    assert (straight / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_other_settings_is_refused(data, straight, capsys):
    assert ltx2_train(*arguments(data, straight, "train.max_steps=8", "objective.caption_dropout=0.5")) == 2
    error = capsys.readouterr().err
    assert "belongs to another run" in error
    assert "objective.caption_dropout: 0.0 in the checkpoint, 0.5 now" in error


def test_other_data_under_the_same_name_is_refused(straight, tmp_path, capsys):
    other = small_dataset(tmp_path / "latents", count=20)
    assert ltx2_train(*arguments(other, straight, "train.max_steps=8")) == 2
    assert "data.datasets.0.shards" in capsys.readouterr().err


def test_the_same_data_elsewhere_is_the_same_run(straight, data, tmp_path):
    run, moved = tmp_path / "run", small_dataset(tmp_path / "moved")
    assert ltx2_train(*arguments(data, run, "train.max_steps=3")) == 0
    assert ltx2_train(*arguments(moved, run)) == 0
    assert records(run) == records(straight)


def test_resume_never_insists_on_an_empty_run_directory(data, straight, capsys):
    assert ltx2_train(*arguments(data, straight, "train.resume=never")) == 2
    assert "holds checkpoints" in capsys.readouterr().err


def test_text_of_another_width_is_refused_before_anything_is_built(data, tmp_path, capsys):
    assert ltx2_train(*arguments(data, tmp_path / "run", "model=demo")) == 2
    assert "the model demo has video_text_width 192, audio_text_width 160" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_streams_that_the_model_lacks_are_refused(data, tmp_path, capsys):
    assert ltx2_train(*arguments(data, tmp_path / "run", "model.streams=[video]")) == 2
    assert "the model has no audio stream" in capsys.readouterr().err


def test_a_loss_that_overflows_stops_the_run_and_the_last_checkpoint_stays(data, tmp_path, capsys):
    run = tmp_path / "run"
    wild = ("optim.lr=1e30", "optim.warmup_steps=0", "train.save_every=1", "ema=null")
    strict = ("train.faults.skips=0", "train.faults.rollbacks=0")
    assert ltx2_train(*arguments(data, run, *wild, *strict)) == 2
    error = capsys.readouterr().err
    assert "nothing was applied. Samples: s0" in error
    assert "the last checkpoint stays" in error
    (event,) = records(run, "update_skipped")
    assert event["keys"]
    verify(checkpoint(run, event["step"]))
    assert not checkpoint(run, event["step"] + 1).exists()


def test_a_run_that_does_not_come_right_goes_back_as_often_as_it_may_and_ends_with_an_error(data, tmp_path, capsys):
    run = tmp_path / "run"
    wild = ("optim.lr=1e30", "optim.warmup_steps=0", "train.save_every=1", "train.max_steps=20", "train.faults.skips=1")
    assert ltx2_train(*arguments(data, run, *wild, "train.faults.rollbacks=1")) == 2
    assert "2 in a row after 1 rollbacks" in capsys.readouterr().err
    assert [event["number"] for event in records(run, "rolled_back")] == [1]


def poisoned(directory: Path, step: int) -> tuple[Path, str]:
    """A dataset whose last sample of the step with this number (from 1) has a loss beyond fp32; and its key."""
    job = composed(*arguments(small_dataset(directory / "clean"), directory / "unused"))
    (dataset,), _ = open_datasets(job, transformer_config(job.model))
    planned = Plan([dataset.index], None, job.data.plan).rank_step(step - 1, 0, 1)
    key = dataset.index.key(planned[-1].samples[-1].number)
    samples = small_samples()
    for sample in samples:
        if sample.key == key:
            assert sample.video is not None
            sample.video.mul_(1e30)
    write_latent_dataset(directory / "latents", samples)
    return directory / "latents", key


BACK = ("train.save_every=1", "train.faults.skips=0", "train.faults.rollbacks=1")


def test_a_run_rolls_back_and_goes_on_as_if_the_sample_had_been_left_out_from_there(tmp_path):
    latents, key = poisoned(tmp_path, step=4)
    run, reference = tmp_path / "run", tmp_path / "reference"
    assert ltx2_train(*arguments(latents, run, *BACK)) == 0
    (event,) = records(run, "rolled_back")
    assert (event["step"], event["from_step"], event["keys"]) == (2, 4, [key]), (
        "step 3 was good: so was the state before it"
    )
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]
    assert ltx2_train(*arguments(latents, reference, *BACK, "train.max_steps=2")) == 0
    assert ltx2_train(*arguments(latents, reference, *BACK, f"data.skip=[{key}]")) == 0
    assert records(run) == records(reference)
    assert_same_state(checkpoint(run, 6), checkpoint(reference, 6))
    saved = json.loads((checkpoint(run, 2) / "config.json").read_text())
    assert saved["train"]["faults"]["rollbacks"] == 1


@pytest.mark.slow
def test_two_processes_roll_back_as_one_does(tmp_path):
    latents, key = poisoned(tmp_path, step=4)
    more = (*BACK, "data.plan.micro_batches_per_step=2", "data.plan.max_samples=2")
    for size in (1, 2):
        run_on_ranks(run_job, size, *arguments(latents, tmp_path / f"on{size}", *more))
    one, two = (records(tmp_path / f"on{size}") for size in (1, 2))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)
    events = [records(tmp_path / f"on{size}", "rolled_back") for size in (1, 2)]
    assert events[0] == events[1]
    assert key in events[0][0]["keys"]


def test_a_run_in_which_every_sample_fails_says_so_instead_of_leaving_them_all_out(tmp_path, capsys):
    data, run = small_dataset(tmp_path / "latents", count=12), tmp_path / "run"
    wild = ("train.save_every=1", "train.max_steps=30", "optim.lr=1e30", "optim.warmup_steps=0")
    for _ in range(2):
        assert ltx2_train(*arguments(data, run, *wild)) == 2
        error = capsys.readouterr().err
        assert "of the 12 samples of dataset 0; train.faults.skip_fraction=0.01 allows 6" in error
        assert "no samples to plan" not in error
    assert records(run, "rolled_back") == []


def test_a_run_goes_on_with_a_lower_learning_rate_where_that_is_asked_for(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert ltx2_train(*arguments(data, run, "train.max_steps=3")) == 0
    lower = ("optim.lr=1e-5", "train.save_every=1")
    assert ltx2_train(*arguments(data, run, *lower)) == 2
    assert "train.change=[optim.lr]" in capsys.readouterr().err
    assert ltx2_train(*arguments(data, run, *lower, "train.change=[optim.lr]", "train.max_steps=5")) == 0
    assert ltx2_train(*arguments(data, run, *lower)) == 0, "from then on it is the run's own"
    (event,) = records(run, "settings_changed")
    assert (event["step"], event["settings"]) == (3, {"optim.lr": {"from": 1e-3, "to": 1e-5}})
    assert [r["lr"] for r in records(run)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-5, 1e-5, 1e-5])


@pytest.mark.slow
def test_where_a_run_began_is_obeyed_once(data, straight, tmp_path):
    """The same command given again, by a launcher or a scheduler, goes on; another path goes back."""
    run, other = tmp_path / "run", f"train.resume={checkpoint(straight, 3)}"
    for stop in (4, 5):
        assert ltx2_train(*arguments(data, run, other, f"train.max_steps={stop}")) == 0
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("set-aside")] == []
    assert ltx2_train(*arguments(data, run)) == 0, "auto goes on too"
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in records(straight)][3:]
    assert ltx2_train(*arguments(data, run, f"train.resume={checkpoint(run, 4)}", "train.max_steps=5")) == 0
    assert [d.name for d in complete_checkpoints(run)] == ["step-00000005", "step-00000004"]


@pytest.mark.slow
def test_a_fresh_start_that_is_insisted_on_goes_on_when_it_is_given_again(data, tmp_path):
    run, never = tmp_path / "run", "train.resume=never"
    for stop in (1, 2):
        assert ltx2_train(*arguments(data, run, never, f"train.max_steps={stop}")) == 0
    assert [r["step"] for r in records(run)] == [1, 2]


def trouble_on_the_main_rank(world: World, *arguments: str) -> list[str]:
    """What all ranks hear while rank 0 alone cannot put its part of a run together; then a whole run without metrics."""
    from ltx2_train.cli import schema
    from ltx2_train.train import checkpoint as checkpoints
    from ltx2_train.train import sinks

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    heard = []
    for place, name in (
        (schema, "save_job"),
        (sinks, "keep_until"),
        (checkpoints, "_tidy"),
        (sinks, "recorded_events"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if world.is_main:
                patch.setattr(place, name, full)
            with pytest.raises(Ltx2Error, match="No space left") as caught:
                run_job(world, *arguments)
            heard.append(f"{name} {caught.value.agreed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks.JsonlSink, "log", full)
        run_job(world, *arguments)
    return heard


@pytest.mark.slow
def test_what_rank_0_alone_fails_at_ends_the_run_on_all_ranks_or_costs_its_records(tmp_path):
    latents, run = small_dataset(tmp_path / "latents"), tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    more = ("data.plan.micro_batches_per_step=2", "data.plan.max_samples=2", "train.max_steps=2")
    for heard in run_on_ranks(trouble_on_the_main_rank, 2, *arguments(latents, run, *more)):
        assert heard == ["save_job True", "keep_until True", "_tidy True", "recorded_events True"]
    assert records(run) == []
    assert [d.name for d in complete_checkpoints(run)] == ["step-00000002"]


def damaged(directory: Path, count: int = 1) -> Path:
    """A dataset in which a byte of some records' tensors is flipped."""
    small_dataset(directory)
    shard = directory / "shard-000000.tar"
    raw = bytearray(shard.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(raw))) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".safetensors")][:count]
    for member in members:
        raw[member.offset_data + member.size - 8] ^= 0x55
    shard.write_bytes(bytes(raw))
    return directory


def test_a_damaged_record_keeps_its_place_and_is_named(straight, tmp_path):
    run = tmp_path / "run"
    assert ltx2_train(*arguments(damaged(tmp_path / "latents"), run)) == 0
    assert sum(r["bad_records"] for r in records(run)) == len(records(run, "bad_record")) >= 1
    assert "s000" in records(run, "bad_record")[0]["message"]
    first_bad = records(run, "bad_record")[0]["step"]
    clean, hurt = records(straight), records(run)
    assert clean[: first_bad - 1] == hurt[: first_bad - 1]
    bins = [sum(count for count, _ in r["sigma_bins"]["video"]) for r in hurt]
    assert bins[first_bad - 1] == 4 - hurt[first_bad - 1]["bad_records"]


def test_too_many_damaged_records_are_an_error(tmp_path, capsys):
    bad = damaged(tmp_path / "latents", count=8)
    assert ltx2_train(*arguments(bad, tmp_path / "run", "data.loader.bad_fraction=0")) == 2
    assert "records are damaged" in capsys.readouterr().err


def test_a_sweep_trains_each_job_in_a_directory_of_its_own(data, tmp_path):
    sweep = arguments(data, tmp_path / "sweep", "train.max_steps=2", "optim.lr=1e-3,2e-3", "seed=0,1")
    assert ltx2_train("-m", *[a for a in sweep if a != "optim.lr=1e-3"]) == 0
    runs = sorted(p.parent for p in (tmp_path / "sweep").glob("*/metrics.jsonl"))
    assert [r.name.split("-")[0] for r in runs] == ["0", "1", "2", "3"]
    assert len({records(r)[0]["loss"] for r in runs}) == 2  # the first loss depends on the seed alone
    assert len({records(r)[1]["loss"] for r in runs}) == 4


def test_adapters_are_trained_beside_a_base_that_does_not_move(data, tmp_path):
    run = tmp_path / "run"
    assert (
        ltx2_train(*arguments(data, run, "lora=attention", "lora.rank=2", "train.save_every=1", "train.max_steps=3"))
        == 0
    )
    first, last = (dict(saved_weights(checkpoint(run, step))) for step in (1, 3))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_video_only_model_trains(data, tmp_path):
    run = tmp_path / "run"
    streams = ("model.streams=[video]", "objective.streams=[video]", "train.max_steps=1")
    assert ltx2_train(*arguments(data, run, *streams)) == 0
    assert records(run)[0]["loss_audio"] is None
    assert records(run)[0]["loss_video"] == records(run)[0]["loss"]


def test_held_out_losses_come_before_and_after(data, tmp_path):
    run = tmp_path / "run"
    held = (f"evaluation.datasets=[{data}]", "evaluation.samples=null", "train.evaluate_first=true")
    strict = ("train.strict_evaluation=true", "evaluation.heldout.clips=4", "train.max_steps=2")
    assert ltx2_train(*arguments(data, run, *held, *strict)) == 0
    assert [r["step"] for r in records(run, "heldout")] == [0, 2]
    assert sorted(p.name for p in (run / "evals").iterdir()) == ["heldout-00000000.json", "heldout-00000002.json"]


def test_an_evaluation_that_a_kill_interrupted_is_made_up_for(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    held = (f"evaluation.datasets=[{data}]", "evaluation.samples=null", "evaluation.heldout.clips=4")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ltx2_train.evals.heldout.Heldout.measure", killed)
        with pytest.raises(KeyboardInterrupt):
            ltx2_train(*arguments(data, run, *held, "train.max_steps=2"))
    for _ in range(2):
        assert ltx2_train(*arguments(data, run, *held, "train.max_steps=2")) == 0
        assert [r["step"] for r in records(run, "heldout")] == [2]


@pytest.mark.slow
def test_a_damaged_held_out_record_that_one_rank_reads_is_reported_and_training_goes_on(tmp_path):
    latents, run = small_dataset(tmp_path / "latents"), tmp_path / "run"
    held = (f"evaluation.datasets=[{damaged(tmp_path / 'held')}]", "evaluation.samples=null", "train.eval_every=2")
    more = ("data.plan.micro_batches_per_step=2", "evaluation.heldout.batch_size=1")
    run_on_ranks(run_job, 2, *arguments(latents, run, *held, *more))
    assert [r["step"] for r in records(run, "evaluation_failed")] == [2, 4, 6]
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]


def run_job(world: World, *arguments: str) -> None:
    torch.use_deterministic_algorithms(True)
    job = composed(*arguments)
    train(replace(job, sinks=replace(job.sinks, console=False)), world)


@pytest.mark.parametrize("hurt", [False, True], ids=["sound", "a_bad_record"])
def test_two_processes_train_what_one_does(tmp_path, hurt):
    latents = damaged(tmp_path / "latents") if hurt else small_dataset(tmp_path / "latents")
    more = ("data.plan.micro_batches_per_step=2", "data.plan.max_samples=3")
    for size in (1, 2):
        run_on_ranks(run_job, size, *arguments(latents, tmp_path / f"on{size}", *more))
    one, two = (records(tmp_path / f"on{size}") for size in (1, 2))
    assert [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert a["samples"] == b["samples"] == 6
        assert a["bad_records"] == b["bad_records"]
        for name in ("loss", "loss_video", "loss_audio", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
        counts = [[[n for n, _ in r["sigma_bins"][m]] for m in ("video", "audio")] for r in (a, b)]
        assert counts[0] == counts[1]
    if hurt:
        messages = [[e["message"] for e in records(tmp_path / f"on{size}", "bad_record")] for size in (1, 2)]
        assert messages[0] == messages[1]
        assert "s000" in messages[0][0]


def test_a_run_killed_on_two_goes_on_on_one(tmp_path):
    latents = small_dataset(tmp_path / "latents")
    more = ("data.plan.micro_batches_per_step=2", "data.plan.max_samples=3")
    run_on_ranks(run_job, 2, *arguments(latents, tmp_path / "moved", *more, "train.max_steps=3"))
    assert ltx2_train(*arguments(latents, tmp_path / "moved", *more)) == 0
    assert ltx2_train(*arguments(latents, tmp_path / "stayed", *more)) == 0
    for a, b in zip(records(tmp_path / "moved"), records(tmp_path / "stayed"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def started(*arguments: str) -> subprocess.Popen:
    """`ltx2-train` as a process group of its own."""
    command = [sys.executable, "-m", "ltx2_train.cli.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def await_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until `step` is logged."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(records(run)) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_scheduler_that_stops_all_processes_finds_the_step_saved(data, tmp_path, number):
    """A signal to the whole process group, data workers included, and another start on the same run meanwhile."""
    run = tmp_path / "run"
    long = ("train.max_steps=100000", "train.save_every=0", "data.loader.num_workers=1")
    process = started(*arguments(data, run, *long))
    await_step(process, run, 2)
    assert ltx2_train(*arguments(data, run, *long)) == 2, "the directory is taken"
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED == 75, errors
    (saved,) = complete_checkpoints(run)
    steps = [r["step"] for r in records(run)]
    assert saved.name == f"step-{steps[-1]:08d}"
    assert steps == list(range(1, steps[-1] + 1))
    assert "stopped at step" in errors


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(data, straight, tmp_path):
    run = tmp_path / "run"
    process = started(*arguments(data, run, "train.max_steps=100000", "optim.total_steps=6"))
    await_step(process, run, 4)
    while not complete_checkpoints(run):
        time.sleep(0.02)
    process.kill()
    process.wait()
    first = min(complete_checkpoints(run))
    assert ltx2_train(*arguments(data, run, f"train.resume={first}")) == 0
    assert records(run) == records(straight)
    assert_same_state(checkpoint(run, 6), checkpoint(straight, 6))

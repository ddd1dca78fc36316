"""`ltx2-train` called in this process, on a dataset and a model that are as small as they can be."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ltx2_train.cli import entry
from ltx2_train.cli import train as train_program
from ltx2_train.cli.schema import TrainJob
from ltx2_train.record import Bucket, Sample
from ltx2_train.testing.shards import manifest_for, random_sample, write_latent_dataset

TEXT_WIDTHS = (40, 20)  # of the tiny model
SMALL = (
    "model=tiny",
    "data.plan.max_samples=4",
    "data.loader.num_workers=0",
    "train.max_steps=6",
    "train.log_every=1",
    "train.save_every=3",
    "train.keep_last=0",
    "optim.lr=1e-3",
    "optim.warmup_steps=2",
    "sinks.wandb=false",
)


def call(task: Callable[[Any], int], *arguments: str) -> int:
    """The exit code of `ltx2-train ARGUMENTS` with `task` in the place of training."""
    kept, root = sys.argv, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    sys.argv = ["ltx2-train", *arguments]
    try:
        return entry.launch("train", train_program.HEADER, lambda: TrainJob, task)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv, root.handlers[:] = kept, handlers
        root.setLevel(level)


def composed(*arguments: str) -> TrainJob:
    """The job that arguments compose to."""
    jobs: list[TrainJob] = []

    def keep(job: TrainJob) -> int:
        jobs.append(job)
        return 0

    assert call(keep, *arguments) == 0
    return jobs[0]


def ltx2_train(*arguments: str) -> int:
    return call(train_program.run, *arguments)


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the program says when it refuses these arguments. Nothing may run."""

    def never(job: TrainJob) -> int:
        raise AssertionError("a refused job was run")

    assert call(never, *arguments) == entry.EXIT_ERROR
    return capsys.readouterr().err


def small_samples(count: int = 24) -> list[Sample]:
    """Clips with sound, and text of two lengths."""
    bucket = Bucket(2, 1, 1, 5)
    return [random_sample(f"s{i:03d}", bucket, text_length=3 + i % 2, text_widths=TEXT_WIDTHS) for i in range(count)]


def small_dataset(directory: Path, count: int = 24, **names: str) -> Path:
    """A dataset with these names (video_codec, audio_codec, text_encoder) in its manifest, the stand-ins' otherwise."""
    samples = small_samples(count)
    write_latent_dataset(directory, samples, manifest=replace(manifest_for(samples[0]), **names))
    return directory

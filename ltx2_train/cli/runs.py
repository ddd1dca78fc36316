"""A trained model out of a run directory, to be sampled and measured: no engine, no optimizer, whole weights."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ltx2_train.cli.components import Components, ComponentsConfig, resolved
from ltx2_train.cli.follow import HELD
from ltx2_train.cli.provenance import check_base
from ltx2_train.cli.schema import TrainJob, job_from_text, plain
from ltx2_train.cli.train import build, fit_of
from ltx2_train.data.datasets import PROVENANCE, open_dataset
from ltx2_train.diffusion.profiles import Fit, SamplerProfile, profile
from ltx2_train.distributed.saved import saved_weights
from ltx2_train.errors import CheckpointError, ConfigError, DataError
from ltx2_train.model.build import initial_weights, transformer_config
from ltx2_train.model.modality import Stream
from ltx2_train.train.checkpoint import (
    CONFIG,
    MANIFEST,
    all_checkpoints,
    checkpoint_directory,
    newest_complete,
    read_manifest,
    verify,
)

WEIGHTS = ("ema", "raw")


@dataclass(frozen=True)
class Trained:
    """The model of a checkpoint, and what it was trained with."""

    checkpoint: Path
    job: TrainJob
    step: int
    weights: str  # "ema" or "raw"
    profile: SamplerProfile
    provenance: dict[str, Any]  # names of codecs and text encoder, and the widths of the text features
    components: Components
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def model(self) -> nn.Module:
        """Filled when it is asked for first, so that what is needed before it alone does not lie beside it.

        Raises `CheckpointError` where a training that goes on has removed the checkpoint meanwhile.
        """
        try:
            return _model(self.job, self.checkpoint, self.weights, self.dtype, self.device)
        except Exception as error:
            if (self.checkpoint / MANIFEST).exists():
                raise
            raise CheckpointError(
                f"{self.checkpoint}: removed while it was being opened; its run keeps only its newest checkpoints. Do it "
                "again with the newest one, or have the run keep more (train.keep_last, train.keep_every), or sample in "
                "step with it (ltx2-evaluate --follow)"
            ) from error

    @property
    def title(self) -> str:
        """What is sampled, in words."""
        return f"step {self.step}, {self.weights} weights"

    @property
    def streams(self) -> frozenset[Stream]:
        """What the model makes."""
        return self.job.sampled_streams

    @property
    def fit(self) -> Fit:
        """What sampler profiles are held against."""
        return fit_of(self.job, transformer_config(self.job.model))

    @property
    def identity(self) -> dict[str, Any]:
        """What the checkpoint and the parts around it hold, in plain values. Another one makes other clips."""
        parts = self.components.contents
        return {"checkpoint": self._digest, "weights": self.weights, "provenance": self.provenance, "parts": parts}

    @property
    def source(self) -> dict[str, str]:
        """Which checkpoint it is, for files that are made of it: its place in its run, and its content."""
        run = run_of(self.checkpoint)
        place = self.checkpoint.resolve() if run is None else checkpoint_directory(run, self.step)
        return {"checkpoint": str(place), "manifest": self._digest}

    @property
    def _digest(self) -> str:
        with (self.checkpoint / MANIFEST).open("rb") as manifest:
            return hashlib.file_digest(manifest, "sha256").hexdigest()

    @property
    def keyframe_marker(self) -> bool:
        """Whether the model was trained with marked first frames."""
        return transformer_config(self.job.model).use_keyframes_abs_pos_embedding


def find_checkpoint(directory: Path) -> Path:
    """The newest complete checkpoint of a run directory, or the directory itself if it is a checkpoint.

    Raises `CheckpointError` when there is none.
    """
    if (directory / MANIFEST).exists():
        return directory
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {what}. Give a run directory of ltx2-train, or one checkpoint of it")
    found = newest_complete(directory)
    if found is None:
        raise CheckpointError(f"{directory} has no complete checkpoint{_reason(len(all_checkpoints(directory)))}")
    return found


def _reason(saved: int) -> str:
    """Why a run has no complete checkpoint though it has `saved` some, and what to do."""
    if not saved:
        return ". Give a run directory of ltx2-train that has saved at least once"
    all_of_them = "the only one is" if saved == 1 else f"all {saved} are"
    return (
        f": {all_of_them} damaged or incomplete (messages above). Copy the run again or restore it from a backup; where "
        "there is none, train anew in another run directory"
    )


def run_directory(path: Path) -> Path:
    """The run directory that `path` is, or that it is a checkpoint of.

    Raises `ConfigError` for a checkpoint that lies in no run: nothing is written beside it.
    """
    found = run_of(path)
    if found is None:
        raise ConfigError(
            f"{path} is a checkpoint that lies in no run directory (RUN/checkpoints/{path.name}). Say with --out DIR where "
            "the results go"
        )
    return found


def run_of(path: Path) -> Path | None:
    """The run directory that `path` is, or that it is a checkpoint of; None for a checkpoint that lies elsewhere."""
    if not (path / MANIFEST).exists():
        return path
    place = path.resolve().parent
    run = place.parent
    return run if place in (checkpoint_directory(run, 0).parent, run / HELD) else None


def load_trained(
    directory: Path,
    *,
    weights: str = "ema",
    profile_name: str | None = None,
    components: ComponentsConfig | None = None,
    base: Path | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """The model of the newest complete checkpoint in `directory`, ready to be called, in bf16 on a GPU and fp32 elsewhere.

    `weights`: the moving average ("ema") or the trained weights themselves ("raw"); a run without an average has only the
    latter. `components`: where the frozen parts lie, if not where the run found them; `base`: where the weights do that it
    started from. The checkpoint's hashes are verified first. Raises `CheckpointError` and `ConfigError`.
    """
    checkpoint, device = find_checkpoint(directory), torch.device(device)
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r}: choose one of {', '.join(WEIGHTS)}")
    verify(checkpoint)
    settings = json.loads((checkpoint / CONFIG).read_text())
    stored_profile, recorded = settings.pop("sampler_profile"), settings.pop("provenance")
    provenance = {name: recorded[name] for name in PROVENANCE}
    job = job_from_text(json.dumps({"defaults": [], **settings}), str(checkpoint / CONFIG))
    _place_base(job, base, recorded.get("base"), directory)
    weights = weights if job.ema is not None else "raw"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    places = resolved(components or ComponentsConfig(), plain(job.components))
    return Trained(
        checkpoint=checkpoint,
        job=job,
        step=read_manifest(checkpoint)["step"],
        weights=weights,
        profile=profile(profile_name) if profile_name else SamplerProfile.from_dict(stored_profile),
        provenance=provenance,
        components=Components(places, provenance, device),
        device=device,
        dtype=dtype,
    )


def data_size(job: TrainJob) -> dict[str, Any]:
    """Frames, width, height and fps of the most frequent clips of the run's first dataset.

    Raises `ConfigError` where they are not known.
    """
    import numpy as np

    from ltx2_train.evals.requests import SIZES
    from ltx2_train.geometry import SPACE_SCALE, pixel_frames

    try:
        dataset = open_dataset(job.data.datasets[0].path)
    except DataError as error:
        needed = ", ".join(f"--{name}" for name in SIZES)
        raise ConfigError(f"the size of the training data is not known ({error}). Give {needed}") from error
    index = dataset.index
    if not any(bucket.frames for bucket in index.buckets):
        raise ConfigError("the training data have sound alone, so no frames to go by. Give --frames and --fps")
    common = int(np.argmax(index.bucket_counts * [bucket.frames > 1 for bucket in index.buckets]))
    bucket = index.buckets[common]
    fps = dataset.read(int(np.argmax(index.bucket_ids == common))).fps
    width, height = bucket.width * SPACE_SCALE, bucket.height * SPACE_SCALE
    return {"frames": pixel_frames(bucket.frames), "width": width, "height": height, "fps": fps}


def _place_base(job: TrainJob, base: Path | None, recorded: str | None, run: Path) -> None:
    """Has the job's weights lie at `base` where that is given. Raises unless what the run started from is there."""
    start = job.model.weights
    if start is None:
        if base is not None:
            raise ConfigError(f"--base {base}: {run} started from scratch. Drop --base")
        return
    job.model.weights = start if base is None else str(base)
    if not Path(job.model.weights).exists():
        raise ConfigError(
            f"{run} started from {job.model.weights}, which is not there. Give --base with that file's place"
        )
    check_base(job.model.weights, recorded, run)


def _model(job: TrainJob, checkpoint: Path, weights: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Built without memory, then filled one tensor after another; what is frozen comes from the weights before training."""
    with torch.device("meta"):
        model = build(job)
    initial = initial_weights(model, job.model, job.seed)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in saved_weights(checkpoint, averaged="ema" if weights == "ema" else None, initial=initial):
        targets.pop(name).copy_(tensor)
    assert not targets, f"{checkpoint} has no {', '.join(targets)}"
    return model

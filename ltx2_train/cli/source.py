"""The weights that an export starts from: the newest complete checkpoint of a run, and what is known of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from ltx2_train.cli.schema import TrainJob


@dataclass(frozen=True, slots=True)
class Source:
    """The weights of a checkpoint, and what is known of them."""

    directory: Path  # of the run
    checkpoint: Path
    job: "TrainJob"
    start: str | None
    """The weights that the run started from, as its configuration says; None: from scratch."""
    step: int
    weights: str  # "ema" or "raw"
    profile: dict[str, Any]
    provenance: dict[str, Any]

    def tensors(self, *, adapters: bool) -> "Iterator[tuple[str, Tensor]]":
        """(name, whole tensor) of all adapters, or of everything else: what was trained, then what was not, each in the
        model's order.

        Raises `CheckpointError` for NaN or infinite values, and for another base than the run's.
        """
        from ltx2_train.distributed.saved import saved_weights
        from ltx2_train.errors import CheckpointError
        from ltx2_train.model.build import initial_weights

        initial = None if adapters else initial_weights(self.model(), self.job.model, self.job.seed)
        averaged = "ema" if self.weights == "ema" else None
        for name, tensor in saved_weights(self.checkpoint, averaged=averaged, initial=initial):
            if (".lora_" in name) is not adapters:
                continue
            if not tensor.isfinite().all():
                raise CheckpointError(f"{self.checkpoint}: {name} is not finite. Export an older checkpoint of the run")
            yield name, tensor

    def model(self) -> "nn.Module":
        """The model without values, frozen where the run froze it."""
        import torch

        from ltx2_train.cli.train import build
        from ltx2_train.distributed.build import freeze_parameters

        with torch.device("meta"):
            model = build(self.job)
        freeze_parameters(model, self.job.engine.freeze)
        return model


def open_source(run: Path, weights: str | None, base: Path | None) -> Source:
    """The newest complete checkpoint of a run, its hashes verified; `base` stands in for the weights it started from.

    Raises `CheckpointError` and `ConfigError`.
    """
    from ltx2_train.cli.runs import find_checkpoint, run_of
    from ltx2_train.cli.schema import job_from_text
    from ltx2_train.errors import ConfigError
    from ltx2_train.train.checkpoint import CONFIG, read_manifest, verify

    checkpoint = find_checkpoint(run)
    verify(checkpoint)
    settings = json.loads((checkpoint / CONFIG).read_text())
    profile, provenance = settings.pop("sampler_profile"), settings.pop("provenance")
    job = job_from_text(json.dumps({"defaults": [], **settings}), str(checkpoint / CONFIG))
    if weights == "ema" and job.ema is None:
        raise ConfigError(f"--weights ema: {run} has no moving average. Leave it out, or say --weights raw")
    start = job.model.weights
    if start is not None and base is None and not Path(start).exists():
        raise ConfigError(f"{run} started from {start}, which is not there. Give --base with that file's place")
    if start is not None and base is not None:
        job.model.weights = str(base)
    chosen = weights or ("raw" if job.ema is None else "ema")
    step = read_manifest(checkpoint)["step"]
    return Source(run_of(run) or run, checkpoint, job, start, step, chosen, profile, provenance)

"""What a run directory holds, read for its report: metrics, events, evaluations. A run that goes on can be read too."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx2_train.errors import DataError
from ltx2_train.evals.files import FOLLOW_NAME

log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
CONFIG_NAME = "config.yaml"


@dataclass(frozen=True, slots=True)
class Sampled:
    """The samples of one step: what samples.json says, and where the media lie."""

    directory: Path
    found: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.found["step"])

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The clips that have media."""
        return [clip for clip in self.found["clips"] if clip.get("sampled", {}).get("media")]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory holds for the report. `heldout` and `sampled` are in order of steps."""

    directory: Path
    config: str
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    heldout: list[dict[str, Any]] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "/".join(self.directory.resolve().parts[-2:])

    @property
    def samples(self) -> dict[str, Any] | None:
        """What the newest samples.json says."""
        return self.sampled[-1].found if self.sampled else None

    @property
    def samples_directory(self) -> Path | None:
        """Where the newest samples lie."""
        return self.sampled[-1].directory if self.sampled else None


def read_run(directory: Path) -> RunRecord:
    """The run's metrics, events and evaluations. Raises `DataError` when there are no metrics."""
    path = directory / METRICS_NAME
    if not path.exists():
        raise DataError(f"{path} is missing: {directory} is no run directory. Give the directory that ltx2-train wrote")
    lines, followed = list(json_lines(path)), directory / "evals" / FOLLOW_NAME
    told = list(json_lines(followed)) if followed.exists() else []
    config = directory / CONFIG_NAME
    return RunRecord(
        directory=directory,
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        steps=_last_of_each_step([line for line in lines if "event" not in line]),
        events=sorted([line for line in [*lines, *told] if "event" in line], key=lambda line: line.get("step", 0)),
        heldout=[json.loads(p.read_text(encoding="utf-8")) for p in sorted(directory.glob("evals/heldout-*.json"))],
        sampled=[Sampled(p.parent, json.loads(p.read_text(encoding="utf-8"))) for p in _samples_files(directory)],
    )


def _samples_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("evals/samples-*/samples.json"))


def json_lines(path: Path) -> Iterable[dict[str, Any]]:
    """Every whole line; a run that was killed can leave half a line at the end of its file, or of each of its lives."""
    for line_number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError:
            log.warning("%s:%d is not a whole line of JSON and is left out of the report", path, line_number)


def _last_of_each_step(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per step, in order: a resumed run repeats the steps after its checkpoint."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]

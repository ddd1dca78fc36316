"""What a run directory holds, read for its report: metrics, events, evaluations. A run that goes on can be read too."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ltx2_train.errors import DataError
from ltx2_train.evals.files import FOLLOW_NAME, dataset_directory, event_name, further_datasets
from ltx2_train.evals.identity import UNKNOWN, Identity, differences, heldout_of, read_contents, samples_of

log = logging.getLogger(__name__)

T = TypeVar("T")
Step = tuple[int, T, Identity]  # what an evaluation of a step says, and what it is of

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
    """What a run directory holds for the report.

    `heldout` and `sampled` are in order of steps, and of like clips, measured alike: what is of others is left out.
    `notes` says so.
    """

    directory: Path
    config: str
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    heldout: list[dict[str, Any]] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    further: "dict[str, RunRecord]" = field(default_factory=dict)
    """The evaluations on further held-out datasets, by the setting that names each, without steps and events."""

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
    events = sorted([line for line in [*lines, *told] if "event" in line], key=lambda line: line.get("step", 0))
    numbers = further_datasets(directory)
    return replace(
        _evaluations(directory, events, 0),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        steps=_last_of_each_step([line for line in lines if "event" not in line]),
        events=events,
        further={
            f"evaluation.datasets[{i}]": _evaluations(dataset_directory(directory, i), events, i) for i in numbers
        },
    )


def _evaluations(place: Path, events: Sequence[dict[str, Any]], number: int) -> RunRecord:
    """What was evaluated on a held-out dataset of the run."""
    notes: list[str] = []
    losses = _read(place.glob("evals/heldout-*.json"), notes)
    heldout = [(found["step"], found, heldout_of(found)) for _, found in losses]
    samples = _read(place.glob("evals/samples-*/samples.json"), notes)
    sampled = [(found["step"], Sampled(path.parent, found), samples_of(found)) for path, found in samples]

    def alike(found: "Sequence[Step[T]]", kind: str, words: str) -> list[T]:
        own = {event["step"] for event in events if event["event"] == event_name(kind, number)}
        return _alike(found, own, words, notes)

    return RunRecord(
        directory=place,
        config="",
        steps=[],
        events=[],
        heldout=alike(heldout, "heldout", "held-out loss"),
        sampled=alike(sampled, "samples", "samples"),
        notes=notes,
    )


def _read(paths: Iterable[Path], notes: list[str]) -> list[tuple[Path, dict[str, Any]]]:
    """The files that are still there when they are read: an evaluation replaces them while the run goes on."""
    found = []
    for path in sorted(paths):
        try:
            found.append((path, read_contents(path)))
        except FileNotFoundError:
            log.warning("%s is gone since it was listed, and is left out of the report", path)
            notes.append(f"{path.parent.name}/{path.name} was gone when it was to be read, and is left out.")
    return found


def _alike(found: "Sequence[Step[T]]", own: set[int], words: str, notes: list[str]) -> list[T]:
    """The evaluations that are of the same as the newest one that the run itself made (at the steps `own`), or the newest.

    What is left out, and what is joined by names alone, is added to `notes`.
    """
    if not found:
        return []
    _, _, chosen = ([one for one in found if one[0] in own] or found)[-1]
    others: dict[str, list[str]] = {}
    for step, _, identity in found:
        if identity != chosen:
            others.setdefault(differences(chosen, identity), []).append(str(step))
    for difference, steps in others.items():
        notes.append(f"Left out: {words} of step {', '.join(steps)} ({difference}).")
    kept = [one for _, one, identity in found if identity == chosen]
    if chosen.get(UNKNOWN) and len(kept) > 1:
        notes.append(
            f"The files of {words} do not say what they were measured on (an earlier version wrote them). They are "
            "joined by the names of their clips and by their settings, as far as those are known."
        )
    return kept


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

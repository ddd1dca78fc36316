"""Small JSON files of evaluations: written whole or not at all."""

import json
from pathlib import Path
from typing import Any

FOLLOW_NAME = "follow.jsonl"  # in RUN/evals: events of an evaluation that follows the run from outside


def dataset_directory(run: Path, number: int) -> Path:
    """Where a run keeps the evaluations of a held-out dataset, by its place in evaluation.datasets: the first in the run."""
    return run if number == 0 else run / "evals" / f"dataset_{number}"


def further_datasets(run: Path) -> list[int]:
    """The numbers of the held-out datasets, but for the first, of which a run keeps evaluations."""
    places = dataset_directory(run, 1).parent.glob("dataset_*")
    return sorted(
        int(place.name.removeprefix("dataset_")) for place in places if place.name.removeprefix("dataset_").isdecimal()
    )


def event_name(kind: str, number: int) -> str:
    """What the events of a held-out dataset's evaluations are called: heldout, heldout_1, ..."""
    return kind if number == 0 else f"{kind}_{number}"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values; NaN is refused, JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, ensure_ascii=False, allow_nan=False, indent=1), encoding="utf-8")
    partial.replace(path)

"""Small JSON files of evaluations: written whole or not at all."""

import json
from pathlib import Path
from typing import Any

FOLLOW_NAME = "follow.jsonl"  # in RUN/evals: events of an evaluation that follows the run from outside


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values; NaN is refused, JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, ensure_ascii=False, allow_nan=False, indent=1), encoding="utf-8")
    partial.replace(path)

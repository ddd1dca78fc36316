"""Small JSON files of evaluations: written whole or not at all."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, values: dict[str, Any], *, update: bool = False) -> None:
    """Write plain values; NaN is refused, JSON has none. `update`: the file keeps the fields that `values` has not."""
    before = json.loads(path.read_text()) if update and path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(before | values, ensure_ascii=False, allow_nan=False, indent=1))
    partial.replace(path)

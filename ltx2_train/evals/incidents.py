"""What happened to a run on its way: marks on its curves, and the list of them."""

from collections.abc import Sequence
from typing import Any

from ltx2_train.evals.charts import StepMark
from ltx2_train.evals.runrecord import RunRecord

LISTED = 200
EXPECTED = ("checkpoint", "heldout", "samples")  # events that are no incident, and their relatives of other datasets
KINDS = {
    "update_skipped": ("fault", "update skipped"),
    "rolled_back": ("fault", "rolled back"),
    "resumed": ("restart", "started again"),
    "bad_record": ("record", "damaged record left out"),
    "straggler": ("slow", "a rank holds the others up"),
    "data_stall": ("slow", "waiting for data"),
    "evaluation_failed": ("record", "evaluation failed"),
    "evaluation_left_out": ("record", "checkpoint not evaluated"),
}
LEGEND = {
    "fault": "update skipped, rolled back or hung",
    "restart": "started again",
    "slow": "held up",
    "record": "other",
}


def incidents(run: RunRecord) -> list[dict[str, Any]]:
    """The events that are not of the ordinary course, in order of steps."""
    return [event for event in run.events if not event["event"].startswith(EXPECTED)]


def kind_of(event: dict[str, Any]) -> tuple[str, str]:
    """The style of an event's mark, and its name in words."""
    name = event["event"]
    if name == "resumed" and event.get("after") == "a hang":
        return "fault", "started again after a hang"
    return KINDS.get(name, ("record", name.replace("_", " ")))


def step_marks(events: Sequence[dict[str, Any]]) -> list[StepMark]:
    """One mark per step and kind."""
    found: dict[tuple[int, str], StepMark] = {}
    for event in events:
        style, words = kind_of(event)
        found.setdefault((event.get("step", 0), words), StepMark(event.get("step", 0), style, f"{words}, {_at(event)}"))
    return list(found.values())


def incident_list(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Rows for a table, the newest `LISTED` of them, and the legend of their marks."""
    if not events:
        return None
    rows = [
        {"step": event.get("step", ""), "style": kind_of(event)[0], "what": kind_of(event)[1], "text": details(event)}
        for event in events[-LISTED:]
    ]
    styles = {kind_of(event)[0] for event in events}
    legend = [{"style": style, "name": name} for style, name in LEGEND.items() if style in styles]
    return {"rows": rows, "count": len(events), "legend": legend}


def details(event: dict[str, Any]) -> str:
    """The message of an event, or its values in words."""
    if event.get("message"):
        return str(event["message"])
    values = {k: v for k, v in event.items() if k not in ("event", "step", "time") and isinstance(v, str | int | float)}
    text = ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in values.items())
    keys = event.get("keys") or []
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return f"{text}; samples {', '.join(keys[:4])}{more}" if keys else text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _at(event: dict[str, Any]) -> str:
    return f"step {event.get('step', 0)}: {details(event)}"[:240]

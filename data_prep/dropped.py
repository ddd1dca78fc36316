"""Clips that are left out, or kept but changed: why, and the row that names each in `dropped.jsonl`."""

from enum import StrEnum

from ltx2_train.errors import DataError
from ltx2_train.media.probe import NoSuchFileError, TruncatedError

DROPPED_NAME = "dropped.jsonl"


class EmptyCaption(StrEnum):
    """What becomes of a clip without a caption: kept, it trains the null context."""

    DROP = "drop"
    KEEP = "keep"


class Dropped(DataError):
    """Why a clip is left out; counted and listed, never fatal."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def drop_reason(error: DataError) -> str:
    """How the tables call what is wrong with a file."""
    if isinstance(error, Dropped):
        return error.reason
    return {TruncatedError: "truncated", NoSuchFileError: "missing_file"}.get(type(error), "corrupt")


def drop(file: str, reason: str, detail: str, shard: str | None = None) -> dict[str, str]:
    """A row of `dropped.jsonl`; `shard`: the one that the file is a record of."""
    return {"file": file} | ({} if shard is None else {"shard": shard}) | {"reason": reason, "detail": detail}

"""What a text encoder is: captions to the features that a dataset stores."""

from collections.abc import Sequence
from typing import Protocol

from ltx2_train.record import TextFeatures

MAX_ROWS = 1024  # of a caption; the released models have as many rows of context


class TextEncoder(Protocol):
    name: str  # name and version or fingerprint: goes into the manifest, a mismatch is refused
    video_width: int
    audio_width: int

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features per caption, valid rows only. The empty caption gives the null context (at least one row)."""

    def num_rows(self, caption: str) -> int:
        """Text tokens of a caption, those of them that are encoded."""

    def rows_cut(self, caption: str) -> int:
        """How many rows `encode` leaves away because the caption is longer than the encoder takes; mostly 0."""

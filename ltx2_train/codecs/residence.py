"""Where the codecs lie: on a device while they work, in the machine's memory while the model does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class Movable(Protocol):
    """What of a codec is needed here."""

    def to(self, device: torch.device | str) -> None:
        """Has all that it holds lie on the device, and what it gives too."""


@contextmanager
def at_work(device: torch.device, *codecs: Movable) -> Iterator[None]:
    """The codecs on `device` inside the block, and in the machine's memory behind it, whatever happens."""
    try:
        for codec in codecs:
            codec.to(device)
        yield
    finally:
        rest(*codecs)


def rest(*codecs: Movable) -> None:
    """Has the codecs lie in the machine's memory."""
    for codec in codecs:
        codec.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

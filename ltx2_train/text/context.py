"""Contexts in the place of features: what the frozen connectors make of them, so that training runs without connectors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ltx2_train.record import TextFeatures
from ltx2_train.text.encoder import MAX_ROWS, TextEncoder
from ltx2_train.text.features import MARK

Connect = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def connectors_mark(fingerprint: str) -> str:
    """How connectors stand in the name of what went through them."""
    return f"connectors:{fingerprint[:MARK]}"


class ContextEncoder:
    """A text encoder whose rows are the context that the transformer attends to, `size` of them for every caption."""

    def __init__(self, features: TextEncoder, connect: Connect, fingerprint: str, size: int = MAX_ROWS) -> None:
        """`connect(video, audio, mask, size)`: the connectors, features (1, L, W) and mask (1, L) to contexts (1, size, W).

        `fingerprint` is that of their weights.
        """
        self.features, self.connect, self.size = features, connect, size
        self.name = f"{features.name}+{connectors_mark(fingerprint)}"
        self.video_width, self.audio_width = features.video_width, features.audio_width

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Contexts per caption on the CPU: `video` (size, Wv) and `audio` (size, Wa), all rows valid."""
        return [self._connected(text) for text in self.features.encode(captions)]

    def num_rows(self, caption: str) -> int:
        """Text tokens of a caption, before the connectors fill up to `size` rows."""
        return self.features.num_rows(caption)

    def rows_cut(self, caption: str) -> int:
        """Text tokens of a caption that the features leave away."""
        return self.features.rows_cut(caption)

    def _connected(self, text: TextFeatures) -> TextFeatures:
        mask = torch.ones(1, len(text.video), dtype=torch.bool)
        video, audio = self.connect(text.video[None], text.audio[None], mask, self.size)
        return TextFeatures(video[0].cpu(), audio[0].cpu())

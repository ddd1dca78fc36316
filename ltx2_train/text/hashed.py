"""Text features without weights: every word is a fixed random direction, shared between words that share letters.

A stand-in for trying, testing and debugging: it knows which words a caption has and roughly where, and nothing of what
they mean. The same caption gives the same features on every machine.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ltx2_train.errors import ConfigError
from ltx2_train.record import TextFeatures
from ltx2_train.text.encoder import MAX_ROWS

NAME = "hashed-1"
START = "\x02"  # the row that every caption opens with: the empty caption is this row alone
PIECE_SIZE = 3  # letters of the pieces that related words share
WORD_SHARE, PIECE_SHARE, PREVIOUS_SHARE, POSITION_SHARE = 0.55, 0.2, 0.1, 0.15  # of a row's variance
LONGEST_WAVE = 1000.0  # rows


class HashedTextEncoder:
    """One row per word or punctuation mark, behind one start row."""

    name = NAME

    def __init__(self, video_width: int, audio_width: int) -> None:
        for name, width in (("video_width", video_width), ("audio_width", audio_width)):
            if width < 2:
                raise ConfigError(f"{name}: {width}; the text features need a width of at least 2")
        self.video_width, self.audio_width = video_width, audio_width

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features per caption: `video` (L, video_width) and `audio` (L, audio_width) fp32 of about unit variance."""
        return [self._features(tokens(caption)) for caption in captions]

    def num_rows(self, caption: str) -> int:
        """Rows of a caption's features."""
        return len(tokens(caption))

    def rows_cut(self, caption: str) -> int:
        """How many rows of a caption lie beyond `MAX_ROWS`."""
        return max(0, len(_words(caption)) - MAX_ROWS)

    def _features(self, words: list[str]) -> TextFeatures:
        return TextFeatures(_rows(words, "video", self.video_width), _rows(words, "audio", self.audio_width))


def tokens(caption: str) -> list[str]:
    """The start mark, then lower-case words and punctuation marks in order, at most `MAX_ROWS` in all."""
    return _words(caption)[:MAX_ROWS]


def _words(caption: str) -> list[str]:
    return [START, *re.findall(r"\w+|[^\w\s]", caption.lower())]


def _rows(words: list[str], stream: str, width: int) -> Tensor:
    """(L, width): word, its pieces, the pair with the word before, the position, in fixed shares of the variance."""
    rows = []
    for previous, word in zip(["", *words[:-1]], words, strict=True):
        own, pieces = _direction(f"{stream}:word:{word}", width), _pieces(word, stream, width)
        pair = _direction(f"{stream}:pair:{previous}:{word}", width)
        rows.append(_mix((WORD_SHARE, own), (PIECE_SHARE, pieces), (PREVIOUS_SHARE, pair)))
    return torch.stack(rows) + math.sqrt(POSITION_SHARE) * _positions(len(words), width)


def _mix(*parts: tuple[float, Tensor]) -> Tensor:
    return sum((math.sqrt(share) * part for share, part in parts), torch.zeros(()))


def _pieces(word: str, stream: str, width: int) -> Tensor:
    """The normalised sum over the letter groups of `word`: words that share letters point in similar directions."""
    marked = f"<{word}>"
    pieces = [marked[i : i + PIECE_SIZE] for i in range(max(1, len(marked) - PIECE_SIZE + 1))]
    return torch.stack([_direction(f"{stream}:piece:{p}", width) for p in pieces]).sum(dim=0) / math.sqrt(len(pieces))


@lru_cache(maxsize=65536)
def _direction(key: str, width: int) -> Tensor:
    """(width,) fp32 standard normal numbers that depend on the key alone (Box-Muller of a BLAKE2 stream, in fp64)."""
    words_needed = 2 * ((width + 1) // 2)
    blocks = (hashlib.blake2b(f"{i}:{key}".encode(), digest_size=64).digest() for i in range(-(-words_needed // 16)))
    numbers = np.frombuffer(b"".join(blocks), dtype="<u4")[:words_needed].astype(np.float64)
    uniform = (numbers + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:width]
    return torch.from_numpy(normal.astype(np.float32))


def _positions(length: int, width: int) -> Tensor:
    """(L, width) sinusoids of unit mean square, wavelengths from 2 pi to `LONGEST_WAVE` rows."""
    half = (width + 1) // 2
    frequencies = torch.exp(-math.log(LONGEST_WAVE) * torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
    return (math.sqrt(2) * waves).float()

"""The released text encoder: a language model's hidden states of all layers through a checkpoint's feature extractor."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from ltx2_train.errors import CheckpointError
from ltx2_train.record import TextFeatures
from ltx2_train.text.encoder import MAX_ROWS
from ltx2_train.text.features import MARK, FeatureExtractor, Projection, check_width, open_projection
from ltx2_train.text.gemma import GEMMA_3, Gemma, GemmaFolder, Quantisation, Tokenizer, open_gemma

BATCH_TOKENS = 4096  # that go through the language model together, padding counted


class ReleasedTextEncoder:
    """Captions to the features that the released checkpoints were trained with: what lies before the connectors.

    Weights are read when the first caption is encoded, so that its name costs nothing.
    """

    def __init__(
        self,
        gemma: str | Path,
        weights: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quantisation: Quantisation = Quantisation.NONE,
    ) -> None:
        """`gemma`: a local folder of the language model; `weights`: the file or folder with the text projection.

        `dtype` None: bf16 on a GPU, as released, and fp32 elsewhere. Raises `CheckpointError` when the two do not belong
        together.
        """
        self.folder, self.projection = open_gemma(gemma), open_projection(weights)
        check_belongs(self.folder, self.projection)
        self.device, self.quantisation = torch.device(device), Quantisation(quantisation)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.video_width, self.audio_width = self.projection.widths
        self.name = name_of(self.folder, self.projection)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder)

    @cached_property
    def gemma(self) -> Gemma:
        return Gemma(self.folder, device=self.device, dtype=self.dtype, quantisation=self.quantisation)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        return self.projection.read(dtype=self.dtype, device=self.device)

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features per caption on the CPU, one row per token in order; the empty caption is the row of BOS.

        Captions of like length go through the model together.
        """
        tokens = [self.tokenizer.cut(caption) for caption in captions]
        found: dict[int, TextFeatures] = {}
        for places in _batches([len(ids) for ids in tokens]):
            found |= zip(places, self._encode([tokens[i] for i in places]), strict=True)
        return [found[i] for i in range(len(captions))]

    def num_rows(self, caption: str) -> int:
        """Rows of a caption's features."""
        return len(self.tokenizer.cut(caption))

    def rows_cut(self, caption: str) -> int:
        """Tokens of a caption beyond the 1024 that the released models take."""
        return max(0, len(self.tokenizer(caption)) - MAX_ROWS)

    def _encode(self, tokens: Sequence[Sequence[int]]) -> Iterator[TextFeatures]:
        states, mask = self.gemma.hidden_states(tokens)
        video, audio = self.extractor(states, mask)
        for row, valid in enumerate(mask):
            yield TextFeatures(video[row, valid].cpu(), audio[row, valid].cpu())


def name_of(folder: GemmaFolder, projection: Projection) -> str:
    """Kinds and fingerprints of language model and projection."""
    kind = "gemma3" if folder.model_type in GEMMA_3 else "gemma4"
    return f"{kind}:{folder.fingerprint[:MARK]}+{projection.name}"


def check_belongs(folder: GemmaFolder, projection: Projection) -> None:
    """Raises `CheckpointError` naming both, unless a checkpoint's projection was made for this language model."""
    wanted, found = projection.gemma_version, folder.gemma_version or folder.model_type
    if wanted is not None and wanted != found:
        raise CheckpointError(
            f"{folder.path} is {found!r}, and {projection.source} was trained with the text encoder {wanted!r} "
            "(gemma_source_checkpoint in its header). Give the folder of that one"
        )
    if wanted is None and projection.is_official and folder.model_type not in GEMMA_3:
        raise CheckpointError(
            f"{folder.path} is {folder.model_type!r}, and {projection.source} was trained with Gemma 3 (it names no other "
            "in its header). Give a folder whose model_type is gemma3"
        )
    check_width(
        f"{projection.source} (with {folder.path})", projection.input_width, folder.hidden_size, folder.num_states
    )
    if projection.caption_channels not in (None, folder.hidden_size):
        raise CheckpointError(
            f"{folder.path} has hidden states of {folder.hidden_size}, and {projection.source} was trained on "
            f"{projection.caption_channels} (caption_channels). Give the folder of its text encoder"
        )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of captions, the longest first, in batches of at most `BATCH_TOKENS` tokens, padding counted."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, BATCH_TOKENS // lengths[order[0]])
        yield order[:size]
        order = order[size:]

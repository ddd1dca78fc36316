"""A text encoder with the connectors of a released file behind it, for data that hold contexts in the place of features."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ltx2_train.errors import CheckpointError
from ltx2_train.model.connector import Connectors
from ltx2_train.model.weights import CONNECTOR_NAMES, load_connectors, read_weights
from ltx2_train.text import ContextEncoder, TextEncoder, connectors_mark, fingerprint_of
from ltx2_train.weightfile import Stored


def context_encoder(features: TextEncoder, path: str, device: str) -> ContextEncoder:
    """`features` through the connectors of a released file or folder, which are read with the first caption.

    Raises `CheckpointError` when there are none in it, or not for features of these widths.
    """
    config, tensors = read_weights(path)
    needed, found = (
        (config.video_connector_width, config.audio_connector_width),
        (features.video_width, features.audio_width),
    )
    if needed != found:
        raise CheckpointError(
            f"{path}: its connectors take features of widths {needed}, the text encoder {features.name} gives {found}. "
            "Give the connectors of the checkpoint that the text projection is from"
        )
    own = _connectors_of(tensors)
    if not own:
        raise CheckpointError(
            f"{path}: no text connectors in it, which make contexts of features. Give the file that has them: the whole "
            "checkpoint of 2.0 and 2.3, the transformer's file of 2.5"
        )

    @cache
    def connectors() -> Connectors:
        return load_connectors(path, dtype=_dtype_on(device), device=device).eval().requires_grad_(False)

    def connect(video: Tensor, audio: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return connectors()(video.to(device), audio.to(device), mask.to(device), size)

    return ContextEncoder(features, connect, fingerprint_of(own))


def connectors_name(path: str) -> str | None:
    """The last part of the name of contexts that the connectors of a file or folder make; None where it has none."""
    own = _connectors_of(read_weights(path)[1])
    return connectors_mark(fingerprint_of(own)) if own else None


def _connectors_of(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(CONNECTOR_NAMES)}


def _dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32

"""Hidden states of a language model to text features: the two feature extractors of the released checkpoints.

V1 (2.0) brings every layer of a caption to one range and projects once, for both streams. V2 (2.3, 2.5) brings every
token of every layer to unit mean square and projects for each stream. Source: LTX-2 (arXiv:2601.03233) section 3.3.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.errors import CheckpointError
from ltx2_train.weightfile import FINGERPRINT_BYTES, FP8, Finite, Stored, WeightFile, check_floating, open_weights

logger = logging.getLogger(__name__)

PREFIX = "text_embedding_projection."
SHARED, VIDEO, AUDIO = "aggregate_embed", "video_aggregate_embed", "audio_aggregate_embed"
V1_TENSORS = (f"{SHARED}.weight",)
V2_TENSORS = tuple(f"{stream}.{kind}" for stream in (VIDEO, AUDIO) for kind in ("weight", "bias"))
# Fields of config.transformer: none of them stands for V1, all of them with these values for V2.
V2_SETTINGS = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}
DIFFUSERS_NAMES = {"text_proj_in": SHARED, "video_text_proj_in": VIDEO, "audio_text_proj_in": AUDIO}
RANGE = 8.0  # of a normalised layer of V1
EPS = 1e-6
MARK = 12  # letters of a fingerprint in a name
CONNECTORS = "connectors"  # the sub-folder of a diffusers pipeline that has the projections
CONNECTORS_CLASS = "LTX2TextConnectors"


class FeatureExtractor(nn.Module):
    """Hidden states of all layers to the features of both streams.

    The statistics are taken in the dtype of the hidden states, because the released models were trained on features of
    bf16 states normalised in bf16. Give fp32 states for more exact features.
    """

    def __init__(self, version: int, projections: Mapping[str, nn.Linear], source: str) -> None:
        super().__init__()
        self.version = version
        self.source = source
        for name, linear in projections.items():
            self.add_module(name, linear)

    @property
    def input_width(self) -> int:
        """Hidden states of a token times their width."""
        return self._projection(VIDEO).in_features

    @torch.no_grad()
    def forward(self, hidden_states: Sequence[Tensor] | Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Video (B, L, Wv) and audio (B, L, Wa) features.

        `hidden_states`: (B, L, D) of each layer, or stacked (B, L, D, layers). `mask` (B, L): 1 = text, on any side;
        features where it is 0 mean nothing. Computed in the wider of the dtypes of states and weights. Raises
        `CheckpointError` when the states are not as wide or as many as the weights need.
        """
        layers = hidden_states.unbind(-1) if isinstance(hidden_states, Tensor) else hidden_states
        width = layers[0].shape[-1]
        check_width(self.source, self.input_width, width, len(layers))
        valid = mask.bool()[..., None]
        normalise = _to_range if self.version == 1 else _to_unit_square
        normed = torch.stack([normalise(layer, valid) for layer in layers], dim=-1).flatten(2)  # the layer is fastest
        if self.version == 1:
            features = _project(self._projection(VIDEO), normed)
            return features, features
        video, audio = self._projection(VIDEO), self._projection(AUDIO)
        return tuple(_project(p, normed * (p.out_features / width) ** 0.5) for p in (video, audio))  # type: ignore[return-value]

    def _projection(self, stream: str) -> nn.Linear:
        return self.get_submodule(SHARED if self.version == 1 else stream)  # type: ignore[return-value]


def _project(linear: nn.Linear, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, linear.weight.dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return nn.functional.linear(x.to(dtype), linear.weight.to(dtype), bias)


def _to_range(layer: Tensor, valid: Tensor) -> Tensor:
    """`layer` (B, L, D) of each caption around its mean, over its range, times `RANGE`; 0 where it is not `valid`."""
    count = valid.sum(dim=(1, 2), keepdim=True) * layer.shape[-1]
    mean = layer.masked_fill(~valid, 0).sum(dim=(1, 2), keepdim=True) / (count + EPS)
    least = layer.masked_fill(~valid, torch.inf).amin(dim=(1, 2), keepdim=True)
    most = layer.masked_fill(~valid, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return ((layer - mean) / (most - least + EPS) * RANGE).masked_fill(~valid, 0).to(layer.dtype)


def _to_unit_square(layer: Tensor, valid: Tensor) -> Tensor:
    """`layer` (B, L, D) over the root mean square of each token; 0 where it is not `valid`."""
    normed = layer * torch.rsqrt(layer.square().mean(dim=-1, keepdim=True) + EPS)
    return normed.masked_fill(~valid, 0)


def check_width(source: str, input_width: int, width: int, states: int) -> None:
    """Raises `CheckpointError` unless `states` hidden states of `width` are what the projection takes."""
    if width * states != input_width:
        raise CheckpointError(
            f"{source}: its text projection takes {input_width} numbers per token, the language model gives {states} "
            f"hidden states of {width} = {width * states}. Use the text encoder that this checkpoint was trained with"
        )


# --- files ---


@dataclass(frozen=True, slots=True)
class Projection:
    """The text projection of a released file, not read yet."""

    source: str  # the file or folder, for messages
    version: int  # 1 or 2
    tensors: Mapping[str, Stored]  # under official names, without prefix
    caption_channels: int | None  # width of a hidden state, where it is told
    gemma_version: str | None  # of the language model, where it is told
    is_official: bool  # False: a diffusers folder, whose header tells nothing of the language model

    @property
    def input_width(self) -> int:
        return self.tensors[self._weight(VIDEO)].shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        """Of the video and of the audio features."""
        return self.tensors[self._weight(VIDEO)].shape[0], self.tensors[self._weight(AUDIO)].shape[0]

    @property
    def fingerprint(self) -> str:
        """The same for the same projection in whatever file: see `fingerprint_of`."""
        return fingerprint_of(self.tensors)

    @property
    def name(self) -> str:
        """Kind and fingerprint: the part of a released text encoder's name behind that of the language model."""
        return f"features-v{self.version}:{self.fingerprint[:MARK]}"

    def read(self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
        """The extractor; `dtype` None keeps what is on disk."""
        names = dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)
        linears = {name: self._linear(name) for name in names}
        extractor = FeatureExtractor(self.version, linears, self.source)
        finite = {name: Finite(stored, f"{self.source}: {PREFIX}{name}") for name, stored in self.tensors.items()}
        read = {name: stored.read().to(device=device, dtype=dtype) for name, stored in finite.items()}
        extractor.load_state_dict(read, strict=True, assign=True)
        return extractor.eval().requires_grad_(False)

    def _linear(self, name: str) -> nn.Linear:
        rows, columns = self.tensors[f"{name}.weight"].shape
        return nn.Linear(columns, rows, bias=f"{name}.bias" in self.tensors, device="meta")

    def _weight(self, stream: str) -> str:
        return f"{SHARED if self.version == 1 else stream}.weight"


def load_feature_extractor(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The feature extractor of a released file, of a split text file, or of a diffusers folder. See `open_projection`."""
    return open_projection(path).read(dtype=dtype, device=device)


def projection_name(path: str | Path) -> str:
    """`features-vN:FP`, the end of the `name` of every released text encoder with this projection. Reads little.

    Raises as `open_projection`.
    """
    return open_projection(path).name


def has_projection(path: str | Path) -> bool:
    """Whether a released file or folder, of whatever parts, has a text projection among them.

    A sub-folder of a diffusers pipeline has what stands beside it. Raises `CheckpointError` for what is no weights.
    """
    path = Path(path)
    if folder := _converted_folder(path):
        return _is_connectors(folder) and bool(_from_diffusers(folder).tensors)
    is_pipeline = any(os.path.isfile(path / name) for name in ("model_index.json", "transformer/config.json"))
    return not is_pipeline and bool(open_weights(path).under(PREFIX))


def open_projection(path: str | Path) -> Projection:
    """The text projection of a released file, of a split text file, or of a diffusers pipeline or connectors folder.

    Which extractor it belongs to is what `config.transformer` says; a split text file, which may have no such section, is
    known by its keys. Raises `CheckpointError` for settings between the two, and for missing, surplus or misshapen tensors.
    """
    folder = _converted_folder(Path(path))
    found = _from_diffusers(folder) if folder is not None else _from_official(open_weights(path))
    _check_tensors(found)
    return found


def _converted_folder(path: Path) -> Path | None:
    """The folder of diffusers' text connectors: `path`, inside it or beside it; None for the official layout."""
    is_component = os.path.isfile(path / "config.json")
    places = [path, path / CONNECTORS, path.parent / CONNECTORS] if is_component else [path / CONNECTORS]
    there = [folder for folder in places if os.path.isfile(folder / "config.json")]
    return next((folder for folder in there if _is_connectors(folder)), next(iter(there), None))


def _is_connectors(folder: Path) -> bool:
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = None  # whoever reads it says what is wrong with it
    return kind == CONNECTORS_CLASS or (kind is None and folder.name == CONNECTORS)


def _from_official(weights: WeightFile) -> Projection:
    tensors = weights.under(PREFIX)
    if not tensors:
        raise CheckpointError(
            f"{weights.path}: no {PREFIX}* in it. Give the file that holds the text projections: the monolith of 2.0 and "
            "2.3, the text encoder's file of 2.5, or a diffusers folder"
        )
    if quantised := sum(weights.stored[PREFIX + name].dtype in FP8 for name in tensors):
        logger.warning("%s: %d of the text projection's tensors are FP8; they are dequantised", weights.path, quantised)
    config = weights.metadata.get("config")
    section = config.get("transformer") if isinstance(config, dict) else None
    source = str(weights.path)
    version = _version(section, source) if isinstance(section, dict) else 1 + (f"{VIDEO}.weight" in tensors)
    channels = section.get("caption_channels") if isinstance(section, dict) else None
    return Projection(source, version, tensors, channels, _gemma_version(weights), is_official=True)


def _version(section: Mapping[str, Any], source: str) -> int:
    given = {name: section[name] for name in V2_SETTINGS if name in section}
    if not given:
        return 1
    if given != V2_SETTINGS:
        told = ", ".join(f"{name}={given.get(name, 'absent')}" for name in V2_SETTINGS)
        needed = ", ".join(f"{name}={value}" for name, value in V2_SETTINGS.items())
        raise CheckpointError(
            f"{source}: config.transformer has {told}; supported are none of them (2.0) or {needed} (2.3, 2.5)"
        )
    return 2


def _gemma_version(weights: WeightFile) -> str | None:
    origin = weights.metadata.get("gemma_source_checkpoint")
    return str(origin["gemma_version"]) if isinstance(origin, dict) and "gemma_version" in origin else None


def _from_diffusers(folder: Path) -> Projection:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        version, channels = 2 if config["per_modality_projections"] else 1, config["caption_channels"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: not the configuration of text connectors ({error!r}). "
            "Give a diffusers pipeline folder, its connectors folder, or a file in the official layout"
        ) from error
    tensors = {
        f"{DIFFUSERS_NAMES[module]}.{kind}": stored
        for key, stored in open_weights(folder).items()
        for module, _, kind in [key.partition(".")]
        if module in DIFFUSERS_NAMES
    }
    return Projection(str(folder), version, tensors, channels, None, is_official=False)


def _check_tensors(found: Projection) -> None:
    wanted = V1_TENSORS if found.version == 1 else V2_TENSORS
    wrong = list(_wrong_tensors(found, wanted))
    if wrong:
        raise CheckpointError(
            f"{found.source}: not the text projection of extractor V{found.version}: {'; '.join(wrong)}"
        )
    check_floating({PREFIX + name: tensor for name, tensor in found.tensors.items()}, found.source)
    if not _fits(found.caption_channels, found.input_width):
        raise CheckpointError(
            f"{found.source}: the text projection takes {found.input_width} numbers per token, which is no whole number "
            f"of hidden states of caption_channels={found.caption_channels!r}"
        )


def _fits(width: Any, input_width: int) -> bool:
    """Whether hidden states of a width that a header states, if it does, fill the input."""
    return width is None or (isinstance(width, int) and width > 0 and input_width % width == 0)


def _wrong_tensors(found: Projection, wanted: Sequence[str]) -> Iterator[str]:
    tensors = found.tensors
    yield from (f"missing {PREFIX}{name}" for name in wanted if name not in tensors)
    yield from (f"surplus {PREFIX}{name}" for name in tensors if name not in wanted)
    for name, stored in tensors.items():
        weight = tensors.get(name.removesuffix("bias") + "weight")
        if len(stored.shape) != (1 if name.endswith(".bias") else 2):
            yield f"{PREFIX}{name} is {list(stored.shape)}"
        elif name.endswith(".bias") and weight is not None and stored.shape[0] != weight.shape[0]:
            yield f"{PREFIX}{name} is {list(stored.shape)}, needs [{weight.shape[0]}]"
    widths = {tensors[name].shape[-1] for name in wanted if name.endswith("weight") and name in tensors}
    if len(widths) > 1:
        yield f"video and audio take hidden states of different widths {sorted(widths)}"


def fingerprint_of(tensors: Mapping[str, Stored]) -> str:
    """SHA-256 over name, dtype, shape and first 4 KiB of each tensor of a component, whatever lies beside it in a file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
        row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
        rows = min(stored.shape[0], -(-FINGERPRINT_BYTES // max(1, row_bytes))) if stored.shape else 0
        first = stored.rows(0, rows) if stored.shape else stored.read()
        digest.update(first.contiguous().view(-1).view(torch.uint8)[:FINGERPRINT_BYTES].numpy().tobytes())
    return digest.hexdigest()

"""What was trained, in the layouts that load elsewhere, and a count of what it changed.

Tensors are named as in the released files, without prefix, and pass through one at a time: read, changed, compared with
what they were, rounded once, written.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx2_train.errors import CheckpointError
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.diffusers_names import (
    CONNECTORS_CLASS,
    PROJECTIONS,
    TRANSFORMER_CLASS,
    connectors_from_diffusers,
    connectors_to_diffusers,
    diffusers_config,
    diffusers_connectors_config,
    text_states,
    to_diffusers,
)
from ltx2_train.model.generation import UNKNOWN, generation_of
from ltx2_train.model.lora_file import BASE_GENERATION, Adapter
from ltx2_train.model.weights import (
    CONNECTOR_NAMES,
    PREFIX,
    diffusers_folders,
    fingerprint,
    read_weights,
    released_dtype,
)
from ltx2_train.weightfile import Deferred, Stored, WeightFile, open_weights, write_weights

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
BASE_FINGERPRINT = "base_fingerprint"  # of a header; only what was trained on a base has it
QUANTISATION = "_quantization_metadata"  # of a header; what is written here is dequantised
TABLES = (
    "sampler_profile",
    "provenance",
    "clip_size",
    "sampled_streams",
)  # of what is written here; JSON in a header's string
TRANSFORMER_SECTIONS = ("transformer", "scheduler")  # of the header's config, in a file of the transformer alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where exported weights come from, for the header of every form."""

    step: int
    weights: str
    """ "ema" or "raw"."""
    base_generation: str
    base_name: str | None = None
    base_fingerprint: str | None = None
    trigger_word: str | None = None
    reference_downscale_factor: int = 1
    reference_temporal_scale_factor: int = 1
    sampler_profile: Mapping[str, Any] = field(default_factory=dict)
    text_tokens: int | None = None
    """Rows of text context that they were trained with."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What made the data that they were trained on, as a dataset's manifest names it."""
    clip_size: Mapping[str, Any] = field(default_factory=dict)
    """Frames, width, height and fps of most of that data; empty where they are not known."""
    sampled_streams: Sequence[str] = ()
    """What they were trained to make."""

    def metadata(self) -> dict[str, str]:
        """What is known of it, as strings. Reference factors of 1 are left out, as everywhere."""
        given = {
            "base_name": self.base_name,
            BASE_FINGERPRINT: self.base_fingerprint,
            "trigger_word": self.trigger_word,
            "text_tokens": None if self.text_tokens is None else str(self.text_tokens),
        }
        tables = {name: getattr(self, name) for name in TABLES}
        factors = ("reference_downscale_factor", "reference_temporal_scale_factor")
        return {
            "step": str(self.step),
            "weights": self.weights,
            BASE_GENERATION: self.base_generation,
            **{name: value for name, value in given.items() if value is not None},
            **{name: json.dumps(table) for name, table in tables.items() if table},
            **{name: str(getattr(self, name)) for name in factors if getattr(self, name) != 1},
        }


class Base:
    """Released weights that an export stands on: a single file, a split transformer, or folders of diffusers.

    Raises `CheckpointError` for what is none of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.tensors = read_weights(path)
        self._folders = diffusers_folders(path)
        if self._folders and TRANSFORMER_CLASS not in self._folders:
            raise CheckpointError(f"{path}: connectors alone. Name the folder that has transformer/ beside connectors/")

    @cached_property
    def file(self) -> WeightFile | None:
        """The file in the official layout; None where the base is one of diffusers' folders."""
        return None if self._folders else open_weights(self.path)

    @property
    def fingerprint(self) -> str:
        """As `weights.fingerprint` has it."""
        return fingerprint(self.path)

    @property
    def from_scratch(self) -> bool:
        """Whether its header says that it was exported from a run that began from scratch."""
        header = {} if self.file is None else self.file.metadata
        return BASE_GENERATION in header and BASE_FINGERPRINT not in header

    @property
    def siblings(self) -> dict[str, Stored]:
        """What else lies in the file: VAEs, vocoder, text projections, anything; by whole keys."""
        return {} if self.file is None else {key: t for key, t in self.file.items() if not key.startswith(PREFIX)}

    @property
    def projections(self) -> dict[str, Stored]:
        """The text projections, by whole official keys; empty where they are not in the base."""
        if CONNECTORS_CLASS in self._folders:
            connectors = open_weights(self._folders[CONNECTORS_CLASS])
            found = {connectors_from_diffusers(key): tensor for key, tensor in connectors.items()}
        else:
            found = self.siblings
        return {key: tensor for key, tensor in found.items() if key.startswith(PROJECTIONS)}

    def metadata(self, sections: Iterable[str] | None = None) -> dict[str, str]:
        """The header as strings; of its config only `sections` where they are given."""
        if self.file is None:
            return stated_metadata(self.config)
        header = {key: value for key, value in self.file.metadata.items() if key != QUANTISATION}
        if sections is not None:
            header["config"] = {name: section for name, section in self.file.config().items() if name in sections}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}


def stated_metadata(config: TransformerConfig) -> dict[str, str]:
    """The header of a file without a base: the architecture, and the version of its generation."""
    generation = generation_of(config)
    version = {} if generation == UNKNOWN else {"model_version": f"{generation}.0"}
    return {"config": json.dumps({"transformer": config.to_header()}), **version}


# --- tensors on their way ---


def adapted(tensors: Mapping[str, Stored], adapters: Mapping[str, Adapter]) -> dict[str, Stored]:
    """The tensors with the adapters' change in the weights they belong to: summed in fp32, rounded once when cast.

    Raises `CheckpointError` for an adapter without its weight.
    """
    weights = {f"{module}.weight": adapter for module, adapter in adapters.items()}
    wrong = [name for name, one in weights.items() if name not in tensors or tensors[name].shape != one.shape]
    if wrong:
        raise CheckpointError(
            f"the base has no {wrong[0]} of shape {list(weights[wrong[0]].shape)}. Give the run's base"
        )
    return {name: _sum(t, weights[name]) if name in weights else t for name, t in tensors.items()}


def _sum(tensor: Stored, adapter: Adapter) -> Stored:
    return Deferred(torch.float32, tensor.shape, lambda: tensor.read().float() + adapter.change())


def cast(tensor: Stored, dtype: torch.dtype) -> Stored:
    """The tensor in `dtype`; itself where it is."""
    return tensor if tensor.dtype == dtype else Deferred(dtype, tensor.shape, lambda: tensor.read().to(dtype))


def export_dtype(name: str, before: Stored | None, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor is written in: as in the base, else as published; matrices in `wanted` where that is given."""
    if wanted is None and before is not None:
        return before.dtype
    published = released_dtype(name)
    return published if wanted is None or published is torch.float32 else wanted


class InOrder:
    """Tensors that come by once, as values that are read in that order."""

    def __init__(self, pairs: Iterator[tuple[str, Tensor]]) -> None:
        self._pairs = pairs

    def stored(self, name: str, shape: torch.Size) -> Stored:
        """The fp32 tensor that comes by as `name`."""
        return Deferred(torch.float32, shape, lambda: self._take(name).float())

    def _take(self, name: str) -> Tensor:
        found = next((tensor for passing, tensor in self._pairs if passing == name), None)
        assert found is not None, f"{name} was asked for out of order, or never came"
        return found


# --- layouts ---


def official_layout(
    config: TransformerConfig, tensors: Mapping[str, Stored], base: Base | None, *, with_siblings: bool
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Keys and header of one file in the official layout: `tensors`, then the base's siblings byte for byte."""
    written = {PREFIX + name: tensor for name, tensor in tensors.items()}
    if base is None:
        return written, stated_metadata(config)
    if with_siblings:
        return written | base.siblings, base.metadata()
    return written, base.metadata(TRANSFORMER_SECTIONS)


def write_diffusers(
    folder: Path,
    config: TransformerConfig,
    tensors: Mapping[str, Stored],
    projections: Mapping[str, Stored],
    metadata: Mapping[str, str],
    *,
    max_bytes: int | None = None,
) -> list[Path]:
    """Writes `transformer/` and, with the text projections at hand, `connectors/`; whole or not at all. The files.

    The transformer is written first. Raises `ConfigError` for connectors that diffusers cannot express.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    connectors = {name: tensor for name, tensor in tensors.items() if name.startswith(CONNECTOR_NAMES)}
    parts: dict[str, tuple[dict[str, Any], dict[str, Stored]]] = {
        "transformer": (
            diffusers_config(config),
            {to_diffusers(n): t for n, t in tensors.items() if n not in connectors},
        )
    }
    if projections:
        states = text_states(config, next(t.shape[1] for name, t in projections.items() if name.endswith(".weight")))
        everything = {connectors_to_diffusers(n): t for n, t in (connectors | dict(projections)).items()}
        parts["connectors"] = (diffusers_connectors_config(config, states), everything)
    files: list[Path] = []
    try:
        for name, (arguments, part) in parts.items():
            path, header = partial / name / DIFFUSERS_FILE, {**metadata, "format": "pt"}
            files += write_weights(path, part, header, max_bytes=max_bytes)
            (partial / name / "config.json").write_text(json.dumps(arguments, indent=2, sort_keys=True) + "\n")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / file.relative_to(partial) for file in files]


# --- what was changed ---

STREAMS = ("video", "audio", "audio-video")


def stream_of(name: str) -> str:
    """The stream that a tensor or module belongs to: "video", "audio", or "audio-video" for the exchange of the two."""
    if re.search(r"audio_to_video|video_to_audio|av_ca_|_a2v_ca_", name):
        return "audio-video"
    return "audio" if re.search(r"(^|\.)audio_", name) else "video"


@dataclass(slots=True)
class Tally:
    """What was counted in one stream. Norms are Frobenius norms over all its tensors, squared here."""

    linears: int = 0
    adapted: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    """Adapters that change nothing."""
    adapter_square: float = 0.0
    compared: int = 0
    unchanged: int = 0
    """Tensors that are what they were, to the last bit as written."""
    change_square: float = 0.0
    before_square: float = 0.0
    """Of the tensors that did change."""


class Coverage:
    """Counts, per stream, what an export changes."""

    def __init__(self, linears: Iterable[str]) -> None:
        """`linears`: the linear layers of the model."""
        self.tallies = {stream: Tally() for stream in STREAMS}
        for name in linears:
            self._of(name).linears += 1

    def _of(self, name: str) -> Tally:
        return self.tallies[stream_of(name)]

    def add_adapters(self, adapters: Mapping[str, Adapter]) -> None:
        """Counts adapters by what they change."""
        for module, adapter in adapters.items():
            tally, norm = self._of(module), adapter.norm()
            tally.adapted.append(module)
            tally.adapter_square += norm**2
            if not norm:
                tally.idle.append(module)

    def watched(self, name: str, before: Stored, after: Stored) -> Stored:
        """`after`, compared with what it was when it is read; without reading where it is the same."""
        if after is before:
            self._of(name).compared += 1
            self._of(name).unchanged += 1
            return after

        def compute() -> Tensor:
            old, new = before.read(), after.read()
            self._compare(self._of(name), old, new)
            return new

        return Deferred(after.dtype, after.shape, compute)

    def _compare(self, tally: Tally, old: Tensor, new: Tensor) -> None:
        tally.compared += 1
        if torch.equal(old.to(new.dtype), new):
            tally.unchanged += 1
            return
        tally.change_square += float((new.float() - old.float()).square().sum(dtype=torch.float64))
        tally.before_square += float(old.float().square().sum(dtype=torch.float64))

    def report(self) -> dict[str, dict[str, Any]]:
        """Per stream, plain values: what was counted."""
        return {stream: _plain(tally) for stream, tally in self.tallies.items() if tally.linears}

    def lines(self) -> list[str]:
        """The report for a person, a line per stream and one for every stream in which nothing happened."""
        return [line for stream, tally in self.tallies.items() if tally.linears for line in _lines(stream, tally)]


def _plain(tally: Tally) -> dict[str, Any]:
    plain: dict[str, Any] = {"linear_layers": tally.linears, "adapted": len(tally.adapted)}
    if tally.adapted:
        plain |= {"adapter_norm": sqrt(tally.adapter_square), "zero_adapters": tally.idle}
    if tally.compared:
        plain |= {
            "tensors": tally.compared,
            "unchanged": tally.unchanged,
            "change_norm": sqrt(tally.change_square),
            "relative_change": _relative(tally),
        }
    return plain


def _relative(tally: Tally) -> float:
    return sqrt(tally.change_square / tally.before_square) if tally.before_square else 0.0


def _lines(stream: str, tally: Tally) -> Iterator[str]:
    facts = [f"{tally.linears} linear layers"]
    if tally.adapted:
        facts.append(f"{len(tally.adapted)} adapted, norm of their change {sqrt(tally.adapter_square):.4g}")
    if tally.compared:
        changed = tally.compared - tally.unchanged
        facts.append(f"{changed} of {tally.compared} tensors changed, by {_relative(tally):.2g} of their norm")
    yield f"{stream:<12} " + "; ".join(facts)
    if tally.adapted and len(tally.idle) == len(tally.adapted):
        yield f"{stream:<12} no change: all {len(tally.idle)} adapters are zero"
    elif tally.idle:
        yield f"{stream:<12} {len(tally.idle)} adapters are zero, the first is {tally.idle[0]}"
    if tally.compared and tally.unchanged == tally.compared:
        yield f"{stream:<12} no change: every tensor is bit-equal to the base"

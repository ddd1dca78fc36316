"""Tiny files in the exact layout of the released ones: keys, dtypes, header metadata; the numbers in them are drawn.

2.0 and 2.3 are one file with everything, 2.5 is a file per component. Nobody's weights are needed to test what reads them.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.model.config import CONFIGURATIONS, TransformerConfig
from ltx2_train.model.connector import Connectors
from ltx2_train.model.transformer import Transformer
from ltx2_train.model.weights import PREFIX, released_dtype
from ltx2_train.rng import generator
from ltx2_train.testing.released_codecs import codec_sections
from ltx2_train.weightfile import write_weights

GENERATIONS = ("2.0", "2.3", "2.5")
PARTS = ("transformer", "text_projection", "video_vae", "audio_vae", "vocoder")
TEXT_PREFIX = "text_embedding_projection."
CODEC_PREFIXES = {"video_vae": "vae.", "audio_vae": "audio_vae.", "vocoder": "vocoder."}
TEXT_WIDTH = 36  # of the language model's hidden states
TEXT_STATES = 4  # hidden states of a token: the embedding and three layers
GEMMA = {"ltx_version": "2.5.0", "gemma_version": "gemma4-12b-ltx-v1"}

_NAMES = {"2.0": "ltx2_19b", "2.3": "ltx2_3_22b", "2.5": "ltx2_5_22b"}
_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 10,
    "cross_attention_dim": 40,
    "audio_cross_attention_dim": 20,
    "num_layers": 2,
    "caption_channels": TEXT_WIDTH,
    "connector_num_attention_heads": 2,
    "connector_num_layers": 2,
}
_CONNECTOR_SIZES: dict[str, Any] = {
    "2.0": {"connector_attention_head_dim": TEXT_WIDTH // 2},
    "2.3": {
        "connector_attention_head_dim": 20,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 10,
    },
}
_CONNECTOR_SIZES["2.5"] = _CONNECTOR_SIZES["2.3"]


@dataclass(frozen=True, slots=True)
class Release:
    """Where the components are; all the same file for 2.0 and 2.3."""

    transformer: Path
    text_projection: Path
    video_vae: Path
    audio_vae: Path
    vocoder: Path


def write_release(
    directory: Path, generation: str, *, seed: int = 0, parts: Collection[str] = PARTS, **sizes: Any
) -> Release:
    """Writes the files of a generation ("2.0", "2.3" or "2.5") and tells where they are.

    `parts` leaves components out, as some published files do; `sizes` replaces fields of the transformer's configuration.
    """
    config = tiny_config(generation, **sizes)
    tensors = {
        "transformer": transformer_tensors(config, seed),
        "text_projection": text_projection_tensors(generation, config=config, seed=seed),
    }
    sections = {"transformer": config.to_header(), "scheduler": {"_class_name": "RectifiedFlowScheduler"}}
    if CODEC_PREFIXES.keys() & parts:
        codec_headers, codecs = codec_sections(generation, seed)
        sections |= codec_headers
        tensors |= {part: {k: t for k, t in codecs.items() if k.startswith(p)} for part, p in CODEC_PREFIXES.items()}
    tensors = {part: tensors[part] for part in PARTS if part in parts}
    if generation == "2.5":
        return _write_pack(directory, tensors, sections)
    path = directory / f"ltx-{generation}.safetensors"
    everything = {key: tensor for part in tensors.values() for key, tensor in part.items()}
    write_weights(path, everything, _metadata(generation, sections))
    return Release(path, path, path, path, path)


def tiny_config(generation: str, **sizes: Any) -> TransformerConfig:
    """The architecture of a generation at widths of 40 and 20, two blocks deep; 128 registers as published."""
    fields = {**CONFIGURATIONS[_NAMES[generation]], **_SIZES, **_CONNECTOR_SIZES[generation], **sizes}
    return TransformerConfig(**fields)


def transformer_shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    """Shapes of transformer and connectors by official key."""
    with torch.device("meta"):
        modules: list[nn.Module] = [Transformer(config), Connectors(config)]
    return {PREFIX + name: p.shape for module in modules for name, p in module.named_parameters()}


def transformer_tensors(config: TransformerConfig, seed: int = 0) -> dict[str, Tensor]:
    """Transformer and connectors under official keys, bf16 with fp32 tables."""
    shapes = transformer_shapes(config)
    return {key: drawn(key.removeprefix(PREFIX), shapes[key], seed).to(released_dtype(key)) for key in shapes}


def text_projection_shapes(config: TransformerConfig, text_width: int, text_states: int) -> dict[str, torch.Size]:
    """Shapes of the feature extractor's linear layers by official key: one without bias (2.0), or one with bias per stream.

    Each takes `text_states` hidden states of `text_width` features, flattened.
    """
    if not config.caption_proj_before_connector:
        rows = {"aggregate_embed": config.video_connector_width}
        return {f"{TEXT_PREFIX}{n}.weight": torch.Size([rows[n], text_width * text_states]) for n in rows}
    rows = {"video_aggregate_embed": config.video_width, "audio_aggregate_embed": config.audio_width}
    weights = {f"{TEXT_PREFIX}{n}.weight": torch.Size([rows[n], text_width * text_states]) for n in rows}
    return weights | {f"{TEXT_PREFIX}{n}.bias": torch.Size([rows[n]]) for n in rows}


def text_projection_tensors(
    generation: str,
    *,
    text_width: int = TEXT_WIDTH,
    text_states: int = TEXT_STATES,
    config: TransformerConfig | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensors of `text_projection_shapes`, bf16, for the tiny configuration unless another is given."""
    shapes = text_projection_shapes(config or tiny_config(generation), text_width, text_states)
    return {key: drawn(key, shape, seed).bfloat16() for key, shape in shapes.items()}


def drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """fp32 numbers that let every tensor matter: norms around one, matrices keep the scale of what they multiply."""
    noise = torch.randn(shape, generator=generator(seed, "released", name))
    if name.endswith("_norm.weight"):
        return 1 + 0.1 * noise
    is_matrix = name.endswith(".weight") and len(shape) > 1
    return noise / shape[-1] ** 0.5 if is_matrix else 0.2 * noise


def _write_pack(directory: Path, tensors: dict[str, dict[str, Tensor]], sections: dict[str, Any]) -> Release:
    """A file per component, each with the sections of the header that are about it; audio VAE and vocoder share one."""
    names = ("transformer", "text-projection", "video-vae", "audio-vae")
    paths = [directory / f"ltx-2.5-{name}.safetensors" for name in names]
    contents = [
        (("transformer",), ("transformer", "scheduler")),
        (("text_projection",), ()),
        (("video_vae",), ("vae",)),
        (("audio_vae", "vocoder"), ("audio_vae", "vocoder")),
    ]
    for path, (parts, kept) in zip(paths, contents, strict=True):
        own = {key: tensor for part in parts for key, tensor in tensors.get(part, {}).items()}
        if own:
            write_weights(path, own, _metadata("2.5", {name: sections[name] for name in kept}))
    transformer, text_projection, video_vae, audio_vae = paths
    return Release(transformer, text_projection, video_vae, audio_vae, vocoder=audio_vae)


def _metadata(generation: str, sections: dict[str, Any]) -> dict[str, str]:
    metadata = {"model_version": f"{generation}.0"}
    if sections:
        metadata["config"] = json.dumps(sections)
    if generation == "2.5":
        metadata["gemma_source_checkpoint"] = json.dumps(GEMMA)
    return metadata

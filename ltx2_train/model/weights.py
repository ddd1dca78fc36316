"""Weights of transformer and connectors from and to files, under the names that our modules have.

In: one file with everything, the transformer's own file, either cut into several with an index, and the folders of
diffusers. Out: the official layout. Nothing is read before it is wanted, and then a tensor or some of its rows at a time.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ltx2_train.errors import CheckpointError
from ltx2_train.model.config import TransformerConfig, listed
from ltx2_train.model.connector import Connectors
from ltx2_train.model.diffusers_names import (
    CONNECTORS_CLASS,
    PROJECTIONS,
    TRANSFORMER_CLASS,
    config_from_diffusers,
    connectors_from_diffusers,
    from_diffusers,
)
from ltx2_train.model.generation import UNKNOWN, generation_of
from ltx2_train.model.transformer import Transformer
from ltx2_train.weightfile import Finite, Stored, WeightFile, check_floating, open_weights, write_weights

logger = logging.getLogger(__name__)

PREFIX = "model.diffusion_model."
CONNECTOR_NAMES = ("video_embeddings_connector.", "audio_embeddings_connector.")

AnyModule = TypeVar("AnyModule", bound=nn.Module)
OwnName = Callable[[str], str | None]


def load_transformer(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The transformer of a released file, of one that we wrote, or of a folder of diffusers.

    `dtype` None keeps what is on disk. Raises `CheckpointError` for what is not safetensors, for an architecture that is
    unknown or not stated, for tensors that are not exactly those of that architecture, and for NaN or infinite weights.
    Connectors, VAEs and other siblings in the same file are left alone.
    """
    config, tensors = read_weights(path)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(CONNECTOR_NAMES)}
    if not own:
        raise CheckpointError(f"{path}: text connectors and no transformer in it. Give the file of the transformer")
    with torch.device("meta"):
        model = Transformer(config)
    return _filled(model, own, path, dtype, device)


def load_connectors(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Connectors:
    """The text connectors of what `load_transformer` takes, or of diffusers' folder of them. Raises likewise."""
    config, tensors = read_weights(path)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(CONNECTOR_NAMES)}
    if not own:
        raise CheckpointError(
            f"{path}: no text connectors (*_embeddings_connector.*) in it. Give the published file of the whole model or of "
            "its transformer, or the folder of the whole diffusers pipeline"
        )
    with torch.device("meta"):
        model = Connectors(config)
    return _filled(model, own, path, dtype, device)


def _filled(
    model: AnyModule,
    tensors: Mapping[str, Stored],
    source: object,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> AnyModule:
    """The model with each tensor read, moved and converted before the next."""
    check_shapes(tensor_shapes(model), {name: tensor.shape for name, tensor in tensors.items()}, source)
    state = {name: tensor.read().to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def read_config(path: str | Path) -> TransformerConfig:
    """The architecture of transformer and connectors."""
    return _sources(Path(path))[0]


def read_weights(path: str | Path) -> tuple[TransformerConfig, dict[str, Stored]]:
    """The architecture, and what there is of transformer and connectors by the names of our parameters, not yet read.

    Reading a tensor raises `CheckpointError` when it is not finite.
    """
    config, sources = _sources(Path(path))
    tensors: dict[str, Stored] = {}
    for file, own_name in sources:
        if file.num_quantised:
            logger.warning("%s: %d of its weights are FP8; they are dequantised to bf16", file.path, file.num_quantised)
        names = {key: own_name(key) for key in file}
        tensors |= {name: Finite(file[key], f"{file.path}: {key}") for key, name in names.items() if name is not None}
    if not tensors:
        keys = [key for file, _ in sources for key in file]
        raise CheckpointError(
            f"{path}: no transformer (keys {PREFIX}*) in it; its keys are like {next(iter(keys), '')!r}"
        )
    check_floating(tensors, path)
    return config, tensors


def fingerprint(path: str | Path) -> str:
    """Of what `load_transformer` takes: that of the file, or of all folders of diffusers that we read, taken together."""
    folders = diffusers_folders(Path(path))
    files = [folders[name] for name in sorted(folders)] or [Path(path)]
    first, *others = [open_weights(file).fingerprint for file in files]
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def header(path: str | Path) -> dict[str, Any]:
    """What the header of what `load_transformer` takes says, JSON decoded; of diffusers' folders the transformer's."""
    return open_weights(diffusers_folders(Path(path)).get(TRANSFORMER_CLASS, path)).metadata


def _sources(path: Path) -> tuple[TransformerConfig, list[tuple[WeightFile, OwnName]]]:
    """The architecture, and each file with the function from its keys to our names (None: not ours)."""
    config, sources = _stated(path)
    names = [name for file, own_name in sources for name in map(own_name, file) if name is not None]
    _check_depths(config, names, path)
    return config, sources


def _check_depths(config: TransformerConfig, names: Sequence[str], source: object) -> None:
    """Raises `CheckpointError` for an architecture with more blocks than there are tensors: building it could take long."""
    video, audio = (any(name.startswith(part) for name in names) for part in CONNECTOR_NAMES)
    depths = {
        "num_layers": config.num_layers if not all(name.startswith(CONNECTOR_NAMES) for name in names) else 0,
        "connector_num_layers": config.connector_num_layers if video else 0,
        "audio_connector_num_layers": config.audio_connector_layers if audio else 0,
    }
    wrong = [f"{name}={layers}" for name, layers in depths.items() if layers > len(names)]
    if wrong:
        raise CheckpointError(f"{source}: its header states {listed(wrong)}, and it holds {len(names)} tensors")


def _stated(path: Path) -> tuple[TransformerConfig, list[tuple[WeightFile, OwnName]]]:
    """What `_sources` gives, as the header has it."""
    if folders := diffusers_folders(path):
        arguments = {name: _read_json(folder / "config.json") for name, folder in folders.items()}
        where = " and ".join(str(folder / "config.json") for folder in folders.values())
        config = config_from_diffusers(arguments.get(TRANSFORMER_CLASS), arguments.get(CONNECTORS_CLASS), where)
        return config, [(open_weights(folder), _DIFFUSERS_NAMES[name]) for name, folder in folders.items()]
    if os.path.isfile(path / "model_index.json"):
        raise CheckpointError(f"{path}: a diffusers pipeline without a {TRANSFORMER_CLASS} in its folder transformer/")
    file = open_weights(path)
    config = TransformerConfig.from_header(file.config("transformer"), f"{path}: config.transformer")
    return config, [(file, _without_prefix)]


def _without_prefix(key: str) -> str | None:
    return key.removeprefix(PREFIX) if key.startswith(PREFIX) else None


def _without_projections(key: str) -> str | None:
    """The official name, where `key` of diffusers' connectors component is none of a text projection."""
    name = connectors_from_diffusers(key)
    return None if name.startswith(PROJECTIONS) else name


_DIFFUSERS_NAMES: dict[str, OwnName] = {TRANSFORMER_CLASS: from_diffusers, CONNECTORS_CLASS: _without_projections}


def diffusers_folders(path: Path) -> dict[str, Path]:
    """Class -> folder of the components that we can use, where `path` is a folder of diffusers: of all or of one."""
    if not os.path.isdir(path):  # False for a name that no file can have, where Path.is_dir raises
        return {}
    candidates = [path, path / "transformer", path / "connectors"]
    classes = {folder: _read_json(folder / "config.json").get("_class_name") for folder in candidates}
    return {name: folder for folder, name in classes.items() if name in (TRANSFORMER_CLASS, CONNECTORS_CLASS)}


def _read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def tensor_shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_shapes(wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size], source: object) -> None:
    """Raise `CheckpointError` listing what is missing, surplus or misshapen."""
    wrong = [f"missing {name}" for name in wanted.keys() - found.keys()]
    wrong += [f"surplus {name}" for name in found.keys() - wanted.keys()]
    common = wanted.keys() & found.keys()
    wrong += [f"{n} is {list(found[n])}, needs {list(wanted[n])}" for n in common if found[n] != wanted[n]]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit the architecture in its header: {listed(wrong)}"
        )


def released_dtype(name: str) -> torch.dtype:
    """What the published files keep a tensor in: bf16, the modulation tables fp32."""
    return torch.float32 if "scale_shift_table" in name else torch.bfloat16


def save_transformer(path: str | Path, model: Transformer, *, model_version: str | None = None) -> None:
    """Writes the transformer alone in the official layout, complete or not at all.

    `model_version` None: that of the generation which the architecture belongs to, if any.
    """
    metadata = {"config": json.dumps({"transformer": model.config.to_header()})}
    generation = generation_of(model.config)
    if model_version is None and generation != UNKNOWN:
        model_version = f"{generation}.0"
    if model_version is not None:
        metadata["model_version"] = model_version
    write_weights(Path(path), {PREFIX + name: t for name, t in model.state_dict().items()}, metadata)

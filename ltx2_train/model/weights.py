"""Transformer weights from and to files in the official layout: safetensors, prefixed keys, `config` in the header."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltx2_train.errors import CheckpointError
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.transformer import Transformer

PREFIX = "model.diffusion_model."
CONNECTOR_NAMES = ("video_embeddings_connector.", "audio_embeddings_connector.")


def load_transformer(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The transformer of an official-format safetensors file, its architecture read from the header.

    `dtype` None keeps what is on disk. Raises `CheckpointError` for a file that is not safetensors, has no `config`, or
    whose transformer keys or shapes are not exactly those of that architecture. Text connectors, VAEs and other siblings in
    the same file are left alone.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = {name: t.to(device=device, dtype=dtype) for name, t in read_transformer(path)}
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    check_shapes(wanted, {name: t.shape for name, t in tensors.items()}, path)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def read_config(path: Path) -> TransformerConfig:
    """`config.transformer` of the file's header."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        header = json.loads(metadata["config"])["transformer"]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no `config` with a `transformer` section in the header, so its architecture is unknown. "
            "Use a file in the official layout"
        ) from error
    return TransformerConfig.from_header(header, f"{path}: config.transformer")


def read_transformer(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, tensor) of every transformer tensor, one at a time, in the dtype on disk."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            name = key.removeprefix(PREFIX)
            if name != key and not name.startswith(CONNECTOR_NAMES):
                yield name, file.get_tensor(key)


def check_shapes(wanted: dict[str, torch.Size], found: dict[str, torch.Size], source: object) -> None:
    """Raise `CheckpointError` listing every missing, surplus or misshapen tensor."""
    wrong = [f"missing {name}" for name in wanted.keys() - found.keys()]
    wrong += [f"surplus {name}" for name in found.keys() - wanted.keys()]
    common = wanted.keys() & found.keys()
    wrong += [f"{n} is {list(found[n])}, needs {list(wanted[n])}" for n in common if found[n] != wanted[n]]
    if wrong:
        shown = "; ".join(sorted(wrong)[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise CheckpointError(f"{source}: {len(wrong)} tensors do not fit the architecture in its header: {shown}")


def save_transformer(path: str | Path, model: Transformer, *, model_version: str = "2.5.0") -> None:
    """Write the transformer alone in the official layout, atomically."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    metadata = {"config": json.dumps({"transformer": model.config.to_header()}), "model_version": model_version}
    save_file({PREFIX + name: t.contiguous() for name, t in model.state_dict().items()}, partial, metadata)
    partial.replace(path)

"""The parts of released codecs as modules: diffusers' classes, built from a header and filled strictly from a file.

The library is used for its modules alone. Its loaders ignore the header, know no file of 2.3 whole and leave what they do
not find at random values; here every tensor has its place and every place its tensor, or nothing is loaded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.codecs import ltx2_config as configs
from ltx2_train.codecs import ltx2_names as names
from ltx2_train.codecs.ltx2_config import Section, described
from ltx2_train.codecs.neighbourhood import NeighbourhoodProcessor
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.weightfile import FINGERPRINT_BYTES, Stored, WeightFile, check_floating, open_weights

Namer = Callable[[str], str]  # name in a module -> key in the file
BARE_VIDEO = ("encoder.", "decoder.", "per_channel_statistics.")
CLASSES = {  # of diffusers, by the sub-folder of a pipeline that has them
    "vae": ("AutoencoderKLLTX2Video",),
    "audio_vae": ("AutoencoderKLLTX2Audio",),
    "vocoder": ("LTX2Vocoder", "LTX2VocoderWithBWE"),
    "latent_upsampler": ("LTX2LatentUpsamplerModel",),
}
LISTED = 5  # keys of each kind that an error names


@dataclass(frozen=True, slots=True)
class Component:
    """A codec of a file: its tensors under keys without prefix, and where they belong."""

    where: str
    section: Section
    tensors: Mapping[str, Stored]
    converted: bool = False  # True for a diffusers folder, whose section are constructor arguments and whose keys names

    def __post_init__(self) -> None:
        check_floating(self.tensors, self.where)


def open_component(path: str | Path, part: str) -> Component:
    """The component `part` ("vae", "audio_vae", "vocoder") of a released file, a split one, or a diffusers folder.

    A folder of diffusers is the component's own, the pipeline's or that of a component beside it. Raises
    `CheckpointError` when the part, or what the header has to say of it, is not there.
    """
    path = Path(path)
    if folder := _converted_folder(path, part):
        return _open_converted(folder)
    weights = open_weights(path)
    section = Section(f"{path}: config.{part}", weights.config(part))
    return Component(f"{path} ({part})", section, _tensors(weights, part))


def open_upsampler(path: str | Path) -> Component:
    """A latent upsampler: its whole `config` is the section, its keys have no prefix. Raises as `open_component`."""
    if folder := _converted_folder(Path(path), "latent_upsampler"):
        return _open_converted(folder)
    weights = open_weights(path)
    return Component(str(path), Section(f"{path}: config", weights.config()), weights)


def has_component(path: str | Path, part: str) -> bool:
    """Whether `open_component` finds tensors of the part. Raises `CheckpointError` for what is no file of weights."""
    path = Path(path)
    if folder := _converted_folder(path, part):
        return _is_of(folder, part)
    return not _is_converted(path) and bool(_found(open_weights(path), part))


def _is_converted(path: Path) -> bool:
    """Whether a path is a folder of diffusers: a component's or a pipeline's."""
    components = (f"{name}/config.json" for name in (*CLASSES, "transformer", "connectors"))
    return any(os.path.isfile(path / name) for name in ("config.json", "model_index.json", *components))


def _converted_folder(path: Path, part: str) -> Path | None:
    """The folder of diffusers' component: inside `path`, `path` itself or beside it; None for the official layout."""
    is_component = os.path.isfile(path / "config.json")
    places = [path / part, path, path.parent / part] if is_component else [path / part]
    there = [folder for folder in places if os.path.isfile(folder / "config.json")]
    return next((folder for folder in there if _is_of(folder, part)), next(iter(there), None))


def _is_of(folder: Path, part: str) -> bool:
    kind = _json(folder / "config.json").get("_class_name")
    return kind in CLASSES[part] or (kind is None and folder.name == part)


def _open_converted(folder: Path) -> Component:
    config = folder / "config.json"
    return Component(str(folder), Section(str(config), _json(config)), open_weights(folder), converted=True)


def _found(weights: WeightFile, part: str) -> dict[str, Stored]:
    tensors = weights.under(f"{part}.")
    if not tensors and part == "vae":
        tensors = {key: tensor for key, tensor in weights.items() if key.startswith(BARE_VIDEO)}
    return tensors


def _tensors(weights: WeightFile, part: str) -> dict[str, Stored]:
    tensors = _found(weights, part)
    if not tensors:
        raise CheckpointError(f"{weights.path}: no tensors under {part}. in it. Name the file that holds the {part}")
    return names.used(tensors)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Get the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not an object. Get the folder again")
    return values


# --- modules on the meta device ---


@contextmanager
def _library() -> Iterator[None]:
    """Says what to install where diffusers, or a class of it, cannot be imported."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # the latter is what its lazy imports make of any error
        raise ConfigError(
            f'the released codecs need diffusers ({error}): pip install "ltx2_train[released]"'
        ) from error


@described
def video_modules(section: Section, converted: bool = False) -> tuple[dict[str, Any], nn.ModuleDict, Namer]:
    """Arguments, `encoder` and `decoder` of a video VAE without values, and how a file calls their tensors."""
    if converted:
        section.only("_class_name", *CLASSES["vae"])
        vae = _build(section, _video_class(), _arguments(section))
        return dict(vae.config), nn.ModuleDict({"encoder": vae.encoder, "decoder": vae.decoder}), str
    if configs.is_diffusion_vae(section):
        return _diffusion_modules(section)
    arguments = configs.video_encoder(section) | configs.video_decoder(section)
    vae = _build(section, _video_class(), arguments)
    parts = nn.ModuleDict({"encoder": vae.encoder, "decoder": vae.decoder})
    return arguments, parts, lambda name: names.video_vae(name, len(vae.encoder.down_blocks))


def _diffusion_modules(section: Section) -> tuple[dict[str, Any], nn.ModuleDict, Namer]:
    with _library():
        from diffusers import LTX2VideoDiffusionDecoderModel

    arguments = configs.video_encoder(section)
    model = _build(section, LTX2VideoDiffusionDecoderModel, configs.diffusion_decoder(section))
    model.set_attn_processor(NeighbourhoodProcessor())
    decoder = model.decoder
    encoder = _build(section, _video_class(), arguments).encoder

    def name_in_file(name: str) -> str:
        if name.startswith("decoder."):
            return names.diffusion_decoder(name)
        return names.video_vae(name, len(encoder.down_blocks))

    return arguments, nn.ModuleDict({"encoder": encoder, "decoder": decoder}), name_in_file


@described
def audio_modules(section: Section, converted: bool = False) -> tuple[dict[str, Any], nn.ModuleDict, Namer]:
    """Arguments, `encoder` and `decoder` of an audio VAE without values, and how a file calls their tensors."""
    with _library():
        from diffusers import AutoencoderKLLTX2Audio

    if converted:
        section.only("_class_name", *CLASSES["audio_vae"])
    arguments = _arguments(section) if converted else configs.audio_vae(section)
    vae = _build(section, AutoencoderKLLTX2Audio, arguments)
    parts = nn.ModuleDict({"encoder": vae.encoder, "decoder": vae.decoder})
    return dict(vae.config), parts, str if converted else names.audio_vae


@described
def vocoder_module(
    section: Section, widths: Mapping[str, int], converted: bool = False, device: str = "cpu"
) -> tuple[nn.Module, Namer]:
    """A vocoder of either kind, and how a file calls its tensors; `widths`: input channels by first convolution.

    Built with values: the resampler's filter is computed by the constructor and in no file.
    """
    with _library():
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

    if converted:
        kinds = {"LTX2Vocoder": LTX2Vocoder, "LTX2VocoderWithBWE": LTX2VocoderWithBWE}
        return _converted_vocoder(section, kinds, device), str
    if not configs.has_bandwidth_extension(section):
        arguments = configs.vocoder(section, _width(section, widths, "conv_pre"))
        return _build(section, LTX2Vocoder, arguments, device), names.vocoder
    inputs = _width(section, widths, "vocoder.conv_pre"), _width(section, widths, "bwe_generator.conv_pre")
    return _build(section, LTX2VocoderWithBWE, configs.bandwidth_vocoder(section, *inputs), device), names.vocoder


def _width(section: Section, widths: Mapping[str, int], layer: str) -> int:
    if layer not in widths:
        raise CheckpointError(f"{section.where}: 1 missing: {layer}.weight, a tensor of 3 dims. Get the file again")
    return widths[layer]


def _converted_vocoder(section: Section, kinds: dict[str, Any], device: str) -> nn.Module:
    kind, arguments = section.only("_class_name", *kinds), _arguments(section)
    if kind == "LTX2VocoderWithBWE":  # published folders leave out the clamp that the second stage was trained with
        arguments["final_act_fn"] = arguments.get("final_act_fn") or "clamp"
    return _build(section, kinds[kind], arguments, device)


@described
def upsampler_module(section: Section, converted: bool = False) -> nn.Module:
    """A latent upsampler without values; files call its tensors as the module does."""
    with _library():
        from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

    return _build(section, LTX2LatentUpsamplerModel, _arguments(section) if converted else configs.upsampler(section))


def _video_class() -> Any:
    with _library():
        from diffusers import AutoencoderKLLTX2Video

    return AutoencoderKLLTX2Video


def _build(section: Section, kind: Any, arguments: dict[str, Any], device: str = "meta") -> Any:
    configs.check_numbers(arguments, section.where)
    with torch.device(device):
        return kind(**arguments)


def _arguments(section: Section) -> dict[str, Any]:
    return {key: value for key, value in section.values.items() if not key.startswith("_")}


# --- values ---


def fill(module: nn.Module, component: Component, name_in_file: Namer, dtype: torch.dtype) -> None:
    """Gives every tensor of the module its value from the component, cast to `dtype`, one at a time.

    Raises `CheckpointError` with the lists of what is missing, surplus or of another shape, and for values not finite.
    """
    state = module.state_dict()
    check_keys(component, {name_in_file(name): tensor.shape for name, tensor in state.items()})
    for name in list(state):
        value = component.tensors[name_in_file(name)].read()
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{component.where}: {name_in_file(name)} is not finite. Get the file again")
        state[name] = value.to(dtype)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)


def check_keys(component: Component, wanted: Mapping[str, torch.Size]) -> None:
    """Raises `CheckpointError` when the component's tensors are not those wanted. Statistics are looked at elsewhere."""
    statistics = {*names.STATISTICS, *names.STATISTICS.values()}
    found = {key: tensor.shape for key, tensor in component.tensors.items() if key not in statistics}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "surplus": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {list(found[key])} instead of {list(wanted[key])}"
            for key in sorted(found.keys() & wanted.keys())
            if found[key] != wanted[key]
        ],
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"{component.where}: does not fit its header. {lists}. Get the file again")


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:LISTED]) + (", ..." if len(keys) > LISTED else "")


def statistics(component: Component, size: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latent channels, fp32 (size,)."""
    found = []
    for name, key in names.STATISTICS.items():
        key = name if component.converted else key
        if key not in component.tensors:
            raise CheckpointError(
                f"{component.where}: {key} is missing, so latents cannot be normalised. Get the whole file"
            )
        value = component.tensors[key].read().float()
        if value.shape != (size,):
            raise CheckpointError(
                f"{component.where}: {key} {list(value.shape)} instead of [{size}]. Get the file again"
            )
        found.append(value)
    mean, deviation = found
    if not (mean.isfinite().all() and (deviation > 0).all()):
        raise CheckpointError(
            f"{component.where}: the statistics of the latents are not finite and positive. Get the file again"
        )
    return mean, deviation


def fingerprint(component: Component, module: nn.Module, name_in_file: Namer, facts: Mapping[str, Any]) -> str:
    """16 hex digits of SHA-256 over a module's tensors (name, dtype, shape, first 4 KiB), the statistics and `facts`.

    The same for a monolith, a part of it and a diffusers folder of the same tensors.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    places = {name: name_in_file(name) for name in module.state_dict()}
    places |= {name: name if component.converted else key for name, key in names.STATISTICS.items()}
    for name, key in sorted(places.items()):
        tensor = component.tensors[key]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_head(tensor))
    return digest.hexdigest()[:16]


def whole_fingerprint(component: Component) -> str:
    """SHA-256 over all tensors of a component (key, dtype, shape, first 4 KiB) and its section: of the decoder as well."""
    digest = hashlib.sha256(json.dumps(component.section.values, sort_keys=True).encode())
    for key, tensor in sorted(component.tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_head(tensor))
    return digest.hexdigest()


def _head(tensor: Stored) -> bytes:
    if not tensor.shape:
        return tensor.read().reshape(1).view(torch.uint8).numpy().tobytes()
    row = max(1, prod(tensor.shape[1:])) * tensor.dtype.itemsize
    rows = tensor.rows(0, min(tensor.shape[0], -(-FINGERPRINT_BYTES // row)))
    return rows.reshape(-1).view(torch.uint8)[:FINGERPRINT_BYTES].numpy().tobytes()

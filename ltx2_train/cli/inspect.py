"""`ltx2-inspect`: what a weights file is, from its header and the first bytes of every tensor."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2_train.model import TransformerConfig
    from ltx2_train.weightfile import WeightFile

DESCRIPTION = """\
Tell what a weights file is: which generation of LTX-2, which components, whether their tensors are those of the
architecture in the header, how many parameters in which precision; of a LoRA its rank, scale and what its header says.

FILE is a .safetensors file, the index or the folder of one in parts, or a folder of diffusers. Only the header and the
first 4 KiB of every tensor are read, so 40 GB take seconds. The generation is told by the architecture; model_version
is what the header claims. The fingerprint is SHA-256 over what was read (of a folder of diffusers: of its transformer and
connectors): it names the base of a LoRA and stands in the records of runs. --hash reads everything, to compare with the
hash that a publisher gives."""
EPILOG = """\
examples:
  ltx2-inspect ltx-2.3-22b-dev.safetensors
  ltx2-inspect my_lora.safetensors --json
  ltx2-inspect LTX-2-diffusers/                what is in a folder of diffusers
  ltx2-inspect ltx-2.3-22b-dev.safetensors --hash"""

CORE = {"transformer", "text connectors"}
CODECS = {"video VAE encoder", "video VAE decoder", "video VAE statistics", "audio VAE", "vocoder"}
COMPONENTS = {
    "text connectors": r"model\.diffusion_model\.(video|audio)_embeddings_connector\.",
    "transformer": r"model\.diffusion_model\.",
    "text projection": r"text_embedding_projection\.",
    "video VAE encoder": r"(vae\.)?encoder\.",
    "video VAE decoder": r"(vae\.)?decoder\.",
    "video VAE statistics": r"(vae\.)?per_channel_statistics\.",
    "audio VAE": r"audio_vae\.",
    "vocoder": r"vocoder\.",
    "duration head": r"duration_head\.",
    "upsampler": r"(initial_conv|initial_norm|res_blocks|upsampler|post_upsample_res_blocks|final_conv)\.",
    "LoRA": r".*\.(lora_(A|B|down|up)(\.default)?\.weight|lora\.(down|up)\.weight|alpha)$",
    "transformer without prefix": r"(transformer_blocks|(audio_)?(patchify_proj|proj_out|caption_projection)|\w*adaln\w*)\."
    r"|(audio_)?scale_shift_table$|keyframes_abs_pos_embedding$",
}
SHORT = 100  # characters of a header's value that are shown
SHOWN_KEYS = 20


@dataclass(frozen=True, slots=True)
class Component:
    """The tensors of one part of the model, or of one folder."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    """Tensors by dtype on disk."""


@dataclass(slots=True)
class Report:
    """What is told; as JSON under these names."""

    path: str
    kind: str
    generation: str | None = None
    model_version: str | None = None
    files: int = 1
    components: list[Component] = field(default_factory=list)
    quantised: int = 0
    lora: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """The header without the architecture."""
    unrecognised: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    sha256: str | None = None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-inspect", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("file", type=Path, metavar="FILE", help="weights file, index or folder")
    p.add_argument("--hash", action="store_true", help="also the SHA-256 of the whole file, which reads all of it")
    p.add_argument("--json", action="store_true", help="print JSON")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that names the next action."""
    options = parser().parse_args(argv)
    from ltx2_train.errors import Ltx2Error

    try:
        report = inspect(options.file, whole=options.hash)
    except Ltx2Error as error:
        print(f"ltx2-inspect: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report), indent=1) if options.json else "\n".join(lines(report)))
    return 0


def inspect(path: Path, *, whole: bool = False) -> Report:
    """What the file or folder is. `whole` reads all of it for its SHA-256.

    Raises `CheckpointError` for what is not a weights file; what does not fit together is among the report's problems.
    """
    from ltx2_train.weightfile import open_weights

    if path.is_dir() and (folders := component_folders(path)):
        return _of_folders(path, folders, whole)
    file = open_weights(path)
    report = Report(
        str(path), "", model_version=file.model_version, files=num_files(file), quantised=file.num_quantised
    )
    names = {key: component_of(key) for key in file.stored}
    report.components = _components(file, names)
    report.unrecognised = [key for key, name in names.items() if name is None]
    report.kind = kind_of({component.name for component in report.components})
    report.metadata = {key: value for key, value in file.metadata.items() if key not in ("config", "model_version")}
    if report.kind == "LoRA":
        _add_lora(report)
    elif CORE & set(names.values()):
        _add_architecture(report)
    report.fingerprint = file.fingerprint
    report.sha256 = file.sha256() if whole else None
    return report


def component_of(key: str) -> str | None:
    """The component that a key belongs to; None for a key that is none of ours."""
    return next((name for name, pattern in COMPONENTS.items() if re.match(pattern, key)), None)


def kind_of(names: set[str]) -> str:
    """What a file with these components is called."""
    if names & CORE:
        return "monolith" if names & CODECS else "split transformer"
    short = sorted({re.sub("^video VAE .*", "video VAE", name) for name in names})
    return " and ".join(short) or "not recognised"


def component_folders(path: Path) -> dict[str, Path]:
    """The folders of diffusers with weights in them, by name: those of a pipeline, or the folder itself."""
    candidates = [path, *sorted(path.iterdir())] if path.is_dir() else []
    found = [f for f in candidates if (f / "config.json").is_file() and any(f.glob("*.safetensors"))]
    return {folder.name: folder for folder in found}


def num_files(file: "WeightFile") -> int:
    return len({tensor.path for tensor in file.stored.values()})


def _components(file: "WeightFile", names: Mapping[str, str | None]) -> list[Component]:
    found = [name for name in COMPONENTS if name in names.values()]
    return [component(name, file, [key for key in names if names[key] == name]) for name in found]


def component(name: str, file: "WeightFile", keys: Iterable[str]) -> Component:
    """The tensors of these keys; scales of quantised weights are tensors and no parameters."""
    from ltx2_train.weightfile import NAMES

    tensors = {key: file.stored[key] for key in keys}
    kinds = [NAMES[tensor.dtype] for tensor in tensors.values()]
    return Component(
        name,
        tensors=len(tensors),
        parameters=sum(tensor.shape.numel() for key, tensor in tensors.items() if key in file),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes={kind: kinds.count(kind) for kind in sorted(set(kinds))},
    )


def _add_architecture(report: Report) -> None:
    """The generation, and whether transformer and connectors have the tensors that the header announces."""
    from ltx2_train.errors import CheckpointError
    from ltx2_train.model.generation import generation_of
    from ltx2_train.model.weights import read_weights

    try:
        config, tensors = read_weights(report.path)
        report.generation = generation_of(config)
        check_architecture(config, {name: tensor.shape for name, tensor in tensors.items()}, report.path)
    except CheckpointError as error:
        report.problems.append(str(error))


def check_architecture(config: "TransformerConfig", shapes: Mapping[str, Any], source: str) -> None:
    """Raises `CheckpointError` unless the tensors are those of transformer and connectors, or of one of them."""
    import torch

    from ltx2_train.model import Connectors, Transformer
    from ltx2_train.model.weights import CONNECTOR_NAMES, check_shapes, tensor_shapes

    belongs_to_connectors = {name: name.startswith(CONNECTOR_NAMES) for name in shapes}
    for module, wanted in ((Transformer, False), (Connectors, True)):
        own = {name: shape for name, shape in shapes.items() if belongs_to_connectors[name] is wanted}
        if own:
            with torch.device("meta"):
                check_shapes(tensor_shapes(module(config)), own, source)


def _add_lora(report: Report) -> None:
    from ltx2_train.errors import CheckpointError
    from ltx2_train.model.lora_file import read_lora

    try:
        lora = read_lora(report.path)
    except CheckpointError as error:
        report.problems.append(str(error))
        return
    report.generation = lora.base_generation
    alphas = sorted({adapter.rank * adapter.scale for adapter in lora.adapters.values()})
    report.lora = {"form": str(lora.form), "layers": len(lora.adapters), "ranks": lora.ranks, "alphas": alphas}
    report.problems += lora.notices


def _of_folders(path: Path, folders: Mapping[str, Path], whole: bool) -> Report:
    """Folders of diffusers. Their configurations carry no version."""
    from ltx2_train.model.weights import diffusers_folders, fingerprint
    from ltx2_train.weightfile import open_weights

    files = {name: open_weights(folder) for name, folder in folders.items()}
    report = Report(str(path), "diffusers pipeline" if path not in folders.values() else "diffusers component")
    report.components = [component(name, file, file.stored) for name, file in files.items()]
    report.files = sum(map(num_files, files.values()))
    report.quantised = sum(file.num_quantised for file in files.values())
    if diffusers_folders(path):
        _add_architecture(report)
        report.fingerprint = fingerprint(path)
    else:
        report.fingerprint = _joined(file.fingerprint for file in files.values())
    report.sha256 = _joined(file.sha256() for file in files.values()) if whole else None
    return report


def _joined(hashes: Iterable[str]) -> str:
    """One hash as it is; of several the hash."""
    import hashlib

    first, *others = hashes
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


# --- in words ---


def lines(report: Report) -> Iterable[str]:
    """The report for people."""
    total = sum(component.bytes for component in report.components)
    parts = f" in {report.files} files" if report.files > 1 else ""
    yield f"{report.path}: {report.kind}, {size(total)}{parts}"
    yield f"generation     {report.generation or 'not stated'} (model_version {report.model_version or 'not stated'})"
    yield f"{'component':<28}{'tensors':>8}{'parameters':>16}{'size':>10}  dtypes"
    for one in report.components:
        dtypes = ", ".join(f"{count} {name}" for name, count in one.dtypes.items())
        yield f"{one.name:<28}{one.tensors:>8}{one.parameters:>16,}{size(one.bytes):>10}  {dtypes}"
    if report.quantised:
        yield f"quantised      {report.quantised} FP8 weights, dequantised to bf16 when they are read"
    if report.lora is not None:
        yield from _lora_lines(report.lora)
    for key, value in report.metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield f"header         {key}: {text[:SHORT]}{'...' if len(text) > SHORT else ''}"
    if report.unrecognised:
        more = len(report.unrecognised) - SHOWN_KEYS
        shown = ", ".join(report.unrecognised[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
        yield f"not recognised {len(report.unrecognised)} keys: {shown}"
    yield from (f"note           {problem}" for problem in report.problems)
    yield f"fingerprint    {report.fingerprint}"
    if report.sha256 is not None:
        yield f"sha256         {report.sha256}" + (" (of the hashes of its files)" if report.files > 1 else "")


def _lora_lines(lora: Mapping[str, Any]) -> Iterable[str]:
    ranks, alphas = (", ".join(f"{x:g}" for x in lora[name]) for name in ("ranks", "alphas"))
    yield f"LoRA           rank {ranks}, alpha {alphas} as it is loaded, on {lora['layers']} layers, {lora['form']} form"


def size(num_bytes: int) -> str:
    """ "12.3 GB", of 1000."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


if __name__ == "__main__":
    sys.exit(main())

"""LoRA files as values: read in the forms in which they are passed around, written in the two that load everywhere.

The official form, of the reference pipelines and ComfyUI: `diffusion_model.MODULE.lora_A.weight` (rank, in) and
`.lora_B.weight` (out, rank), which change MODULE's weight by B @ A; ComfyUI also reads `.alpha`, which scales by
alpha / rank. The form of diffusers: `transformer.MODULE` and `connectors.MODULE` under diffusers' names, and the scale in
the header. What is written carries its scale inside B, so that no reader can miss it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from reprlib import repr as short  # of what a file may hold without end
from typing import Any

import torch
from torch import Tensor

from ltx2_train.errors import CheckpointError
from ltx2_train.model.config import MAX_WIDTH, Bound, is_number, is_whole, listed
from ltx2_train.model.diffusers_names import (
    connectors_from_diffusers,
    connectors_to_diffusers,
    from_diffusers,
    to_diffusers,
)
from ltx2_train.weightfile import Deferred, Stored, WeightFile, check_floating, open_weights, write_weights


class LoraForm(StrEnum):
    official = "official"
    diffusers = "diffusers"


ROOTS = {
    "diffusion_model": LoraForm.official,
    "transformer": LoraForm.diffusers,
    "connectors": LoraForm.diffusers,
}
SPELLINGS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
PARTS = {name: part for spelling in SPELLINGS for part, name in zip("ab", spelling, strict=True)}
DIFFUSERS_HEADER = "lora_adapter_metadata"
FOLDED = "alpha_folded"  # of our own header: "true" where B holds the scale
BASE_GENERATION = "base_generation"
CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
_KEY = re.compile(
    rf"(?P<root>{'|'.join(ROOTS)})\.(?P<module>.+?)\."
    rf"(?:(?P<part>{'|'.join(map(re.escape, PARTS))})(?:\.default)?\.weight|alpha)"
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """The change of one linear layer: its weight (out, in) grows by `scale * b @ a`."""

    a: Stored
    """(rank, in)"""
    b: Stored
    """(out, rank)"""
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Of the weight that it changes."""
        return torch.Size([self.b.shape[0], self.a.shape[1]])

    def change(self, strength: float = 1.0) -> Tensor:
        """`strength * scale * b @ a` in fp32."""
        return (self.b.read().float() * (strength * self.scale)) @ self.a.read().float()

    def norm(self) -> float:
        """Frobenius norm of the change, from products of rank x rank: |b a|^2 = trace(b'b aa')."""
        a, b = self.a.read().double(), self.b.read().double()
        return abs(self.scale) * sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))

    def folded(self, dtype: torch.dtype) -> "Adapter":
        """The same change with scale 1 and factors in `dtype`: multiplied in fp32, rounded once."""
        up = Deferred(dtype, self.b.shape, lambda: (self.b.read().float() * self.scale).to(dtype))
        return Adapter(Deferred(dtype, self.a.shape, lambda: self.a.read().to(dtype)), up)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What a LoRA file holds. Modules carry the released files' names, without prefix; nothing is read but the header."""

    path: Path
    form: LoraForm
    adapters: dict[str, Adapter]
    metadata: dict[str, Any]
    notices: tuple[str, ...] = ()
    """What a reader should know: assumptions that were made."""

    @property
    def ranks(self) -> list[int]:
        return sorted({adapter.rank for adapter in self.adapters.values()})

    @property
    def scales(self) -> list[float]:
        return sorted({adapter.scale for adapter in self.adapters.values()})

    @property
    def base_generation(self) -> str | None:
        """The generation of the base it was trained on, e.g. "2.3", where the file says so."""
        stated = self.metadata.get(BASE_GENERATION)
        return None if stated is None else str(stated)

    def check_finite(self) -> None:
        """Reads every tensor; raises `CheckpointError` naming the modules that hold NaN or infinite values."""
        wrong = [m for m, one in self.adapters.items() if not (_finite(one.a) and _finite(one.b))]
        if wrong:
            raise CheckpointError(
                f"{self.path}: values that are not finite in {listed(wrong)}. Export or copy it again"
            )


def read_lora(path: str | Path) -> LoraFile:
    """The adapters of a LoRA file, in the official form or in that of diffusers, with `lora_A`/`lora_down` names alike.

    Raises `CheckpointError` for keys that are no part of an adapter, an A without its B, factors that are integers or do not
    fit each other, for a header that cannot be read or contradicts them, and for a file that mixes forms.
    """
    file = open_weights(path)
    matches = {key: _KEY.fullmatch(key) for key in file}
    if unknown := [key for key, match in matches.items() if match is None]:
        raise CheckpointError(
            f"{file.path}: {len(unknown)} of {len(file)} keys are no part of an adapter: {listed(unknown)}. Supported are "
            "diffusion_model.MODULE (official, ComfyUI) and transformer.MODULE (diffusers) with lora_A and lora_B"
        )
    found = {key: match for key, match in matches.items() if match is not None}
    check_floating({key: file[key] for key, match in found.items() if match["part"]}, file.path)
    form = _form(file.path, found.values())
    parts = _by_module(file, found)
    _check_factors(file.path, parts)
    scales, notices = _scales(file, parts)
    adapters = {m: Adapter(part["a"], part["b"], scales[m]) for m, part in parts.items()}
    return LoraFile(file.path, form, adapters, file.metadata, notices)


def _form(path: Path, matches: Iterable[re.Match[str]]) -> LoraForm:
    """The one form that all keys have."""
    matches = list(matches)
    forms = {str(ROOTS[match["root"]]) for match in matches}
    spellings = {"/".join(pair) for match in matches for pair in SPELLINGS if match["part"] in pair}
    for found in (forms, spellings):
        if len(found) > 1:
            raise CheckpointError(
                f"{path}: mixes LoRA forms ({' and '.join(sorted(found))}). Convert it to one of them"
            )
    return LoraForm(forms.pop())


def _by_module(file: WeightFile, found: Mapping[str, re.Match[str]]) -> dict[str, dict[str, Stored]]:
    """The tensors "a", "b" and "alpha" of every module, under the released files' names."""
    parts: dict[str, dict[str, Stored]] = {}
    for key, match in found.items():
        name = official_module(match["module"], match["root"])
        parts.setdefault(name, {})[PARTS.get(match["part"], "alpha")] = file[key]
    return parts


def official_module(module: str, root: str) -> str:
    """The released files' name of a module that a LoRA file knows below `root`."""
    if ROOTS[root] is LoraForm.official:
        return module
    return connectors_from_diffusers(module) if root == "connectors" else from_diffusers(module)


def diffusers_module(module: str) -> tuple[str, str]:
    """The component of diffusers that a module belongs to, and the module's name there."""
    if module.startswith(CONNECTORS):
        return "connectors", connectors_to_diffusers(module)
    return "transformer", to_diffusers(module)


def _check_factors(path: Path, parts: Mapping[str, Mapping[str, Stored]]) -> None:
    if unpaired := [module for module, part in parts.items() if not {"a", "b"} <= part.keys()]:
        raise CheckpointError(
            f"{path}: {len(unpaired)} modules lack A or B: {listed(unpaired)}. The file is incomplete"
        )
    wrong = [f"{m} A {list(p['a'].shape)} B {list(p['b'].shape)}" for m, p in parts.items() if not _fit(p["a"], p["b"])]
    if wrong:
        raise CheckpointError(f"{path}: A and B that are no (rank, in) and (out, rank): {listed(wrong)}")


def _fit(a: Stored, b: Stored) -> bool:
    return len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0


def _scales(file: WeightFile, parts: Mapping[str, Mapping[str, Stored]]) -> tuple[dict[str, float], tuple[str, ...]]:
    """The scale of every module, and what had to be assumed: without an alpha it is 1."""
    stated = _header_scales(file)
    scales = {}
    silent = 0
    for module, part in parts.items():
        rank = part["a"].shape[0]
        if "alpha" in part:
            scales[module] = _number(file.path, module, part["alpha"]) / rank
        else:
            scale = stated(module, rank)
            silent += scale is None
            scales[module] = 1.0 if scale is None else scale
    if not silent or str(file.metadata.get(FOLDED)) == "true":
        return scales, ()
    return scales, (f"{silent} of {len(parts)} adapters state no alpha; their scale is taken as 1, as everywhere",)


def _number(path: Path, module: str, alpha: Stored) -> float:
    value = alpha.read().item() if alpha.shape.numel() == 1 else float("nan")
    if not isfinite(value):
        raise CheckpointError(f"{path}: the alpha of {module} is not one finite number. Export the file again")
    return float(value)


def _header_scales(file: WeightFile) -> Callable[[str, int], float | None]:
    """A function (module, rank) -> scale, of the header as diffusers writes it; None where that is silent."""
    header = _settings(file)

    def scale(module: str, rank: int) -> float | None:
        root, name = diffusers_module(module)
        stated = _pattern_value(header.get(f"{root}.rank_pattern") or {}, name, header.get(f"{root}.r"))
        if stated not in (None, rank):
            raise CheckpointError(
                f"{file.path}: {DIFFUSERS_HEADER} says that {name} has rank {stated}, its tensors have {rank}. "
                "Header and tensors are of different adapters: export the file again"
            )
        alpha = _pattern_value(header.get(f"{root}.alpha_pattern") or {}, name, header.get(f"{root}.lora_alpha"))
        if alpha is None:
            return None
        return float(alpha) / (sqrt(rank) if header.get(f"{root}.use_rslora") else rank)

    return scale


def _is_pattern(text: str) -> bool:
    try:
        re.compile(_as_peft(text))
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _patterns(words: str, holds: Callable[[Any], bool]) -> Bound:
    return Bound(
        f"an object of regular expressions and {words}",
        lambda value: isinstance(value, dict) and all(_is_pattern(p) and holds(v) for p, v in value.items()),
    )


def _is_rank(value: Any) -> bool:
    return is_whole(value, MAX_WIDTH)


_SETTINGS = {  # fields of peft's configuration that decide on the change, by what stands behind "transformer."
    "r": Bound("a whole number above 0", _is_rank),
    "rank_pattern": _patterns("whole numbers above 0", _is_rank),
    "lora_alpha": Bound("a finite number", is_number),
    "alpha_pattern": _patterns("finite numbers", is_number),
    "use_rslora": Bound("true or false", lambda value: isinstance(value, bool)),
    "use_dora": Bound("false: DoRA is another change than B @ A, and is not supported", lambda value: value is False),
}


def _settings(file: WeightFile) -> dict[str, Any]:
    """The header of diffusers, empty where there is none. Raises `CheckpointError` listing what cannot be meant."""
    header = file.metadata.get(DIFFUSERS_HEADER, {})
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file.path}: {DIFFUSERS_HEADER} is no JSON object, so the scale of the adapters is unknown. Export it again"
        )
    bounds = {f"{root}.{name}": bound for root in ROOTS for name, bound in _SETTINGS.items()}
    wrong = [
        f"{key}={short(value)} (needs {bounds[key].words})"
        for key, value in header.items()
        if value is not None and key in bounds and not bounds[key].holds(value)
    ]
    if wrong:
        raise CheckpointError(f"{file.path}: {DIFFUSERS_HEADER}: {listed(wrong)}")
    return header


def _as_peft(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that is the end of the module's name, as peft looks it up."""
    return next((value for pattern, value in patterns.items() if re.match(_as_peft(pattern), name)), default)


def _finite(tensor: Stored) -> bool:
    return bool(tensor.read().isfinite().all())


# --- writing ---


def write_lora(
    path: Path,
    adapters: Mapping[str, Adapter],
    metadata: Mapping[str, str],
    *,
    form: LoraForm = LoraForm.official,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes the adapters with their scale inside B, whole or not at all; returns the path.

    `metadata`: what else the header says (strings). Rank, alpha as trained and that it is folded are added.
    """
    tensors: dict[str, Tensor | Stored] = {}
    for module, adapter in adapters.items():
        name = ".".join(diffusers_module(module) if form is LoraForm.diffusers else ("diffusion_model", module))
        folded = adapter.folded(dtype)
        tensors |= {f"{name}.lora_A.weight": folded.a, f"{name}.lora_B.weight": folded.b}
    header = {"format": "pt", **_figures(adapters), **metadata}
    if form is LoraForm.diffusers:
        header[DIFFUSERS_HEADER] = json.dumps(_diffusers_header(adapters), sort_keys=True)
    write_weights(path, tensors, header)
    return path


def _figures(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Rank and alpha as trained; several where modules differ."""
    ranks = sorted({adapter.rank for adapter in adapters.values()})
    alphas = sorted({adapter.rank * adapter.scale for adapter in adapters.values()})
    return {"rank": ",".join(map(str, ranks)), "alpha": ",".join(f"{alpha:g}" for alpha in alphas), FOLDED: "true"}


def _diffusers_header(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Per component what diffusers makes peft's configuration of: alpha is the rank, since B holds the scale."""
    header: dict[str, Any] = {}
    ranks: dict[str, dict[str, int]] = {}
    for module, adapter in adapters.items():
        root, name = diffusers_module(module)
        ranks.setdefault(root, {})[name] = adapter.rank
    for root, of_module in ranks.items():
        common = Counter(of_module.values()).most_common(1)[0][0]
        others = {f"^{re.escape(name)}": rank for name, rank in of_module.items() if rank != common}
        values = {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}
        values["target_modules"] = sorted(of_module)
        header |= {f"{root}.{key}": value for key, value in values.items()}
    return header


def held(tensor: Tensor) -> Stored:
    """A tensor in memory, as one that is read."""
    return Deferred(tensor.dtype, tensor.shape, partial(_same, tensor))


def _same(tensor: Tensor) -> Tensor:
    return tensor

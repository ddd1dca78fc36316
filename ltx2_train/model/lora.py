"""Low-rank adapters on named modules, through peft, and what LoRA files do to a model. Source: LoRA (arXiv:2106.09685)."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.model.build import official_key
from ltx2_train.model.config import TransformerConfig, listed
from ltx2_train.model.generation import generation_of
from ltx2_train.model.lora_file import Adapter, LoraFile, held, read_lora
from ltx2_train.model.weights import PREFIX

logger = logging.getLogger(__name__)

ATTENTIONS = "attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn"


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Adapters beside frozen weights. Only the adapters are trained, sharded with optimizer state and saved as changes."""

    rank: int = 32
    """Inner width of an adapter."""
    alpha: float | None = None
    """The adapter's output is scaled by alpha / rank; None means alpha = rank, a scale of 1."""
    targets: list[str] = field(
        default_factory=lambda: [
            rf"transformer\.transformer_blocks\.\d+\.({ATTENTIONS})\.(to_q|to_k|to_v|to_out\.0)",
            r"transformer\.transformer_blocks\.\d+\.(ff|audio_ff)\.net\.(0\.proj|2)",
        ]
    )
    """Regular expressions that the whole name of a linear layer has to match; the default is all attentions and FFs."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1). Its draws are not part of the run's function of (seed, position)."""
    weights: str | None = None
    """A LoRA file to start from, of the same modules and rank; its strength is kept. None: adapters that change nothing."""

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank={self.rank}; needs at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}; needs [0, 1)")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"lora.alpha={self.alpha}; needs to be positive")


def target_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that get an adapter. Raises `ConfigError` for a pattern that matches none."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen: set[str] = set()
    for pattern in config.targets:
        matched = {name for name in linears if re.fullmatch(pattern, name)}
        if not matched:
            raise ConfigError(
                f"lora.targets: {pattern!r} matches no linear layer; names look like {linears[len(linears) // 2]!r}"
            )
        chosen |= matched
    return [name for name in linears if name in chosen]


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model with adapters in place and everything else frozen. Works on the meta device, before any sharding."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = target_modules(model, config)
    model.requires_grad_(False)
    pattern = "|".join(re.escape(name) for name in names)
    alpha = config.rank if config.alpha is None else config.alpha
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float works and is meant
        target_modules=rf"({pattern})",
        lora_dropout=config.dropout,
        init_lora_weights=False,
    )
    injected = inject_adapter_in_model(peft_config, model)
    adapted = sum("lora_A" in name for name, _ in injected.named_parameters())
    assert adapted == len(names), f"{adapted} adapters for {len(names)} targets"
    return injected


# --- files ---


def fuse_lora(model: nn.Module, path: str | Path, strength: float = 1.0) -> nn.Module:
    """The same model with a LoRA file's change in its weights: `weight += strength * scale * B @ A`, summed in fp32.

    For a `Transformer` or a `TextConditioned`. Raises `CheckpointError` before anything is changed: for modules or shapes
    that the model does not have, for a base of another generation, and for values that are not finite.
    """
    if not isfinite(strength):
        raise ConfigError(f"strength={strength}; needs a finite number")
    lora, weights = read_lora(path), linear_weights(model)
    check_fits(lora, {name: weight.shape for name, weight in weights.items()}, config_of(model))
    lora.check_finite()
    with torch.no_grad():
        for name, adapter in lora.adapters.items():
            weight = weights[name]
            weight.copy_(weight.float() + adapter.change(strength).to(weight.device))
    return model


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers by the released files' name of the layer, seen through any LoRA wrapping."""
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return {
        official_module(name): parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in linears and ".lora_" not in name
    }


def official_name(parameter: str) -> str:
    """The released files' name, without prefix, of a parameter of a model that may be wrapped or compiled."""
    return official_key(parameter.replace("_orig_mod.", "")).removeprefix(PREFIX)


def official_module(parameter: str) -> str:
    """The released files' name of the linear layer that a weight or an adapter's factor belongs to."""
    return re.sub(r"(\.lora_[AB]\.\w+)?\.weight$", "", official_name(parameter))


def config_of(model: nn.Module) -> TransformerConfig:
    config = getattr(model, "config", None)
    assert isinstance(config, TransformerConfig), f"{type(model).__name__} is neither Transformer nor TextConditioned"
    return config


def check_fits(lora: LoraFile, shapes: Mapping[str, torch.Size], config: TransformerConfig) -> None:
    """Raises `CheckpointError` where the file is of another generation, or adapts what is not among the weights' `shapes`.

    The generation is asked first: adapters of one generation mostly fit the shapes of the next and spoil its output.
    """
    stated, base = lora.base_generation, generation_of(config)
    if stated is not None and stated != base:
        raise CheckpointError(
            f"{lora.path}: trained on LTX {stated}, this model is {base}. Use the base it was trained on"
        )
    if wrong := list(_misfits(lora, shapes)):
        raise CheckpointError(
            f"{lora.path}: {len(wrong)} of {len(lora.adapters)} adapters do not fit this model (LTX {base}): "
            f"{listed(wrong)}. Use the base it was trained on"
        )
    if stated is None:
        logger.warning("%s does not say which generation it was trained on; this model is %s", lora.path, base)
    for notice in lora.notices:
        logger.warning("%s: %s", lora.path, notice)


def _misfits(lora: LoraFile, shapes: Mapping[str, torch.Size]) -> Iterator[str]:
    for name, adapter in lora.adapters.items():
        if name not in shapes:
            yield f"{name} is not a linear layer of it"
        elif adapter.shape != shapes[name]:
            yield f"{name} changes {list(adapter.shape)}, the model has {list(shapes[name])}"


def trained_adapters(tensors: Iterable[tuple[str, Tensor]], scale: float) -> dict[str, Adapter]:
    """The adapters among a run's (name, tensor), by the released files' name of the module."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if match := re.search(r"\.lora_([AB])\.", name):
            factors.setdefault(official_module(name), {})[match[1]] = tensor
    return {module: Adapter(held(pair["A"]), held(pair["B"]), scale) for module, pair in factors.items()}


def start_from_file(
    weights: Iterable[tuple[str, Any]], model: nn.Module, config: LoraConfig
) -> Iterator[tuple[str, Any]]:
    """The (name, tensor) that a run starts from, with the adapters of `config.weights` in the place of new ones.

    The change is the file's: what its scale is more than the run's goes into B. Raises `CheckpointError` when its modules,
    rank, shapes or generation are not those of the run.
    """
    if config.weights is None:
        yield from weights
        return
    lora = read_lora(config.weights)
    check_fits(lora, {name: weight.shape for name, weight in linear_weights(model).items()}, config_of(model))
    wanted = {official_module(name) for name, _ in model.named_parameters() if ".lora_" in name}
    _check_same_adapters(lora, wanted, config.rank)
    lora.check_finite()
    for name, value in weights:
        yield name, _factor(lora, name, config.scale) if ".lora_" in name else value


def _check_same_adapters(lora: LoraFile, wanted: set[str], rank: int) -> None:
    if wrong := sorted(wanted ^ lora.adapters.keys()):
        raise CheckpointError(f"{lora.path}: lora.targets and the file differ in {len(wrong)} modules: {listed(wrong)}")
    if lora.ranks != [rank]:
        raise CheckpointError(
            f"{lora.path}: of rank {', '.join(map(str, lora.ranks))}, but lora.rank={rank}. Make them agree"
        )


def _factor(lora: LoraFile, parameter: str, scale: float) -> Tensor:
    """The fp32 value of an adapter's A or B such that `scale * B @ A` is the file's change."""
    adapter = lora.adapters[official_module(parameter)]
    if ".lora_A." in parameter:
        return adapter.a.read().float()
    return adapter.b.read().float() * (adapter.scale / scale)

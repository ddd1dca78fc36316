"""Low-rank adapters on named modules, through peft. Source: LoRA (arXiv:2106.09685)."""

import re
from dataclasses import dataclass, field

from torch import nn

from ltx2_train.errors import ConfigError

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

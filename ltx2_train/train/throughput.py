"""What a step costs in floating-point operations, and what share of the device's peak that is."""

import re
from dataclasses import dataclass

from ltx2_train.batch import Batch
from ltx2_train.model.config import TransformerConfig

# Dense bf16 peak in FLOP per second, from the makers' data sheets, by what `torch.cuda.get_device_name` says.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2.25e15),
    (r"\bH200\b", 989e12),
    (r"\bH100\b.*\bPCIe\b", 756e12),
    (r"\bH100\b.*\bNVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bRTX 4090\b(?! D| Laptop)", 165e12),
)
_SINUSOID = 256  # width of the timestep embedding before its MLP


@dataclass(frozen=True, slots=True)
class Load:
    """Sizes of one micro-batch as the transformer sees it: samples, and per sample video, audio and text tokens."""

    samples: int
    video: int
    audio: int
    text: int
    timesteps: int = 1  # distinct sigmas per sample and stream that AdaLN embeds


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP per second of a named GPU; None for one that the table does not know (no guess)."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name)), None)


def batch_load(batch: Batch, text_tokens: int) -> Load:
    """The sizes of a micro-batch; `text_tokens` rows of context. A modality that it lacks runs as one token."""
    return Load(len(batch), batch.video[0, 0].numel(), batch.audio.shape[2], text_tokens)


def forward_flops(config: TransformerConfig, load: Load) -> float:
    """FLOPs of one forward of the transformer, without the connectors (under 2 % at the released sizes).

    Twice the multiply-adds of all matrix products; element-wise work is not counted.
    """
    blocks = config.num_layers * (_linear(config, load) + _attention(config, load))
    return 2.0 * load.samples * (blocks + _head(config, load))


def training_flops(config: TransformerConfig, load: Load, *, frozen_base: bool = False) -> float:
    """FLOPs of forward and backward: three times the forward, twice when the base weights have no gradient (LoRA).

    The recomputation of activation checkpointing is not counted, so MFU falls when it is on.
    """
    return forward_flops(config, load) * (2.0 if frozen_base else 3.0)


def _linear(config: TransformerConfig, load: Load) -> float:
    """Multiply-adds of one block's projections, feed-forwards and gates, for one sample."""
    dv, da = config.video_width, config.audio_width
    gates = 3 * config.num_attention_heads * config.apply_gated_attention
    video = load.video * (14 * dv * dv + 4 * dv * da + gates * dv)
    audio = load.audio * (18 * da * da + gates * da)
    return video + audio + load.text * (2 * dv * dv + 2 * da * da)


def _attention(config: TransformerConfig, load: Load) -> float:
    """Multiply-adds of one block's six attention products, for one sample."""
    dv, da, nv, na = config.video_width, config.audio_width, load.video, load.audio
    own = 2 * nv * nv * dv + 2 * na * na * da
    text = 2 * load.text * (nv * dv + na * da)
    return own + text + 4 * nv * na * da


def _head(config: TransformerConfig, load: Load) -> float:
    """Multiply-adds outside the blocks: token and output projections, AdaLN, text modulation, caption projections."""
    dv, da = config.video_width, config.audio_width
    tokens = load.video * (config.in_channels + config.out_channels) * dv
    tokens += load.audio * (config.audio_in_channels + config.audio_out_channels) * da
    modulation = sum(
        load.timesteps * (_adaln(width, config.adaln_rows) + _adaln(width, 4))
        + _adaln(width, 1)  # the audio-video gate
        + config.has_prompt_adaln * _adaln(width, 2)
        for width in (dv, da)
    )
    return tokens + modulation + _captions(config, load)


def _captions(config: TransformerConfig, load: Load) -> float:
    if config.caption_proj_before_connector:
        return 0.0
    channels = config.caption_channels or 0
    return load.text * sum(channels * width + width * width for width in (config.video_width, config.audio_width))


def _adaln(width: int, rows: int) -> float:
    return _SINUSOID * width + (1 + rows) * width * width

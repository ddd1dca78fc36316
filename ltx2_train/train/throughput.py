"""What a step costs in floating-point operations.

MFU is the share of the devices' peak that `training_flops` make, HFU the share with `recomputed_flops` beside them.
Counted are the matrix products, product by product: forward once, the gradient of its input where something trained lies
before it, the gradient of its weight where that is trained, and for products of two activations both gradients. Which
engine runs them, and on how many ranks, makes no difference.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ltx2_train.batch import Batch
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.lora import LoraConfig

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
BLOCKS = "transformer.transformer_blocks."  # what the names of the blocks begin with
_SINUSOID = 256  # width of the timestep embedding before its MLP


@dataclass(frozen=True, slots=True)
class Load:
    """Sizes of one micro-batch as the transformer sees it: samples, and per sample video, audio and text tokens.

    No tokens at all means that the model is built without that stream.
    """

    samples: int
    video: int
    audio: int
    text: int
    timesteps: int = 1  # distinct sigmas per sample and stream that AdaLN embeds


@dataclass(frozen=True, slots=True)
class Product:
    """Rows times a weight, and whether a gradient goes on to the rows and into the weight."""

    rows: int
    inputs: int
    outputs: int
    fed: bool = True
    trained: bool = True

    @property
    def forward(self) -> float:
        """Multiply-adds."""
        return float(self.rows * self.inputs * self.outputs)

    @property
    def backward(self) -> float:
        return self.forward * (self.fed + self.trained)

    def adapter(self, rank: int) -> "tuple[Product, Product]":
        """The two products of a low-rank adapter beside this one."""
        return Product(self.rows, self.inputs, rank, fed=self.fed), Product(self.rows, rank, self.outputs)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP per second of a named GPU; None for one that the table does not know (no guess)."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name)), None)


def batch_load(batch: Batch, text_tokens: int, streams: Collection[str] = ("video", "audio")) -> Load:
    """The sizes of a micro-batch; `text_tokens` rows of context, and the streams that the objective runs.

    A modality that the batch lacks runs as one token.
    """
    video = batch.video[0, 0].numel() if "video" in streams else 0
    audio = batch.audio.shape[2] if "audio" in streams else 0
    return Load(len(batch), video, audio, text_tokens)


def forward_flops(config: TransformerConfig, load: Load) -> float:
    """FLOPs of one forward of the transformer, without the connectors (under 2 % at the released sizes).

    Twice the multiply-adds of all matrix products; element-wise work is not counted.
    """
    products = sum(product.forward for product in _products(config, load, None))
    return 2.0 * load.samples * (products + config.num_layers * _attention(config, load))


def training_flops(
    config: TransformerConfig, load: Load, *, lora: LoraConfig | None = None, connectors_trained: bool = True
) -> float:
    """FLOPs that one forward and backward need: the model FLOPs of MFU.

    `lora`: the base is frozen, and only what lies behind the first adapter has a backward. What recomputation runs
    again is not counted, so MFU falls when it is on; see `recomputed_flops`. Other frozen parameters count as trained.
    """
    products = _products(config, load, lora, connectors_trained=connectors_trained)
    total = sum(product.forward + product.backward for product in products)
    return 2.0 * load.samples * (total + 3 * config.num_layers * _attention(config, load))


def recomputed_flops(
    config: TransformerConfig,
    load: Load,
    blocks: Collection[str],
    *,
    attentions: bool = True,
    lora: LoraConfig | None = None,
) -> float:
    """FLOPs that backward runs again, which HFU counts beside `training_flops`: a forward of each of these blocks.

    `blocks`: names, as the engine gives them; connectors are not counted, neither here nor there. `attentions`: False
    where what they gave is kept (recompute=selective).
    """
    numbers = [int(name.removeprefix(BLOCKS)) for name in blocks if name.startswith(BLOCKS)]
    products = sum(product.forward for i in numbers for product in _block(config, load, i, lora))
    return 2.0 * load.samples * (products + attentions * len(numbers) * _attention(config, load))


def _products(
    config: TransformerConfig, load: Load, lora: LoraConfig | None, *, connectors_trained: bool = True
) -> Iterator[Product]:
    """Every product of rows with a weight, for one sample."""
    for i in range(config.num_layers):
        yield from _block(config, load, i, lora)
    yield from _head(config, load, lora, connectors_trained)


def _block(config: TransformerConfig, load: Load, index: int, lora: LoraConfig | None) -> Iterator[Product]:
    """One block's products, with their adapters.

    Beside a frozen base no gradient goes on to the text, nor to the input of the first block.
    """
    path = f"{BLOCKS}{index}."
    patterns = [] if lora is None else [re.compile(pattern) for pattern in lora.targets]
    for name, rows, inputs, outputs in _layers(config, load):
        text = re.search(r"attn2\.to_[kv]$", name)
        first = index == 0 and re.search(r"attn1\.to_(q|k|v|gate_logits)$", name)
        product = Product(rows, inputs, outputs, fed=lora is None or not (text or first), trained=lora is None)
        yield product
        if lora is not None and any(pattern.fullmatch(path + name) for pattern in patterns):
            yield from product.adapter(lora.rank)


def _layers(config: TransformerConfig, load: Load) -> Iterator[tuple[str, int, int, int]]:
    """(name, rows, inputs, outputs) of one block's linear layers, for one sample."""
    dv, da, nv, na = config.video_width, config.audio_width, load.video, load.audio
    for prefix, rows, width in (("", nv, dv), ("audio_", na, da)):
        if not rows:
            continue
        yield from _attention_layers(f"{prefix}attn1", config, (rows, width), (rows, width), width)
        yield from _attention_layers(f"{prefix}attn2", config, (rows, width), (load.text, width), width)
        yield f"{prefix}ff.net.0.proj", rows, width, 4 * width
        yield f"{prefix}ff.net.2", rows, 4 * width, width
    if _exchanges(config, load):
        yield from _attention_layers("audio_to_video_attn", config, (nv, dv), (na, da), da)
        yield from _attention_layers("video_to_audio_attn", config, (na, da), (nv, dv), da)


def _attention_layers(
    name: str, config: TransformerConfig, query: tuple[int, int], context: tuple[int, int], inner: int
) -> Iterator[tuple[str, int, int, int]]:
    """The linear layers of an attention; query and context are (rows, width)."""
    yield f"{name}.to_q", *query, inner
    yield f"{name}.to_k", *context, inner
    yield f"{name}.to_v", *context, inner
    yield f"{name}.to_out.0", query[0], inner, query[1]
    if config.apply_gated_attention:
        yield f"{name}.to_gate_logits", *query, config.num_attention_heads


def _attention(config: TransformerConfig, load: Load) -> float:
    """Multiply-adds of one block's attention products, for one sample."""
    dv, da, nv, na = config.video_width, config.audio_width, load.video, load.audio
    own = 2 * nv * nv * dv + 2 * na * na * da
    text = 2 * load.text * (nv * dv + na * da)
    exchange = 4 * nv * na * da if _exchanges(config, load) else 0
    return float(own + text + exchange)


def _exchanges(config: TransformerConfig, load: Load) -> bool:
    """Whether the blocks have attention between the streams."""
    return bool(load.video and load.audio and config.use_audio_video_cross_attention)


def _head(
    config: TransformerConfig, load: Load, lora: LoraConfig | None, connectors_trained: bool
) -> Iterator[Product]:
    """Outside the blocks: token and output projections, AdaLN, text modulation, caption projections."""
    trained = lora is None
    streams = (
        (load.video, config.video_width, config.in_channels, config.out_channels),
        (load.audio, config.audio_width, config.audio_in_channels, config.audio_out_channels),
    )
    for rows, width, in_channels, out_channels in streams:
        if not rows:
            continue
        yield Product(rows, in_channels, width, fed=False, trained=trained)
        yield Product(rows, width, out_channels, trained=trained)
        yield from _adaln(load.timesteps, width, config.adaln_rows, trained)
        if _exchanges(config, load):  # the exchange and its gate
            yield from _adaln(load.timesteps, width, 4, trained)
            yield from _adaln(1, width, 1, trained)
        if config.has_prompt_adaln:
            yield from _adaln(1, width, 2, trained)
        if not config.caption_proj_before_connector:
            channels = config.caption_channels or 0
            yield Product(load.text, channels, width, fed=trained and connectors_trained, trained=trained)
            yield Product(load.text, width, width, fed=trained, trained=trained)


def _adaln(rows: int, width: int, modulations: int, trained: bool) -> Iterator[Product]:
    """The timestep's embedding and its modulation rows. Nothing before them has a gradient."""
    yield Product(rows, _SINUSOID, width, fed=False, trained=trained)
    yield Product(rows, width, width, fed=trained, trained=trained)
    yield Product(rows, width, modulations * width, fed=trained, trained=trained)

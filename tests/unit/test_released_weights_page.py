"""The figures of docs/released_weights.md, computed anew: parameters, bytes of the components, memory by the formula."""

from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from ltx2_train.model.config import named_config
from ltx2_train.model.connector import Connectors
from ltx2_train.model.lora import LoraConfig, target_modules
from ltx2_train.model.transformer import Transformer
from ltx2_train.model.weights import released_dtype

PAGE = Path(__file__).resolve().parents[2] / "docs" / "released_weights.md"
NAMES = {"2.0": "ltx2_19b", "2.3": "ltx2_3_22b", "2.5": "ltx2_5_22b"}
TEXT_STATES = 49 * 3840  # what a text projection takes: all hidden states of a token
KEPT = 87  # bytes that a block keeps for its backward per video token and unit of width, in bf16
BF16, MASTER, WITH_EMA = (
    2,
    16,
    20,
)  # bytes of a frozen parameter; of a trained one: weight, gradient, two moments (, EMA)
CLIPS = {"960 x 544 x 89": (12, 17, 30), "1280 x 704 x 121": (16, 22, 40)}  # latent frames, height, width


@cache
def transformer(generation: str) -> nn.Module:
    with torch.device("meta"):
        return Transformer(named_config(NAMES[generation]))


@cache
def connectors(generation: str) -> nn.Module:
    with torch.device("meta"):
        return Connectors(named_config(NAMES[generation]))


def size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def transformer_bytes(generation: str) -> int:
    tensors = transformer(generation).state_dict()
    return sum(tensor.numel() * released_dtype(name).itemsize for name, tensor in tensors.items())


def projection(generation: str) -> int:
    return TEXT_STATES * 3840 if generation == "2.0" else (TEXT_STATES + 1) * (4096 + 2048)


@cache
def codecs(generation: str) -> dict[str, int]:
    """Parameters by the first two parts of the key, statistics with the halves they belong to left apart."""
    from ltx2_train.testing.released_codecs import full_size_layout

    counts: dict[str, int] = {}
    for key, (shape, _) in full_size_layout(generation).items():
        part = "vocoder" if key.startswith("vocoder.") else ".".join(key.split(".")[:2])
        counts[part] = counts.get(part, 0) + prod(shape)
    return counts


def parts(generation: str) -> dict[str, tuple[int, int]]:
    """Parameters and bytes of every component of a generation."""
    codec = codecs(generation)
    video, audio = (sum(n for k, n in codec.items() if k.startswith(p)) for p in ("vae.", "audio_vae."))
    counts = {
        "connectors": size(connectors(generation)),
        "text projection": projection(generation),
        "video VAE": video,
        "audio VAE": audio,
        "vocoder": codec["vocoder"],
    }
    in_bf16 = {name: (number, BF16 * number) for name, number in counts.items()}
    return {"transformer": (size(transformer(generation)), transformer_bytes(generation))} | in_bf16


def component_rows() -> Iterator[str]:
    table = {generation: parts(generation) for generation in NAMES}
    for name in table["2.0"]:
        cells = [f"{n / 1e6:,.1f} M, {b / 1e9:.2f} GB" for n, b in (table[g][name] for g in NAMES)]
        yield f"| {name} | {' | '.join(cells)} |"
    totals = [sum(b for _, b in table[g].values()) for g in NAMES]
    yield f"| all of it | {' | '.join(f'{total / 1e9:.1f} GB' for total in totals)} |"


@cache
def lora(rank: int) -> int:
    """Parameters of adapters on all attentions and feed-forwards of 2.3."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer("2.3")

    model = Model()
    modules = dict(model.named_modules())
    chosen = [modules[name] for name in target_modules(model, LoraConfig())]
    return rank * sum(module.in_features + module.out_features for module in chosen)  # type: ignore[operator]


def gathered() -> int:
    """Bytes of the weights that are whole at a time: what is outside the blocks, and two blocks."""
    model = transformer("2.3")
    block = size(model.transformer_blocks[0])  # type: ignore[index, arg-type]
    return BF16 * (size(model) - 48 * block + 2 * block)


def block_gradient() -> int:
    """Bytes of a block's whole gradient before it is summed over the ranks: bf16, and its fp32 copy."""
    return (BF16 + 4) * size(transformer("2.3").transformer_blocks[0])  # type: ignore[index, arg-type]


def activations(clip: str) -> int:
    """Bytes of one sample in backward with recompute=full: the input of 48 blocks, and the inside of one."""
    return (48 * BF16 + KEPT) * prod(CLIPS[clip]) * 4096


def lora_memory(ranks: int, clip: str, context: bool) -> float:
    base = BF16 * (size(transformer("2.3")) + (0 if context else size(connectors("2.3"))))
    return (base + WITH_EMA * lora(32)) / ranks + gathered() + activations(clip)


def full_memory(ranks: int, clip: str, per_parameter: int) -> float:
    state = per_parameter * size(transformer("2.3")) + BF16 * size(connectors("2.3"))
    return state / ranks + gathered() + block_gradient() + activations(clip)


def memory_rows() -> Iterator[str]:
    small, large = CLIPS
    for ranks in (1, 2, 4, 8):
        cells = [lora_memory(ranks, clip, context) for context in (False, True) for clip in (small, large)]
        yield _row(f"LoRA, {ranks} GPU{'s' * (ranks > 1)}", cells)
    for ranks in (4, 8, 16, 32):
        cells = [full_memory(ranks, clip, each) for each in (WITH_EMA, MASTER) for clip in (small, large)]
        yield _row(f"full, {ranks} GPUs", cells)


def _row(name: str, cells: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{cell / 1e9:.0f} GB' for cell in cells)} |"


def terms() -> Iterator[str]:
    yield f"{lora(32) / 1e6:.1f} M"
    yield f"{gathered() / 1e9:.1f} GB"
    yield f"{block_gradient() / 1e9:.1f} GB"
    for clip in CLIPS:
        yield f"{activations(clip) / 1e9:.1f} GB"


def test_the_page_has_the_figures_that_the_models_give():
    text = PAGE.read_text()
    assert not [row for row in (*component_rows(), *memory_rows(), *terms()) if row not in text]


def test_a_published_file_size_comes_out_to_the_byte():
    """The 2.5 transformer file holds the connectors too; its payload is published as 42,017,512,960 bytes."""
    payload = transformer_bytes("2.5") + BF16 * size(connectors("2.5"))
    assert payload == 42_017_512_960
    assert f"{payload:,}" in PAGE.read_text()


def test_what_a_block_keeps_for_backward_is_proportional_to_tokens_and_width():
    """The measured figure of the memory formula: one block of 2.3 in bf16, narrower, with one more of 256 tokens."""
    from ltx2_train.geometry import audio_positions, latent_video_positions
    from ltx2_train.model.modality import Modality

    heads = 4
    width, audio_width = heads * 128, heads * 64

    def kept(layers: int, frames: int) -> int:
        sizes = {"num_attention_heads": heads, "audio_num_attention_heads": heads, "num_layers": layers}
        widths = {"cross_attention_dim": width, "audio_cross_attention_dim": audio_width}
        model = Transformer(named_config(NAMES["2.3"], sizes | widths)).to(torch.bfloat16)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        def stream(tokens: int, positions: torch.Tensor, context: int) -> Modality:
            zeros = torch.zeros(1, tokens, 128, dtype=torch.bfloat16)
            text = torch.zeros(1, 32, context, dtype=torch.bfloat16)
            sigma = torch.ones(1)
            each = torch.ones(1, tokens)
            return Modality(latent=zeros, sigma=sigma, timesteps=each, positions=positions[None], context=text)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(
                stream(frames * 64, latent_video_positions(frames, 8, 8, 24.0), width),
                stream(8, audio_positions(8), audio_width),
            )
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    of_block = [kept(2, frames) - kept(1, frames) for frames in (4, 8)]
    assert (of_block[1] - of_block[0]) / 256 / width == pytest.approx(KEPT, abs=2)

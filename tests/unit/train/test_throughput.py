from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ltx2_train.distributed.engine import EngineConfig
from ltx2_train.distributed.units import prepare_units
from ltx2_train.model.config import TransformerConfig, named_config
from ltx2_train.model.lora import ATTENTIONS, LoraConfig, add_lora
from ltx2_train.model.modality import Modality
from ltx2_train.model.transformer import Transformer
from ltx2_train.train.throughput import BLOCKS, Load, forward_flops, peak_flops, recomputed_flops, training_flops


@pytest.mark.parametrize(
    ("name", "video", "expected"),
    [("ltx2_3_22b", 6144, 199e12), ("ltx2_5_22b", 6144, 199e12), ("ltx2_3_22b", 32640, 1715e12)],
)
def test_released_models_cost_what_their_arithmetic_says(name, video, expected):
    # 121 frames at 24 fps beside 126 audio steps and 1024 text tokens, one distinct timestep per sample
    assert forward_flops(named_config(name), Load(1, video, 126, 1024)) == pytest.approx(expected, rel=3e-3)


def test_timesteps_per_token_cost_what_they_save_when_shared():
    config = named_config("ltx2_3_22b")
    shared = forward_flops(config, Load(1, 6144, 126, 1024))
    per_token = forward_flops(config, Load(1, 6144, 126, 1024, timesteps=6144))
    assert per_token > shared


def test_a_batch_costs_the_sum_of_its_samples():
    config = named_config("tiny")
    for flops in (forward_flops, training_flops):
        assert flops(config, Load(4, 12, 5, 8)) == 4 * flops(config, Load(1, 12, 5, 8))


def test_training_costs_three_forwards_and_adapters_beside_a_frozen_base_a_little_over_two():
    """Attention's products have both gradients whatever is frozen, and the adapters have their own."""
    config, load = named_config("ltx2_3_22b"), Load(1, 6144, 126, 1024)
    forward = forward_flops(config, load)
    assert training_flops(config, load) == pytest.approx(3 * forward, rel=1e-3)
    assert training_flops(config, load, lora=LoraConfig(rank=32)) == pytest.approx(2.19 * forward, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_known_devices_have_their_dense_bf16_peak(name, peak):
    assert peak_flops(name) == peak


@pytest.mark.parametrize("name", ["cpu", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4"])
def test_an_unknown_device_has_no_peak_rather_than_a_guess(name):
    assert peak_flops(name) is None


SIZE = {
    "num_attention_heads": 2,
    "audio_num_attention_heads": 2,
    "attention_head_dim": 20,
    "audio_attention_head_dim": 10,
    "cross_attention_dim": 40,
    "audio_cross_attention_dim": 20,
    "num_layers": 2,
}
ATTENTIONS_ONLY = [rf"transformer\.transformer_blocks\.\d+\.({ATTENTIONS})\.(to_q|to_k|to_v|to_out\.0)"]
ADAPTERS, ATTENTION_ADAPTERS = LoraConfig(rank=3), LoraConfig(rank=3, targets=ATTENTIONS_ONLY)
GENERATIONS = ["ltx2_19b", "ltx2_3_22b", "ltx2_5_22b"]
LOAD = Load(samples=3, video=8, audio=5, text=6)


class Wrapped(nn.Module):
    """The transformer under the name that it has in training."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer


def small(name: str) -> TransformerConfig:
    return named_config(name, SIZE | ({"caption_channels": 36} if name == "ltx2_19b" else {}))


def counted(
    config: TransformerConfig,
    load: Load,
    lora: LoraConfig | None = None,
    *,
    backward: bool = True,
    text_gradient: bool = False,
    recompute: EngineConfig | None = None,
) -> float:
    """What PyTorch's own counter of matrix products says of the model itself, without a number being computed."""
    with torch.device("meta"):
        model = Transformer(config, video=load.video > 0, audio=load.audio > 0)
        if lora is not None:
            add_lora(Wrapped(model), lora)
        prepare_units(model.shard_units(), recompute or EngineConfig())
        widths = (config.video_width, config.audio_width)
        if not config.caption_proj_before_connector:
            widths = (config.caption_channels, config.caption_channels)
        video = modality(load, load.video, 3, widths[0], text_gradient) if load.video else None
        audio = modality(load, load.audio, 1, widths[1], text_gradient) if load.audio else None
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
            velocity = model(video, audio)
            if backward:
                sum(v.sum() for v in velocity if v is not None).backward()
    return counter.get_total_flops()


def modality(load: Load, tokens: int, axes: int, width: int, text_gradient: bool) -> Modality:
    return Modality(
        latent=torch.zeros(load.samples, tokens, 128),
        sigma=torch.zeros(load.samples),
        timesteps=torch.zeros(load.samples, 1),
        positions=torch.zeros(load.samples, axes, tokens, 2),
        context=torch.zeros(load.samples, load.text, width, requires_grad=text_gradient),
    )


def test_a_model_without_exchange_costs_no_exchange():
    config = named_config("ltx2_5_22b", SIZE | {"use_audio_video_cross_attention": False})
    assert training_flops(config, LOAD) == counted(config, LOAD)
    assert forward_flops(config, LOAD) == counted(config, LOAD, backward=False)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_formula_counts_what_a_forward_multiplies(name):
    assert forward_flops(small(name), LOAD) == counted(small(name), LOAD, backward=False)


@pytest.mark.parametrize("load", [replace(LOAD, audio=0), replace(LOAD, video=0)], ids=["video", "audio"])
def test_a_model_of_one_stream_costs_that_stream(load):
    config = small("ltx2_3_22b")
    assert training_flops(config, load) == counted(config, load)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_formula_counts_what_forward_and_backward_multiply(name):
    config = small(name)
    assert training_flops(config, LOAD, connectors_trained=False) == counted(config, LOAD)


@pytest.mark.parametrize(
    ("name", "lora"), [("ltx2_19b", ADAPTERS), ("ltx2_5_22b", ADAPTERS), ("ltx2_3_22b", ATTENTION_ADAPTERS)]
)
def test_the_formula_counts_what_adapters_beside_a_frozen_base_multiply(name, lora):
    config = small(name)
    assert training_flops(config, LOAD, lora=lora) == counted(config, LOAD, lora)


def test_trained_connectors_get_a_gradient_through_the_caption_projections():
    config = small("ltx2_19b")
    assert training_flops(config, LOAD) == counted(config, LOAD, text_gradient=True)
    assert training_flops(config, LOAD) > training_flops(config, LOAD, connectors_trained=False)


def named(numbers: Iterable[int]) -> list[str]:
    return [f"{BLOCKS}{i}" for i in numbers]


@pytest.mark.parametrize(
    ("engine", "lora", "blocks"),
    [
        (EngineConfig(recompute="full"), None, [0, 1]),
        (EngineConfig(recompute="full"), ADAPTERS, [0, 1]),
        (EngineConfig(recompute="every_n"), None, [0]),
        (EngineConfig(), None, []),
    ],
    ids=["full", "full with adapters", "every_n", "none"],
)
def test_what_backward_runs_again_is_counted_beside_it(engine, lora, blocks):
    config = small("ltx2_3_22b")
    expected = counted(config, LOAD, lora, recompute=engine) - counted(config, LOAD, lora)
    assert recomputed_flops(config, LOAD, named(blocks), lora=lora) == expected


def test_kept_attentions_cost_no_product_again():
    config = small("ltx2_3_22b")
    of_both, kept = (recomputed_flops(config, LOAD, named([0, 1]), attentions=again) for again in (True, False))
    assert 0 < kept < of_both
    # Of a query's attention twice its keys, each for the width of the attention; of both streams, to both and to text.
    dv, da, (nv, na, text) = 40, 20, (LOAD.video, LOAD.audio, LOAD.text)
    products = nv * (nv + text) * dv + na * (na + text) * da + 2 * nv * na * da
    assert of_both - kept == 2 * LOAD.samples * 2 * 2 * products  # FLOPs per multiply-add, two products, two blocks


def test_connectors_count_neither_in_training_nor_again():
    connectors = ["connectors.video_embeddings_connector.transformer_1d_blocks.0"]
    assert recomputed_flops(small("ltx2_3_22b"), LOAD, connectors) == 0

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ltx2_train.model.config import named_config
from ltx2_train.model.modality import Modality
from ltx2_train.model.transformer import Transformer
from ltx2_train.train.throughput import Load, forward_flops, peak_flops, training_flops


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


def test_a_batch_costs_the_sum_of_its_samples_and_training_three_forwards():
    config = named_config("tiny")
    one, four = (forward_flops(config, Load(n, 12, 5, 8)) for n in (1, 4))
    assert four == 4 * one
    assert training_flops(config, Load(4, 12, 5, 8)) == 3 * four
    assert training_flops(config, Load(4, 12, 5, 8), frozen_base=True) == 2 * four


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


@pytest.mark.parametrize("name", ["ltx2_19b", "ltx2_3_22b", "ltx2_5_22b"])
def test_the_formula_counts_what_the_model_multiplies(name):
    """Every generation at a small size, against PyTorch's own counter of matrix products."""
    size = {
        "num_attention_heads": 2,
        "audio_num_attention_heads": 2,
        "attention_head_dim": 20,
        "audio_attention_head_dim": 10,
        "cross_attention_dim": 40,
        "audio_cross_attention_dim": 20,
        "num_layers": 2,
    }
    config = named_config(name, size | ({"caption_channels": 36} if name == "ltx2_19b" else {}))
    with torch.device("meta"):
        model = Transformer(config)
        load = Load(samples=3, video=8, audio=5, text=6)
        video = modality(load, load.video, 3, config.caption_channels if name == "ltx2_19b" else config.video_width)
        audio = modality(load, load.audio, 1, config.caption_channels if name == "ltx2_19b" else config.audio_width)
        with FlopCounterMode(display=False) as counter:
            model(video, audio)
    assert forward_flops(config, load) == counter.get_total_flops()


def modality(load, tokens, axes, width):
    return Modality(
        latent=torch.zeros(load.samples, tokens, 128),
        sigma=torch.zeros(load.samples),
        timesteps=torch.zeros(load.samples, 1),
        positions=torch.zeros(load.samples, axes, tokens, 2),
        context=torch.zeros(load.samples, load.text, width),
    )

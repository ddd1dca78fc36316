"""Codecs in the layout of the released files, tiny and with drawn numbers; and the layout of the full-size ones.

The headers are those published. What a tiny codec has less of: layers and channels; its rates, block kinds, kernels and
keys are the real ones, so that what reads it reads a release.
"""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.codecs import ltx2
from ltx2_train.codecs.ltx2_config import Section
from ltx2_train.codecs.mel import LogMel
from ltx2_train.rng import generator
from ltx2_train.weightfile import write_weights

RELEASED_DTYPE = torch.bfloat16  # of all codec tensors
GAIN = 0.8  # of a drawn layer: below 1, so that nothing grows with depth
UPSAMPLERS: dict[str, dict[str, Any]] = {
    "x2": {"spatial_upsample": True, "temporal_upsample": False, "spatial_scale": 2.0, "rational_resampler": False},
    "x2-rational": {
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": True,
    },
    "x1.5": {"spatial_upsample": True, "temporal_upsample": False, "spatial_scale": 1.5, "rational_resampler": True},
    "temporal-x2": {
        "spatial_upsample": False,
        "temporal_upsample": True,
        "spatial_scale": 1.0,
        "rational_resampler": True,
    },
}
Blocks = list[list[Any]]


def codec_sections(
    generation: str,
    seed: int = 0,
    *,
    video_channels: int = 128,
    audio_channels: int = 8,
    mel_bins: int = 64,
    timestep_conditioning: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Header sections ("vae", "audio_vae", "vocoder") and bf16 tensors under official keys of tiny codecs.

    The default widths of the latents are the released ones, which the rest of the program expects; smaller ones are faster.
    """
    sections = tiny_sections(generation, video_channels, audio_channels, mel_bins)
    if generation != "2.5":
        sections["vae"]["timestep_conditioning"] = timestep_conditioning
    tensors = {
        key: tensor.to(RELEASED_DTYPE)
        for part, section in sections.items()
        for key, tensor in _drawn(part, section, mel_bins, f"{seed} {_lineage(generation, part)}").items()
    }
    return sections, tensors


def full_size_layout(generation: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype by official key of all codec tensors of a release. Nothing of their size is held."""
    layout = {}
    for part, section in full_sections(generation).items():
        for key, tensor in _official(part, section, 64, "meta"):
            layout[key] = (tuple(tensor.shape), RELEASED_DTYPE)
    return layout


def upsampler_file(path: Path, kind: str, *, channels: int = 128, seed: int = 0) -> Path:
    """Writes a tiny latent upsampler ("x2", "x2-rational", "x1.5", "temporal-x2") and returns its path."""
    config = {
        "_class_name": "LatentUpsampler",
        "in_channels": channels,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "dims": 3,
    }
    config |= UPSAMPLERS[kind]
    module = ltx2.upsampler_module(Section("config", config))
    tensors = {name: _value(name, tensor, seed).to(RELEASED_DTYPE) for name, tensor in module.state_dict().items()}
    write_weights(path, tensors, {"config": json.dumps(config)})
    return path


# --- headers ---


def full_sections(generation: str) -> dict[str, dict[str, Any]]:
    """The sections "vae", "audio_vae" and "vocoder" of a release's header."""
    return {"vae": _full_vae(generation), "audio_vae": deepcopy(AUDIO_VAE), "vocoder": _full_vocoder(generation)}


def tiny_sections(
    generation: str, video_channels: int, audio_channels: int, mel_bins: int
) -> dict[str, dict[str, Any]]:
    """The same with fewer layers and channels."""
    sections = full_sections(generation)
    vae, audio, vocoder = sections["vae"], sections["audio_vae"], sections["vocoder"]
    if generation == "2.5":
        vae["encoder"] |= {"out_channels": video_channels, "base_channels": video_channels}
        _shrink(vae["encoder"]["blocks"])
        vae["decoder"] |= TINY_DIFFUSION | {"in_channels": video_channels}
    else:
        vae |= {"latent_channels": video_channels, "encoder_base_channels": video_channels, "decoder_base_channels": 8}
        _shrink(vae["encoder_blocks"])
        _thin(vae["decoder_blocks"])
    width = audio_channels * mel_bins // 4  # the file's statistics have this size, and the width of the first level
    audio["model"]["params"]["ddconfig"] |= {"ch": width, "ch_mult": [1, 1, 1], "num_res_blocks": 1}
    audio["model"]["params"]["ddconfig"] |= {"z_channels": audio_channels, "mel_bins": mel_bins}
    audio["preprocessing"]["mel"]["n_mel_channels"] = mel_bins
    for stage in (vocoder.get("vocoder", vocoder), vocoder.get("bwe", vocoder)):
        stage["upsample_initial_channel"] = 2 ** (1 + len(stage["upsample_rates"]))
    return sections


def _thin(blocks: Blocks) -> None:
    """One layer per stage."""
    for _, options in blocks:
        if "num_layers" in options:
            options["num_layers"] = 1


def _shrink(blocks: Blocks) -> None:
    """One layer per stage, and no stage wider than the first."""
    _thin(blocks)
    for _, options in blocks:
        if "multiplier" in options:
            options["multiplier"] = 1


def _blocks(*blocks: tuple[str, int]) -> Blocks:
    return [[name, {"num_layers" if name == "res_x" else "multiplier": number}] for name, number in blocks]


def _encoder_blocks(generation: str) -> Blocks:
    third, last = (6, 2) if generation == "2.0" else (4, 1)
    return _blocks(
        ("res_x", 4),
        ("compress_space_res", 2),
        ("res_x", 6),
        ("compress_time_res", 2),
        ("res_x", third),
        ("compress_all_res", 2),
        ("res_x", 2),
        ("compress_all_res", last),
        ("res_x", 2),
    )


def _decoder_blocks(generation: str) -> Blocks:
    if generation == "2.0":
        up = ["compress_all", {"residual": True, "multiplier": 2}]
        return [block for i in range(4) for block in ([deepcopy(up)] if i else []) + _blocks(("res_x", 5))]
    return _blocks(
        ("res_x", 4),
        ("compress_space", 2),
        ("res_x", 6),
        ("compress_time", 2),
        ("res_x", 4),
        ("compress_all", 1),
        ("res_x", 2),
        ("compress_all", 2),
        ("res_x", 2),
    )


def _full_vae(generation: str) -> dict[str, Any]:
    if generation == "2.5":
        return {
            "_class_name": "CausalDiffusionVAE",
            "encoder": {
                "_class_name": "Encoder",
                "dims": 3,
                "in_channels": 3,
                "out_channels": 128,
                "blocks": _encoder_blocks(generation),
                "patch_size": 4,
                "latent_log_var": "constant",
                "norm_layer": "pixel_norm",
                "base_channels": 128,
                "spatial_padding_mode": "zeros",
            },
            "decoder": deepcopy(DIFFUSION_DECODER),
            "model_output_type": "x0",
        }
    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 128,
        "encoder_blocks": _encoder_blocks(generation),
        "decoder_blocks": _decoder_blocks(generation),
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "encoder_base_channels": 128,
        "decoder_base_channels": 128,
    } | ({} if generation == "2.0" else {"spatial_padding_mode": "zeros"})


def _full_vocoder(generation: str) -> dict[str, Any]:
    kernels = {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3, "stereo": True}
    if generation == "2.0":
        rates = {"upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [16, 15, 8, 4, 4]}
        return deepcopy({"resblock": "1", "upsample_initial_channel": 1024} | rates | kernels)
    snake = {"resblock": "AMP1", "activation": "snakebeta", "use_tanh_at_final": False, "use_bias_at_final": False}
    first = {"upsample_rates": [5, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4]}
    second = {"upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4]}
    bandwidth = {
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 512,
        "win_size": 512,
        "num_mels": 64,
    }
    return deepcopy(
        {
            "vocoder": {"upsample_initial_channel": 1536} | first | kernels | snake,
            "bwe": {"upsample_initial_channel": 512} | second | kernels | snake | bandwidth,
        }
    )


DIFFUSION_DECODER: dict[str, Any] = {
    "_class_name": "NADiffusionDecoder",
    "in_channels": 128,
    "out_channels": 3,
    "patch_size": 4,
    "head_dim": 64,
    "stage_channels": [2048, 1024, 512, 512, 256],
    "stage_depths": [4, 6, 4, 2, 8],
    "stage_kernels": [[3, 7, 7], [3, 7, 7], [3, 5, 5], [3, 5, 5], [11, 11, 11]],
    "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 2], [[2, 2, 2], 1], [[2, 2, 2], 2]],
    "spatial_padding_mode": "zeros",
    "resampler_kind": "linear",
    "stage5_kernel": [11, 11, 11],
    "timestep_scale_multiplier": 1000.0,
    "default_num_inference_steps": 1,
}
TINY_DIFFUSION: dict[str, Any] = {
    "head_dim": 8,
    "stage_channels": [64, 32, 16, 16, 8],
    "stage_depths": [1, 1, 1, 1, 2],
    "stage_kernels": [[3, 3, 3]] * 5,
    "stage5_kernel": [3, 3, 3],
}
AUDIO_VAE: dict[str, Any] = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 8,
                "resolution": 256,
                "downsample_time": False,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 128,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "audio": {
            "sampling_rate": 16000,
            "max_wav_value": 32768.0,
            "duration": 5.12,
            "stereo": True,
            "causal_padding": 3,
        },
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}


# --- tensors ---


def _lineage(generation: str, part: str) -> str:
    """The generation whose numbers it has: 2.5 encodes pictures with the encoder of 2.3."""
    return "2.3" if (generation, part) == ("2.5", "vae") else generation


def _drawn(part: str, section: dict[str, Any], mel_bins: int, seed: str) -> dict[str, Tensor]:
    tensors = {key: _value(key, tensor, seed) for key, tensor in _official(part, section, mel_bins)}
    if part == "vocoder" and "bwe" in section:
        tensors |= _causal_mel(section["bwe"])
    return tensors


def _official(part: str, section: dict[str, Any], mel_bins: int, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Official keys of a component with the module's own tensors; values are on the meta device but for the vocoder's."""
    header = Section(f"config.{part}", section)
    if part == "vocoder":
        widths = dict.fromkeys(("conv_pre", "vocoder.conv_pre"), 2 * mel_bins)
        widths["bwe_generator.conv_pre"] = 2 * section.get("bwe", {}).get("num_mels", 0)
        module, name_in_file = ltx2.vocoder_module(header, widths, device=device)
        yield from ((f"{part}.{name_in_file(name)}", tensor) for name, tensor in module.state_dict().items())
        return
    build = ltx2.video_modules if part == "vae" else ltx2.audio_modules
    arguments, modules, name_in_file = build(header)
    yield from ((f"{part}.{key}", tensor) for key, tensor in _fused(modules, name_in_file))
    size = arguments["latent_channels"] * (arguments["mel_bins"] // 4 if part == "audio_vae" else 1)
    for name in ("mean-of-means", "std-of-means", "mean-of-stds", "mean-of-stds_over_std-of-means", "channel"):
        yield f"{part}.per_channel_statistics.{name}", torch.empty(size, device="meta")


def _fused(modules: nn.Module, name_in_file: ltx2.Namer) -> Iterator[tuple[str, Tensor]]:
    """As a file has them: one matrix of queries, keys and values, and the type embedding of training."""
    for name, tensor in modules.state_dict().items():
        key = name_in_file(name)
        if ".to_q." in key:
            yield key.replace(".to_q.", ".qkv."), torch.empty(3 * len(tensor), *tensor.shape[1:], device="meta")
        elif ".to_k." not in key and ".to_v." not in key:
            yield key, tensor
    if any("diff_blocks" in name for name in modules.state_dict()):
        yield "decoder.type_emb", torch.empty(len(modules.state_dict()["decoder.norm_out.weight"]), device="meta")


def _value(key: str, tensor: Tensor, seed: int | str) -> Tensor:
    """Numbers that keep activations at about their size; what a module computed itself stays."""
    if key.endswith(".filter"):
        return tensor
    if key.endswith("blur_down.kernel"):
        row = torch.tensor([1.0, 4, 6, 4, 1]) / 16
        return (row[:, None] * row)[None, None]
    if key.endswith("timestep_scale_multiplier"):
        return torch.tensor(1000.0)
    noise = torch.randn(tensor.shape, generator=generator(seed, key))
    if "std" in key.rsplit("statistics", 1)[-1] and "statistics" in key:
        return 0.75 + 0.25 * noise.abs()
    if tensor.ndim < 2:
        is_scale = key.endswith("weight")  # of a norm
        return 0.1 * noise + is_scale
    if "scale_shift_table" in key:
        return 0.1 * noise
    fan_in = math.prod(tensor.shape[1:]) if ".ups." not in key else tensor.shape[0] * 2  # of a transposed convolution
    loudness = 0.1 if "conv_pre" in key else 1.0  # a mel in nats is large
    return loudness * GAIN * noise / math.sqrt(fan_in)


def _causal_mel(bwe: dict[str, Any]) -> dict[str, Tensor]:
    """The second stage's mel front end as the file stores it: windowed cosines and sines, and mel bands."""
    size, bins = bwe["n_fft"], bwe["num_mels"]
    turns = 2 * math.pi / size * torch.arange(size // 2 + 1)[:, None] * torch.arange(size)
    window = torch.hann_window(bwe["win_size"])
    basis = torch.cat([turns.cos(), -turns.sin()])[:, None] * window
    rate = bwe["input_sampling_rate"]
    bands = LogMel(sample_rate=rate, n_fft=size, hop=bwe["hop_length"], bins=bins, highest_hz=rate / 2).filters().T
    prefix = "vocoder.mel_stft"
    return {
        f"{prefix}.stft_fn.forward_basis": basis,
        f"{prefix}.stft_fn.inverse_basis": basis / size,
        f"{prefix}.mel_basis": bands,
    }

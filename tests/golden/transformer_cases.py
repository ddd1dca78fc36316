"""The tiny transformers of the golden file: their configurations, weights and inputs, by formula."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx2_train import geometry
from ltx2_train.model import Modality, Transformer, TransformerConfig

FRAMES, HEIGHT, WIDTH, STEPS, TEXT, FPS = 3, 2, 2, 5, 4, 25.0
CASES = ("joint", "joint-masks-stg")
VARIANTS = ("2.0", "2.3", "2.5", "2.5kv", "2.0-interleaved-f32")


@cache
def goldens() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "dit_goldens.json").read_text())


def tiny_header(variant: str) -> dict[str, Any]:
    """`config.transformer` of the tiny model of a release, or of one of its variants."""
    base = {"2.5kv": "2.5", "2.0-interleaved-f32": "2.0"}.get(variant, variant)
    header = {**goldens()["full_configs"][base], **goldens()["tiny_config_overrides"]}
    if variant == "2.5kv":
        header["use_prompt_adaln_single"] = False
    if variant == "2.0-interleaved-f32":
        header["rope_type"] = "interleaved"
        del header["frequencies_precision"]
    return header


def tiny_model(variant: str, **streams: bool) -> Transformer:
    model = Transformer(TransformerConfig.from_header(tiny_header(variant)), **streams)
    fill(model)
    return model


def fill(model: torch.nn.Module) -> None:
    """w = sin(0.1 i + 1.7 (j + 1)), flat element i >= 1 of the j-th key in sorted order; norms 1 + 0.1 w, others 0.2 w."""
    for j, (name, parameter) in enumerate(sorted(model.state_dict().items())):
        i = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
        w = torch.sin(0.1 * i + 1.7 * (j + 1)).view(parameter.shape)
        parameter.copy_(1 + 0.1 * w if name.endswith("_norm.weight") else 0.2 * w)


def wave(shape: tuple[int, ...], frequency: float, phase: float) -> Tensor:
    n = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(frequency * n + phase).view(shape).float()


def inputs(variant: str, case: str) -> tuple[Modality, Modality, list | None]:
    """Video, audio and perturbations of a case."""
    tokens = FRAMES * HEIGHT * WIDTH
    widths = (36, 36) if variant.startswith("2.0") else (40, 20)
    sigma_video, sigma_audio = torch.tensor([0.7, 0.4]), torch.tensor([0.9, 0.55])
    video_mask, audio_mask = torch.ones(2, tokens), torch.ones(2, STEPS)
    video_mask[:, :4], video_mask[:, 4:6], audio_mask[:, -1] = 0, 0.5, 0.25
    keyframes = torch.zeros(2, tokens, 1)
    keyframes[:, :4] = 1
    masks: dict[str, Any] = {"text": None, "self": None}
    perturbations = None
    if case == "joint-masks-stg":
        masks["self"] = torch.ones(2, tokens, tokens)
        masks["self"][:, :4, -3:] = 0.5
        masks["self"][:, -3:, :4] = 0
        masks["text"] = torch.ones(2, TEXT, dtype=torch.int64)
        masks["text"][0, -1] = 0
        perturbations = [[], [("SKIP_VIDEO_SELF_ATTN", [1]), ("SKIP_AUDIO_SELF_ATTN", [0])]]
    positions = geometry.latent_video_positions(FRAMES, HEIGHT, WIDTH, FPS)
    video = Modality(
        latent=wave((2, tokens, 8), 0.3, 0.1),
        sigma=sigma_video,
        timesteps=video_mask * sigma_video[:, None],
        positions=positions.expand(2, -1, -1, -1),
        context=wave((2, TEXT, widths[0]), 0.23, 0.5),
        context_mask=masks["text"],
        attention_mask=masks["self"],
        keyframes_mask=keyframes,
    )
    audio = Modality(
        latent=wave((2, STEPS, 6), 0.37, 0.2),
        sigma=sigma_audio,
        timesteps=audio_mask * sigma_audio[:, None],
        positions=geometry.audio_positions(STEPS).expand(2, -1, -1, -1),
        context=wave((2, TEXT, widths[1]), 0.29, 0.7),
        context_mask=masks["text"],
    )
    return video, audio, perturbations

"""Guided sampling from a caption's hidden states to latents, step for step beside the LTX-2 pipeline of diffusers."""

import inspect
from dataclasses import replace

import pytest
import torch

from ltx2_train.diffusion.generate import Request, generate
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.profiles import profile
from ltx2_train.model import ModelConfig, TextConditioned, build_model, initial_weights
from ltx2_train.model.patchify import unpatchify_audio, unpatchify_video
from ltx2_train.record import TextFeatures
from ltx2_train.rng import generator
from ltx2_train.testing.released import TEXT_STATES, TEXT_WIDTH, write_release
from ltx2_train.text import load_feature_extractor

ROWS, LENGTHS = 128, (37, 90)  # of the prompt and the negative prompt, padded on the left
FRAMES, SEEDS = 17, (5, 11)  # latents of 3 x 2 x 2 and 18 audio steps


@pytest.fixture(autouse=True)
def _diffusers():
    pytest.importorskip("diffusers")


@pytest.fixture(params=["2.0", "2.3"])
def parts(request, tmp_path):
    """(model in fp32, its file, hidden states, their mask, text features of the prompt and of the negative prompt)."""
    path = write_release(tmp_path, request.param, parts=("transformer", "text_projection")).transformer
    config = ModelConfig(weights=str(path), train_connectors=False, text_tokens=ROWS)
    model = build_model(config).float()
    for name, tensor in initial_weights(model, config, 0):
        model.get_parameter(name).data.copy_(tensor.read())
    states = torch.randn(2, ROWS, TEXT_WIDTH, TEXT_STATES, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(ROWS) >= ROWS - torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        video, audio = load_feature_extractor(path, dtype=torch.float32)(states, mask)
    texts = [TextFeatures(v[m.bool()], a[m.bool()]) for v, a, m in zip(video, audio, mask, strict=True)]
    return model, path, states, mask, *texts


def start_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise that a request of this seed starts from, as latents."""
    video = torch.randn(1, 12, 128, generator=generator(seed, "sample.video"))
    audio = torch.randn(1, 18, 128, generator=generator(seed, "sample.audio"))
    return unpatchify_video(video, 3, 2, 2), unpatchify_audio(audio)


GUIDED = {"stg_blocks": [1], "modality": 3.0, "rescale": 0.7, "stg": 1.0}  # of the profile, in a model of two blocks


def test_six_guided_steps_are_those_of_the_diffusers_pipeline(parts):
    from tests.peers.diffusers_pipeline import pipeline_of, sampled

    model, path, states, mask, text, negative = parts
    assert isinstance(model, TextConditioned)
    ours = profile("diffusers")
    assert (ours.video.cfg, ours.audio.cfg) == (3.0, 7.0)
    ours = replace(ours, steps=6, video=replace(ours.video, stg_blocks=[1]), audio=replace(ours.audio, stg_blocks=[1]))
    assert ours.video == GuidanceConfig(cfg=3.0, **GUIDED)
    requests = [Request(text=text, negative=negative, frames=FRAMES, height=64, width=64, seed=s) for s in SEEDS]
    found = generate(model, requests, ours, keyframe_marker=False)
    video, audio = (torch.cat(noise) for noise in zip(*map(start_of, SEEDS), strict=True))
    rows = torch.tensor([0, 0, 1, 1])
    theirs = sampled(
        pipeline_of(model, path),
        states[rows],
        mask[rows],
        video,
        audio,
        num_inference_steps=6,
        spatio_temporal_guidance_blocks=[1],
    )
    differences = [(a - b).abs().max().item() for a, b in zip((found.video, found.audio), theirs, strict=True)]
    print(f"{path.name}: largest difference {differences[0]:.2e} video, {differences[1]:.2e} audio")
    assert found.video.std() > 0.1
    assert max(differences) < 5e-5


def test_the_profile_of_diffusers_is_what_its_pipeline_does_by_default():
    from diffusers import LTX2Pipeline

    parameters = inspect.signature(LTX2Pipeline.__call__).parameters
    theirs = {name: parameter.default for name, parameter in parameters.items()}
    ours = profile("diffusers")
    assert ours.steps == theirs["num_inference_steps"]
    for prefix, guidance in (("", ours.video), ("audio_", ours.audio)):
        assert guidance.cfg == theirs[f"{prefix}guidance_scale"]
        assert guidance.stg == theirs[f"{prefix}stg_scale"]
        assert guidance.modality == theirs[f"{prefix}modality_scale"]
        assert guidance.rescale == theirs[f"{prefix}guidance_rescale"]
        assert guidance.stg_blocks == theirs["spatio_temporal_guidance_blocks"]


def test_the_distilled_sigmas_are_those_of_diffusers():
    from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES

    from ltx2_train.diffusion.sigmas import DISTILLED, DISTILLED_REFINE

    assert (*DISTILLED_SIGMA_VALUES, 0.0) == DISTILLED
    assert (*STAGE_2_DISTILLED_SIGMA_VALUES, 0.0) == DISTILLED_REFINE

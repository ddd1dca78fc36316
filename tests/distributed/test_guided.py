"""A guided generation by a sharded model: texts that are prepared once pass through sharding like everything else."""

import pytest
import torch

from ltx2_train.diffusion.generate import Generated, Request, generate
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.distributed.engine import Engine
from ltx2_train.distributed.world import World
from ltx2_train.model import ModelConfig, build_model, named_config
from ltx2_train.record import TextFeatures
from ltx2_train.testing import run_on_ranks
from tests.distributed.test_transformer import perturbed, tiny_engine, train

ENGINES = {"fsdp2": {}, "zero3": {"backend": "zero3"}, "sequence": {"sequence": 2}}


def clip(engine_model) -> Generated:
    """Three guided steps, the last outside of the guidance interval of the video."""
    config = named_config("tiny")
    torch.manual_seed(0)
    text, negative = (
        TextFeatures(torch.randn(rows, config.video_width), torch.randn(rows, config.audio_width)) for rows in (4, 1)
    )
    guidance = [
        GuidanceConfig(cfg=3.0, stg=1.0, stg_blocks=[1], modality=3.0, rescale=0.7, sigma_low=low) for low in (0.3, 0.0)
    ]
    profile = SamplerProfile(name="test", steps=3, tokens="actual", video=guidance[0], audio=guidance[1])
    request = Request(text=text, negative=negative, frames=9, height=64, width=64, fps=24.0)
    return generate(engine_model, [request, request], profile)


def generations(world: World) -> dict[str, list[Generated]]:
    """By each engine: one before a step of training, and two after it."""
    found = {}
    for name, settings in ENGINES.items():
        shared = world.sharing_samples(settings.get("sequence", 1))
        engine: Engine = tiny_engine(shared, **settings)
        clips = [clip(engine.model)]
        train(engine, shared, 0, 1)
        found[name] = [*clips, clip(engine.model), clip(engine.model)]
    return found


@pytest.mark.slow
def test_a_sharded_model_generates_what_the_whole_one_does():
    model = build_model(ModelConfig(name="tiny"))
    with torch.no_grad():
        for name, tensor in perturbed(model):
            model.get_parameter(name).copy_(tensor)
    whole = clip(model)
    for found in run_on_ranks(generations, 2, timeout=300):
        for first, second, third in found.values():
            for stream in ("video", "audio"):
                before, after, again = (getattr(one, stream) for one in (first, second, third))
                torch.testing.assert_close(before, getattr(whole, stream), atol=2e-5, rtol=1e-4)
                assert torch.equal(after, again)
                assert (after - before).abs().max() > 1e-3, "the step of training is seen: nothing is kept across it"

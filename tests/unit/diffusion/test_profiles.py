import json

import pytest
import torch

from ltx2_train.diffusion.profiles import PROFILES, SamplerProfile, profile
from ltx2_train.diffusion.sigmas import DISTILLED, ltx2_schedule, shifted_schedule
from ltx2_train.errors import ConfigError


def test_released_models_are_sampled_as_published():
    for name, steps, block in (("ltx2_2.0", 40, 29), ("ltx2_2.3", 30, 28), ("ltx2_2.5", 30, 28)):
        preset = profile(name)
        assert preset.steps == steps
        assert torch.equal(preset.sigmas(100), ltx2_schedule(steps))  # 4096 tokens, whatever the clip
        assert (preset.video.cfg, preset.audio.cfg) == (3.0, 7.0)
        for guidance in (preset.video, preset.audio):
            assert (guidance.stg, guidance.stg_blocks) == (1.0, [block])
            assert (guidance.modality, guidance.rescale) == (3.0, 0.7)


def test_the_demo_is_sampled_with_the_shift_it_was_trained_with():
    demo = profile("demo")
    assert torch.equal(demo.sigmas(24), shifted_schedule(24, 24))
    assert (demo.video.cfg, demo.video.stg, demo.video.modality) == (2.0, 0.0, 1.0)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_survives_a_checkpoint(name):
    stored = json.loads(json.dumps(profile(name).to_dict()))
    assert SamplerProfile.from_dict(stored) == profile(name)


def test_a_profile_given_out_is_a_copy():
    profile("demo").video.cfg = 9.0
    assert profile("demo").video.cfg == 2.0


def test_the_distilled_schedule_has_its_own_steps():
    distilled = SamplerProfile(name="distilled", steps=8, schedule="distilled")
    assert torch.equal(distilled.sigmas(1), torch.tensor(DISTILLED))
    with pytest.raises(ConfigError, match="steps=30"):
        SamplerProfile(name="distilled", schedule="distilled")


def test_errors_name_what_is_known():
    with pytest.raises(ConfigError, match=r"'best'.*ltx2_2\.0, ltx2_2\.3, ltx2_2\.5, demo"):
        profile("best")
    with pytest.raises(ConfigError, match="choose one of ltx2, shifted"):
        SamplerProfile(name="x", schedule="karras")
    with pytest.raises(ConfigError, match="'shift'"):
        SamplerProfile.from_dict({"name": "x", "shift": 3})
    with pytest.raises(ConfigError, match="name"):
        SamplerProfile.from_dict({"steps": 3})

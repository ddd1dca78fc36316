import json
from dataclasses import replace

import pytest
import torch

from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.profiles import PROFILES, Fit, SamplerProfile, check_fits, profile
from ltx2_train.diffusion.sampler import Sampler, SamplerSettings
from ltx2_train.diffusion.sigmas import (
    DISTILLED,
    DISTILLED_REFINE,
    beta_schedule,
    linear_quadratic_schedule,
    ltx2_schedule,
    shifted_schedule,
)
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import Stream

NAMES = [
    "ltx2_2.0",
    "ltx2_2.3",
    "ltx2_2.5",
    "hq",
    "distilled_2.0",
    "distilled_2.3",
    "distilled_2.5",
    "diffusers",
    "demo",
]


@pytest.mark.parametrize(("generation", "steps", "block"), [("2.0", 40, 29), ("2.3", 30, 28), ("2.5", 30, 28)])
def test_released_models_are_sampled_as_published(generation, steps, block):
    preset = profile(f"ltx2_{generation}")
    assert (preset.steps, preset.calls, preset.sampler) == (steps, steps, Sampler.euler)
    assert torch.equal(preset.sigmas(100), ltx2_schedule(steps))  # 4096 tokens, whatever the clip
    assert (preset.video.cfg, preset.audio.cfg) == (3.0, 7.0)
    for guidance in (preset.video, preset.audio):
        assert guidance == GuidanceConfig(cfg=guidance.cfg, stg=1.0, stg_blocks=[block], modality=3.0, rescale=0.7)
    assert preset.generations == [generation]


def test_high_quality_is_fifteen_steps_of_second_order():
    preset = profile("hq")
    assert (preset.steps, preset.calls, preset.sampler) == (15, 31, Sampler.res_2s)
    assert torch.equal(preset.sigmas(8160), ltx2_schedule(15, 8160))  # the clip's own tokens
    assert (preset.settings.eta_of(preset.sampler), preset.settings.bong) == (0.5, True)
    assert preset.video == GuidanceConfig(cfg=3.0, modality=3.0, rescale=0.45)
    assert preset.audio == GuidanceConfig(cfg=7.0, modality=3.0, rescale=1.0)


@pytest.mark.parametrize(
    ("generation", "sampler", "eta"),
    [("2.0", Sampler.euler, 0.0), ("2.3", Sampler.euler, 0.0), ("2.5", Sampler.euler_ancestral, 1.0)],
)
def test_distilled_models_take_eight_steps_without_guidance(generation, sampler, eta):
    preset = profile(f"distilled_{generation}")
    assert (preset.steps, preset.calls, preset.sampler) == (8, 8, sampler)
    assert (preset.settings.eta_of(sampler), preset.settings.s_noise) == (eta, 1.0)
    assert torch.equal(preset.sigmas(100), torch.tensor(DISTILLED))
    assert preset.video == preset.audio == GuidanceConfig()
    assert preset.generations == [generation]


def test_the_diffusers_profile_shifts_by_the_size_of_the_clip():
    preset = profile("diffusers")
    assert torch.equal(preset.sigmas(6144), ltx2_schedule(30, 6144))
    assert (preset.video, preset.audio) == (profile("ltx2_2.3").video, profile("ltx2_2.3").audio)


def test_the_demo_is_sampled_with_the_shift_it_was_trained_with():
    demo = profile("demo")
    assert torch.equal(demo.sigmas(24), shifted_schedule(24, 24))
    assert demo.video == demo.audio == GuidanceConfig(cfg=2.0)
    assert demo.generations == []


def test_these_are_the_profiles():
    assert list(PROFILES) == NAMES


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_survives_a_checkpoint(name):
    stored = json.loads(json.dumps(profile(name).to_dict()))
    assert SamplerProfile.from_dict(stored) == profile(name)


def test_what_is_stored_are_plain_values():
    def types(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return {type(value)}.union(*map(types, inner))

    assert types(profile("hq").to_dict()) <= {dict, list, str, int, float, bool, type(None)}


def test_a_profile_of_an_older_checkpoint_means_what_it_meant():
    plain = {"cfg": 2.0, "stg": 0.0, "stg_blocks": [], "modality": 1.0, "rescale": 0.0}
    stored = {"name": "demo", "steps": 24, "schedule": "shifted", "tokens": "actual", "video": plain, "audio": plain}
    read = SamplerProfile.from_dict(stored)
    assert read.sampler is Sampler.euler
    assert read.video.modality_weight == 0
    assert replace(read, video=GuidanceConfig(cfg=2.0), audio=GuidanceConfig(cfg=2.0)) == profile("demo")


def test_a_profile_given_out_is_a_copy():
    profile("demo").video.cfg = 9.0
    assert profile("demo").video.cfg == 2.0


def test_every_schedule_can_be_chosen():
    def sigmas(schedule, steps=8, **fields):
        return SamplerProfile(name="x", schedule=schedule, steps=steps, **fields).sigmas(100)

    assert torch.equal(sigmas("linear_quadratic"), linear_quadratic_schedule(8))
    assert torch.equal(sigmas("beta"), beta_schedule(8))
    assert torch.equal(sigmas("distilled_refine", steps=3), torch.tensor(DISTILLED_REFINE))
    assert torch.equal(sigmas("custom", steps=2, custom_sigmas=[0.9, 0.5, 0.1]), torch.tensor([0.9, 0.5, 0.1]))


@pytest.mark.parametrize("schedule", ["distilled", "distilled_refine", "custom"])
def test_fixed_schedules_have_their_own_steps(schedule):
    sigmas = {"custom_sigmas": [1.0, 0.5, 0.0]} if schedule == "custom" else {}
    with pytest.raises(ConfigError, match="steps=30"):
        SamplerProfile(name="x", schedule=schedule, **sigmas)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"schedule": "karras"}, "choose one of ltx2, shifted"),
        ({"sampler": "dpm"}, "choose one of euler, euler_ancestral, heun, res_2s, gradient_estimating"),
        ({"steps": 0}, "steps=0"),
        ({"custom_sigmas": [1.0, 0.0]}, "set schedule=custom"),
        ({"schedule": "custom", "steps": 2, "custom_sigmas": [1.0, 0.2, 0.4]}, "0.2 is followed by 0.4"),
        ({"schedule": "custom", "steps": 2}, "at least 2"),
        ({"settings": SamplerSettings(eta=0.5)}, "settings.eta=0.5: euler adds no noise"),
        ({"sampler": "heun", "audio": GuidanceConfig(skip_step=1)}, "audio.skip_step=1: heun calls the model twice"),
    ],
)
def test_errors_name_the_field_and_what_would_do(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        SamplerProfile(name="x", **fields)


def test_errors_name_what_is_known():
    with pytest.raises(ConfigError, match=rf"'best'.*{', '.join(NAMES)}"):
        profile("best")
    with pytest.raises(ConfigError, match="'shift'"):
        SamplerProfile.from_dict({"name": "x", "shift": 3})
    with pytest.raises(ConfigError, match="settings.*'beta'"):
        SamplerProfile.from_dict({"name": "x", "settings": {"beta": 3}})
    with pytest.raises(ConfigError, match="name"):
        SamplerProfile.from_dict({"steps": 3})


def model(generation="2.5", streams=frozenset(Stream), blocks=48) -> Fit:
    return Fit(generation, frozenset(streams), blocks)


def test_a_profile_of_another_generation_is_refused_with_those_that_fit():
    with pytest.raises(
        ConfigError,
        match=r"ltx2_2\.0.*is of generation 2\.3.*choose one of ltx2_2\.3, hq, distilled_2\.3, diffusers, demo,",
    ):
        check_fits(profile("ltx2_2.0"), model("2.3"))
    with pytest.raises(ConfigError, match=r"distilled_2\.5, diffusers, demo,"):
        check_fits(profile("distilled_2.3"), model("2.5"))
    for generation in ("2.0", "2.3", "2.5"):
        for name in (f"ltx2_{generation}", f"distilled_{generation}", "hq", "diffusers", "demo"):
            check_fits(profile(name), model(generation))
    check_fits(profile("ltx2_2.0"), model("unknown"))  # a mixture: whoever names a profile knows better


def test_a_model_of_one_stream_is_not_guided_by_another():
    for stream in Stream:
        with pytest.raises(
            ConfigError, match=rf"hq: guides {stream} by the other stream \(modality 3\).*choose one of.*demo"
        ):
            check_fits(profile("hq"), model(streams={stream}))
        check_fits(profile("demo"), model(streams={stream}))
    check_fits(profile("hq"), model())


def test_blocks_that_a_model_has_not_cannot_be_skipped():
    """And what is advised instead fits: of two profiles of its generation, the one that skips nothing."""
    with pytest.raises(
        ConfigError, match=r"block 28, and this model has blocks 0 to 27; choose one of hq, distilled_2\.5"
    ):
        check_fits(profile("ltx2_2.5"), model(blocks=28))
    check_fits(profile("ltx2_2.5"), model(blocks=29))
    off = SamplerProfile(name="off", video=GuidanceConfig(stg_blocks=[28]))
    check_fits(off, model(blocks=4))


def written(folder, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_profile_of_ones_own_comes_from_a_file(tmp_path):
    text = "base: ltx2_2.3\nsteps: 12\nvideo: {cfg: 4.5, text: apg}\nsettings: {gamma: 1.5}\nsampler: gradient_estimating\n"
    mine, base = profile(written(tmp_path, text)), profile("ltx2_2.3")
    assert (mine.name, mine.steps, mine.generations) == ("mine", 12, ["2.3"])
    assert mine.video == replace(base.video, cfg=4.5, text="apg"), "what is not said is as in the base"
    assert mine.audio == base.audio
    assert SamplerProfile.from_dict(mine.to_dict()) == mine


def test_sigmas_of_ones_own_are_as_many_steps_as_they_say(tmp_path):
    mine = profile(written(tmp_path, "custom_sigmas: [1.0, 0.6, 0.25, 0]\n"))
    assert mine.steps == 3
    assert mine.sigmas(1).tolist() == pytest.approx([1.0, 0.6, 0.25, 0.0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("custom_sigmas: [1.0, 0.5, 0.7, 0]", "0.5 is followed by 0.7"),
        ("custom_sigmas: [1.0, half, 0]", r"custom_sigmas=.*half.*list\[float\]"),
        ("steps: ten", "steps='ten' is not of its kind, int"),
        ("steps: 2.5", "steps=2.5"),
        ("steps: true", "steps=True"),
        ("steps: 0", "steps=0: must be >= 1"),
        ("video: {cfg: '3'}", r"video: cfg='3' is not of its kind, float \| None"),
        ("sampler: rk4", "rk4.*euler"),
        ("step: 20", "unknown fields.*step.*known are"),
        ("video: {cgf: 3}", "video: unknown fields.*cgf"),
        ("video: 3", "video=3: must be a mapping"),
        ("base: ltx_2", "'ltx_2': not known; choose one of"),
        ("- steps", "no mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_file_that_is_no_profile_is_named_with_what_is_wrong(tmp_path, text, told):
    with pytest.raises(ConfigError, match=rf"mine\.yaml.*{told}"):
        profile(written(tmp_path, text))
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        profile(str(tmp_path / "none.yaml"))

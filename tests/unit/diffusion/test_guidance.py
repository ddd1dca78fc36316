import math
from dataclasses import replace

import pytest
import torch

from ltx2_train.diffusion.guidance import GuidanceConfig, combine, needed_passes
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import SKIP_A2V, SKIP_AUDIO_SELF_ATTN, SKIP_V2A, SKIP_VIDEO_SELF_ATTN

FULL = GuidanceConfig(cfg=3.0, stg=1.0, stg_blocks=[1], modality=3.0, rescale=0.7)


def waves() -> list[torch.Tensor]:
    n = torch.arange(1, 13, dtype=torch.float64)
    pairs = ((0.3, 0.1), (0.31, 0.2), (0.29, 0.3), (0.33, 0.4))
    return [torch.sin(w * n + p).float().reshape(1, 4, 3) for w, p in pairs]


def text_only(**fields) -> torch.Tensor:
    cond, uncond, *_ = waves()
    return combine(cond, uncond, None, None, GuidanceConfig(**fields))


def test_guidance_gives_the_published_numbers():
    expected = torch.tensor([-0.381516, -0.080944, 0.253302, 0.595216])
    torch.testing.assert_close(combine(*waves(), FULL).flatten()[:4], expected, atol=1e-6, rtol=0)


def test_neutral_guidance_is_the_prediction_itself():
    cond = waves()[0]
    plain = replace(FULL, rescale=0.0)
    assert torch.equal(combine(cond, None, None, None, plain), cond)
    for neutral in ({}, {"cfg": 1.0, "modality": 1.0}, {"cfg": 0.0, "modality": 0.0, "scale": "paper"}):
        assert torch.equal(combine(*waves(), GuidanceConfig(**neutral)), cond)
        torch.testing.assert_close(combine(*waves(), GuidanceConfig(rescale=0.7, **neutral)), cond)


def test_the_papers_scale_is_one_less():
    """M + s_t (M - M without text) + s_m (M - M without the other stream), arXiv:2601.03233."""
    cond, uncond, _, isolated = waves()
    paper = GuidanceConfig(cfg=2.0, modality=0.5, scale="paper")
    expected = cond + 2.0 * (cond - uncond) + 0.5 * (cond - isolated)
    torch.testing.assert_close(combine(cond, uncond, None, isolated, paper), expected)
    reference = GuidanceConfig(cfg=3.0, modality=1.5)
    assert torch.equal(combine(*waves(), paper), combine(*waves(), reference))
    assert (paper.text_weight, paper.modality_weight) == (reference.text_weight, reference.modality_weight)


def test_full_rescale_restores_the_deviation():
    out = combine(*waves(), GuidanceConfig(cfg=5.0, stg=1.0, stg_blocks=[0], modality=2.0, rescale=1.0))
    torch.testing.assert_close(out.std(), waves()[0].std())


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_a_constant_prediction_is_not_rescaled(rescale):
    """Silence that is given has no deviation: 0 / 0 is no factor."""
    cond, uncond = torch.full((4, 3), 0.5), torch.full((4, 3), 0.25)
    guided = combine(cond, uncond, None, None, GuidanceConfig(cfg=3.0, rescale=rescale))
    assert torch.equal(guided, torch.ones(4, 3))
    assert torch.equal(combine(*[torch.zeros(4, 3)] * 4, FULL), torch.zeros(4, 3))


def test_guidance_keeps_the_dtype_and_computes_in_fp32():
    low = [wave.bfloat16() for wave in waves()]
    exact = combine(*(wave.float() for wave in low), FULL)
    assert torch.equal(combine(*low, FULL), exact.bfloat16())


def test_zero_star_does_not_see_how_long_the_negative_prediction_is():
    cond, uncond, *_ = waves()
    guidance = GuidanceConfig(cfg=4.0, text="zero_star")
    out = combine(cond, uncond, None, None, guidance)
    torch.testing.assert_close(combine(cond, 5 * uncond, None, None, guidance), out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(((out - cond) * uncond).sum(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(combine(cond, cond * 0.3, None, None, guidance), cond)


def test_apg_without_its_settings_is_plain_guidance():
    torch.testing.assert_close(text_only(cfg=4.0, text="apg"), text_only(cfg=4.0))


def test_apg_leaves_out_what_is_along_the_prediction():
    cond = waves()[0]
    moved = text_only(cfg=4.0, text="apg", apg_parallel=0.0) - cond
    torch.testing.assert_close((moved * cond).sum(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert moved.norm() > 0.1


def test_apg_bounds_the_length_before_it_is_weighted():
    cond = waves()[0]
    assert (text_only(cfg=4.0) - cond).norm() > 3 * 0.1
    bounded = text_only(cfg=4.0, text="apg", apg_threshold=0.1)
    torch.testing.assert_close((bounded - cond).norm(), torch.tensor(3 * 0.1))
    torch.testing.assert_close(text_only(cfg=4.0, text="apg", apg_threshold=1e6), text_only(cfg=4.0))


def test_text_guidance_is_that_of_the_diffusers_guiders():
    guiders = pytest.importorskip("diffusers.guiders")
    cond, uncond, *_ = waves()
    zero_star = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=0, guidance_rescale=0.3)
    apg = guiders.AdaptiveProjectedGuidance(
        guidance_scale=3.0,  # one less: this one starts from the prediction, as ours does
        adaptive_projected_guidance_momentum=None,
        adaptive_projected_guidance_rescale=0.2,
        eta=0.4,
        use_original_formulation=True,
    )
    ours = (
        text_only(cfg=4.0, text="zero_star", rescale=0.3),
        text_only(cfg=4.0, text="apg", apg_threshold=0.2, apg_parallel=0.4),
    )
    for found, guider in zip(ours, (zero_star, apg), strict=True):
        guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(500.0))
        torch.testing.assert_close(found, guider.forward(cond, uncond).pred, atol=1e-6, rtol=1e-6)


def test_guidance_is_that_of_the_diffusers_guider():
    guiders = pytest.importorskip("diffusers.guiders")
    if not hasattr(guiders, "LTX2Guidance"):
        pytest.skip("this diffusers has no guider of LTX-2")
    peer = guiders.LTX2Guidance(guidance_scale=3.0, stg_scale=1.0, modality_scale=3.0, guidance_rescale=0.7)
    torch.testing.assert_close(combine(*waves(), FULL), peer.forward(*waves()).pred, atol=1e-6, rtol=1e-6)


def test_guidance_acts_inside_its_interval():
    guidance = replace(FULL, sigma_low=0.3, sigma_high=0.725)
    for sigma in (0.3, 0.5, 0.725, torch.tensor(0.725).item(), torch.tensor(0.3).item()):
        assert guidance.at(sigma) is guidance
    for sigma in (1.0, 0.73, 0.29, 0.0):
        outside = guidance.at(sigma)
        assert [p.name for p in needed_passes(outside, outside)] == ["cond"]
        assert torch.equal(combine(*waves(), outside), waves()[0])
    assert all(FULL.at(sigma) is FULL for sigma in (1.0, 0.5, 0.0))


def test_a_stream_is_computed_and_then_skipped():
    computed = [[GuidanceConfig(skip_step=skip).computes(step) for step in range(6)] for skip in (0, 1, 2)]
    assert computed == [[True] * 6, [True, False] * 3, [True, False, False] * 2]


def test_only_the_needed_passes_run_and_in_their_order():
    plain, cfg = GuidanceConfig(), GuidanceConfig(cfg=2.0)
    assert [p.name for p in needed_passes(plain, plain)] == ["cond"]
    assert [p.name for p in needed_passes(plain, cfg)] == ["cond", "uncond"]
    assert [p.name for p in needed_passes(FULL, plain)] == ["cond", "uncond", "perturbed", "isolated"]
    assert [p.name for p in needed_passes(FULL, None)] == ["cond", "uncond", "perturbed"]
    assert needed_passes(FULL, plain)[2].perturbation == [(SKIP_VIDEO_SELF_ATTN, [1])]
    both = [(SKIP_VIDEO_SELF_ATTN, [1]), (SKIP_AUDIO_SELF_ATTN, [1])]
    assert needed_passes(FULL, FULL)[2].perturbation == both
    assert needed_passes(FULL, plain)[3].perturbation == [(SKIP_A2V, None), (SKIP_V2A, None)]
    away = GuidanceConfig(stg=-0.5, stg_blocks=[1])
    assert [p.name for p in needed_passes(away, plain)] == ["cond", "perturbed"]
    paper = GuidanceConfig(cfg=0.0, modality=1.0, scale="paper")
    assert [p.name for p in needed_passes(paper, plain)] == ["cond", "isolated"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"cfg": math.nan},
        {"modality": math.inf},
        {"rescale": 1.5},
        {"stg": 1.0},
        {"stg_blocks": [-1]},
        {"scale": "percent"},
        {"text": "cfg++"},
        {"apg_threshold": -1.0, "text": "apg"},
        {"apg_parallel": 0.5},
        {"sigma_low": 0.8, "sigma_high": 0.2},
        {"sigma_high": 1.5},
        {"skip_step": -1},
    ],
)
def test_the_configuration_names_the_field_that_is_wrong(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GuidanceConfig(**wrong)

import pytest
import torch

from ltx2_train.diffusion.sigmas import (
    DISTILLED,
    ShiftedLogitNormal,
    SigmaConfig,
    Uniform,
    beta_schedule,
    custom_schedule,
    linear_quadratic_schedule,
    ltx2_schedule,
    shifted_schedule,
    training_shift,
)
from ltx2_train.errors import ConfigError

LTX2_8 = [1, 0.965712, 0.921875, 0.863856, 0.783445, 0.664579, 0.471003, 0.1, 0]
SHIFTED_8 = [1, 0.981941, 0.958854, 0.928297, 0.885948, 0.823345, 0.721394, 0.525999, 0]
LTX2_15_8160 = [1, 0.993491, 0.986015, 0.97734, 0.967151, 0.955015, 0.940314, 0.92214, 0.899096, 0.868923, 0.827707]
LTX2_15_8160 += [0.768028, 0.673897, 0.503378, 0.1, 0]
BETA_8 = [1, 0.994361, 0.980464, 0.956117, 0.914542, 0.840117, 0.695283, 0.394019, 0]

# tokens: shift, mean, 5 %, 25 %, 50 %, 75 %, 95 % quantiles and P(sigma < 0.25) of the published law
TRAINING_LAW = {
    126: (0.628, 0.581, 0.141, 0.409, 0.610, 0.775, 0.921, 0.112),
    510: (0.766, 0.601, 0.154, 0.436, 0.636, 0.793, 0.929, 0.100),
    1024: (0.950, 0.626, 0.167, 0.470, 0.669, 0.816, 0.937, 0.087),
    4096: (2.050, 0.744, 0.261, 0.647, 0.812, 0.906, 0.970, 0.047),
    6120: (2.775, 0.788, 0.301, 0.721, 0.862, 0.933, 0.979, 0.040),
    14080: (5.625, 0.840, 0.363, 0.811, 0.914, 0.960, 0.988, 0.033),
}


def test_schedules_are_the_published_ones():
    torch.testing.assert_close(ltx2_schedule(8), torch.tensor(LTX2_8), atol=1e-6, rtol=0)
    torch.testing.assert_close(shifted_schedule(8), torch.tensor(SHIFTED_8), atol=1e-6, rtol=0)
    torch.testing.assert_close(ltx2_schedule(15, 8160), torch.tensor(LTX2_15_8160), atol=1e-6, rtol=0)
    torch.testing.assert_close(beta_schedule(8), torch.tensor(BETA_8), atol=1e-6, rtol=0)


def test_thirty_steps_end_as_published():
    expected = torch.tensor([1.0, 0.995, 0.9896, 0.4802, 0.3875, 0.2661, 0.1, 0])
    torch.testing.assert_close(ltx2_schedule(30)[[0, 1, 2, -5, -4, -3, -2, -1]], expected, atol=5e-5, rtol=0)


def test_the_distilled_sigmas_are_linear_quadratic():
    torch.testing.assert_close(linear_quadratic_schedule(8), torch.tensor(DISTILLED), atol=1e-6, rtol=0)


@pytest.mark.parametrize("schedule", [ltx2_schedule, shifted_schedule, linear_quadratic_schedule, beta_schedule])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_every_schedule_descends_from_one_to_zero(schedule, steps):
    sigmas = schedule(steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("tokens", [40_800, 52_400, 130_560, 5_000_000])
def test_the_stretched_schedule_of_very_many_tokens_has_a_limit(tokens):
    """The share of signal of step i against that of the last before 0 goes to i n / ((n - i) (n - 1)) without a shift."""
    steps = 15
    limit = [1 - 0.9 * i / (steps - i) / (steps - 1) for i in range(steps)]
    sigmas = ltx2_schedule(steps, tokens)
    torch.testing.assert_close(sigmas, torch.tensor([*limit, 0.0]), atol=1e-5, rtol=0)
    assert (sigmas.diff() < 0).all()
    assert (sigmas[0], sigmas[-1]) == (1, 0)


def test_a_shift_that_presses_sigmas_together_is_refused_by_the_number_of_tokens():
    assert shifted_schedule(24, 32_640)[-1] == 0
    with pytest.raises(ConfigError, match="steps=24 for 60000 tokens: .*tokens=fixed"):
        shifted_schedule(24, 60_000)


def test_a_schedule_without_steps_is_refused():
    for schedule in (ltx2_schedule, beta_schedule):
        with pytest.raises(ConfigError, match="steps=0"):
            schedule(0)


def test_the_beta_schedule_says_when_it_has_no_more_sigmas():
    with pytest.raises(ConfigError, match="steps=1000: .* no more than 997"):
        beta_schedule(1000)


def test_a_custom_schedule_may_start_and_end_anywhere():
    assert custom_schedule(DISTILLED).tolist() == pytest.approx(DISTILLED)
    assert torch.equal(custom_schedule([0.9, 0.5, 0.25]), torch.tensor([0.9, 0.5, 0.25]))


@pytest.mark.parametrize(
    ("sigmas", "complaint"),
    [
        ([1.0, 0.5, 0.6, 0.0], "0.5 is followed by 0.6"),
        ([1.0, 0.5, 0.5, 0.0], "0.5 is followed by 0.5"),
        ([0.5, 0.5 - 1e-10], "0.5 is followed by 0.4999999999"),
        ([1.2, 0.5], r"1.2 is not in \[0, 1\]"),
        ([1.0, -0.1], r"-0.1 is not in \[0, 1\]"),
        ([1.0, float("nan")], r"nan is not in \[0, 1\]"),
        ([1.0], "at least 2"),
        ([], "at least 2"),
    ],
)
def test_a_custom_schedule_names_what_is_wrong(sigmas, complaint):
    with pytest.raises(ConfigError, match=complaint):
        custom_schedule(sigmas)


@pytest.mark.parametrize("tokens", [1024, 4096, 8160])
def test_the_schedule_is_that_of_the_diffusers_scheduler(tokens):
    scheduler_class = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler
    peer = scheduler_class(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
        time_shift_type="exponential",
    )
    peer.set_timesteps(sigmas=torch.linspace(1, 1 / 30, 30).tolist(), mu=training_shift(tokens))
    torch.testing.assert_close(ltx2_schedule(30, tokens), peer.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", TRAINING_LAW)
def test_training_sigmas_follow_the_published_law(tokens):
    shift, mean, *quantiles, low_share = TRAINING_LAW[tokens]
    sigma = ShiftedLogitNormal().sample(400_000, tokens, torch.Generator().manual_seed(0))
    found = torch.quantile(sigma, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    assert training_shift(tokens) == pytest.approx(shift, abs=5e-4)
    assert sigma.mean().item() == pytest.approx(mean, abs=2e-3)
    torch.testing.assert_close(found, torch.tensor(quantiles), atol=5e-3, rtol=0)
    assert (sigma < 0.25).float().mean().item() == pytest.approx(low_share, abs=2e-3)


def test_outer_quantiles_reach_the_ends_and_small_sigmas_are_reflected():
    law = ShiftedLogitNormal(uniform_probability=0)
    normal = torch.tensor([-2.5758, 3.0902, 5.0, -2.6])
    sigma = law.from_draws(4096, normal, torch.zeros(4), torch.zeros(4))
    assert sigma[0].item() == pytest.approx(2e-3, abs=1e-5)  # 0, reflected about 1e-3
    assert sigma[1].item() == pytest.approx(1, abs=1e-5)
    assert sigma[2] == 1  # clamped
    assert sigma[3] > 2e-3


def test_a_tenth_of_the_sigmas_is_uniform():
    law, uniform = ShiftedLogitNormal(), torch.rand(1000)
    choice = torch.arange(1000) / 1000
    sigma = law.from_draws(4096, torch.zeros(1000), uniform, choice)
    torch.testing.assert_close(sigma[:100], 1e-3 + (1 - 1e-3) * uniform[:100])
    assert (sigma[100:] == sigma[100]).all()


def test_uniform_sigmas_fill_their_interval():
    sigma = Uniform(0.2, 0.6).sample(100_000, 4096, torch.Generator().manual_seed(0))
    assert sigma.min() >= 0.2
    assert sigma.max() < 0.6
    assert sigma.mean().item() == pytest.approx(0.4, abs=2e-3)


def test_the_configuration_names_the_field_that_is_wrong():
    assert SigmaConfig(law="uniform").build() == Uniform()
    assert SigmaConfig(std=0.5).build() == ShiftedLogitNormal(0.5)
    for wrong in (
        {"law": "cosine"},
        {"std": 0.0},
        {"eps": 0.7},
        {"uniform_probability": 2.0},
        {"low": 0.9, "high": 0.1},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SigmaConfig(**wrong)

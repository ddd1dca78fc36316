"""Samplers over denoisers that are known exactly: what they reach, how fast they converge, what they leave alone."""

import math
from itertools import pairwise

import pytest
import torch

from ltx2_train.diffusion.path import to_noisy
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.diffusion.sampler import (
    DEFAULT_ETA,
    Sampler,
    SamplerSettings,
    Streams,
    ancestral_coefficients,
    holding,
    res_2s_weights,
    restoring,
    sample_euler,
    sample_euler_ancestral,
    sample_gradient_estimating,
    sample_heun,
    sample_res_2s,
    start_of,
)
from ltx2_train.diffusion.sigmas import DISTILLED, ltx2_schedule
from ltx2_train.errors import ConfigError

# Data that are normal with this mean and standard deviation have a denoiser and a way from noise in closed form.
MEAN, DEVIATION = 0.7, 0.4


def gaussian_denoiser(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    signal, variance = 1 - sigma, DEVIATION**2
    gain = variance * signal / (signal**2 * variance + sigma**2)
    return MEAN + gain * (noisy - signal * MEAN)


def gaussian_path(noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the probability flow that starts at `noise` is at sigma."""
    return (1 - sigma) * MEAN + noise * math.sqrt((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)


def sampled(sampler: Sampler, denoise, noisy, sigmas, draw=None, restore=lambda state: state, **settings):
    profile = SamplerProfile(name="test", sampler=sampler, settings=SamplerSettings(**settings))
    return profile.integrate(denoise, noisy, sigmas, draw or (lambda: torch.randn_like(noisy)), restore)


@pytest.mark.parametrize("sampler", Sampler)
def test_a_denoiser_that_knows_the_data_leads_to_it(sampler):
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    out = sampled(sampler, lambda noisy, sigma: clean, noise, torch.tensor([1.0, 0.7, 0.2, 0.0]))
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("sampler", Sampler)
def test_a_denoiser_that_knows_the_data_is_followed_exactly_on_the_way(sampler):
    """Without new noise, every state lies on the straight line between data and noise, also where the schedule ends."""
    clean, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    eta = {"eta": 0.0} if sampler in DEFAULT_ETA else {}
    sigmas = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    out = sampled(sampler, lambda noisy, sigma: clean, noise, sigmas, **eta)
    torch.testing.assert_close(out, to_noisy(clean, noise, sigmas[-1]), atol=1e-12, rtol=0)


ORDERS = {
    "euler": (sample_euler, {}, 1),
    "euler_ancestral, eta 0": (sample_euler_ancestral, {"eta": 0.0, "draw": None}, 1),
    "heun": (sample_heun, {}, 2),
    "res_2s, eta 0": (sample_res_2s, {"eta": 0.0, "bong": False, "draw": None}, 2),
    "res_2s, eta 0, bong": (sample_res_2s, {"eta": 0.0, "bong": True, "draw": None}, 2),
    "gradient_estimating": (sample_gradient_estimating, {}, 1),
    "gradient_estimating, gamma 1.5": (sample_gradient_estimating, {"gamma": 1.5}, 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_halving_the_steps_shrinks_the_error_by_the_order(name):
    sample, settings, order = ORDERS[name]
    noise, end = torch.tensor([[[1.3]]], dtype=torch.float64), 0.1
    errors = []
    for steps in (16, 32, 64, 128):
        sigmas = torch.linspace(1, end, steps + 1, dtype=torch.float64)
        out = sample(gaussian_denoiser, noise, sigmas, **settings)
        errors.append((out - gaussian_path(noise, end)).abs().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    print(f"{name}: measured orders {', '.join(f'{slope:.3f}' for slope in slopes)}")
    assert slopes[-1] == pytest.approx(order, abs=0.1)


STOCHASTIC = [
    (Sampler.euler_ancestral, {}),
    (Sampler.euler_ancestral, {"eta": 0.5}),
    (Sampler.res_2s, {}),
    (Sampler.res_2s, {"eta": 1.0, "bong": False}),
]


@pytest.mark.parametrize(("sampler", "settings"), STOCHASTIC)
def test_new_noise_leaves_the_level_that_the_model_expects(sampler, settings):
    """With known data, what is left at the schedule's end is noise of its sigma, and other noise than at the start."""
    g = torch.Generator().manual_seed(0)
    shape, end = (1, 100, 200), 0.4
    clean, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    sigmas = torch.tensor([1.0, 0.8, 0.6, end])
    draw = lambda: torch.randn(shape, generator=g)  # noqa: E731
    out = sampled(sampler, lambda noisy, sigma: clean, noise, sigmas, draw, **settings)
    left = (out - (1 - end) * clean) / end
    assert left.std().item() == pytest.approx(1, abs=0.02)
    assert left.mean().item() == pytest.approx(0, abs=0.02)
    assert (left * noise).mean() < 0.75


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_res_2s_replaces_the_share_eta_of_what_is_left(eta):
    """With known data the end is signal, what is kept of the old noise, and the last draw brought to mean 0 and 1."""
    g = torch.Generator().manual_seed(0)
    clean, noise, *draws = torch.randn(4, 2, 6, 5, generator=g, dtype=torch.float64)
    units = (draws[1] - draws[1].mean((1, 2), keepdim=True)) / draws[1].std((1, 2), keepdim=True)
    drawn = iter([draws[0], 3 + 5 * draws[1]])
    out = sample_res_2s(lambda noisy, sigma: clean, noise, torch.tensor([1.0, 0.25]), lambda: next(drawn), eta=eta)
    expected = 0.75 * clean + 0.25 * (math.sqrt(1 - eta**2) * noise + eta * units)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("sigmas", "moves"), [([0.8, 0.5], True), ([0.8, 0.47], False), ([0.032, 0.03], True), ([0.028, 0.027], False)]
)
def test_the_start_is_moved_in_short_steps_above_the_last_sigmas_only(sigmas, moves):
    """As published: steps of less than 0.5 in log sigma (a factor of 1.65) that start above 0.03."""
    noise, draw = torch.randn(2, 1, 4, 2, dtype=torch.float64)
    with_bong, without = (
        sample_res_2s(gaussian_denoiser, noise, torch.tensor(sigmas), lambda: draw, bong=bong) for bong in (True, False)
    )
    assert torch.equal(with_bong, without) != moves


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_steps_converge_to_the_distribution(eta):
    g = torch.Generator().manual_seed(0)
    shape = (1, 200, 500)
    draw, misses = (lambda: torch.randn(shape, generator=g)), []
    for steps in (25, 100, 400):
        out = sampled(
            Sampler.euler_ancestral, gaussian_denoiser, draw(), torch.linspace(1, 0, steps + 1), draw, eta=eta
        )
        misses.append(abs(out.std().item() / DEVIATION - 1))
        assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert misses[2] < 0.015
    assert misses[2] < misses[1] / 2 < misses[0] / 4


@pytest.mark.parametrize("sampler", Sampler)
def test_a_schedule_down_to_zero_ends_with_the_models_last_answer(sampler):
    answers = []

    def denoise(noisy, sigma):
        answers.append(gaussian_denoiser(noisy, sigma))
        return answers[-1]

    out = sampled(sampler, denoise, torch.randn(1, 20, 3), ltx2_schedule(4))
    torch.testing.assert_close(out, answers[-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "sample", "settings"),
    [
        (Sampler.euler_ancestral, sample_euler_ancestral, {"eta": 0.4, "s_noise": 1.2}),
        (Sampler.res_2s, sample_res_2s, {"eta": 0.3, "bong": False}),
        (Sampler.gradient_estimating, sample_gradient_estimating, {"gamma": 1.4}),
    ],
)
def test_the_profiles_settings_reach_its_sampler(sampler, sample, settings):
    g, noise, sigmas = torch.Generator(), torch.randn(1, 20, 3), torch.linspace(1, 0, 9)

    def draws():
        g.manual_seed(0)
        return lambda: torch.randn(1, 20, 3, generator=g)

    own = {} if sampler is Sampler.gradient_estimating else {"draw": draws()}
    expected = sample(gaussian_denoiser, noise, sigmas, **own, **settings)
    assert torch.equal(sampled(sampler, gaussian_denoiser, noise, sigmas, draws(), **settings), expected)
    for name in settings:
        others = {key: value for key, value in settings.items() if key != name}
        assert not torch.equal(sampled(sampler, gaussian_denoiser, noise, sigmas, draws(), **others), expected)


def test_noise_is_drawn_where_it_is_added_and_nowhere_else():
    calls = []

    def draw():
        calls.append(1)
        return torch.randn(1, 2, 3)

    noise, sigmas = torch.randn(1, 2, 3), torch.tensor([1.0, 0.6, 0.3, 0.0])
    expected = {Sampler.euler_ancestral: 2, Sampler.res_2s: 6}  # not in the step to 0; twice in each of three steps
    for sampler in Sampler:
        calls.clear()
        sampled(sampler, gaussian_denoiser, noise, sigmas, draw)
        assert len(calls) == expected.get(sampler, 0), sampler


@pytest.mark.parametrize("sampler", Sampler)
@pytest.mark.parametrize("sigmas", [[1.0, 0.6, 0.3, 0.0], [1.0, 0.6, 0.3], [1.0, 0.001, 0.0], [1.0, 0.0]])
def test_the_profile_knows_how_often_the_model_is_called(sampler, sigmas):
    calls = []

    def denoise(noisy, sigma):
        calls.append(sigma.item())
        return gaussian_denoiser(noisy, sigma)

    profile = SamplerProfile(name="t", sampler=sampler, steps=len(sigmas) - 1, schedule="custom", custom_sigmas=sigmas)
    profile.integrate(denoise, torch.randn(1, 2, 3), profile.sigmas(1), lambda: torch.randn(1, 2, 3))
    assert profile.calls == len(calls)
    assert calls == sorted(calls, reverse=True)
    assert min(calls) > 0


def test_both_streams_are_integrated_together():
    clean = Streams(torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    noise = Streams(torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    seen = []

    def denoise(noisy: Streams, sigma: torch.Tensor) -> Streams:
        seen.append(sigma.item())
        torch.testing.assert_close(noisy.video, to_noisy(clean.video, noise.video, sigma))
        torch.testing.assert_close(noisy.audio, to_noisy(clean.audio, noise.audio, sigma))
        return clean

    sigmas = ltx2_schedule(8)
    out = sample_euler(denoise, noise, sigmas)
    torch.testing.assert_close(out.video, clean.video)
    torch.testing.assert_close(out.audio, clean.audio)
    assert seen == sigmas[:-1].tolist()


@pytest.mark.parametrize("sampler", Sampler)
def test_a_stream_that_is_not_there_stays_away(sampler):
    draw = lambda: Streams(torch.randn(1, 2, 3), None)  # noqa: E731
    out = sampled(sampler, lambda noisy, sigma: noisy, Streams(torch.randn(1, 2, 3), None), ltx2_schedule(2), draw)
    assert out.audio is None
    assert out.video.dtype == torch.float32


@pytest.mark.parametrize("sampler", Sampler)
def test_what_is_given_is_held_through_all_calls(sampler):
    clean, mask = torch.randn(2, 5, 4), torch.tensor([[0.0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    noisy, restore = to_noisy(clean, torch.randn(2, 5, 4), mask), restoring(clean, mask)
    seen = []

    def wrong(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(noisy[0, :2])
        return torch.zeros_like(noisy)

    out = sampled(sampler, holding(wrong, restore), noisy, ltx2_schedule(5), restore=restore)
    for tokens in seen:
        torch.testing.assert_close(tokens, clean[0, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(out[0, :2], clean[0, :2])
    torch.testing.assert_close(out[1], torch.zeros(5, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
def test_what_is_given_comes_back_bit_by_bit_whatever_the_state_holds(wrong):
    clean, mask = torch.randn(1, 3, 2), torch.tensor([[0.0, 1, 0]])
    clean[0, 1] = wrong
    state = torch.tensor([[[wrong, wrong], [0.1, 0.2], [wrong, wrong]]])
    expected = torch.stack([clean[0, 0], torch.tensor([0.1, 0.2]), clean[0, 2]])[None]
    assert torch.equal(restoring(clean, mask)(state), expected)


def test_a_half_given_token_is_a_blend():
    clean, mask = torch.ones(1, 1, 2), torch.full((1, 1), 0.25)
    denoised = holding(lambda noisy, sigma: torch.zeros_like(noisy), restoring(clean, mask))(clean, torch.tensor(1.0))
    assert torch.equal(denoised, torch.full((1, 1, 2), 0.75))


# --- the published numbers ---


def test_ancestral_coefficients_are_the_published_ones():
    """Those were computed in fp32, where 1 - sigma has few digits left beside 1."""
    published = [
        (0.495317, 0.00625, 0.861511),
        (0.659693, 0.008377, 0.738502),
        (0.74171, 0.009479, 0.652982),
        (0.79085, 0.010172, 0.590268),
        (0.519229, 0.077644, 0.755431),
        (0.414207, 0.237462, 0.619472),
        (0.259446, 0.506777, 0.377621),
        (0.0, 1.0, 0.0),
    ]
    for (sigma, sigma_next), expected in zip(pairwise(DISTILLED), published, strict=True):
        assert ancestral_coefficients(sigma, sigma_next, 1.0) == pytest.approx(expected, abs=5e-6)


def test_res_2s_weights_are_the_published_ones():
    half, first, second = res_2s_weights(0.3)
    assert (half / 0.3, first / 0.3, second / 0.3) == pytest.approx((0.464306745, -0.043132306, 0.907071571), abs=1e-9)


def test_the_start_of_a_noised_middle_is_what_a_hundred_repetitions_reach():
    start, half, first = torch.randn(3, 5, 4, dtype=torch.float64)
    weight, _, _ = res_2s_weights(0.49)
    repeated = start
    for _ in range(100):
        repeated = half - weight * (first - repeated)
    torch.testing.assert_close(start_of(half, first, weight=weight), repeated, atol=1e-13, rtol=0)


def test_res_2s_ends_with_an_answer_near_zero():
    seen = []

    def denoise(noisy, sigma):
        seen.append(sigma.item())
        return gaussian_denoiser(noisy, sigma)

    sampled(Sampler.res_2s, denoise, torch.randn(1, 2, 3), torch.tensor([1.0, 0.25, 0.0]), eta=0.0)
    expected = [1.0, 0.5, 0.25, math.sqrt(0.25 * 0.0011), 0.0011]
    assert seen == pytest.approx(expected, rel=1e-6)


# --- diffusers' schedulers ---


@pytest.fixture
def linear_model():
    """A velocity that is a matrix product, and the denoiser that it makes."""
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 2
    return (lambda noisy: noisy @ weights), (lambda noisy, sigma: noisy - sigma * (noisy @ weights))


def test_euler_is_a_step_of_the_diffusers_scheduler(linear_model):
    velocity, denoise = linear_model
    peer = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler()
    sigmas, noise = ltx2_schedule(6), torch.randn(2, 4)
    peer.set_timesteps(sigmas=sigmas[:-1].tolist())
    theirs = noise
    for timestep in peer.timesteps:
        theirs = peer.step(velocity(theirs), timestep, theirs).prev_sample
    torch.testing.assert_close(sample_euler(denoise, noise, sigmas), theirs, atol=1e-5, rtol=1e-5)


def test_heun_is_that_of_the_diffusers_scheduler(linear_model):
    velocity, denoise = linear_model
    peer = pytest.importorskip("diffusers").FlowMatchHeunDiscreteScheduler(shift=3.0)
    peer.set_timesteps(7)
    theirs = noise = torch.randn(2, 4)
    for timestep in peer.timesteps:
        theirs = peer.step(velocity(theirs), timestep, theirs).prev_sample
    sigmas = torch.unique(peer.sigmas).flip(0)
    torch.testing.assert_close(sample_heun(denoise, noise, sigmas), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.5, 1.0), (0.7, 1.1), (0.0, 1.0)])
def test_ancestral_euler_is_that_of_the_diffusers_scheduler(linear_model, eta, s_noise):
    velocity, denoise = linear_model
    peer = pytest.importorskip("diffusers").LTXEulerAncestralRFScheduler(eta=eta, s_noise=s_noise)
    peer.set_timesteps(sigmas=list(DISTILLED))
    theirs = noise = torch.randn(2, 4)
    g = torch.Generator().manual_seed(3)
    for timestep in peer.timesteps[:-1]:
        theirs = peer.step(velocity(theirs), timestep, theirs, generator=g).prev_sample
    g.manual_seed(3)
    ours = sample_euler_ancestral(
        denoise, noise, torch.tensor(DISTILLED), lambda: torch.randn(2, 4, generator=g), eta=eta, s_noise=s_noise
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"eta": 1.5}, {"eta": -0.1}, {"s_noise": -1.0}, {"gamma": 0.0}, {"gamma": math.nan}])
def test_the_settings_name_the_field_that_is_wrong(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplerSettings(**wrong)

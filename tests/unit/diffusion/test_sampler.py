import pytest
import torch

from ltx2_train.diffusion.path import to_noisy
from ltx2_train.diffusion.sampler import Streams, holding, sample_euler
from ltx2_train.diffusion.sigmas import ltx2_schedule


def test_euler_is_exact_for_a_perfect_denoiser():
    clean, noise = torch.randn(2, 4), torch.randn(2, 4)
    out = sample_euler(lambda noisy, sigma: clean, noise, torch.tensor([1.0, 0.7, 0.2, 0.0]))
    torch.testing.assert_close(out, clean)


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


def test_euler_is_a_step_of_the_diffusers_scheduler():
    peer = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler()
    sigmas = ltx2_schedule(6)
    peer.set_timesteps(sigmas=sigmas[:-1].tolist())
    weights, noise = torch.randn(4, 4) / 2, torch.randn(2, 4)
    theirs = noise
    for timestep in peer.timesteps:
        theirs = peer.step(theirs @ weights, timestep, theirs).prev_sample
    ours = sample_euler(lambda noisy, sigma: noisy - sigma * (noisy @ weights), noise, sigmas)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_is_given_is_held_through_all_steps():
    clean, mask = torch.randn(2, 5, 4), torch.tensor([[0.0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    noisy = to_noisy(clean, torch.randn(2, 5, 4), mask)
    seen = []

    def wrong(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(noisy[0, :2])
        return torch.zeros_like(noisy)

    out = sample_euler(holding(wrong, clean, mask), noisy, ltx2_schedule(5))
    assert all(torch.equal(tokens, clean[0, :2]) for tokens in seen)
    torch.testing.assert_close(out[0, :2], clean[0, :2])
    torch.testing.assert_close(out[1], torch.zeros(5, 4), atol=1e-6, rtol=0)


def test_a_half_given_token_is_a_blend():
    clean, mask = torch.ones(1, 1, 2), torch.full((1, 1), 0.25)
    denoised = holding(lambda noisy, sigma: torch.zeros_like(noisy), clean, mask)(clean, torch.tensor(1.0))
    assert torch.equal(denoised, torch.full((1, 1, 2), 0.75))


def test_a_stream_that_is_not_there_stays_away():
    out = sample_euler(lambda noisy, sigma: noisy, Streams(torch.randn(1, 2, 3), None), ltx2_schedule(2))
    assert out.audio is None

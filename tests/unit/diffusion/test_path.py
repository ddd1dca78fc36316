import torch

from ltx2_train.diffusion.path import to_denoised, to_noisy, to_velocity, velocity_of


def test_the_path_starts_at_data_and_ends_at_noise():
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(to_noisy(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(to_noisy(clean, noise, torch.ones(2, 3)), noise)


def test_velocity_leads_back_to_the_clean_latent():
    clean, noise, sigma = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.0, 1.0]])
    noisy = to_noisy(clean, noise, sigma)
    torch.testing.assert_close(to_denoised(noisy, velocity_of(clean, noise), sigma), clean)


def test_velocity_and_denoised_are_two_names_of_one_thing():
    clean, noise, sigma = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor(0.3)
    noisy = to_noisy(clean, noise, sigma)
    torch.testing.assert_close(to_velocity(noisy, clean, sigma), velocity_of(clean, noise))


def test_low_precision_latents_are_computed_in_fp32():
    clean, noise = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    assert to_noisy(clean, noise, torch.tensor(0.5)).dtype == torch.float32
    assert to_denoised(clean, noise, torch.tensor(0.5)).dtype == torch.float32
    assert velocity_of(clean, noise).dtype == torch.float32

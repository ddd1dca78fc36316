"""The straight path between data (sigma = 0) and noise (sigma = 1), and the three ways to name a point on it.

`noisy = (1 - sigma) * clean + sigma * noise`, `velocity = noise - clean`, `denoised = noisy - sigma * velocity`.
All arithmetic is fp32, or fp64 where that comes in. Source: Liu et al. 2022, "Flow Straight and Fast"
(arXiv:2209.03003), eq. 1.
"""

import torch
from torch import Tensor


def to_noisy(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at `sigma` between clean and noise, fp32; exactly `clean` where sigma is 0 and `noise` where it is 1.

    `sigma` has the leading dimensions of `clean`: (), (B,), (B, T), or (B, 1) for all tokens alike.
    """
    sigma = _aligned(sigma, clean)
    return (1 - sigma) * _precise(clean) + sigma * _precise(noise)


def velocity_of(clean: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict: noise - clean, fp32, the same at every sigma."""
    return _precise(noise) - _precise(clean)


def to_denoised(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that `velocity` points to, fp32. `sigma` is that of each token: 0 for a token that is given."""
    return _precise(noisy) - _aligned(sigma, noisy) * _precise(velocity)


def to_velocity(noisy: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that leads from `noisy` to `denoised`, fp32. `sigma` > 0."""
    return (_precise(noisy) - _precise(denoised)) / _aligned(sigma, noisy)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _aligned(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` with trailing axes of size 1, so that it broadcasts over `like`.

    A single sigma keeps its shape (): only so may it stay on the CPU beside tensors of the device.
    """
    sigma = _precise(sigma)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim)) if sigma.ndim else sigma

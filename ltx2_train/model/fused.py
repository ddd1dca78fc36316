"""The element-wise work between the matrix products, each piece with a hand-written backward.

More than half of a small model's step, and most of a large one's memory traffic, is norms, modulation, rotation and gates.
Written as plain tensor expressions, autograd keeps four or five copies of every activation for them; these keep the
input and one number per token. They mean exactly the expressions in their docstrings (held by gradient checks).

A modulation is (B, K, D): one row per sample (K = 1), per token (K = T), or per *run*: `runs` is a partition of the
token axis into (start, stop, row), so that a few distinct timesteps never become T rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltx2_train.model.rope import Rope, rotate

Runs = tuple[tuple[int, int, int], ...]  # (start, stop, row), covering the token axis in order


def rms_modulate(x: Tensor, scale: Tensor, shift: Tensor, runs: Runs | None, eps: float) -> Tensor:
    """rms(x) * (1 + scale) + shift for x (B, T, D); the norm is computed in fp32 and rounded once."""
    return _RmsModulate.apply(x, scale, shift, runs, eps)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, runs: Runs | None) -> Tensor:
    """x + y * gate for x, y (B, T, D)."""
    return _GatedAdd.apply(x, y, gate, runs)


def norm_rotate(x: Tensor, weight: Tensor, rope: Rope | None, heads: int, eps: float) -> Tensor:
    """rms(x) * weight over the whole width of x (B, T, D), cut into heads and rotated: (B, T, N, K)."""
    return _NormRotate.apply(x, weight, rope, heads, eps)


def _pieces(values: Tensor, runs: Runs | None) -> list[tuple[slice, Tensor]]:
    """(token slice, values that broadcast over it) pairs."""
    if runs is None:
        return [(slice(None), values)]
    return [(slice(start, stop), values[:, row : row + 1]) for start, stop, row in runs]


def _times(x: Tensor, rows: Tensor, runs: Runs | None) -> Tensor:
    """x * rows as a new tensor, run by run."""
    if runs is None:
        return x * rows
    out = torch.empty_like(x)
    for tokens, row in _pieces(rows, runs):
        torch.mul(x[:, tokens], row, out=out[:, tokens])
    return out


def _reduce(grad: Tensor, shape: torch.Size, runs: Runs | None) -> Tensor:
    """Sum a token-wise gradient (B, T, D) to the shape (B or 1, K, D) of a modulation."""
    if runs is not None:
        rows = grad.new_zeros(grad.shape[0], shape[1], grad.shape[2])
        for start, stop, row in runs:
            rows[:, row] += grad[:, start:stop].sum(1)
        grad = rows
    elif shape[1] == 1:
        grad = grad.sum(1, keepdim=True)
    return grad.sum(0, keepdim=True) if shape[0] == 1 < grad.shape[0] else grad


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    x = x if x.dtype is torch.float64 else x.float()
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _rms_backward(grad: Tensor, normed: Tensor, inverse_rms: Tensor) -> Tensor:
    """Gradient of x / rms(x), from the gradient and the value of the normed tensor; overwrites `grad`."""
    mean = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, mean, value=-1).mul_(inverse_rms)


class _RmsModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, runs: Runs | None, eps: float) -> Tensor:
        inverse_rms = _inverse_rms(x, eps)
        out = (x * inverse_rms).to(x.dtype)
        for tokens, row in _pieces(scale, runs):
            out[:, tokens].mul_(1 + row)
        for tokens, row in _pieces(shift, runs):
            out[:, tokens].add_(row)
        ctx.save_for_backward(x, scale, inverse_rms)
        ctx.runs, ctx.shift_shape = runs, shift.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inverse_rms = ctx.saved_tensors
        normed = (x * inverse_rms).to(x.dtype)
        grad_scale = _reduce(grad * normed, scale.shape, ctx.runs) if ctx.needs_input_grad[1] else None
        grad_shift = _reduce(grad, ctx.shift_shape, ctx.runs) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _rms_backward(_times(grad, 1 + scale, ctx.runs), normed, inverse_rms)
        return grad_x, grad_scale, grad_shift, None, None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, runs: Runs | None) -> Tensor:
        ctx.save_for_backward(y, gate)
        ctx.runs = runs
        return _times(y, gate, runs).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        grad_y = _times(grad, gate, ctx.runs) if ctx.needs_input_grad[1] else None
        grad_gate = _reduce(grad * y, gate.shape, ctx.runs) if ctx.needs_input_grad[2] else None
        return grad, grad_y, grad_gate, None


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rope: Rope | None, heads: int, eps: float) -> Tensor:
        inverse_rms = _inverse_rms(x, eps)
        out = (x * inverse_rms).mul_(weight).to(x.dtype).unflatten(-1, (heads, -1))
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.rope = rope
        return out if rope is None else rotate(out, rope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        grad = (grad if ctx.rope is None else rotate(grad, ctx.rope, inverse=True)).flatten(-2)
        normed = (x * inverse_rms).to(x.dtype)
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_x = _rms_backward(grad * weight, normed, inverse_rms).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, None, None, None

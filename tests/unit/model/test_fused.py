"""The hand-written backward passes are the derivatives of the expressions they stand for."""

import pytest
import torch

from ltx2_train import geometry
from ltx2_train.model.config import RopeType
from ltx2_train.model.fused import gated_add, norm_rotate, rms_modulate
from ltx2_train.model.rope import RopeSpec, build_rope

B, T, D, EPS = 2, 5, 12, 1e-6
RUNS = ((0, 2, 1), (2, 4, 0), (4, 5, 1))
ROWS = {"per sample": (1, None), "per token": (T, None), "runs": (2, RUNS)}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def spread(rows: torch.Tensor, runs) -> torch.Tensor:
    if runs is None:
        return rows
    return torch.cat([rows[:, r : r + 1].expand(-1, stop - start, -1) for start, stop, r in runs], 1)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


@pytest.mark.parametrize(("rows", "runs"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("batch", [1, B])
def test_rms_modulate(rows: int, runs, batch: int):
    torch.manual_seed(0)
    x, scale, shift = numbers(B, T, D), numbers(batch, rows, D), numbers(batch, rows, D)
    expected = rms(x) * (1 + spread(scale, runs)) + spread(shift, runs)
    torch.testing.assert_close(rms_modulate(x, scale, shift, runs, EPS), expected)
    assert torch.autograd.gradcheck(lambda *a: rms_modulate(*a, runs, EPS), (x, scale, shift))


@pytest.mark.parametrize(("rows", "runs"), ROWS.values(), ids=ROWS)
def test_gated_add(rows: int, runs):
    torch.manual_seed(0)
    x, y, gate = numbers(B, T, D), numbers(B, T, D), numbers(B, rows, D)
    torch.testing.assert_close(gated_add(x, y, gate, runs), x + y * spread(gate, runs))
    assert torch.autograd.gradcheck(lambda *a: gated_add(*a, runs), (x, y, gate))


@pytest.mark.parametrize("rope_type", RopeType)
@pytest.mark.parametrize("rotated", [True, False])
def test_norm_rotate(rope_type: RopeType, rotated: bool):
    torch.manual_seed(0)
    spec = RopeSpec(1, D, 3, (20.0,), 10000.0, True, rope_type)
    rope = build_rope(geometry.audio_positions(T)[None], spec, torch.float64) if rotated else None
    x, weight = numbers(B, T, D), numbers(D)
    out = norm_rotate(x, weight, rope, 3, EPS)
    torch.testing.assert_close(out.square().sum(-1), (rms(x) * weight).unflatten(-1, (3, -1)).square().sum(-1))
    assert torch.autograd.gradcheck(lambda *a: norm_rotate(*a, rope, 3, EPS), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_torch_s_rms_norm_to_the_bit(dtype: torch.dtype):
    """fp32 reduction, the weight multiplied before the one rounding."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 7, 256).to(dtype), torch.randn(256).to(dtype)
    out = norm_rotate(x, weight, None, 1, EPS).flatten(-2)
    reference = torch.nn.functional.rms_norm(x.float(), (256,), weight.float(), EPS).to(dtype)
    differing = (out != reference).float().mean()
    assert differing < (0.002 if dtype is torch.bfloat16 else 1.0)
    torch.testing.assert_close(out, reference, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)

"""Multi-head attention with whole-width query/key norms, rotary positions and per-head output gates."""

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor, nn

from ltx2_train.model.fused import norm_rotate
from ltx2_train.model.rope import Rope


class Skip(Enum):
    """Perturbation of a whole batch: the operation does not run at all."""

    ALL = "all"


# Per sample (B, 1, 1) of 0 / 1; the samples that are not perturbed, where nothing is computed for the others; the whole
# batch skipped; or nothing perturbed.
Keep = Tensor | slice | Skip | None
KeysValues = tuple[Tensor, Tensor]  # (B, S, N, K) each


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of queries (B, T, N, K) to keys and values (B, S, N, K), with an additive bias: (B, T, N, K)."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


class RmsNormWeight(nn.Module):
    """The affine weight of a query or key norm; the arithmetic is in `norm_rotate`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Queries from `query_dim`, keys and values from `context_dim`, `heads` heads over `inner_dim`."""

    def __init__(
        self, query_dim: int, context_dim: int, inner_dim: int, heads: int, *, gated: bool, eps: float
    ) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.attend: Attend = attend  # another one stands here where tokens lie on several devices
        self.q_norm = RmsNormWeight(inner_dim)
        self.k_norm = RmsNormWeight(inner_dim)
        self.to_q = nn.Linear(query_dim, inner_dim)
        self.to_k = nn.Linear(context_dim, inner_dim)
        self.to_v = nn.Linear(context_dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim)])  # a list: the published key is to_out.0
        self.to_gate_logits = nn.Linear(query_dim, heads) if gated else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rope: Rope | None = None,
        context_rope: Rope | None = None,
        bias: Tensor | None = None,
        keep: Keep = None,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """Attend from x (B, T, query_dim) to the context, or to itself.

        `rope`, `context_rope`: rotations of queries and keys. `bias`: additive, broadcastable to (B, N, T, S).
        `keep`: where it is 0 the value projection passes through unattended (spatio-temporal guidance,
        arXiv:2411.18664); gates and output projection still apply. `keys_values`: those of a context, made before.
        """
        if keys_values is not None:
            out = self.attend(self._query(x, rope), *keys_values, bias)
        else:
            out = self._attend(x, x if context is None else context, rope, context_rope, bias, keep)
        if self.to_gate_logits is not None:
            out = out * (2 * torch.sigmoid(self.to_gate_logits(x)))[..., None]
        return self.to_out[0](out.flatten(-2))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of a context (B, S, context_dim) without positions."""
        return self._key(context, None), self._value(context)

    def _attend(
        self, x: Tensor, source: Tensor, rope: Rope | None, context_rope: Rope | None, bias: Tensor | None, keep: Keep
    ) -> Tensor:
        value = self._value(source)
        if keep is Skip.ALL:
            return value
        if isinstance(keep, slice):
            rope, context_rope = (None if r is None else r.of(keep) for r in (rope, context_rope))
            bias = bias if bias is None or len(bias) == 1 else bias[keep]
            attended = self._attended(x[keep], source[keep], value[keep], rope, context_rope, bias)
            return torch.cat([value[: keep.start], attended, value[keep.stop :]])
        out = self._attended(x, source, value, rope, context_rope, bias)
        return torch.lerp(value, out, keep[..., None].to(out.dtype)) if isinstance(keep, Tensor) else out

    def _attended(
        self,
        x: Tensor,
        source: Tensor,
        value: Tensor,
        rope: Rope | None,
        context_rope: Rope | None,
        bias: Tensor | None,
    ) -> Tensor:
        return self.attend(self._query(x, rope), self._key(source, context_rope), value, bias)

    def _query(self, x: Tensor, rope: Rope | None) -> Tensor:
        return norm_rotate(self.to_q(x), self.q_norm.weight, rope, self.heads, self.eps)

    def _key(self, source: Tensor, rope: Rope | None) -> Tensor:
        return norm_rotate(self.to_k(source), self.k_norm.weight, rope, self.heads, self.eps)

    def _value(self, source: Tensor) -> Tensor:
        return self.to_v(source).unflatten(-1, (self.heads, -1))


class Up(nn.Module):
    """First half of a feed-forward; the published keys are net.0.proj and net.2."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """W2 gelu_tanh(W1 x), four times as wide inside."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.net = nn.ModuleList([Up(width, bias=bias), nn.Identity(), nn.Linear(4 * width, width, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def text_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive bias (B, 1, 1, L) of a text mask: int or bool (1 = valid) or already additive float."""
    if mask is None:
        return None
    if not mask.dtype.is_floating_point:
        mask = (mask.to(dtype) - 1) * torch.finfo(dtype).max
    return mask[:, None, None, :].to(dtype)


def self_attention_bias(strength: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive bias (B, 1, T, T) of a self-attention strength in [0, 1]: its logarithm."""
    if strength is None:
        return None
    bias = strength.to(dtype).clamp(min=torch.finfo(dtype).tiny).log()
    return bias.masked_fill(strength <= 0, torch.finfo(dtype).min)[:, None]

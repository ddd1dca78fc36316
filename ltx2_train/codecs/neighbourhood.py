"""Attention of every position to the box of positions around it, in blocks whose memory does not grow with the clip.

The library computes it with a mask of all positions against all, which for a clip of ordinary size is larger than any
device. Here a block of queries meets the keys that any of them sees, and a small mask keeps what each may see.
Source: Hassani et al., "Neighborhood Attention Transformer" (2023), section 3; boxes at a border are moved inward.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERIES = 8  # per dim of a block


class NeighbourhoodProcessor:
    """Computes one attention layer of the diffusion decoder, in place of the library's."""

    def __call__(self, attn: Any, hidden: Tensor, block_mask: None = None) -> Tensor:
        """(B, T, H, W, D) to the same shape; queries come scaled."""
        query, key, value = attn.project_qkv(hidden)
        attended = neighbourhood_attention(query, key, value, attn.kernel_size)
        return attn.to_out[0](attended.flatten(-2))


def neighbourhood_attention(query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Queries, keys and values (B, T, H, W, N, K) to (B, T, H, W, N, K); no size of the grid is below the window's."""
    out = torch.empty_like(value)
    axes = [list(_blocks(size, span, query.device)) for size, span in zip(query.shape[1:4], window, strict=True)]
    for block in product(*axes):
        (t, h, w), (kt, kh, kw) = (axis[0] for axis in block), (axis[1] for axis in block)
        q, k, v = _tokens(query[:, t, h, w]), _tokens(key[:, kt, kh, kw]), _tokens(value[:, kt, kh, kw])
        attended = scaled_dot_product_attention(q, k, v, _mask(*(axis[2] for axis in block)), scale=1.0)
        out[:, t, h, w] = attended.transpose(1, 2).reshape(out[:, t, h, w].shape)
    return out


def _blocks(size: int, span: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of one dim: the queries of a block, the keys that they see, and which of them sees which."""
    for start in range(0, size, QUERIES):
        stop = min(start + QUERIES, size)
        first = [min(max(i - span // 2, 0), size - span) for i in range(start, stop)]
        begin = torch.tensor(first, device=device)[:, None]
        keys = torch.arange(first[0], first[-1] + span, device=device)
        yield slice(start, stop), slice(first[0], first[-1] + span), (keys >= begin) & (keys < begin + span)


def _tokens(block: Tensor) -> Tensor:
    """(B, t, h, w, N, K) to (B, N, t * h * w, K)."""
    return block.flatten(1, 3).transpose(1, 2)


def _mask(time: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Masks (queries, keys) of the three dims to the one of the block."""
    plane = height[:, None, :, None] & width[:, None, :]
    box = time[:, None, None, :, None, None] & plane[:, :, None]
    return box.reshape(len(time) * len(height) * len(width), -1)

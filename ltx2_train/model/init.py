"""Initial weights for training from scratch, as a function of (seed, parameter name) alone.

A tensor is generated whole on the CPU and then sharded, so the same run starts from the same numbers on any number of
GPUs. The choices:
- linear layers: normal with variance 1 / fan-in; biases zero;
- the layers that write to the residual stream (`to_out.0`, `net.2`) a fifth of that, so that the blocks start near the
  identity and the stream keeps its scale through 48 of them;
- the last linear of every AdaLN zero ("adaLN-zero", DiT, arXiv:2212.09748), so that modulation starts at the tables;
- tables zero except their gate rows, which are one: with zero gates as in DiT nothing but the gates would learn in the
  first step, and small models lose hundreds of steps to that;
- the output projections zero: the first prediction is the mean velocity, zero;
- query and key norms one, head gates zero (2 sigmoid(0) = 1), registers and the keyframe marker small and normal.
"""

import re
from math import sqrt

import torch
from torch import Tensor

from ltx2_train.rng import generator

RESIDUAL_SCALE = 0.2
SMALL = 0.02
_ZERO = re.compile(
    r"(^|\.)(audio_)?proj_out\.|adaln_single\.linear\.|gate_adaln_single\.linear\.|to_gate_logits\.|\.bias$|lora_B"
)
_ONE = re.compile(r"[qk]_norm\.weight$")
_RESIDUAL = re.compile(r"(to_out\.0|net\.2)\.weight$")
_SMALL = re.compile(r"learnable_registers$|keyframes_abs_pos_embedding$")


def initial_tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The fp32 CPU tensor that parameter `name` starts from; the same inside and outside a LoRA wrapping."""
    name = name.replace(".base_layer.", ".")
    if name.endswith("scale_shift_table") or ".scale_shift_table_a2v" in name:
        return _table(name, shape)
    if _ZERO.search(name):
        return torch.zeros(shape)
    if _ONE.search(name):
        return torch.ones(shape)
    noise = torch.randn(shape, generator=generator(seed, "init", name))
    if _SMALL.search(name):
        return noise * SMALL
    return noise * ((RESIDUAL_SCALE if _RESIDUAL.search(name) else 1.0) / sqrt(shape[-1]))


def _table(name: str, shape: torch.Size) -> Tensor:
    """Gate rows are 2, 5 and 8 of a block's main table and 4 of an exchange table; others hold shifts and scales."""
    table = torch.zeros(shape)
    if "_a2v_ca_" in name:
        table[4] = 1
    elif shape[0] in (6, 9):
        table[2::3] = 1
    return table

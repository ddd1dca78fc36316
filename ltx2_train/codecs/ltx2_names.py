"""What released files call the tensors that diffusers' modules have: maps from diffusers' names to keys of a file."""

import re
from collections.abc import Iterator, Mapping

import torch

from ltx2_train.weightfile import Deferred, Stored

STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
UNUSED_STATISTICS = re.compile(r"per_channel_statistics\.(channel|mean-of-stds|mean-of-stds_over_std-of-means)")
UNUSED_DECODER = re.compile(r"decoder\.(type_emb|(.+\.)?coarse_[^.]+(\..+)?)")  # of training; no decode reads them

BLOCK = re.compile(r"(encoder|decoder)\.(?:mid_block|(?:down|up)_blocks\.(\d+)(\.(?:down|up)samplers\.0)?)\.(.+)")
VOCODER_PARTS = {
    "conv_in": "conv_pre",
    "conv_out": "conv_post",
    "upsamplers": "ups",
    "resnets": "resblocks",
    "act_out": "act_post",
    "downsample": "downsample.lowpass",
}
DIFFUSION_PARTS = (
    (re.compile(r"\.attn\.to_out\.0\."), ".attn.proj."),
    (re.compile(r"\.attn\.norm_([qk])\."), r".attn.\1_norm."),
    (re.compile(r"^decoder\.t_embedder\.timestep_embedder\.linear_1\."), "decoder.t_embedder.mlp.0."),
    (re.compile(r"^decoder\.t_embedder\.timestep_embedder\.linear_2\."), "decoder.t_embedder.mlp.2."),
)
FUSED = re.compile(r"(decoder\..+\.attn\.)qkv(\.(?:weight|bias))")
GATED = {"attn.proj": "gate_msa", "mlp.w_down": "gate_mlp", "context_proj": "gate_ctx"}  # layers and what scales them


def video_vae(name: str, num_downsamples: int) -> str:
    """The key of a tensor of the convolutional video VAE, without prefix.

    A file counts residual stages and the resamplers between them in one list: stage j of the encoder is block 2j, its
    downsampler 2j + 1; the decoder starts with what diffusers calls its middle.
    """
    if name in STATISTICS:
        return STATISTICS[name]
    if match := BLOCK.fullmatch(name):
        side, index, resampler, rest = match.groups()
        down = side == "encoder"
        if index is None:
            number = 2 * num_downsamples if down else 0
        else:
            number = 2 * int(index) + (1 if resampler else 0 if down else 2)
        rest = re.sub(r"^resnets\.", "res_blocks.", rest)
        return f"{side}.{'down' if down else 'up'}_blocks.{number}.{rest}"
    return re.sub(r"^decoder\.(time_embedder|scale_shift_table)", r"decoder.last_\1", name)


def diffusion_decoder(name: str) -> str:
    """The key of a tensor of the diffusion decoder after `split_fused`, without prefix."""
    for pattern, replacement in DIFFUSION_PARTS:
        name = pattern.sub(replacement, name)
    return name


def audio_vae(name: str) -> str:
    """The key of a tensor of the audio VAE, without prefix."""
    return STATISTICS.get(name, name)


def vocoder(name: str) -> str:
    """The key of a tensor of either vocoder, without prefix. Compared part by part: `upsample` contains `ups`."""
    return ".".join(VOCODER_PARTS.get(part, part) for part in name.split("."))


def used(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Without statistics and tensors that were of use in training only."""
    unused = (UNUSED_STATISTICS, UNUSED_DECODER)
    return {key: tensor for key, tensor in tensors.items() if not any(p.fullmatch(key) for p in unused)}


def split_fused(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The diffusion decoder's tensors with `qkv` as `to_q`, `to_k`, `to_v` and the static gates in the layers they scale."""
    return dict(_split(_fold_gates(tensors)))


def _split(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Stored]]:
    for key, tensor in tensors.items():
        match = FUSED.fullmatch(key)
        if match is None:
            yield key, tensor
            continue
        third = tensor.shape[0] // 3
        for i, part in enumerate("qkv"):
            yield f"{match[1]}to_{part}{match[2]}", _rows(tensor, i * third, (i + 1) * third)


def _rows(tensor: Stored, start: int, stop: int) -> Stored:
    return Deferred(tensor.dtype, torch.Size([stop - start, *tensor.shape[1:]]), lambda: tensor.rows(start, stop))


def _fold_gates(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """A residual that is scaled by a gate is the residual of a layer whose output rows are scaled."""
    folded = dict(tensors)
    for layer, gate in GATED.items():
        for key in [key for key in tensors if key.endswith(f".{gate}")]:
            scale = folded.pop(key)
            block = key.removesuffix(gate)
            for name in (f"{block}{layer}.weight", f"{block}{layer}.bias"):
                if name in folded:
                    folded[name] = _scaled(folded[name], scale)
    return folded


def _scaled(tensor: Stored, scale: Stored) -> Stored:
    """Rows times one factor each; the product in fp32, kept there: rounding it again would lose what was trained."""

    def compute() -> torch.Tensor:
        value = tensor.read().float()
        return value * scale.read().float().reshape(-1, *[1] * (value.ndim - 1))

    return Deferred(torch.float32, tensor.shape, compute)

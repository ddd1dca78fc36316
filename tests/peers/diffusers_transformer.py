"""diffusers' transformer with our weights: an independent implementation of the same architecture.

It agrees with the published arithmetic except in the timestep of the audio-video gate when sigmas differ or tokens are
given clean (`correct_gate` puts it right), and for fractional self-attention masks (not compared).
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train import geometry
from ltx2_train.model import Modality, Transformer, TransformerConfig

KEY_MAP = [
    (r"^patchify_proj\.", "proj_in."),
    (r"^audio_patchify_proj\.", "audio_proj_in."),
    (r"^adaln_single\.", "time_embed."),
    (r"^audio_adaln_single\.", "audio_time_embed."),
    (r"^prompt_adaln_single\.", "prompt_adaln."),
    (r"^audio_prompt_adaln_single\.", "audio_prompt_adaln."),
    (r"^av_ca_video_scale_shift_adaln_single\.", "av_cross_attn_video_scale_shift."),
    (r"^av_ca_audio_scale_shift_adaln_single\.", "av_cross_attn_audio_scale_shift."),
    (r"^av_ca_a2v_gate_adaln_single\.", "av_cross_attn_video_a2v_gate."),
    (r"^av_ca_v2a_gate_adaln_single\.", "av_cross_attn_audio_v2a_gate."),
    (r"\.scale_shift_table_a2v_ca_video$", ".video_a2v_cross_attn_scale_shift_table"),
    (r"\.scale_shift_table_a2v_ca_audio$", ".audio_a2v_cross_attn_scale_shift_table"),
    (r"\.([qk])_norm\.weight$", r".norm_\1.weight"),
]


def peer_key(name: str) -> str:
    for pattern, replacement in KEY_MAP:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def peer_of(model: Transformer) -> nn.Module:
    """diffusers' class built for our configuration, holding our weights (strictly loaded)."""
    from diffusers import LTX2VideoTransformer3DModel

    peer = LTX2VideoTransformer3DModel(**constructor_arguments(model.config))
    peer.load_state_dict({peer_key(n): t.clone() for n, t in model.state_dict().items()}, strict=True)
    return peer


def constructor_arguments(config: TransformerConfig) -> dict[str, Any]:
    max_pos = config.positional_embedding_max_pos
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "cross_attention_dim": config.cross_attention_dim,
        "pos_embed_max_pos": max_pos[0],
        "base_height": max_pos[1],
        "base_width": max_pos[2],
        "gated_attn": config.apply_gated_attention,
        "audio_gated_attn": config.apply_gated_attention,
        "cross_attn_mod": config.cross_attention_adaln,
        "audio_cross_attn_mod": config.cross_attention_adaln,
        "audio_in_channels": config.audio_in_channels,
        "audio_out_channels": config.audio_out_channels,
        "audio_num_attention_heads": config.audio_num_attention_heads,
        "audio_attention_head_dim": config.audio_attention_head_dim,
        "audio_cross_attention_dim": config.audio_cross_attention_dim,
        "audio_pos_embed_max_pos": config.audio_positional_embedding_max_pos[0],
        "num_layers": config.num_layers,
        "norm_eps": config.norm_eps,
        "caption_channels": config.caption_channels,
        "rope_theta": config.positional_embedding_theta,
        "rope_double_precision": config.frequencies_precision == "float64",
        "timestep_scale_multiplier": config.timestep_scale_multiplier,
        "cross_attn_timestep_scale_multiplier": config.av_ca_timestep_scale_multiplier,
        "rope_type": str(config.rope_type),
        "use_prompt_embeddings": not config.caption_proj_before_connector,
        "perturbed_attn": True,
        "ff_bias": config.ff_bias,
        "audio_ff_bias": config.audio_ff_bias,
        "use_prompt_adaln_single": config.use_prompt_adaln_single,
        "use_keyframes_abs_pos_embedding": config.use_keyframes_abs_pos_embedding,
    }


def per_token(modality: Modality) -> Tensor:
    return modality.timesteps.expand(-1, modality.latent.shape[1])


def peer_arguments(video: Modality, audio: Modality) -> dict[str, Any]:
    """Our inputs as diffusers takes them: timesteps and sigmas already times 1000."""
    batch = len(video.sigma)
    arguments = {
        "hidden_states": video.latent,
        "audio_hidden_states": audio.latent,
        "encoder_hidden_states": video.context,
        "audio_encoder_hidden_states": audio.context,
        "timestep": per_token(video) * 1000,
        "audio_timestep": per_token(audio) * 1000,
        "sigma": video.sigma * 1000,
        "audio_sigma": audio.sigma * 1000,
        "video_coords": video.positions.expand(batch, -1, -1, -1),
        "audio_coords": audio.positions.expand(batch, -1, -1, -1),
        "encoder_attention_mask": video.context_mask,
        "audio_encoder_attention_mask": audio.context_mask,
        "use_cross_timestep": False,
    }
    if video.keyframes_mask is not None:
        arguments["video_keyframes_mask"] = video.keyframes_mask
    return arguments


def correct_gate(peer: nn.Module, video: Modality, audio: Modality) -> None:
    """Feed the audio-video gates the other stream's sigma, as published."""
    sigmas = {"av_cross_attn_video_a2v_gate": audio.sigma, "av_cross_attn_audio_v2a_gate": video.sigma}
    for name, sigma in sigmas.items():
        module = peer.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, s=sigma: (s * 1000, *args[1:]))


def random_inputs(
    config: TransformerConfig,
    batch: int,
    grid: tuple[int, int, int],
    steps: int,
    text: int,
    *,
    shared_sigma: bool = True,
) -> tuple[Modality, Modality]:
    """Random latents and text on real positions; one sigma for both streams unless told otherwise."""
    g = torch.Generator().manual_seed(1)
    tokens = grid[0] * grid[1] * grid[2]
    widths = (
        (config.video_width, config.audio_width)
        if config.caption_proj_before_connector
        else (config.caption_channels or 0, config.caption_channels or 0)
    )
    sigma_video = torch.rand(batch, generator=g)
    sigma_audio = sigma_video if shared_sigma else torch.rand(batch, generator=g)
    video = Modality(
        latent=torch.randn(batch, tokens, config.in_channels, generator=g),
        sigma=sigma_video,
        timesteps=sigma_video[:, None],
        positions=geometry.batch_video_positions(*grid, (24.0,), torch.device("cpu")),
        context=torch.randn(batch, text, widths[0], generator=g),
    )
    audio = Modality(
        latent=torch.randn(batch, steps, config.audio_in_channels, generator=g),
        sigma=sigma_audio,
        timesteps=sigma_audio[:, None],
        positions=geometry.batch_audio_positions(steps, torch.device("cpu")),
        context=torch.randn(batch, text, widths[1], generator=g),
    )
    return video, audio

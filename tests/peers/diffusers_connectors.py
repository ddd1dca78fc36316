"""diffusers' text connectors with the weights of a release: hidden states of a language model to contexts."""

import re

from ltx2_train.testing.released import TEXT_STATES, TEXT_WIDTH
from ltx2_train.weightfile import open_weights

KEY_MAP = [  # released to diffusers
    (r"^model\.diffusion_model\.(video|audio)_embeddings_connector\.", r"\1_connector."),
    (r"\.transformer_1d_blocks\.", ".transformer_blocks."),
    (r"\.([qk])_norm\.", r".norm_\1."),
    (r"^text_embedding_projection\.aggregate_embed\.", "text_proj_in."),
    (r"^text_embedding_projection\.(video|audio)_aggregate_embed\.", r"\1_text_proj_in."),
]


def peer_key(key):
    for pattern, replacement in KEY_MAP:
        key = re.sub(pattern, replacement, key)
    return key


def peer_of(files, config):
    """diffusers' text connectors of a release, in fp32, strictly loaded."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    per_stream = config.caption_proj_before_connector
    sizes = {
        "num_attention_heads": (config.connector_num_attention_heads, config.audio_connector_num_attention_heads),
        "attention_head_dim": (config.connector_attention_head_dim, config.audio_connector_attention_head_dim),
        "num_layers": (config.connector_num_layers, None),
    }
    arguments = {f"video_connector_{name}": video for name, (video, _) in sizes.items()}
    arguments |= {f"audio_connector_{name}": audio or video for name, (video, audio) in sizes.items()}
    arguments |= {f"{stream}_gated_attn": config.connector_apply_gated_attention for stream in ("video", "audio")}
    peer = LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=TEXT_STATES,
        rope_type="split",
        per_modality_projections=per_stream,
        proj_bias=per_stream,
        video_hidden_dim=config.video_connector_width,
        audio_hidden_dim=config.audio_connector_width,
        **arguments,
    )
    stored = {key: t for file in files for key, t in open_weights(file).items()}
    own = {
        k: t.read().float()
        for k, t in stored.items()
        if "_connector." in k or k.startswith("text_embedding_projection.")
    }
    peer.load_state_dict({peer_key(key): tensor for key, tensor in own.items()}, strict=True)
    return peer.eval()

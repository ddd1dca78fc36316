"""Which generation of LTX-2 an architecture belongs to.

Told by what the network is made of, not by the version that a header claims: a fine-tune may claim anything or nothing,
and the folders of diffusers carry no version.
"""

from ltx2_train.model.config import TransformerConfig

UNKNOWN = "unknown"
_MARKS = {
    # (context at the stream's width, head gates, modulated text attention, video FF bias, keyframe marker)
    (False, False, False, True, False): "2.0",
    (True, True, True, True, False): "2.3",
    (True, True, True, False, True): "2.5",
}


def generation_of(config: TransformerConfig) -> str:
    """ "2.0", "2.3" or "2.5" whatever the sizes; "unknown" for a mixture that loads and is none of them."""
    marks = (
        config.caption_proj_before_connector,
        config.apply_gated_attention,
        config.cross_attention_adaln,
        config.ff_bias,
        config.use_keyframes_abs_pos_embedding,
    )
    return _MARKS.get(marks, UNKNOWN) if config.use_audio_video_cross_attention else UNKNOWN

"""How diffusers spells this architecture: parameter names and configurations of its two components, both ways.

`transformer` is `LTX2VideoTransformer3DModel`, `connectors` is `LTX2TextConnectors`, which also holds the text projections.
Official names stand without `model.diffusion_model.` here. Tensors are the same on both sides: only names change.
"""

from collections.abc import Mapping
from typing import Any

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.model.config import TransformerConfig, listed

TRANSFORMER_CLASS = "LTX2VideoTransformer3DModel"
CONNECTORS_CLASS = "LTX2TextConnectors"
VERSION = "0.42.1"  # of diffusers, whose arguments these are
PROJECTIONS = "text_embedding_projection."

# Official to diffusers, one dotted part of a name at a time.
_TRANSFORMER = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_CONNECTORS = {
    "video_embeddings_connector": "video_connector",
    "audio_embeddings_connector": "audio_connector",
    "transformer_1d_blocks": "transformer_blocks",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_PROJECTIONS = {
    "aggregate_embed": "text_proj_in",
    "video_aggregate_embed": "video_text_proj_in",
    "audio_aggregate_embed": "audio_text_proj_in",
}


def to_diffusers(name: str) -> str:
    """A name of the transformer, of a parameter, a module or an adapter on it, as diffusers has it."""
    return _renamed(name, _TRANSFORMER)


def from_diffusers(name: str) -> str:
    """The official name of what diffusers' transformer calls `name`."""
    return _renamed(name, _inverse(_TRANSFORMER))


def connectors_to_diffusers(name: str) -> str:
    """A name of the connectors (`video_embeddings_connector...`) or text projections (`text_embedding_projection...`)."""
    if name.startswith(PROJECTIONS):
        return _renamed(name.removeprefix(PROJECTIONS), _PROJECTIONS)
    return _renamed(name, _CONNECTORS)


def connectors_from_diffusers(name: str) -> str:
    """The official name of what diffusers' connectors component calls `name`."""
    if name.split(".")[0] in _PROJECTIONS.values():
        return PROJECTIONS + _renamed(name, _inverse(_PROJECTIONS))
    return _renamed(name, _inverse(_CONNECTORS))


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    return ".".join(parts.get(part, part) for part in name.split("."))


def _inverse(parts: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in parts.items()}


# --- configurations ---

# diffusers' arguments with their defaults, which are not those of the official header.
_SAME = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "num_layers": 48,
    "norm_eps": 1e-6,
    "caption_channels": 3840,
    "timestep_scale_multiplier": 1000,
    "rope_type": "interleaved",
    "ff_bias": True,
    "audio_ff_bias": True,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}
_OTHER_NAME = {
    "gated_attn": "apply_gated_attention",
    "audio_gated_attn": "apply_gated_attention",
    "cross_attn_mod": "cross_attention_adaln",
    "audio_cross_attn_mod": "cross_attention_adaln",
    "rope_theta": "positional_embedding_theta",
    "cross_attn_timestep_scale_multiplier": "av_ca_timestep_scale_multiplier",
}
_TRANSFORMER_DEFAULTS: dict[str, Any] = {
    **_SAME,
    "gated_attn": False,
    "audio_gated_attn": False,
    "cross_attn_mod": False,
    "audio_cross_attn_mod": False,
    "rope_theta": 10000.0,
    "cross_attn_timestep_scale_multiplier": 1000,
    "pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "audio_pos_embed_max_pos": 20,
    "rope_double_precision": True,
    "use_prompt_embeddings": True,
}
_TRANSFORMER_FIXED: dict[str, Any] = {
    "patch_size": 1,
    "patch_size_t": 1,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "attention_out_bias": True,
}
# They place tokens when the caller does not, or allow a perturbation: no part of the weights.
_TRANSFORMER_UNREAD = {
    "vae_scale_factors",
    "audio_scale_factor",
    "audio_sampling_rate",
    "audio_hop_length",
    "causal_offset",
    "perturbed_attn",
}
_CONNECTORS_DEFAULTS: dict[str, Any] = {
    "caption_channels": 3840,
    "video_connector_num_attention_heads": 30,
    "video_connector_attention_head_dim": 128,
    "video_connector_num_layers": 2,
    "video_connector_num_learnable_registers": 128,
    "video_gated_attn": False,
    "audio_connector_num_attention_heads": 30,
    "audio_connector_attention_head_dim": 128,
    "audio_connector_num_layers": 2,
    "audio_connector_num_learnable_registers": 128,
    "audio_gated_attn": False,
    "connector_rope_base_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_double_precision": True,
    "rope_type": "interleaved",
    "per_modality_projections": False,
    "proj_bias": False,
}
_CONNECTORS_FIXED = {"causal_temporal_positioning": False}
_CONNECTORS_UNREAD = {"text_proj_in_factor", "video_hidden_dim", "audio_hidden_dim"}
_CONNECTORS_EPS = 1e-6  # not an argument there


def diffusers_config(config: TransformerConfig) -> dict[str, Any]:
    """`config.json` of diffusers' transformer; its arguments and the class.

    Raises `ConfigError` for a model whose streams do not exchange: there is no argument for that.
    """
    if not config.use_audio_video_cross_attention:
        raise ConfigError(
            "use_audio_video_cross_attention=False: diffusers has no model without audio-video attention. "
            "Export the official layout instead"
        )
    time, height, width = config.positional_embedding_max_pos
    return {
        "_class_name": TRANSFORMER_CLASS,
        "_diffusers_version": VERSION,
        **_TRANSFORMER_FIXED,
        **{name: getattr(config, name) for name in _SAME},
        **{theirs: getattr(config, ours) for theirs, ours in _OTHER_NAME.items()},
        "caption_channels": config.caption_channels or _SAME["caption_channels"],  # read by 2.0 only
        "rope_type": str(config.rope_type),
        "rope_double_precision": config.frequencies_precision == "float64",
        "pos_embed_max_pos": time,
        "base_height": height,
        "base_width": width,
        "audio_pos_embed_max_pos": config.audio_positional_embedding_max_pos[0],
        "use_prompt_embeddings": not config.caption_proj_before_connector,
        "perturbed_attn": True,  # without it, perturbations that a caller asks for are ignored
    }


def text_states(config: TransformerConfig, input_width: int) -> int:
    """How many hidden states of the language model a text projection takes that has `input_width` columns.

    Raises `ConfigError` when it is no whole number of them.
    """
    channels = config.caption_channels or _CONNECTORS_DEFAULTS["caption_channels"]
    if input_width % channels:
        raise ConfigError(
            f"caption_channels={channels}: the text projection takes {input_width} numbers per token, which is no whole "
            "number of hidden states of that width; export the official layout instead"
        )
    return int(input_width // channels)


def diffusers_connectors_config(config: TransformerConfig, text_states: int = 49) -> dict[str, Any]:
    """`config.json` of diffusers' connectors; `text_states` hidden states of the language model are projected.

    Raises `ConfigError` for connectors that diffusers cannot express.
    """
    if not config.connector_ff_bias or config.norm_eps != _CONNECTORS_EPS:
        raise ConfigError(
            f"connector_ff_bias={config.connector_ff_bias}, norm_eps={config.norm_eps}: diffusers has connectors with "
            f"biases and an eps of {_CONNECTORS_EPS} only; export the official layout instead"
        )
    per_stream = config.caption_proj_before_connector
    return {
        "_class_name": CONNECTORS_CLASS,
        "_diffusers_version": VERSION,
        **_CONNECTORS_FIXED,
        "caption_channels": config.caption_channels or _CONNECTORS_DEFAULTS["caption_channels"],
        "text_proj_in_factor": text_states,
        **_stream_arguments("video", config, config.connector_num_attention_heads, config.video_connector_width),
        **_stream_arguments("audio", config, config.audio_connector_heads, config.audio_connector_width),
        "connector_rope_base_seq_len": config.connector_positional_embedding_max_pos[0],
        "rope_theta": config.positional_embedding_theta,
        "rope_double_precision": config.frequencies_precision == "float64",
        "rope_type": str(config.rope_type),
        "per_modality_projections": per_stream,
        "proj_bias": per_stream,
        "video_hidden_dim": config.video_width,
        "audio_hidden_dim": config.audio_width,
    }


def _stream_arguments(stream: str, config: TransformerConfig, heads: int, width: int) -> dict[str, Any]:
    layers = config.audio_connector_layers if stream == "audio" else config.connector_num_layers
    return {
        f"{stream}_connector_num_attention_heads": heads,
        f"{stream}_connector_attention_head_dim": width // heads,
        f"{stream}_connector_num_layers": layers,
        f"{stream}_connector_num_learnable_registers": config.connector_num_learnable_registers,
        f"{stream}_gated_attn": config.connector_apply_gated_attention,
    }


def config_from_diffusers(
    transformer: Mapping[str, Any] | None, connectors: Mapping[str, Any] | None = None, source: str = "config.json"
) -> TransformerConfig:
    """The architecture that the two components' `config.json` describe; of one alone, the rest at its defaults.

    Raises `CheckpointError` listing every unknown or unsupported argument, and where the two contradict each other.
    """
    fields = {} if connectors is None else _connector_fields(connectors, source)
    if transformer is not None:
        own = _transformer_fields(transformer, source)
        if own["caption_proj_before_connector"] and connectors is not None:
            del own["caption_channels"]  # the transformer does not read it
        wrong = [f"{n}={fields[n]!r} and {own[n]!r}" for n in fields.keys() & own.keys() if fields[n] != own[n]]
        if wrong:
            raise CheckpointError(f"{source}: connectors and transformer do not belong together: {'; '.join(wrong)}")
        fields |= own
    try:
        return TransformerConfig(**fields)
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _transformer_fields(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    given = _complete(arguments, _TRANSFORMER_DEFAULTS, _TRANSFORMER_FIXED, _TRANSFORMER_UNREAD, source)
    for name in ("gated_attn", "cross_attn_mod"):
        _agree(given, name, f"audio_{name}", source)
    return {
        **{name: given[name] for name in _SAME},
        **{ours: given[theirs] for theirs, ours in _OTHER_NAME.items()},
        "out_channels": given["out_channels"] or given["in_channels"],
        "audio_out_channels": given["audio_out_channels"] or given["audio_in_channels"],
        "frequencies_precision": "float64" if given["rope_double_precision"] else "float32",
        "positional_embedding_max_pos": [given[n] for n in ("pos_embed_max_pos", "base_height", "base_width")],
        "audio_positional_embedding_max_pos": [given["audio_pos_embed_max_pos"]],
        "caption_proj_before_connector": not given["use_prompt_embeddings"],
    }


def _connector_fields(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    given = _complete(arguments, _CONNECTORS_DEFAULTS, _CONNECTORS_FIXED, _CONNECTORS_UNREAD, source)
    for name in ("connector_num_learnable_registers", "gated_attn"):
        _agree(given, f"video_{name}", f"audio_{name}", source)
    _agree(given, "per_modality_projections", "proj_bias", source)
    sizes = ("num_attention_heads", "attention_head_dim", "num_layers")
    return {
        **{f"connector_{size}": given[f"video_connector_{size}"] for size in sizes},
        **{f"audio_connector_{size}": given[f"audio_connector_{size}"] for size in sizes},
        "connector_num_learnable_registers": given["video_connector_num_learnable_registers"],
        "connector_apply_gated_attention": given["video_gated_attn"],
        "connector_positional_embedding_max_pos": [given["connector_rope_base_seq_len"]],
        "positional_embedding_theta": given["rope_theta"],
        "frequencies_precision": "float64" if given["rope_double_precision"] else "float32",
        "rope_type": given["rope_type"],
        "caption_proj_before_connector": given["per_modality_projections"],
        "caption_channels": given["caption_channels"],
    }


def _complete(
    arguments: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any], unread: set[str], source: str
) -> dict[str, Any]:
    """The arguments with defaults filled in. Raises `CheckpointError` for values that this program has no code for."""
    own = {name: value for name, value in arguments.items() if not name.startswith("_")}
    wrong = [f"{n}={own[n]!r} (unknown)" for n in own.keys() - defaults.keys() - fixed.keys() - unread]
    wrong += [f"{n}={own[n]!r} (supported: {v!r})" for n, v in fixed.items() if own.get(n, v) != v]
    if wrong:
        raise CheckpointError(f"{source}: not an architecture of this program: " + listed(wrong))
    return {**defaults, **own}


def _agree(given: Mapping[str, Any], first: str, second: str, source: str) -> None:
    if given[first] != given[second]:
        raise CheckpointError(
            f"{source}: {first}={given[first]!r} and {second}={given[second]!r} have to be equal in this program"
        )

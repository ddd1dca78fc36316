"""The transformer's configuration: the fields of a released checkpoint's header, under their published names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from reprlib import repr as short  # of what a file may hold without end
from typing import Any

from ltx2_train.errors import CheckpointError, ConfigError


class RopeType(StrEnum):
    SPLIT = "split"
    INTERLEAVED = "interleaved"


# Header fields that say what the architecture is and have one supported value each.
FIXED_FIELDS: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_middle_indices_grid": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
}
# Header fields that the published implementations carry and do not read, or that select the text feature extractor.
UNREAD_FIELDS = {
    "_class_name",
    "_diffusers_version",
    "attention_type",
    "norm_num_groups",
    "causal_temporal_positioning",
    "use_embeddings_connector",
    "caption_projection_first_linear",
    "caption_projection_second_linear",
    "caption_proj_input_norm",
    "text_encoder_norm_type",
    "connector_learnable_registers_std",
    "connector_norm_output",
    "use_audio_embeddings_connector",
}
# Beside caption_proj_before_connector they say that the second text feature extractor made the features (2.3, 2.5).
SECOND_EXTRACTOR = {
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
}
_HEAD_WIDTHS = (
    "attention_head_dim",
    "audio_attention_head_dim",
    "connector_attention_head_dim",
    "audio_connector_attention_head_dim",
)
MOST_LISTED = 20  # differences in one message


def listed(differences: Iterable[str]) -> str:
    """The differences in order, as one line that stays readable."""
    lines = sorted(differences)
    more = f"; and {len(lines) - MOST_LISTED} more" if len(lines) > MOST_LISTED else ""
    return "; ".join(lines[:MOST_LISTED]) + more


# --- bounds ---

MAX_WIDTH = 65_536  # of anything that is a dim of a tensor; released models have 4096, times 4 within FFs
MAX_LAYERS = 512  # released models have 48
MAX_POSITION = 2**31 - 1
MAX_NUMBER = 1e12


@dataclass(frozen=True, slots=True)
class Bound:
    """Which values a field may have, and how to say so."""

    words: str
    holds: Callable[[Any], bool]


def is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_number(value: Any) -> bool:
    """Not NaN, and of a size that fp32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _whole(most: int) -> Bound:
    return Bound(f"a whole number from 1 to {most:,}", lambda value: is_whole(value, most))


def _or_none(bound: Bound) -> Bound:
    return Bound(f"{bound.words}, or null", lambda value: value is None or bound.holds(value))


def _positions(axes: int) -> Bound:
    return Bound(
        f"a list of {axes} whole numbers from 1",
        lambda value: isinstance(value, list) and len(value) == axes and all(is_whole(v, MAX_POSITION) for v in value),
    )


def _one_of(*names: str) -> Bound:
    return Bound(" or ".join(map(repr, names)), lambda value: isinstance(value, str) and value in names)


_BOUNDS_OF_TYPES: dict[Any, Bound] = {
    bool: Bound("true or false", lambda value: isinstance(value, bool)),
    int: _whole(MAX_WIDTH),
    int | None: _or_none(_whole(MAX_WIDTH)),
    float: Bound(f"a number above 0, at most {MAX_NUMBER:g}", lambda value: is_number(value) and value > 0),
}
_BOUNDS_OF_FIELDS = {
    "num_layers": _whole(MAX_LAYERS),
    "connector_num_layers": _whole(MAX_LAYERS),
    "audio_connector_num_layers": _or_none(_whole(MAX_LAYERS)),
    "norm_eps": Bound("a number above 0 and below 1", lambda value: is_number(value) and 0 < value < 1),
    "positional_embedding_theta": Bound(
        f"a number above 1, at most {MAX_NUMBER:g}", lambda value: is_number(value) and value > 1
    ),
    "positional_embedding_max_pos": _positions(3),
    "audio_positional_embedding_max_pos": _positions(1),
    "connector_positional_embedding_max_pos": _positions(1),
    "rope_type": _one_of(*map(str, RopeType)),
    "frequencies_precision": _one_of("float32", "float64"),
}


def _out_of_bounds(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of fields, each looked at alone."""
    bounds = {f.name: _BOUNDS_OF_FIELDS.get(f.name) or _BOUNDS_OF_TYPES[f.type] for f in fields(TransformerConfig)}
    return [
        f"{name}={short(value)} (needs {bounds[name].words})"
        for name, value in values.items()
        if not bounds[name].holds(value)
    ]


@dataclass(kw_only=True, slots=True)
class TransformerConfig:
    """`config.transformer` of a checkpoint header. Defaults are the values that an absent key stands for."""

    num_attention_heads: int = 32
    attention_head_dim: int = 128
    """Video head width; the video width is heads x this."""
    in_channels: int = 128
    out_channels: int = 128
    num_layers: int = 48
    cross_attention_dim: int = 4096
    """Width of the video text context; equals the video width."""
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0
    positional_embedding_max_pos: list[int] = field(default_factory=lambda: [20, 2048, 2048])
    """Seconds, pixels, pixels."""
    timestep_scale_multiplier: float = 1000
    audio_num_attention_heads: int = 32
    """Equals num_attention_heads."""
    audio_attention_head_dim: int = 64
    """Audio head width, and head width of both audio-video attentions."""
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    audio_cross_attention_dim: int = 2048
    """Width of the audio text context; equals the audio width."""
    audio_positional_embedding_max_pos: list[int] = field(default_factory=lambda: [20])
    """Seconds."""
    av_ca_timestep_scale_multiplier: float = 1
    """Multiplies the other stream's sigma before the audio-video gate's AdaLN. 1000 in every released header."""
    rope_type: RopeType = RopeType.SPLIT
    frequencies_precision: str = "float32"
    """ "float64" builds the RoPE frequency ladder in fp64, "float32" in fp32."""
    apply_gated_attention: bool = False
    """Per-head output gates in all attentions (2.3, 2.5)."""
    cross_attention_adaln: bool = False
    """Modulated text cross-attention: 9 AdaLN rows instead of 6, and prompt tables (2.3, 2.5)."""
    use_prompt_adaln_single: bool = True
    """The sigma-dependent part of the prompt modulation; read only with cross_attention_adaln."""
    caption_proj_before_connector: bool = False
    """True: text features reach the transformer at its width; False: caption projections inside it (2.0)."""
    caption_channels: int | None = None
    """Width of the text features before the caption projections (2.0)."""
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_audio_video_cross_attention: bool = True
    """The exchange between the streams, true in every released header. False builds the model without it: an ablation."""
    use_keyframes_abs_pos_embedding: bool = False
    """A learned marker on tokens that stand for a single pixel frame (2.5)."""
    connector_num_attention_heads: int = 30
    connector_attention_head_dim: int = 128
    connector_num_layers: int = 2
    connector_positional_embedding_max_pos: list[int] = field(default_factory=lambda: [1])
    """[4096] in every released header."""
    connector_apply_gated_attention: bool = False
    connector_ff_bias: bool = True
    connector_num_learnable_registers: int = 128
    audio_connector_num_attention_heads: int | None = None
    """None: as the video connector. Likewise the next two."""
    audio_connector_attention_head_dim: int | None = None
    audio_connector_num_layers: int | None = None

    def __post_init__(self) -> None:
        wrong = _out_of_bounds({f.name: getattr(self, f.name) for f in fields(self)}) or list(self._contradictions())
        if wrong:
            raise ConfigError(listed(wrong))
        self.rope_type = RopeType(self.rope_type)

    def _contradictions(self) -> Iterator[str]:
        """What does not fit together among values that are each within their bounds."""
        if self.num_attention_heads != self.audio_num_attention_heads:
            yield (
                f"audio_num_attention_heads={self.audio_num_attention_heads} must equal "
                f"num_attention_heads={self.num_attention_heads}"
            )
        for name, width in (
            ("cross_attention_dim", self.video_width),
            ("audio_cross_attention_dim", self.audio_width),
        ):
            if getattr(self, name) != width:
                yield f"{name}={getattr(self, name)} must equal heads x head width = {width}"
        for stream, width in (("video", self.video_connector_width), ("audio", self.audio_connector_width)):
            if width > MAX_WIDTH:
                yield f"the {stream} connector is {width:,} wide (heads x head width); supported are {MAX_WIDTH:,}"
        if not self.caption_proj_before_connector and self.caption_channels is None:
            yield "caption_channels is required unless caption_proj_before_connector is true"
        for name in _HEAD_WIDTHS:
            if (getattr(self, name) or 0) % 2:
                yield f"{name}={getattr(self, name)} must be even: RoPE rotates pairs"

    @property
    def video_width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_width(self) -> int:
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def adaln_rows(self) -> int:
        """Rows of the main modulation: shift, scale, gate of self-attention and FF, and of text attention if modulated."""
        return 9 if self.cross_attention_adaln else 6

    @property
    def has_prompt_adaln(self) -> bool:
        return self.cross_attention_adaln and self.use_prompt_adaln_single

    @property
    def video_connector_width(self) -> int:
        """Width of the video text features that the connector takes and gives."""
        return self.connector_num_attention_heads * self.connector_attention_head_dim

    @property
    def audio_connector_heads(self) -> int:
        return self.audio_connector_num_attention_heads or self.connector_num_attention_heads

    @property
    def audio_connector_layers(self) -> int:
        return self.audio_connector_num_layers or self.connector_num_layers

    @property
    def audio_connector_width(self) -> int:
        head_dim = self.audio_connector_attention_head_dim or self.connector_attention_head_dim
        return self.audio_connector_heads * head_dim

    @classmethod
    def from_header(cls, header: Mapping[str, Any], source: str = "config.transformer") -> "TransformerConfig":
        """The configuration of a checkpoint header.

        Raises `CheckpointError` listing every value that is unknown, unsupported, of another type or out of its bound.
        """
        wrong = [
            f"{name}={short(header.get(name))} (supported: {value!r})"
            for name, value in FIXED_FIELDS.items()
            if header.get(name) != value or isinstance(header.get(name), bool) != isinstance(value, bool)
        ]
        known = {f.name for f in fields(cls)}
        unknown = header.keys() - known - FIXED_FIELDS.keys() - UNREAD_FIELDS
        wrong += [f"{name}={short(header[name])} (unknown)" for name in unknown]
        wrong += _out_of_bounds({name: header[name] for name in header.keys() & known})
        if "audio_num_attention_heads" not in header:
            wrong.append("audio_num_attention_heads is missing")
        if wrong:
            raise CheckpointError(f"{source}: not an architecture of this program: {listed(wrong)}")
        try:
            return cls(**{name: header[name] for name in header.keys() & known})
        except ConfigError as error:
            raise CheckpointError(f"{source}: {error}") from error

    def to_header(self) -> dict[str, Any]:
        """`config.transformer` as a released checkpoint carries it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if (
            not self.caption_proj_before_connector
        ):  # headers of 2.0 lack it: stated, it would select the second extractor
            del values["caption_proj_before_connector"]
        return {
            **FIXED_FIELDS,
            **(SECOND_EXTRACTOR if self.caption_proj_before_connector else {}),
            **{n: str(v) if isinstance(v, RopeType) else v for n, v in values.items() if v is not None},
        }


_RELEASED: dict[str, Any] = {
    "caption_channels": 3840,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "frequencies_precision": "float64",
    "connector_positional_embedding_max_pos": [4096],
}
_2_3: dict[str, Any] = {
    **_RELEASED,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "connector_num_attention_heads": 32,
    "connector_num_layers": 8,
    "connector_apply_gated_attention": True,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
}
_2_5: dict[str, Any] = {**_2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}


def _small(heads: int, video: int, audio: int, layers: int, connector_layers: int, registers: int) -> dict[str, Any]:
    """The 2.5 architecture at another size."""
    return {
        **_2_5,
        "num_attention_heads": heads,
        "audio_num_attention_heads": heads,
        "attention_head_dim": video,
        "audio_attention_head_dim": audio,
        "cross_attention_dim": heads * video,
        "audio_cross_attention_dim": heads * audio,
        "num_layers": layers,
        "connector_num_attention_heads": heads,
        "connector_attention_head_dim": video,
        "audio_connector_num_attention_heads": heads,
        "audio_connector_attention_head_dim": audio,
        "connector_num_layers": connector_layers,
        "connector_num_learnable_registers": registers,
    }


RELEASED_TEXT_TOKENS = 1024
TEXT_TOKENS = {"tiny": 16, "bounce": 24, "demo": 32, "small_30m": 64}  # rows of context; released models have 1024
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ltx2_19b": _RELEASED,
    "ltx2_3_22b": _2_3,
    "ltx2_5_22b": _2_5,
    "tiny": _small(heads=2, video=20, audio=10, layers=2, connector_layers=1, registers=8),
    "bounce": {
        **_small(heads=4, video=40, audio=32, layers=4, connector_layers=1, registers=24),
        # Clips of two seconds and four tokens: frequencies of 1.6 to 157 rad/s, where the released range has 0.16 to 1571.
        "positional_embedding_theta": 100.0,
        "positional_embedding_max_pos": [2, 64, 64],
        "audio_positional_embedding_max_pos": [2],
    },
    "demo": _small(heads=4, video=48, audio=40, layers=4, connector_layers=1, registers=32),
    "small_30m": _small(heads=8, video=48, audio=32, layers=6, connector_layers=1, registers=16),
}


def named_config(name: str, overrides: Mapping[str, Any] | None = None) -> TransformerConfig:
    """A named configuration with some fields replaced. Raises `ConfigError` naming what is known."""
    if name not in CONFIGURATIONS:
        raise ConfigError(f"model.name={name!r} is not a named configuration; known: {', '.join(CONFIGURATIONS)}")
    known = {f.name for f in fields(TransformerConfig)}
    if unknown := set(overrides or {}) - known:
        raise ConfigError(f"model.overrides: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return TransformerConfig(**{**CONFIGURATIONS[name], **(overrides or {})})

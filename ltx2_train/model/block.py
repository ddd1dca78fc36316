"""One block of the dual-stream transformer: self- and text attention per stream, audio-video exchange, feed-forward.

Source: LTX-2 (arXiv:2601.03233) section 3.1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ltx2_train.model.attention import Attention, FeedForward, Keep, KeysValues, Skip
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.fused import Runs, gated_add, rms_modulate
from ltx2_train.model.modality import SharedContext
from ltx2_train.model.rope import Rope


@dataclass(frozen=True, slots=True)
class Context:
    """The text of some samples, as the blocks take it. `shared`: where its keys and values are kept, if they can be."""

    rows: Tensor  # (B, L, D)
    modulation: Tensor | None  # (B, 1, 2, D), from sigma
    shared: SharedContext | None = None


@dataclass(frozen=True, slots=True)
class StreamInputs:
    """What all blocks share for one stream. Modulations are (B, K, rows, D) with K rows over the tokens (see `runs`)."""

    modulation: Tensor  # main AdaLN, 6 or 9 rows
    exchange_modulation: Tensor | None  # audio-video scale and shift, 4 rows, from the stream's own timesteps
    exchange_gate: Tensor | None  # (B, 1, 1, D), from the other stream's sigma
    runs: Runs | None
    contexts: tuple[Context, ...]
    context_of: tuple[int, ...]  # which of the contexts each group of the batch has
    context_bias: Tensor | None
    attention_bias: Tensor | None
    rope: Rope
    exchange_rope: Rope | None
    enabled: bool

    def exchanging(self, samples: slice) -> "StreamInputs":
        """What the exchange takes, of some samples of the batch."""
        assert self.exchange_modulation is not None
        assert self.exchange_gate is not None
        assert self.exchange_rope is not None
        return replace(
            self,
            exchange_modulation=self.exchange_modulation[samples],
            exchange_gate=self.exchange_gate[samples],
            exchange_rope=self.exchange_rope.of(samples),
        )


@dataclass(frozen=True, slots=True)
class BlockKeeps:
    """Perturbations of one block; None where no sample is perturbed."""

    video_self: Keep = None
    audio_self: Keep = None
    a2v: Keep = None
    v2a: Keep = None


class _Rows:
    """Rows of a modulation table plus its AdaLN part: row r is (B, K, D) in the activation dtype."""

    def __init__(self, table: Tensor, modulation: Tensor | None) -> None:
        self.table, self.modulation = table, modulation

    def __getitem__(self, row: int) -> Tensor:
        assert self.modulation is not None
        return self.table[row].to(self.modulation.dtype) + self.modulation[:, :, row]


class TransformerBlock(nn.Module):
    """Both streams' layers of one block. A stream that the model is built without has none of them."""

    def __init__(self, config: TransformerConfig, *, video: bool, audio: bool) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.text_modulated = config.cross_attention_adaln
        if video:
            self._add_stream("", config.video_width, config.cross_attention_dim, config, bias=config.ff_bias)
        if audio:
            width = config.audio_width
            self._add_stream("audio_", width, config.audio_cross_attention_dim, config, bias=config.audio_ff_bias)
        self.exchanges = video and audio and config.use_audio_video_cross_attention
        if self.exchanges:
            self._add_exchange(config)

    def _add_stream(self, prefix: str, width: int, context: int, config: TransformerConfig, *, bias: bool) -> None:
        heads, gated, eps = config.num_attention_heads, config.apply_gated_attention, config.norm_eps
        layers: dict[str, nn.Module] = {
            "attn1": Attention(width, width, width, heads, gated=gated, eps=eps),
            "attn2": Attention(width, context, width, heads, gated=gated, eps=eps),
            "ff": FeedForward(width, bias=bias),
        }
        for name, layer in layers.items():
            self.add_module(prefix + name, layer)
        self.register_parameter(prefix + "scale_shift_table", nn.Parameter(torch.zeros(config.adaln_rows, width)))
        if config.cross_attention_adaln:
            self.register_parameter(prefix + "prompt_scale_shift_table", nn.Parameter(torch.zeros(2, width)))

    def _add_exchange(self, config: TransformerConfig) -> None:
        video, audio, heads = config.video_width, config.audio_width, config.num_attention_heads
        gated, eps = config.apply_gated_attention, config.norm_eps
        self.audio_to_video_attn = Attention(video, audio, audio, heads, gated=gated, eps=eps)
        self.video_to_audio_attn = Attention(audio, video, audio, heads, gated=gated, eps=eps)
        self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, video))
        self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, audio))

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_inputs: StreamInputs | None,
        audio_inputs: StreamInputs | None,
        keeps: BlockKeeps,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states (B, Tv, Dv) and (B, Ta, Da) after this block."""
        if video is not None and video_inputs is not None and video_inputs.enabled:
            video = self._attend("", video, video_inputs, keeps.video_self)
        if audio is not None and audio_inputs is not None and audio_inputs.enabled:
            audio = self._attend("audio_", audio, audio_inputs, keeps.audio_self)
        if self.exchanges and video is not None and audio is not None:
            assert video_inputs is not None
            assert audio_inputs is not None
            video, audio = self._exchange(video, audio, video_inputs, audio_inputs, keeps)
        if video is not None and video_inputs is not None and video_inputs.enabled:
            video = self._feed_forward("", video, video_inputs)
        if audio is not None and audio_inputs is not None and audio_inputs.enabled:
            audio = self._feed_forward("audio_", audio, audio_inputs)
        return video, audio

    def _attend(self, prefix: str, x: Tensor, inputs: StreamInputs, keep: Keep) -> Tensor:
        """Self-attention, then text attention. Main rows: shift, scale, gate; text rows 6, 7, 8 likewise."""
        rows, runs, eps = _Rows(getattr(self, prefix + "scale_shift_table"), inputs.modulation), inputs.runs, self.eps
        h = rms_modulate(x, rows[1], rows[0], runs, eps)
        h = getattr(self, prefix + "attn1")(
            h, rope=inputs.rope, context_rope=inputs.rope, bias=inputs.attention_bias, keep=keep
        )
        x = gated_add(x, h, rows[2], runs)
        attend_text = getattr(self, prefix + "attn2")
        text = {"keys_values": self._text(prefix, inputs), "bias": inputs.context_bias}
        if not self.text_modulated:
            return x + attend_text(nn.functional.rms_norm(x, x.shape[-1:], eps=eps), **text)
        return gated_add(x, attend_text(rms_modulate(x, rows[7], rows[6], runs, eps), **text), rows[8], runs)

    def _text(self, prefix: str, inputs: StreamInputs) -> KeysValues:
        """Keys and values of the text of the whole batch; those of a context are made once."""
        made = [self._keys_values(prefix, context) for context in inputs.contexts]
        if len(inputs.context_of) == 1:
            return made[0]
        keys, values = (torch.cat(parts) for parts in zip(*(made[i] for i in inputs.context_of), strict=True))
        return keys, values

    def _keys_values(self, prefix: str, context: Context) -> KeysValues:
        attention = getattr(self, prefix + "attn2")

        def make() -> KeysValues:
            return attention.keys_values(self._modulated(prefix, context) if self.text_modulated else context.rows)

        return make() if context.shared is None else context.shared.once(attention, make)

    def _modulated(self, prefix: str, context: Context) -> Tensor:
        table = getattr(self, prefix + "prompt_scale_shift_table").to(context.rows.dtype)
        shift, scale = table[None, :, None].unbind(1)
        if context.modulation is not None:
            shift, scale = shift + context.modulation[:, :, 0], scale + context.modulation[:, :, 1]
        return torch.addcmul(shift, context.rows, 1 + scale)

    def _exchange(
        self, video: Tensor, audio: Tensor, video_inputs: StreamInputs, audio_inputs: StreamInputs, keeps: BlockKeeps
    ) -> tuple[Tensor, Tensor]:
        """Audio to video and video to audio; both read the states from before either is applied."""
        new_video, new_audio = video, audio
        if video_inputs.enabled and keeps.a2v is not Skip.ALL:
            new_video = self._take("", video, audio, video_inputs, audio_inputs, keeps.a2v)
        if audio_inputs.enabled and keeps.v2a is not Skip.ALL:
            new_audio = self._take("audio_", audio, video, audio_inputs, video_inputs, keeps.v2a)
        return new_video, new_audio

    def _take(
        self, prefix: str, x: Tensor, other: Tensor, inputs: StreamInputs, other_inputs: StreamInputs, keep: Keep
    ) -> Tensor:
        """x with what its stream takes from the other one.

        Exchange rows are (scale, shift) for a2v, (scale, shift) for v2a, gate: the other way round than the main rows.
        """
        if isinstance(keep, slice):
            kept, other_kept = inputs.exchanging(keep), other_inputs.exchanging(keep)
            taken = self._take(prefix, x[keep], other[keep], kept, other_kept, None)
            return torch.cat([x[: keep.start], taken, x[keep.stop :]])
        tables = [self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio]
        table, other_table = reversed(tables) if prefix else tables
        scale, shift = (2, 3) if prefix else (0, 1)
        rows, other_rows = (
            _Rows(table, inputs.exchange_modulation),
            _Rows(other_table, other_inputs.exchange_modulation),
        )
        query = rms_modulate(x, rows[scale], rows[shift], inputs.runs, self.eps)
        context = rms_modulate(other, other_rows[scale], other_rows[shift], other_inputs.runs, self.eps)
        attention = self.video_to_audio_attn if prefix else self.audio_to_video_attn
        attended = attention(query, context, rope=inputs.exchange_rope, context_rope=other_inputs.exchange_rope)
        return gated_add(x, attended, _gate(table[4], inputs.exchange_gate, keep), None)

    def _feed_forward(self, prefix: str, x: Tensor, inputs: StreamInputs) -> Tensor:
        rows = _Rows(getattr(self, prefix + "scale_shift_table"), inputs.modulation)
        h = rms_modulate(x, rows[4], rows[3], inputs.runs, self.eps)
        return gated_add(x, getattr(self, prefix + "ff")(h), rows[5], inputs.runs)


def _gate(table_row: Tensor, modulation: Tensor | None, keep: Keep) -> Tensor:
    """(B, 1, D); zero where a sample's exchange is perturbed away."""
    assert modulation is not None
    gate = table_row.to(modulation.dtype) + modulation[:, :, 0]
    return gate * keep.to(gate.dtype) if isinstance(keep, Tensor) else gate

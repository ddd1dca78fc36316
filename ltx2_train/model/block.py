"""One block of the dual-stream transformer: self- and text attention per stream, audio-video exchange, feed-forward.

Source: LTX-2 (arXiv:2601.03233) section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltx2_train.model.attention import Attention, FeedForward, Keep, Skip
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.fused import Runs, gated_add, rms_modulate
from ltx2_train.model.rope import Rope


@dataclass(frozen=True, slots=True)
class StreamInputs:
    """What all blocks share for one stream. Modulations are (B, K, rows, D) with K rows over the tokens (see `runs`)."""

    modulation: Tensor  # main AdaLN, 6 or 9 rows
    prompt_modulation: Tensor | None  # (B, 1, 2, D)
    exchange_modulation: Tensor | None  # audio-video scale and shift, 4 rows, from the stream's own timesteps
    exchange_gate: Tensor | None  # (B, 1, 1, D), from the other stream's sigma
    runs: Runs | None
    context: Tensor  # (B, L, D)
    context_bias: Tensor | None
    attention_bias: Tensor | None
    rope: Rope
    exchange_rope: Rope | None
    enabled: bool


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
        if not self.text_modulated:
            return x + attend_text(
                nn.functional.rms_norm(x, x.shape[-1:], eps=eps), inputs.context, bias=inputs.context_bias
            )
        h = rms_modulate(x, rows[7], rows[6], runs, eps)
        h = attend_text(h, self._modulated_context(prefix, inputs), bias=inputs.context_bias)
        return gated_add(x, h, rows[8], runs)

    def _modulated_context(self, prefix: str, inputs: StreamInputs) -> Tensor:
        table = getattr(self, prefix + "prompt_scale_shift_table").to(inputs.context.dtype)
        shift, scale = table[None, :, None].unbind(1)
        if inputs.prompt_modulation is not None:
            shift, scale = shift + inputs.prompt_modulation[:, :, 0], scale + inputs.prompt_modulation[:, :, 1]
        return torch.addcmul(shift, inputs.context, 1 + scale)

    def _exchange(
        self, video: Tensor, audio: Tensor, video_inputs: StreamInputs, audio_inputs: StreamInputs, keeps: BlockKeeps
    ) -> tuple[Tensor, Tensor]:
        """Audio to video and video to audio; both read the states from before either is applied.

        Exchange rows are (scale, shift) for a2v, (scale, shift) for v2a, gate: the other way round than the main rows.
        """
        video_rows = _Rows(self.scale_shift_table_a2v_ca_video, video_inputs.exchange_modulation)
        audio_rows = _Rows(self.scale_shift_table_a2v_ca_audio, audio_inputs.exchange_modulation)
        new_video, new_audio = video, audio
        if video_inputs.enabled and keeps.a2v is not Skip.ALL:
            query = rms_modulate(video, video_rows[0], video_rows[1], video_inputs.runs, self.eps)
            context = rms_modulate(audio, audio_rows[0], audio_rows[1], audio_inputs.runs, self.eps)
            ropes = {"rope": video_inputs.exchange_rope, "context_rope": audio_inputs.exchange_rope}
            gate = _gate(self.scale_shift_table_a2v_ca_video[4], video_inputs.exchange_gate, keeps.a2v)
            new_video = gated_add(video, self.audio_to_video_attn(query, context, **ropes), gate, None)
        if audio_inputs.enabled and keeps.v2a is not Skip.ALL:
            query = rms_modulate(audio, audio_rows[2], audio_rows[3], audio_inputs.runs, self.eps)
            context = rms_modulate(video, video_rows[2], video_rows[3], video_inputs.runs, self.eps)
            ropes = {"rope": audio_inputs.exchange_rope, "context_rope": video_inputs.exchange_rope}
            gate = _gate(self.scale_shift_table_a2v_ca_audio[4], audio_inputs.exchange_gate, keeps.v2a)
            new_audio = gated_add(audio, self.video_to_audio_attn(query, context, **ropes), gate, None)
        return new_video, new_audio

    def _feed_forward(self, prefix: str, x: Tensor, inputs: StreamInputs) -> Tensor:
        rows = _Rows(getattr(self, prefix + "scale_shift_table"), inputs.modulation)
        h = rms_modulate(x, rows[4], rows[3], inputs.runs, self.eps)
        return gated_add(x, getattr(self, prefix + "ff")(h), rows[5], inputs.runs)


def _gate(table_row: Tensor, modulation: Tensor | None, keep: Keep) -> Tensor:
    """(B, 1, D); zero where a sample's exchange is perturbed away."""
    assert modulation is not None
    gate = table_row.to(modulation.dtype) + modulation[:, :, 0]
    return gate * keep.to(gate.dtype) if isinstance(keep, Tensor) else gate

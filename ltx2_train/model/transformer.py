"""The dual-stream audio-video diffusion transformer of LTX-2, 2.3 and 2.5.

Parameter names are those of the published checkpoints, without their prefix.
Source: LTX-2 (arXiv:2601.03233).
"""

from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ltx2_train.errors import ConfigError
from ltx2_train.model.adaln import AdaLayerNormSingle
from ltx2_train.model.attention import Keep, Skip, self_attention_bias, text_bias
from ltx2_train.model.block import BlockKeeps, Context, StreamInputs, TransformerBlock
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.fused import Runs
from ltx2_train.model.modality import (
    SKIP_A2V,
    SKIP_AUDIO_SELF_ATTN,
    SKIP_V2A,
    SKIP_VIDEO_SELF_ATTN,
    Modality,
    Perturbations,
    Velocity,
)
from ltx2_train.model.rope import RopeCache, RopeSpec
from ltx2_train.model.runs import RunsCache

KINDS = (SKIP_VIDEO_SELF_ATTN, SKIP_AUDIO_SELF_ATTN, SKIP_A2V, SKIP_V2A)


class CaptionProjection(nn.Module):
    """Text features to the stream's width, inside the transformer (2.0)."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features), approximate="tanh"))


class Transformer(nn.Module):
    """Predicts the velocity of both streams in one pass. Built for video, audio, or (the default) both."""

    def __init__(self, config: TransformerConfig, *, video: bool = True, audio: bool = True) -> None:
        super().__init__()
        self.config = config
        self.has_video, self.has_audio = video, audio
        if video:
            self._add_stream("", config.video_width, config.in_channels, config.out_channels)
            if config.use_keyframes_abs_pos_embedding:
                self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, config.video_width))
        if audio:
            self._add_stream("audio_", config.audio_width, config.audio_in_channels, config.audio_out_channels)
        if video and audio and config.use_audio_video_cross_attention:
            self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(config.video_width, 4)
            self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(config.audio_width, 4)
            self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(config.video_width, 1)
            self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(config.audio_width, 1)
        blocks = [TransformerBlock(config, video=video, audio=audio) for _ in range(config.num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self._ropes, self._runs = RopeCache(), RunsCache()

    def _add_stream(self, prefix: str, width: int, in_channels: int, out_channels: int) -> None:
        config = self.config
        self.add_module(prefix + "patchify_proj", nn.Linear(in_channels, width))
        self.add_module(prefix + "adaln_single", AdaLayerNormSingle(width, config.adaln_rows))
        if config.has_prompt_adaln:
            self.add_module(prefix + "prompt_adaln_single", AdaLayerNormSingle(width, 2))
        if not config.caption_proj_before_connector:
            assert config.caption_channels is not None
            self.add_module(prefix + "caption_projection", CaptionProjection(config.caption_channels, width))
        self.register_parameter(prefix + "scale_shift_table", nn.Parameter(torch.zeros(2, width)))
        self.add_module(prefix + "proj_out", nn.Linear(width, out_channels))

    def shard_units(self) -> list[nn.Module]:
        """The modules that a sharding engine gathers one at a time."""
        return list(self.transformer_blocks)

    def forward(
        self,
        video: Modality | None = None,
        audio: Modality | None = None,
        perturbations: Perturbations | None = None,
    ) -> Velocity:
        """Velocities per token, (B, T, C) in the model's dtype; None for a stream that is not given.

        `perturbations`: per batch element a list of (kind, blocks or None for all). While gradients are recorded no
        operation is left out because of them (masks multiply instead), so that all ranks of a sharded model run the same
        modules; without gradients what samples skip is not computed for them.
        """
        reference = video if video is not None else audio
        assert reference is not None, "the transformer needs at least one stream"
        keeps = self._keeps(perturbations, reference.latent)
        video_x, video_inputs, video_embedding = self._prepare("", video, audio)
        audio_x, audio_inputs, audio_embedding = self._prepare("audio_", audio, video)
        for block, block_keeps in zip(self.transformer_blocks, keeps, strict=True):
            video_x, audio_x = block(video_x, audio_x, video_inputs, audio_inputs, block_keeps)
        return Velocity(
            self._head("", video_x, video_embedding, video_inputs),
            self._head("audio_", audio_x, audio_embedding, audio_inputs),
        )

    def _prepare(
        self, prefix: str, own: Modality | None, other: Modality | None
    ) -> tuple[Tensor | None, StreamInputs | None, Tensor | None]:
        """Embedded tokens, what the blocks need, and the timestep embedding of the output head."""
        if own is None:
            return None, None, None
        self._check(prefix, own)
        x = self._embed(prefix, own)
        timesteps, runs = self._runs.resolve(own.timesteps, own.timestep_index)
        scale = self.config.timestep_scale_multiplier
        modulation, embedding = getattr(self, prefix + "adaln_single")(timesteps * scale)
        prompt_modulation = None
        if self.config.has_prompt_adaln:
            prompt_modulation, _ = getattr(self, prefix + "prompt_adaln_single")(own.sigma[:, None] * scale)
        contexts, context_of = self._contexts(prefix, own, prompt_modulation, x.dtype)
        exchange_modulation, exchange_gate, exchange_rope = self._exchange(prefix, own, other, timesteps * scale, x)
        inputs = StreamInputs(
            modulation=modulation,
            exchange_modulation=exchange_modulation,
            exchange_gate=exchange_gate,
            runs=runs,
            contexts=contexts,
            context_of=context_of,
            context_bias=_context_bias(own, x.dtype),
            attention_bias=self_attention_bias(own.attention_mask, x.dtype),
            rope=self._ropes.get(own.positions, self._rope_spec(prefix), x.dtype),
            exchange_rope=exchange_rope,
            enabled=own.enabled,
        )
        return x, inputs, embedding

    def _check(self, prefix: str, own: Modality) -> None:
        name = prefix.rstrip("_") or "video"
        if not hasattr(self, prefix + "patchify_proj"):
            raise ConfigError(f"{name} was given to a model built without its {name} stream")
        tokens = own.latent.shape[1]
        if own.positions.shape[-2] != tokens:
            raise ConfigError(f"{name}: {own.positions.shape[-2]} positions for {tokens} tokens")

    def _embed(self, prefix: str, own: Modality) -> Tensor:
        project = getattr(self, prefix + "patchify_proj")
        x = project(own.latent.to(project.weight.dtype))
        if not prefix and self.config.use_keyframes_abs_pos_embedding and own.keyframes_mask is not None:
            x = x + (own.keyframes_mask > 0).to(x.dtype) * self.keyframes_abs_pos_embedding.to(x.dtype)
        return x

    def _contexts(
        self, prefix: str, own: Modality, modulation: Tensor | None, dtype: torch.dtype
    ) -> tuple[tuple[Context, ...], tuple[int, ...]]:
        """The distinct contexts, and which of them each group of the batch has."""
        project = None if self.config.caption_proj_before_connector else getattr(self, prefix + "caption_projection")

        def projected(features: Tensor) -> Tensor:
            return features.to(dtype) if project is None else project(features.to(dtype))

        if isinstance(own.context, Tensor):
            return (Context(projected(own.context), modulation),), (0,)
        distinct = list(dict.fromkeys(own.context))
        context_of = tuple(distinct.index(shared) for shared in own.context)
        sizes = [len(shared.features) for shared in own.context]
        modulations = [None] * len(sizes) if modulation is None else modulation.split(sizes)
        contexts = [
            Context(
                rows=shared.once(project, partial(projected, shared.features)),
                modulation=modulations[context_of.index(i)],
                shared=shared if modulation is None else None,
            )
            for i, shared in enumerate(distinct)
        ]
        return tuple(contexts), context_of

    def _exchange(self, prefix: str, own: Modality, other: Modality | None, timesteps: Tensor, x: Tensor) -> tuple:
        """Scale and shift follow the stream's own timesteps; the gate follows the other stream's sigma."""
        if other is None or not self.config.use_audio_video_cross_attention:
            return None, None, None
        stream, gate = ("audio", "v2a") if prefix else ("video", "a2v")
        modulation, _ = getattr(self, f"av_ca_{stream}_scale_shift_adaln_single")(timesteps)
        gate_timesteps = other.sigma[:, None] * self.config.av_ca_timestep_scale_multiplier
        gate_modulation, _ = getattr(self, f"av_ca_{gate}_gate_adaln_single")(gate_timesteps)
        return modulation, gate_modulation, self._ropes.get(own.positions, self._exchange_rope_spec(), x.dtype)

    def _rope_spec(self, prefix: str) -> RopeSpec:
        config = self.config
        max_pos = config.audio_positional_embedding_max_pos if prefix else config.positional_embedding_max_pos
        width = config.audio_width if prefix else config.video_width
        return self._spec(len(max_pos), width, tuple(max_pos))

    def _exchange_rope_spec(self) -> RopeSpec:
        """Time only, for both sides, at the audio width."""
        config = self.config
        max_pos = max(config.positional_embedding_max_pos[0], config.audio_positional_embedding_max_pos[0])
        return self._spec(1, config.audio_cross_attention_dim, (max_pos,))

    def _spec(self, axes: int, width: int, max_pos: tuple[float, ...]) -> RopeSpec:
        config = self.config
        double = config.frequencies_precision == "float64"
        theta, heads = config.positional_embedding_theta, config.num_attention_heads
        return RopeSpec(axes, width, heads, max_pos, theta, double, config.rope_type)

    def _head(
        self, prefix: str, x: Tensor | None, embedding: Tensor | None, inputs: StreamInputs | None
    ) -> Tensor | None:
        """LayerNorm (unlike the blocks' RMS norms), modulated by (shift, scale), projected to channels."""
        if x is None or embedding is None or inputs is None:
            return None
        table = getattr(self, prefix + "scale_shift_table").to(x.dtype)
        shift, scale = (per_token(table[row] + embedding, inputs.runs) for row in (0, 1))
        normed = nn.functional.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps)
        return getattr(self, prefix + "proj_out")(torch.addcmul(shift, normed, 1 + scale))

    def _keeps(self, perturbations: Perturbations | None, like: Tensor) -> list[BlockKeeps]:
        layers = len(self.transformer_blocks)
        if not perturbations or not any(perturbations):
            return [BlockKeeps()] * layers
        frozen = tuple(
            tuple((kind, None if blocks is None else tuple(blocks)) for kind, blocks in sample)
            for sample in perturbations
        )
        return _block_keeps(frozen, layers, like.device, torch.is_grad_enabled())


def _context_bias(own: Modality, dtype: torch.dtype) -> Tensor | None:
    """Additive bias (B, 1, 1, L) of the text's mask."""
    if isinstance(own.context, Tensor):
        return text_bias(own.context_mask, dtype)
    masks = [shared.mask for shared in own.context if shared.mask is not None]
    return text_bias(torch.cat(masks), dtype) if masks else None


def per_token(rows: Tensor, runs: Runs | None) -> Tensor:
    """(B, K, D) rows spread over their runs; unchanged where they broadcast by themselves."""
    if runs is None:
        return rows
    return torch.cat([rows[:, row : row + 1].expand(-1, stop - start, -1) for start, stop, row in runs], dim=1)


@lru_cache(maxsize=64)
def _block_keeps(perturbations: tuple, layers: int, device: torch.device, always_run: bool) -> list[BlockKeeps]:
    """What every block keeps, cached: the same few perturbations come back every step of a sampler."""
    keep = torch.ones(len(KINDS), layers, len(perturbations))
    for sample, items in enumerate(perturbations):
        for kind, blocks in items:
            if kind not in KINDS:
                raise ConfigError(f"perturbation {kind!r} is unknown; known: {', '.join(KINDS)}")
            if blocks is not None and not all(0 <= b < layers for b in blocks):
                raise ConfigError(f"{kind} in blocks {list(blocks)}: this model has blocks 0 to {layers - 1}")
            keep[KINDS.index(kind), slice(None) if blocks is None else list(blocks), sample] = 0
    on_device = keep.to(device)[..., None, None]

    def of(kind: int, block: int) -> Keep:
        kept = keep[kind, block].nonzero().flatten().tolist()
        if len(kept) == len(perturbations):
            return None
        if always_run:
            return on_device[kind, block]
        if not kept:
            return Skip.ALL
        together = slice(kept[0], kept[-1] + 1)
        return together if together.stop - together.start == len(kept) else on_device[kind, block]

    return [BlockKeeps(*(of(kind, block) for kind in range(len(KINDS)))) for block in range(layers)]

"""Text connectors: small transformers that turn text features into the context both streams attend to.

Positions without text are filled by learned registers ("thinking tokens"), so every position is attended later and no mask
is needed behind the connector. Source: LTX-2 (arXiv:2601.03233) section 3.3.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ltx2_train.errors import ConfigError
from ltx2_train.model.attention import Attention, FeedForward
from ltx2_train.model.config import TransformerConfig
from ltx2_train.model.modality import Modality, Perturbations, SharedContext, Stream, Velocity
from ltx2_train.model.rope import Rope, RopeCache, RopeSpec
from ltx2_train.model.transformer import Transformer


class ConnectorBlock(nn.Module):
    def __init__(self, width: int, heads: int, *, gated: bool, ff_bias: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(width, width, width, heads, gated=gated, eps=eps)
        self.ff = FeedForward(width, bias=ff_bias)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        normed = nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)
        x = x + self.attn1(normed, rope=rope, context_rope=rope)
        return x + self.ff(nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps))


class Connector(nn.Module):
    """Features of one stream, (B, L, D), to context (B, S, D)."""

    def __init__(self, config: TransformerConfig, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.eps, self.heads = config.norm_eps, heads
        self.learnable_registers = nn.Parameter(torch.zeros(config.connector_num_learnable_registers, width))
        gated, ff_bias = config.connector_apply_gated_attention, config.connector_ff_bias
        blocks = [ConnectorBlock(width, heads, gated=gated, ff_bias=ff_bias, eps=self.eps) for _ in range(layers)]
        self.transformer_1d_blocks = nn.ModuleList(blocks)
        max_pos = tuple(config.connector_positional_embedding_max_pos)
        double = config.frequencies_precision == "float64"
        theta = config.positional_embedding_theta
        self._rope_spec = RopeSpec(1, width, heads, max_pos, theta, double, config.rope_type)
        self._ropes = RopeCache()
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, features: Tensor, lengths: Tensor, size: int) -> Tensor:
        """`features` (B, L, D) with valid rows first, `lengths` (B,) of them valid; S = `size` rows come out, all valid."""
        x = self._with_registers(features.to(self.learnable_registers.dtype), lengths, size)
        rope = self._ropes.get(self._position_bounds(size, x.device), self._rope_spec, x.dtype)
        for block in self.transformer_1d_blocks:
            x = block(x, rope)
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _with_registers(self, features: Tensor, lengths: Tensor, size: int) -> Tensor:
        """Row p is text where p < length and register p mod R behind it."""
        registers = self.learnable_registers
        features = nn.functional.pad(features, (0, 0, 0, size - features.shape[1]))
        tiled = registers.repeat(size // len(registers), 1)
        valid = torch.arange(size, device=features.device) < lengths[:, None]
        return torch.where(valid[..., None], features, tiled)

    def _position_bounds(self, size: int, device: torch.device) -> Tensor:
        """Positions 0 .. S-1 as bounds of no width: the connector's RoPE has no midpoints."""
        if (size, device) not in self._positions:
            places = torch.arange(size, dtype=torch.float32, device=device)
            self._positions[size, device] = places[None, None, :, None].expand(1, 1, size, 2)
        return self._positions[size, device]


class Connectors(nn.Module):
    """The connector of each stream."""

    def __init__(self, config: TransformerConfig, *, video: bool = True, audio: bool = True) -> None:
        super().__init__()
        self.num_registers = config.connector_num_learnable_registers
        if video:
            heads, layers = config.connector_num_attention_heads, config.connector_num_layers
            self.video_embeddings_connector = Connector(config, config.video_connector_width, heads, layers)
        if audio:
            heads = config.audio_connector_num_attention_heads or config.connector_num_attention_heads
            layers = config.audio_connector_num_layers or config.connector_num_layers
            self.audio_embeddings_connector = Connector(config, config.audio_connector_width, heads, layers)

    def forward(
        self, video: Tensor | None, audio: Tensor | None, mask: Tensor | None, size: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Features (B, L, D) per stream and their mask (B, L) (1 = valid, on either side) to contexts (B, S, D).

        `size` S is a multiple of the number of registers, at least L; by default the smallest.
        """
        reference = video if video is not None else audio
        assert reference is not None, "the connectors need at least one stream"
        length, registers = reference.shape[1], self.num_registers
        size = -(-length // registers) * registers if size is None else size
        if size < length or size % registers:
            raise ConfigError(
                f"model.text_tokens={size}: the captions have {length} text tokens and there are {registers} registers; "
                f"give a multiple of {registers} that holds {length}"
            )
        if mask is None:
            mask = torch.ones(reference.shape[:2], dtype=torch.bool, device=reference.device)
        order = mask.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None]
        lengths = mask.bool().sum(1)
        return (
            self.video_embeddings_connector(video.take_along_dim(order, 1), lengths, size)
            if video is not None
            else None,
            self.audio_embeddings_connector(audio.take_along_dim(order, 1), lengths, size)
            if audio is not None
            else None,
        )


class TextConditioned(nn.Module):
    """Connectors and transformer as one model: called as the transformer is, with text features as context.

    This is what an engine shards. Frozen connectors run without recording gradients. Without connectors it is called with
    what they would give, computed once and stored.
    """

    def __init__(self, transformer: Transformer, connectors: Connectors | None, text_tokens: int) -> None:
        """`text_tokens`: rows of context behind the connectors. Fixed, so that a sample does not depend on the length of
        its batch-mates' captions; 1024 for released weights. `connectors` None: the model takes stored contexts."""
        super().__init__()
        self.transformer = transformer
        self.connectors = connectors
        self.text_tokens = text_tokens

    @property
    def config(self) -> TransformerConfig:
        return self.transformer.config

    def shard_units(self) -> list[nn.Module]:
        """The modules that a sharding engine gathers one at a time."""
        modules = self.connectors.modules() if self.connectors is not None else ()
        return [m for m in modules if isinstance(m, ConnectorBlock)] + self.transformer.shard_units()

    def forward(
        self,
        video: Modality | None = None,
        audio: Modality | None = None,
        perturbations: Perturbations | None = None,
    ) -> Velocity:
        """As `Transformer.forward`; each `context` is (B, L, W) text features with `context_mask` (B, L), 1 = valid.

        Without connectors each `context` is (B, S, W), S = `text_tokens`, all rows of it valid. What the connectors make of
        shared contexts is kept with them. The streams share theirs both, or neither.
        """
        streams = ((Stream.video, video), (Stream.audio, audio))
        if any(m is not None and not isinstance(m.context, Tensor) for _, m in streams):
            return self.transformer(
                *(None if m is None else self._with_shared(m, s) for s, m in streams), perturbations
            )
        if self.connectors is None:
            given = [None if m is None else self._stored_context(m) for m in (video, audio)]
            return self.transformer(*given, perturbations)
        trained = any(p.requires_grad for p in self.connectors.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            video_context, audio_context = _contexts(self.connectors, video, audio, self.text_tokens)
        return self.transformer(_with(video, video_context), _with(audio, audio_context), perturbations)

    def _stored_context(self, modality: Modality) -> Modality:
        """The modality with its context as it is: behind the connectors every row is valid."""
        assert isinstance(modality.context, Tensor)
        return replace(modality, context=self._checked(modality.context), context_mask=None)

    def _checked(self, context: Tensor) -> Tensor:
        if context.shape[1] != self.text_tokens:
            raise ConfigError(
                f"the model has no connectors and needs contexts of {self.text_tokens} rows; it was given "
                f"{context.shape[1]} rows. Build it with connectors, or encode with --text-cache context"
            )
        return context

    def _with_shared(self, modality: Modality, stream: Stream) -> Modality:
        """The modality with its shared contexts behind the connectors."""
        assert isinstance(modality.context, tuple)
        distinct = dict.fromkeys(modality.context)
        made = {shared: shared.once(self, partial(self._behind, shared, stream)) for shared in distinct}
        return replace(modality, context=tuple(made[shared] for shared in modality.context))

    def _behind(self, shared: SharedContext, stream: Stream) -> SharedContext:
        """The shared context that the transformer takes."""
        if self.connectors is None:
            return SharedContext(self._checked(shared.features))
        is_video = stream is Stream.video
        features = (shared.features, None) if is_video else (None, shared.features)
        trained = any(p.requires_grad for p in self.connectors.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            contexts = self.connectors(*features, shared.mask, self.text_tokens)
        context = contexts[0 if is_video else 1]
        assert context is not None
        return SharedContext(context)


def _contexts(
    connectors: Connectors, video: Modality | None, audio: Modality | None, size: int
) -> tuple[Tensor | None, Tensor | None]:
    given = video if video is not None else audio
    assert given is not None, "the model needs at least one stream"
    video_text, audio_text = (
        None if m is None or not isinstance(m.context, Tensor) else m.context for m in (video, audio)
    )
    return connectors(video_text, audio_text, given.context_mask, size)


def _with(modality: Modality | None, context: Tensor | None) -> Modality | None:
    """The modality with its context behind the connector, which needs no mask."""
    return None if modality is None or context is None else replace(modality, context=context, context_mask=None)

"""Sequence parallel: the ranks of a group share the tokens of every sample, and inside an attention its heads.

Outside of attentions a rank holds a contiguous piece of each stream's tokens. An attention trades: every rank gives away
pieces of all heads and gets all tokens of its own heads, and back. Pieces may differ by one token, or be empty. Attention to
text needs no trade, as every rank has the whole context; it computes the text's keys and values `sequence` times over,
2 L Dv^2 + 2 L Da^2 multiply-adds of a block's 14 Tv Dv^2 + 4 Tv Dv Da + 18 Ta Da^2. The connectors run whole on every rank.

Gradients: all ranks of a group compute the same loss from the same gathered velocities, and backward takes up only a
rank's own piece of them. So whatever a parameter's gradient is on one rank, in the transformer or before it, is the part
that comes from this rank's tokens: the engine's sum over all ranks counts each token once.

Source: DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ltx2_train.distributed.world import World
from ltx2_train.errors import ConfigError
from ltx2_train.model.attention import attend
from ltx2_train.model.modality import Modality, Perturbations, Stream, Velocity
from ltx2_train.model.transformer import Transformer

T = TypeVar("T")
Lengths = dict[Stream, int]  # tokens of each stream, over the whole group
TRADING = {  # a block's attentions over tokens of the streams: where their queries are, and their keys
    "attn1": (Stream.video, Stream.video),
    "audio_attn1": (Stream.audio, Stream.audio),
    "audio_to_video_attn": (Stream.video, Stream.audio),
    "video_to_audio_attn": (Stream.audio, Stream.video),
}


def apply_sequence_parallel(model: nn.Module, world: World) -> nn.Module:
    """The model, its transformer working on this rank's piece of the tokens; called, and answering, with whole samples.

    For a finished model, adapters included, before its blocks are compiled, recomputed or sharded. Raises `ConfigError`
    where the heads cannot be shared out.
    """
    if world.sequence == 1:
        return model
    transformer = next((module for module in model.modules() if isinstance(module, Transformer)), None)
    if transformer is None:
        raise ConfigError(
            f"engine.sequence={world.sequence}: {type(model).__name__} has no transformer to split; set 1"
        )
    _check_heads(transformer, world.sequence)
    group = _Group(world.sequence_group, world.rank % world.sequence, world.sequence)
    split = _Split(transformer.forward, group)
    transformer.forward = split  # type: ignore[method-assign]
    for block in transformer.transformer_blocks:
        _trade_in(block, split, group)
    return model


def _check_heads(transformer: Transformer, sequence: int) -> None:
    config = transformer.config
    for name in ("num_attention_heads", "audio_num_attention_heads"):
        heads = getattr(config, name)
        if heads % sequence:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ConfigError(
                f"engine.sequence={sequence} does not divide {name}={heads}: every rank needs as many heads. "
                f"Set engine.sequence to one of {divisors}"
            )


def _trade_in(block: nn.Module, split: "_Split", group: "_Group") -> None:
    """Makes a block's attentions trade heads for tokens.

    They need the whole number of tokens. It is handed to the block as one more argument, so that a block that is
    recomputed in backward gets that of its own forward, whatever the model was asked since.
    """
    trades = {name: _Attend(group, *streams) for name, streams in TRADING.items() if hasattr(block, name)}
    for name, trade in trades.items():
        getattr(block, name).attend = trade
    forward = block.forward

    def run(*args: Any) -> Any:
        *inputs, lengths = args
        for trade in trades.values():
            trade.lengths = lengths
        return forward(*inputs)

    block.forward = run
    block.register_forward_pre_hook(lambda _, args: (*args, split.lengths))


@dataclass(frozen=True, slots=True)
class _Group:
    """The ranks that share samples, and this one's place among them."""

    process_group: dist.ProcessGroup | None
    rank: int
    size: int

    def bounds(self, tokens: int) -> list[int]:
        """Where the pieces of so many tokens begin, and their end."""
        return [tokens * i // self.size for i in range(self.size + 1)]

    def sizes(self, tokens: int) -> list[int]:
        """Tokens of every rank's piece."""
        return [stop - start for start, stop in pairwise(self.bounds(tokens))]

    def piece(self, tokens: int) -> slice:
        """This rank's."""
        return slice(*self.bounds(tokens)[self.rank : self.rank + 2])

    def trade(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows from all ranks, in their order, for rows to all ranks, in their order: numbers of them in the lists."""
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.process_group)
        return result


class _Split:
    """Stands for a transformer's forward: whole samples in, whole velocities out, the work on a piece."""

    def __init__(self, forward: Callable[..., Velocity], group: _Group) -> None:
        self.forward, self.group = forward, group
        self.lengths: Lengths = {}
        self._positions, self._indexes = _Pieces(group), _Pieces(group)

    def __call__(
        self,
        video: Modality | None = None,
        audio: Modality | None = None,
        perturbations: Perturbations | None = None,
    ) -> Velocity:
        given = {Stream.video: video, Stream.audio: audio}
        self.lengths = {stream: m.latent.shape[1] for stream, m in given.items() if m is not None}
        velocity = self.forward(self._piece(video), self._piece(audio), perturbations)
        return Velocity(self._whole(velocity.video, video), self._whole(velocity.audio, audio))

    def _whole(self, piece: Tensor | None, asked: Modality | None) -> Tensor | None:
        if piece is None or asked is None:
            return None
        return _Gather.apply(piece, asked.latent.shape[1], self.group)

    def _piece(self, whole: Modality | None) -> Modality | None:
        """This rank's tokens. The self-attention mask stays whole: it is needed where all tokens are."""
        if whole is None:
            return None
        tokens = whole.latent.shape[1]
        assert whole.positions.shape[-2] == tokens, f"{whole.positions.shape[-2]} positions for {tokens} tokens"
        piece, index, mask = self.group.piece(tokens), whole.timestep_index, whole.keyframes_mask
        one_per_token = index is None and whole.timesteps.shape[1] > 1
        return replace(
            whole,
            latent=whole.latent[:, piece],
            timesteps=whole.timesteps[:, piece] if one_per_token else whole.timesteps,
            timestep_index=None if index is None else self._indexes.get(index, dim=1),
            positions=self._positions.get(whole.positions, dim=2),
            keyframes_mask=None if mask is None else mask[:, piece],
        )


class _Pieces:
    """This rank's piece of a tensor, by the identity of the whole, as what is cached by the piece (RoPE) hangs on it."""

    def __init__(self, group: _Group) -> None:
        self._group = group
        self._pieces = WeakTensorKeyDictionary()

    def get(self, whole: Tensor, dim: int) -> Tensor:
        version = 0 if whole.is_inference() else whole._version
        known = self._pieces.get(whole)
        if known is not None and known[0] == version:
            return known[1]
        span = self._group.piece(whole.shape[dim])
        piece = whole.narrow(dim, span.start, span.stop - span.start).clone()  # a view would keep its whole alive
        self._pieces[whole] = (version, piece)
        return piece


class _Attend:
    """Stands for `attend`: all tokens of this rank's heads, for the pieces of all heads, and back."""

    def __init__(self, group: _Group, queries: Stream, keys: Stream) -> None:
        self.group, self.queries, self.keys = group, queries, keys
        self.lengths: Lengths = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        num_queries, num_keys = self.lengths[self.queries], self.lengths[self.keys]
        query = _Trade.apply(query, num_queries, True, self.group)
        key, value = (_Trade.apply(t, num_keys, True, self.group) for t in (key, value))
        return _Trade.apply(attend(query, key, value, bias), num_queries, False, self.group)


class _Trade(torch.autograd.Function):
    """(B, piece, N, K) to (B, all tokens, share of N, K), or back; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, to_heads: bool, group: _Group) -> Tensor:
        ctx.tokens, ctx.to_heads, ctx.group = tokens, to_heads, group
        return (_to_heads if to_heads else _to_tokens)(x, tokens, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (_to_tokens if ctx.to_heads else _to_heads)(grad, ctx.tokens, ctx.group), None, None, None


def _to_heads(x: Tensor, tokens: int, group: _Group) -> Tensor:
    """(B, t, N, K) to (B, T, N / P, K)."""
    rows = x.unflatten(2, (group.size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)  # (P t, B, N / P, K)
    return group.trade(rows, [x.shape[1]] * group.size, group.sizes(tokens)).transpose(0, 1)


def _to_tokens(x: Tensor, tokens: int, group: _Group) -> Tensor:
    """(B, T, N / P, K) to (B, t, N, K)."""
    sizes = group.sizes(tokens)
    own = sizes[group.rank]
    rows = group.trade(x.transpose(0, 1), sizes, [own] * group.size)  # (P t, B, N / P, K)
    return rows.unflatten(0, (group.size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


class _Gather(torch.autograd.Function):
    """(B, piece, C) to (B, T, C) on every rank. Backward takes the own piece of the gradient: see the top."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, group: _Group) -> Tensor:
        ctx.piece = group.piece(tokens)
        rows = x.transpose(0, 1).repeat(group.size, 1, 1)
        return group.trade(rows, [x.shape[1]] * group.size, group.sizes(tokens)).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[:, ctx.piece], None, None


class GroupBatches(Iterable[T]):
    """What the first rank of a group reads, on all its ranks: a clip is read once, and no two ranks see another one.

    Were each to read for itself, a record that only one of them finds damaged would part the group.
    """

    def __init__(self, batches: Iterable[T], world: World) -> None:
        self._batches, self._world = batches, world

    def __iter__(self) -> Iterator[T]:
        mine = iter(self._batches) if self._world.counts_samples else None
        while True:
            read: Any = None if mine is None else next(mine)
            yield self._world.broadcast_in_sequence(read)

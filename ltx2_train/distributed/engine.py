"""The engine: a sharded model with its optimizer, behind the one interface that the trainer knows."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ltx2_train.errors import ConfigError


class Backend(StrEnum):
    """Who shards the model. A setting that a backend cannot honour is refused."""

    fsdp2 = "fsdp2"  # PyTorch's fully_shard
    zero3 = "zero3"  # DeepSpeed ZeRO-3


class Precision(StrEnum):  # lower case: OmegaConf finds members by name
    bf16 = "bf16"  # forward and backward in bf16, fp32 masters and reductions; frozen parameters are kept in bf16
    fp32 = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, whatever it is fed."""
        return torch.bfloat16 if self is Precision.bf16 else torch.float32


class Offload(StrEnum):
    """What lives in the host's memory instead of the device's."""

    none = "none"
    optimizer = "optimizer"  # masters and moments, 12 bytes per trained parameter; the update runs on the CPU
    all = "all"  # weights and gradients too; a block's weights come to the device when it runs


class Recompute(StrEnum):
    """Activation checkpointing: what is run again in backward instead of being kept. No policy changes a result's bits."""

    none = "none"
    every_n = "every_n"  # every n-th block
    selective = "selective"  # every block, except that the attentions' outputs are kept
    budget = "budget"  # the blocks whose activations do not fit a stated memory
    full = "full"  # every block


@dataclass(kw_only=True, slots=True)
class AdamWConfig:
    """What AdamW needs besides the learning rate, which every step is given."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay, times lr. Vectors (norms, biases, gates) never decay, nor what `no_decay` names."""
    no_decay: list[str] = field(
        default_factory=lambda: [r".*scale_shift_table\w*", r".*learnable_registers", r".*keyframes_abs_pos_embedding"]
    )
    """Regular expressions (full match) of parameters without decay: tables that are added, not multiplied with."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"engine.optimizer.betas={list(self.betas)}: two numbers in [0, 1)")
        if self.eps <= 0:
            raise ConfigError(f"engine.optimizer.eps={self.eps}: must be above 0")
        if self.weight_decay < 0:
            raise ConfigError(f"engine.optimizer.weight_decay={self.weight_decay}: must be 0 or more")
        check_patterns("engine.optimizer.no_decay", self.no_decay)

    def decays(self, name: str, num_dims: int) -> bool:
        """Whether the parameter is a matrix that weight decay applies to."""
        return num_dims >= 2 and not any(re.fullmatch(pattern, name) for pattern in self.no_decay)


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How the model is sharded, computed and updated."""

    backend: Backend = Backend.fsdp2
    """Who shards the model."""
    precision: Precision = Precision.fp32
    """Compute dtype. Masters, optimizer state, gradient sums and norms are fp32 either way."""
    replicate: int = 1
    """Whole copies of the sharded model (HSDP): weights are gathered among num_ranks / replicate neighbouring ranks, such as
    the GPUs of a machine, and only gradients cross between the copies. Must divide the number of ranks."""
    reshard: bool = True
    """Free a block's whole weights after its forward and gather them again in backward: less memory, more traffic. The
    last block's always stay, because backward begins with it."""
    prefetch: int = 0
    """Blocks whose weights are gathered ahead of the one that runs, in forward and in backward; each needs room for its
    whole weights. 0: the backend's own order."""
    offload: Offload = Offload.none
    """What is moved to the host's memory: none, optimizer or all."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm that is applied unscaled. None: no clipping."""
    skip_above: float | None = None
    """Global gradient norm above which a step is not applied at all. None: only non-finite gradients are refused."""
    recompute: Recompute = Recompute.none
    """Activation checkpointing policy."""
    recompute_every: int = 2
    """With recompute=every_n: every n-th block is recomputed, the first included."""
    recompute_budget_gb: float | None = None
    """With recompute=budget: GB (1e9 bytes) that activations inside blocks may take on a rank, those of a block that is
    being recomputed included, the blocks' inputs, which every policy keeps, not. One block is kept in any case."""
    compile: bool = False
    """torch.compile each block's forward, once for every shape that it meets. Not with recompute=selective: compiled code
    does not show its attentions."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions (full match) of parameters that are never updated, besides those the model itself freezes."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    sequence: int = 1
    """Ranks that share the tokens of each sample, for clips whose activations do not fit one device. Must divide the number
    of ranks and the model's attention heads."""

    def __post_init__(self) -> None:
        self.backend, self.precision = Backend(self.backend), Precision(self.precision)
        self.offload, self.recompute = Offload(self.offload), Recompute(self.recompute)
        for name in ("grad_clip", "skip_above"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"engine.{name}={value}: must be above 0, or null for none")
        for name, least in (("replicate", 1), ("prefetch", 0), ("recompute_every", 1), ("sequence", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"engine.{name}={getattr(self, name)}: must be {least} or more")
        self._check_recompute()
        self._check_backend()
        check_patterns("engine.freeze", self.freeze)

    def _check_recompute(self) -> None:
        budget = self.recompute_budget_gb
        if budget is not None and not budget > 0:
            raise ConfigError(f"engine.recompute_budget_gb={budget}: must be above 0")
        if self.recompute is Recompute.budget and budget is None:
            raise ConfigError("engine.recompute=budget: say how many GB in engine.recompute_budget_gb")
        if self.recompute is Recompute.budget and self.sequence > 1:
            # Their pieces may differ by a token, and so what they measure; a block recomputed on one of them alone would
            # wait for heads that the others never send.
            raise ConfigError(
                f"engine.recompute=budget with engine.sequence={self.sequence}: the ranks of a group would choose each "
                "for itself. Take engine.recompute=full, selective or every_n"
            )
        if self.recompute is Recompute.selective and self.compile:
            raise ConfigError(
                "engine.compile=true: compiled code does not show the attentions that engine.recompute=selective keeps. "
                "Take engine.recompute=full, every_n or budget, or engine.compile=false"
            )

    def _check_backend(self) -> None:
        """Raises `ConfigError` naming the first setting that the backend cannot honour."""
        if self.backend is Backend.fsdp2:
            return
        for name, (only, reason) in _ZERO3_ONLY.items():
            if getattr(self, name) != only:
                raise ConfigError(
                    f"engine.{name}={getattr(self, name)}: engine.backend=zero3 {reason}. Leave it at {only}, or take "
                    "engine.backend=fsdp2"
                )
        if self.recompute is Recompute.selective:
            raise ConfigError(
                "engine.recompute=selective: engine.backend=zero3 gathers weights inside a block, where single operations "
                "cannot be kept. Take engine.recompute=full or every_n, or engine.backend=fsdp2"
            )
        if self.recompute is Recompute.budget:
            raise ConfigError(
                "engine.recompute=budget: engine.backend=zero3 gathers weights again where a block is recomputed, and ranks "
                "with other shapes would recompute others. Take engine.recompute=full or every_n, or engine.backend=fsdp2"
            )


# The one value that ZeRO-3 has for a setting, and why.
_ZERO3_ONLY: dict[str, tuple[Any, str]] = {
    "replicate": (1, "shards over all ranks"),
    "reshard": (True, "always frees a block's weights after its forward"),
    "prefetch": (0, "gathers ahead by its own rules"),
    "compile": (False, "gathers weights inside a block, where a compiled block has none"),
}


def check_patterns(field_name: str, patterns: list[str]) -> None:
    """Raises `ConfigError` naming the first that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{field_name}: '{pattern}' is not a regular expression ({error})") from error


@dataclass(frozen=True, slots=True)
class StepResult:
    """What `Engine.step` did. `norm`: global gradient norm before clipping. A non-finite gradient is never applied."""

    norm: float
    applied: bool


class PendingSave(Protocol):
    """A checkpoint write in flight."""

    num_bytes: int  # of the whole checkpoint, over all ranks, to within a few headers

    def done(self) -> bool:
        """Whether this rank's files are written."""

    def wait(self) -> None:
        """Block until this rank's files are on disk. Raises what the write raised (disk full, ...)."""

    def files(self) -> list[Path]:
        """The files that this rank alone wrote, once it is done. Each file has at most one such rank."""


class Engine(Protocol):
    """Everything a backend must do, and no more. All ranks call every method together."""

    model: Callable[..., Any]  # forward only; same signature as the transformer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients, summed (not averaged) over the data ranks. `last`: final micro-batch of the step.

        Every trained parameter must be reached by every micro-batch on every rank, if only with a gradient of zeros: the
        collectives that reduce it follow from that.
        """

    def step(self, *, lr: float) -> StepResult:
        """Clip, update and clear the gradients."""

    def recomputed(self) -> Collection[str]:
        """Names of the blocks that backward runs again after this rank's last forward, where it goes through them."""

    def shards(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's fp32 master shards of the trained parameters, by parameter name."""

    def swapped(self, shards: dict[str, Tensor]) -> AbstractContextManager[None]:
        """The model with other trained weights in place (EMA at evaluation).

        The given tensors hold the model's own weights meanwhile: contents are exchanged, so that no third copy exists.
        """

    def save(self, directory: Path, extra: dict[str, Any]) -> PendingSave:
        """Write a resumable checkpoint of this moment; training may go on while it is written.

        `extra` rides along: dicts of tensors named and sharded like `shards`, and values that JSON can hold.
        """

    def load(self, directory: Path, extra: dict[str, Any]) -> dict[str, Any]:
        """Restore weights and optimizer, resharded to this world.

        The tensors in `extra` are filled in place. Gives `extra` back with the saved plain values.
        Raises `CheckpointError` when names, shapes or what is trained differ from this engine's.
        """

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """One whole CPU tensor at a time, of every parameter; empty on other ranks than 0. All ranks must iterate."""

"""The engine: a sharded model with its optimizer, behind the one interface that the trainer knows."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ltx2_train.errors import ConfigError


class Precision(StrEnum):  # lower case: OmegaConf finds members by name
    bf16 = "bf16"  # forward and backward in bf16, fp32 masters and reductions; frozen parameters are kept in bf16
    fp32 = "fp32"


class Recompute(StrEnum):
    """Activation checkpointing: which blocks are run again in backward instead of keeping their activations."""

    none = "none"
    full = "full"
    every_n = "every_n"


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

    precision: Precision = Precision.fp32
    """Compute dtype. Masters, optimizer state, gradient sums and norms are fp32 either way."""
    reshard: bool = True
    """Free a block's whole weights after its forward and gather them again in backward: less memory, more traffic."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm that is applied unscaled. None: no clipping."""
    skip_above: float | None = None
    """Global gradient norm above which a step is not applied at all. None: only non-finite gradients are refused."""
    recompute: Recompute = Recompute.none
    """Activation checkpointing policy."""
    recompute_every: int = 2
    """With recompute=every_n: every n-th block is recomputed, the first included."""
    compile: bool = False
    """torch.compile each block's forward."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions (full match) of parameters that are never updated, besides those the model itself freezes."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)

    def __post_init__(self) -> None:
        self.precision, self.recompute = Precision(self.precision), Recompute(self.recompute)
        for name in ("grad_clip", "skip_above"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"engine.{name}={value}: must be above 0, or null for none")
        if self.recompute_every < 1:
            raise ConfigError(f"engine.recompute_every={self.recompute_every}: must be 1 or more")
        check_patterns("engine.freeze", self.freeze)


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
        """Accumulate gradients, summed (not averaged) over the data ranks. `last`: final micro-batch of the step."""

    def step(self, *, lr: float) -> StepResult:
        """Clip, update and clear the gradients."""

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

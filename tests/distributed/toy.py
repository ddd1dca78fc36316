"""A small sharded model with its data, for the tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import AdamWConfig, Engine, EngineConfig
from ltx2_train.distributed.world import World
from ltx2_train.rng import generator

SEED = 3
GLOBAL_BATCH = 8


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)  # odd, so that no number of ranks divides it
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Toy(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.ones(2, width))
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.to(self.enter.weight.dtype)) * self.scale_shift_table[0].to(self.enter.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def initialise(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights as a function of (seed, name)."""
    for name, parameter in model.named_parameters():
        yield name, 0.5 * torch.randn(parameter.shape, generator=generator(SEED, name))


def toy_engine(world: World, build: Callable[[], nn.Module] = Toy, **config: Any) -> Engine:
    config = {"grad_clip": 0.7, "optimizer": AdamWConfig(weight_decay=0.1)} | config
    return build_engine(build, initialise, EngineConfig(**config), world)


def data(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step, (8, 4) and (8, 2)."""
    g = generator(SEED, "data", step)
    return torch.randn(GLOBAL_BATCH, 4, generator=g), torch.randn(GLOBAL_BATCH, 2, generator=g)


def train_step(engine: Engine, world: World, step: int, *, micro_batches: int = 2, lr: float = 0.05) -> float:
    """One update on this rank's part of the batch; the loss of the whole batch."""
    x, y = (t.tensor_split(world.size)[world.rank] for t in data(step))
    total = torch.zeros(())
    for i, (xs, ys) in enumerate(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)):
        loss = (engine.model(xs).float() - ys).square().sum() / (GLOBAL_BATCH * 2)
        last = i == min(micro_batches, len(x)) - 1
        engine.backward(loss, last=last)
        total += loss.detach()
    engine.step(lr=lr)
    return world.all_sum(total).item()


def train(engine: Engine, world: World, start: int, stop: int) -> list[float]:
    return [train_step(engine, world, step) for step in range(start, stop)]


def whole(engine: Engine) -> dict[str, Tensor]:
    """All weights on rank 0."""
    return dict(engine.full_weights())

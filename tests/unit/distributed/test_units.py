"""What is sharded, recomputed and compiled as one."""

import torch
from torch import nn

from ltx2_train.distributed.engine import EngineConfig, Recompute
from ltx2_train.distributed.units import prepare_units, shard_units


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return self.layers[1](self.layers[0](x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.activations = nn.ModuleList([nn.Tanh()])


def test_children_of_the_outermost_lists_are_units_if_they_have_parameters():
    model = Model()
    assert shard_units(model) == list(model.blocks)


def test_a_model_may_name_its_units():
    class Named(Model):
        def shard_units(self) -> list[nn.Module]:
            return [self.blocks[0]]

    model = Named()
    assert shard_units(model) == [model.blocks[0]]


def forwards(config: EngineConfig) -> list[int]:
    blocks = [Block() for _ in range(4)]
    prepare_units(blocks, config)
    x = torch.ones(1, 2, requires_grad=True)
    for block in blocks:
        x = block(x)
    x.sum().backward()
    with torch.no_grad():
        blocks[0](x)
    assert all(name.startswith("layers.0.") for name, _ in blocks[0].named_parameters()), "no name changes"
    return [block.forwards for block in blocks]


def test_recomputed_blocks_run_twice_in_training_and_once_without_gradients():
    assert forwards(EngineConfig()) == [2, 1, 1, 1]
    assert forwards(EngineConfig(recompute=Recompute.full)) == [3, 2, 2, 2]
    assert forwards(EngineConfig(recompute=Recompute.every_n, recompute_every=2)) == [3, 1, 2, 1]
    assert forwards(EngineConfig(recompute=Recompute.every_n, recompute_every=3)) == [3, 1, 1, 2]

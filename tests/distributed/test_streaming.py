"""Weights go from a file into shards: every rank reads its own rows, all of them together every byte once."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import EngineConfig, Precision
from ltx2_train.distributed.world import World
from ltx2_train.errors import CheckpointError
from ltx2_train.model import ModelConfig, build_model, initial_weights
from ltx2_train.model.build import official_key
from ltx2_train.model.lora import LoraConfig, add_lora
from ltx2_train.model.weights import PREFIX
from ltx2_train.testing.ranks import run_on_ranks
from ltx2_train.testing.released import write_release
from ltx2_train.weightfile import Stored


@dataclass
class Spy:
    """A stored tensor that counts the bytes read of it, and makes sure that what was read before it is gone."""

    tensor: Stored
    last: list[Callable[[], Tensor | None]]
    reads: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def read(self) -> Tensor:
        return self._counted(self.tensor.read())

    def rows(self, start: int, stop: int) -> Tensor:
        return self._counted(self.tensor.rows(start, stop))

    def _counted(self, value: Tensor) -> Tensor:
        assert all(reference() is None for reference in self.last)
        self.last[:] = [weakref.ref(value)]
        self.reads.append(value.nbytes)
        return value


def build(config: ModelConfig, lora: bool) -> nn.Module:
    model = build_model(config)
    return add_lora(model, LoraConfig(rank=2)) if lora else model


def stream(
    world: World, path: str, precision: str, lora: bool
) -> tuple[dict[str, int], dict[str, int], dict[str, Tensor]]:
    """Bytes read and elements held of every parameter by this rank, and the whole weights on rank 0."""
    config, spies, last = ModelConfig(weights=path), {}, []

    def spied(model: nn.Module) -> Iterator[tuple[str, Tensor | Stored]]:
        for name, tensor in initial_weights(model, config, 0):
            if not isinstance(tensor, Tensor):
                spies[name] = tensor = Spy(tensor, last)
            yield name, tensor

    engine = build_engine(lambda: build(config, lora), spied, EngineConfig(precision=Precision(precision)), world)
    held = {name: getattr(p, "_local_tensor", p).numel() for name, p in engine.module.named_parameters()}
    assert all(len(spy.reads) == 1 for spy in spies.values())
    whole = dict(engine.full_weights())
    return {name: spy.reads[0] for name, spy in spies.items()}, held, whole if world.is_main else {}


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), "2.3", parts=("transformer",), num_layers=1).transformer


@pytest.mark.parametrize(("precision", "lora"), [("fp32", False), ("bf16", True)], ids=["fp32", "bf16-lora"])
def test_each_rank_reads_its_own_rows_and_no_others(release, precision: str, lora: bool):
    stored = {key: tensor for key, tensor in load_file(release).items() if key.startswith(PREFIX)}
    ranks = run_on_ranks(stream, 2, str(release), precision, lora)
    for read, held, _ in ranks:
        assert {official_key(name) for name in read} == stored.keys()
        for name, nbytes in read.items():
            assert nbytes == held[name] * stored[official_key(name)].itemsize, name
    (first, _, whole), (second, _, _) = ranks
    for name in first:
        assert first[name] + second[name] == stored[official_key(name)].nbytes, name
        assert torch.equal(whole[name], stored[official_key(name)].to(whole[name].dtype)), name
    assert sum(first.values()) < 0.6 * sum(t.nbytes for t in stored.values())


def test_the_weights_do_not_depend_on_the_number_of_ranks(release):
    one, two = (run_on_ranks(stream, n, str(release), "fp32", False)[0][2] for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_rank_that_reads_what_is_not_finite_says_where(release, tmp_path):
    from safetensors import safe_open

    tensors, key = load_file(release), f"{PREFIX}proj_out.weight"
    tensors[key][-1, -1] = float("nan")  # in the rows of the last rank
    with safe_open(release, framework="pt") as file:
        save_file(tensors, tmp_path / "nan.safetensors", file.metadata())
    with pytest.raises(CheckpointError, match=f"{key}: 1 of 2,560 values read are NaN or infinite"):
        run_on_ranks(stream, 2, str(tmp_path / "nan.safetensors"), "fp32", False, timeout=60.0)

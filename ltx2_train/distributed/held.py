"""What a rank holds of a whole tensor: one range of its elements, and how PyTorch's checkpoint is told of it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltx2_train.weightfile import Stored


@dataclass(frozen=True, slots=True)
class Held:
    """Elements start .. stop - 1 of a flattened parameter: those that this rank holds. It may be none."""

    shape: torch.Size  # of the whole parameter
    start: int
    stop: int
    size: int  # of the longest range of a rank: all have as many, but the last ones

    @classmethod
    def cut(cls, shape: torch.Size, size: int, place: int) -> "Held":
        """Range number `place` of those that have `size` elements each, until there are none left."""
        whole = math.prod(shape)
        return cls(shape, min(place * size, whole), min((place + 1) * size, whole), size)

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, weight: Tensor | Stored) -> Tensor:
        """(len,) of a whole tensor, or of a stored one, of which only the rows around are read."""
        if len(self) == math.prod(self.shape) and not isinstance(weight, Tensor):
            weight = weight.read()
        if isinstance(weight, Tensor):
            return weight.reshape(-1)[self.start : self.stop]
        row = math.prod(self.shape[1:])
        first, last = self.start // row, -(-self.stop // row)
        return weight.rows(first, last).reshape(-1)[self.start - first * row : self.stop - first * row]


class Boxed(Tensor):
    """A whole tensor of which this rank has a range of elements, as PyTorch's distributed checkpoint wants to see it.

    A checkpoint knows boxes of a tensor: a range is the rest of a row, whole rows and the beginning of a row. Nothing
    can be computed with it.
    """

    flat: Tensor
    held: Held

    @staticmethod
    def __new__(cls, flat: Tensor, held: Held) -> "Boxed":
        boxed = Tensor._make_wrapper_subclass(cls, held.shape, dtype=flat.dtype, device=flat.device)
        boxed.flat, boxed.held = flat, held
        return boxed

    def __init__(self, flat: Tensor, held: Held) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} on a tensor that is only there to be saved")

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        held = self.held
        return [ChunkStorageMetadata(*map(torch.Size, box)) for box in boxes(held.shape, held.start, held.stop)]

    def __create_write_items__(self, fqn: str, tensor: Tensor) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        chunks = self.__create_chunk_list__()
        sizes = [math.prod(chunk.sizes) for chunk in chunks]
        for chunk, part in zip(chunks, self.flat.split(sizes), strict=True):
            if chunk.offsets == index.offset:
                return part.view(chunk.sizes)
        raise AssertionError(f"{index} is not of this rank")


def boxes(shape: torch.Size, start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    """(offsets, sizes) of the boxes that elements start .. stop - 1 of a tensor fill, in their order."""
    if start >= stop:
        return []
    if len(shape) < 2:
        return [([start], [stop - start])] if len(shape) else [([], [])]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    head = _in_row(shape, first - 1, start - (first - 1) * row, row) if start % row else []
    middle = [([first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]])] if last > first else []
    return [*head, *middle, *_in_row(shape, last, 0, stop - last * row)]


def _in_row(shape: torch.Size, row: int, start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    return [([row, *offsets], [1, *sizes]) for offsets, sizes in boxes(shape[1:], start, stop)]

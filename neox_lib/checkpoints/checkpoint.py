"""The interface of every opened checkpoint, whatever its layout."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neox_lib.checkpoints.files import WEIGHT_DTYPES, CheckpointError
from neox_lib.config import NeoXConfig, parameter_shapes
from neox_lib.model import NeoXModel
from neox_lib.quantization.linear import QUANTIZED, dtype_name


class LayerFile(NamedTuple):
    """One row of a checkpoint's inventory."""

    file: str
    rank: int
    part: str
    nbytes: int


class Checkpoint(Protocol):
    """A checkpoint whose weights are not read yet; as a string, its path."""

    @property
    def folder(self) -> Path | None:
        """The folder of its files, small ones beside them; None for a model in memory."""
        ...

    @property
    def config(self) -> NeoXConfig: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices, as stored: one of `quantization.linear.QUANTIZED` where they are quantized."""
        ...

    @property
    def float_dtype(self) -> torch.dtype:
        """`dtype`; for quantized weights, the dtype before."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as stored."""
        ...

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each tensor that `tensors` will give, from the files' headers."""
        ...

    def parts(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Our parameter names, in file order (`parameter_shapes`), and each one's parts as the files hold them, on the
        CPU: one per tensor-parallel rank of a slim folder, elsewhere a single one. What an adapter changes comes in
        fp32, for the model to round.

        A tied output matrix is left out; a quantized matrix comes with its scales. Where the format allows, a part is
        memory-mapped: don't write into it. Raises CheckpointError, naming the file, for weights that don't match the
        config.
        """
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same, each tensor whole, one at a time; in fp32 where its own dtype would round what was merged."""
        ...

    def files(self) -> list[LayerFile]:
        """Which file holds what, and its size."""
        ...


@dataclass(frozen=True)
class ModelCheckpoint:
    """A model in memory, packed or not, as a checkpoint."""

    model: NeoXModel
    folder: None = None

    def __str__(self) -> str:
        return "the model in memory"

    @property
    def config(self) -> NeoXConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.layers[0].attention.dense.weight.dtype  # type: ignore[union-attr,return-value]

    @property
    def float_dtype(self) -> torch.dtype:
        return self.model.word_embeddings.weight.dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors()}

    def parts(self) -> Iterator[tuple[str, list[Tensor]]]:
        return ((name, [tensor]) for name, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in parameter_shapes(self.config):
            module, _, leaf = name.rpartition(".")
            yield name, getattr(self.model.get_submodule(module), leaf).detach()

    def files(self) -> list[LayerFile]:
        return []


def largest_value(tensor: Tensor) -> float:
    """The largest absolute value in a tensor; NaN if it holds one."""
    low, high = (edge.item() for edge in tensor.aminmax())
    return max(-low, high)


def cast(name: str, tensor: Tensor, device: str | torch.device, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """The parameter `name` on `device` in `dtype`, contiguous; with `copy`, always in its own memory.

    Raises CheckpointError for a number past the largest of `dtype`: it would become infinite and the text wrong.
    """
    if dtype != tensor.dtype and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        found, largest = largest_value(tensor), torch.finfo(dtype).max
        if largest < found < math.inf:
            wide = [known for known, wider in WEIGHT_DTYPES.items() if torch.finfo(wider).max >= found]
            raise CheckpointError(
                f"{name} holds {found:,.0f}, but {dtype} ends at {largest:,.0f}; give dtype {' or '.join(wide)}"
            )
    return tensor.to(device, dtype, copy=copy, memory_format=torch.contiguous_format)


def check_convertible(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for quantized weights: what they were rounded from is lost."""
    if checkpoint.dtype in QUANTIZED.values():
        raise CheckpointError(
            f"{checkpoint}: {dtype_name(checkpoint.dtype)} weights, which can be run but not converted; give the "
            "checkpoint that they came from"
        )

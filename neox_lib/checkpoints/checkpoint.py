"""A checkpoint that has been opened, whatever its layout: its config, and its tensors one after another."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from neox_lib.checkpoints.files import WEIGHT_DTYPES, CheckpointError, open_tensors
from neox_lib.checkpoints.huggingface.layout import WEIGHT_FILES, is_huggingface
from neox_lib.checkpoints.huggingface.reader import open_huggingface
from neox_lib.checkpoints.slim.config import read_config
from neox_lib.checkpoints.slim.layout import (
    UNFINISHED,
    find_shards,
    is_slim,
    layer_file_name,
    parameter_shapes,
    place_of,
)
from neox_lib.checkpoints.slim.reader import check_tied, read_tensors, stored_dtype
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel

INT8_ENDING = ".int8.safetensors"


class Weights(Protocol):
    """A checkpoint whose weights are not read yet."""

    @property
    def config(self) -> NeoXConfig: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices, as stored."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as stored."""
        ...

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each tensor that `tensors` will give, from the files' headers."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our parameter names and whole tensors on the CPU, in file order (`layout.parameter_shapes`), one at a time.

        A tied output matrix is not among them. Where the format allows, a tensor is memory-mapped: don't write into it.
        Raises CheckpointError, naming the file, for weights that are not the config's.
        """
        ...


@dataclass(frozen=True)
class SlimWeights:
    """The weights of a slim folder."""

    folder: Path
    config: NeoXConfig
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.config.weight_bytes(self.dtype)

    def dtypes(self) -> dict[str, torch.dtype]:
        layers, found = self.config.num_hidden_layers, {}
        places = {name: place_of(name, layers) for name in parameter_shapes(self.config)}
        files = {index: open_tensors(paths[0]) for index, paths in find_shards(self.folder).items()}
        for name, (index, key) in places.items():
            if key not in files[index]:
                raise CheckpointError(f"{self.folder / layer_file_name(index, 0)}: lacks {key}; fetch the file again")
            found[name] = files[index][key].dtype
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.config.tie_word_embeddings:
            check_tied(find_shards(self.folder), self.config)
        return read_tensors(self.folder, self.config)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model in memory, packed ones too. Raises CheckpointError, at `dtypes`, for int8 layers."""

    model: NeoXModel

    @property
    def config(self) -> NeoXConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.word_embeddings.weight.dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def dtypes(self) -> dict[str, torch.dtype]:
        found = {name: tensor.dtype for name, tensor in self.tensors()}
        for name, dtype in found.items():
            if dtype not in WEIGHT_DTYPES:
                raise CheckpointError(f"{name} is {dtype}; a quantized model can't be saved, load its source instead")
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in parameter_shapes(self.config):
            module, _, leaf = name.rpartition(".")
            yield name, getattr(self.model.get_submodule(module), leaf).detach()


def open_weights(path: str | Path) -> Weights:
    """Open the checkpoint in a folder, slim or Hugging Face's, told apart by the names of its files.

    Raises CheckpointError saying what is there when it is no checkpoint, and for a config that can't be used.
    """
    folder = Path(path)
    if (folder / UNFINISHED).exists():
        raise CheckpointError(f"{folder}: a save into this folder was interrupted; save again to complete it")
    if is_slim(folder):
        return SlimWeights(folder, read_config(folder), stored_dtype(folder))
    if is_huggingface(folder):
        return open_huggingface(folder)
    raise CheckpointError(describe_what_is_there(folder))


def describe_what_is_there(folder: Path) -> str:
    """One line for a path that holds no checkpoint: what was expected, and what is there instead."""
    expected = "expected a folder with layer_00-model_00-model_states.pt and so on, or with config.json and " + (
        " or ".join(WEIGHT_FILES[::2])
    )
    int8 = folder.name.endswith(INT8_ENDING) or any(folder.glob(f"*{INT8_ENDING}"))
    if int8:
        return f"{folder}: int8 weights, which can be run but not converted; give the checkpoint that they came from"
    if not folder.exists():
        return f"{folder}: no such folder; {expected}"
    if folder.is_file():
        return f"{folder}: a file; {expected}"
    if (folder / "config.json").is_file():
        return f"{folder}: a config.json without weights; {expected}. Fetch the weights too"
    return f"{folder}: no checkpoint in it; {expected}"

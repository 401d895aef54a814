"""Reads a GGUF file of a GPT-NeoX model in F32, F16, BF16 or Q8_0, without PyPI's `gguf`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.checkpoints.checkpoint import LayerFile
from neox_lib.checkpoints.files import CheckpointError, reading_bar
from neox_lib.checkpoints.gguf.config import read_gguf_config, rows_by_head, their_name
from neox_lib.checkpoints.gguf.file import FLOATS, GGUFFile, GGUFTensor, open_gguf
from neox_lib.checkpoints.gguf.tokenizer import with_tokens
from neox_lib.config import NeoXConfig, parameter_shapes


@dataclass(frozen=True)
class GGUFCheckpoint:
    """A GGUF file, opened: see `Checkpoint`. The file holds everything, so there is no folder to look into.

    A matrix in Q8_0 comes in fp32, exactly; its model's `dtype` is fp16, which is what it was made from or close to it.
    """

    file: GGUFFile
    config: NeoXConfig
    stored: dict[str, GGUFTensor]  # by our names
    folder: None = None

    def __str__(self) -> str:
        return str(self.file)

    def widest(self, of_q8_0: torch.dtype) -> torch.dtype:
        """The dtype that holds every matrix, if those in Q8_0 are `of_q8_0`."""
        matrices = (stored.type for stored in self.stored.values() if len(stored.shape) == 2)
        return reduce(torch.promote_types, (FLOATS.get(name, of_q8_0) for name in matrices))

    @property
    def dtype(self) -> torch.dtype:
        return self.widest(torch.float16)

    @property
    def float_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.stored.values())

    def dtypes(self) -> dict[str, torch.dtype]:
        matrices = self.widest(torch.float32)
        return {
            name: matrices if len(stored.shape) == 2 else FLOATS.get(stored.type, torch.float32)
            for name, stored in self.stored.items()
        }

    def parts(self) -> Iterator[tuple[str, list[Tensor]]]:
        return ((name, [tensor]) for name, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        dtypes = self.dtypes()
        with reading_bar(self.nbytes) as bar:
            for name, stored in self.stored.items():
                tensor = self.file.read(their_name(name)).to(dtypes[name])
                yield name, rows_by_head(name, tensor, self.config.num_attention_heads)
                bar.update(stored.nbytes)

    def files(self) -> list[LayerFile]:
        names = dict.fromkeys(stored.type for stored in self.stored.values() if len(stored.shape) == 2)
        return [LayerFile(self.file.path.name, 0, f"the whole model in {', '.join(names)}", self.file.nbytes)]


def open_gguf_checkpoint(path: Path) -> GGUFCheckpoint:
    """Open a GGUF file: reads its metadata, no weights. Raises CheckpointError, naming file and tensor, for anything
    but a whole GPT-NeoX model in types that can be read.
    """
    file = open_gguf(path)
    config = with_tokens(read_gguf_config(file), file)
    names = {name: their_name(name) for name in parameter_shapes(config)}
    for name, shape in parameter_shapes(config).items():
        if (theirs := names[name]) not in file.tensors:
            raise CheckpointError(f"{path}: lacks {theirs}; fetch or convert it again")
        if (found := file.tensors[theirs].shape) != shape:
            raise CheckpointError(
                f"{path}: {theirs} has shape {list(found)}, its keys expect {list(shape)}; fetch or convert it again"
            )
        file.check_place(theirs)
    if unknown := file.tensors.keys() - names.values():
        raise CheckpointError(f"{path}: unexpected {min(unknown)}; a GPT-NeoX model of its keys has no such tensor")
    return GGUFCheckpoint(file, config, {name: file.tensors[theirs] for name, theirs in names.items()})

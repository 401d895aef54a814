"""Reads Hugging Face's layout, a folder as `transformers` or the Hub writes it, without `transformers`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.checkpoints.checkpoint import LayerFile
from neox_lib.checkpoints.files import CheckpointError, read_object, reading_bar
from neox_lib.checkpoints.huggingface.config import read_huggingface_config
from neox_lib.checkpoints.huggingface.layout import OUTPUT_NAMES, find_files, find_stored, match_names
from neox_lib.checkpoints.quantized_by_others import check_size
from neox_lib.checkpoints.slim.layout import part_of_file, place_of
from neox_lib.checkpoints.tensor_files import Stored, TensorReader
from neox_lib.config import NeoXConfig


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A Hugging Face folder, opened: see `Checkpoint`.

    Files may mix precisions. All matrices come in the widest dtype of any, so `dtype` holds for all of them and nothing
    is rounded; biases and norms come as stored.
    """

    folder: Path
    config: NeoXConfig
    stored: Mapping[str, Stored]
    output: Stored | None  # a tied model's output matrix, where its files repeat it

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (stored.dtype for stored in self.stored.values() if len(stored.shape) == 2))

    @property
    def float_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.stored.values())

    def dtypes(self) -> dict[str, torch.dtype]:
        matrices = self.dtype
        return {name: matrices if len(found.shape) == 2 else found.dtype for name, found in self.stored.items()}

    def parts(self) -> Iterator[tuple[str, list[Tensor]]]:
        return ((name, [tensor]) for name, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        reader, dtype = TensorReader(), self.dtype
        self.check_tied(reader)
        with reading_bar(self.nbytes) as bar:
            for name, stored in self.stored.items():
                tensor = reader.read(stored)
                yield name, tensor.to(dtype) if tensor.dim() == 2 else tensor
                bar.update(stored.nbytes)

    def check_tied(self, reader: TensorReader) -> None:
        """Raise CheckpointError when a tied model's files hold an output matrix that is not its embedding."""
        if self.output is None:
            return
        embedding = self.stored["word_embeddings.weight"]
        if not torch.equal(reader.read(self.output), reader.read(embedding)):
            raise CheckpointError(
                f"{self.output.path}: {self.output.key} differs from {embedding.key}, and config.json says that both "
                "are tied; if the model has an output matrix of its own, set tie_word_embeddings to false there"
            )

    def files(self) -> list[LayerFile]:
        layers = self.config.num_hidden_layers
        indices: dict[Path, list[int]] = {}
        for name, stored in self.stored.items():
            indices.setdefault(stored.path, []).append(place_of(name, layers)[0])
        rows = []
        for path, found in sorted(indices.items()):
            blocks = sorted({index - 2 for index in found if 2 <= index < layers + 2})
            ends = {part_of_file(index, layers): None for index in found if not 2 <= index < layers + 2}
            contents = (
                [f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}"] if blocks else []
            )
            rows.append(LayerFile(path.name, 0, ", ".join([*contents, *ends]), path.stat().st_size))
        return rows


def open_huggingface(folder: str | Path) -> HuggingFaceCheckpoint:
    """Open a Hugging Face folder: reads its config, index and headers, but no weights.

    Raises CheckpointError, naming the file, for anything that is not a whole GPT-NeoX checkpoint.
    """
    folder = Path(folder)
    config = read_huggingface_config(folder)
    nbytes = sum(path.stat().st_size for path in find_files(folder)[0])
    check_size(folder, read_object(folder / "config.json"), nbytes, config.weight_bytes(torch.float16))
    found = find_stored(folder)
    matched = match_names(folder, config, found)
    output = next((found[key] for key in OUTPUT_NAMES if key in found), None) if config.tie_word_embeddings else None
    return HuggingFaceCheckpoint(folder, config, matched, output)

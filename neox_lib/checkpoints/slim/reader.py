"""Reads the slim layout: one file per layer and rank.

Built in notebook 05.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.checkpoints.checkpoint import LayerFile
from neox_lib.checkpoints.files import BUFFERS, CheckpointError, check_tensors, reading_bar
from neox_lib.checkpoints.slim.config import read_config
from neox_lib.checkpoints.slim.layout import Shards, part_of_file, place_of
from neox_lib.checkpoints.slim.partition import merge_as_stored, shard_shape
from neox_lib.config import NeoXConfig, parameter_shapes


def inventory(shards: Shards, num_layers: int) -> list[LayerFile]:
    """Which file holds what, and its size; reads no weights."""
    return [
        LayerFile(path.name, rank, part_of_file(index, num_layers), shards.nbytes(path))
        for index, paths in shards.paths.items()
        for rank, path in enumerate(paths)
    ]


def open_layer(shards: Shards, index: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[Tensor]]:
    """The ranks' parts of each tensor of one layer, mapped and checked: key -> one part per file.

    `shapes` are those of the whole tensors. Raises CheckpointError, naming the file, for keys, shapes and dtypes that
    don't match the config or differ between ranks.
    """
    paths = shards.paths[index]
    expected = {key: shard_shape(key, shape, len(paths)) for key, shape in shapes.items()}
    files: list[dict[str, Tensor]] = []
    for path in paths:
        tensors = {key: tensor for key, tensor in shards.take(path).items() if not key.endswith(BUFFERS)}
        check_tensors(path, tensors, expected)
        for key, tensor in tensors.items():
            if files and tensor.dtype != files[0][key].dtype:
                raise CheckpointError(
                    f"{path}: {key} is {tensor.dtype}, expected {files[0][key].dtype} as in {paths[0].name}; the files "
                    "belong to different checkpoints; fetch them again"
                )
        files.append(tensors)
    return {key: [tensors[key] for tensors in files] for key in expected}


def check_tied(shards: Shards, config: NeoXConfig) -> None:
    """Raise CheckpointError when a tied model's files hold an output matrix that is not its embedding."""
    for first, last in zip(shards.paths[0], shards.paths.get(config.num_hidden_layers + 4, []), strict=False):
        embedding, output = [*shards.look(first).values()], [*shards.take(last).values()]
        if len(output) != 1 or not torch.equal(output[0], embedding[0]):
            raise CheckpointError(
                f"{last}: differs from {first.name}, but the config says that they are tied; check the config"
            )


class SlimCheckpoint:
    """A folder in the slim layout, opened: see `Checkpoint`. Raises CheckpointError for files that can't be used.

    Each file is opened once, and one layer's files are mapped at a time.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.shards = Path(folder), Shards(folder)
        self.config = read_config(self.shards)
        path, ranks, key = self.shards.paths[0][0], len(self.shards.paths[0]), "word_embeddings.weight"
        shape = shard_shape(key, parameter_shapes(self.config)[key], ranks)
        check_tensors(path, self.shards.look(path), {key: shape})
        self.dtype = self.float_dtype = self.shards.look(path)[key].dtype
        self.nbytes = self.config.weight_bytes(self.dtype)

    def __str__(self) -> str:
        return str(self.folder)

    def layers(self) -> Iterator[tuple[int, dict[str, str], dict[str, tuple[int, ...]]]]:
        """Each layer file's index, and our parameter names and their shapes by its keys."""
        shapes, count = parameter_shapes(self.config), self.config.num_hidden_layers
        for index, group in groupby(shapes, key=lambda name: place_of(name, count)[0]):
            names = {place_of(name, count)[1]: name for name in group}
            yield index, names, {key: shapes[name] for key, name in names.items()}

    def opened_layers(self) -> Iterator[tuple[dict[str, str], dict[str, list[Tensor]]]]:
        """Each layer's names and parts by key; pop the parts, so that their memory can be freed."""
        if self.config.tie_word_embeddings:
            check_tied(self.shards, self.config)
        with reading_bar(sum(row.nbytes for row in self.files())) as bar:
            for index, names, shapes in self.layers():
                bar.update(sum(self.shards.nbytes(path) for path in self.shards.paths[index]))
                yield names, open_layer(self.shards, index, shapes)

    def parts(self) -> Iterator[tuple[str, list[Tensor]]]:
        for names, layer in self.opened_layers():
            yield from ((name, layer.pop(key)) for key, name in names.items())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for names, layer in self.opened_layers():
            yield from ((name, merge_as_stored(key, layer.pop(key))) for key, name in names.items())

    def dtypes(self) -> dict[str, torch.dtype]:
        opened = ((names, open_layer(self.shards, index, shapes)) for index, names, shapes in self.layers())
        parts = ((names[key], parts) for names, layer in opened for key, parts in layer.items())
        whole = ((name, merge_as_stored(name, found) if found[0].dim() == 1 else found[0]) for name, found in parts)
        return {name: tensor.dtype for name, tensor in whole}

    def files(self) -> list[LayerFile]:
        return inventory(self.shards, self.config.num_hidden_layers)

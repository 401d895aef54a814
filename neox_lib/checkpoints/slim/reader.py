"""The slim layout, read: files of one layer and one rank each, a whole model in memory.

Built in notebook 05.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from neox_lib.checkpoints.files import CheckpointError, check_tensors, open_tensors
from neox_lib.checkpoints.slim.config import read_config
from neox_lib.checkpoints.slim.layout import empty_model, find_shards, parameter_shapes, part_of_file, place_of
from neox_lib.checkpoints.slim.partition import merge_shards, shard_shape
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel

# Buffers that old files carry beside the parameters: the rotary frequencies and the causal mask.
BUFFERS = ("attention.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def open_layer(paths: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, list[Tensor]]:
    """The ranks' parts of each tensor of one layer, mapped and checked: key -> a part for each of the files.

    `shapes` are those of the whole tensors. Raises CheckpointError, naming the file, for keys, shapes and dtypes that
    are not the config's, or that differ between ranks.
    """
    expected = {key: shard_shape(key, shape, len(paths)) for key, shape in shapes.items()}
    files = []
    for path in paths:
        tensors = {key: tensor for key, tensor in open_tensors(path).items() if key not in BUFFERS}
        check_tensors(path, tensors, expected)
        for key, tensor in tensors.items():
            if files and tensor.dtype != files[0][key].dtype:
                raise CheckpointError(
                    f"{path}: {key} is {tensor.dtype}, expected {files[0][key].dtype} as in {paths[0].name}; the files "
                    "are of different checkpoints"
                )
        files.append(tensors)
    return {key: [tensors[key] for tensors in files] for key in expected}


def read_tensors(folder: str | Path, config: NeoXConfig) -> Iterator[tuple[str, Tensor]]:
    """Parameter names and merged tensors, one after another, in the files' dtype; shows a progress bar.

    One layer's files are mapped at a time. Raises CheckpointError as `open_layer` does.
    """
    shards, layers, shapes = find_shards(folder), config.num_hidden_layers, parameter_shapes(config)
    sizes = {index: sum(path.stat().st_size for path in paths) for index, paths in shards.items()}
    total = sum(sizes.values())
    quick = total < 100e6  # a bar would come up on a busy machine only, and stay in a notebook's stored output
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Reading weights", delay=2, leave=False, disable=quick
    ) as bar:
        for index, group in groupby(shapes, key=lambda name: place_of(name, layers)[0]):
            names = {place_of(name, layers)[1]: name for name in group}
            parts = open_layer(shards[index], {key: shapes[name] for key, name in names.items()})
            for key, name in names.items():
                yield name, merge_shards(key, parts.pop(key))
            bar.update(sizes[index])


def check_tied(shards: dict[int, list[Path]], config: NeoXConfig) -> None:
    """Raise CheckpointError when a tied model's files hold an output matrix that is not its embedding."""
    for first, last in zip(shards[0], shards.get(config.num_hidden_layers + 4, []), strict=False):
        embedding, output = open_tensors(first)["word_embeddings.weight"], [*open_tensors(last).values()]
        if len(output) != 1 or not torch.equal(output[0], embedding):
            raise CheckpointError(
                f"{last}: differs from {first.name}, and the config says that both are tied; check it"
            )


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of a slim checkpoint's embedding, and so of its matrices. Raises CheckpointError as `open_tensors`."""
    path = find_shards(folder)[0][0]
    tensors = open_tensors(path)
    check_tensors(
        path, tensors, {"word_embeddings.weight": tuple(next(iter(tensors.values())).shape)} if tensors else {}
    )
    return tensors["word_embeddings.weight"].dtype


class LayerFile(NamedTuple):
    """One row of a checkpoint's inventory."""

    file: str
    rank: int
    part: str
    nbytes: int


def describe_slim(folder: str | Path) -> list[LayerFile]:
    """Which file holds what, and its size; reads no weights. Raises CheckpointError as `read_config` does."""
    layers = read_config(folder).num_hidden_layers
    return [
        LayerFile(path.name, rank, part_of_file(index, layers), path.stat().st_size)
        for index, paths in find_shards(folder).items()
        for rank, path in enumerate(paths)
    ]


def load_slim(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
) -> NeoXModel:
    """The model of a slim checkpoint, in eval mode and with gradients off, every parameter on `device`.

    `dtype` is one for all, or a function from a parameter's name to its dtype; None keeps the files'. The model starts
    on the meta device, without memory, and each tensor goes straight to its final place, so that the process never
    holds much more than the model itself. Raises CheckpointError for files that can't be used.
    """
    config = read_config(folder)
    model = empty_model(config)
    for name, tensor in read_tensors(folder, config):
        tensor = tensor.to(device, dtype(name) if callable(dtype) else dtype)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    model.rotary.fill(torch.device(device))
    if config.tie_word_embeddings:
        check_tied(find_shards(folder), config)
        model.final_linear.weight = model.word_embeddings.weight
    return model.eval()

"""The slim layout, read and written: files of one layer and one rank each, a whole model in memory."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from neox_lib.config import NeoXConfig
from neox_lib.files import (
    CheckpointError,
    check_free_disk,
    check_tensors,
    open_tensors,
    save_tensors,
    write_text_atomically,
)
from neox_lib.layout import (
    LAYER_FILE,
    UNFINISHED,
    empty_model,
    find_shards,
    is_slim,
    layer_file_name,
    parameter_shapes,
    part_of_file,
    place_of,
)
from neox_lib.model import NeoXModel
from neox_lib.release import read_config
from neox_lib.sharding import merge_shards, shard_shape, split_tensor

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
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc="Reading weights", delay=2, leave=False
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
    if config.tie_word_embeddings:
        check_tied(find_shards(folder), config)
        model.final_linear.weight = model.word_embeddings.weight
    return model.eval()


def check_ranks(config: NeoXConfig, ranks: int) -> None:
    """Raise CheckpointError unless `ranks` divides the heads, the MLP width and the padded vocabulary."""
    counts = {"attention heads": config.num_attention_heads, "MLP width": config.intermediate_size}
    for what, count in (counts | {"padded vocabulary": config.vocab_size}).items():
        if type(ranks) is not int or ranks < 1 or count % ranks:
            raise CheckpointError(
                f"{ranks} ranks do not divide the {what} of {count}; give a number that does, such as 1"
            )


def begin_save(folder: Path, needed: int) -> None:
    """Mark `folder` as unfinished and clear what an earlier interrupted save left there.

    Raises CheckpointError when it already holds a model, when the disk lacks the `needed` bytes, and when nothing can
    be written there.
    """
    check_free_disk(folder, needed + needed // 100 + 1_000_000)
    unfinished = (folder / UNFINISHED).exists()
    if not unfinished and (is_slim(folder) or (folder / "config.json").exists()):
        raise CheckpointError(f"{folder}: already holds a model; give another folder, or remove the old files first")
    try:
        write_text_atomically(folder / UNFINISHED, "A save into this folder was interrupted or still runs.\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror}); give another folder") from error
    for path in folder.iterdir():
        if LAYER_FILE.fullmatch(path.name) or path.name == "config.json" or path.suffix == ".partial":
            path.unlink()


def write_tensors(
    folder: Path, config: NeoXConfig, tensors: Iterable[tuple[str, Tensor]], ranks: int, spread_seed: int | None
) -> None:
    """Write parameters, given in file order, as layer files; then `config.json`; then the mark of a save is taken away.

    Each file is written whole or not at all, and until the last one is there the folder is not taken for a checkpoint.
    """
    layers = config.num_hidden_layers
    for index, named in groupby(tensors, key=lambda item: place_of(item[0], layers)[0]):
        parts = {place_of(name, layers)[1]: split_tensor(name, tensor, ranks, spread_seed) for name, tensor in named}
        for rank in range(ranks):
            save_tensors(folder / layer_file_name(index, rank), {key: part[rank] for key, part in parts.items()})
    write_text_atomically(folder / "config.json", config.to_json())
    (folder / UNFINISHED).unlink()


def write_slim(model: NeoXModel, folder: str | Path, ranks: int, spread_seed: int | None = None) -> None:
    """Save a model in the slim layout; `load_slim` gives back exactly the same numbers in the same dtypes.

    `spread_seed` as in `split_tensor`. Raises CheckpointError when the ranks don't divide the model, when the folder
    already holds one, and when the disk has no room, all before anything is written.
    """
    folder = Path(folder)
    check_ranks(model.config, ranks)
    begin_save(folder, sum(parameter.nbytes for parameter in model.parameters()))
    write_tensors(folder, model.config, model.named_parameters(), ranks, spread_seed)


def convert_slim(source: str | Path, target: str | Path, ranks: int) -> None:
    """Write the checkpoint in `source` to `target` with another number of ranks; the model stays exactly the same.

    Holds one layer at a time. Raises CheckpointError as `read_config` and `write_slim` do, or when both are one folder.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target}: is the folder to read from; give another one to write to")
    config = read_config(source)
    check_ranks(config, ranks)
    if config.tie_word_embeddings:
        check_tied(find_shards(source), config)
    begin_save(target, sum(path.stat().st_size for paths in find_shards(source).values() for path in paths))
    write_tensors(target, config, read_tensors(source, config), ranks, spread_seed=None)

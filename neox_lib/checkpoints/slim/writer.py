"""Writes the slim layout: one file per layer and rank."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from torch import Tensor

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.checkpoints.files import CheckpointError, save_tensors
from neox_lib.checkpoints.saving import begin_save, finish_save
from neox_lib.checkpoints.slim.layout import layer_file_name, place_of
from neox_lib.checkpoints.slim.partition import split_tensor
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel


def check_ranks(config: NeoXConfig, ranks: int) -> None:
    """Raise CheckpointError unless `ranks` divides the heads, the MLP width and the padded vocabulary."""
    counts = {"attention heads": config.num_attention_heads, "MLP width": config.intermediate_size}
    for what, count in (counts | {"padded vocabulary": config.vocab_size}).items():
        if type(ranks) is not int or ranks < 1 or count % ranks:
            raise CheckpointError(
                f"{ranks} ranks do not divide the {what} of {count}; give a number that does, such as 1"
            )


def write_tensors(
    folder: Path, config: NeoXConfig, tensors: Iterable[tuple[str, Tensor]], ranks: int, spread_seed: int | None
) -> None:
    """Write parameters, given in file order, as layer files; then `config.json`.

    Each file is written whole or not at all; until `finish_save` the folder is not taken for a checkpoint.
    """
    layers = config.num_hidden_layers
    for index, named in groupby(tensors, key=lambda item: place_of(item[0], layers)[0]):
        parts = {place_of(name, layers)[1]: split_tensor(name, tensor, ranks, spread_seed) for name, tensor in named}
        for rank in range(ranks):
            save_tensors(folder / layer_file_name(index, rank), {key: part[rank] for key, part in parts.items()})
    write_text_atomically(folder / "config.json", config.to_json())


def write_slim(model: NeoXModel, folder: str | Path, ranks: int, spread_seed: int | None = None) -> None:
    """Save a model in the slim layout; `build_model` restores exactly the same numbers and dtypes.

    `spread_seed` as in `split_tensor`. Raises CheckpointError when the ranks don't divide the model, when the folder
    already holds a model, and when the disk has no room, all before anything is written.
    """
    folder = Path(folder)
    check_ranks(model.config, ranks)
    begin_save(folder, sum(parameter.nbytes for parameter in model.parameters()))
    write_tensors(folder, model.config, model.named_parameters(), ranks, spread_seed)
    finish_save(folder)

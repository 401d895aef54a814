"""The slim layout, written: a model into files, or files into those of another number of ranks."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from torch import Tensor

from neox_lib.checkpoint import check_tied, read_tensors
from neox_lib.config import NeoXConfig
from neox_lib.files import CheckpointError, check_free_disk, save_tensors, write_text_atomically
from neox_lib.layout import LAYER_FILE, UNFINISHED, find_shards, is_slim, layer_file_name, place_of
from neox_lib.model import NeoXModel
from neox_lib.release import read_config
from neox_lib.splitting import split_tensor


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

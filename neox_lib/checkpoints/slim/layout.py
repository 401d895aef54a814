"""The slim DeepSpeed layout: which file holds which part of the model."""

import re
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from neox_lib.checkpoints.files import CheckpointError
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel

LAYER_FILE = re.compile(r"layer_(\d{2,})-model_(\d{2,})-model_states\.pt")
UNFINISHED = "unfinished_save.txt"  # stands in a folder from a save's first byte to its last


def layer_file_name(index: int, rank: int) -> str:
    """The file of one layer and one tensor-parallel rank.

    >>> layer_file_name(2, 1)
    'layer_02-model_01-model_states.pt'
    """
    return f"layer_{index:02d}-model_{rank:02d}-model_states.pt"


def place_of(name: str, num_layers: int) -> tuple[int, str]:
    """Layer file index and key in that file of a model parameter (gpt-neox numbers its pipeline's steps; 01 and L+2 are
    steps without parameters).

    >>> place_of("layers.0.attention.dense.bias", num_layers=44)
    (2, 'attention.dense.bias')
    >>> place_of("final_linear.weight", num_layers=44)
    (48, 'final_linear.weight')
    """
    first, *rest = name.split(".")
    if first == "layers":
        return int(rest[0]) + 2, ".".join(rest[1:])
    return {"word_embeddings": 0, "norm": num_layers + 3, "final_linear": num_layers + 4}[first], name


def part_of_file(index: int, num_layers: int) -> str:
    """What a layer file holds, in words."""
    ends = {0: "word embeddings", num_layers + 3: "final norm", num_layers + 4: "output matrix"}
    return ends.get(index, f"block {index - 2}")


class WithoutInitialValues(TorchFunctionMode):
    """While this is entered, `torch.nn.init` leaves tensors as they are.

    Loading overwrites the initial values anyway, and to draw them on the meta device torch first imports its compiler,
    which takes longer than loading the shipped model.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: NeoXConfig) -> NeoXModel:
    """A model of names, shapes and structure only: its parameters are on the meta device and take no memory."""
    with torch.device("meta"), WithoutInitialValues():
        return NeoXModel(config)


def parameter_shapes(config: NeoXConfig) -> dict[str, tuple[int, ...]]:
    """The model's parameter names and shapes, in file order."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}


def is_slim(folder: str | Path) -> bool:
    """Whether a folder holds layer files at all, whole checkpoint or not."""
    folder = Path(folder)
    return folder.is_dir() and any(LAYER_FILE.fullmatch(path.name) for path in folder.iterdir())


def find_shards(folder: str | Path) -> dict[int, list[Path]]:
    """The layer files by index, each a list by rank. Other files (mp_rank_*, configs, tokenizers) don't matter.

    Raises CheckpointError, naming the file, when a layer lacks a rank or has one more than the others, and for the
    leavings of an interrupted save.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected one with files like {layer_file_name(0, 0)}")
    if (folder / UNFINISHED).exists():
        raise CheckpointError(f"{folder}: a save into this folder was interrupted; save again to complete it")
    found = [match for path in folder.iterdir() if (match := LAYER_FILE.fullmatch(path.name))]
    if not found:
        raise CheckpointError(f"{folder}: no layer files; expected files like {layer_file_name(0, 0)}")
    pairs = {(int(match[1]), int(match[2])) for match in found}
    indices = sorted({index for index, _ in pairs})
    ranks = Counter(sum(index == other for other, _ in pairs) for index in indices).most_common(1)[0][0]
    for index, rank in sorted(pairs | {(index, rank) for index in indices for rank in range(ranks)}):
        path = folder / layer_file_name(index, rank)
        if rank >= ranks:
            raise CheckpointError(
                f"{path}: unexpected; most layers here have {ranks} rank(s). Remove it if it is a stray"
            )
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; each layer needs ranks 0 to {ranks - 1}. Fetch it again")
    return {index: [folder / layer_file_name(index, rank) for rank in range(ranks)] for index in indices}


def check_layers(folder: Path, shards: dict[int, list[Path]], config: NeoXConfig) -> None:
    """Raise CheckpointError, naming the file, unless the layer files are those of this config.

    A tied model may repeat its embedding where an untied one has its output matrix.
    """
    layers = config.num_hidden_layers
    expected = {place_of(name, layers)[0] for name in parameter_shapes(config)}
    allowed = expected | ({layers + 4} if config.tie_word_embeddings else set())
    for index in sorted(expected | shards.keys()):
        path = folder / layer_file_name(index, 0)
        if index not in shards:
            raise CheckpointError(f"{path}: missing; {layers} layers need it ({part_of_file(index, layers)})")
        if index not in allowed:
            raise CheckpointError(
                f"{path}: unexpected; the config says {layers} layers, whose files end at {max(allowed):02d}"
            )

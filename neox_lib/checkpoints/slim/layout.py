"""The slim DeepSpeed layout: which file holds which part of the model."""

import re
from collections import Counter
from pathlib import Path

from torch import Tensor

from neox_lib.checkpoints.files import CheckpointError, open_tensors, unwrap_keys
from neox_lib.config import NeoXConfig, parameter_shapes

LAYER_FILE = re.compile(r"layer_(\d{2,})-model_(\d{2,})-model_states\.pt")
WHOLE_FILE = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")  # of a model that was trained without a pipeline
SECTION = re.compile(
    r"(?:.*\.)?sequential\.(\d{1,6})\.(.+)"
)  # a key in such a file: a layer file's index, and the key there
FIRST_WORDS = (
    "word_embeddings",
    "input_layernorm",
    "post_attention_layernorm",
    "attention",
    "mlp",
    "norm",
    "final_linear",
)
UNFINISHED = "unfinished_save.txt"  # in a folder while a save into it is incomplete


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


def is_slim(folder: str | Path) -> bool:
    """Whether a folder holds layer files at all, whole checkpoint or not."""
    folder = Path(folder)
    return folder.is_dir() and any(LAYER_FILE.fullmatch(path.name) for path in folder.iterdir())


def find_shards(folder: str | Path) -> dict[int, list[Path]]:
    """The layer files by index, each a list by rank. Other files (mp_rank_*, configs, tokenizers) are ignored.

    Raises CheckpointError, naming the file, when a layer lacks a rank or has one more than the others, and after an
    interrupted save.
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


def is_whole(folder: str | Path) -> bool:
    """Whether a folder holds files with all layers of a rank. Beside layer files they hold no weights."""
    folder = Path(folder)
    return folder.is_dir() and any(WHOLE_FILE.fullmatch(path.name) for path in folder.iterdir())


def open_sections(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """The tensors of what a pipeline's layer files would hold, by a path that says where they are.

    Raises CheckpointError as `open_tensors` does, for a rank that is missing, and for keys that are not gpt-neox's.
    """
    ranks = {int(match[1]): path for path in folder.iterdir() if (match := WHOLE_FILE.fullmatch(path.name))}
    sections: dict[Path, dict[str, Tensor]] = {}
    for rank in range(max(ranks) + 1):
        if rank not in ranks:
            raise CheckpointError(f"{folder}: mp_rank_{rank:02d} is missing (of {max(ranks) + 1} ranks); fetch it")
        for key, tensor in open_tensors(ranks[rank]).items():
            match = SECTION.fullmatch(key)
            if match is None:
                raise CheckpointError(
                    f"{ranks[rank]}: {key} is not a key of gpt-neox, expected names like "
                    "sequential.0.word_embeddings.weight; for a run of Hugging Face's trainer, give the parent folder"
                )
            path = ranks[rank].with_name(f"{ranks[rank].name}:sequential.{int(match[1])}")
            sections.setdefault(path, {})[match[2]] = tensor
    return sections


class Shards:
    """The layer files of a folder, or the files with all layers of a rank as if they were layer files: their paths by
    index and rank, and each file opened once.

    After `look` a file stays open, memory-mapped, until `take`; files with all layers stay open. Raises CheckpointError
    as `find_shards`, `open_sections` and `open_tensors` do.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        self.opened: dict[Path, dict[str, Tensor]] = {}
        self.sections: dict[Path, dict[str, Tensor]] = {}
        if is_slim(folder) or not is_whole(folder):
            self.paths = find_shards(folder)
            return
        self.sections, self.paths = open_sections(self.folder), {}
        for path in sorted(self.sections):
            self.paths.setdefault(int(path.name.rpartition(".")[2]), []).append(path)

    def path_of(self, index: int) -> Path:
        """Where rank 0's part of a layer is, or should be."""
        for path in self.sections:
            return path.with_name(f"{path.name.rpartition('.')[0]}.{index}")
        return self.folder / layer_file_name(index, 0)

    def nbytes(self, path: Path) -> int:
        """The bytes that a file takes on the disk, or a layer in its file."""
        section = self.sections.get(path)
        return path.stat().st_size if section is None else sum(tensor.nbytes for tensor in section.values())

    def look(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file that will be needed again."""
        if path not in self.opened:
            self.opened[path] = self.take(path)
        return self.opened[path]

    def take(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, which is closed with the last of them."""
        if path in self.opened:
            return self.opened.pop(path)
        return unwrap_keys(path, self.sections.get(path) or open_tensors(path), FIRST_WORDS)


def check_layers(shards: Shards, config: NeoXConfig) -> None:
    """Raise CheckpointError, naming the file, unless the layer files are those of this config.

    A tied model may repeat its embedding where an untied one has its output matrix.
    """
    layers = config.num_hidden_layers
    expected = {place_of(name, layers)[0] for name in parameter_shapes(config)}
    allowed = expected | ({layers + 4} if config.tie_word_embeddings else set())
    for index in sorted(expected | shards.paths.keys()):
        path = shards.path_of(index)
        if index not in shards.paths:
            raise CheckpointError(f"{path}: missing; {layers} layers need it ({part_of_file(index, layers)})")
        if index not in allowed:
            raise CheckpointError(
                f"{path}: unexpected; the config says {layers} layers, whose files end at {max(allowed):02d}"
            )

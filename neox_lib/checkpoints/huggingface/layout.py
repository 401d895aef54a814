"""Hugging Face's layout: which files a folder has, and under which names they hold our parameters."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from neox_lib.checkpoints.files import BUFFERS, CheckpointError, read_object, unwrap_keys
from neox_lib.checkpoints.tensor_files import Stored, describe_file
from neox_lib.config import NeoXConfig, parameter_shapes

logger = logging.getLogger(__name__)

# In the order in which `transformers` looks for them: a whole model in one file, or an index of its shards.
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (WHOLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
PREFIX = "gpt_neox."  # a causal model's; a bare base model's file lacks it
THEIR_NAME = {"word_embeddings": "embed_in", "norm": "final_layer_norm"}
OUTPUT_NAMES = ("embed_out.weight", "lm_head.weight")
FIRST_WORDS = ("gpt_neox", "embed_in", "layers", "final_layer_norm", "embed_out", "lm_head")
# What reinforcement learning puts beside a model to judge its texts (trl, trlx): v_head, ilql_heads, value_head.
VALUE_HEAD = re.compile(r"(\w+\.)*(\w+_)?(v|q|value|critic|reward|ilql)_?heads?\..+")


def is_huggingface(folder: str | Path) -> bool:
    """Whether a folder holds weights under the names of `transformers`, whole checkpoint or not."""
    return any((Path(folder) / name).is_file() for name in WEIGHT_FILES)


def their_name(name: str) -> str:
    """A parameter's name in a file of `transformers`.

    >>> their_name("layers.0.attention.dense.bias")
    'gpt_neox.layers.0.attention.dense.bias'
    >>> their_name("word_embeddings.weight"), their_name("final_linear.weight")
    ('gpt_neox.embed_in.weight', 'embed_out.weight')
    """
    if name == "final_linear.weight":
        return OUTPUT_NAMES[0]
    first, _, rest = name.partition(".")
    return f"{PREFIX}{THEIR_NAME.get(first, first)}.{rest}"


def names_by_key(config: NeoXConfig) -> dict[str, str]:
    """Our parameters' names by every key under which a file of `transformers` may hold them."""
    keys: dict[str, str] = {}
    for name in parameter_shapes(config):
        for key in OUTPUT_NAMES if name == "final_linear.weight" else (their_name(name),):
            keys |= {key: name, key.removeprefix(PREFIX): name}
    return keys


def read_index(path: Path) -> dict[str, str]:
    """Which file beside it holds which key, according to an index of shards. Raises CheckpointError for one that can't
    be read or that names anything but weight files beside it.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: not an index of shards, its weight_map names no tensor; fetch it again")
    places = {key: str(file) for key, file in weight_map.items()}
    for file in places.values():
        if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{path}: names {file!r}; expected .safetensors or .bin files beside it")
    return places


def find_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder's weights, and for a sharded checkpoint which of them holds which key.

    Raises CheckpointError, naming the file, for a missing shard, and as `read_index` does.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: no weights; expected {' or '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        return [path], {}
    places = read_index(path)
    files = sorted(set(places.values()))
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: missing; {path.name} names it. Fetch it again")
    return [folder / file for file in files], places


def is_value_head(where: str, key: str) -> bool:
    """Whether a tensor is a value head's; if so, a warning says that it is left out."""
    if not VALUE_HEAD.fullmatch(key):
        return False
    logger.warning("%s: a value head beside the model is left out", where)
    return True


def find_stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's weights by its `unwrapped` key; buffers and a value head are left out. Raises
    CheckpointError as `find_files` and `describe_file` do, and when a shard lacks a key that the index promises.
    """
    files, places = find_files(folder)
    found: dict[str, Stored] = {}
    for path in files:
        for stored in describe_file(path, ignored=BUFFERS):
            if places.get(stored.key, path.name) == path.name and (not places or stored.key in places):
                found[stored.key] = stored
    for key, file in places.items():
        if key not in found and not key.endswith(BUFFERS):
            raise CheckpointError(f"{folder / file}: lacks {key}, which the index promises; fetch the file again")
    found = {key: stored for key, stored in found.items() if not is_value_head(f"{stored.path}: {key}", key)}
    return unwrap_keys(folder, found, FIRST_WORDS)


def match_names(folder: Path, config: NeoXConfig, found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Where each of our parameters lies, in file order. Raises CheckpointError, naming file and key, for a parameter
    that is missing or has another shape, and for a tensor that this model has no place for.
    """
    where = next(iter(found.values())).path if len({stored.path for stored in found.values()}) == 1 else folder
    bare = not any(key.startswith(PREFIX) for key in found)
    output = next((key for key in OUTPUT_NAMES if key in found), OUTPUT_NAMES[0])
    matched, rest = {}, dict(found)
    for name, shape in parameter_shapes(config).items():
        key = output if name == "final_linear.weight" else their_name(name).removeprefix(PREFIX if bare else "")
        stored = rest.pop(key, None)
        if stored is None:
            advice = "a model without its output matrix writes no text" if key == output else "fetch the file again"
            raise CheckpointError(f"{where}: lacks {key}, which the config asks for; {advice}")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.path}: {key} has shape {list(stored.shape)}, expected {list(shape)} from config.json; file "
                "and config belong to different models"
            )
        matched[name] = stored
    if config.tie_word_embeddings:
        rest.pop(output, None)
    if rest:
        stored = next(iter(rest.values()))
        raise CheckpointError(
            f"{stored.path}: unexpected {stored.key}; a GPT-NeoX model of this config has no such tensor"
        )
    return matched

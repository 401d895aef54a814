"""The shards of a model on the Hub: which of our parameters lie in which, known before any of them is fetched."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError
from torch import Tensor

from neox_lib.checkpoints.files import BUFFERS, WEIGHT_DTYPES, CheckpointError, unwrapped
from neox_lib.checkpoints.huggingface.layout import FIRST_WORDS, VALUE_HEAD, names_by_key, their_name
from neox_lib.checkpoints.safetensors_writer import SAFETENSORS_DTYPES
from neox_lib.checkpoints.tensor_files import TensorReader, describe_file
from neox_lib.config import NeoXConfig, parameter_shapes
from neox_lib.hub.listing import DownloadError, HubFile, Listing, hub_errors

WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Shard:
    """A file of weights on the Hub, and which of our parameters to take from it."""

    file: HubFile
    names: frozenset[str]


def parameters_of_shards(listing: Listing, files: list[HubFile], work: Path, config: NeoXConfig) -> list[Shard]:
    """Which parameters come from which file, by the index. Raises CheckpointError, before any weight is fetched, when
    the index lacks one or has a tensor that the model has no place for.
    """
    weights = [file for file in files if file.name.endswith(WEIGHTS)]
    index = next((file for file in files if file.name.endswith(".index.json")), None)
    if index is None:
        return [Shard(weights[0], frozenset(parameter_shapes(config)))]
    known, found = names_by_key(config), {}
    for key, file in json.loads((work / index.name).read_text("utf-8"))["weight_map"].items():
        if (name := known.get(unwrapped(key, FIRST_WORDS))) is not None:
            found[name] = file
        elif not key.endswith(BUFFERS) and not VALUE_HEAD.fullmatch(key):
            raise CheckpointError(f"{listing.model}: {index.name} has {key}, for which this model has no place")
    for name in parameter_shapes(config):
        if name not in found:
            raise CheckpointError(f"{listing.model}: {index.name} lacks {their_name(name)}, which config.json asks for")
    return [Shard(file, frozenset(name for name in found if found[name] == file.name)) for file in weights]


def find_dtype(listing: Listing, file: HubFile, config: Path) -> torch.dtype:
    """The dtype of a model's matrices, before its weights come. Raises DownloadError.

    A safetensors file has it in its header, and the Hub is asked for these first bytes; for a .bin file the config says
    it.
    """
    if not file.name.endswith(".safetensors"):
        fields = json.loads(config.read_text("utf-8"))
        return WEIGHT_DTYPES.get(fields.get("torch_dtype") or fields.get("dtype"), torch.float16)
    with hub_errors(listing.model, listing.commit):
        try:
            header = HfApi().parse_safetensors_file_metadata(listing.model, file.name, revision=listing.commit)
        except SafetensorsParsingError as error:
            raise DownloadError(f"{listing.model}: {file.name} is damaged on the Hub ({error})") from error
    names = {str(tensor.dtype) for tensor in header.tensors.values() if len(tensor.shape) == 2} or {"F16"}
    return reduce(torch.promote_types, (SAFETENSORS_DTYPES.get(name, torch.float32) for name in names))


def read_shard(path: Path, shard: Shard, config: NeoXConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a shard, memory-mapped, one at a time. Raises CheckpointError for one that is missing or of
    another shape, for a matrix that is not in `dtype`, and for a tensor that the model has no place for.
    """
    missing = set(shard.names)
    known, shapes, reader = names_by_key(config), parameter_shapes(config), TensorReader()
    for stored in describe_file(path, ignored=BUFFERS):
        if VALUE_HEAD.fullmatch(stored.key):
            continue
        name = known.get(unwrapped(stored.key, FIRST_WORDS))
        if name is None:
            raise CheckpointError(f"{shard.file.name}: unexpected {stored.key}; this model has no place for it")
        if stored.shape != shapes[name]:
            raise CheckpointError(
                f"{shard.file.name}: {stored.key} has shape {list(stored.shape)}, expected {list(shapes[name])} from "
                "config.json; file and config belong to different models"
            )
        if len(stored.shape) == 2 and torch.promote_types(stored.dtype, dtype) != dtype:
            raise CheckpointError(
                f"{shard.file.name}: {stored.key} is {stored.dtype}, expected {dtype} as before it; download the model "
                "without --to int8 and convert that"
            )
        if name in missing:
            missing.remove(name)
            yield name, reader.read(stored)
    if missing:
        raise CheckpointError(f"{shard.file.name}: lacks {their_name(min(missing))}, which config and index ask for")

"""Writes Hugging Face's layout: any of our models as a folder that `transformers` and programs built on it load."""

import json
import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.checkpoints.checkpoint import Checkpoint, ModelCheckpoint, check_convertible
from neox_lib.checkpoints.huggingface.config import huggingface_fields
from neox_lib.checkpoints.huggingface.layout import INDEX, WHOLE, their_name
from neox_lib.checkpoints.safetensors_writer import Spec, write_safetensors
from neox_lib.checkpoints.saving import whole_or_gone
from neox_lib.checkpoints.tokenizer_files import GENERATION, ROLES, open_tokenizer, role_fields, write_beside
from neox_lib.config import NeoXConfig, parameter_shapes
from neox_lib.model import NeoXModel
from neox_lib.tokenizer import ENDOFTEXT, PADDING

SHARD_BYTES = 5_000_000_000  # the limit of `transformers` for years; it reads shards of any size


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut where a shard would exceed `limit` bytes; a larger tensor gets its own shard.

    >>> plan_shards({"a": 3, "b": 3, "c": 9, "d": 1}, limit=6)
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = []
    filled = 0
    for name, nbytes in sizes.items():
        if not shards or filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def write_weights(folder: Path, checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], limit: int) -> None:
    """The weights as one safetensors file, or as shards and then their index; one tensor in memory at a time."""
    shapes = parameter_shapes(checkpoint.config)
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards, tensors = plan_shards(sizes, limit), checkpoint.tensors()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs: dict[str, Spec] = {their_name(name): (dtypes[name], shapes[name]) for name in names}
        renamed = ((their_name(name), tensor) for name, tensor in islice(tensors, len(names)))
        write_safetensors(folder / file, specs, renamed, {"format": "pt"})
        weight_map |= dict.fromkeys(specs, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_text_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_roles(folder: Path, tokenizer: Path, config: NeoXConfig, fields: Mapping[str, Any]) -> None:
    """Write a `tokenizer_config.json` by which `AutoTokenizer` loads exactly the tokenizer of that file. Of several
    ends of a text the first is its `eos_token`.
    """
    known = open_tokenizer(tokenizer)
    ids = {"unk_token": known.token_to_id(ENDOFTEXT), "pad_token": known.token_to_id(PADDING)}
    ends = config.eos_token_ids[:1]
    said = {**fields, "eos_token_id": ends[0] if ends else None}
    ids |= {role.removesuffix("_id"): said[role] for role in ROLES if type(said.get(role)) is int}
    roles = {role: known.id_to_token(token_id) for role, token_id in ids.items() if token_id is not None}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **{role: token for role, token in roles.items() if token is not None},
    }
    write_text_atomically(folder / "tokenizer_config.json", json.dumps(words, indent=2) + "\n")


def write_huggingface(
    source: Checkpoint | NeoXModel,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Export a model, or an opened checkpoint, with the tokenizer JSON at `tokenizer` if one is given, and with what
    lies beside that file: the roles of its tokens, a chat template.

    Numbers and precision stay as they are. `AutoModelForCausalLM` and `AutoTokenizer` load the folder, and so do
    other programs that read such folders. Holds one tensor at a time beside the source. Raises CheckpointError when the
    folder already holds a model, when the disk has no room, and for weights that can't be used; whatever interrupts
    it, the folder is left as it was.
    """
    checkpoint, folder = ModelCheckpoint(source) if isinstance(source, NeoXModel) else source, Path(folder)
    check_convertible(checkpoint)
    dtypes = checkpoint.dtypes()
    with whole_or_gone(folder, checkpoint.nbytes):
        write_weights(folder, checkpoint, dtypes, shard_bytes)
        config, roles = checkpoint.config, role_fields(checkpoint.config, checkpoint.folder)
        write_beside(folder, config, None if tokenizer is None else Path(tokenizer), checkpoint.folder)
        if tokenizer is not None and not (folder / "tokenizer_config.json").exists():
            write_roles(folder, Path(tokenizer), config, roles)
        if not (folder / GENERATION).exists():
            write_text_atomically(folder / GENERATION, json.dumps(roles, indent=2) + "\n")
        fields = huggingface_fields(config, checkpoint.dtype) | roles
        write_text_atomically(folder / "config.json", json.dumps(fields, indent=2) + "\n")

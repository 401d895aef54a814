"""A quantized file made of shards that come one after another, over several runs: each continues the last."""

import json
import os
from collections.abc import Collection
from pathlib import Path

import torch

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.checkpoints.files import BUFFERS, CheckpointError, unwrapped
from neox_lib.checkpoints.huggingface.layout import FIRST_WORDS, is_value_head, names_by_key, their_name
from neox_lib.checkpoints.quantized import quantized, quantized_metadata, quantized_specs, scale_name
from neox_lib.checkpoints.safetensors_writer import lay_out, reserve, write_each
from neox_lib.checkpoints.tensor_files import Stored, TensorReader, describe_file
from neox_lib.config import NeoXConfig, parameter_shapes


class QuantizedStream:
    """The unfinished file, `weights`, and beside it `done.json`: the keys of every shard that is safely in it.

    The order makes it safe: a shard's numbers are flushed to the disk before the record names it, and the record is
    replaced as a whole. `folder` must be for these files alone.
    """

    def __init__(self, folder: Path, config: NeoXConfig, dtype: torch.dtype, to: torch.dtype = torch.int8):
        """Read what an earlier run left; write nothing yet. `dtype` is the widest of the matrices, to be quantized to
        `to`.
        """
        self.weights, self.record = folder / "weights", folder / "done.json"
        self.config, self.dtype, self.to = config, dtype, to
        self.specs = quantized_specs(config, to, dtype)
        self.start, self.begins, self.nbytes = lay_out(self.specs, quantized_metadata(config, to, dtype))
        self.done: dict[str, list[str]] = {}
        if self.record.exists() and self.weights.exists():
            with self.weights.open("rb") as file:
                if file.read(len(self.start)) == self.start:  # else another version of this library laid it out
                    self.done = json.loads(self.record.read_text("utf-8"))

    def missing_bytes(self) -> int:
        """Bytes of disk that the file still needs."""
        return 0 if self.done else self.nbytes

    def check_complete(self, where: str, keys: Collection[str]) -> None:
        """Raise CheckpointError, naming `where`, when `keys` lack a parameter that the config asks for."""
        known = names_by_key(self.config)
        names = {known.get(unwrapped(key, FIRST_WORDS)) for key in keys}
        for name in parameter_shapes(self.config):
            if name not in names:
                raise CheckpointError(f"{where}: lacks {their_name(name)}, which config.json asks for")

    def add(self, shard: Path) -> None:
        """Quantize the parameters of a shard, one at a time, into the file.

        Raises CheckpointError for one that the model doesn't have, of another shape, or wider than `dtype`.
        """
        stored = self.stored_by_name(shard)
        wanted = {name for one in stored for name in (one, scale_name(one)) if name in self.specs}
        if not self.done:
            with self.weights.open("wb") as file:
                reserve(file, self.nbytes)
                file.truncate(self.nbytes)
                file.write(self.start)
        reader = TensorReader()
        tensors = ((name, reader.read(found)) for name, found in stored.items())
        with self.weights.open("r+b") as file:
            rounded = quantized(tensors, self.to, self.dtype)
            write_each(file, {name: self.specs[name] for name in wanted}, self.begins, rounded)
            file.flush()
            os.fsync(file.fileno())
        self.done[shard.name] = [found.key for found in stored.values()]
        write_text_atomically(self.record, json.dumps(self.done) + "\n")

    def stored_by_name(self, shard: Path) -> dict[str, Stored]:
        """Where in a shard each of its parameters lies; raises what `add` does."""
        known, shapes, found = names_by_key(self.config), parameter_shapes(self.config), {}
        for stored in describe_file(shard, ignored=BUFFERS):
            where, name = f"{shard.name}: {stored.key}", known.get(unwrapped(stored.key, FIRST_WORDS))
            if is_value_head(where, stored.key):
                continue
            if name is None:
                raise CheckpointError(f"{where} is unexpected; this model has no place for it")
            if stored.shape != shapes[name]:
                raise CheckpointError(
                    f"{where} has shape {list(stored.shape)}, expected {list(shapes[name])} from config.json; file and "
                    "config belong to different models"
                )
            if len(stored.shape) == 2 and torch.promote_types(stored.dtype, self.dtype) != self.dtype:
                raise CheckpointError(
                    f"{where} is {stored.dtype}, expected {self.dtype} from config.json; download the model without "
                    "--to and convert that"
                )
            found[name] = stored
        return found

    def finish(self, target: Path) -> None:
        """Give the file its name. Raises CheckpointError while a parameter is missing."""
        self.check_complete("the shards", [key for keys in self.done.values() for key in keys])
        self.weights.replace(target)

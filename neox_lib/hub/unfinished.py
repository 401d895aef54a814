"""A safetensors file that is written over several runs: whatever ends one, the next knows what is there for good."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.checkpoints.safetensors_writer import Spec, lay_out, reserve, write_each


class UnfinishedFile:
    """The file in the making, `weights`, and beside it `record.json`: the parts that are in it and on the disk.

    A part has a name of the caller's choice and some of the tensors. The order is what makes it safe: a part's bytes
    are flushed to the disk before the record names it, and the record is replaced as a whole.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], parts: Iterable[str]):
        """Look at what an earlier run left in `folder`: of `parts`, those are done that the record names, if it is that
        of a file with the same header. Changes nothing yet.
        """
        self.path, self.record = folder / "weights", folder / "record.json"
        self.specs = specs
        self.start, self.begins, self.nbytes = lay_out(specs, metadata)
        recorded = self.read_record()
        self.done = [part for part in parts if part in recorded]

    def read_record(self) -> list[str]:
        """The parts that are done; none, unless the file has this one's header and size."""
        try:
            with self.path.open("rb") as file:
                same = file.read(len(self.start)) == self.start and self.path.stat().st_size == self.nbytes
            parts = json.loads(self.record.read_text("utf-8"))
        except (OSError, ValueError):
            return []
        return [str(part) for part in parts] if same and isinstance(parts, list) else []

    def missing_bytes(self) -> int:
        """Bytes of disk that the file still needs to have its full size."""
        return self.nbytes - (self.path.stat().st_size if self.done else 0)

    def begin(self) -> None:
        """Take the disk space of the whole file and write its header, unless parts of it are done.

        The record first forgets the parts that are not wanted now, since others will be written over them.
        """
        write_text_atomically(self.record, json.dumps(self.done) + "\n")
        if self.done:
            return
        with self.path.open("wb") as file:
            reserve(file, self.nbytes)
            file.truncate(self.nbytes)
            file.write(self.start)

    def write_part(self, part: str, names: Iterable[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write the tensors called `names`, as they come, and then record that `part` is done.

        Raises CheckpointError for a tensor that is missing, unknown, or not as the specs say.
        """
        with self.path.open("r+b") as file:
            write_each(file, {name: self.specs[name] for name in names}, self.begins, tensors)
            file.flush()
            os.fsync(file.fileno())
        self.done.append(part)
        write_text_atomically(self.record, json.dumps(self.done) + "\n")

    def finish(self, target: Path) -> None:
        """Give the file its name, in one step, and take the record away."""
        os.replace(self.path, target)
        self.record.unlink(missing_ok=True)

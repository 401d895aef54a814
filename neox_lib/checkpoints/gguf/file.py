"""A GGUF file: its metadata and where its tensors lie, read without trusting it.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, two counts, metadata (key, type,
value), what tensors there are (name, dimensions from the innermost, type, place), then their bytes, each aligned.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neox_lib.checkpoints.files import CheckpointError, check_no_pointer

ENDING = ".gguf"
# The types of weights by their numbers in a file; Q8_0 are blocks of 32 whole numbers, a scale in fp16 before each.
TYPE_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K"}
TYPE_NAMES |= {11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16"}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK, Q8_0_BYTES = 32, 34
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
# Past these a count is a lie, which would take hours or all memory before the end of the file shows it.
MOST_ITEMS, MOST_BYTES_OF_TEXT = 2**22, 2**26


class GGUFTensor(NamedTuple):
    """A tensor in a file, not read yet: the name of its type, its shape as torch has it, its first byte."""

    type: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file. Only for the types that can be read."""
        numbers = math.prod(self.shape)
        return numbers // BLOCK * Q8_0_BYTES if self.type == "Q8_0" else numbers * FLOATS[self.type].itemsize


class Cursor:
    """Reads one value after another from a file's bytes. Raises ValueError where they end or a count is too large."""

    def __init__(self, raw: mmap.mmap):
        self.raw, self.at = raw, 0

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}") * count
        if count > MOST_ITEMS or size > len(self.raw) - self.at:
            raise ValueError(f"{count:,} numbers at byte {self.at} of {len(self.raw)}")
        self.at += size
        return struct.unpack_from(f"<{count}{code}", self.raw, self.at - size)

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > min(MOST_BYTES_OF_TEXT, len(self.raw) - self.at):
            raise ValueError(f"a text of {length:,} bytes at byte {self.at} of {len(self.raw)}")
        self.at += length
        return self.raw[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(self.code(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind not in (TEXT, ARRAY):
            return list(self.numbers(self.code(kind), count))
        return self.times(count, lambda: self.value(kind))

    def code(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"a value of type {kind}, which the format does not have")
        return NUMBERS[kind]

    def times(self, count: int, read: Callable[[], Any]) -> list[Any]:
        if count > MOST_ITEMS:
            raise ValueError(f"{count:,} values at byte {self.at} of {len(self.raw)}")
        return [read() for _ in range(count)]

    def tensor(self) -> tuple[str, GGUFTensor]:
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = self.numbers("Q", dimensions)[::-1]
        kind = self.number("I")
        return name, GGUFTensor(TYPE_NAMES.get(kind, f"type {kind}"), shape, self.number("Q"))


@dataclass(frozen=True)
class GGUFFile:
    """An opened file: its metadata by key, and its tensors by name. As a string, its path."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    nbytes: int

    def __str__(self) -> str:
        return str(self.path)

    def check_place(self, name: str) -> None:
        """Raise CheckpointError unless a tensor's type can be read and all its bytes are in the file."""
        tensor = self.tensors[name]
        if tensor.type not in ("Q8_0", *FLOATS):
            raise CheckpointError(
                f"{self}: {name} is {tensor.type}; {', '.join(FLOATS)} and Q8_0 are read here. Run this file with "
                "llama.cpp, or convert the model that it was made from with --dtype q8_0"
            )
        if tensor.type == "Q8_0" and tensor.shape[-1] % BLOCK:
            raise CheckpointError(f"{self}: {name} is Q8_0 in rows of {tensor.shape[-1]}, not a multiple of {BLOCK}")
        if tensor.begin + tensor.nbytes > self.nbytes:
            raise CheckpointError(
                f"{self}: truncated, {name} would end at byte {tensor.begin + tensor.nbytes:,} of {self.nbytes:,}; "
                "fetch it again"
            )

    def read(self, name: str) -> Tensor:
        """A tensor that `check_place` accepts, memory-mapped: don't write into it. Q8_0 comes in fp32, in its own
        memory: fp16 would round the product of scale and number.
        """
        tensor = self.tensors[name]
        try:
            mapped = np.memmap(self.path, np.uint8, "c", tensor.begin, (tensor.nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self}: changed while it was read ({error}); try again") from error
        raw = torch.from_numpy(mapped)
        if tensor.type != "Q8_0":
            return raw.view(FLOATS[tensor.type]).view(tensor.shape)
        blocks = raw.view(-1, Q8_0_BYTES)
        scales, numbers = blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:].view(torch.int8)
        return numbers.float().mul_(scales).view(tensor.shape)


def open_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a file and where its tensors lie; reads no weights. Raises CheckpointError, naming it, for
    one that is damaged, of another version, or a part of a model.
    """
    try:
        check_no_pointer(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            return parse(path, Cursor(raw))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a GGUF file") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: truncated, damaged or no GGUF file ({reason}); fetch or convert it again"
        ) from error


def parse(path: Path, cursor: Cursor) -> GGUFFile:
    """What a file's header says. Raises ValueError for what can't be, CheckpointError for what can't be read here."""
    if (magic := bytes(cursor.numbers("B", 4))) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    if (version := cursor.number("I")) not in (2, 3):
        found = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
        raise CheckpointError(f"{path}: a GGUF file, but {found}; version 2 or 3, little-endian, is read here")
    tensor_count, field_count = cursor.numbers("Q", 2)
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        if (key := cursor.text()) in fields:
            raise ValueError(f"{key} twice")
        fields[key] = cursor.value(cursor.number("I"))
    if (parts := fields.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(f"{path}: one of {parts} parts of a model; join them with `llama-gguf-split --merge`")
    found = cursor.times(tensor_count, cursor.tensor)
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment % 8:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = cursor.at + -cursor.at % alignment
    tensors = {name: tensor._replace(begin=start + tensor.begin) for name, tensor in found}
    if len(tensors) < len(found):
        raise ValueError("two tensors of one name")
    if shifted := [name for name, tensor in found if tensor.begin % alignment]:
        raise ValueError(f"{shifted[0]} begins off its alignment")
    return GGUFFile(path, fields, tensors, len(cursor.raw))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder; None where there is none.

    Raises CheckpointError for a folder with several.
    """
    if path.is_file():
        return path if path.suffix == ENDING else None
    found = sorted(path.glob(f"[!.]*{ENDING}")) if path.is_dir() else []  # macOS leaves ._NAME beside a NAME
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(each.name for each in found)}; give the path of one of them")
    return found[0] if found else None

"""A safetensors file mapped into memory: its tensors are there at once, and the disk is read when they are used."""

import json
import mmap
import os
import threading
from pathlib import Path

import psutil
import torch
from torch import Tensor

from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.safetensors_writer import DTYPE_NAMES
from neox_lib.checkpoints.tensor_files import open_safetensors

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
READ_AHEAD = 64 * 2**20  # bytes asked of the disk at a time


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """What a safetensors file says about its tensors, its metadata, and where the first tensor begins.

    Raises CheckpointError, naming the file, when it is not there, damaged or cut short.
    """
    with open_safetensors(path):  # the library checks the header against the file's size
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    return header, metadata, 8 + length


def map_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata. Reads the header only; the file stays mapped as long as any of
    the tensors lives, and processes that map the same file share its pages.

    What a program writes into such a tensor stays its own and never reaches the file. Raises CheckpointError as
    `read_header` does, and for a dtype that is not known.
    """
    path = Path(path)
    header, metadata, begin = read_header(path)
    unknown = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in DTYPES}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise CheckpointError(f"{path}: {name} is {dtype}, expected one of {', '.join(DTYPES)}")
    with path.open("rb") as file:
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        raw = whole[begin + first : begin + end]
        dtype = DTYPES[entry["dtype"]]
        if raw.storage_offset() % dtype.itemsize:  # another program's file may place its tensors anywhere
            raw = raw.clone()
        tensors[name] = raw.view(dtype).view(entry["shape"])
    return tensors, metadata


def read_ahead(path: Path) -> threading.Thread | None:
    """Have the system bring a file into its page cache, from front to back, while the program already uses it.

    Does nothing, and returns None, where the system has no such call and where the file is larger than the memory that
    is free: its first pages would be gone when they are wanted.
    """
    size = path.stat().st_size
    if not hasattr(os, "posix_fadvise") or size > psutil.virtual_memory().available:
        return None

    def read() -> None:
        with path.open("rb") as file:
            for begin in range(0, size, READ_AHEAD):
                os.posix_fadvise(file.fileno(), begin, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=read, name=f"read ahead {path.name}", daemon=True)
    thread.start()
    return thread

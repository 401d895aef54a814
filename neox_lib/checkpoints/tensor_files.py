"""One file of weights as `transformers` writes it, .safetensors or .bin: what it holds, and its tensors."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neox_lib.checkpoints.files import CheckpointError, check_no_pointer, open_tensors
from neox_lib.checkpoints.quantized_by_others import check_tensors_are_weights
from neox_lib.checkpoints.safetensors_writer import SAFETENSORS_DTYPES
from neox_lib.memory import available_memory

READ_AHEAD = 64 * 2**20  # bytes requested from the disk at a time


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def describe_file(path: Path, ignored: tuple[str, ...] = ()) -> list[Stored]:
    """What a file holds, except keys with an ignored ending; reads no weights.

    Raises CheckpointError, naming the file, for damage, for a pickle that may run code, and for weights that are
    quantized or in a dtype other than fp16, bf16 or fp32.
    """
    found: dict[str, tuple[torch.dtype | str, tuple[int, ...]]] = {}
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            for key in file.keys():  # noqa: SIM118  # the handle is no dict
                part = file.get_slice(key)
                dtype = str(part.get_dtype())
                found[key] = (SAFETENSORS_DTYPES.get(dtype, dtype), tuple(part.get_shape()))
    else:
        for key, tensor in open_tensors(path).items():
            found[key] = (tensor.dtype, tuple(tensor.shape))
    found = {key: kind for key, kind in found.items() if not key.endswith(ignored)}
    check_tensors_are_weights(path, {key: dtype for key, (dtype, _) in found.items()})
    return [Stored(path, key, dtype, shape) for key, (dtype, shape) in found.items() if isinstance(dtype, torch.dtype)]


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A handle on a .safetensors file. Raises CheckpointError, naming the file, where it or a tensor can't be read."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected weights. Fetch it again")
    try:
        check_no_pointer(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: truncated, damaged or unreadable ({reason}); expected a safetensors file. Fetch it again"
        ) from error


class TensorReader:
    """Reads the tensors of files one after another, each memory-mapped where its format allows.

    A .safetensors file is mapped for each tensor and released with it, so few of its pages stay resident. The last .bin
    file stays open, since its keys take longer to read.
    """

    def __init__(self):
        self.path: Path | None = None
        self.tensors: dict[str, Tensor] = {}

    def read(self, stored: Stored) -> Tensor:
        """The tensor, on the CPU. Don't write into it. Raises CheckpointError when the file has changed."""
        if stored.path.suffix == ".safetensors":
            with open_safetensors(stored.path) as file:
                tensor = file.get_tensor(stored.key) if stored.key in file.keys() else None  # noqa: SIM118
        else:
            if stored.path != self.path:
                self.tensors = {}  # free the old file's before opening the new one's
                self.path, self.tensors = stored.path, open_tensors(stored.path)
            tensor = self.tensors.get(stored.key)
        if tensor is None or tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
            raise CheckpointError(
                f"{stored.path}: changed while it was read; {stored.key} is not what it was. Try again"
            )
        return tensor


def read_ahead(path: Path) -> threading.Thread | None:
    """Have the system read a file into its page cache, from front to back, while the program already uses it.

    Does nothing, and returns None, where the system has no such call and where the file is larger than the free memory:
    its first pages would be gone when they are needed.
    """
    size = path.stat().st_size
    if not hasattr(os, "posix_fadvise") or size > available_memory():
        return None

    def read() -> None:
        with path.open("rb") as file:
            for begin in range(0, size, READ_AHEAD):
                os.posix_fadvise(file.fileno(), begin, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=read, name=f"read ahead {path.name}", daemon=True)
    thread.start()
    return thread

"""Writes a safetensors file tensor by tensor: the format's own library needs all of them in memory at once.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes that give the header's length, the
header in JSON (name -> dtype, shape, place), then the tensors' bytes without a gap.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neox_lib.checkpoints.atomic import write_atomically
from neox_lib.checkpoints.files import CheckpointError, check_free_disk

# The format's names of the dtypes that weights and training states use.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
ALIGNMENT = 64  # bytes, a line of the processor's cache: the first tensor begins at a multiple of it
Spec = tuple[torch.dtype, tuple[int, ...]]


def lay_out(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """What precedes the tensors, where in the file each tensor begins, and the whole file's bytes.

    Wide dtypes come first, so every tensor begins at a multiple of its item size, and of 64 if all sizes are multiples
    of 64. Raises ValueError for a dtype that the format does not know.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, place = {}, 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {dtype}; a safetensors file takes {', '.join(map(str, DTYPE_NAMES))}")
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        begins[name], place = place, end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + begin for name, begin in begins.items()}, len(start) + place


def reserve(file, nbytes: int) -> None:
    """Reserve disk space for the whole file, where the system can: a full disk shows before the work."""
    with contextlib.suppress(AttributeError):  # Windows and macOS have no such call
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def write_each(file, specs: Mapping[str, Spec], begins: dict[str, int], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put every tensor in its place. Raises CheckpointError for one that is missing, unknown, or not as `specs` say."""
    missing = dict(specs)
    for name, tensor in tensors:
        found, expected = (tensor.dtype, tuple(tensor.shape)), missing.pop(name, None)
        if expected is None:
            raise CheckpointError(f"{name}: came twice, or was not announced")
        if found != (expected[0], tuple(expected[1])):
            raise CheckpointError(
                f"{name}: is {found[0]} {list(found[1])}, announced as {expected[0]} {list(expected[1])}"
            )
        file.seek(begins[name])
        if tensor.numel():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if missing:
        raise CheckpointError(f"{', '.join(missing)}: announced, but never came")


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    freed_meanwhile: int = 0,
) -> None:
    """Write a safetensors file from `tensors` as they come, in any order; `specs` announce each one's dtype and shape.

    `freed_meanwhile` is the number of bytes of disk that reading `tensors` will free.

    Holds one tensor at a time. The file appears under its name when it is whole; an error, a full disk or Ctrl-C leaves
    what was there before and no partial file. Raises CheckpointError when the disk has no room, before anything is
    read, when writing fails, and for tensors that are not as announced.
    """
    path = Path(path)
    start, begins, nbytes = lay_out(specs, metadata or {})
    check_free_disk(path.parent, nbytes - freed_meanwhile)

    def write(temporary: Path) -> None:
        with temporary.open("r+b") as file:
            if not freed_meanwhile:
                reserve(file, nbytes)
            file.write(start)
            write_each(file, specs, begins, tensors)
            file.truncate(nbytes)

    try:
        write_atomically(path, write)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: could not be written ({reason}); check its folder and free space") from error

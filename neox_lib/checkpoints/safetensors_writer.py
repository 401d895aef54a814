"""One safetensors file, written tensor by tensor: the file's own library wants all of them in memory at once.

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

# The format's names of dtypes, as far as weights and training's states use them.
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
    """What stands before the tensors, where in the file each tensor begins, and the whole file's bytes.

    Wide dtypes stand first, so that every tensor begins at a multiple of its own item size, and each at a multiple of
    64 where the sizes of all are such multiples. Raises ValueError for a dtype that the format does not know.
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
    """Take the disk space of the whole file now, where the system can, so that a full disk shows before the work."""
    with contextlib.suppress(AttributeError):  # Windows and macOS have no such call
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def write_each(file, specs: Mapping[str, Spec], begins: dict[str, int], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put every tensor at its place. Raises CheckpointError for one that is missing, unknown, or not as `specs` say."""
    missing = dict(specs)
    for name, tensor in tensors:
        found, expected = (tensor.dtype, tuple(tensor.shape)), missing.pop(name, None)
        if expected is None:
            raise CheckpointError(f"{name}: came twice or is not among the tensors that were announced")
        if found != (expected[0], tuple(expected[1])):
            raise CheckpointError(
                f"{name}: is {found[0]} {list(found[1])}, announced as {expected[0]} {list(expected[1])}"
            )
        file.seek(begins[name])
        if tensor.numel():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if missing:
        raise CheckpointError(f"{', '.join(missing)}: announced, and never came")


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    freed_meanwhile: int = 0,
) -> None:
    """Write a safetensors file from `tensors` as they come, in any order; `specs` give dtype and shape of each before.

    `freed_meanwhile` are the bytes of disk that reading `tensors` will give back.

    Holds one tensor at a time. The file appears under its name when it is whole; an error, a full disk or Ctrl-C leaves
    what was there before and no partial file. Raises CheckpointError when the disk has no room, before anything is
    read, when it refuses in the middle, and for tensors that are not as announced.
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

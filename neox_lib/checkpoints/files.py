"""Files that hold weights: opened without trusting them, each once, and room on the disk for new ones."""

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from neox_lib.checkpoints.atomic import write_atomically

SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "tiny"  # the folder of the model that comes with the package
# The dtypes of stored weights, by the name that a user types and a config.json says.
WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Endings of what old files hold beside the parameters: the causal mask, its fill value, the rotary frequencies.
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, what was expected, and what to do."""


def is_zip(path: Path) -> bool:
    """Whether a .pt file is in torch's zip format (since torch 1.6), the one that can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a .pt file, on the CPU, running nothing that the file may contain.

    A file in the zip format is memory-mapped: a tensor's bytes are read from the disk when they are used and belong to
    the page cache, not to this process. Raises CheckpointError, naming the file, for anything but such tensors.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(
            f"{path}: {found}; expected a .pt file of weights. Check the path or fetch the file again"
        )
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: the file is empty; expected weights. Fetch it again")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, and nothing in it was run: expected tensors only, found damage or a pickle that may run "
            "code. Fetch the file again from a source that you trust"
        ) from error
    except Exception as error:  # torch raises whatever the damaged bytes lead it to
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{path}: truncated, damaged or unreadable ({type(error).__name__}: {reason}); expected a "
            f"{path.suffix or '.pt'} file of weights. Fetch it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(
            f"{path}: holds something else than tensors by name; expected a layer file of a checkpoint"
        )
    return {str(key): tensor.detach() for key, tensor in tensors.items()}


def check_tensors(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the tensors of `path` have exactly these keys and shapes and are weights in fp16,
    bf16 or fp32."""
    for key in [*shapes, *tensors]:
        if key not in tensors:
            raise CheckpointError(f"{path}: lacks {key}; found {', '.join(sorted(tensors)) or 'nothing'}")
        if key not in shapes:
            raise CheckpointError(f"{path}: unexpected {key}; expected {', '.join(sorted(shapes))}")
        tensor = tensors[key]
        if tensor.dtype not in WEIGHT_DTYPES.values() or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{path}: {key} is {tensor.dtype} ({tensor.layout}, {tensor.device.type}); expected a plain tensor in "
                "float16, bfloat16 or float32"
            )
        if tuple(tensor.shape) != tuple(shapes[key]):
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensor.shape)}, expected {list(shapes[key])} from the config and the "
                "number of ranks; file and config belong to different models, or a rank's files are missing"
            )


def reading_bar(nbytes: int) -> tqdm:
    """A progress bar for reading so many bytes of weights; shown when it takes longer than two seconds."""
    quick = nbytes < 100e6  # a bar would come up on a busy machine only, and stay in a notebook's stored output
    options = {"unit": "B", "unit_scale": True, "desc": "Reading weights", "delay": 2, "leave": False}
    return tqdm(total=nbytes, disable=quick, **options)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds `folder`, or would hold it once made."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def check_free_disk(folder: Path, needed: int) -> None:
    """Raise CheckpointError, before anything is written, when `needed` bytes don't fit on the disk of `folder`."""
    free = free_bytes(folder)
    if needed > free:
        raise CheckpointError(
            f"{folder}: the files need {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room or "
            "give a folder on another disk"
        )


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as a .pt file, whole or not at all. Raises CheckpointError when the disk refuses.

    Each tensor is copied first: torch.save would write all of the storage that a slice points into.
    """
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    try:
        write_atomically(path, lambda temporary: torch.save(copies, temporary))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{path}: could not be written ({reason}); check the folder and its free space"
        ) from error

"""Weight files, opened without trusting them, and disk space for new ones."""

import codecs
import json
import pickle
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from neox_lib.checkpoints.atomic import write_atomically

SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "tiny"  # the folder of the model that comes with the package
# The dtypes of stored weights, by their names in commands and in a config.json.
WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the first bytes of one
# Endings of what old files hold beside the parameters: the causal mask, its fill value, the rotary frequencies.
BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
# What a NumPy array is pickled with: DeepSpeed's files hold the state of NumPy's random generator.
NUMPY_ARRAYS: list[Any] = [
    (np.array(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
]
NUMPY_ARRAYS += [np.ndarray, np.dtype, type(np.dtype(np.uint32)), codecs.encode]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, what was expected, and what to do."""


def check_no_pointer(path: Path) -> None:
    """Raise CheckpointError for a Git LFS pointer, which stands in for a large file that wasn't fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{path}: a Git LFS pointer, three lines in place of the file itself; run `git lfs pull` in its folder "
                "or download the file"
            )


def read_object(path: Path) -> dict[str, Any]:
    """The object that a small JSON file holds. Raises CheckpointError, naming the file, for anything else."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("a folder or a device")
        check_no_pointer(path)
        fields = json.loads(path.read_text("utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object, found {type(fields).__name__}")
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; fetch it again") from None
    except (ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: can't be read ({reason}); expected JSON. Fetch it again") from error
    return fields


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a small JSON file, none where there is no such file. Raises CheckpointError for anything else."""
    return read_object(path) if path.exists() else {}


def unwrapped(key: str, first_words: Collection[str]) -> str:
    """A tensor's key without the prefix of a wrapper that the model was saved in, such as DDP, torch.compile, FSDP or a
    trainer; `first_words` are those that a key may begin with.

    >>> unwrapped("module._orig_mod.layers.0._fsdp_wrapped_module.mlp.bias", ("layers", "norm"))
    'layers.0.mlp.bias'
    """
    words = [word for word in key.split(".") if not word.startswith("_")]
    start = next((place for place, word in enumerate(words) if word in first_words), None)
    return key if start is None else ".".join(words[start:])


Value = TypeVar("Value")


def unwrap_keys(path: Path, values: Mapping[str, Value], first_words: Collection[str]) -> dict[str, Value]:
    """The values by their `unwrapped` keys. Raises CheckpointError when two keys become one: there are two models."""
    keys: dict[str, str] = {}
    for key in values:
        other = keys.setdefault(unwrapped(key, first_words), key)
        if other != key:
            raise CheckpointError(f"{path}: {other} and {key} name the same parameter; keep the tensors of one model")
    return {name: values[key] for name, key in keys.items()}


def is_zip(path: Path) -> bool:
    """Whether a .pt file is in torch's zip format (since torch 1.6), the one that can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a .pt file, on the CPU, running nothing that the file may contain.

    DeepSpeed's files hold them under `module`, beside the state of a training run. A file in the zip format is
    memory-mapped: a tensor's bytes are read from the disk when they are used and belong to the page cache, not to this
    process. Raises CheckpointError, naming the file, for anything but such tensors.
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
        check_no_pointer(path)
        with torch.serialization.safe_globals(NUMPY_ARRAYS):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if objects := re.search(r"GLOBAL (deepspeed\.\S+)", str(error)):
            raise CheckpointError(
                f"{path}: expected tensors only, and opening its {objects[1]} runs code; if you trust it, load it "
                "where DeepSpeed is installed, with torch.load(weights_only=False), and save its `module` alone"
            ) from error
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
    if isinstance(tensors, dict) and isinstance(tensors.get("module", 0), dict | None):
        tensors = tensors["module"]
        if not tensors:
            raise CheckpointError(
                f"{path}: holds no weights, expected some under `module`; those of a model that was trained in a "
                "pipeline are in files like layer_00-model_00-model_states.pt, which belong beside it"
            )
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(
            f"{path}: holds something other than tensors by name; expected a layer file of a checkpoint"
        )
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            raise CheckpointError(f"{path}: {key} is {layout} on {tensor.device.type}; expected plain numbers")
    # not tensor.detach(): a file can give its tensors attributes of that name
    return {str(key): Tensor.detach(tensor) for key, tensor in tensors.items()}


def check_tensors(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the tensors of `path` have exactly these keys and shapes and are weights in fp16,
    bf16 or fp32."""
    for key in [*shapes, *tensors]:
        if key not in tensors:
            raise CheckpointError(f"{path}: lacks {key}; found {', '.join(sorted(tensors)) or 'nothing'}")
        if key not in shapes:
            raise CheckpointError(f"{path}: unexpected {key}; expected {', '.join(sorted(shapes))}")
        tensor = tensors[key]
        if tensor.dtype not in WEIGHT_DTYPES.values():
            raise CheckpointError(f"{path}: {key} is {tensor.dtype}; expected float16, bfloat16 or float32")
        if tuple(tensor.shape) != tuple(shapes[key]):
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensor.shape)}, expected {list(shapes[key])} from the config and the "
                "number of ranks; file and config belong to different models, or a rank's files are missing"
            )


def reading_bar(nbytes: int) -> tqdm:
    """A progress bar for reading `nbytes` of weights, shown after two seconds."""
    quick = nbytes < 100e6  # a bar would appear only on a busy machine, and stay in a notebook's stored output
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
    """Write named tensors as a .pt file, whole or not at all. Raises CheckpointError when it can't be written.

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

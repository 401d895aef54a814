"""Converts a model's files: slim to Hugging Face and back, to another number of ranks, to GGUF, int8 and int4."""

from pathlib import Path

import torch

from neox_lib.checkpoints.checkpoint import Checkpoint, check_convertible
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.gguf.writer import write_gguf
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import write_quantized
from neox_lib.checkpoints.saving import whole_or_gone
from neox_lib.checkpoints.slim.writer import check_ranks, write_tensors
from neox_lib.checkpoints.tokenizer_files import tokenizer_beside, write_beside


def open_source(source: str | Path, target: str | Path) -> tuple[Checkpoint, Path | None]:
    """The checkpoint to read and its tokenizer's file, if it has one. Raises CheckpointError when both are the same
    place, for quantized weights, and as `open_checkpoint` does.
    """
    if Path(source).resolve() == Path(target).resolve():
        kind = "file" if Path(source).is_file() else "folder"
        raise CheckpointError(f"{target}: is the {kind} to read from; give another one to write to")
    checkpoint = open_checkpoint(source)
    check_convertible(checkpoint)
    return checkpoint, tokenizer_beside(Path(source))


def convert_to_slim(source: str | Path, target: str | Path, ranks: int) -> None:
    """Write any checkpoint to the folder `target` in the slim layout, for `ranks` tensor-parallel ranks.

    The model stays exactly the same. Holds one layer at a time. Raises CheckpointError for a source that can't be used,
    ranks that don't divide the model, a target that already holds one, and a disk without room; whatever interrupts it,
    the target is left as it was.
    """
    target = Path(target)
    checkpoint, tokenizer = open_source(source, target)
    check_ranks(checkpoint.config, ranks)
    with whole_or_gone(target, checkpoint.nbytes):
        write_tensors(target, checkpoint.config, checkpoint.tensors(), ranks, spread_seed=None)
        write_beside(target, checkpoint.config, tokenizer, checkpoint.folder)


def convert_to_huggingface(source: str | Path, target: str | Path) -> None:
    """Write any checkpoint to the folder `target` as `transformers` has it: see `write_huggingface`.

    Holds one tensor at a time, of a slim source one layer's mapped files. Raises CheckpointError as that does.
    """
    checkpoint, tokenizer = open_source(source, target)
    write_huggingface(checkpoint, target, tokenizer)


def convert_to_quantized(source: str | Path, target: str | Path, dtype: torch.dtype = torch.int8) -> Path:
    """Quantize any checkpoint into `target`, a folder or a NAME.int8.safetensors, and return the file
    (`write_quantized`).

    The tokenizer goes beside it, where the source has one. Holds one tensor at a time. Raises CheckpointError as that
    does.
    """
    checkpoint, tokenizer = open_source(source, target)
    return write_quantized(checkpoint, target, tokenizer, dtype=dtype)


def convert_to_gguf(source: str | Path, target: str | Path, dtype: str | None = None) -> Path:
    """Write any checkpoint and its tokenizer as one GGUF file, NAME.gguf or in the folder `target`, and return the file
    (`write_gguf`). Holds one tensor at a time. Raises CheckpointError as that does.
    """
    checkpoint, tokenizer = open_source(source, target)
    return write_gguf(checkpoint, target, tokenizer, dtype)

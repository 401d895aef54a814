"""Saving a model into a folder: never over another, never looking complete before it is, and removed if it fails."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.checkpoints.files import CheckpointError, check_free_disk
from neox_lib.checkpoints.slim.layout import LAYER_FILE, UNFINISHED
from neox_lib.checkpoints.tokenizer_files import GENERATION, TOKENIZER_FILES

# The files that make a folder a model's: slim layer files, Hugging Face's, and the config that both have.
MODEL_FILE = re.compile(
    rf"{LAYER_FILE.pattern}|config\.json|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
BESIDE = (*TOKENIZER_FILES, GENERATION)


def begin_save(folder: Path, needed: int, beside: tuple[str, ...] = ()) -> None:
    """Mark `folder` as unfinished and clear what an earlier interrupted save left there.

    Raises CheckpointError when it already holds a model or one of the files `beside` it, when the disk lacks the
    `needed` bytes, and when nothing can be written there.
    """
    check_free_disk(folder, needed + needed // 100 + 1_000_000)
    there = [path for path in folder.iterdir() if MODEL_FILE.fullmatch(path.name)] if folder.is_dir() else []
    if not (folder / UNFINISHED).exists():
        taken = ["a model"] if there else [name for name in beside if (folder / name).exists()]
        if taken:
            raise CheckpointError(f"{folder}: already holds {taken[0]}; give another folder, or remove old files first")
    try:
        write_text_atomically(folder / UNFINISHED, "A save into this folder was interrupted or is still running.\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror}); give another folder") from error
    for path in [*there, *(path for path in folder.iterdir() if path.suffix == ".partial")]:
        path.unlink()


def finish_save(folder: Path) -> None:
    """Remove the mark: the folder is a checkpoint now."""
    (folder / UNFINISHED).unlink()


@contextlib.contextmanager
def whole_or_gone(folder: Path, needed: int) -> Iterator[None]:
    """A save into `folder` that completes or, whatever interrupts it, leaves the folder as it was.

    Raises CheckpointError as `begin_save` does, also for a tokenizer in the way. A killed process leaves the mark, and
    the folder is refused.
    """
    new, begun = not folder.exists(), False
    try:
        begin_save(folder, needed, BESIDE)
        begun = True
        yield
        finish_save(folder)
    except BaseException:
        for path in list(folder.iterdir()) if begun else []:
            if MODEL_FILE.fullmatch(path.name) or path.name in (*BESIDE, UNFINISHED):
                path.unlink()
        if new:
            with contextlib.suppress(OSError):  # it was never made, or holds a file of somebody's own
                folder.rmdir()
        raise

"""Saving a model into a folder: never over another one, never looking whole before it is, and gone when it failed."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from neox_lib.files import CheckpointError, check_free_disk, write_text_atomically
from neox_lib.layout import LAYER_FILE, UNFINISHED

# The files that make a folder a model's: slim layer files, Hugging Face's, and the config that both have.
MODEL_FILE = re.compile(
    rf"{LAYER_FILE.pattern}|config\.json|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def begin_save(folder: Path, needed: int) -> None:
    """Mark `folder` as unfinished and clear what an earlier interrupted save left there.

    Raises CheckpointError when it already holds a model, when the disk lacks the `needed` bytes, and when nothing can
    be written there.
    """
    check_free_disk(folder, needed + needed // 100 + 1_000_000)
    there = [path for path in folder.iterdir() if MODEL_FILE.fullmatch(path.name)] if folder.is_dir() else []
    if there and not (folder / UNFINISHED).exists():
        raise CheckpointError(f"{folder}: already holds a model; give another folder, or remove the old files first")
    try:
        write_text_atomically(folder / UNFINISHED, "A save into this folder was interrupted or still runs.\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror}); give another folder") from error
    for path in [*there, *folder.glob("*.partial"), *folder.glob(".*.partial")]:
        path.unlink(missing_ok=True)


def finish_save(folder: Path) -> None:
    """Take the mark away: the folder is a checkpoint now."""
    (folder / UNFINISHED).unlink()


@contextlib.contextmanager
def whole_or_gone(folder: Path, needed: int) -> Iterator[None]:
    """A save into `folder` that ends whole, or, whatever interrupts it, with the folder as it was found.

    Raises CheckpointError as `begin_save` does. A process that is killed leaves the mark, and the folder is refused.
    """
    new = not folder.exists()
    kept = {name for name in BESIDE if (folder / name).exists()}
    begin_save(folder, needed)
    try:
        yield
        finish_save(folder)
    except BaseException:
        for path in list(folder.iterdir()):
            if MODEL_FILE.fullmatch(path.name) or (path.name in (*BESIDE, UNFINISHED) and path.name not in kept):
                path.unlink()
        if new:
            with contextlib.suppress(OSError):  # somebody put a file of their own there meanwhile
                folder.rmdir()
        raise

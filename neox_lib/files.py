"""Files that hold weights: opening them without trust, writing them without ever leaving half a file."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, what was expected, and what to do."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary)` make the file, then move it to `path` in one step.

    Whatever interrupts it, `path` holds the old content or the new, never a part. The data is flushed to disk before
    the move. Raises what `write` raises, after removing the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text_atomically(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))

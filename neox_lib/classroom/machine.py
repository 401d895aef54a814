"""What Python alone can tell about a student's machine: its version, memory, disk, a port.

Importing this needs only the standard library: it must run where everything else is broken.
"""

import contextlib
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neox_lib.memory import available_memory

REPOSITORY = Path(__file__).resolve().parents[2]
SET_UP = (
    "set the environment up again: make clean, then make lab "
    '(without make: see "Without make" in notebooks/guides/install.md)'
)
NOTHING_INSTALLED = (
    "in the folder of the repository: make lab, which installs everything and opens the notebooks "
    '(without make: see "Without make" in notebooks/guides/install.md)'
)
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was checked, what was found, and what to do about it.

    `state` is "ok", "note" (works, with a limit), "slow" (gave no answer in time, and may well work) or "fix".
    """

    what: str
    state: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:5}{self.what:10} {self.found}" + (f"\n{'':16}-> {self.advice}" if self.advice else "")


def look_at_python(
    version: tuple[int, ...] = sys.version_info[:3], bits: int = sys.maxsize.bit_length() + 1
) -> Finding:
    found = f"Python {'.'.join(map(str, version))}, {bits} bits, {platform.system()} on {platform.machine()}"
    if not (3, 11) <= tuple(version[:2]) <= (3, 14) or bits != 64:
        return Finding("Python", "fix", found, "install Python 3.11 to 3.14, 64 bits, and " + SET_UP)
    return Finding("Python", "ok", found)


def look_at_memory(free: int | None = None) -> Finding:
    """A notebook with its kernel and browser page takes about 1 GiB."""
    if free is None:
        with contextlib.suppress(Exception):
            free = available_memory()
    if free is None:
        return Finding("memory", "note", "unknown", "psutil is missing; " + SET_UP)
    found = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        return Finding(
            "memory", "fix", found + ", a notebook needs about 1", "close other programs, browser tabs first"
        )
    if free < 2 * GIB:
        return Finding("memory", "note", found, "enough for one notebook: shut one down before you open the next")
    return Finding("memory", "ok", found)


def look_at_disk(folder: Path = REPOSITORY, free: int | None = None) -> Finding:
    free = shutil.disk_usage(folder).free if free is None else free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "put the repository into a folder of your own, such as your home"
        return Finding("disk", "fix", f"{folder} can't be written to ({error.strerror})", advice)
    if free < GIB // 2:
        return Finding("disk", "fix", found + ", half a GiB is needed", "delete or move files")
    return Finding("disk", "ok" if free >= 2 * GIB else "note", found)


def look_at_port(taken: Callable[[int], bool] | None = None) -> Finding:
    """JupyterLab takes the first free port from 8888 on, on this machine's own address."""
    taken = port_is_taken if taken is None else taken
    free = next((port for port in range(8888, 8938) if not taken(port)), None)
    if free is None:
        advice = "allow Python to listen on 127.0.0.1 in your firewall or security program, or restart the machine"
        return Finding("port", "fix", "no port from 8888 to 8937 is free on 127.0.0.1", advice)
    return Finding("port", "ok", f"127.0.0.1:{free} is free")


def port_is_taken(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False

"""A kernel for one student's code: nbclient starts it, runs cells in it and sees it die; the limits are ours.

What nbclient lacks, as measured: it keeps everything that a kernel prints (an endless `print` took 600 MiB of this
process in 15 s), has no limit on memory, leaves a dead kernel's children alive, and is the kernel's parent, so
`os.kill(os.getppid(), 9)` in a notebook ends the report.
"""

import contextlib
import inspect
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from neox_lib.classroom import in_kernel

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = """
import os, subprocess, sys
own = {key: value for key, value in os.environ.items() if not key.startswith(("JPY_", "IPY_"))}
own |= {"JPY_PARENT_PID": str(os.getpid())} if os.name == "posix" else {}
code = subprocess.call([sys.executable, "-P", "-m", "ipykernel_launcher", *sys.argv[1:]], env=own)
sys.exit(code if code >= 0 else 128 - code)
"""
QUIET = logging.getLogger("neox_lib.classroom.nbclient")
QUIET.disabled = True  # the report says it instead


@dataclass(frozen=True)
class Limits:
    """Limits of one exercise: wall seconds, bytes of memory beyond the library's own, bytes printed in total."""

    seconds: float = 60
    memory: int = 2 * 2**30
    output: int = 16 * 2**20
    start: float = 120  # seconds until a kernel has imported torch, on a slow machine


class Gone(Exception):
    """The kernel can't be used any more. `outcome`: a state, and words about the current exercise."""

    def __init__(self, state: str, words: str):
        super().__init__(state, words)
        self.outcome = state, words


class Manager(AsyncKernelManager):
    """Starts kernels in this environment, with a process between them and this one."""

    @property
    def kernel_spec(self) -> KernelSpec:
        arguments = ["-f", "{connection_file}", "--InteractiveShellApp.ignore_cwd=True"]  # ignores a student's torch.py
        return KernelSpec(argv=[sys.executable, "-c", LAUNCHER, *arguments], language="python")


class Kernel(NotebookClient):
    """A running kernel, made by `started`. Raises Gone when it ends."""

    def __init__(self, limits: Limits):
        super().__init__(
            new_notebook(),
            kernel_manager_class=Manager,
            allow_errors=True,
            record_timing=False,
            shutdown_kernel="immediate",
            startup_timeout=limits.start,
            timeout_func=lambda cell: max(0.1, self.deadline - time.monotonic()),
            log=QUIET,
        )
        self.limits, self.printed, self.done = limits, 0, threading.Event()
        self.deadline = time.monotonic() + limits.start
        self.why = ""  # words, if we ended it

    @property
    def launched(self) -> LocalProvisioner:
        assert self.km is not None and isinstance(self.km.provisioner, LocalProvisioner)
        return self.km.provisioner

    def run(self, source: str) -> NotebookNode:
        """Run a cell; an error in it is among its outputs."""
        cell = new_code_cell(source)
        self.nb.cells = [cell]
        with contextlib.suppress(DeadKernelError):
            try:
                self.execute_cell(cell, 0)
            except CellTimeoutError:
                raise Gone("stopped", f"takes longer than {self.limits.seconds:g} s: an endless loop?") from None
        code = run_sync(self.launched.poll)()
        if self.why:
            raise Gone("stopped", self.why)
        if code is not None:
            raise Gone("crashed", how_it_died(code))
        return cell

    def ours(self, call: str) -> dict[str, Any]:
        """The result of a call of a function of `in_kernel`, or {"error": words}; `names` in it are the student's."""
        token = secrets.token_hex(16)
        text = f"{inspect.getsource(in_kernel)}\nsay({token!r}, {call})"
        cell = self.run(f"exec({text!r}, {{'__name__': 'ours', 'names': globals()}})")
        for output in cell.outputs:
            found = output.get("data", {}).get(in_kernel.MIME)
            if isinstance(found, dict) and found.get("token") == token:
                self.printed -= len(str(found))
                return found
        return {"error": error_in(cell) or "the check was not reached"}

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """As nbclient's, but ends a kernel that prints too much, and drops the rest."""
        self.printed += len(str(msg["content"])) if msg["msg_type"] != "execute_input" else 0
        if self.printed > self.limits.output and msg["msg_type"] != "status":
            self.end(f"prints more than {self.limits.output >> 20} MiB")
            return None
        return super().process_message(msg, cell, cell_index)

    def watch_memory(self) -> None:
        """For systems that don't enforce the limit themselves, and for a kernel's children."""
        most = self.limits.memory + 2**30  # the library's own
        while not self.done.wait(0.2):
            with contextlib.suppress(psutil.Error):
                if sum(each.memory_info().rss for each in self.processes()) > most:
                    self.end(f"takes more than {self.limits.memory / 2**30:.1f} GiB of memory")

    def processes(self) -> list[psutil.Process]:
        """The launcher, the kernel, and the kernel's children."""
        launcher = psutil.Process(self.launched.pid)
        return [launcher, *launcher.children(recursive=True)]

    def end(self, why: str = "") -> None:
        """Kill the kernel and its children; nbclient sees it within a second."""
        self.why = self.why or why
        with contextlib.suppress(psutil.Error):
            for each in self.processes():
                with contextlib.suppress(psutil.Error):
                    each.kill()
        if hasattr(os, "killpg") and self.launched.pid:  # what outlived the launcher
            with contextlib.suppress(OSError):
                os.killpg(self.launched.pid, signal.SIGKILL)


@contextlib.contextmanager
def started(folder: Path, limits: Limits, **environment: str) -> Iterator[Kernel]:
    """A kernel that runs in `folder`; its process's own output goes to a file beside it.

    Raises RuntimeError when it can't be started.
    """
    kernel = Kernel(limits)
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HOME": str(folder.parent), **environment}
    with (
        (folder.parent / "output").open("wb") as output,
        kernel.setup_kernel(cwd=str(folder), env=os.environ | own, stdout=output, stderr=subprocess.STDOUT),
    ):
        threading.Thread(target=kernel.watch_memory, daemon=True).start()
        try:
            yield kernel
        finally:
            kernel.done.set()
            kernel.end()


def error_in(cell: NotebookNode) -> str:
    """The error that a cell ended with, in one line; empty where there is none."""
    for output in cell.outputs:
        if output.output_type == "error":
            return f"{output.ename}: {output.evalue}".splitlines()[0][: in_kernel.SHOWN]
    return ""


def how_it_died(code: int) -> str:
    """In words; `code` is negative if the launcher itself was killed."""
    with contextlib.suppress(ValueError):
        return f"its process died: {signal.Signals(-code if code < 0 else code - 128).name}"
    return f"ends its whole process (exit code {code})"

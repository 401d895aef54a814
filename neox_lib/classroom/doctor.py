"""A look at a student's machine before class: what works, and in plain words what to do about what does not.

Nothing here needs a network, and nothing outside Python's own library is imported at the top: this must start where
torch, or a piece of neox_lib, is broken. What may crash or hang is tried in a process of its own.
"""

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SET_UP = "set the environment up again: make clean, then make lab (without make: the README, Set-up)"
SECONDS = 16  # for what is tried in a process; the whole examination stays under 20
TOO_LONG = 124  # the exit code of a process that took longer
SLOW_SPEED = 40  # tokens a second
GIB = 2**30
WIDGETS = ("ipywidgets", "anywidget", "ipykernel", "jupyterlab", "matplotlib", "nbformat", "nbconvert")
LIBRARIES = ("numpy", "tokenizers", "safetensors", "regex", "yaml", "tqdm", "psutil")
FOUND = ("torch", "transformers", "huggingface_hub")  # slow to import: only looked for; torch is tried with the model
SLOW = (
    "the machine is busy, or this was the first start, which reads hundreds of megabytes: close other programs and run "
    "the doctor once more"
)
TRY_MODEL = """
import json, time
import neox_lib
from neox_lib.generation import prompt_ids, stream_generate
tokenizer, model = neox_lib.create_tokenizer(), neox_lib.create_model(device="cpu", dtype="float32")
steps = list(stream_generate(model, prompt_ids(tokenizer, "Once upon a time"), 60, tokenizer=tokenizer))
seconds = sum(step.seconds for step in steps[1:])
text = "".join(step.text for step in steps)
print(json.dumps({"speed": (len(steps) - 1) / seconds, "text": text, "tokens": len(steps)}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: "ok", "note" (works, with a limit) or "fix", what was found, and what to do."""

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
    """A notebook with its kernel and a browser's page takes about 1 GiB."""
    free = available_memory() if free is None else free
    if free is None:
        return Finding("memory", "note", "can't be told", "psutil is missing; " + SET_UP)
    found = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        return Finding(
            "memory", "fix", found + ", a notebook needs about 1", "close other programs, browser tabs first"
        )
    if free < 2 * GIB:
        return Finding("memory", "note", found, "enough for one notebook: shut one down before you open the next")
    return Finding("memory", "ok", found)


def available_memory() -> int | None:
    with contextlib.suppress(Exception):
        import psutil

        return psutil.virtual_memory().available
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


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


def look_at_imports(what: str, names: tuple[str, ...]) -> Finding:
    """Whether packages can be imported, all in one process; one that crashes it is the one named last."""
    done = in_process(
        f"import importlib\nfor name in {names}:\n print(name, flush=True)\n importlib.import_module(name)\nprint('all')"
    )
    said = done.stdout.split()
    if said[-1:] == ["all"]:
        return Finding(what, "ok", ", ".join(names))
    found = f"{said[-1] if said else 'Python'} can't be imported: {last_line(done)}"
    return Finding(what, "fix", found, SLOW if done.returncode == TOO_LONG else SET_UP)


def look_at_packages() -> Finding:
    missing = [name for name in FOUND if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("packages", "fix", f"not installed: {', '.join(missing)}", SET_UP)
    return Finding("packages", "ok", ", ".join(FOUND))


def look_at_model() -> list[Finding]:
    """The shipped model loads and writes; a story is better proof than any version number."""
    done = in_process(TRY_MODEL)
    try:
        story = json.loads(done.stdout.strip().splitlines()[-1])
        speed, text = float(story["speed"]), " ".join(str(story["text"]).split())
    except (ValueError, IndexError, KeyError, TypeError):
        return [Finding("model", "fix", f"the shipped model does not write: {last_line(done)}", advice_on(done))]
    slow = speed < SLOW_SPEED
    advice = "lessons work, the longer cells take their time: plug the laptop in, close other programs" if slow else ""
    return [
        Finding("model", "ok", f"writes: Once upon a time{'' if text[:1] in ',.' else ' '}{text[:60]} ..."),
        Finding("speed", "note" if slow else "ok", f"{speed:.0f} tokens a second", advice),
    ]


def advice_on(done: subprocess.CompletedProcess) -> str:
    """What to do about a model that does not write: wait, set up again, or take a promoted piece back."""
    if done.returncode == TOO_LONG:
        return SLOW
    places = re.findall(r'File "([^"]+)", line', done.stderr)
    inside = bool(places) and "neox_lib" in Path(places[-1]).parts
    if inside and not re.match(r"ModuleNotFoundError: No module named '(?!neox_lib)", last_line(done)):
        piece = Path(places[-1]).name
        return f"{piece} is broken: git diff neox_lib shows what changed, git checkout neox_lib takes it back"
    return SET_UP


def in_process(code: str, seconds: float = SECONDS) -> subprocess.CompletedProcess:
    """Run Python code in the repository's folder; what takes too long comes back as an error in words."""
    command = [sys.executable, "-c", code]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        return subprocess.run(command, cwd=REPOSITORY, env=quiet, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode("utf-8", "replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return subprocess.CompletedProcess(command, TOO_LONG, said, f"not ready after {seconds:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def last_line(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        return f"the process crashed (signal {-done.returncode})"
    return (done.stderr.strip().splitlines() or ["no message"])[-1][:200]


def guarded(look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """The findings of one look; a look that fails itself is a finding too."""
    try:
        found = look()
    except Exception as error:
        found = Finding("doctor", "fix", f"{look.__name__} failed: {type(error).__name__}: {error}", SET_UP)
    return found if isinstance(found, list) else [found]


def look_at_widgets() -> Finding:
    return look_at_imports("widgets", WIDGETS)


def look_at_libraries() -> Finding:
    return look_at_imports("libraries", LIBRARIES)


QUICK = (look_at_python, look_at_memory, look_at_disk, look_at_port, look_at_packages)
IN_PROCESSES = (look_at_model, look_at_libraries, look_at_widgets)


def examine() -> list[Finding]:
    """All findings, in the order in which a person would fix them. Takes under 20 seconds."""
    with ThreadPoolExecutor(len(IN_PROCESSES)) as pool:
        waiting = [pool.submit(guarded, look) for look in IN_PROCESSES]
        quick = [finding for look in QUICK for finding in guarded(look)]
        return quick + [finding for each in waiting for finding in each.result()]


def report(findings: list[Finding], seconds: float) -> str:
    """The findings as a text, and a last line that says whether this machine is ready."""
    to_fix = sum(finding.state == "fix" for finding in findings)
    verdict = f"{to_fix} to fix, then run this again." if to_fix else "Ready for class."
    return "\n".join([*map(str, findings), "", f"{verdict} ({seconds:.0f} s)"])


def examine_and_report() -> tuple[str, bool]:
    """The text, and whether something must be fixed."""
    started = time.monotonic()
    findings = examine()
    return report(findings, time.monotonic() - started), any(finding.state == "fix" for finding in findings)

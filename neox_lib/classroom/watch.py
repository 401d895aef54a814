"""A process for what each student has handed in, watched from outside: time, memory, and how it ended."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from neox_lib.classroom.handed_in import Student

REPOSITORY = Path(__file__).resolve().parents[2]
# A grammar of web addresses, which jsonschema makes at import if it can, takes half of the start and is of no use here.
CHILD = "import sys; sys.modules['rfc3987_syntax'] = None; from neox_lib.classroom import run_checks; run_checks.main()"
PRINTED = 2**20  # bytes of output that are worth a remark
Outcome = tuple[str, str]  # a state, such as "solved", and words


@dataclass(frozen=True)
class Limits:
    """What one exercise may take: wall seconds, and bytes of memory beyond the library's own."""

    seconds: float = 60
    memory: int = 2 * 2**30
    start: float = 120  # seconds until the process has imported torch, on a slow machine


@dataclass(frozen=True)
class Task:
    """One notebook to check: which of the series it is, its file among the student's, the exercises in it."""

    stem: str
    file: str
    names: tuple[str, ...]


@dataclass
class Verdict:
    """What came of a student's work: (notebook, exercise) -> outcome; and what was odd about it."""

    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def judge(student: Student, tasks: list[Task], originals: Path, limits: Limits) -> Verdict:
    """Check a student's notebooks in a copy; a process that dies or hangs is followed by one for the rest.

    Raises RuntimeError when the library itself can't be started, with its last line: no student is to blame for that.
    """
    verdict, asked = Verdict(), [(task.stem, name) for task in tasks for name in task.names]
    while left := [each for each in asked if each not in verdict.outcomes]:
        with tempfile.TemporaryDirectory(prefix="handed-in-", ignore_cleanup_errors=True) as scratch:
            folder = Path(scratch, "work")
            for name, content in student.files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            open_tasks = [(t.stem, t.file, [n for n in t.names if (t.stem, n) in left]) for t in tasks]
            found, ending = watched(Path(scratch), open_tasks, originals, limits)
            done = {key: outcome for key, outcome in found.items() if outcome[0] != "started" and key in left}
            under_way = next((key for key in found if key not in done and key in left), None)
            verdict.outcomes |= done
            if under_way is not None:
                verdict.outcomes[under_way] = ending
            elif not done:
                last = Path(scratch, "output").read_text("utf-8", "replace").strip().splitlines()[-1:]
                raise RuntimeError(f"the checks can't be started: {' '.join(last) or ending[1]}")
            gone = [name for name in sorted(student.files) if not (folder / name).is_file()]
            if gone:
                verdict.remarks.append(f"deletes files in its folder, here a copy: {', '.join(gone[:3])}")
            if Path(scratch, "output").stat().st_size > PRINTED:
                verdict.remarks.append("prints more than 1 MiB")
    return verdict


def watched(
    scratch: Path, tasks: list, originals: Path, limits: Limits
) -> tuple[dict[tuple[str, str], Outcome], Outcome]:
    """Run a process to its end or to a limit: what it said, and what to say of the exercise that it was at."""
    results, token, folder = scratch / "results", secrets.token_hex(16), str(scratch / "work")
    own = {"NEOX_PROGRESS": str(scratch / "progress.json"), "MPLBACKEND": "Agg", "HOME": str(scratch)}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    job = {"folder": folder, "tasks": tasks, "originals": str(originals.resolve()), "results": str(results)}
    job |= {"token": token, "memory": limits.memory}
    with open(scratch / "output", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD],
            cwd=folder,
            env=os.environ | own | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it has started can be ended with it
        )
    lines, since = 0, time.monotonic()
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a process that is gone already: the loop below says so
        process.stdin.write(json.dumps(job).encode("utf-8"))
        process.stdin.close()
    try:
        while process.poll() is None:
            found, heard = said(results, token)
            if heard != lines:
                lines, since = heard, time.monotonic()
            if time.monotonic() - since > (limits.seconds if lines else limits.start):
                return found, ("stopped", f"takes longer than {limits.seconds:g} s: an endless loop?")
            if memory_of(process.pid) > limits.memory + 2**30:
                return found, ("stopped", f"takes more than {limits.memory / 2**30:.1f} GiB of memory")
            time.sleep(0.05)
        return said(results, token)[0], ("crashed", how_it_died(process.returncode))
    finally:
        end(process)


def said(results: Path, token: str) -> tuple[dict[tuple[str, str], Outcome], int]:
    """What a process has said so far, and in how many lines."""
    found: dict[tuple[str, str], Outcome] = {}
    lines = 0
    with contextlib.suppress(OSError):
        for line in results.read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(
                ValueError, KeyError, TypeError, RecursionError
            ):  # not the judge's, or half written
                each = json.loads(line)
                if each["token"] == token:
                    found[each["notebook"], each["exercise"]] = (each["state"], each["words"])
                    lines += 1
    return found, lines


def how_it_died(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its process died: {signal.Signals(-code).name}"
    return f"ends its whole process (exit code {code})"


def memory_of(pid: int) -> int:
    """Resident bytes of a process and of what it has started; 0 when it is gone."""
    try:
        process = psutil.Process(pid)
        return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0


def end(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started."""
    with contextlib.suppress(psutil.Error):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                each.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()

"""The checks of one student's notebooks, run in a process of their own: this is the child's side.

It is no sandbox: what a student wrote runs with the rights of whoever runs the report. It guards against accident and
mischief, not against malice: time, memory and output are bounded by the parent and by the system, the work is a copy,
only lines with the parent's token count as results, and a piece that changes the checks is named.
"""

import ast
import contextlib
import importlib
import json
import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import psutil
import torch

from neox_lib import loading
from neox_lib.classroom.asked import Exercise, exercises_of, needed, place_of, sources
from neox_lib.course import checks, predictions
from neox_lib.course.figures import plots

JUDGES = (checks, plots, predictions, loading)  # imported before anybody's code runs
OUTPUT = 16 * 2**20  # bytes that a process may write into one file, and so print
SHOWN = 300  # characters of a message


@dataclass(frozen=True)
class Job:
    """What the parent asks for: the copy to work in, the notebooks as (stem, file, names of exercises), their
    originals, where results go, the token that makes them count, and the bytes of memory beyond those at the start."""

    folder: str
    tasks: list[tuple[str, str, list[str]]]
    originals: str
    results: str
    token: str
    memory: int


def run(job: Job) -> None:
    """Check the exercises of a job one after the other, and write a line of JSON before and after each."""
    work = []  # everything is read before anybody's code can delete it
    for stem, file, names in job.tasks:
        original = json.loads(Path(job.originals, f"{stem}.ipynb").read_text("utf-8"))
        exercises = [each for each in exercises_of(original) if each.name in names]
        checked = [importlib.import_module(f"neox_lib.course.exercises.{each.module}") for each in exercises]
        try:
            texts, unreadable = sources(json.loads(Path(job.folder, file).read_text("utf-8"))), ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            texts, unreadable = [], f"{file} is no notebook that can be read ({type(error).__name__})"
        for exercise, module in zip(exercises, checked, strict=True):
            work.append((stem, exercise, getattr(module, exercise.check), texts, unreadable, sources(original)))
    bound(job)
    before = state_of_judges()
    for stem, exercise, check, texts, unreadable, originals in work:
        say(job, stem, exercise.name, "started", "")
        found = ("unreadable", unreadable) if unreadable else outcome(exercise, check, texts, originals)
        after = state_of_judges()
        changed = next((name for name in before if after.get(name) != before[name]), None)
        if changed is not None:
            say(job, stem, exercise.name, "tampered", f"changes {changed} while it is checked")
            return  # what this process says from here on is worth nothing: the parent starts another
        say(job, stem, exercise.name, *found)


def bound(job: Job) -> None:
    """The system's own bounds, where it has them; modules in the student's folder can be imported, last of all."""
    sys.path.append(job.folder)
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        memory = psutil.Process().memory_info().vms + job.memory
        for kind, limit in (("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", OUTPUT), ("RLIMIT_AS", memory)):
            resource.setrlimit(getattr(resource, kind), (limit, limit))


def say(job: Job, stem: str, name: str, state: str, words: str) -> None:
    line = {"token": job.token, "notebook": stem, "exercise": name, "state": state, "words": words}
    with open(job.results, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def outcome(exercise: Exercise, check, texts: list[str], originals: list[str]) -> tuple[str, str]:
    """State and words: "solved", "not yet" with the first wrong property, "not written", "missing" or "error"."""
    cell = place_of(exercise.name, texts, exercise.stub)
    if cell is None:
        broken = [text for text in texts if f" {exercise.name}(" in text]
        words = syntax_error(broken[-1]) if broken else ""
        return ("error", words) if words else ("missing", f"nothing in the notebook defines {exercise.name}")
    names: dict = {"__name__": "handed_in"}
    try:
        given, own = needed(texts, cell, originals)
        for statements, cells in ((given, originals), (own, texts)):
            for each in statements:
                run_statements([each.node], cells[each.cell], f"cell-{each.cell + 1}", names)
    except BaseException as error:
        return "error", f"what stands around it can't be run: {in_words(error)}"
    trouble = ""
    try:
        run_statements(ast.parse(texts[cell]).body, texts[cell], f"cell-{cell + 1}", names)
    except BaseException as error:  # perhaps a try of the student's own, below a definition that is right
        trouble = in_words(error)
    if exercise.name not in names:
        return "error", trouble
    try:
        result = check(names[exercise.name])
    except BaseException as error:  # SystemExit, say: the check itself catches what is an Exception
        return "error", in_words(error)
    if result.passed:
        return "solved", f"its cell then fails: {trouble}" if trouble else ""
    first = result.message.strip().splitlines()[0]
    if first.startswith("Not written yet"):
        return "not written", ""
    return "not yet", first.removeprefix("Not yet. ")[:SHOWN]


def run_statements(body: list[ast.stmt], text: str, where: str, names: dict) -> None:
    """Execute them in `names`; an error's line is shown as the notebook has it, which `place_of_error` looks for."""
    filename = f"ipykernel/{where}"
    linecache.cache[filename] = (len(text), None, [line + "\n" for line in text.splitlines()], filename)
    exec(compile(ast.Module(body, []), filename, "exec"), names)


def syntax_error(text: str) -> str:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return in_words(error)
    return ""


def in_words(error: BaseException) -> str:
    try:
        words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    except Exception:  # an error of the student's own whose words can't be had
        words = type(error).__name__
    return words[:SHOWN]


def state_of_judges() -> dict[str, object]:
    """What must stay as it is while a piece is checked: functions, their code and methods, in the library and torch."""
    found: dict[str, object] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "neox_lib" or module_name in (
            "torch",
            "torch.nn.functional",
            "builtins",
            "json",
        ):
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType):
                    found[f"{module_name}.{name}"] = (id(value), value.__code__, value.__defaults__)
                elif isinstance(value, type):
                    found[f"{module_name}.{name}"] = id(value)
                    if module_name.startswith("neox_lib") or value is torch.Tensor:
                        own = {key: id(item) for key, item in vars(value).items() if callable(item)}
                        found |= {f"{module_name}.{name}.{key}": item for key, item in own.items()}
                elif callable(value):
                    found[f"{module_name}.{name}"] = id(value)
    return found


def main() -> None:
    """Read a job from standard input and run it."""
    run(Job(**json.loads(sys.stdin.read())))

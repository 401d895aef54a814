"""The report's own code in a student's kernel. Its text is sent with each of our cells, so changing this module changes
nothing, and its answer counts only with the token of that cell.

It is not a sandbox: students' code runs with the permissions of whoever runs the report. It guards against accident and
mischief, not against malice.
"""

import contextlib
import importlib
import sys
from types import FunctionType

MIME = "application/vnd.neox.check+json"
WRITTEN = 16 * 2**20  # bytes per file
SHOWN = 300  # characters of a message
BASE = ("torch", "torch.nn.functional", "builtins", "IPython.display")


def prepare(folder: str, memory: int, modules: list[str], names: dict) -> dict:
    """Import the checks before any student's code runs; limit memory and files where the system can."""
    import psutil
    import torch

    for module in ("loading", "course.predictions", *(f"course.exercises.{each}" for each in modules)):
        importlib.import_module(f"neox_lib.{module}")
    sys.path.append(folder)  # the student's modules are found last
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        bounds = {"CORE": 0, "FSIZE": WRITTEN, "AS": psutil.Process().memory_info().vms + memory}
        for kind, most in bounds.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    return {"judges": judges(), "names": list(names)}


def forget(names: dict, kept: list[str]) -> dict:
    """Delete what earlier answers defined."""
    for name in set(names) - set(kept):
        del names[name]
    return {}


def check(names: dict, name: str, module: str, function: str) -> dict:
    """Check the student's `name`: state, words, whether it is the library's own, and the judges before and after."""
    if name not in names:
        return {"state": "absent"}
    yours, before = names[name], judges()
    judge = getattr(sys.modules[f"neox_lib.course.exercises.{module}"], function)
    try:
        result = judge(yours)
        words = result.message.strip().splitlines()[0]
        state = "solved" if result.passed else "not written" if words.startswith("Not written yet") else "not yet"
        words = words.removeprefix("Not yet. ")[:SHOWN] if state == "not yet" else ""
    except BaseException as error:  # such as SystemExit: the judge itself catches every Exception
        state, words = "error", in_words(type(error).__name__, error)
    borrowed = str(getattr(yours, "__module__", "")).split(".")[0] == "neox_lib"
    after = judges()
    return {"state": state, "words": words, "borrowed": borrowed, "judges": [before, after][: 1 + (before != after)]}


def in_words(name: str, error: object) -> str:
    """An error in one line; only its name where the student's own class fails to give its message."""
    with contextlib.suppress(Exception):
        name = f"{name}: {error}".strip(": \n").splitlines()[0]
    return name[:SHOWN]


def judges() -> dict[str, int]:
    """What must not change while an answer is checked: functions, their code, methods; in the library and below it.

    Not counted: torch replaces some of its own functions on first use, and a kernel replaces `input` for each cell.
    """
    import torch

    home = torch.__file__.removesuffix("__init__.py")
    found: dict[str, int] = {}
    for module_name, module in list(sys.modules.items()):
        ours = module_name.split(".")[0] == "neox_lib"
        for name, value in list(vars(module).items()) if ours or module_name in BASE else ():
            key = f"{module_name}.{name}"
            torchs_own = isinstance(value, FunctionType) and value.__code__.co_filename.startswith(home)
            if callable(value) and key != "builtins.input":
                found[key] = 0 if torchs_own else mark(value)
                if isinstance(value, type) and (ours or value is torch.Tensor):
                    found |= {f"{key}.{each}": mark(item) for each, item in vars(value).items() if callable(item)}
    return found


def mark(value: object) -> int:
    """A number that changes with a callable, its code, or a function that it wraps."""
    parts = [id(value)]
    while isinstance(value, FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if isinstance(cell.cell_contents, FunctionType)]
        parts += [id(value.__code__), id(value.__defaults__), *map(id, inner)]
        value = vars(value).get("__wrapped__")
    return hash(tuple(parts))


def say(token: str, found: dict) -> None:
    """Show what was found to the reader of the cell's outputs."""
    from IPython.display import display

    display({MIME: found | {"token": token}}, raw=True)

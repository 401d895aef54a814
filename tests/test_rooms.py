"""The house: a room imports only from rooms above it, so that a reader can go through them from top to bottom."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import neox_lib
from neox_lib.course import promote

PACKAGE = Path(neox_lib.__file__).parent
MAP = (PACKAGE.parent / "CONTRIBUTING.md").read_text("utf-8")
# From the ground up, as CONTRIBUTING.md lists them: a module at the top, or a folder.
ROOMS = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", MAP, re.MULTILINE)


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, in functions too."""
    names, known = set(), modules()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "neox_lib":
            base = node.module.removeprefix("neox_lib").lstrip(".")
            wholes = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            names |= {whole if whole in known else base for whole in wholes}
        elif isinstance(node, ast.Import):
            names |= {each.name.removeprefix("neox_lib.") for each in node.names if each.name.startswith("neox_lib.")}
    return names - {""}


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_rooms_import_only_from_rooms_above_them_and_modules_in_no_loop():
    graph = {name: imported(path) for name, path in modules().items()}
    del graph["__init__"]  # the public face, which only hands names on
    assert {room_of(name) for name in graph} == set(ROOMS), "the table in CONTRIBUTING.md lists every room"
    below = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert below == []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other in a loop: {' <- '.join(error.args[1])}") from None


def test_a_taught_module_says_where_it_is_built_and_so_does_the_map():
    built: dict[str, set[str]] = {}
    for each in promote.collect(promote.NOTEBOOKS):
        built.setdefault(each.module, set()).add(each.notebook.name[:2])
    said = {
        name: re.search(r"^Built in notebook (\d\d)\.$", path.read_text("utf-8"), re.M)
        for name, path in modules().items()
    }
    assert {name: {found[1]} for name, found in said.items() if found} == built
    rows = dict(re.findall(r"^\| `(\w+)(?:\.py|/)` \|[^|]*\| *([\d, ]*?) *\|", MAP, re.MULTILINE))
    by_room: dict[str, set[str]] = {}
    for name, numbers in built.items():
        by_room.setdefault(room_of(name), set()).update(numbers)
    assert by_room == {room: set(numbers.split(", ")) for room, numbers in rows.items() if numbers}


def test_importing_the_library_imports_no_other_model_library():
    """`transformers` need not be installed to run a model, and takes seconds to import."""
    names = [f"neox_lib.{name.removesuffix('.__init__')}" for name in modules() if not name.startswith("__")]
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
        "print([name for name in ('transformers', 'ctranslate2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *sorted(names)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr

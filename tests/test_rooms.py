"""The house: a room imports only from rooms above it, so that a reader can go through them from top to bottom."""

import ast
from pathlib import Path

import neox_lib

PACKAGE = Path(neox_lib.__file__).parent
# From the ground up. A room is a module at the top or a folder; inside a folder modules may use each other, in no loop.
ROOMS = [
    "config",
    "tokenizer",
    "rotary",
    "attention",
    "block",
    "model",
    "cache",
    "sampling",
    "generation",
    "quantization",
    "checkpoints",
    "decoding",
    "hub",
    "precision",
    "loading",
    "distributed",
    "evaluation",
    "training",
    "inspection",
    "playground",
    "course",
    "classroom",
    "bench",
    "cli",
    "__main__",
]


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


def test_rooms_import_only_from_rooms_above_them():
    below = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name != "__init__"  # it names the public face, and imports each name when it is first used
        for other in imported(path)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert below == []
    assert {room_of(name) for name in modules()} - {"__init__"} == set(ROOMS)

"""What a notebook asks for, and which of its statements a student's answer needs to run."""

import ast
import re
import symtable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from neox_lib.course.imports import free_names, plain_python

EXERCISES = "neox_lib.course.exercises"
LONG = 60  # nodes of the syntax tree: shorter answers are alike by chance
FOLDED_SOLUTION = re.compile(r"\s*<details><summary>Solution</summary>.*?</details>", re.DOTALL)


@dataclass(frozen=True)
class Exercise:
    """One exercise: the name that the student defines, and the check, `check` in `neox_lib.course.exercises.module`."""

    name: str
    module: str
    check: str
    stub: str  # the cell's text as it was handed out
    reference: str  # the solution that the teacher's edition folds away


@dataclass(frozen=True)
class Statement:
    """One statement at the top level of a code cell: where it stands, and what it binds."""

    cell: int
    index: int
    node: ast.stmt
    binds: frozenset[str]

    @cached_property
    def needs(self) -> set[str]:
        return free_names(ast.unparse(self.node))


def sources(notebook: dict) -> list[str]:
    """The code cells' texts as Python; a cell that is not Python becomes an empty text."""
    texts = []
    for cell in notebook["cells"]:
        if cell.get("cell_type") == "code":
            source = cell.get("source", "")
            texts.append(plain_python(source if isinstance(source, str) else "".join(source)))
    return texts


def exercises_of(notebook: dict) -> list[Exercise]:
    """The exercises of an original notebook, in order: its cells tagged `exercise`, and the calls that check them.

    Raises ValueError for an exercise that no call checks.
    """
    nodes = [node for text in sources(notebook) for node in ast.walk(ast.parse(text))]
    modules = {}  # as the notebook calls them
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == EXERCISES:
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    checks = {}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
            owner, argument = node.func.value, node.args[0]
            if isinstance(owner, ast.Name) and isinstance(argument, ast.Name) and owner.id in modules:
                checks.setdefault(argument.id, (modules[owner.id], node.func.attr))
    return list(asked(notebook, checks, solutions_of(notebook)))


def solutions_of(notebook: dict) -> dict[str, str]:
    """The folded solutions of the teacher's edition: name of the last definition -> text."""
    prose = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    folds = "\n".join(FOLDED_SOLUTION.findall(prose))
    texts = re.findall(r"```python\n(.*?)```", folds, re.DOTALL)
    return {re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE)[-1]: text for text in texts}


def asked(notebook: dict, checks: dict[str, tuple[str, str]], solutions: dict[str, str]) -> Iterator[Exercise]:
    for cell in notebook["cells"]:
        if "exercise" in cell.get("metadata", {}).get("tags", []):
            text = plain_python("".join(cell["source"]))
            for node in ast.parse(text).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    if node.name not in checks:
                        raise ValueError(
                            f"no cell checks {node.name}: expected a call such as exercises.x({node.name})"
                        )
                    yield Exercise(node.name, *checks[node.name], text, solutions.get(node.name, ""))


def statements(texts: list[str]) -> list[Statement]:
    """Every statement of these cells, in order; a cell that is not Python has none."""
    found = []
    for cell, text in enumerate(texts):
        try:
            body = ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for index, node in enumerate(body):
            symbols = symtable.symtable(ast.unparse(node), "<cell>", "exec").get_symbols()
            bound = (symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported())
            found.append(Statement(cell, index, node, frozenset(bound)))
    return found


def place_of(name: str, texts: list[str], stub: str) -> int | None:
    """The cell that holds a student's answer: the last that defines the name and isn't the stub as handed out.

    Else the stub itself; None where nothing defines the name.
    """
    cells = [each.cell for each in statements(texts) if name in each.binds]
    own = [cell for cell in cells if texts[cell].strip() != stub.strip()]
    return own[-1] if own else cells[-1] if cells else None


def needed(texts: list[str], cell: int, originals: list[str]) -> tuple[list[Statement], list[Statement]]:
    """What has to run before a cell: statements of the original notebook, then of the student's own, each in order.

    A name means its last binding above the cell, else one below it, else the original notebook's.
    """
    own = [each for each in statements(texts) if each.cell != cell]
    given = statements(originals)
    chosen: dict[tuple[bool, int, int], Statement] = {}

    def bring(name: str, place: tuple[int, int], mine: bool) -> None:
        candidates = [each for each in (own if mine else given) if name in each.binds]
        above = [each for each in candidates if (each.cell, each.index) < place]
        if not candidates:
            if mine:
                bring(name, (len(originals), 0), False)
            return
        best = above[-1] if above else candidates[0]
        if (mine, best.cell, best.index) not in chosen:
            chosen[mine, best.cell, best.index] = best
            for each in best.needs:
                bring(each, (best.cell, best.index), mine)

    for name in free_names(texts[cell]):
        bring(name, (cell, 0), True)
    ordered = [chosen[key] for key in sorted(chosen)]
    return [each for each in ordered if each in given], [each for each in ordered if each not in given]


def without_comments(text: str, name: str) -> str | None:
    """The definition of a name, without comments, docstrings and layout; None where it is short or missing.

    >>> without_comments("def f(x): return x  # too short", "f")
    """
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            for each in ast.walk(node):
                if isinstance(each, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(each) is not None:
                    each.body = each.body[1:] or [ast.Pass()]
            return ast.unparse(node) if sum(1 for _ in ast.walk(node)) >= LONG else None
    return None

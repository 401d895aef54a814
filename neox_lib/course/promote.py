"""Promotion: a notebook and the library hold the same text of what the notebook builds.

A code cell tagged `promote`, with `"module": "rotary"` in its metadata, holds whole top-level definitions (functions,
classes, constants). Promoting writes each one over the library's definition of that name. Texts are compared, not
syntax trees, since comments teach too. Nothing here imports a piece, so promotion works even when one is broken.
"""

import ast
import difflib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat

from neox_lib.checkpoints.atomic import write_bytes_atomically
from neox_lib.course.imports import HERE, differing_names, free_names
from neox_lib.course.learner_copy import NOTEBOOKS, stale_copies
from neox_lib.course.moved import current, is_older_text, successor

LIBRARY = Path(__file__).resolve().parents[1]


class PromotionError(ValueError):
    """A notebook can't be promoted or pulled; the message says where and why, in one line."""


@dataclass(frozen=True)
class Definition:
    """One top-level definition: its name, its text with the comments right above it, and its line numbers."""

    name: str
    text: str
    start: int  # first line, from 0
    end: int  # line after the last

    @property
    def public(self) -> bool:
        return not self.name.startswith("_")


@dataclass(frozen=True)
class Promoted:
    """A definition as a cell of a notebook holds it."""

    definition: Definition
    module: str
    notebook: Path
    where: str  # the notebook's name and the cell's, as `place` gives them


def definition_name(node: ast.stmt) -> str | None:
    """The name that a statement defines, or None if it is not a definition of one name."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def definitions(source: str) -> list[Definition]:
    """All top-level definitions of a Python text, in order. Raises SyntaxError for invalid Python."""
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body:
        name = definition_name(node)
        if name is None:
            continue
        start = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
        while start and lines[start - 1].startswith("#"):
            start -= 1
        end = node.end_lineno or node.lineno
        found.append(Definition(name, "\n".join(lines[start:end]), start, end))
    return found


def cell_definitions(source: str, where: str) -> list[Definition]:
    """The definitions of a promoted cell. Raises PromotionError if it holds anything else."""
    try:
        found = definitions(source)
    except SyntaxError as error:
        raise PromotionError(f"{where}: not valid Python: {error.msg} (line {error.lineno})") from None
    held = {line for each in found for line in range(each.start, each.end)}
    for number, line in enumerate(source.splitlines()):
        if line.strip() and number not in held:
            raise PromotionError(
                f"{where}: a promoted cell holds whole top-level definitions and nothing else; move this line to "
                f"another cell: {line.strip()}"
            )
    return found


def place(path: Path, cell: nbformat.NotebookNode) -> str:
    """Where a cell is, as JupyterLab shows it: the number in brackets on its left, and its first line.

    >>> place(Path("04_mine.ipynb"), nbformat.v4.new_code_cell("class MLP:", execution_count=9))
    '04_mine.ipynb, cell [9] "class MLP:"'
    """
    number, first_line = cell.get("execution_count") or " ", next(iter(cell.source.strip().splitlines()), "")
    return f'{path.name}, cell [{number}] "{first_line}"'


def promoted_cells(folder: Path) -> Iterator[tuple[Path, int, str, str]]:
    """Notebook, cell index, module as the cell names it, and text of every promoted cell, in the series' order."""
    return ((path, index, cell.metadata.module, cell.source) for path, index, cell in tagged_cells(folder))


def tagged_cells(folder: Path) -> Iterator[tuple[Path, int, nbformat.NotebookNode]]:
    """Notebook, cell index and cell of every promoted cell, in the series' order. Raises PromotionError for one that
    names no module.
    """
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        if ".new" in path.name:
            continue  # a newer original beside the learner's copy
        try:
            cells = nbformat.read(path, as_version=4).cells
        except Exception as error:  # nbformat raises several kinds for a damaged file
            raise PromotionError(f"{path}: not a readable notebook: {error}") from None
        for index, cell in enumerate(cells):
            if "promote" in cell.metadata.get("tags", []):
                if "module" not in cell.metadata:
                    raise PromotionError(f"{place(path, cell)}: tagged promote, but its metadata names no module")
                yield path, index, cell


def collect(folder: Path) -> list[Promoted]:
    """All promoted definitions of the notebooks in a folder.

    Raises PromotionError for a cell that holds more than definitions, for a module that does not exist, and for a name
    that is promoted twice.
    """
    found: dict[tuple[str, str], Promoted] = {}
    for path, _, cell in tagged_cells(folder):
        where = place(path, cell)
        for definition in cell_definitions(cell.source, where):
            module = home(cell.metadata.module, definition.name)
            if not module_path(module).is_file():
                raise PromotionError(f"{where}: there is no module {module} in neox_lib")
            promoted = Promoted(definition, module, path, where)
            earlier = found.setdefault((module, definition.name), promoted)
            if earlier is not promoted:
                raise PromotionError(f"{module}.{definition.name} is promoted twice: {earlier.where}; {promoted.where}")
    return list(found.values())


def home(module: str, name: str) -> str:
    """The module that holds a definition now, if it has moved."""
    return current(f"{module}.{name}").rpartition(".")[0]


def of_older_originals(promoted: Iterable[Promoted]) -> list[Promoted]:
    """Those whose text comes from an older original, so not the learner's own work, and has changed in the current
    originals.
    """
    older = [each for each in promoted if is_older_text(each.definition.text)]
    cells = list(promoted_cells(NOTEBOOKS)) if older else []
    texts = {each.text for path, _, _, source in cells for each in cell_definitions(source, path.name)}
    return [each for each in older if each.definition.text not in texts]


def older_copies(folder: Path, modules: Iterable[str]) -> list[str]:
    """The notebooks that promote into these modules and still use old names: their pieces may no longer fit."""
    pieces = collect(folder)
    left_out = of_older_originals(pieces)
    names = {each.notebook.name for each in pieces if each.module in modules and each not in left_out}
    return sorted(names & stale_copies(folder).keys())


def file_name(module: str) -> str:
    return f"neox_lib/{module.replace('.', '/')}.py"


def module_path(module: str, library: Path | None = None) -> Path:
    """The file of a module by its name below neox_lib, such as "rotary" or "quantization.int8"."""
    return (library or LIBRARY) / f"{module.replace('.', '/')}.py"


def module_source(module: str) -> str:
    """A module's text. Raises PromotionError if it is not valid Python: its definitions could not be located."""
    source = module_path(module).read_text("utf-8")
    try:
        ast.parse(source)
    except SyntaxError as error:
        name = file_name(module)
        raise PromotionError(
            f"{name}: not valid Python: {error.msg} (line {error.lineno}). Fix it, or restore it: git checkout {name}"
        ) from None
    return source


def replaced(source: str, wanted: list[Definition]) -> str:
    """A module's text with its definitions replaced by these; a new one is put after its predecessor in the list."""
    for position, definition in enumerate(wanted):
        lines = source.splitlines()
        places = {each.name: each for each in definitions(source)}
        if definition.name in places:
            old = places[definition.name]
            lines[old.start : old.end] = definition.text.splitlines()
        else:
            before = next((places[each.name] for each in reversed(wanted[:position]) if each.name in places), None)
            end = before.end if before else len(lines)
            lines[end:end] = ["", "", *definition.text.splitlines()]
        source = "\n".join(lines) + "\n"
    return source


def differences(folder: Path) -> list[str]:
    """The differences between notebooks and library, as texts: diffs, missing and unpromoted definitions, imports of
    another object. Empty if they agree.

    Texts from older originals are left out, as in `promote`. Public definitions that no notebook promotes are reported
    of the originals only: a copy may be older, or a student's, which imports what would give an exercise away.
    """
    promoted = collect(folder)
    older = of_older_originals(promoted)
    found = []
    for module in dict.fromkeys(each.module for each in promoted):
        source = module_source(module)
        places = {each.name: each for each in definitions(source)}
        ours = [each for each in promoted if each.module == module and each not in older]
        for each in ours:
            library_text = places[each.definition.name].text if each.definition.name in places else ""
            found += unified_diff(each, library_text)
        names = {each.definition.name for each in ours}
        found += [
            f"{file_name(module)}: {name} is public, but no notebook promotes it"
            for name, place in places.items()
            if place.public and name not in names and folder.resolve() == NOTEBOOKS
        ]
        found += foreign_names(ours, promoted, source)
    return found


def foreign_names(ours: list[Promoted], promoted: list[Promoted], source: str) -> list[str]:
    """Names in one module's promoted definitions that mean one thing in their notebook and another in its `source`."""
    found = []
    for notebook in dict.fromkeys(each.notebook for each in ours):
        texts = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
        here = {each.definition.name: each.module for each in promoted if each.notebook == notebook}
        pieces = [each for each in ours if each.notebook == notebook]
        used = [each.definition.text for each in pieces]
        for name, origins in differing_names(ours[0].module, source, texts, here, used).items():
            user = next(each for each in pieces if name in free_names(each.definition.text))
            found.append(
                gone((origins[1] or "").removeprefix("neox_lib."), notebook.name) or two_meanings(name, user, *origins)
            )
    return found


def two_meanings(name: str, user: Promoted, in_library: str | None, in_notebook: str | None) -> str:
    """What to do about a name that a promoted definition uses and that the library's module has not, or has from
    elsewhere.
    """
    piece, file = user.definition.name, file_name(user.module)
    if in_notebook is None:
        return (
            f"{user.where}: `{piece}` uses `{name}`, which nothing in {user.notebook.name} defines. If you renamed it, "
            f"give it its old name back: the library's is `{name}`"
        )
    if in_library is None and in_notebook == HERE:
        return (
            f"{user.where}: `{piece}` uses `{name}`, which is defined in the notebook but not in {file}. Put the "
            f"definition of `{name}` into the same promoted cell, above `{piece}`"
        )
    module, _, last = in_notebook.rpartition(".")
    line = f"from {module} import {last}" if module else f"import {last}"
    line += "" if name == last else f" as {name}"
    if in_library is None:
        return (
            f"{user.where}: `{piece}` uses `{name}`, but `{name}` is not imported in {file}. Write `{line}` inside "
            f"the function that uses it"
        )
    return (
        f"{user.where}: `{piece}` uses `{name}`, which is {in_notebook} in the notebook and {in_library} in {file}. "
        "Import the same in both, or import it inside the function that uses it"
    )


def gone(name: str, where: str) -> str | None:
    """A message about a name that is gone from the library; None for any other name."""
    instead = successor(name)
    if instead is None:
        return None
    remedy = "make lab-refresh puts the new original beside your copy"
    return f"{where}: neox_lib.{name} is gone; use neox_lib.{instead}. {remedy}"


def unified_diff(promoted: Promoted, library_text: str) -> list[str]:
    if promoted.definition.text == library_text:
        return []
    lines = difflib.unified_diff(
        library_text.splitlines(),
        promoted.definition.text.splitlines(),
        f"{file_name(promoted.module)} {promoted.definition.name}",
        f"{promoted.where} {promoted.definition.name}",
        lineterm="",
    )
    return ["\n".join(lines)]


def promote(folder: Path = NOTEBOOKS) -> list[str]:
    """Write every promoted definition into the library; returns the names of the modules that changed.

    Texts from older originals are left out: see `of_older_originals`. The result is imported in a fresh process. If
    that or a write fails, every module is restored, and PromotionError says why in one line.
    """
    promoted = collect(folder)
    older = of_older_originals(promoted)
    before, after = {}, {}
    for module in dict.fromkeys(each.module for each in promoted):
        path, ours = module_path(module), [each for each in promoted if each.module == module and each not in older]
        for each in ours:
            if why := gone(f"{module}.{each.definition.name}", each.where):
                raise PromotionError(why)
        before[path] = path.read_bytes()
        text = replaced(module_source(module), [each.definition for each in ours])
        for foreign in foreign_names(ours, promoted, text):
            raise PromotionError(foreign)
        if text.encode("utf-8") != before[path]:
            after[path] = text.encode("utf-8")
    try:
        for path, content in after.items():
            write_bytes_atomically(path, content)
        why = import_failure({each.module for each in promoted}) if after else None
    except BaseException as error:
        restore(before, after)
        if isinstance(error, OSError):
            raise PromotionError(f"could not write the library ({error}); it has been restored") from None
        raise
    if why is not None:
        restore(before, after)
        raise PromotionError(f"the promoted code can't be imported ({why}); the library has been restored")
    return [module for module in dict.fromkeys(each.module for each in promoted) if module_path(module) in after]


def restore(before: dict[Path, bytes], changed: dict[Path, bytes]) -> None:
    for path in changed:
        if path.read_bytes() != before[path]:
            write_bytes_atomically(path, before[path])


def import_failure(modules: Iterable[str] = ()) -> str | None:
    """Import these and every top-level module of the library in a fresh process; returns None, or the error in one
    line.
    """
    names = sorted({*modules, *(path.stem for path in LIBRARY.glob("*.py") if not path.stem.startswith("__"))})
    code = "import importlib\n" + "\n".join(f"importlib.import_module('neox_lib.{name}')" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=LIBRARY.parent, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def pull(folder: Path = NOTEBOOKS) -> list[str]:
    """Write the library's text into the promoted cells; returns the notebooks that changed. Outputs are not changed.
    Raises PromotionError for a definition that the library no longer has.
    """
    collect(folder)
    changed = []
    for path in dict.fromkeys(path for path, *_ in promoted_cells(folder)):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "promote" not in cell.metadata.get("tags", []):
                continue
            where = place(path, cell)
            places = {each.name: each for each in definitions(module_source(cell.metadata.module))}
            wanted = cell_definitions(cell.source, where)
            for each in wanted:
                if each.name not in places:
                    raise PromotionError(f"{where}: {file_name(cell.metadata.module)} has no {each.name} to pull")
            text = replaced(cell.source, [places[each.name] for each in wanted]).rstrip("\n")
            if text != cell.source:
                cell.source = text
                changed += [path.name] if path.name not in changed else []
        if path.name in changed:
            write_bytes_atomically(path, nbformat.writes(notebook).rstrip("\n").encode("utf-8") + b"\n")
    return changed

"""Where the names used in a cell come from, to check that a cell and a module mean the same by them."""

import ast
import builtins
import symtable
from collections.abc import Iterable, Iterator

from neox_lib.course.moved import current_origin

HERE = "a definition of its own"  # the origin of what a notebook itself defines and does not promote


def free_names(source: str) -> set[str]:
    """The free names of a text: global names that it neither defines at top level nor finds in builtins."""
    used: set[str] = set()

    def visit(table: symtable.SymbolTable) -> None:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module"):
                used.add(symbol.get_name())
        for child in table.get_children():
            visit(child)

    visit(symtable.symtable(source, "<definition>", "exec"))
    return {name for name in used - set(bound_names(source)) if not hasattr(builtins, name)}


def bound_names(source: str) -> dict[str, str]:
    """What a text binds at its top level: name -> where it comes from, such as `torch.nn.functional` or `here`."""
    origins: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                origins[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            origins[node.name] = "here"
        else:
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    origins[target.id] = "here"
    return origins


def imported_names(source: str) -> Iterator[str]:
    """What a cell imports from neox_lib, as dotted names below it. Empty for a cell that is not valid Python."""
    try:
        nodes = list(ast.walk(ast.parse(plain_python(source))))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("neox_lib.") for name in names if name.startswith("neox_lib."))


def plain_python(cell: str) -> str:
    """A cell's text without the lines that only IPython understands."""
    lines = cell.splitlines()
    if lines and lines[0].startswith("%%"):
        return ""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def differing_names(
    module: str, library_source: str, cells: Iterable[str], promoted: dict[str, str], used: Iterable[str]
) -> dict[str, tuple[str | None, str | None]]:
    """Names in promoted texts that mean something else in the notebook than in the library module.

    `promoted` maps the names that this notebook promotes to their modules, `used` holds the promoted texts of `module`.
    Returns name -> (origin in the library, origin in the notebook); None where it has none. A name that an older copy
    imports from its old place counts as the one that replaced it.
    """
    own = f"neox_lib.{module}."
    library = {name: own + name if origin == "here" else origin for name, origin in bound_names(library_source).items()}
    notebook: dict[str, str] = {}
    for cell in cells:
        for name, bound in bound_names(plain_python(cell)).items():
            origin = current_origin(bound)
            if origin == "here":
                origin = f"neox_lib.{promoted[name]}.{name}" if name in promoted else HERE
            if name not in promoted or origin.startswith("neox_lib."):
                notebook[name] = origin
    names = set().union(*(free_names(text) for text in used))
    return {
        name: (library.get(name), notebook.get(name))
        for name in sorted(names)
        if library.get(name) != notebook.get(name)
    }

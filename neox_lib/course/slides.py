"""The notebooks as slides: one rule says which cell begins a slide, which goes on with it, and which is left out.

`python -m neox_lib mark-slides` writes the rule's answer into the notebooks' metadata, and JupyterLab's RISE shows them
so (`make slides`). A cell is never divided: one that is higher than a page is left out.
An author overrules with a cell tag: `slide-skip` leaves a cell out, `slide-new` begins a slide with it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from neox_lib.course.imports import plain_python
from neox_lib.course.slide_heights import LONGEST_CODE, cell_height, picture_size

PAGE = 660  # of 720 pixels: margins of 20, and 20 in hand for letters that are wider than those counted with
BETWEEN = 10  # two cells
SHORT = 120  # a remark of up to three lines stays with the result that it is about
TO_WRITE = 150  # left free below the stub of an exercise
LOOKED_UP = {"Glossary", "Sources"}  # sections to look things up in: nobody reads them from a wall

# A page as notebooks/rise.css expects it, scaled to the screen; this theme is the one that asks nobody for fonts
SHOW = {
    "theme": "white",
    "transition": "none",
    "width": 1280,
    "height": 720,
    "margin": 0,
    "minScale": 0.2,
    "center": False,
    "slideNumber": "c/t",
    "start_slideshow_at": "beginning",
}


def slide_types(notebook) -> list[str]:
    """For each cell: slide, subslide, fragment, skip, or "-" for one that goes on with the slide before it."""
    types, left, begins = [], 0, "slide"
    before: Any = None
    for cell, skipped in zip(notebook.cells, reasons_to_skip(notebook), strict=True):
        tags = cell.metadata.get("tags", [])
        if starts_section(cell):
            begins = "slide"
        if skipped:
            types.append("skip")
            begins = begins or "subslide"  # what is left out lies between: the two may not belong together
            continue
        height = cell_height(cell)
        needed = height + (TO_WRITE if "exercise" in tags else 0)
        if begins or needed > left or "slide-new" in tags or not goes_with(before, cell, height):
            types.append(begins or "subslide")
            left = PAGE
        else:
            types.append("fragment" if cell.cell_type == "markdown" and before.cell_type == "code" else "-")
        begins, before, left = "", cell, left - height - BETWEEN
    return types


def goes_with(before, cell, height: int) -> bool:
    """Whether a cell may share a slide with the one before it, as far as the lesson is concerned."""
    if "predict" in before.metadata.get("tags", []):
        return False  # what comes next is the answer
    if cell.cell_type == "markdown":
        return height <= SHORT
    return not (shows_figure(before) or (shows_figure(cell) and before.cell_type == "code"))


def shows_figure(cell) -> bool:
    return cell.cell_type == "code" and picture_size(str(cell.outputs)) is not None


def starts_section(cell) -> bool:
    return cell.cell_type == "markdown" and bool(titles(cell.source))


def titles(source: str) -> list[str]:
    """The titles of the sections (levels 1 and 2) that begin in a Markdown cell."""
    return re.findall(
        r"^##? +(.+?)\s*$", re.sub(r"^```.*?^```", "", source, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )


def reasons_to_skip(notebook) -> Iterator[str]:
    """For each cell why it is not shown, or an empty string."""
    section = ""
    for cell in notebook.cells:
        begun = titles(cell.source) if cell.cell_type == "markdown" else []
        section = begun[0] if begun else section
        if "slide-skip" in cell.metadata.get("tags", []):
            yield "its author left it out"
        elif section in LOOKED_UP:
            yield "a list to look things up in"
        else:
            yield reason_in(cell)
        section = begun[-1] if begun else section


def reason_in(cell) -> str:
    height, lines = cell_height(cell), len(cell.source.splitlines())
    if cell.cell_type == "markdown" and "<summary>Solution</summary>" in cell.source:
        return "hints and a solution"
    if cell.cell_type == "code" and not cell.outputs:
        if lines > LONGEST_CODE:
            return f"{lines} lines of code"
        if all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(plain_python(cell.source)).body):
            return "only imports"
    return f"{height} pixels high, a page has {PAGE}" if height > PAGE else ""


def mark_slides(notebook) -> None:
    """Put the rule's answer into the metadata: each cell's slide type, and how the show looks."""
    for cell, slide_type in zip(notebook.cells, slide_types(notebook), strict=True):
        cell.metadata["slideshow"] = {"slide_type": slide_type}
    notebook.metadata["rise"] = dict(SHOW)


def marked(path: Path) -> str | None:
    """The text of a notebook file with the rule's metadata; None where it has them already."""
    notebook = nbformat.read(path, as_version=4)
    mark_slides(notebook)
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    return text if text != path.read_text("utf-8") else None

"""The student edition: the same notebooks without what students are to find out. Nothing in it is written twice.

Cell tags say what goes: `teacher-note` marks a cell for the teacher, `solution` a promoted cell that solves an
exercise, `reveal` a cell whose output settles a prediction, `answer` prose that names the museum's answers.
Folded solutions and the teacher's boxes stand inside Markdown cells and are found by their `<details>`.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import nbformat
from nbconvert.preprocessors import Preprocessor, RegexRemovePreprocessor, TagRemovePreprocessor

from neox_lib.checkpoints.atomic import write_bytes_atomically
from neox_lib.classroom.asked import FOLDED_SOLUTION
from neox_lib.course.imports import plain_python
from neox_lib.course.learner_copy import NOTEBOOKS, lesson_files
from neox_lib.course.promote import definitions

TEACHERS_BOX = re.compile(r'\s*<details class="[^"]*\bteacher-note\b[^"]*">.*?</details>', re.DOTALL)
READ_THE_TABLE = (
    "**Read the table:** which check notices which piece, and which are blind to all of them? Write your answer here."
)
LIBRARY_PIECE = """\
# From here on the library's version stands in for yours. When yours passes its check, read it: {name}??
# To put yours into the library, write it here without my_, and give this cell the tag promote.
from neox_lib.{module} import {names}"""


def tags_of(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def without_asserts(source: str) -> str:
    """A cell's text without its assert statements: what they claim is the answer to a prediction.

    >>> print(without_asserts("found = 3\\nassert found == 3, 'three'\\nprint(found)"))
    found = 3
    print(found)
    """
    gone: set[int] = set()  # line numbers, from 1

    def only_asserts(body: list[ast.stmt]) -> bool:
        return all(isinstance(each, ast.Assert) for each in body)

    def cut(body: list[ast.stmt]) -> None:
        for node in body:
            loop = isinstance(node, ast.For | ast.With) and only_asserts(node.body)
            claim = isinstance(node, ast.Assert) and (body is tree.body or not only_asserts(body))
            if claim or loop:
                gone.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
                cut(getattr(node, "body", []))

    tree = ast.parse(plain_python(source))
    cut(tree.body)
    kept = (line for number, line in enumerate(source.splitlines(), start=1) if number not in gone)
    return "\n".join(kept).strip("\n")


class WithoutSolutions(Preprocessor):
    """Removes folded solutions and the teacher's boxes from Markdown cells; turns promoted answers into an import."""

    def preprocess_cell(self, cell, resources, index):
        found = resources["left_out"]
        if cell.cell_type == "markdown":
            cell.source, solutions = FOLDED_SOLUTION.subn("", cell.source)
            cell.source, notes = TEACHERS_BOX.subn("", cell.source)
            found.update({"solutions": solutions, "teacher's notes": notes})
        elif {"promote", "solution"} <= tags_of(cell):
            names = [each.name for each in definitions(cell.source)]
            cell.source = LIBRARY_PIECE.format(name=names[-1], module=cell.metadata.module, names=", ".join(names))
            cell.metadata.tags = [tag for tag in cell.metadata.tags if tag not in ("promote", "solution")]
            found["promoted answers"] += 1
        return cell, resources


class InItsOwnPlace(Preprocessor):
    """Says where students work: in the folder that `make lab EDITION=student` opens."""

    def preprocess_cell(self, cell, resources, index):
        cell.source = cell.source.replace("`make lab`", "`make lab EDITION=student`")
        cell.source = cell.source.replace("notebooks/mine", "notebooks/student")
        return cell, resources


class WithoutAnswers(Preprocessor):
    """Removes what settles a prediction: its explanations, asserts, and the prose about the museum's table."""

    def preprocess_cell(self, cell, resources, index):
        found, tags = resources["left_out"], tags_of(cell)
        if "answer" in tags:
            heading = re.search(r"^#{1,6} ", cell.source, re.MULTILINE)
            cell.source = READ_THE_TABLE + ("\n\n" + cell.source[heading.start() :] if heading else "")
            found["museum answers"] += 1
        elif "reveal" in tags:
            cell.source = without_asserts(cell.source)
            found["outputs"] += bool(cell.outputs)
        elif "predict" in tags:
            for output in cell.outputs:  # the question and its options stay, as text
                output.get("data", {}).pop("text/html", None)
        return cell, resources


class WithoutTags(Preprocessor):
    """Removes the tags that say where the answers were."""

    def preprocess_cell(self, cell, resources, index):
        left = [tag for tag in cell.metadata.get("tags", []) if tag not in ("answer", "reveal", "solution")]
        if left != cell.metadata.get("tags", []):
            cell.metadata.tags = left
        return cell, resources


def student_edition(notebook: nbformat.NotebookNode) -> tuple[nbformat.NotebookNode, Counter]:
    """A notebook's student edition, and how much was left out, by kind. Changes the given notebook."""
    resources = {"left_out": Counter()}
    resources["left_out"]["teacher's notes"] += sum("teacher-note" in tags_of(cell) for cell in notebook.cells)
    steps = [
        TagRemovePreprocessor(remove_cell_tags={"teacher-note"}),
        WithoutSolutions(),
        WithoutAnswers(),
        TagRemovePreprocessor(remove_all_outputs_tags={"reveal"}),
        RegexRemovePreprocessor(patterns=[r"\s*\Z"]),  # a cell that held a solution and nothing else
        WithoutTags(),
        InItsOwnPlace(),
    ]
    for step in steps:
        notebook, resources = step.preprocess(notebook, resources)
    return notebook, resources["left_out"]


def unmarked(notebook: nbformat.NotebookNode) -> str | None:
    """What a notebook's author forgot to tag, in words; None when nothing is missing."""
    tags = set().union(*map(tags_of, notebook.cells))
    missing = [tag for tag in ("reveal", "answer") if "museum" in tags and tag not in tags]
    return f"its museum has no cell tagged {' or '.join(missing)}: the answers stay in" if missing else None


def write_student_edition(out: Path, originals: Path = NOTEBOOKS) -> list[str]:
    """Write the series for students into `out`, a new or empty folder; returns a line of text per notebook.

    Raises ValueError for a folder that is not empty, so that nobody's work is overwritten.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: not empty; give a new folder, so that no work is overwritten")
    lines = []
    for name in lesson_files(originals):
        content = (originals / name).read_bytes()
        if re.match(r"\d.*\.ipynb$", name):
            original = nbformat.reads(content.decode("utf-8"), as_version=4)
            forgotten = unmarked(original)
            notebook, left_out = student_edition(original)
            content = (nbformat.writes(notebook).rstrip("\n") + "\n").encode("utf-8")
            words = ", ".join(f"{kind} {count}" for kind, count in left_out.items() if count)
            lines.append(f"{name}: left out: {words or 'nothing'}" + (f"; but {forgotten}" if forgotten else ""))
        elif name.endswith(".ipynb"):
            continue
        write_bytes_atomically(out / name, content)
    if (originals / "LICENSE").is_file():
        write_bytes_atomically(out / "LICENSE", (originals / "LICENSE").read_bytes())
    return lines

"""A learner's progress: exercises solved, right predictions, and promoted pieces."""

import html
import importlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.predictions import QUESTIONS, questions
from neox_lib.course.progress import EXERCISES, read_progress
from neox_lib.course.promote import cell_definitions, definitions, home, module_path

HEADINGS = ("notebook", "exercises solved", "predictions right", "the library holds its text")


@dataclass(frozen=True)
class Row:
    """One notebook's state. Each pair is (done, total); `whole` is False if a part could not be read, so that the
    counts are too low.
    """

    notebook: str
    exercises: tuple[int, int]
    predictions: tuple[int, int]
    promoted: tuple[int, int]
    whole: bool = True

    def cells(self) -> tuple[str, ...]:
        counts = (self.exercises, self.predictions, self.promoted)
        return self.notebook + ("" if self.whole else " (?)"), *(f"{done} of {n}" if n else "-" for done, n in counts)


@dataclass(frozen=True)
class Progress:
    """The table of the series. As a cell's last expression it displays as HTML, or as text where HTML is not
    supported.
    """

    rows: tuple[Row, ...]

    def table(self) -> list[tuple[str, ...]]:
        rows = self.rows
        exercises, predictions = total_of(row.exercises for row in rows), total_of(row.predictions for row in rows)
        promoted = total_of(row.promoted for row in rows)
        total = Row("all together", exercises, predictions, promoted, all(row.whole for row in rows))
        return [HEADINGS, *(row.cells() for row in self.rows), total.cells()]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.table(), strict=True)]
        lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in self.table())
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head, *body = (tuple(map(html.escape, row)) for row in self.table())
        top = "".join(f'<th scope="col">{word}</th>' for word in head)
        rows = (f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{word}</td>" for word in row[1:]) for row in body)
        body_rows = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body_rows}</tbody></table>"


def total_of(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    done, there_are = zip((0, 0), *counts, strict=True)
    return sum(done), sum(there_are)


def progress() -> Progress:
    """Your progress, read from the progress file, the notebooks in the kernel's folder, and the library.

    Never raises: what can't be read counts as not done, and its row has a question mark.
    """
    names = {path.stem for path in [*NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"), *QUESTIONS.glob("*.toml")]}
    return Progress(tuple(row_of(name) for name in sorted(names)))


def row_of(notebook: str) -> Row:
    counts, whole = [], True
    for count in (solved, right, held):
        try:
            counts.append(count(notebook))
        except Exception:  # a damaged notebook or a broken piece must not hide the table
            counts.append((0, 0))
            whole = False
    return Row(notebook, *counts, whole=whole)


def text_of(notebook: str) -> str:
    """The notebook in the kernel's folder, else the original; empty if there is neither."""
    for path in (Path(f"{notebook}.ipynb"), NOTEBOOKS / f"{notebook}.ipynb"):
        if path.is_file():
            return path.read_text("utf-8")
    return ""


def solved(notebook: str) -> tuple[int, int]:
    """(passed, total) exercises of the modules that the notebook imports its checks from."""
    text, outcomes = text_of(notebook), read_progress()["exercises"]
    names = set(re.findall(r"from neox_lib\.(?:course|lesson)\.exercises import (\w+)", text))
    modules = {f"neox_lib.course.exercises.{name}" for name in names}
    for module in sorted(modules):
        importlib.import_module(module)
    keys = [key for key, module in EXERCISES.items() if module in modules]
    return sum(outcomes.get(key) == "passed" for key in keys), len(keys)


def right(notebook: str) -> tuple[int, int]:
    """(right, total) predictions."""
    if not (QUESTIONS / f"{notebook}.toml").is_file():
        return 0, 0
    asked, chosen = questions(notebook).values(), read_progress()["predictions"]
    return sum(chosen.get(each.key) == each.right_key for each in asked), len(asked)


def held(notebook: str) -> tuple[int, int]:
    """(in the library, total) promoted definitions of the notebook."""
    text, same, there_are = text_of(notebook), 0, 0
    for cell in json.loads(text)["cells"] if text else ():
        if "promote" in cell["metadata"].get("tags", []):
            for each in cell_definitions("".join(cell["source"]), notebook):
                library = module_path(home(cell["metadata"]["module"], each.name)).read_text("utf-8")
                same += any(each.text == other.text for other in definitions(library) if each.name == other.name)
                there_are += 1
    return same, there_are

"""Which cell stands on which slide: the notebooks say it, and what a class needs is on the wall."""

import itertools
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.present import find_lesson, find_notebook
from neox_lib.course.slides import SHOW, mark_new_cells

TYPES = {"slide", "subslide", "fragment", "-", "skip"}
NOT_SHOWN = {"Sources", "Glossary", "Text and ids", "Inside the model", "Weights and files", "Writing text"}
NOT_SHOWN |= {"Appendix: the rest of the library's file", "Appendix: the table as a part of the model"}
every_notebook = pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")), ids=lambda path: path.stem
)


def typed(path: Path) -> list[tuple]:
    notebook = nbformat.read(path, as_version=4)
    return [(cell, cell.metadata.slideshow.slide_type, set(cell.metadata.get("tags", []))) for cell in notebook.cells]


@every_notebook
def test_every_cell_says_where_it_stands(path):
    cells = typed(path)
    assert {slide_type for _, slide_type, _ in cells} <= TYPES and cells[0][1] == "slide"
    assert nbformat.read(path, as_version=4).metadata.rise == SHOW


@every_notebook
def test_no_solution_is_shown(path):
    shown = [(cell, tags) for cell, slide_type, tags in typed(path) if slide_type != "skip"]
    assert not [cell.source for cell, tags in shown if "solution" in tags or "<summary>Solution" in cell.source]


@every_notebook
def test_headings_exercises_museum_and_recap_are_shown(path):
    """What a teacher points at must not hide in a cell that is left out for what else it holds."""
    hidden = [(cell, tags) for cell, slide_type, tags in typed(path) if slide_type == "skip"]
    texts = (cell.source for cell, _ in hidden if cell.cell_type == "markdown")
    prose = "\n".join(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE) for text in texts)
    assert set(re.findall(r"^#{1,3} (.+)", prose, re.MULTILINE)) <= NOT_SHOWN
    assert not [cell.source for cell, tags in hidden if tags & {"exercise", "predict", "answer"}]


@every_notebook
def test_the_answer_to_a_prediction_is_not_on_its_slide(path):
    cells = typed(path)
    after = [new for (_, _, tags), (_, new, _) in itertools.pairwise(cells) if "predict" in tags]
    assert set(after) <= {"slide", "subslide", "skip"}


def test_a_new_cell_gets_a_slide_and_an_old_one_keeps_its_own():
    """A solution that an author forgets to mark must not be on the wall."""
    cells = [
        new_markdown_cell("## A section"),
        new_code_cell("1"),
        new_markdown_cell("<details><summary>Solution</summary>\n</details>"),
        new_code_cell("def f(): ...", metadata={"tags": ["promote", "solution"]}),
        new_code_cell("2", metadata={"slideshow": {"slide_type": "-"}}),
    ]
    mark_new_cells(new_notebook(cells=cells))
    assert [cell.metadata["slideshow"]["slide_type"] for cell in cells] == ["slide", "subslide", "skip", "skip", "-"]


def test_the_show_asks_nobody_for_fonts():
    """Of the themes that RISE 0.43 has, most ask Google; these three bring their own or none."""
    assert SHOW["theme"] in ("white", "black", "serif")


def test_a_notebook_is_found_by_the_beginning_of_its_name(tmp_path: Path):
    for name in ("01_one.ipynb", "02_two.ipynb", "02_two.new.ipynb"):
        (tmp_path / name).touch()
    assert find_notebook("02", tmp_path).name == "02_two.ipynb"
    for wrong in ("", "0", "09"):
        with pytest.raises(FileNotFoundError, match=r"01_one\.ipynb, 02_two\.ipynb"):
            find_notebook(wrong, tmp_path)


def test_a_lesson_opens_where_it_begins():
    """The second lesson on a notebook must not begin with the first one's slides, nor with its last words."""
    plan = NOTEBOOKS / "TEACHING.md"
    lessons = re.split(r"^## Lesson \d+", plan.read_text("utf-8"), flags=re.MULTILINE)[1:]
    for number, lesson in enumerate(lessons, start=1):
        path, index = find_lesson(number, NOTEBOOKS, plan)
        stem, section = re.findall(r"\((\w+)\.ipynb#([^)]+)", lesson)[0]
        cell, slide_type, _ = typed(path)[index]
        assert path.stem == stem and slide_type == "slide" and cell.source.startswith("#")
        assert index == 0 or cell.source.splitlines()[0].strip("# ") == section.replace("-", " ")
    with pytest.raises(ValueError, match=rf"no lesson {number + 1}: TEACHING\.md has 1 to {number}"):
        find_lesson(number + 1, NOTEBOOKS, plan)

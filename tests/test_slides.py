"""Which cell stands on which slide: one rule, and the notebooks hold what it says."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.present import find_notebook
from neox_lib.course.slide_heights import cell_height
from neox_lib.course.slides import PAGE, mark_slides, marked, reasons_to_skip, slide_types

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAyAAAAHCCAYAAAAXY63IAAAACXBIWXMAAA9hAAAPYQGoP6dpAAAA"  # the head of a PNG, 800 x 450


def code(lines: int, *outputs, tags=()):
    source = "\n".join(f"value_{number} = {number}" for number in range(lines))
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def printed(lines: int):
    return new_output("stream", text="a line\n" * lines)


def figure():
    return new_output("display_data", data={"text/html": f'<img src="data:image/png;base64,{PICTURE}">'})


def types(*cells) -> list[str]:
    return slide_types(new_notebook(cells=list(cells)))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_notebook_has_the_slides_of_the_rule(path):
    """A cell that was added or changed would stand on no slide, or on a wrong one."""
    as_it_should_be = marked(path) is None
    assert as_it_should_be, "python -m neox_lib mark-slides writes them"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_most_of_a_lesson_is_shown(path):
    notebook = nbformat.read(path, as_version=4)
    assert slide_types(notebook).count("skip") <= len(notebook.cells) // 3


def test_a_section_begins_a_slide_and_its_cells_go_on_below():
    cells = [new_markdown_cell("# A title"), code(14, printed(8)), code(14, printed(8)), new_markdown_cell("## Next")]
    assert types(*cells) == ["slide", "-", "subslide", "slide"]


def test_a_section_whose_heading_is_left_out_still_begins_a_slide():
    cells = [code(3), new_markdown_cell("## Long\n\n" + "Words. " * 400), code(3)]
    assert types(*cells) == ["slide", "skip", "slide"]


def test_long_code_without_a_result_is_left_out_and_with_one_its_result_is_shown():
    assert types(code(17), code(16), code(30, printed(3))) == ["skip", "slide", "-"]
    assert cell_height(code(30, printed(3))) < cell_height(code(16))


def test_only_one_figure_stands_on_a_slide():
    assert types(code(3, figure()), code(1, figure()), code(1)) == ["slide", "subslide", "subslide"]


def test_the_answer_to_a_prediction_is_not_on_its_slide():
    assert types(code(1, printed(1), tags=["predict"]), code(1, printed(1))) == ["slide", "subslide"]


def test_a_short_remark_waits_until_the_result_has_been_seen():
    assert types(code(2, printed(1)), new_markdown_cell("So it is.")) == ["slide", "fragment"]


def test_solutions_are_not_shown():
    hints = "<details><summary>Solution</summary>\n\n```python\nreturn 1\n```\n</details>"
    assert types(code(2), new_markdown_cell(hints)) == ["slide", "skip"]


def test_a_note_to_the_teacher_takes_no_room():
    """notebooks/rise.css hides it."""
    note = '\n\n<details class="teacher-note"><summary>Teacher</summary>\n\n' + "Words. " * 500 + "\n</details>"
    assert cell_height(new_markdown_cell("A question?" + note)) == cell_height(new_markdown_cell("A question?"))


def test_room_is_left_to_write_below_a_stub():
    stub, check = code(14, tags=["exercise"]), code(1, printed(1))
    assert types(code(5, printed(5)), stub, check) == ["slide", "subslide", "-"]
    assert types(code(5, printed(5)), code(14)) == ["slide", "-"], "without the tag it would stay"


def test_what_follows_a_gap_begins_a_slide_of_its_own():
    assert types(code(2), code(20), code(2)) == ["slide", "skip", "subslide"]


def test_a_glossary_is_no_slide():
    cells = [new_markdown_cell("## Glossary"), new_markdown_cell("### A\n\nWords."), new_markdown_cell("## Where next")]
    assert types(*cells) == ["skip", "skip", "slide"]


def test_an_author_overrules_the_rule_by_a_tag():
    assert types(code(2), code(2, tags=["slide-skip"])) == ["slide", "skip"]
    assert types(code(2), code(2, tags=["slide-new"])) == ["slide", "subslide"]


def test_what_is_higher_than_a_page_is_left_out_and_the_reason_is_told():
    cell = code(16, printed(40))
    assert cell_height(cell) > PAGE
    assert list(reasons_to_skip(new_notebook(cells=[cell]))) == [f"{cell_height(cell)} pixels high, a page has {PAGE}"]


def test_the_command_writes_only_metadata_and_checks_without_writing(tmp_path):
    path = tmp_path / "02_small.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), code(2, printed(1))]), path)
    before = nbformat.read(path, as_version=4)
    command = [sys.executable, "-m", "neox_lib", "mark-slides", str(path)]
    checked = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert checked.returncode == 1 and "02_small.ipynb" in checked.stdout
    assert nbformat.read(path, as_version=4) == before
    assert subprocess.run(command, capture_output=True).returncode == 0
    after = nbformat.read(path, as_version=4)
    assert [cell.metadata.pop("slideshow").slide_type for cell in after.cells] == ["slide", "-"]
    assert after.metadata.pop("rise").theme == "white"
    assert after == before
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 0


def test_the_show_asks_nobody_for_fonts():
    """Of the themes that RISE 0.43 has, most ask Google; these three bring their own or none."""
    notebook = new_notebook()
    mark_slides(notebook)
    assert notebook.metadata.rise.theme in ("white", "black", "serif")


def test_a_notebook_is_found_by_the_beginning_of_its_name(tmp_path: Path):
    for name in ("01_one.ipynb", "02_two.ipynb", "02_two.new.ipynb"):
        (tmp_path / name).touch()
    assert find_notebook("02", tmp_path).name == "02_two.ipynb"
    for wrong in ("", "0", "09"):
        with pytest.raises(FileNotFoundError, match=r"01_one\.ipynb, 02_two\.ipynb"):
            find_notebook(wrong, tmp_path)

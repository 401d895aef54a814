"""The slide shows in a real browser: on a wall of 1280 x 720 nothing is cut off, and what runs in a notebook runs."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from ipywidgets.embed import dependency_state
from nbformat.sign import NotebookNotary

from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.predictions import predict
from neox_lib.course.present import FILES
from neox_lib.course.slides import mark_new_cells
from neox_lib.course.store import WIDGET_VIEW
from tests.browsing import TOKEN, Visit, needs_chromium, serve_lab
from tests.browsing import browser as browser  # a fixture
from tests.playground_page import PlaygroundVisit

pytestmark = needs_chromium
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))

LOOK_AT_ALL = (Path(__file__).parent / "look_at_slides.js").read_text("utf-8")
SMALLEST = [16, 24]  # pixels of 720: what can be read from the back row, and the text of a prediction


def answer_predictions(notebook) -> None:
    """Give each prediction the widget that it has after a click, as JupyterLab saves it."""
    state = {}
    for cell in notebook.cells:
        if "predict" in cell.metadata.get("tags", []):
            [(chapter, key)] = re.findall(r'predict\("(\w+)", "(\w+)"\)', cell.source)
            explanations = [why for _, why in predict(chapter, key).options]
            widget = predict(chapter, key).widget()
            widget.children[1].value = explanations.index(max(explanations, key=len))
            state |= dependency_state(widget)
            view = {WIDGET_VIEW: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}}
            cell.outputs = [nbformat.v4.new_output("display_data", view)]
    notebook.metadata.widgets = {
        "application/vnd.jupyter.widget-state+json": {"version_major": 2, "version_minor": 0, "state": state}
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the notebooks, in which each prediction has run and has got the answer with the longest explanation."""
    folder = tmp_path_factory.mktemp("slides")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEOX_PROGRESS", str(folder / "progress.json"))
        for name in NAMES:
            notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
            answer_predictions(notebook)
            nbformat.write(notebook, folder / f"{name}.ipynb")
    shutil.copy(NOTEBOOKS / "rise.css", folder)
    shutil.copytree(NOTEBOOKS / "images", folder / "images")
    return folder


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory) -> Iterator[str]:
    """The address under which JupyterLab shows the notebooks as slides."""
    own = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(FILES))
        patch.setenv("NEOX_PROGRESS", str(own / "progress.json"))
        data = own / "jupyter_data_dir"
        data.mkdir()
        for name in NAMES:  # JupyterLab shows saved widgets of notebooks that it trusts
            NotebookNotary(data_dir=str(data)).sign(nbformat.read(folder / f"{name}.ipynb", as_version=4))
        with serve_lab(own, folder) as address:
            yield f"{address}rise/"


@pytest.fixture
def show(browser, lab) -> Iterator:
    visits = []

    def start(name: str, cell: int = 0) -> Visit:
        visit = Visit(browser, f"{lab}{name}.ipynb?activeCellIndex={cell}&token={TOKEN}")
        visits.append(visit)
        visit.page.wait_for_selector(".slides section.present section.present .jp-Cell")
        visit.page.wait_for_selector(".reveal > .slide-number", state="attached")
        return visit

    yield start
    for visit in visits:
        visit.close()


def unexpected(errors: list[str]) -> list[str]:
    """Errors but the two that RISE 0.43 brings along: it asks for a stylesheet named as the notebook, which need not
    exist, and its bundle's colour tokens call each other without end, with every other extension off too."""
    known = (r"RangeError: Maximum call stack size exceeded$", r"Refused to apply style from '[^']*\.css' ")
    return [error for error in errors if not any(re.match(pattern, error) for pattern in known)]


@pytest.mark.parametrize("name", NAMES)
def test_on_a_small_wall_nothing_is_cut_off_and_all_can_be_read(show, name):
    """Nor are asserts and alt texts in the way."""
    visit = show(name)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    predictions = sum("predict" in cell.metadata.get("tags", []) for cell in notebook.cells)
    visit.page.wait_for_function(f"document.querySelectorAll('.widget-radio').length === {predictions}")
    visit.page.add_style_tag(content=".jupyter-widgets-disconnected::before { display: none !important }")
    seen = visit.page.evaluate(LOOK_AT_ALL, SMALLEST)
    types = [cell.metadata.slideshow.slide_type for cell in notebook.cells]
    assert seen["slides"] == types.count("slide") + types.count("subslide")
    assert not seen["found"], "\n".join(seen["found"])
    assert unexpected(visit.errors) == [] and visit.outside == []


def test_the_look_sees_a_slide_that_is_too_high_and_one_that_is_too_wide(show, folder):
    """A judge that accepts everything would be worth nothing."""
    cells = [
        nbformat.v4.new_markdown_cell(text) for text in ("Short.\n\n" * 20, f"<p style='width:1500px'>{'a ' * 99}")
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=KERNEL)
    for cell in notebook.cells:
        cell.metadata["slideshow"] = {"slide_type": "slide"}
    mark_new_cells(notebook)
    nbformat.write(notebook, folder / "wrong.ipynb")
    page = show("wrong", cell=1).page
    page.wait_for_function("document.querySelector('#slide-1-0.present')")  # as `make slides LESSON=16` asks for a cell
    found = "\n".join(page.evaluate(LOOK_AT_ALL, SMALLEST)["found"])
    assert "slide 0/0: is" in found and "pixels too high" in found
    assert "slide 1/0: P is cut off at the right" in found


KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def test_cells_that_are_not_shown_run_too_and_the_show_stays_where_it_is(show, folder):
    sources = ["hidden = 41", "print(hidden + 1)", "print('the end')"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells.insert(0, nbformat.v4.new_markdown_cell("# A title"))
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=KERNEL)
    notebook.cells[1].metadata["slideshow"] = {"slide_type": "skip"}
    notebook.cells[-1].metadata["slideshow"] = {"slide_type": "slide"}
    mark_new_cells(notebook)
    nbformat.write(notebook, folder / "hidden.ipynb")
    page = show("hidden").page
    page.keyboard.press("Alt+A")
    page.wait_for_selector("pre:has-text('42')")
    page.wait_for_selector("pre:has-text('the end')", state="attached")
    assert page.evaluate("location.hash") in ("", "#/", "#/slide-0-0")
    page.keyboard.press("Space")
    page.wait_for_function("location.hash === '#/slide-0-1'")


def test_asserts_and_alt_texts_are_not_on_the_wall_unless_they_are_typed_there(show, folder):
    """Whoever types on a slide must see what they type; whoever shows a lesson shows what it is about."""
    source = """\
for each in "abc":
    assert each, "a loop of claims alone"
value = 1
assert value == (  # over several lines
    1
), "(a bracket"
draw(
    value,
    alt="A figure " + str(value)
    + " and more",
)
alt = "Another"
torch.testing.assert_close(1, 1)
for each in "abc":
    print(each)
    assert each
print(alt)"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=KERNEL)
    mark_new_cells(notebook)
    nbformat.write(notebook, folder / "claims.ipynb")
    page = show("claims").page
    seen = page.locator(".cm-line")
    page.wait_for_function("!document.querySelector('.cm-content').innerText.includes('assert')")
    kept = ["value = 1", "draw(", "    value,", ")", 'for each in "abc":', "    print(each)", "print(alt)"]
    assert seen.all_text_contents() == kept
    seen.last.click()
    page.keyboard.press("End")
    page.keyboard.type("\nassert kept == 1")
    assert seen.all_text_contents() == [*kept, "assert kept == 1"]
    assert page.evaluate(LOOK_AT_ALL, SMALLEST)["found"] == ["slide 0/0: an assert is on the wall: assert kept == 1"]


def run_the_cell(visit: Visit, source: str) -> None:
    """Go to the slide of the cell that holds `source` and press what a teacher would, without a click."""
    cell = visit.page.locator(f".jp-CodeCell:has-text('{source}')").first
    place = cell.evaluate("cell => cell.closest('section').id.split('-').slice(1)")
    visit.page.evaluate("([column, row]) => { location.hash = `#/${column}/${row}` }", place)
    visit.page.wait_for_selector(f"#slide-{place[0]}-{place[1]}.present .jp-CodeCell.jp-mod-active")
    visit.page.keyboard.press("Control+Enter")


@pytest.fixture(scope="module")
def playground_lesson(browser, lab, folder) -> Iterator[PlaygroundVisit]:
    shutil.copy(NOTEBOOKS / "07_prompt_playground.ipynb", folder / "playground.ipynb")
    visit = PlaygroundVisit(browser, f"{lab}playground.ipynb?token={TOKEN}")
    visit.page.wait_for_selector(".reveal > .slide-number", state="attached")
    yield visit
    visit.close()


def test_a_prediction_is_made_on_a_slide(playground_lesson):
    visit = playground_lesson
    run_the_cell(visit, 'prompt_playground", "inline_stop"')
    visit.page.locator(".jupyter-widgets input[type=radio]").first.click()
    visit.page.wait_for_function("/Right|Not so/.test(document.querySelector('.jupyter-widgets').innerText)")
    assert not visit.page.locator("section.present section.present .jp-Cell-inputWrapper").first.is_visible()
    assert unexpected(visit.errors) == []


def test_the_playground_writes_on_a_slide(playground_lesson):
    visit = playground_lesson
    run_the_cell(visit, "Playground(")
    visit.page.wait_for_selector(".np")
    visit.set_tokens(5)
    visit.generate("Once upon a time")
    assert visit.page.locator(".np-status").first.inner_text() == "Wrote 5 tokens."
    assert unexpected(visit.errors) == [] and visit.outside == []

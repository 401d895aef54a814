"""What stands behind the exercises: messages that teach, nothing that raises, and nobody else's answers."""

import io
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

import neox_lib
from neox_lib import generation, rotary
from neox_lib.course import checks, promote, series, store
from neox_lib.course.checks import (
    PropertyFailed,
    Result,
    exercise,
    in_place_of,
    left_out_or_twice,
    require,
    require_count,
    require_equal,
)
from neox_lib.course.figures.diagrams import PLACES, model_map
from neox_lib.course.figures.plots import Picture, TokenSpans, bars, heat_map, lines, new_figure, token_spans
from neox_lib.course.progress import EXERCISES, read_progress, record

LIBRARY = Path(neox_lib.__file__).parent
CHAPTERS = sorted(path.stem for path in (LIBRARY / "course" / "exercises").glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def made_up_exercises_are_forgotten():
    """Exercises that a test makes up are not part of the series."""
    yield
    for key in [key for key in EXERCISES if key.startswith("made_up.")]:
        del EXERCISES[key]


@pytest.fixture
def doubling():
    """An exercise of two properties: my_double(3) is 6, and my_double(-1) is -2."""

    @exercise("made_up.double")
    def double(yours):
        require_equal(yours(3), 6, "my_double(3)")
        require_equal(yours(-1), -2, "my_double(-1)")
        return "It doubles."

    return double


def my_double(x):
    return x * 2


# Messages


def test_a_right_piece_passes_with_the_remark_and_is_kept(doubling, own_progress_file):
    result = doubling(my_double)
    assert result == Result(True, "Passed.\n\nIt doubles.")
    assert json.loads(own_progress_file.read_text())["exercises"] == {"made_up.double": "passed"}


def test_a_stub_is_told_kindly_what_is_missing_and_nothing_is_kept(doubling, own_progress_file):
    def my_double(x):
        raise NotImplementedError

    result = doubling(my_double)
    assert not result.passed
    assert "Not written yet" in result.message and "my_double" in result.message
    assert not own_progress_file.exists()


def test_a_wrong_try_is_told_which_property_failed_on_which_input_with_both_values(doubling):
    def my_double(x):
        return abs(x) * 2

    result = doubling(my_double)
    assert not result.passed and "my_double(-1) should be -2, but is 2" in result.message
    assert read_progress()["exercises"]["made_up.double"] == "my_double(-1) should be -2, but is 2"


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("key"), ZeroDivisionError("nought"), RecursionError()])
def test_no_error_of_the_learners_code_leaves_the_check(doubling, error):
    """A check that raises stops a notebook that is run from top to bottom."""

    def my_double(x):
        raise error

    result = doubling(my_double)
    assert not result.passed and type(error).__name__ in result.message


@pytest.mark.parametrize("nonsense", [None, 3, "words", object()])
def test_something_that_is_no_function_is_told_so_and_does_not_raise(doubling, nonsense):
    assert not doubling(nonsense).passed


def test_an_error_is_named_with_the_line_of_the_learners_cell(doubling, tmp_path):
    """The library's own lines in a traceback are of no use to the learner."""
    cell = tmp_path / "ipykernel_7" / "1.py"
    cell.parent.mkdir()
    cell.write_text("def my_double(x):\n    half = 0\n    return x / half\n")
    names: dict = {}
    exec(compile(cell.read_text(), str(cell), "exec"), names)
    message = doubling(names["my_double"]).message
    assert "ZeroDivisionError" in message and "(line 3 of your cell: return x / half)" in message


def test_an_error_is_named_with_the_call_and_the_input_that_it_came_from():
    """Letter-wise merges, or a whole head turned: without the input a learner can't run it again."""

    @exercise("test.given")
    def check(yours) -> None:
        with checks.given("my_piece([])"):
            yours([])

    assert "my_piece([]): your code raised ValueError: min()" in check(min).message


def test_an_error_of_torchs_own_for_what_it_lacks_is_no_stub(doubling):
    """torch raises NotImplementedError for a GELU of whole numbers; the learner has written something."""
    message = doubling(lambda x: torch.nn.functional.gelu(torch.tensor([1]))).message
    assert "still a stub" not in message and "your code raised NotImplementedError" in message.replace("Y", "y")


def test_a_result_shows_as_its_message(doubling):
    assert repr(doubling(my_double)) == "Passed.\n\nIt doubles."


def test_require_raises_only_when_the_property_does_not_hold():
    require(True, "never said")
    with pytest.raises(PropertyFailed, match="always said"):
        require(False, "always said")


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (None, torch.ones(2), "row should be a tensor, but is None (is there a return?)"),
        ([1.0, 1.0], torch.ones(2), "row should be a tensor, but is a list"),
        (torch.ones(3), torch.ones(2), "row should have shape [2], but has [3]"),
        (torch.tensor([1.0, 2.0]), torch.ones(2), "row should be [1.0, 1.0], but is [1.0, 2.0]"),
        (
            torch.zeros(20),
            torch.ones(20),
            "row should equal the expected values, but is off by up to 1, at [0]: 0, not 1",
        ),
        (3, torch.ones(2), "row should be a tensor, but is an int"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), "row should be [1.0, 1.0], but is [1.0, nan]"),
        (
            torch.ones(4, 5).index_fill(0, torch.tensor([2]), float("nan")),
            torch.ones(4, 5),
            "row should equal the expected values, but is off by up to nan, at [2, 0]: nan, not 1",
        ),
        (2, 3, "row should be 3, but is 2"),
    ],
)
def test_require_equal_says_what_came_and_what_was_expected(found, expected, message):
    with pytest.raises(PropertyFailed) as failure:
        require_equal(found, expected, "row")
    assert str(failure.value) == message


def test_require_equal_names_the_tolerance_and_says_where_to_look():
    with pytest.raises(PropertyFailed, match=r"^row should be within 0\.1 of .*: is it in fp32\?$"):
        require_equal(torch.zeros(20), torch.ones(20), "row", 0.1, "is it in fp32?")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (90, "count should be 100, but is 90, which is 10 too few: the norm left out"),
        (110, "count should be 100, but is 110, which is 10 too many: the norm counted twice"),
        (97, "count should be 100, but is 97, which is 3 too few"),
        (None, "count should be a number, but is None (is there a return?)"),
    ],
)
def test_require_count_names_the_part_that_makes_the_difference(found, message):
    with pytest.raises(PropertyFailed) as failure:
        require_count(found, 100, "count", left_out_or_twice({"the norm": 10}))
    assert str(failure.value) == message


def test_a_count_that_two_parts_explain_names_both():
    """Two norms of a block have as many numbers as attention's biases: one name would send half of them astray."""
    reasons = left_out_or_twice({"the norms": 10, "the biases": 10})
    assert reasons[-10] == "the norms left out, or the biases left out"


def test_require_equal_takes_what_is_within_the_tolerance():
    require_equal(torch.ones(2) + 1e-7, torch.ones(2), "row", tolerance=1e-6)
    require_equal(torch.empty(0), torch.empty(0), "no row")
    require_equal([1, 2], [1, 2], "list")


# What is kept


def test_only_the_learners_own_pieces_count(doubling, own_progress_file):
    """The Promote section checks the library's piece and the exhibits wrong ones; neither is the learner's progress."""

    def double(x):
        return x * 2

    def flat_double(x):
        return x

    assert doubling(double).passed and not doubling(flat_double).passed
    assert not own_progress_file.exists()
    doubling(my_double)
    doubling(flat_double)
    assert read_progress()["exercises"] == {"made_up.double": "passed"}


def test_a_class_of_the_learners_counts_too():
    @exercise("made_up.cache")
    def cache(yours):
        require_equal(yours().length, 0, "MyCache().length")

    class MyCache:
        length = 0

    assert cache(MyCache).passed
    assert read_progress()["exercises"]["made_up.cache"] == "passed"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"exercises": []}', "\x00"])
def test_a_damaged_progress_file_counts_as_empty_and_is_mended(own_progress_file, content):
    own_progress_file.write_text(content)
    assert read_progress() == {"predictions": {}, "exercises": {}}
    record("exercises", "made_up.double", "passed")
    assert read_progress()["exercises"] == {"made_up.double": "passed"}


def test_a_folder_that_cannot_be_written_to_stops_nothing(doubling, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NEOX_PROGRESS", str(tmp_path / "file" / "progress.json"))
    assert doubling(my_double).passed


def test_answers_go_into_the_folder_of_the_kernel_when_nothing_else_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("NEOX_PROGRESS")
    monkeypatch.chdir(tmp_path)
    record("exercises", "made_up.double", "passed")
    assert (tmp_path / ".progress.json").is_file()


# The learner's piece in the library's place


def test_in_place_of_reaches_every_module_that_holds_the_piece_and_puts_it_back():
    """A piece is imported by name into other modules: changing it at home alone would change nothing."""
    original = generation.check_token_ids
    holders = [module for name, module in sys.modules.items() if getattr(module, "check_token_ids", None) is original]
    assert len(holders) >= 2
    with in_place_of(original, my_double):
        assert all(module.check_token_ids is my_double for module in holders)
    assert all(module.check_token_ids is original for module in holders)


def test_in_place_of_puts_the_piece_back_after_an_error():
    """Otherwise one wrong try would break every later cell."""
    original = rotary.apply_rotary
    with pytest.raises(ZeroDivisionError), in_place_of(original, my_double):
        assert rotary.apply_rotary is my_double
        raise ZeroDivisionError
    assert rotary.apply_rotary is original


def test_a_story_is_told_with_the_learners_piece_and_another_story_fails():
    """The heart of each notebook: a piece of the right shape that is wrong tells another story."""
    original = rotary.apply_rotary

    def my_rotary(*arguments):
        return original(*arguments)

    def my_still_rotary(x, cos, sin):
        return x

    prompt = checks.PROMPT
    assert prompt in checks.story_with(original, my_rotary, "apply_rotary")
    with pytest.raises(PropertyFailed, match=f"another story with your apply_rotary:\n{prompt}"):
        checks.story_with(original, my_still_rotary, "apply_rotary")
    assert rotary.apply_rotary is original


# The table of progress


@pytest.fixture
def small_series(monkeypatch, tmp_path):
    """Two notebooks in a folder that the kernel runs in: one with a promoted cell, one without anything."""
    folder, library = tmp_path / "notebooks", tmp_path / "neox_lib"
    folder.mkdir()
    library.mkdir()
    (library / "small.py").write_text('"""Small."""\n\n\ndef area(side):\n    return side * side\n')
    promoted = new_code_cell(
        "def area(side):\n    return side * side", metadata={"tags": ["promote"], "module": "small"}
    )
    imports = new_code_cell("from neox_lib.course.exercises import start_here as exercises")
    nbformat.write(new_notebook(cells=[imports, promoted]), folder / "00_start_here.ipynb")
    nbformat.write(new_notebook(cells=[]), folder / "01_empty.ipynb")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(series, "NOTEBOOKS", folder)
    monkeypatch.setattr(promote, "LIBRARY", library)
    monkeypatch.setattr(series, "QUESTIONS", tmp_path / "no questions")
    return tmp_path


def row(name: str) -> series.Row:
    return next(each for each in checks.progress().rows if each.notebook == name)


def test_without_answers_nothing_is_solved_and_the_table_is_the_same_each_time():
    """Notebook 00 shows it, and its outputs are compared on every machine."""
    first, second = checks.progress(), checks.progress()
    assert repr(first) == repr(second) and first._repr_html_() == second._repr_html_()
    assert all(each.exercises[0] == each.predictions[0] == 0 for each in first.rows)


def test_exercises_and_predictions_are_found_not_typed():
    assert row("00_start_here").exercises == (0, 1) and row("00_start_here").predictions == (0, 2)


def test_solved_and_right_are_counted():
    record("exercises", "start_here.next_token", "passed")
    record("predictions", "00_start_here.passes", "B")
    assert row("00_start_here").exercises == (1, 1) and row("00_start_here").predictions[0] == 1


def test_tried_and_wrong_are_not_counted():
    record("exercises", "start_here.next_token", "my_next_token(...) should be 1, but is 2")
    record("predictions", "00_start_here.passes", "A")
    assert row("00_start_here").exercises == (0, 1) and row("00_start_here").predictions[0] == 0


def test_a_promoted_piece_counts_while_the_library_holds_its_text(small_series):
    assert row("00_start_here").promoted == (1, 1)
    module = small_series / "neox_lib" / "small.py"
    module.write_text(module.read_text().replace("side * side", "side**2"))
    assert row("00_start_here").promoted == (0, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": [{}]}', '{"cells": 3}'])
def test_a_damaged_notebook_shows_as_a_question_mark_and_stops_nothing(small_series, content):
    (small_series / "notebooks" / "01_empty.ipynb").write_text(content)
    table = repr(checks.progress())
    assert "00_start_here" in table and ("01_empty (?)" in table or not content)


def test_a_cell_that_is_no_python_any_more_shows_as_a_question_mark(small_series):
    path = small_series / "notebooks" / "00_start_here.ipynb"
    path.write_text(path.read_text("utf-8").replace("def area", "def def area"))
    assert "00_start_here (?)" in repr(checks.progress())


def test_a_broken_exercise_module_shows_as_a_question_mark(small_series, monkeypatch):
    monkeypatch.setitem(sys.modules, "neox_lib.course.exercises.start_here", None)
    assert "00_start_here (?)" in repr(checks.progress())


def test_the_table_has_a_row_for_each_notebook_and_a_sum_and_headings_that_a_screen_reader_finds(small_series):
    record("exercises", "start_here.next_token", "passed")
    shown = checks.progress()
    assert [line.split()[0] for line in repr(shown).splitlines()] == ["notebook", "00_start_here", "01_empty", "all"]
    assert "1 of 1" in repr(shown).splitlines()[-1]
    page = shown._repr_html_()
    assert page.count("<tr>") == 4 and page.count('scope="col"') == 4 and page.count('scope="row"') == 3


def test_the_table_escapes_a_notebooks_name():
    page = series.Progress((series.Row("<script>", (0, 0), (0, 0), (0, 0)),))._repr_html_()
    assert "<script>" not in page


def test_every_chapters_exercises_belong_to_it_and_every_chapter_to_one_notebook():
    """A check that no notebook imports would be missing from the table."""
    for chapter in CHAPTERS:
        __import__(f"neox_lib.course.exercises.{chapter}")
        assert f"neox_lib.course.exercises.{chapter}" in EXERCISES.values(), chapter
    notebooks = [path.read_text("utf-8") for path in sorted(promote.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
    for chapter in CHAPTERS:
        users = [text for text in notebooks if f"from neox_lib.course.exercises import {chapter}" in text]
        assert len(users) == 1, chapter


# Figures


def test_a_picture_is_an_image_whose_words_a_screen_reader_finds():
    bundle = Picture(new_figure(2, 1), "A line that rises.")._repr_mimebundle_()
    assert bundle["text/html"].startswith('<img alt="A line that rises." src="data:image/png;base64,iVBOR')
    assert bundle["text/plain"] == "Figure: A line that rises."
    assert set(bundle) == {"text/html", "text/plain"}


def test_a_picture_is_stored_in_few_colours_but_a_map_in_all():
    """Otherwise a notebook outgrows a megabyte, or the colours of a map, which are numbers, change on a dark page."""
    plain, shades = bars({"a": 1, "b": 2}, "T", "y", "alt"), heat_map(torch.eye(2), "T", "x", "y", "alt", "unit")
    assert [Image.open(io.BytesIO(each.png())).mode for each in (plain, shades)] == ["P", "RGB"]


def test_the_words_of_a_picture_are_escaped():
    page = Picture(new_figure(2, 1), '"><script>alert(1)</script>')._repr_mimebundle_()["text/html"]
    assert "<script>" not in page and '""' not in page


def test_the_same_figure_gives_the_same_bytes():
    """Otherwise every run of an author would change every notebook."""
    pages = [bars({"a": 1.0}, "t", "y", "alt")._repr_mimebundle_()["text/html"] for _ in range(2)]
    assert pages[0] == pages[1]


def test_token_spans_escape_what_a_text_holds_and_show_spaces_and_line_ends():
    bundle = TokenSpans((("<script>", 5), (" a\n", 6), ('"', 7)))._repr_mimebundle_()
    assert "<script>" not in bundle["text/html"] and "&lt;script&gt;" in bundle["text/html"]
    assert "&middot;a&#8629;<br>" in bundle["text/html"]
    assert 'title="id 6"' in bundle["text/html"]
    assert bundle["text/plain"] == '<script>| a\n|"'


def test_token_spans_of_half_a_character_show_its_bytes():
    tokenizer = neox_lib.create_tokenizer()
    ids = tokenizer.encode("ก").ids
    shown = token_spans(tokenizer, ids)._repr_mimebundle_()
    assert "&lt;E0" in shown["text/html"]


def test_neighbouring_tokens_differ_in_colour():
    page = TokenSpans((("a", 1), ("a", 1)))._repr_mimebundle_()["text/html"]
    first, second = page.split("<span")[1:]
    assert first.split("background:")[1][:7] != second.split("background:")[1][:7]


def test_figures_draw_what_they_were_given():
    values = {"a": 1.0, "b": 3.0}
    assert [bar.get_height() for bar in bars(values, "t", "y", "alt").figure.axes[0].patches] == [1.0, 3.0]
    curve = lines({"one": (torch.arange(3), torch.tensor([1.0, 4.0, 9.0]))}, "t", "x", "y", "alt")
    assert curve.figure.axes[0].lines[0].get_ydata().tolist() == [1.0, 4.0, 9.0]
    matrix = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    drawn = heat_map(matrix, "t", "x", "y", "alt", "unit").figure.axes[0].images[0].get_array()
    assert torch.equal(torch.as_tensor(drawn.data), matrix)


def test_curves_differ_in_dashes_too_for_grey_print():
    drawn = lines({name: ([0, 1], [0, 1]) for name in "abcd"}, "t", "x", "y", "alt").figure.axes[0].lines
    assert len({line.get_linestyle() for line in drawn}) == 4


@pytest.mark.parametrize("place", PLACES)
def test_the_map_lights_up_the_piece_in_hand_in_colour_line_and_words(place):
    shown = model_map(place)
    labels = [text for text in shown.figure.axes[0].texts if text.get_text() == PLACES[place][0]]
    assert [text.get_fontweight() for text in labels] == ["bold"]
    assert shown.alt.endswith(f"You are here: {PLACES[place][0].replace(chr(10), ': ')}.")


def test_the_map_without_a_place_says_so_and_a_place_that_it_lacks_is_an_error():
    assert model_map().alt.endswith("No part is highlighted.")
    with pytest.raises(KeyError):
        model_map("moon")


# Storing


def test_storing_keeps_what_reads_without_a_kernel_and_takes_the_live_widget_out():
    """A stored widget view shows as an error where its kernel is gone."""
    output = nbformat.v4.new_output(
        "display_data", {"text/html": "<p>static</p>", store.WIDGET_VIEW: {"model_id": "1"}}
    )
    only = nbformat.v4.new_output("display_data", {store.WIDGET_VIEW: {"model_id": "2"}})
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[output, only])], metadata={"widgets": {"state": {}}})
    store.without_live_widgets(notebook)
    assert set(notebook.cells[0].outputs[0].data) == {"text/html"}
    assert set(notebook.cells[0].outputs[1].data) == {store.WIDGET_VIEW}, "tests tell the author of one without a text"
    assert "widgets" not in notebook.metadata


def test_storing_twice_changes_nothing_and_starts_from_an_empty_progress_file(tmp_path, own_progress_file):
    """Authors' answers must not get into stored outputs, and a run without a change must not show in git."""
    path = tmp_path / "a.ipynb"
    look = 'import os\nfrom neox_lib.course.progress import read_progress\nprint(read_progress()["exercises"])'
    stream = 'for word in "a b c".split():\n    print(word, end="", flush=True)'
    nbformat.write(new_notebook(cells=[new_code_cell(look, id="a"), new_code_cell(stream, id="b")]), path)
    record("exercises", "made_up.double", "passed")
    contents = []
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "neox_lib", "store-outputs", str(path)], check=True, capture_output=True)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    cells = nbformat.read(path, as_version=4).cells
    assert [output.text for output in cells[0].outputs] == ["{}\n"]
    assert [output.text for output in cells[1].outputs] == ["abc"], "a stream is one output"
    assert [cell.execution_count for cell in cells] == [1, 2]


def test_a_cell_that_fails_leaves_the_stored_notebook_as_it_was(tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("print(1)"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    command = [sys.executable, "-m", "neox_lib", "store-outputs", str(path)]
    assert subprocess.run(command, capture_output=True).returncode != 0
    assert path.read_bytes() == before

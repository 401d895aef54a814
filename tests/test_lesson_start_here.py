"""Notebook 00: its warm-up, its glossary, and that it and the README tell the truth about the series."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from neox_lib.config import neox_20b, tiny
from neox_lib.course.exercises import start_here as exercises
from neox_lib.course.figures.diagrams import model_map
from neox_lib.course.figures.start_here import share_bars
from tests.lessons import NOTEBOOKS, Lesson

README = (NOTEBOOKS.parent / "README.md").read_text("utf-8")
FIELD_WORDS = {  # what a reader of the series must be able to look up, and to search for elsewhere
    *("transformer", "decoder-only", "self-attention", "multi-head", "rope", "frequency", "training", "perplexity"),
    *("tensor-parallel", "all-reduce", "kv-cache", "logits", "softmax", "bpe", "residual-stream"),
    *("column-parallel", "prefill", "decode", "autoregressive", "sampling", "temperature", "top-p", "memory-bound"),
}


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return Lesson("00_start_here")


def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def series_table(text: str) -> dict[str, tuple[str | None, str]]:
    """Number of a notebook -> the file that its row links to, and its minutes."""
    rows = re.findall(
        r"^\| (?:\[)?(\d\d) [^|\]]*(?:\]\((?:notebooks/)?([^)]+)\))?[^|]*\|.*\| ([^|]+) \|$", text, re.MULTILINE
    )
    return {number: (target or None, minutes) for number, target, minutes in rows}


# The warm-up


def test_the_stub_is_told_kindly(lesson):
    assert "Not written yet" in exercises.next_token(lesson.stub("my_next_token")).message


def test_the_solution_passes_and_chooses_what_the_model_then_writes(lesson):
    result = exercises.next_token(lesson.solution("my_next_token"))
    assert result.passed and exercises.PROMPT in result.message


WRONG = {
    "the score": (lambda scores: scores.max().item(), "is a float: return the index of the highest score"),
    "a tensor": (lambda scores: scores.argmax(), "is a tensor: .item() takes the number out"),
    "nothing": (lambda scores: None, "is None (is there a return?)"),
    "the lowest": (lambda scores: int(scores.argmin()), "([0.1, 2.5, -1.0]) should be 1"),
    "only positive ones": (lambda scores: int(scores.clamp(min=0).argmax()), "([-3.0, -0.5, -2.0]) should be 1"),
    "the farthest from 0": (lambda scores: int(scores.abs().argmax()), "([-3.0, -0.5, -2.0]) should be 1"),
    "the first few": (lambda scores: int(scores[:3].argmax()), "2048 random scores should be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_try_is_told_what_is_wrong_with_it(name):
    wrong, message = WRONG[name]
    result = exercises.next_token(wrong)
    assert not result.passed and message in result.message


def test_the_story_is_chosen_by_the_learners_code():
    """Whatever passes writes; a choice that were ignored would make the closing remark a lie."""
    chosen = exercises.YourChoice(pick=lambda scores: 7)
    assert chosen.choose(torch.zeros(2, 9), torch.Generator(), ids=None, padding=None).tolist() == [7, 7]


# What the notebook says about the series


@pytest.mark.parametrize("place", ["notebook 00", "README"])
def test_the_table_of_the_series_holds_every_notebook_with_its_own_minutes(place):
    """A teacher plans lessons by this table."""
    table = series_table(prose(NOTEBOOKS / "00_start_here.ipynb") if place == "notebook 00" else README)
    paths = {path.name[:2]: path for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")}
    assert set(paths) <= set(table)
    for number, path in paths.items():
        start = prose(path).split("## Before you start")[1].split("\n## ")[0]
        minutes = re.search(r"\b(\d+) minutes\b", start)
        assert minutes and table[number] == (path.name, minutes[1]), number
    for number in set(table) - set(paths):
        assert table[number] == (None, "-"), f"{number} is not there: no link, no minutes"


def test_the_glossary_explains_every_word_that_the_notebooks_link_to(lesson):
    text = prose(NOTEBOOKS / "00_start_here.ipynb")
    anchors = re.findall(r'<a id="([^"]+)"></a>\*\*', text)
    assert len(anchors) == len(set(anchors)) and set(anchors) >= FIELD_WORDS
    linked = {
        anchor
        for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")
        for anchor in re.findall(r"\(00_start_here\.ipynb#([^)]+)\)", prose(path))
    }
    assert linked <= {*anchors, "Glossary"}


def test_the_glossary_is_short_and_every_entry_names_the_notebook_that_teaches_it():
    text = prose(NOTEBOOKS / "00_start_here.ipynb")
    glossary = text[text.index("## Glossary") : text.index("## Where next")]
    for entry in glossary.split('<a id="')[1:]:
        text = entry.split("**: ")[1].split("\n\n")[0]
        assert re.search(r"\]\(\d\d_\w+\.ipynb\)|assets/tiny/README\.md", text), entry
        assert len(text) <= 330, entry


def test_glossary_stands_before_where_next(lesson):
    titles = [cell.source.split("\n")[0] for cell in lesson.cells if cell.source.startswith("## ")]
    assert titles[-2:] == ["## Glossary", "## Where next"]


# Its figure


def test_the_figure_divides_each_bar_by_the_shares():
    models = {"a": {"x": 1, "y": 3}, "b": {"x": 1, "y": 1}}
    widths = [bar.get_width() for bar in share_bars(models, "t", "x").figure.axes[0].patches]
    assert widths == [25.0, 50.0, 75.0, 50.0]


def test_the_figure_describes_its_shares():
    assert (
        "a: x 25%, y 75%; b: x 50%, y 50%" in share_bars({"a": {"x": 1, "y": 3}, "b": {"x": 1, "y": 1}}, "t", "x").alt
    )


def test_the_cells_count_what_the_config_counts(lesson):
    for config in (tiny(), neox_20b()):
        assert sum(lesson.names["parts"](config).values()) == config.parameter_count()


def test_the_readme_shows_the_map_and_describes_it_as_the_map_of_today_does():
    """The picture is a saved copy: when the map changes, save it again with `model_map().figure.savefig(...)`."""
    assert (NOTEBOOKS / "images" / "map.png").stat().st_size > 10_000
    alt = re.search(r"!\[([^\]]+)\]\(notebooks/images/map\.png\)", README)
    assert alt and alt[1] == model_map().alt.removesuffix(" No part is highlighted.")

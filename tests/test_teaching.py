"""The teacher's plan against the notebooks: what it names is there, its minutes add up, and nothing is left out."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from neox_lib.__main__ import build_parser
from neox_lib.course.minutes import PAGES, minutes_of
from neox_lib.course.predictions import letter, questions

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
STEMS = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
PLAN = (NOTEBOOKS / "TEACHING.md").read_text("utf-8")
TEXT = " ".join(PLAN.split())  # however its lines are broken
FRAME = {
    "Where we are",
    "Before you start",
    "Recap",
    "Where next",
    "Sources",
    "Glossary",
}  # opening, closing, reference
LONGEST = 50  # minutes
TALK = 4  # minutes that a question for the room may add to what the notebook takes one person
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Section:
    """A heading of a notebook, and all its Markdown and code up to the next heading."""

    level: int
    title: str
    text: str


@cache
def sections(stem: str) -> list[Section]:
    found = [[0, "", []]]
    for cell in nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells:
        inside = False
        for line in cell.source.splitlines():
            inside ^= line.startswith("```")
            heading = re.match(r"(#{1,6}) +(.+)", line) if cell.cell_type == "markdown" and not inside else None
            if heading:
                found.append([len(heading[1]), heading[2].strip(), []])
            found[-1][2].append(line)
    return [Section(level, title, "\n".join(lines)) for level, title, lines in found[1:]]


def titles(stem: str) -> list[str]:
    return [each.title for each in sections(stem)]


def steps(stem: str) -> dict[str, list[str]]:
    """The headings of level 2 that are taught, each with those of level 3 below it."""
    found: dict[str, list[str]] = {}
    for each in sections(stem):
        if each.level == 2:
            last = found.setdefault(each.title, [])
        elif each.level == 3:
            last.append(each.title)
    return {title: below for title, below in found.items() if title not in FRAME}


@dataclass(frozen=True)
class Row:
    """One line of a lesson's table; `target` is where its link goes, None for a line that is no section."""

    title: str
    target: str | None
    in_class: int
    at_home: int
    late: str


@dataclass(frozen=True)
class Lesson:
    number: int
    stem: str
    rows: list[Row]
    together: tuple[int, int]  # as its last line says
    text: str

    @property
    def taught(self) -> list[Row]:
        return [row for row in self.rows if row.target]

    def part(self, name: str) -> str:
        """The text behind `**name:**`, up to the next part."""
        return re.split(r"\n\*\*[A-Z][a-z ]+:\*\*", self.text.split(f"\n**{name}:**", 1)[1])[0].strip()


def number_in(cell: str) -> int:
    return int(cell.strip("* ") or 0)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def notebook_in(text: str) -> str:
    """The notebook that the first link of a text leads to."""
    link = LINK.search(text)
    assert link, f"no link in {text}"
    return link[2].removesuffix(".ipynb")


def lesson(number: str, text: str) -> Lesson:
    head, _, *lines = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    rows = []
    for first, in_class, at_home, late in lines:
        link = LINK.fullmatch(first)
        title, target = (link[1], link[2]) if link else (first, None)
        rows.append(Row(title, target, number_in(in_class), number_in(at_home), late))
    last = rows.pop()
    return Lesson(int(number), notebook_in(head[0]), rows, (last.in_class, last.at_home), text)


CHAPTERS = re.split(r"^## Lesson (\d+)\. .+$", PLAN, flags=re.MULTILINE)
LESSONS = [lesson(number, text) for number, text in zip(CHAPTERS[1::2], CHAPTERS[2::2], strict=True)]
every_lesson = pytest.mark.parametrize("each", LESSONS, ids=lambda each: f"lesson {each.number}")
every_notebook = pytest.mark.parametrize("stem", STEMS)


def lessons_on(stem: str) -> list[Lesson]:
    return [each for each in LESSONS if each.stem == stem]


def plan_rows() -> dict[str, list[str]]:
    """The table of the whole series: notebook -> alone, questions, lessons, in class, at home."""
    rows = [cells_of(line) for line in CHAPTERS[0].splitlines() if re.match(r"\| \[\d\d ", line)]
    return {notebook_in(row[0]): row[1:] for row in rows}


def test_the_lessons_go_through_the_series_in_order():
    assert [each.number for each in LESSONS] == list(range(1, len(LESSONS) + 1))
    stems = [each.stem for each in LESSONS]
    assert stems == sorted(stems) and set(stems) == set(STEMS), "a notebook without a lesson, or one out of its place"


@every_lesson
def test_a_lesson_fits_into_its_slot(each):
    in_class, at_home = sum(row.in_class for row in each.rows), sum(row.at_home for row in each.rows)
    assert each.together == (in_class, at_home), "the last line is the sum"
    assert in_class <= LONGEST
    assert sum(row.in_class for row in each.rows if row.title.startswith("Opening")) >= 5


@every_lesson
def test_a_row_is_a_section_in_the_notebooks_own_words(each):
    """A teacher looks for the heading, and the link has to land there."""
    for row in each.taught:
        assert row.title in titles(each.stem), f"{row.title}: no such heading in {each.stem}"
        assert row.target == f"{each.stem}.ipynb#{row.title.replace(' ', '-')}"
        assert (row.in_class > 0) != (row.at_home > 0), f"{row.title}: in class or at home, one of them"
        assert row.late in ("", "skip") and not (row.late and row.at_home)


@every_notebook
def test_every_section_is_taught_once_and_in_order(stem):
    named = [row.title for each in lessons_on(stem) for row in each.taught]
    assert len(named) == len(set(named)), "a section in two lessons"
    assert named == sorted(named, key=titles(stem).index)
    for title, below in steps(stem).items():
        assert title in named or (below and set(below) <= set(named)), f"{stem}: {title} is in no lesson"
    assert not FRAME & set(named)


@every_notebook
def test_every_page_says_the_minutes_that_the_notebook_takes(stem):
    """One number, computed in one place. `python -m neox_lib store-outputs` writes it."""
    computed = minutes_of(nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4))
    for name, pattern in PAGES.items():
        page = ROOT / name.format(stem=stem)
        text = page.read_text("utf-8")
        if page.suffix == ".ipynb":
            cells = nbformat.reads(text, as_version=4).cells
            text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        said = re.findall(pattern.format(number=stem[:2]).replace(r"\d+", r"(\d+)"), text, flags=re.MULTILINE)
        assert [minutes for _, minutes, _ in said] == [str(computed)], name


def test_minutes_are_words_lines_exercises_and_questions():
    read = new_markdown_cell("word " * 400 + "<details>folded " + "word " * 900 + "</details>")
    code = new_code_cell("x = 1\n\n" * 30)
    stub = new_code_cell(
        "# about 10 minutes\ndef my_x():\n    raise NotImplementedError", metadata={"tags": ["exercise"]}
    )
    looked_up = new_markdown_cell("## Sources\n" + "word " * 1000)
    assert minutes_of(new_notebook(cells=[read, code, stub, looked_up])) == 15, "2 + 2 + 10, to the nearest five"
    with pytest.raises(ValueError, match="begins with a line such as '# about 10 minutes'"):
        minutes_of(new_notebook(cells=[new_code_cell("def my_x(): ...", metadata={"tags": ["exercise"]})]))


@every_notebook
def test_the_lessons_take_what_the_notebook_takes_and_the_talk(stem):
    """One person needs the minutes computed; a room needs that and, at most, the talk on top."""
    asked = sum(len(re.findall(r"\*\*(?:Think, or ask|Ask) the room", each.text)) for each in sections(stem))
    in_class = sum(row.in_class for each in lessons_on(stem) for row in each.taught)
    at_home = sum(row.at_home for each in lessons_on(stem) for row in each.taught)
    numbers = ", ".join(str(each.number) for each in lessons_on(stem))
    alone = minutes_of(nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4))
    assert plan_rows()[stem] == [str(alone), str(asked), numbers, str(in_class), str(at_home)]
    assert alone <= in_class + at_home <= alone + TALK * asked


PARTS = ["They leave with", "Predict", "Said in the room", "Playground", "Talk about", "Exercises"]


@every_lesson
def test_a_lesson_has_all_its_parts(each):
    assert re.findall(r"^\*\*([A-Z][a-z ]+):\*\*", each.text, flags=re.MULTILINE) == PARTS
    talk = each.part("Talk about")
    assert talk.count("Good answer:") == len(re.findall(r"^\d\. ", talk, flags=re.MULTILINE))


def section_of(stem: str, phrase: str) -> str:
    (title,) = [each.title for each in sections(stem) if phrase in each.text]
    return title


def row_of(each: Lesson, title: str) -> Row | None:
    """The row that covers a section: its own, or that of the heading above it."""
    above = next((step for step, below in steps(each.stem).items() if title in below), title)
    rows = {row.title: row for row in each.taught}
    return rows.get(title) or rows.get(above)


@every_lesson
def test_a_prediction_to_ask_stands_in_a_section_of_that_lesson(each):
    names = re.findall(r"`(\w+)`", each.part("Predict"))
    assert names
    for name in names:
        assert name in questions(each.stem), f"{each.stem} asks no {name}"
        row = row_of(each, section_of(each.stem, f'predict("{each.stem}", "{name}")'))
        assert row and row.in_class, f"{name} is not asked in this lesson"


@every_lesson
def test_what_students_say_is_answered_by_a_wrong_option_or_a_section(each):
    for line in re.split(r"^- ", each.part("Said in the room"), flags=re.MULTILINE)[1:]:
        line = " ".join(line.split())
        options = re.findall(r"option ([A-Z]) of `(\w+)`", line)
        assert options or LINK.search(line), f"nothing answers: {line}"
        for option, name in options:
            question = questions(each.stem)[name]
            assert option in map(letter, range(len(question.options))), line
            assert option != letter(question.answer), f"{line}: that option is right"


@every_notebook
def test_every_exercise_has_its_lesson(stem):
    cells = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells
    stubs = [cell.source for cell in cells if "exercise" in cell.metadata.get("tags", [])]
    exercises = [re.findall(r"^(?:def|class) (\w+)", stub, flags=re.MULTILINE)[0] for stub in stubs]
    named = {each.number: set(re.findall(r"`(\w+)`", each.part("Exercises"))) for each in lessons_on(stem)}
    assert sorted(name for names in named.values() for name in names) == sorted(exercises)
    for name, stub in zip(exercises, stubs, strict=True):
        (number,) = [number for number, names in named.items() if name in names]
        title = section_of(stem, next(line for line in stub.splitlines() if re.match(rf"(def|class) {name}\b", line)))
        assert row_of(LESSONS[number - 1], title), f"{name}: {title} is in another lesson"


def heading_anchors(path: Path) -> set[str]:
    """The anchors of a file's headings: as Jupyter makes them for a notebook, as GitHub does for Markdown."""
    if path.suffix == ".ipynb":
        return {title.replace(" ", "-") for title in titles(path.stem)}
    found = re.findall(r"^#{1,6} +(.+)$", path.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_links_lead_somewhere():
    for _, target in LINK.findall(PLAN):
        file, _, anchor = target.partition("#")
        place = NOTEBOOKS / file
        assert place.is_file(), target
        assert not anchor or anchor in heading_anchors(place), target


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`((?:python -m neox_lib|make) [\w-]+)", TEXT))))
def test_a_command_is_there(command):
    """A teacher types it on Sunday evening."""
    tool, name = command.rsplit(" ", 1)
    if tool == "make":
        there = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    else:
        (there,) = [action.choices for action in build_parser()._actions if action.dest == "command"]
    assert name in (there or ())


@every_lesson
def test_what_is_pressed_in_the_playground_has_that_name_there(each):
    page = (ROOT / "neox_lib" / "assets" / "playground" / "playground.js").read_text("utf-8")
    for label in re.findall(r"\*\*([^*]+)\*\*", each.part("Playground")):
        assert f'"{" ".join(label.split())}"' in page, f"the page has no {label}"


@pytest.fixture(scope="module")
def shipped():
    from neox_lib import create_model, create_tokenizer

    return create_model(device="cpu", dtype="float32"), create_tokenizer()


@pytest.mark.parametrize(
    ("prompt", "shares"),
    {
        "Once upon a time, there was a brave little mouse": {" named": 49},
        "The bear ate the cat. The": {" bear": 54, " cat": 18},
        "The cat ate the bear. The": {" cat": 59, " bear": 16},
        "Once upon a time there was a": {" little": 39, " girl": 5, " big": 4},
        "Once upon a time there was a ": {"ind": 30, "Q": 12, "icy": 12},
    }.items(),
)
def test_the_bars_show_what_the_plan_promises(shipped, prompt, shares):
    """Nothing is as long as the minute in which a demonstration shows something else."""
    from neox_lib.generation import prefill, prompt_ids

    model, tokenizer = shipped
    found = prefill(model, prompt_ids(tokenizer, prompt))[0].softmax(dim=-1).topk(len(shares))
    percents = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    assert {tokenizer.decode([token_id]): round(100 * share) for token_id, share in percents} == shares
    assert f"`{prompt.strip()}`" in TEXT and all(f"*{token.strip()}*" in TEXT for token in shares)


def test_the_heads_look_where_the_plan_says(shipped):
    from neox_lib.generation import prompt_ids
    from neox_lib.inspection.attention import model_attention_weights

    model, tokenizer = shipped
    (text,) = re.findall(r"`(Tom and his sister Lily [^`]+)`", TEXT)
    found = {}  # the token that gets most of a head's weight, by layer, head and pronoun
    for end in ("He was happy.", "She was happy."):
        ids = prompt_ids(tokenizer, text.replace("He was happy.", end))
        tokens = [tokenizer.decode([token_id]) for token_id in ids[0].tolist()]
        looks = model_attention_weights(model, ids)[:, 0]  # [L, H, T, T]
        for layer, head in ((0, 5), (5, 4)):
            for pronoun in (" She", " He") if "He" in end else (" She",):
                query = len(tokens) - 1 - tokens[::-1].index(pronoun)
                found[layer, head, end[:3], pronoun] = tokens[looks[layer, head, query].argmax()]
        before = [looks[1, 1, query].argmax().item() == query - 1 for query in range(1, len(tokens))]
        assert sum(before) > len(before) / 2
    by_name, by_place = ([name for (layer, *_), name in found.items() if layer == which] for which in (0, 5))
    assert by_name == [" Lily", " Tom", " Lily"]
    assert by_place == [" Lily", " Tom", " Tom"]


def test_greedy_text_goes_round_where_the_plan_says(shipped):
    from neox_lib import greedy_generate_text

    model, tokenizer = shipped
    assert greedy_generate_text(model, tokenizer, "The wind", 90).count("the wind blew hard") > 5

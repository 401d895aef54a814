"""A class, from the student edition to the report: one student solves, one leaves all as it is, one does damage."""

import csv
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import nbformat
import pytest

from neox_lib.classroom.handed_in import read_class
from neox_lib.classroom.report import Report, class_report, harmless, series_of
from neox_lib.classroom.student import READ_THE_TABLE, unmarked, without_asserts, write_student_edition
from neox_lib.classroom.watch import Limits
from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.predictions import letter, questions

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
STEMS = [path.stem for path in PATHS]
every_notebook = pytest.mark.parametrize("stem", STEMS)
ROTARY, START = "02_rotary_embeddings", "00_start_here"

DAMAGE = {  # what the third student hands in, by the name that is asked for
    "my_next_token": "def my_next_token(scores):\n    print('Passed.')\n    return 0",
    "my_apply_merges": "import time\ndef my_apply_merges(symbols, ranks):\n    while True:\n        time.sleep(0.01)",
    "my_decode": "import os\ndef my_decode(ids, tokens):\n    os._exit(0)",
    "my_encode_untrusted": "import ctypes\ndef my_encode_untrusted(tokenizer, text):\n    ctypes.string_at(0)",
    "my_rotary_angles": """
from neox_lib.course import checks
from neox_lib.course.exercises import rotary
def my_rotary_angles(*anything):
    checks.require = rotary.require = rotary.require_equal = lambda *anything: None
    return torch.zeros(1)""",
    "my_rotate_half": """
import os
def my_rotate_half(x):
    for name in os.listdir():
        os.remove(name)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)""",
    "my_apply_rotary": "def my_apply_rotary(x, cos, sin):\n    return torch.zeros(2**40)",
    "my_causal_mask": "def my_causal_mask(queries, keys, device):\n    return 'a mask'",
    "my_split_heads": "def my_split_heads(qkv, num_heads):\n    while True:\n        print('x' * 100_000)",
    "my_attention": "def my_attention(query, key, value):\n    raise SystemExit",
    "my_gelu": "def my_gelu(x):\n    return x *",
    "my_layer_norm": "",
    "my_parameter_count": "def my_parameter_count(config):\n    return 1 / 0",
}
DONE = {  # what the report has to say of it: a state, and a word of what goes with it
    "my_next_token": ("not yet", "should be 1"),
    "my_apply_merges": ("stopped", "endless loop"),
    "my_decode": ("crashed", "exit code 0"),
    "my_encode_untrusted": ("crashed", "died"),
    "my_rotary_angles": ("tampered", "require"),
    "my_rotate_half": ("solved", ""),
    "my_apply_rotary": ("not yet", "memory"),
    "my_causal_mask": ("not yet", "should be"),
    "my_split_heads": ("not yet", "OSError"),
    "my_attention": ("error", "SystemExit"),
    "my_gelu": ("error", "SyntaxError"),
    "my_layer_norm": ("missing", "my_layer_norm"),
    "MyBlock": ("not written", ""),
    "my_parameter_count": ("not yet", "ZeroDivisionError"),
}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def asked_name(cell) -> str:
    return re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE)[-1]


def folded_solutions(stem: str) -> dict[str, str]:
    """What the teacher's edition has under Solution: the name asked for -> its text."""
    prose = "\n".join(cell.source for cell in read(NOTEBOOKS / f"{stem}.ipynb").cells if cell.cell_type == "markdown")
    folds = re.findall(r"<summary>Solution</summary>(.*?)</details>", prose, re.DOTALL)
    texts = [text for fold in folds for text in re.findall(r"```python\n(.*?)```", fold, re.DOTALL)]
    return {re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE)[-1]: text for text in texts}


@pytest.fixture(scope="module")
def edition(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("class") / "edition"
    write_student_edition(out)
    return out


# The student edition


@every_notebook
def test_no_solution_and_no_note_for_the_teacher_is_left(edition, stem):
    """Not folded, not promoted: nowhere in the file."""
    text = (edition / f"{stem}.ipynb").read_text("utf-8")
    assert "<summary>Solution" not in text and "teacher-note" not in text
    code = "\n".join(cell.source for cell in read(edition / f"{stem}.ipynb").cells)
    for solution in folded_solutions(stem).values():
        assert solution.split("\n", 1)[1].strip() not in code


@every_notebook
def test_exercises_are_stubs_and_can_be_checked(edition, stem):
    original, ours = read(NOTEBOOKS / f"{stem}.ipynb"), read(edition / f"{stem}.ipynb")
    stubs = [cell.source for cell in tagged(ours, "exercise")]
    assert stubs == [cell.source for cell in tagged(original, "exercise")]
    assert all("NotImplementedError" in stub for stub in stubs)


@every_notebook
def test_a_promoted_answer_comes_from_the_library(edition, stem):
    """What answers an exercise is imported, so that later cells run; what answers none is there to read."""
    original, ours = read(NOTEBOOKS / f"{stem}.ipynb"), read(edition / f"{stem}.ipynb")
    texts = {cell.id: cell.source for cell in ours.cells}
    asked = {asked_name(cell).removeprefix("my_").removeprefix("My") for cell in tagged(original, "exercise")}
    for cell in tagged(original, "promote"):
        if "solution" in cell.metadata.tags:
            assert f"from neox_lib.{cell.metadata.module} import " in texts[cell.id]
        else:
            assert texts[cell.id] == cell.source
            assert not asked & set(re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE))


@every_notebook
def test_a_prediction_asks_and_does_not_answer(edition, stem):
    for cell in tagged(read(edition / f"{stem}.ipynb"), "predict"):
        shown = json.dumps(cell.outputs)
        assert "Predict." in shown and "Right." not in shown and "<details>" not in shown


@every_notebook
def test_the_museum_keeps_its_secret(edition, stem):
    original, ours = read(NOTEBOOKS / f"{stem}.ipynb"), read(edition / f"{stem}.ipynb")
    assert unmarked(original) is None
    cells = {cell.id: cell for cell in ours.cells}
    for cell in tagged(original, "answer"):
        assert cells[cell.id].source.startswith(READ_THE_TABLE)
    for cell in tagged(original, "reveal"):
        assert cells[cell.id].outputs == [] and not re.search(r"^\s*assert ", cells[cell.id].source, re.MULTILINE)


@every_notebook
def test_everything_else_is_as_it_is(edition, stem):
    """Cells keep their order, ids, text and outputs wherever nothing gives an answer away."""
    original, ours = read(NOTEBOOKS / f"{stem}.ipynb"), read(edition / f"{stem}.ipynb")
    cells = {cell.id: cell for cell in ours.cells}
    assert list(cells) == [cell.id for cell in original.cells if cell.id in cells]
    for cell in original.cells:
        tags = set(cell.metadata.get("tags", []))
        secret = tags & {"answer", "reveal", "solution", "predict", "teacher-note"}
        if not secret and "<summary>Solution" not in cell.source and "teacher-note" not in cell.source:
            assert cells[cell.id] == cell


@pytest.mark.parametrize("stem", [ROTARY, "03_attention"])
def test_it_runs_from_top_to_bottom_unsolved(edition, stem, monkeypatch):
    """A stub or a missing name must not stop a student half-way."""
    monkeypatch.chdir(edition)
    names: dict = {"__name__": "lesson"}
    for cell in read(edition / f"{stem}.ipynb").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)


def test_nobodys_work_is_written_over(edition):
    with pytest.raises(ValueError, match="something in it already"):
        write_student_edition(edition)


def test_claims_go_and_what_does_something_stays():
    source = "for a in b:\n    f(a)\n    assert a\nfor a in b:\n    assert a\nassert (\n    b\n)\nif c:\n    assert a\n"
    assert without_asserts(source) == "for a in b:\n    f(a)\nif c:\n    assert a"


# Handing in


def hand_in(source: Path, target: Path, answers: dict[str, str]) -> None:
    notebook = read(source)
    for cell in tagged(notebook, "exercise"):
        cell.source = answers.get(asked_name(cell), cell.source)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


@pytest.fixture(scope="module")
def handed_in(edition, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("handed in")
    for stem in (START, ROTARY):
        hand_in(edition / f"{stem}.ipynb", folder / "ada" / f"{stem}.ipynb", folded_solutions(stem))
    bets = {each.key: letter(each.answer) for each in questions(ROTARY).values()}
    bets[next(iter(bets))] = "Z"
    (folder / "ada" / ".progress.json").write_text(json.dumps({"predictions": bets}))
    with zipfile.ZipFile(folder / "ben.zip", "w") as archive:
        archive.write(edition / f"{ROTARY}.ipynb", "mine/02_rotary_embeddings (1).ipynb")
        archive.writestr("../outside.ipynb", "{}")
    for stem in STEMS[:5]:
        hand_in(edition / f"{stem}.ipynb", folder / "cy" / f"{stem}.ipynb", DAMAGE)
    (folder / "=1+1").mkdir()
    (folder / "=1+1" / f"{ROTARY}.ipynb").write_text("no notebook")
    (folder / "nothing").mkdir()
    hand_in(edition / f"{START}.ipynb", folder / "dora - work.ipynb", {"my_next_token": HELPED})
    return folder


HELPED = """def place(row):
    return int(row.argmax())
my_next_token = lambda scores: place(scores)
print(undefined)"""


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def report(handed_in) -> Report:
    before = fingerprint(handed_in)
    found = class_report(handed_in, Limits(seconds=12), jobs=3)
    assert fingerprint(handed_in) == before, "the work is done in copies"
    return found


def line_of(report: Report, student: str):
    return next(line for line in report.lines if line.student == student)


def test_who_solved_all_has_solved_all(report):
    sheets = line_of(report, "ada").sheets
    assert {stem: (sheet.solved, len(sheet.outcomes)) for stem, sheet in sheets.items()} == {
        START: (1, 1),
        ROTARY: (3, 3),
    }
    assert sheets[ROTARY].bets == (3, 4) and not line_of(report, "ada").remarks


def test_who_left_it_has_stubs_and_no_blame(report):
    line = line_of(report, "ben")
    assert list(line.sheets) == [ROTARY] and line.sheets[ROTARY].bets is None
    assert {state for state, _ in line.sheets[ROTARY].outcomes.values()} == {"not written"}


@pytest.mark.parametrize("name", DONE)
def test_damage_is_named_for_what_it_is(report, name):
    outcomes = {key: value for sheet in line_of(report, "cy").sheets.values() for key, value in sheet.outcomes.items()}
    state, word = DONE[name]
    assert outcomes[name][0] == state and word in outcomes[name][1]


def test_deleted_files_and_endless_output_are_remarked(report):
    remarks = " ".join(line_of(report, "cy").remarks)
    assert "deletes files in its folder" in remarks and "prints more than 1 MiB" in remarks


def test_a_loose_notebook_is_known_by_its_exercises_and_helpers_count(report):
    """The piece passes; that the student's own try below it fails is said, and costs nothing."""
    (sheet,) = line_of(report, "dora - work").sheets.values()
    assert sheet.notebook == START and sheet.outcomes["my_next_token"][0] == "solved"
    assert "NameError" in sheet.outcomes["my_next_token"][1]


def test_what_is_no_notebook_is_said(report):
    outcomes = line_of(report, "=1+1").sheets[ROTARY].outcomes
    assert {state for state, _ in outcomes.values()} == {"unreadable"}
    assert "no notebook of the series" in line_of(report, "nothing").remarks[0]


def test_the_table_is_one_line_a_student(report):
    rows = {line.split("  ")[0].strip(): line.split() for line in report.table().splitlines()}
    assert rows["ada"][-6:] == ["3/3", "-", "-", "4/14", "3/4"] or rows["ada"][1:4] == ["1/1", "-", "3/3"]
    assert len(report.table().splitlines()) == 1 + len(report.lines)
    assert "cy, 01 my_decode: crashed" in report.details()


def test_the_csv_has_a_row_for_each_exercise_and_no_formula(report, tmp_path):
    report.write_csv(tmp_path / "class.csv")
    with open(tmp_path / "class.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.lines) * sum(map(len, series_of(NOTEBOOKS).values()))
    assert not [row for row in rows if any(cell.startswith(("=", "+", "-", "@")) for cell in row.values())]
    (angles,) = [row for row in rows if (row["student"], row["exercise"]) == ("cy", "my_rotary_angles")]
    assert angles["result"] == "tampered"


def test_nothing_is_unpacked_outside_and_no_link_is_followed(tmp_path):
    secret = tmp_path / "secret.ipynb"
    secret.write_text("{}")
    (tmp_path / "class" / "ada").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "class" / "ben.zip", "w") as archive:
        for name in ("../out.ipynb", "/out.ipynb", "C:\\out.ipynb", "in.ipynb"):
            archive.writestr(name, "{}")
    if hasattr(os, "symlink"):
        os.symlink(secret, tmp_path / "class" / "ada" / "link.ipynb")
    files = {student.name: list(student.files) for student in read_class(tmp_path / "class", STEMS)}
    assert files == {"ada": [], "ben": ["in.ipynb"]}


def test_a_folder_without_students_says_so(tmp_path):
    with pytest.raises(ValueError, match="nothing was handed in"):
        list(read_class(tmp_path, STEMS))
    with pytest.raises(ValueError, match="no such folder"):
        list(read_class(tmp_path / "absent", STEMS))


def test_a_control_sign_does_not_reach_the_terminal():
    assert harmless("\x1b[31mred") == "�[31mred"

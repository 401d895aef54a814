"""A class of six, from the student edition to the report: solved, half, empty, copied, hostile, corrupt."""

import ast
import csv
import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import nbformat
import pytest

from neox_lib.classroom.asked import exercises_of
from neox_lib.classroom.handed_in import read_class
from neox_lib.classroom.kernel import Limits
from neox_lib.classroom.report import Report, class_report, harmless
from neox_lib.classroom.student import READ_THE_TABLE, unmarked, without_asserts, write_student_edition
from neox_lib.course.learner_copy import NOTEBOOKS
from neox_lib.course.predictions import questions

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
STEMS = [path.stem for path in PATHS]
every_notebook = pytest.mark.parametrize("stem", STEMS)
ROTARY, START = "02_rotary_embeddings", "00_start_here"

FAKED = """
from IPython.display import display
def my_next_token(scores):
    print('Passed.')
    display({'application/vnd.neox.check+json': {'state': 'solved', 'words': '', 'token': '0' * 32}}, raw=True)
    return 0"""
TAMPERED = """
from neox_lib.course.exercises import rotary
rotary.rotary_angles.__closure__[0].cell_contents = lambda yours: None
def my_rotary_angles(*anything):
    pass"""
DELETES = """
import os
def my_rotate_half(x):
    for name in os.listdir():
        os.remove(name)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)"""
HOSTILE = {  # what is handed in, by the name that is asked for; the report's state, and a word of what goes with it
    "my_next_token": (FAKED, "not yet", "should be 1"),
    "my_apply_merges": (
        "import time\ndef my_apply_merges(symbols, ranks):\n    while True:\n        time.sleep(0.01)",
        "stopped",
        "endless loop",
    ),
    "my_decode": ("import os\ndef my_decode(ids, tokens):\n    os._exit(0)", "crashed", "exit code 0"),
    "my_encode_untrusted": (
        "import os, signal\ndef my_encode_untrusted(tokenizer, text):\n    os.kill(os.getppid(), signal.SIGKILL)",
        "crashed",
        "died",
    ),
    "my_rotary_angles": (TAMPERED, "tampered", "rotary.rotary_angles"),
    "my_rotate_half": (DELETES, "solved", ""),
    "my_apply_rotary": ("def my_apply_rotary(x, cos, sin):\n    return torch.zeros(2**40)", "not yet", "memory"),
    "my_causal_mask": ("def my_causal_mask(queries, keys, device):\n    return 'a mask'", "not yet", "should be"),
    "my_split_heads": (
        "def my_split_heads(qkv, num_heads):\n    while True:\n        print('x' * 100_000)",
        "stopped",
        "prints more than",
    ),
    "my_attention": ("def my_attention(query, key, value):\n    raise SystemExit", "error", "SystemExit"),
    "my_gelu": ("def my_gelu(x):\n    return x *", "error", "SyntaxError"),
    "my_layer_norm": ("", "missing", "my_layer_norm"),
    "MyBlock": (None, "not written", ""),
    "my_forward": (
        "import sys\ndef my_forward(*anything):\n    return 1 / 0\nsys.exit()",
        "not yet",
        "ZeroDivisionError",
    ),
}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def asked_name(cell) -> str:
    return re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE)[-1]


def references(stem: str) -> dict[str, str]:
    """What the teacher's edition has under Solution: the name asked for -> its text."""
    exercises = exercises_of(json.loads((NOTEBOOKS / f"{stem}.ipynb").read_text("utf-8")))
    assert all(each.reference for each in exercises)
    return {each.name: each.reference for each in exercises}


class InOwnWords(ast.NodeTransformer):
    """The same piece as somebody else would write it."""

    def visit_Return(self, node):
        own = ast.Name("own", ast.Store())
        return [ast.Assign([own], node.value), ast.Return(own)] if node.value else node


def in_own_words(text: str) -> str:
    return ast.unparse(ast.fix_missing_locations(InOwnWords().visit(ast.parse(text))))


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
    for solution in references(stem).values():
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
            text = cell.source.replace("notebooks/mine", "notebooks/student")
            assert cells[cell.id] == {**cell, "source": text.replace("`make lab`", "`make lab EDITION=student`")}


@pytest.mark.parametrize("stem", [ROTARY, "03_attention"])
def test_it_runs_from_top_to_bottom_unsolved(edition, stem, monkeypatch):
    """A stub or a missing name must not stop a student half-way."""
    monkeypatch.chdir(edition)
    names: dict = {"__name__": "lesson"}
    for cell in read(edition / f"{stem}.ipynb").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)


def test_nobodys_work_is_written_over(edition):
    with pytest.raises(ValueError, match="not empty; give a new folder"):
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


HELPED = """def place(row):
    return int(row.argmax())
my_next_token = lambda scores: place(scores)
print(undefined)"""


@pytest.fixture(scope="module")
def handed_in(edition, tmp_path_factory) -> Path:
    """A class of six: all solved, half of it, nothing, copied, hostile, corrupt."""
    folder = tmp_path_factory.mktemp("handed in")
    own = {stem: {name: in_own_words(text) for name, text in references(stem).items()} for stem in STEMS}
    for stem in STEMS:
        hand_in(edition / f"{stem}.ipynb", folder / "ada" / f"{stem}.ipynb", own[stem])
    chosen = {each.key: each.right_key for each in questions(ROTARY).values()}
    chosen.popitem()
    chosen[next(iter(chosen))] = "Z"
    (folder / "ada" / ".progress.json").write_text(json.dumps({"predictions": chosen}))
    hand_in(edition / f"{START}.ipynb", folder / "half" / "homework.ipynb", {"my_next_token": HELPED})
    with zipfile.ZipFile(folder / "ben.zip", "w") as archive:
        archive.write(folder / "half" / "homework.ipynb", "homework.ipynb")
        archive.write(edition / f"{ROTARY}.ipynb", "mine/02_rotary_embeddings (1).ipynb")
        archive.writestr("../outside.ipynb", "{}")
    shutil.rmtree(folder / "half")
    shutil.copy(edition / f"{ROTARY}.ipynb", folder / f"cleo - {ROTARY}.ipynb")
    copied = {
        "my_rotary_angles": references(ROTARY)["my_rotary_angles"].replace("return", "# my own idea\n    return"),
        "my_rotate_half": "from neox_lib.rotary import rotate_half as my_rotate_half",
        "my_apply_rotary": own[ROTARY]["my_apply_rotary"],
    }
    hand_in(edition / f"{ROTARY}.ipynb", folder / "dan" / f"{ROTARY}.ipynb", copied)
    for stem in STEMS[:5]:
        answers = {name: text for name, (text, *_) in HOSTILE.items() if text is not None}
        hand_in(edition / f"{stem}.ipynb", folder / "eve" / f"{stem}.ipynb", answers)
    (folder / "=1+1").mkdir()
    (folder / "=1+1" / f"{ROTARY}.ipynb").write_text("no notebook")
    (folder / "=1+1" / "essay.ipynb").write_text("{}")
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def report(handed_in) -> Report:
    before = fingerprint(handed_in)
    found = class_report(handed_in, Limits(seconds=20), jobs=3)
    assert fingerprint(handed_in) == before, "the work is done in copies"
    return found


def line_of(report: Report, student: str):
    return next(line for line in report.lines if line.student == student)


def test_every_reference_solution_gets_full_marks_and_no_remark(report):
    line = line_of(report, "ada")
    outcomes = {name: outcome for sheet in line.sheets.values() for name, outcome in sheet.outcomes.items()}
    assert outcomes == {name: ("solved", "") for stem in STEMS for name in references(stem)}
    assert line.remarks == ("same as dan: my_apply_rotary",), "dan's doing, and nothing else"
    assert line.sheets[ROTARY].predictions == (2, 3) and line.sheets[START].predictions == (0, 0)


def test_half_of_it_is_half_of_it(report):
    """A notebook is known by its exercises; a helper counts; a try of one's own that fails below costs nothing."""
    sheets = line_of(report, "ben").sheets
    assert list(sheets) == [START, ROTARY] and sheets[ROTARY].predictions is None
    state, words = sheets[START].outcomes["my_next_token"]
    assert state == "solved" and "NameError" in words
    assert {state for state, _ in sheets[ROTARY].outcomes.values()} == {"not written"}


def test_who_left_it_has_stubs_and_no_blame(report):
    line = line_of(report, "cleo")
    assert {state for state, _ in line.sheets[ROTARY].outcomes.values()} == {"not written"} and not line.remarks


def test_what_is_not_ones_own_is_remarked(report):
    assert line_of(report, "dan").remarks == (
        "the library's own object: my_rotate_half",
        "same as the reference: my_rotary_angles",
        "same as ada: my_apply_rotary",
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_damage_is_named_for_what_it_is(report, name):
    outcomes = {key: value for sheet in line_of(report, "eve").sheets.values() for key, value in sheet.outcomes.items()}
    _, state, word = HOSTILE[name]
    assert outcomes[name][0] == state and word in outcomes[name][1]


def test_deleted_files_and_endless_output_are_remarked(report):
    remarks = " ".join(line_of(report, "eve").remarks)
    assert "deletes files in its folder" in remarks and "prints more than 1 MiB" in remarks


def test_what_is_no_notebook_is_said(report):
    line = line_of(report, "=1+1")
    assert {state for state, _ in line.sheets[ROTARY].outcomes.values()} == {"unreadable"}
    assert line.remarks == ("essay.ipynb: not a notebook of the series",)


def test_the_table_is_one_line_a_student(report):
    rows = {line.split("  ")[0].strip(): line.split() for line in report.table().splitlines()}
    there_are = sum(len(references(stem)) for stem in STEMS)
    assert rows["ada"][-2:] == [f"{there_are}/{there_are}", "2/3"] and rows["ben"][1:4] == ["1/1", "-", "0/3"]
    assert len(rows) == 1 + len(report.lines) == 7
    assert "eve, 01 my_decode: crashed" in report.details()


def test_the_csv_has_a_row_for_each_exercise_and_no_formula(report, tmp_path):
    report.write_csv(tmp_path / "class.csv")
    with (tmp_path / "class.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.lines) * sum(map(len, report.series.values()))
    assert not [row for row in rows if any(cell.startswith(("=", "+", "-", "@")) for cell in row.values())]
    (angles,) = [row for row in rows if (row["student"], row["exercise"]) == ("eve", "my_rotary_angles")]
    assert angles["result"] == "tampered"


def test_nothing_is_unpacked_outside_and_no_link_is_followed(tmp_path):
    secret = tmp_path / "secret.ipynb"
    secret.write_text("{}")
    (tmp_path / "class" / "ada").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "class" / "ben.zip", "w") as archive:
        for name in ("../out.ipynb", "/out.ipynb", "C:\\out.ipynb", "in.ipynb"):
            archive.writestr(name, "{}")
    if hasattr(os, "symlink"):
        (tmp_path / "class" / "ada" / "link.ipynb").symlink_to(secret)
    files = {student.name: list(student.files) for student in read_class(tmp_path / "class", STEMS)}
    assert files == {"ada": [], "ben": ["in.ipynb"]}


def test_a_folder_without_students_says_so(tmp_path):
    with pytest.raises(ValueError, match="nothing was handed in"):
        list(read_class(tmp_path, STEMS))
    with pytest.raises(ValueError, match="no such folder"):
        list(read_class(tmp_path / "absent", STEMS))


def test_a_control_sign_does_not_reach_the_terminal():
    assert harmless("\x1b[31mred") == "�[31mred"

"""The learner's own copy of the notebooks: whatever happens, nothing that the learner wrote is lost."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from neox_lib.__main__ import main
from neox_lib.course import learner_copy
from neox_lib.course.learner_copy import RECORD, describe, update_copy


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A notebooks folder with two lessons and an image, and the place for the copy, in folders with a space."""
    originals = tmp_path / "some notebooks"
    (originals / "images").mkdir(parents=True)
    (originals / "00_start.ipynb").write_text("zero", "utf-8")
    (originals / "01_next.ipynb").write_text("one", "utf-8")
    (originals / "images" / "map.png").write_bytes(b"\x89PNG\r\n")
    (originals / "README.md").write_text("not a lesson", "utf-8")
    return originals, originals / "mine"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but the record, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_copy_has_what_makes_slides_of_it(folders):
    (folders[0] / "rise.css").write_text("a page of 1280 x 720", "utf-8")
    assert "rise.css" in update_copy(*folders).copied


def test_the_first_run_copies_notebooks_and_images_only(folders):
    report = update_copy(*folders)
    assert report.copied == ["00_start.ipynb", "01_next.ipynb", "images/map.png"]
    assert contents(folders[1]) == {
        "00_start.ipynb": b"zero",
        "01_next.ipynb": b"one",
        "images/map.png": b"\x89PNG\r\n",
    }


def test_a_second_run_does_nothing(folders):
    update_copy(*folders)
    before = contents(folders[1])
    report = update_copy(*folders)
    assert (report.copied, report.changed, report.beside) == ([], [], {})
    assert contents(folders[1]) == before


@pytest.mark.parametrize("refresh", [False, True])
def test_the_learners_work_is_never_overwritten(folders, refresh):
    originals, mine = folders
    update_copy(originals, mine)
    (mine / "00_start.ipynb").write_text("my work", "utf-8")
    (mine / "02_own.ipynb").write_text("my own notebook", "utf-8")
    (originals / "00_start.ipynb").write_text("zero, second edition", "utf-8")
    (originals / "02_own.ipynb").write_text("a new lesson of the same name", "utf-8")
    for _ in range(3):
        update_copy(originals, mine, refresh)
    assert (mine / "00_start.ipynb").read_text("utf-8") == "my work"
    assert (mine / "02_own.ipynb").read_text("utf-8") == "my own notebook"


def test_a_lesson_added_later_is_copied(folders):
    originals, mine = folders
    update_copy(originals, mine)
    (originals / "02_later.ipynb").write_text("two", "utf-8")
    assert update_copy(originals, mine).copied == ["02_later.ipynb"]


def test_a_copy_that_the_learner_deleted_comes_back_fresh(folders):
    originals, mine = folders
    update_copy(originals, mine)
    (mine / "01_next.ipynb").unlink()
    assert update_copy(originals, mine).copied == ["01_next.ipynb"]


def test_own_edits_alone_do_not_count_as_a_newer_original(folders):
    originals, mine = folders
    update_copy(originals, mine)
    (mine / "00_start.ipynb").write_text("my work", "utf-8")
    assert update_copy(originals, mine).changed == []


def test_a_newer_date_alone_does_not_count_as_a_newer_original(folders):
    originals, mine = folders
    update_copy(originals, mine)
    (mine / "00_start.ipynb").write_text("my work", "utf-8")
    (originals / "00_start.ipynb").touch()
    assert update_copy(originals, mine).changed == []


def test_a_changed_original_is_reported_until_it_is_fetched(folders):
    originals, mine = folders
    update_copy(originals, mine)
    (originals / "00_start.ipynb").write_text("zero, second edition", "utf-8")
    for _ in range(2):
        report = update_copy(originals, mine)
        assert report.changed == ["00_start.ipynb"]
        assert "make lab-refresh" in describe(report, originals, mine)
    report = update_copy(originals, mine, refresh=True)
    assert report.beside == {"00_start.ipynb": "00_start.new.ipynb"}
    assert (mine / "00_start.new.ipynb").read_text("utf-8") == "zero, second edition"
    assert update_copy(originals, mine).changed == []


def test_a_second_refresh_leaves_the_first_one_alone(folders):
    originals, mine = folders
    update_copy(originals, mine)
    (originals / "00_start.ipynb").write_text("second edition", "utf-8")
    update_copy(originals, mine, refresh=True)
    (mine / "00_start.new.ipynb").write_text("my work in the second edition", "utf-8")
    (originals / "00_start.ipynb").write_text("third edition", "utf-8")
    assert update_copy(originals, mine, refresh=True).beside == {"00_start.ipynb": "00_start.new2.ipynb"}
    assert (mine / "00_start.new.ipynb").read_text("utf-8") == "my work in the second edition"
    assert (mine / "00_start.new2.ipynb").read_text("utf-8") == "third edition"


@pytest.mark.parametrize("damage", ["", "{", "[1]", None])
def test_a_damaged_or_lost_record_loses_no_work(folders, damage):
    originals, mine = folders
    update_copy(originals, mine)
    (mine / "00_start.ipynb").write_text("my work", "utf-8")
    if damage is None:
        (mine / RECORD).unlink()
    else:
        (mine / RECORD).write_text(damage, "utf-8")
    assert update_copy(originals, mine).changed == ["00_start.ipynb"]
    assert (mine / "00_start.ipynb").read_text("utf-8") == "my work"


def test_an_interrupted_copy_leaves_no_half_notebook(folders, monkeypatch):
    def fail(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(learner_copy.os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        update_copy(*folders)
    assert contents(folders[1]) == {}


def test_an_empty_notebooks_folder_still_gives_a_folder_to_open(tmp_path):
    report = update_copy(tmp_path, tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    assert "No notebooks" in describe(report, tmp_path, tmp_path / "mine")


def old_notebook(*lines: str, module: str | None = None) -> str:
    """A copy of before the rooms, with these lines in a cell."""
    metadata = {"tags": ["promote"], "module": module} if module else {}
    return json.dumps({"cells": [{"cell_type": "code", "metadata": metadata, "source": "\n".join(lines)}]})


def test_a_copy_with_names_of_before_is_told_what_moved_and_keeps_them(folders):
    originals, mine = folders
    update_copy(originals, mine)
    old = old_notebook(
        "%pip list", "from neox_lib.lesson import plots", "import neox_lib.files", module="scale.parallel"
    )
    (mine / "00_start.ipynb").write_text(old, "utf-8")
    (mine / "own.ipynb").write_text(old_notebook("from neox_lib.files import CheckpointError"), "utf-8")
    (originals / "00_start.ipynb").write_text("second edition", "utf-8")
    said = describe(update_copy(originals, mine), originals, mine)
    assert "00_start.ipynb, own.ipynb" in said and "neox_lib.files is now neox_lib.checkpoints.files" in said
    assert "neox_lib.lesson.plots is now neox_lib.course.figures.plots" in said and "make lab-refresh" in said
    assert said.count("\n") == 1, "two lines, however many copies and names there are"
    assert (mine / "00_start.ipynb").read_text("utf-8") == old


def test_of_many_moved_names_the_commonest_are_shown_and_the_others_counted(folders):
    originals, mine = folders
    mine.mkdir()
    names = ("files", "layout", "scoring", "release", "sharding")
    (mine / "a.ipynb").write_text(old_notebook(*(f"import neox_lib.{name}" for name in names)), "utf-8")
    (mine / "b.ipynb").write_text(old_notebook("import neox_lib.sharding"), "utf-8")
    said = describe(update_copy(originals, mine), originals, mine)
    assert "moved: neox_lib.sharding is now" in said and "and 2 more" in said


def test_a_name_that_is_gone_is_told_with_what_does_its_work(folders):
    originals, mine = folders
    mine.mkdir()
    (mine / "a.ipynb").write_text(old_notebook("from neox_lib.generation import next_token_logits"), "utf-8")
    said = describe(update_copy(originals, mine), originals, mine)
    assert "a.ipynb: neox_lib.generation.next_token_logits is gone; neox_lib.generation.prefill replaces it" in said


def test_once_the_new_original_is_there_the_learner_is_sent_to_it(folders):
    originals, mine = folders
    update_copy(originals, mine)
    (mine / "00_start.ipynb").write_text(old_notebook("import neox_lib.files"), "utf-8")
    (originals / "00_start.ipynb").write_text(old_notebook("import neox_lib.layout"), "utf-8")
    said = describe(update_copy(originals, mine, refresh=True), originals, mine)
    assert "as NAME.new.ipynb" in said and "make lab-refresh" not in said
    assert "layout" not in said, "what lies beside is no copy of the learner's"


@pytest.mark.parametrize("text", ["", "[]", '{"cells": [1]}', old_notebook("from neox_lib.files import")])
def test_a_damaged_copy_or_a_half_written_cell_is_passed_over(folders, text):
    originals, mine = folders
    update_copy(originals, mine)
    (mine / "00_start.ipynb").write_text(text, "utf-8")
    assert update_copy(originals, mine).stale == {}


def test_the_command_starts_without_loading_torch(folders):
    """`make lab` promises to open at once, and must open while a promoted piece is broken."""
    code = (
        "import sys; from neox_lib.__main__ import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'neox_lib.checkpoints.files', 'neox_lib.model') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "learner-copy", "--originals", str(folders[0])]
    root = Path(learner_copy.__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "Copied to" in result.stdout


def test_a_students_copy_holds_no_solution_and_lies_beside_the_whole_one(folders, capsys):
    """A student who types `make lab EDITION=student` must not get the answers, nor lose the work of the day before."""
    originals = folders[0]
    (originals / "01_next.ipynb").unlink()

    def release(text: str) -> None:
        folded = "<details><summary>Solution</summary>\n\nforty-two\n</details>"
        cell = new_markdown_cell(f"{text} `notebooks/mine`\n\n{folded}", id="task")
        nbformat.write(new_notebook(cells=[cell]), originals / "00_start.ipynb")
        main(["learner-copy", "--originals", str(originals), "--edition", "student"])

    own = originals / "student" / "00_start.ipynb"
    release("Work in")
    assert "forty-two" not in own.read_text("utf-8") and "Work in `notebooks/student`" in own.read_text("utf-8")
    assert "Copied to" in capsys.readouterr().out and not (originals / "mine").exists()
    own.write_text(own.read_text("utf-8").replace("Work in", "I work in"), "utf-8")
    release("Work in")
    assert "is up to date" in capsys.readouterr().out and "I work in" in own.read_text("utf-8")
    release("Learn in")
    assert "To get it too: make lab-refresh EDITION=student" in capsys.readouterr().out


def test_a_missing_notebooks_folder_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "neox_lib", "learner-copy", "--originals", str(tmp_path / "absent")]
    root = Path(learner_copy.__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "absent" in result.stderr

"""The folded solution of every exercise that asks for a piece of the library: promoted, it is the library's piece."""

import importlib
import json
import re
import shutil
import types

import nbformat
import pytest

from neox_lib.classroom.asked import Exercise, exercises_of
from neox_lib.course import after_promotion, promote
from neox_lib.course.checks import in_place_of
from tests.lessons import NOTEBOOKS

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def library_name(exercise: Exercise) -> str:
    return re.sub(r"^(my_|My)", "", exercise.name)


def asked_pieces() -> list:
    """(notebook, exercise, module) of each exercise whose name, without `my_`, is promoted by its notebook."""
    homes = {(each.notebook, each.definition.name): each.module for each in promote.collect(NOTEBOOKS)}
    found = []
    for path in PATHS:
        for exercise in exercises_of(json.loads(path.read_text("utf-8"))):
            if (path, library_name(exercise)) in homes:
                found.append(pytest.param(path, exercise, homes[path, library_name(exercise)], id=exercise.name))
    return found


@pytest.mark.parametrize(("path", "exercise", "module"), asked_pieces())
def test_a_solution_can_be_promoted_and_the_library_works(path, exercise, module, tmp_path, monkeypatch):
    """What a learner does last in every notebook; a solution that calls a function of the notebook would be refused."""
    name, place = library_name(exercise), promote.module_path(module)
    solution = re.sub(rf"\b{exercise.name}\b", name, exercise.reference).strip()
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [
        cell
        for cell in notebook.cells
        if "promote" in cell.metadata.get("tags", [])
        and name in [each.name for each in promote.definitions(cell.source)]
    ]
    cell.source = promote.replaced(cell.source, promote.definitions(solution))
    mine = tmp_path / "mine"
    mine.mkdir()
    nbformat.write(notebook, mine / path.name)
    for each in {each.module for each in promote.collect(mine)}:
        copy = promote.module_path(each, tmp_path / "neox_lib")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(promote.module_path(each), copy)
    monkeypatch.setattr(promote, "LIBRARY", tmp_path / "neox_lib")
    monkeypatch.setattr(promote, "import_failure", lambda modules: None)  # it is imported below, in this process
    promote.promote(mine)

    written = types.ModuleType(f"neox_lib.{module}")
    exec(compile(promote.module_path(module).read_text("utf-8"), str(place), "exec"), vars(written))
    original = getattr(importlib.import_module(f"neox_lib.{module}"), name)
    with in_place_of(original, getattr(written, name)):
        assert after_promotion.failures([module]) == []

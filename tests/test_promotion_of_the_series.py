"""Promotion on the real series: library and notebooks agree, and a learner's own piece is what then runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from neox_lib import attention
from neox_lib.cache import KVCache
from neox_lib.course import after_promotion, promote
from tests.test_definitions import PROMOTED

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time, a fox"


def test_the_notebooks_and_the_library_agree():
    """What the learner builds is what runs. To see the differences: python -m neox_lib promote --check."""
    assert promote.differences(promote.NOTEBOOKS) == []


def test_every_piece_is_built_in_a_notebook():
    assert {each.module for each in promote.collect(promote.NOTEBOOKS)} == set(PROMOTED)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A repository of its own with the files as they are now, and a learner's copy of the notebooks in it."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    ignored = shutil.ignore_patterns("__pycache__", "mine", ".progress.json")
    for name in ("neox_lib", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "notebooks" / "mine").mkdir()
    for path in folder.glob("notebooks/*.ipynb"):
        shutil.copy(path, folder / "notebooks" / "mine")
    (folder / ".gitignore").write_text("__pycache__/\nnotebooks/mine/\n")
    git = ["git", "-c", "user.name=learner", "-c", "user.email=learner@localhost", "-c", "init.defaultBranch=main"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "as cloned"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(clone), "NEOX_PROGRESS": str(clone.parent / "progress.json")}
    return subprocess.run([sys.executable, *arguments], cwd=clone, env=environment, capture_output=True, text=True)


def command_line_story(clone: Path) -> str:
    done = run(clone, "-m", "neox_lib", "generate", "--tokens", "30", "--device", "cpu", PROMPT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def edit(clone: Path, old: str, new: str) -> None:
    """Change one line of the attention that the learner's copy of notebook 03 promotes."""
    path = clone / "notebooks" / "mine" / "03_attention.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "promote" in cell.metadata.get("tags", []) and old in cell.source]
    cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, path)


def outputs_of_notebook_06(clone: Path) -> str:
    """Run the code of notebook 06 as it stands, in a fresh process; what it prints."""
    code = (
        "import nbformat\n"
        "cells = nbformat.read('notebooks/06_cached_generation.ipynb', as_version=4).cells\n"
        "names = {'__name__': 'lesson'}\n"
        "for cell in cells:\n"
        "    if cell.cell_type == 'code' and 'nbval-ignore-output' not in cell.metadata.get('tags', []):\n"
        "        exec(cell.source, names)\n"
    )
    done = run(clone, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_learners_attention_is_what_notebook_06_and_the_command_line_run_until_git_takes_it_back(clone):
    before, notebook_before = command_line_story(clone), outputs_of_notebook_06(clone)
    edit(clone, "return self.dense(merged)", "return self.dense(0.5 * merged)  # mine")
    done = run(clone, "-m", "neox_lib", "promote", "--from", "notebooks/mine")
    assert "attention" in done.stdout and "Restart the kernels" in done.stdout, done.stderr
    assert done.returncode == 1 and "Attention, as you promoted it, fails the check of its exercise" in done.stdout
    difference = subprocess.run(["git", "diff", "neox_lib"], cwd=clone, capture_output=True, text=True).stdout
    assert "+        return self.dense(0.5 * merged)  # mine" in difference
    assert command_line_story(clone) != before
    assert outputs_of_notebook_06(clone) != notebook_before
    check = run(clone, "-m", "neox_lib", "promote", "--check")
    assert check.returncode == 1 and "self.dense(0.5 * merged)" in check.stdout
    subprocess.run(["git", "checkout", "-q", "neox_lib"], cwd=clone, check=True)
    assert command_line_story(clone) == before
    edit(clone, "return self.dense(0.5 * merged)  # mine", "return self.dense(merged)")


@pytest.mark.slow
def test_a_broken_piece_is_taken_back_in_one_line_and_promotion_still_starts_when_one_is_broken(clone):
    module = clone / "neox_lib" / "attention.py"
    before = module.read_text()
    edit(clone, "class Attention(nn.Module):", "class Attention(nn.Modul):")
    done = run(clone, "-m", "neox_lib", "promote", "--from", "notebooks/mine")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "Modul" in done.stderr
    assert module.read_text() == before
    edit(clone, "class Attention(nn.Modul):", "class Attention(nn.Module):")
    module.write_text(before.replace("class Attention(nn.Module):", "class Attention(nn.Modul):"))
    assert run(clone, "-m", "neox_lib", "promote").returncode == 0
    assert module.read_text() == before


@pytest.mark.slow
def test_every_piece_of_the_library_passes_what_is_tried_after_promotion():
    """Else `promote` would find fault with learners who changed nothing but a comment."""
    modules = {piece.rpartition(".")[0] for piece in after_promotion.CHECKS}
    assert modules < set(PROMOTED) and after_promotion.failures(sorted(modules)) == []


def test_a_piece_that_is_wrong_or_stops_the_model_is_named_at_once(monkeypatch):
    """The library holds it from then on, and every later notebook would build on it."""
    right = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", lambda query, key, value: right(query * 2, key, value))
    (told,) = after_promotion.failures(["attention"])
    assert "fused_attention, as you promoted it, fails the check of its exercise. Not yet." in told
    monkeypatch.setattr(attention, "fused_attention", right)
    monkeypatch.delattr(KVCache, "check_room")
    *_, told = after_promotion.failures(["cache"])
    assert "can't write with what you promoted: AttributeError" in told and "check_room" in told

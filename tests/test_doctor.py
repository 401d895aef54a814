"""The doctor: what is broken on a student's machine is named in plain words, whatever else is broken too."""

import functools
import shutil
import socket
import subprocess
import sys

import pytest

from neox_lib.__main__ import main
from neox_lib.classroom import doctor, machine, packages
from neox_lib.classroom.machine import GIB, REPOSITORY, Finding


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 9), "fix"), ((3, 11, 0), "ok"), ((3, 14, 2), "ok"), ((3, 15, 0), "fix")]
)
def test_a_python_that_is_too_old_or_too_new_is_to_be_fixed(version, state):
    assert machine.look_at_python(version).state == state


def test_the_advice_names_a_section_that_there_is():
    for advice in (machine.SET_UP, machine.NOTHING_INSTALLED):
        _, section, path = advice.rstrip(")").split('"')
        assert f"\n## {section}\n" in (REPOSITORY / path.removeprefix(" in ")).read_text("utf-8")


def test_a_python_of_32_bits_is_to_be_fixed():
    assert machine.look_at_python((3, 12, 0), bits=32).state == "fix"


@pytest.mark.parametrize(("free", "state"), [(GIB // 2, "fix"), (3 * GIB // 2, "note"), (8 * GIB, "ok")])
def test_memory_that_is_short_says_what_to_close(free, state):
    finding = machine.look_at_memory(free)
    assert finding.state == state and (state != "fix" or "close" in finding.advice)


@pytest.mark.parametrize(("free", "state"), [(GIB // 4, "fix"), (GIB, "note"), (9 * GIB, "ok")])
def test_a_full_disk_is_to_be_fixed(free, state, tmp_path):
    assert machine.look_at_disk(tmp_path, free).state == state


def test_a_folder_that_cant_be_written_to_is_to_be_fixed(tmp_path):
    finding = machine.look_at_disk(tmp_path / "absent", 9 * GIB)
    assert finding.state == "fix" and "home" in finding.advice


def test_a_port_that_is_in_use_is_passed_over_and_none_at_all_is_to_be_fixed():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        assert machine.port_is_taken(holder.getsockname()[1])
    assert "8890" in machine.look_at_port(lambda port: port < 8890).found
    assert machine.look_at_port(lambda port: True).state == "fix"


@pytest.mark.parametrize(
    ("text", "word"), [("raise ImportError('no such DLL')", "no such DLL"), ("import os; os.abort()", "crashed")]
)
def test_a_package_that_fails_or_crashes_is_named(text, word, tmp_path, monkeypatch):
    (tmp_path / "ipywidgets.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = packages.look_at_imports("widgets", ("json", "ipywidgets", "csv"))
    assert finding.state == "fix" and "ipywidgets" in finding.found and word in finding.found


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(packages, "EVERYTHING", ("json", "no_such_package"))
    assert packages.look_at_packages().found == "not installed: no_such_package"


def test_before_anything_is_installed_there_is_one_finding_and_it_says_what_to_type(monkeypatch):
    """Eight lines that all say the same hide the one thing to do."""
    monkeypatch.setattr(doctor, "missing_packages", lambda: list(packages.FOUND))
    (finding,) = doctor.examine()
    assert finding.state == "fix" and "make lab" in finding.advice


def test_what_gives_no_answer_in_time_is_slow_and_not_broken(monkeypatch, capsys):
    """A busy laptop was told that its model does not write, and its owner set everything up again."""
    hanging = functools.partial(packages.in_process, "import time; time.sleep(60)", seconds=0.1)
    monkeypatch.setattr(packages, "in_process", lambda code: hanging())
    monkeypatch.setattr(doctor, "QUICK", ())
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.count("not ready after 0.1 s") == 3 and packages.SLOW in said and "Slow, not broken" in said


def test_a_broken_piece_is_named_and_how_to_take_it_back(tmp_path, monkeypatch):
    """A learner's promoted piece, say: the advice is git, not a new installation."""
    shutil.copytree(REPOSITORY / "neox_lib", tmp_path / "neox_lib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "neox_lib" / "rotary.py").write_text("raise RuntimeError('mine')\n")
    monkeypatch.setattr(packages, "REPOSITORY", tmp_path)
    (finding,) = packages.look_at_model()
    assert finding.state == "fix" and "mine" in finding.found
    assert "rotary.py" in finding.advice and "git checkout neox_lib" in finding.advice


@pytest.mark.parametrize(
    "stderr",
    [
        "File \"neox_lib/rotary.py\", line 3\nModuleNotFoundError: No module named 'torch'",
        'File "torch/__init__.py", line 9\nOSError: libcudart.so: cannot open shared object file',
    ],
)
def test_a_broken_torch_is_no_broken_piece(stderr):
    assert packages.advice_on(subprocess.CompletedProcess([], 1, "", stderr)) == machine.SET_UP


def test_the_doctor_starts_without_anything_heavy():
    """Where torch is broken, importing it would be the end of the doctor."""
    code = "import sys, neox_lib.cli.doctor, neox_lib.classroom.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_look_that_fails_is_a_finding():
    def look_at_nothing():
        raise KeyError("nothing")

    (finding,) = doctor.guarded(look_at_nothing)
    assert finding.state == "fix" and "look_at_nothing" in finding.found


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("fix", 1)])
def test_the_exit_code_says_whether_something_must_be_fixed(state, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "QUICK", (lambda: Finding("thing", state, "found", "do this"),))
    monkeypatch.setattr(doctor, "IN_PROCESSES", (list,))
    assert main(["doctor"]) == code
    assert "do this" in capsys.readouterr().out


def test_this_machine_has_nothing_to_fix():
    findings = doctor.examine()
    assert {"Python", "memory", "disk", "port", "packages", "model", "libraries", "widgets"} <= {
        each.what for each in findings
    }
    assert not [each for each in findings if each.state == "fix"]

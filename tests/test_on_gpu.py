"""`.ci/on_gpu` is started once, on a machine that is rented by the minute: it must come back with something."""

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """The script as a module that keeps its files in a folder of the test, on a machine with all it needs but a GPU."""
    loader = importlib.machinery.SourceFileLoader("on_gpu", str(ROOT / ".ci" / "on_gpu"))
    spec = importlib.util.spec_from_loader("on_gpu", loader)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "HERE", tmp_path)
    for name, path in {"WHEELS": "wheels", "SITE": "site", "RESULTS": "results", "ARCHIVE": "r.tar.gz"}.items():
        monkeypatch.setattr(module, name, tmp_path / path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_a.ipynb").write_text("{}")
    (tmp_path / "wheels").mkdir()
    found = {"python": "3.12.0", "torch": "2.13.0", "cuda": None, "cores": 2, "gpus": [], "missing": ["numpy"]}
    monkeypatch.setattr(module, "look", lambda: dict(found))
    return module


def test_a_part_that_fails_or_hangs_stops_no_other(on_gpu, monkeypatch, capsys, tmp_path):
    """Else the figures of the whole lease are lost to one test. What a part has started ends with it."""
    python = [sys.executable, "-S", "-c"]
    parts = {
        "fails": ([*python, "print('why'); raise SystemExit(3)"], 60),
        "hangs": (["sh", "-c", "sleep 60 & echo $!; wait"], 2),
        "runs": ([*python, "1"], 60),
    }
    monkeypatch.setattr(on_gpu, "parts", lambda gpu, copies: parts)
    assert on_gpu.main() == 1
    shown = capsys.readouterr().out
    assert "no GPU, running on CPU" in shown and "numpy is not here" in shown and "why" in shown
    assert re.findall(r"^(\w+) +(passed|FAILED)", shown, re.MULTILINE) == [
        ("fails", "FAILED"),
        ("hangs", "FAILED"),
        ("runs", "passed"),
    ]
    with tarfile.open(tmp_path / "r.tar.gz") as archive:
        names = archive.getnames()
        summary = json.load(archive.extractfile("results/summary.json"))
    assert {"results/fails.log", "results/hangs.log", "executed/00_a.ipynb"} <= set(names)
    assert [part["exit code"] for part in summary["parts"].values()] == [3, None, 0]
    child = int((tmp_path / "results" / "hangs.log").read_text().split()[0])
    assert not alive(child)


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def test_no_part_runs_once_the_time_is_up(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "DEADLINE", 0)
    late = ([sys.executable, "-S", "-c", "import time; time.sleep(60)"], 50)
    monkeypatch.setattr(on_gpu, "parts", lambda gpu, copies: {"late": late})
    assert on_gpu.main() == 1
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["parts"]["late"]["seconds"] < 40


def test_an_archive_that_is_too_large_keeps_the_results(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "MOST_ARCHIVE", 2**12)
    monkeypatch.setattr(on_gpu, "parts", lambda gpu, copies: {})
    (tmp_path / "notebooks" / "00_a.ipynb").write_bytes(os.urandom(2**14))
    on_gpu.main()
    with tarfile.open(tmp_path / "r.tar.gz") as archive:
        assert archive.getnames() == ["results"]


def test_packages_that_are_there_stay_as_they_are(on_gpu, tmp_path):
    """The image's transformers needs the image's huggingface_hub."""
    (tmp_path / "wheels" / "pytest-0.1-py3-none-any.whl").write_bytes(b"not even a zip file")
    assert on_gpu.install().startswith("nothing to install")


@pytest.mark.parametrize("with_gpu", [True, False])
def test_the_parts_are_those_of_everywhere_else_and_end_in_nine_minutes(on_gpu, monkeypatch, with_gpu):
    monkeypatch.setattr(on_gpu, "ROOT", ROOT)
    parts = on_gpu.parts(with_gpu, Path("copies"))
    assert sum(seconds for _, seconds in parts.values()) <= on_gpu.DEADLINE < 540
    assert all(Path(argument).is_file() for argument in parts["tests-core"][0] if argument.endswith(".py"))
    assert str(ROOT / "tests" / "test_gpu.py") in parts["tests-gpu"][0]
    recipe = re.search(r"^notebooks: .*?\n\n", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"--[\w=./-]+", recipe[0])) <= set(parts["notebooks"][0])
    assert ("cuda" in parts["bench"][0]) == with_gpu


def test_its_packages_are_pinned_by_the_locks(on_gpu):
    """A package that the locks don't know would come in any version."""
    locks = "".join((ROOT / name).read_text("utf-8") for name in ("requirements.lock", "requirements-test.lock"))
    pinned = set(re.findall(r"^([\w.-]+)==", locks, re.MULTILINE))
    assert {name.replace("_", "-") for name in (*on_gpu.PACKAGES, *on_gpu.LEFT_OUT)} <= pinned

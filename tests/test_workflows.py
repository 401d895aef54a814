"""What GitHub, pre-commit and citations read: valid, linted, and doing what the guides say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = dict.fromkeys(WORKFLOWS, "github-workflows") | {ROOT / "CITATION.cff": "citation-file-format"}


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} comes with requirements-test.lock"
    return found


def steps(name: str, job: str) -> list[dict]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))["jobs"][job]["steps"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_file_has_the_form_that_github_reads(path):
    command = [tool("check-jsonschema"), "--builtin-schema", f"vendor.{FORMS[path]}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_has_nothing_to_say():
    """A workflow runs other people's code with our rights: what it may do is checked like code."""
    done = subprocess.run(
        [tool("zizmor"), "--offline", "--no-progress", "--strict-collection", str(ROOT / ".github")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gpu_job_fails_without_cuda_and_runs_what_the_others_run():
    """A GPU job that passes on a CPU would say for months that CUDA works."""
    commands = [step.get("run", "") for step in steps("gpu.yml", "cuda")]
    (probe,) = [command for command in commands if "cuda.is_available()" in command]
    code = re.search(r'python -c "(.*)"', probe)
    assert code
    fake = (
        "import sys, types\ntorch = types.ModuleType('torch')\n"
        "torch.cuda = types.SimpleNamespace(is_available=lambda: {})\nsys.modules['torch'] = torch\n"
    )
    for there, expected in ((False, 1), (True, 0)):
        done = subprocess.run([sys.executable, "-c", fake.format(there) + code[1]], capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
    assert commands.index(probe) < commands.index("make notebooks")
    assert any("-m gpu" in command for command in commands)


def test_linux_compares_outputs_and_other_systems_only_run_the_notebooks():
    assert "make notebooks" in [step.get("run") for step in steps("tests.yml", "linux")]
    assert "make notebooks NBVAL=--nbval-lax" in [step.get("run") for step in steps("tests.yml", "elsewhere")]


def test_what_the_jobs_on_linux_run_is_all_of_make_test():
    """A part of `make test` that no job runs would break unseen."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    parts = re.search(r"^test: (.+)$", makefile, re.MULTILINE)
    commands = {step.get("run") for job in ("lint", "linux") for step in steps("tests.yml", job)}
    assert parts and {f"make {part}" for part in parts[1].split()} <= commands


def test_the_windows_job_runs_the_lines_of_the_guide_and_tests_that_exist():
    guide = (ROOT / "notebooks" / "guides" / "install.md").read_text("utf-8")
    (lines,) = re.findall(r"```powershell\n(.+?)```", guide, re.DOTALL)
    run = "\n".join(step.get("run", "") for step in steps("tests.yml", "windows"))
    assert lines in run
    assert all((ROOT / path).is_file() for path in re.findall(r"tests/\w+\.py", run))


def test_pre_commit_and_the_lock_hold_the_same_versions():
    """Else a commit is formatted one way here and another way in CI."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    revisions = {repo["repo"].split("/")[-1]: repo.get("rev", "") for repo in hooks["repos"]}
    lock = (ROOT / "requirements-test.lock").read_text("utf-8").splitlines()
    for repository, package in {"ruff-pre-commit": "ruff", "codespell": "codespell"}.items():
        assert f"{package}=={revisions[repository].removeprefix('v')}" in lock

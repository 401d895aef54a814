"""The workflows: valid, linted, and saying what the README says of them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} comes with requirements.lock"
    return found


def steps(name: str, job: str) -> list[dict]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))["jobs"][job]["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_the_form_that_github_reads(path):
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(path)]
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
    assert "make test" in [step.get("run") for step in steps("tests.yml", "linux")]
    assert "make test NBVAL=--nbval-lax" in [step.get("run") for step in steps("tests.yml", "elsewhere")]

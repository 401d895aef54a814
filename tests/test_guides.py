"""Every command of the README and the guides is typed here as it stands there, or listed with the reason why not.

A reader who copies a line that no longer works has lost trust in all the others.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neox_lib.__main__ import main
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "notebooks" / "README.md", *sorted((ROOT / "notebooks" / "guides").glob("*.md"))]
NOT_TYPED = [*ROOT.glob("CONTRIBUTING.md"), ROOT / "notebooks" / "TEACHING.md"]  # for authors, and a plan to talk by
PROGRAMS = r"(?:make|python3?|pip|py|jupyter|conda|torchrun|git|source|export|sphinx-build|xcode-select) \S"

SERVER = "serves until it is stopped; the tests in a browser start the same server"
NETWORK = "installs from the network; CI and its Windows job do it on every push"
SUITE = "runs the tests themselves, or the notebooks"
NOT_RUN = {
    "make lab": SERVER,
    "make lab EDITION=student": SERVER,
    "make playground": SERVER,
    'make playground PLAYGROUND_ARGS="--Voila.ip=0.0.0.0 --port=8866 --token=a-word-for-the-class --no-browser"': (
        SERVER
    ),
    "make slides NOTEBOOK=02": SERVER,
    "make slides LESSON=16": SERVER,
    "jupyter lab notebooks/mine": SERVER,
    "jupyter lab notebooks/student": SERVER,
    "python -m neox_lib playground": SERVER,
    "python -m neox_lib slides 02": SERVER,
    "pip install -r requirements.lock": NETWORK,
    "pip install -r requirements.lock --extra-index-url https://download.pytorch.org/whl/cpu": NETWORK,
    "pip install -r requirements-test.lock": NETWORK,
    "pip install --no-deps --no-build-isolation -e .": NETWORK,
    "py -3.12 -m venv .venv": NETWORK,
    r".venv\Scripts\Activate.ps1": NETWORK,
    "python3 -m venv .venv": "would take the place of the environment that the other lines need",
    "make clean": "would remove the environment that the other lines need",
    "conda env create -f environment.yml": "needs conda; test_setup.py compares environment.yml with the lock",
    "conda activate build-gpt-neox": "needs conda; test_setup.py compares the name",
    "xcode-select --install": "needs a Mac",
    "make test": SUITE,
    "make lint": SUITE,
    "make pytest": SUITE,
    "make notebooks": SUITE,
    "make notebooks NBVAL=--nbval-lax": SUITE,
    "make outputs": SUITE,
    "python -m pytest": SUITE,
    "python -m pytest -m gpu": SUITE,
    "python3 .ci/on_gpu": SUITE,
    ".ci/on_gpu wheels": NETWORK,
    "make site": "test_site.py builds the site",
    "make site FROM=OUT": "test_site.py builds the site",
    "python -m sphinx notebooks build/site": "test_site.py builds the site",
    "python -m neox_lib train RUN --stories A.txt --validation B.txt": "trains for hours; test_training.py trains less",
    "python -m neox_lib bench --device cuda": "needs a GPU; test_bench.py measures a tiny shape",
    "python -m neox_lib bench": "takes minutes; test_bench.py measures a tiny shape",
    "python -m neox_lib doctor": "judges the machine; test_doctor.py runs it",
    "python -m neox_lib full-size all FOLDER": "writes 62 GB; test_full_size.py takes a small shape",
    "pip install gguf": NETWORK,
    "python -m neox_lib evaluate --model EleutherAI/gpt-neox-20b --tasks lambada_openai hellaswag piqa winogrande "
    "anli_r1 anli_r2 anli_r3": "fetches 20B and takes hours; test_evaluate.py asks small models",
    **dict.fromkeys(
        [
            'llama-completion --model MODEL.gguf --prompt "Once upon a time" --temp 0 -no-cnv',
            "ollama create my-neox -f Modelfile",
            'ollama run my-neox "Once upon a time"',
        ],
        "another program; test_gguf.py runs llama.cpp",
    ),
    'torchrun --nproc-per-node 2 -m neox_lib generate "Once upon a time" --model FOLDER': (
        "test_parallel.py starts ranks with torchrun"
    ),
}
NEW_FOLDERS = re.compile(r"python -m neox_lib (?:convert IN|student) OUT\b")  # refuse to write over what is there


def commands_of(text: str) -> list[str]:
    """What a page tells a reader to type, in order, without comments; a block of Python is one of them.

    >>> commands_of("Run `make lab`:\\n```\\nmake lab   # in a browser\\nmake site\\n```\\nthen `python -c 1`, `x`")
    ['make lab', 'make lab', 'make site', 'python -c 1']
    """
    commands = []
    for language, block, inline in re.findall(r"^```(\w*)\n(.*?)^```$|`([^`]+)`", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            commands.append(block)
        elif block:
            commands += [line.split("  #")[0].rstrip() for line in block.splitlines() if line.strip()]
        elif re.match(PROGRAMS, inline):
            commands.append(" ".join(inline.split()))
    return commands


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page.read_text("utf-8"))))
TYPED = [command for command in COMMANDS if command not in NOT_RUN]


def copy_of_the_repository(folder: Path) -> None:
    """The files of this repository, with an environment that is set up: links to the one that runs the tests."""
    left_out = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "mine", "tests")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    for name in ("requirements.lock", "requirements-test.lock", "pyproject.toml", ".ci/set_up.py"):
        os.utime(folder / name, (1, 1))  # older than the marks: or make would set up
    environment, here = folder / ".venv", Path(sys.prefix)
    (environment / "share" / "neox").mkdir(parents=True)
    for part in ("bin", "lib", "pyvenv.cfg", "share/jupyter"):
        (environment / part).symlink_to(here / part)
    for mark in ("ready", "ready-test"):
        (environment / "share" / "neox" / mark).touch()
    (environment / "share" / "neox" / "20B_tokenizer.json").write_text("{}")
    subprocess.run(
        "git init -q && git add -A . && git -c user.name=a -c user.email=a@b commit -qm a", cwd=folder, shell=True
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and output of every line in TYPED, typed one after the other into a copy of the repository.

    FOLDER and IN are the shipped model, FOLDER with a way of writing and a form of conversation; the Hub has it too,
    under the names that the guides ask for.
    """
    folder, model = tmp_path_factory.mktemp("typed") / "clone", ROOT / "neox_lib" / "assets" / "tiny"
    copy_of_the_repository(folder)
    (folder / "IN").symlink_to(model)
    (folder / "FOLDER").mkdir()
    for file in model.iterdir():
        (folder / "FOLDER" / file.name).symlink_to(file)
    (folder / "FOLDER" / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": 0}')
    (folder / "FOLDER" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\\n{% endfor %}")
    (folder / "DIR" / "a student").mkdir(parents=True)
    published = folder.parent / "published"
    assert main(["convert", str(model), str(published), "--to", "huggingface"]) == 0
    lines = [line for command in TYPED for line in ([*["rm -rf OUT"] * bool(NEW_FOLDERS.match(command)), command])]
    with HubServer() as hub:
        hub.add("EleutherAI/pythia-70m", published)
        hub.add("EleutherAI/pythia-70m", published, revision="step1000")
        hub.add("EleutherAI/gpt-neox-20b", published)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))} | {
            "PATH": f"{folder}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder.parent / "hub"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "guide_lines.py")],
            input=json.dumps(lines),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("make") is None or os.name == "nt", reason="types into bash, and some lines need make")
@pytest.mark.parametrize("command", TYPED, ids=lambda command: command.split("\n")[0])
def test_a_command_works_as_it_stands_there(results, command):
    code, said = results[command]
    assert code == 0, said


def test_the_list_of_what_is_not_run_names_no_command_that_has_gone():
    assert not set(NOT_RUN) - set(COMMANDS)


@pytest.mark.parametrize("page", NOT_TYPED, ids=lambda page: page.name)
def test_a_page_that_is_not_typed_names_commands_that_exist(page):
    text, makefile = page.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:`|^ *)make\s+([a-z][a-z-]*)", text, re.MULTILINE)) <= targets
    verbs = {path.stem.replace("_", "-") for path in (ROOT / "neox_lib" / "cli").glob("[a-z]*.py")}
    assert set(re.findall(r"-m neox_lib ([a-z][a-z-]+)", text)) <= verbs

"""Packages and the shipped model, each tried in a process of its own, since a broken one may crash or hang."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from neox_lib.classroom.machine import REPOSITORY, SET_UP, Finding

SECONDS = 60  # per process; a busy laptop, or a first start, needs most of it
TOO_LONG = 124  # the exit code of a process that took longer
SLOW_SPEED = 40  # tokens per second
WIDGETS = ("ipywidgets", "anywidget", "ipykernel", "jupyterlab", "matplotlib", "nbformat", "nbconvert")
LIBRARIES = ("numpy", "tokenizers", "safetensors", "regex", "yaml", "tqdm", "psutil")
FOUND = ("torch", "transformers", "huggingface_hub")  # slow to import: only looked for; torch is tried with the model
EVERYTHING = (*FOUND, *LIBRARIES, *WIDGETS)
SLOW = (
    "the machine is busy, or this was the first start, which reads hundreds of megabytes: close other programs and run "
    "the doctor once more"
)
TRY_MODEL = """
import json, time
import neox_lib
from neox_lib.generation import prompt_ids, stream_generate
tokenizer, model = neox_lib.create_tokenizer(), neox_lib.create_model(device="cpu", dtype="float32")
steps = list(stream_generate(model, prompt_ids(tokenizer, "Once upon a time"), 60, tokenizer=tokenizer))
seconds = sum(step.seconds for step in steps[1:])
text = "".join(step.text for step in steps)
print(json.dumps({"speed": (len(steps) - 1) / seconds, "text": text, "tokens": len(steps)}))
"""


def look_at_imports(what: str, names: tuple[str, ...]) -> Finding:
    """Whether packages can be imported, all in one process; if it crashes, the last one named is to blame."""
    done = in_process(
        f"import importlib as i\nfor name in {names}:\n print(name, flush=True)\n i.import_module(name)\nprint('all')"
    )
    said = done.stdout.split()
    if said[-1:] == ["all"]:
        return Finding(what, "ok", ", ".join(names))
    found = f"{said[-1] if said else 'Python'} can't be imported: {last_line(done)}"
    if done.returncode == TOO_LONG:
        return Finding(what, "slow", f"{said[-1] if said else 'Python'}: {last_line(done)}", SLOW)
    return Finding(what, "fix", found, SET_UP)


def missing_packages() -> list[str]:
    return [name for name in EVERYTHING if importlib.util.find_spec(name) is None]


def look_at_packages() -> Finding:
    missing = missing_packages()
    if missing:
        return Finding("packages", "fix", f"not installed: {', '.join(missing)}", SET_UP)
    return Finding("packages", "ok", f"all {len(EVERYTHING)} are installed")


def look_at_model() -> list[Finding]:
    """The shipped model loads and writes; a story is better proof than any version number."""
    done = in_process(TRY_MODEL)
    if done.returncode == TOO_LONG:
        return [Finding("model", "slow", f"the shipped model: {last_line(done)}", SLOW)]
    try:
        story = json.loads(done.stdout.strip().splitlines()[-1])
        speed, text = float(story["speed"]), " ".join(str(story["text"]).split())
    except (ValueError, IndexError, KeyError, TypeError):
        return [Finding("model", "fix", f"the shipped model does not write: {last_line(done)}", advice_on(done))]
    slow = speed < SLOW_SPEED
    advice = "lessons work, but longer cells take a while: plug the laptop in, close other programs" if slow else ""
    return [
        Finding("model", "ok", f"writes: Once upon a time{'' if text[:1] in ',.' else ' '}{text[:60]} ..."),
        Finding("speed", "note" if slow else "ok", f"{speed:.0f} tokens per second", advice),
    ]


def advice_on(done: subprocess.CompletedProcess) -> str:
    """What to do about a model that does not write: set up again, or undo a promoted piece."""
    places = re.findall(r'File "([^"]+)", line', done.stderr)
    inside = bool(places) and "neox_lib" in Path(places[-1]).parts
    if inside and not re.match(r"ModuleNotFoundError: No module named '(?!neox_lib)", last_line(done)):
        piece = Path(places[-1]).name
        return f"{piece} is broken: git diff neox_lib shows what changed, git checkout neox_lib undoes it"
    return SET_UP


def in_process(code: str, seconds: float = SECONDS) -> subprocess.CompletedProcess:
    """Run Python code in the repository's folder; a timeout comes back as an error in words."""
    command = [sys.executable, "-c", code]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        return subprocess.run(command, cwd=REPOSITORY, env=quiet, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode("utf-8", "replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return subprocess.CompletedProcess(command, TOO_LONG, said, f"not ready after {seconds:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def last_line(done: subprocess.CompletedProcess) -> str:
    if done.returncode < 0:
        return f"the process crashed (signal {-done.returncode})"
    return (done.stderr.strip().splitlines() or ["no message"])[-1][:200]


def look_at_widgets() -> Finding:
    return look_at_imports("widgets", WIDGETS)


def look_at_libraries() -> Finding:
    return look_at_imports("libraries", LIBRARIES)

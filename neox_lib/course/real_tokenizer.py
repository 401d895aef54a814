"""The released model's tokenizer file, which is too large to ship but small enough to fetch."""

import os
from pathlib import Path

INSTALLED = Path(__file__).resolve().parents[2] / ".venv" / "share" / "neox" / "20B_tokenizer.json"


def real_tokenizer_path() -> Path:
    """The path of GPT-NeoX-20B's `20B_tokenizer.json`: the one named by NEOX_20B_TOKENIZER, else the one that the
    set-up fetched.

    Raises FileNotFoundError saying how to get it.
    """
    path = Path(os.environ.get("NEOX_20B_TOKENIZER") or INSTALLED)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; `make test` or `python .ci/set_up.py tokenizer` fetches it")
    return path

"""What a learner has predicted and solved, kept in a small file beside the notebooks."""

import json
import os
from pathlib import Path

from neox_lib.checkpoints.atomic import write_bytes_atomically

EXERCISES: dict[str, str] = {}  # the key of every exercise whose module is loaded -> that module's name


def progress_file() -> Path:
    """`NEOX_PROGRESS` if that is set (tests start with an empty one), else `.progress.json` in the kernel's folder."""
    return Path(os.environ.get("NEOX_PROGRESS") or ".progress.json")


def read_progress() -> dict[str, dict[str, str]]:
    """`{"predictions": {key: chosen option}, "exercises": {key: "passed" or what failed}}`; empty without a file."""
    try:
        data = json.loads(progress_file().read_text("utf-8"))
    except (OSError, ValueError):
        data = {}
    data = data if isinstance(data, dict) else {}
    return {kind: data[kind] if isinstance(data.get(kind), dict) else {} for kind in ("predictions", "exercises")}


def record(kind: str, key: str, value: str) -> None:
    """Keep one answer; if the folder is not writable, nothing is stored."""
    data = read_progress()
    data[kind][key] = value
    try:
        write_bytes_atomically(progress_file(), (json.dumps(data, indent=1, sort_keys=True) + "\n").encode("utf-8"))
    except OSError:
        return

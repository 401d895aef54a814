"""Opens the checkpoint at a path: the one place that tells the layouts apart."""

from pathlib import Path

from neox_lib.checkpoints.adapters.layout import is_adapter
from neox_lib.checkpoints.adapters.reader import AdapterCheckpoint
from neox_lib.checkpoints.cached import find_base
from neox_lib.checkpoints.checkpoint import Checkpoint
from neox_lib.checkpoints.files import CheckpointError, read_fields
from neox_lib.checkpoints.gguf.file import ENDING as GGUF_ENDING
from neox_lib.checkpoints.gguf.file import find_gguf
from neox_lib.checkpoints.gguf.reader import open_gguf_checkpoint
from neox_lib.checkpoints.huggingface.layout import WEIGHT_FILES, is_huggingface
from neox_lib.checkpoints.huggingface.reader import open_huggingface
from neox_lib.checkpoints.quantized import ENDINGS, QuantizedCheckpoint, find_quantized
from neox_lib.checkpoints.quantized_by_others import check_own_config
from neox_lib.checkpoints.slim.layout import UNFINISHED, is_slim, is_whole
from neox_lib.checkpoints.slim.reader import SlimCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a slim or Hugging Face folder, a LoRA adapter's, a quantized or GGUF file or a folder with one, told apart
    by the names of files. An adapter's base model is opened with it, from this disk or the Hub's cache.

    Reads config and headers, no weights. Raises CheckpointError for a config that can't be used and, saying what is
    there, for a path without a checkpoint.
    """
    path = Path(path)
    if (path / UNFINISHED).exists():
        raise CheckpointError(f"{path}: a save into this folder was interrupted; save again to complete it")
    if is_adapter(path):
        return AdapterCheckpoint(path, open_checkpoint(find_base(path)))
    if is_slim(path):
        return SlimCheckpoint(path)
    if is_huggingface(path):
        return open_huggingface(path)
    if (file := find_quantized(path)) is not None:
        return QuantizedCheckpoint(file)
    if is_whole(path):
        return SlimCheckpoint(path)
    if (file := find_gguf(path)) is not None:
        return open_gguf_checkpoint(file)
    if path.is_dir():
        check_own_config(path, (file.name for file in path.iterdir()), read_fields(path / "config.json"))
    raise CheckpointError(describe_what_is_there(path))


def describe_what_is_there(path: Path) -> str:
    """One line for a path that holds no checkpoint: what was expected, and what is there instead."""
    files = (*ENDINGS.values(), GGUF_ENDING)
    expected = (
        "expected a folder with layer_00-model_00-model_states.pt and so on, or with config.json and "
        f"{' or '.join(WEIGHT_FILES[::2])}, "
        f"{', '.join(f'a NAME{ending}' for ending in files)} or a LoRA adapter"
    )
    if not path.exists():
        return f"{path}: no such {'file' if path.name.endswith(files) else 'folder'}; {expected}"
    if path.is_file():
        return f"{path}: a file; {expected}"
    if (path / "config.json").is_file():
        return f"{path}: a config.json without weights; {expected}. Fetch the weights too"
    return f"{path}: no checkpoint in it; {expected}"

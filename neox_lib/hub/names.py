"""What a checkpoint may be called: a path, or a model's name on the Hugging Face Hub."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILE_ENDINGS = (".safetensors", ".json", ".bin", ".pt", ".yml")


def is_hub_name(path: str | Path | None) -> bool:
    """Whether to look for this on the Hub: a string of two names and one slash, where nothing lies on the disk.

    >>> is_hub_name("EleutherAI/pythia-70m")
    True
    >>> [is_hub_name(path) for path in ("./runs/model", "runs/first/model", "model", "runs/model.int8.safetensors")]
    [False, False, False, False]
    """
    if not isinstance(path, str) or not HUB_NAME.fullmatch(path) or path.endswith(FILE_ENDINGS):
        return False
    return not Path(path).exists()


def local_path(path: str | Path) -> Path:
    """The path on this disk of a checkpoint, which may be given by its name on the Hub.

    A model that is in the Hub's cache is taken from there without asking the network; otherwise it is downloaded, and
    messages say so. Raises DownloadError, and CheckpointError when the disk has no room.
    """
    if not is_hub_name(path):
        return Path(path)
    from neox_lib.hub.download import cached_folder, download_to_cache  # slow to import, seldom needed
    from neox_lib.hub.listing import DownloadError

    try:
        return cached_folder(str(path)) or download_to_cache(str(path))
    except DownloadError as error:
        raise DownloadError(f"no folder {path} here; on the Hub: {error}") from error


def local_tokenizer(path: str | Path) -> Path:
    """The path on this disk of a tokenizer, or of a folder with one; of a name on the Hub the tokenizer alone is
    fetched, unless it is in the cache. Raises DownloadError.
    """
    if not is_hub_name(path):
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    from neox_lib.hub.download import download_tokenizer
    from neox_lib.hub.listing import DownloadError

    cached = try_to_load_from_cache(str(path), "tokenizer.json")
    try:
        return Path(cached) if isinstance(cached, str) else download_tokenizer(str(path))
    except DownloadError as error:
        raise DownloadError(f"no file or folder {path} here; on the Hub: {error}") from error

"""Models in the Hub's cache, found by name without the network."""

import re
from pathlib import Path

import huggingface_hub

from neox_lib.checkpoints.adapters.layout import ADAPTER_CONFIG, find_adapter, is_adapter, read_lora
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.huggingface.layout import find_files

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILE_ENDINGS = (".safetensors", ".gguf", ".json", ".bin", ".pt", ".yml")


def is_hub_name(path: str | Path | None) -> bool:
    """Whether to look for this on the Hub: a string like OWNER/NAME that is no path on this disk.

    >>> is_hub_name("EleutherAI/pythia-70m")
    True
    >>> [is_hub_name(path) for path in ("./runs/model", "runs/first/model", "model", "runs/model.int8.safetensors")]
    [False, False, False, False]
    """
    if not isinstance(path, str) or not HUB_NAME.fullmatch(path) or path.endswith(FILE_ENDINGS):
        return False
    return not Path(path).exists()


def cached_folder(model: str, revision: str = "main") -> Path | None:
    """A model's snapshot in the cache, if its config and all of its weights are there; an adapter's likewise."""
    try:
        for name, check in ((ADAPTER_CONFIG, find_adapter), ("config.json", find_files)):
            config = huggingface_hub.try_to_load_from_cache(model, name, revision=revision)
            if isinstance(config, str):
                check(Path(config).parent)
                return Path(config).parent
    except ValueError:  # not a name on the Hub; or a CheckpointError: something is missing
        return None
    return None


def find_base(folder: Path) -> Path:
    """The folder of an adapter's base model, on this disk or in the cache. Raises CheckpointError when it isn't there,
    saying how to get it, and when it is an adapter itself.
    """
    lora = read_lora(folder)
    base, where = Path(lora.base), f"{folder / ADAPTER_CONFIG}: the base model {lora.base}"
    if is_hub_name(lora.base):
        cached = cached_folder(lora.base, lora.base_revision)
        if cached is None:
            revision = "" if lora.base_revision == "main" else f" --revision {lora.base_revision}"
            raise CheckpointError(
                f"{where} is no folder here, and not in the Hub's cache; fetch it with: python -m neox_lib download "
                f"{lora.base}{revision}"
            )
        base = cached
    elif not base.exists():
        raise CheckpointError(
            f"{where} is not at {base.absolute()}; set base_model_name_or_path to its folder, or to its Hub name"
        )
    if is_adapter(base):
        raise CheckpointError(f"{where} is an adapter itself; convert that one first, and name the result there")
    return base

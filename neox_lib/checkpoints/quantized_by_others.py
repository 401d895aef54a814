"""Weights that another program quantized: known by config or names, and refused by name, since none of them is read."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from neox_lib.checkpoints.files import WEIGHT_DTYPES, CheckpointError, read_fields

logger = logging.getLogger(__name__)

# The methods' names as they write them themselves, where a config spells them differently.
METHODS = {"gptq": "GPTQ", "awq": "AWQ", "aqlm": "AQLM", "eetq": "EETQ", "hqq": "HQQ", "vptq": "VPTQ", "fp8": "FP8"}
# Files in which older versions of a method's own program describe what it did.
OWN_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Endings of the tensors that a method puts beside or in place of a weight; the first that is found counts.
ENDINGS = {
    "gptq": (".g_idx",),
    "gptq or awq": (".qweight", ".qzeros"),
    "bitsandbytes": (".SCB", ".absmax", ".quant_map", ".weight_format"),
    "compressed-tensors": (".weight_packed",),
    "hqq": (".W_q",),
    "aqlm": (".codebooks", ".codes"),
    "eetq": (".weight_scales",),
    "quanto": (".weight._data",),
    "fp8": (".weight_scale", ".weight_scale_inv"),
}


def method_said(fields: Mapping[str, Any]) -> str | None:
    """The method that a `config.json` names; None where it says nothing of quantization."""
    said = fields.get("quantization_config")
    if not said:
        return None
    fallback = "bitsandbytes" if any(str(key).startswith("load_in_") for key in said) else "a method without a name"
    return str(said.get("quant_method") or fallback) if isinstance(said, Mapping) else str(said)


def method_found(dtypes: Mapping[str, torch.dtype | str]) -> tuple[str, str] | None:
    """The method by which tensors of these names and dtypes were quantized, and the one that shows it."""
    for method, endings in ENDINGS.items():
        for key in dtypes:
            if key.endswith(endings):
                return method, key
    strange = (key for key, dtype in dtypes.items() if dtype not in WEIGHT_DTYPES.values())
    return next((("", f"{key} is {dtypes[key]}, expected float16, bfloat16 or float32") for key in strange), None)


def refuse(where: str | Path, fields: Mapping[str, Any], method: str, shown_by: str) -> NoReturn:
    """Raise CheckpointError that says what quantized the weights and what to fetch instead."""
    names = " or ".join(METHODS.get(name, name) for name in method.split(" or ")) if method else "another program"
    base = fields.get("_name_or_path")
    known = isinstance(base, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base, re.ASCII)
    named = f"config.json names {base}" if known else "its model card names it"
    raise CheckpointError(
        f"{where}: quantized by {names} ({shown_by}), which can't be read here; fetch the model as it was before "
        f"({named}), and give dtype int8 if it should be small"
    )


def check_tensors_are_weights(path: Path, dtypes: Mapping[str, torch.dtype | str]) -> None:
    """Raise CheckpointError, naming the method, when tensors of these names and dtypes are not plain weights."""
    if found := method_found(dtypes):
        fields = read_fields(path.parent / "config.json")
        refuse(path, fields, method_said(fields) or found[0], found[1])


def check_size(where: str | Path, fields: Mapping[str, Any], nbytes: int, half_precision: int) -> None:
    """Raise CheckpointError for a `config.json` that says quantized over `nbytes` of weights, less than the model has
    in half precision. A config may also have outlived its quantization: then a message says that it is ignored.
    """
    if (method := method_said(fields)) is None:
        return
    if nbytes < half_precision:
        refuse(where, fields, method, f"{nbytes / 1e9:.2f} GB, in half precision {half_precision / 1e9:.2f} GB")
    logger.info("%s: quantization_config is ignored; weights are read as stored", where)


def check_own_config(where: str | Path, names: Iterable[str], fields: Mapping[str, Any]) -> None:
    """Raise CheckpointError when, among files of these `names` without weights of ours, one says quantized."""
    own = next((name for name in names if name in OWN_CONFIGS), None)
    if method := OWN_CONFIGS[own] if own else method_said(fields):
        refuse(where, fields, method, own or "quantization_config")

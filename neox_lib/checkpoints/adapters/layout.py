"""PEFT's layout: which files an adapter's folder has, and which adapters can be merged."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox_lib.checkpoints.files import CheckpointError, read_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which PEFT looks for them
# Settings of training, of saving, and of what the tensors show themselves; any other that is on changes the merge.
WITHOUT_EFFECT = re.compile(
    r"task_type|peft_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|(target|exclude)_modules"
    r"|lora_dropout|bias|modules_to_save|layers_(to_transform|pattern)|lora_bias|megatron_core|qalora_group_size|eva_config"
    r"|ensure_weight_tying|runtime_config|r|lora_alpha|use_rslora|(rank|alpha)_pattern"
    r"|fan_in_fan_out"  # of GPT-2's Conv1D; PEFT, too, ignores it at a Linear
)
# How A and B began. Others, such as PiSSA, have changed the base model's own weights as well.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraConfig:
    """What an `adapter_config.json` says: where the base model is, and what A and B are multiplied by.

    The keys of a pattern are regular expressions for the end of a module's name, such as `attention.dense`.
    """

    base: str
    base_revision: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        return of_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (Kalajdzievski 2023)."""
        rank = self.rank(module)
        return of_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's name.

    >>> of_pattern({"layers.1.attention.dense": 2, "dense": 4}, "gpt_neox.layers.0.attention.dense", 8)
    4
    """
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def find_adapter(folder: Path) -> Path:
    """The file with an adapter's tensors. Raises CheckpointError when there is none."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: an adapter without its weights; expected {' or '.join(ADAPTER_FILES)}")


def read_lora(folder: Path) -> LoraConfig:
    """The config of an adapter's folder. Raises CheckpointError, naming it, for another kind of adapter than LoRA, and
    for a setting that would change the merge.
    """
    path = folder / ADAPTER_CONFIG
    fields = read_object(path)
    if (kind := fields.get("peft_type")) != "LORA":
        raise CheckpointError(
            f"{path}: an adapter of type {kind}; only LORA is read. If PEFT can merge it, do that first"
        )
    start = fields.pop("init_lora_weights", True)
    changes = {name: value for name, value in fields.items() if value and not WITHOUT_EFFECT.fullmatch(name)}
    if start not in PLAIN_STARTS:
        changes["init_lora_weights"] = start
    for name, value in changes.items():
        called = {"use_dora": "DoRA: "}.get(name, "")
        raise CheckpointError(
            f"{path}: {called}{name} is {value!r}; only plain LoRA can be merged here. Merge it with PEFT's "
            "merge_and_unload first"
        )
    base = fields.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(f"{path}: names no base model; set base_model_name_or_path to its folder or Hub name")
    try:
        given = {name: fields[name] for name in ("rank_pattern", "alpha_pattern") if fields.get(name)}
        config = LoraConfig(
            base,
            fields.get("revision") or "main",
            fields.get("r", 8),
            fields.get("lora_alpha", 8),
            bool(fields.get("use_rslora")),
            **given,
        )
        ranks = [config.r, *config.rank_pattern.values()]
        if not all(type(rank) is int and rank > 0 for rank in ranks):
            raise ValueError(f"its ranks are {ranks}")
        if not all(type(alpha) in (int, float) for alpha in (config.lora_alpha, *config.alpha_pattern.values())):
            raise ValueError(f"lora_alpha is {config.lora_alpha!r}, alpha_pattern {config.alpha_pattern!r}")
        of_pattern(dict.fromkeys([*config.rank_pattern, *config.alpha_pattern]), "", None)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(f"{path}: not a LoRA config: {error}") from error
    return config

"""The config of a checkpoint: our own `config.json`, gpt-neox's `.yml`, or what the shards themselves show."""

import logging
import re
from pathlib import Path
from typing import Any

import yaml

from neox_lib.checkpoints.files import CheckpointError, check_no_pointer
from neox_lib.checkpoints.slim.layout import Shards, check_layers
from neox_lib.checkpoints.slim.settings import unusual_settings, what_can_be_run
from neox_lib.checkpoints.tokenizer_files import with_vocabulary
from neox_lib.config import NeoXConfig

logger = logging.getLogger(__name__)


class PlainLoader(yaml.SafeLoader):
    """Plain data without aliases, with which a small file could stand for more than memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases, such as *name, are not read; write out what they stand for")
        return super().compose_node(parent, index)


def read_config(shards: Shards) -> NeoXConfig:
    """The config of a slim checkpoint: `config.json` beside the shards, else gpt-neox's `.yml`, else `inv_freq`;
    `with_vocabulary` adds which rows stand for tokens and which of them end a text.

    Raises CheckpointError when none of them gives the number of heads, or when the files don't match the config.
    """
    folder, fields = shards.folder, {}
    try:
        if (folder / "config.json").is_file():
            check_no_pointer(folder / "config.json")
            config = NeoXConfig.from_json(folder / "config.json")
            if b"eos_token_ids" in (folder / "config.json").read_bytes():  # an older one lacks it
                fields = {"eos_token_ids": config.eos_token_ids}
        elif yml := find_yml(folder):
            config = config_from_yml(yml, shards)
        else:
            config = config_from_inv_freq(shards)
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    check_layers(shards, config)
    return with_vocabulary(config, folder, fields)


def find_yml(folder: Path) -> Path | None:
    """The gpt-neox config of a release: beside the shards or one level up, there or in `configs/`."""
    for place in (folder, folder / "configs", folder.parent, folder.parent / "configs"):
        files = [path for path in sorted(place.glob("*.yml")) if path.is_file()]
        found = [path for path in files if re.search(rb"hidden[-_]size", path.read_bytes())]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{place}: {names} each describe a model; copy the right one beside the shards")
        if found:
            return found[0]
    return None


def sizes_in(shards: Shards) -> dict[str, Any]:
    """The sizes found in the shards themselves: hidden size, and vocabulary and MLP width summed over the ranks."""
    try:
        embeddings = [shards.look(path)["word_embeddings.weight"] for path in shards.paths[0]]
        inner = [shards.look(path)["mlp.dense_h_to_4h.bias"] for path in shards.paths[2]]
        return {
            "vocab_size": sum(len(part) for part in embeddings),
            "hidden_size": embeddings[0].shape[1],
            "intermediate_size": sum(len(part) for part in inner),
        }
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{shards.folder}: not a GPT-NeoX checkpoint: layer files 00 and 02 lack {error}"
        ) from error


def config_from_yml(path: Path, shards: Shards) -> NeoXConfig:
    """Read gpt-neox's dialect, where dashes equal underscores and a missing key has gpt-neox's default.

    The vocabulary with its padding comes from the shards. Raises CheckpointError for what NeoXModel does not compute.
    """
    try:
        content = yaml.load(path.read_text("utf-8"), PlainLoader)
        fields = {str(key).replace("-", "_"): value for key, value in content.items()}
        for name, value in unusual_settings({"pos_emb": "learned"} | fields):
            raise CheckpointError(f"{path}: {name} is {value!r}; {what_can_be_run(name)}")
        sizes = sizes_in(shards)
        if fields["hidden_size"] != sizes["hidden_size"]:
            where = f"{shards.paths[0][0]}: word_embeddings.weight"
            raise CheckpointError(
                f"{where} has {sizes['hidden_size']} columns, expected {fields['hidden_size']} from {path}"
            )
        return NeoXConfig(
            **sizes,
            tokenizer_vocab_size=sizes["vocab_size"],
            num_hidden_layers=fields["num_layers"],
            num_attention_heads=fields["num_attention_heads"],
            max_position_embeddings=fields["max_position_embeddings"],
            rotary_pct=float(fields.get("rotary_pct", 1.0)),
            rotary_emb_base=float(fields.get("rotary_emb_base", 10000)),
            layer_norm_eps=float(fields.get("layernorm_epsilon", 1e-5)),
            hidden_act="gelu_fast" if fields.get("bias_gelu_fusion", False) else "gelu",
            use_parallel_residual=fields.get("gpt_j_residual", False),
            tie_word_embeddings=not fields.get("no_weight_tying", False),
            attention_bias=fields.get("use_bias_in_attn_linear", True),
        )
    except CheckpointError:
        raise
    except Exception as error:  # yaml raises whatever the text leads it to
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a readable gpt-neox config ({type(error).__name__}: {reason})") from error


def config_from_inv_freq(shards: Shards) -> NeoXConfig:
    """Guess from the rotary frequencies in the first block, as 20B has them; warns that the head size is assumed.

    There are half as many frequencies as rotary dimensions, and 20B turns a quarter of each head.
    """
    sizes = sizes_in(shards)
    inv_freq = shards.look(shards.paths[2][0]).get("attention.rotary_emb.inv_freq")
    if inv_freq is None:
        raise CheckpointError(
            f"{shards.folder}: no config.json, no .yml and no inv_freq, so the number of heads is unknown; add one"
        )
    rotary_ndims = 2 * inv_freq.numel()
    head_dim = 4 * rotary_ndims
    if head_dim == 0 or sizes["hidden_size"] % head_dim:
        raise CheckpointError(
            f"{shards.paths[2][0]}: inv_freq has {inv_freq.numel()} entries, which does not fit 25 % rotary and hidden "
            f"size {sizes['hidden_size']}; add a config.json"
        )
    logger.warning(
        "%s has no config: assuming 25 %% rotary (head size %d) and 20B's other settings", shards.folder, head_dim
    )
    return NeoXConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        tokenizer_vocab_size=sizes["vocab_size"],
        num_hidden_layers=max(shards.paths) - 4,
        num_attention_heads=sizes["hidden_size"] // head_dim,
        attention_bias="attention.dense.bias" in shards.look(shards.paths[2][0]),
    )

"""A model's own way of writing: its `generation_config.json`, as `transformers` understands it, as a Sampling."""

from pathlib import Path
from typing import Any

from neox_lib.checkpoints.files import CheckpointError, read_object
from neox_lib.checkpoints.tokenizer_files import GENERATION
from neox_lib.sampling import Sampling

TRANSFORMERS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}  # where unsaid
# Settings that choose other tokens, and their values that don't; those of the second only where tokens are drawn.
NOT_DONE: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0,
    "dola_layers": None,
    "token_healing": False,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}
NOT_DRAWN: dict[str, Any] = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}


def read_sampling(folder: Path) -> Sampling:
    """What the folder's `generation_config.json` says of choosing tokens: greedy unless `do_sample` is true. Lengths
    are left to whoever asks for a text.

    Raises CheckpointError without such a file, for a value out of range, and for a setting that we don't have.
    """
    path = folder / GENERATION
    if not path.exists():
        raise CheckpointError(f"{path}: missing, so this model has no defaults of its own; give each setting yourself")
    fields = {name: value for name, value in read_object(path).items() if value is not None}
    drawn = fields.get("do_sample", False)
    for name, neutral in (NOT_DONE | (NOT_DRAWN if drawn else {})).items():
        if (value := fields.get(name, neutral)) != neutral and value not in ([], {}):
            raise CheckpointError(f"{path}: {name} is {value!r}, which we can't do; give the other settings yourself")
    said = TRANSFORMERS | {name: fields[name] for name in TRANSFORMERS if name in fields}
    said |= {"top_k": said["top_k"] or None, "temperature": said["temperature"] if drawn else 0.0}
    try:
        if type(drawn) is not bool:
            raise ValueError(f"do_sample must be true or false, got {drawn!r}")
        for name, value in said.items():
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"{name} must be a number, got {value!r}")
        return Sampling(**said, stop_strings=fields.get("stop_strings", ()))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; correct it, or give each setting yourself") from error

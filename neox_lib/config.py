"""The shape of a GPT-NeoX model: one dataclass, the known sizes, and what each costs in bytes."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neox_lib.rope_scaling import RopeScaling

SMALL_MODEL_PARAMETERS = 100_000_000  # up to here a CPU keeps a model in fp32 and runs it through its modules
ACTIVATIONS = ("gelu_fast", "gelu")
# The fields of each kind, by name: annotations may be strings, and a check of types would then let everything pass.
WHOLE_NUMBERS = (
    "vocab_size",
    "tokenizer_vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
NUMBERS = ("rotary_pct", "rotary_emb_base", "layer_norm_eps")
# Past these a file is damaged, and would take the memory before it shows that it has no such weights.
MOST = {"num_hidden_layers": 10_000, "max_position_embeddings": 2**24}
MOST_OF_ANY = 10**9
FLAGS = ("use_parallel_residual", "tie_word_embeddings", "attention_bias")
# What most models have none of is absent in their files, so that these stay as they were before it could be said.
UNSAID = {"attention_bias": True, "rope_scaling": None}


@dataclass(frozen=True)
class NeoXConfig:
    """Everything that fixes the shapes and the arithmetic of a GPT-NeoX model.

    The defaults are GPT-NeoX-20B (EleutherAI/gpt-neox, `configs/20B.yml`). Field names are those of a Hugging Face
    `config.json`; `tokenizer_vocab_size` is ours: token ids from there up to `vocab_size` are padding rows that stand
    for no token, and generation never emits them. `eos_token_ids` are ours too: each of them ends a text, and there may
    be none.

    `hidden_act` is "gelu_fast" (the tanh approximation, as 20B was trained) or "gelu" (exact, as Pythia was).
    Without `attention_bias` the two layers of attention have no biases. `rope_scaling` may be given as a dict.
    Raises ValueError when the numbers cannot form a model, naming the field.
    """

    vocab_size: int = 50432
    tokenizer_vocab_size: int = 50277
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_fast"
    use_parallel_residual: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    rope_scaling: RopeScaling | None = None
    eos_token_ids: tuple[int, ...] = (0,)

    def __post_init__(self):
        ends = self.eos_token_ids
        if not isinstance(ends, list | tuple) or not all(type(each) is int and each >= 0 for each in ends):
            raise ValueError(f"eos_token_ids must be token ids, got {ends!r}")
        object.__setattr__(self, "eos_token_ids", tuple(ends))  # JSON has lists
        if isinstance(self.rope_scaling, dict):  # as a file has it
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        elif not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(f"rope_scaling must be an object or null, got {self.rope_scaling!r}")
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
            if value > (most := MOST.get(name, MOST_OF_ANY)):
                raise ValueError(f"{name} must be {most:,} at most, got {value}")
        for name in NUMBERS:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 1e-18 < value < 1e18:
                raise ValueError(f"{name} must be a positive number, from 1e-18 to 1e18, got {value!r}")
        for name in FLAGS:
            value = getattr(self, name)
            if type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into num_attention_heads {self.num_attention_heads}"
            )
        if self.rotary_pct > 1 or self.rotary_ndims < 2 or self.rotary_ndims % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} of head size {self.head_dim} gives {self.rotary_ndims} rotary "
                f"dimensions; they turn in pairs, so it must be an even number from 2 to {self.head_dim}"
            )
        if self.rope_scaling is not None and self.rotary_emb_base == 1:
            raise ValueError("rotary_emb_base 1 turns all pairs alike, so there is none that rope_scaling could slow")
        if self.tokenizer_vocab_size > self.vocab_size:
            raise ValueError(f"tokenizer_vocab_size {self.tokenizer_vocab_size} exceeds vocab_size {self.vocab_size}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_ndims(self) -> int:
        """How many of a head's dimensions are rotated by position; the others pass through."""
        return int(self.head_dim * self.rotary_pct)

    def parameter_count(self) -> int:
        """Number of trained parameters (a tied output matrix counts once)."""
        return sum(math.prod(shape) for shape in parameter_shapes(self).values())

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights if all of them are stored as `dtype`."""
        return self.parameter_count() * dtype.itemsize

    def kv_cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one sequence of `tokens` keeps: a key and a value of C numbers per layer."""
        return 2 * self.num_hidden_layers * self.hidden_size * tokens * dtype.itemsize

    def stored_fields(self) -> dict[str, Any]:
        """The fields as our own files hold them."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in UNSAID or value != UNSAID[name]}

    def to_json(self) -> str:
        return json.dumps({"model_type": "gpt_neox", **self.stored_fields()}, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> "NeoXConfig":
        """Read what `to_json` wrote. Raises ValueError naming the file for anything that is not a whole config."""
        try:
            fields = json.loads(Path(path).read_text("utf-8"))
            model_type = fields.pop("model_type", "gpt_neox")
            if model_type != "gpt_neox":
                raise ValueError(f'model_type is {model_type!r}, expected "gpt_neox"')
            needed = {field.name for field in dataclasses.fields(cls)} - UNSAID.keys() - {"eos_token_ids"}
            missing = needed - fields.keys()
            if missing:
                raise ValueError(f"missing {', '.join(sorted(missing))}")
            return cls(**fields)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a NeoX config: {error}") from error


def parameter_shapes(config: NeoXConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all parameters, in file order, as a `NeoXModel` has them, without building one.

    A tied model has no output matrix of its own.
    """
    hidden, inner, table = config.hidden_size, config.intermediate_size, (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": table}
    for index in range(config.num_hidden_layers):
        block = f"layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{block}.{norm}.weight": (hidden,), f"{block}.{norm}.bias": (hidden,)}
        for linear, outputs, inputs in (
            ("attention.query_key_value", 3 * hidden, hidden),
            ("attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", inner, hidden),
            ("mlp.dense_4h_to_h", hidden, inner),
        ):
            shapes[f"{block}.{linear}.weight"] = (outputs, inputs)
            if config.attention_bias or not linear.startswith("attention."):
                shapes[f"{block}.{linear}.bias"] = (outputs,)
    shapes |= {"norm.weight": (hidden,), "norm.bias": (hidden,)}
    return shapes if config.tie_word_embeddings else shapes | {"final_linear.weight": table}


def neox_20b() -> NeoXConfig:
    """GPT-NeoX-20B as released (Black et al. 2022, https://arxiv.org/abs/2204.06745)."""
    return NeoXConfig()


# layers, hidden size, heads, padded vocabulary of each Pythia (Biderman et al. 2023, https://arxiv.org/abs/2304.01373)
PYTHIA_SHAPES = {
    "14m": (6, 128, 4, 50304),
    "31m": (6, 256, 8, 50304),
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}


def pythia(size: str) -> NeoXConfig:
    """The Pythia model of that `size`, "14m" to "12b": NeoX with the exact GELU. Raises ValueError for another size."""
    if size not in PYTHIA_SHAPES:
        raise ValueError(f"no Pythia of size {size!r}; the sizes are {', '.join(PYTHIA_SHAPES)}")
    layers, hidden_size, heads, vocab_size = PYTHIA_SHAPES[size]
    return NeoXConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        hidden_act="gelu",
    )


def tiny() -> NeoXConfig:
    """The shape of the model that ships with this package: 20B's rules at 3.5 million parameters."""
    return NeoXConfig(
        vocab_size=2048,
        tokenizer_vocab_size=2048,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
    )


def preset(name: str) -> NeoXConfig:
    """ "neox_20b", "tiny" (the shipped model's) or a Pythia such as "1.4b". Raises ValueError for another name."""
    known = {"neox_20b": neox_20b, "20b": neox_20b, "tiny": tiny}
    return known[name]() if name in known else pythia(name.removeprefix("pythia-"))


def format_bytes(count: float) -> str:
    """A byte count with a binary unit, as memory is counted.

    >>> format_bytes(41109135360), format_bytes(7045632), format_bytes(512)
    ('38.3 GiB', '6.7 MiB', '512 B')
    """
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{value:,.1f} {units[0]}"

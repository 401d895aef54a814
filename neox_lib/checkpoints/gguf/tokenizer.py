"""A byte-level BPE tokenizer as the metadata of a GGUF file: a token and its type for each row, and the merges."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.gguf.file import ENDING, GGUFFile, open_gguf
from neox_lib.config import NeoXConfig
from neox_lib.tokenizer import ENDOFTEXT, PADDING, BPETokenizer, read_tokenizer

KEY = "tokenizer.ggml."
# llama.cpp's name of a rule by which a text is cut before its merges. Its own converter calls 20B's tokenizer "olmo",
# after a model that has taken it over; those behind it are other names of the same rule, GPT-2's.
RULE, SAME_RULE = "olmo", ("olmo", "gpt-2", "mpt", "jais", "trillion")
NORMAL, CONTROL, LITERAL, UNUSED = 1, 3, 4, 5
ROLE_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NFC = f"{KEY}normalizer.nfc"  # ours: llama.cpp reads a text as it is
ADD_BOS, CHAT_TEMPLATE = f"{KEY}add_bos_token", "tokenizer.chat_template"
ENDS = (f"{KEY}eos_token_id", f"{KEY}eot_token_id", f"{KEY}eom_token_id")


def read_bpe(file: Path) -> BPETokenizer:
    """The tokenizer of a GGUF file or of a tokenizer's JSON. Raises CheckpointError for another kind."""
    if file.suffix == ENDING:
        return bpe_of(open_gguf(file))
    try:
        return read_tokenizer(file)
    except ValueError as error:
        raise CheckpointError(f"{error}. A GGUF file can't hold this tokenizer: write another layout") from error


def bpe_of(file: GGUFFile) -> BPETokenizer:
    """The tokenizer in a file's metadata. Raises CheckpointError, naming the key, for another kind and for damage."""
    kind, rule = file.fields.get(f"{KEY}model"), file.fields.get(f"{KEY}pre", RULE)
    if kind != "gpt2" or rule not in SAME_RULE:
        raise CheckpointError(
            f"{file}: its tokenizer is {kind!r} with the rule {rule!r}; only 'gpt2' with one of "
            f"{', '.join(SAME_RULE)} is read here. Give the model's tokenizer.json"
        )
    if file.fields.get(ADD_BOS, False) is not False:
        raise CheckpointError(f"{file}: {ADD_BOS} is set, which is not read here. Give the model's tokenizer.json")
    tokens, types = tokens_of(file)
    ids = {token: token_id for token_id, token in enumerate(tokens) if types[token_id] != UNUSED}
    added = {token: token_id for token, token_id in ids.items() if types[token_id] in (CONTROL, LITERAL)}
    special = {token for token, token_id in added.items() if types[token_id] == CONTROL}
    merges = file.fields.get(f"{KEY}merges", [])
    pairs = [tuple(merge.split(" ")) for merge in merges if isinstance(merge, str)] if isinstance(merges, list) else []
    if not pairs or len(pairs) < len(merges) or any(len(pair) != 2 or "".join(pair) not in ids for pair in pairs):
        raise CheckpointError(f"{file}: {KEY}merges are not pairs that make tokens; fetch or convert it again")
    tokenizer = BPETokenizer(ids, pairs, added, special)  # type: ignore[arg-type]
    tokenizer.to_nfc = file.fields.get(NFC, True) is True
    return tokenizer


def tokens_of(file: GGUFFile) -> tuple[list[str], list[int]]:
    """Every row's token and its type. Raises CheckpointError when they are not tokens, each once, with their types."""
    tokens = file.fields.get(f"{KEY}tokens", [])
    if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        raise CheckpointError(f"{file}: {KEY}tokens are no list of texts; fetch or convert it again")
    types = file.fields.get(f"{KEY}token_type", [NORMAL] * len(tokens))
    if not (isinstance(types, list) and len(tokens) == len(types)):
        raise CheckpointError(f"{file}: {KEY}token_type gives no type to each token; fetch or convert it again")
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{file}: {KEY}tokens holds a token twice; fetch or convert it again")
    return tokens, types


def special_tokens_of(file: GGUFFile) -> dict[str, str]:
    """The control tokens by role, as a chat template names them."""
    tokens, _ = tokens_of(file)
    ids = {role: file.fields.get(f"{KEY}{name}_token_id") for role, name in ROLE_NAMES.items()}
    return {role: tokens[each] for role, each in ids.items() if type(each) is int and 0 <= each < len(tokens)}


def with_tokens(config: NeoXConfig, file: GGUFFile) -> NeoXConfig:
    """A config with what the tokens say: which rows stand for one, and which of them end a text; `<|endoftext|>` where
    the file names none. Raises CheckpointError for tokens of another model, and for an end that is none of them.
    """
    tokens, types = tokens_of(file)
    if len(tokens) != config.vocab_size:
        raise CheckpointError(
            f"{file}: has {len(tokens)} tokens and {config.vocab_size} rows for them; fetch or convert it again"
        )
    used = [token_id for token_id, kind in enumerate(types) if kind != UNUSED]
    ends = [file.fields[key] for key in ENDS if key in file.fields]
    if not ends and ENDOFTEXT in tokens:
        ends = [tokens.index(ENDOFTEXT)]
    if not used or not all(type(end) is int and 0 <= end < len(tokens) for end in ends):
        raise CheckpointError(f"{file}: its texts end with {ends} of {len(used)} tokens; fetch or convert it again")
    return replace(config, tokenizer_vocab_size=used[-1] + 1, eos_token_ids=tuple(dict.fromkeys(ends)))


def tokenizer_fields(tokenizer: BPETokenizer, config: NeoXConfig, roles: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values for a tokenizer: rows without a token get one that is marked unused. `roles` as from
    `role_fields`. Raises CheckpointError for a model without an end or with more than three, and for merges of
    no token.
    """
    ends = config.eos_token_ids
    rows = range(config.vocab_size)
    if not 1 <= len(ends) <= len(ENDS) or not all(end in rows for end in ends):
        raise CheckpointError(
            f"texts end with the tokens {list(ends)}, and a GGUF file names one to {len(ENDS)} of the {len(rows)}; set "
            "eos_token_id in the source's generation_config.json"
        )
    tokens = [tokenizer.id_to_token(row) for row in rows]
    kinds = [
        UNUSED if token is None
        else CONTROL if token in tokenizer.special
        else LITERAL if token in tokenizer.added
        else NORMAL
        for token in tokens
    ]  # fmt: skip
    if not tokenizer.merges or not {left + right for left, right in tokenizer.merges} <= set(tokens):
        raise CheckpointError(
            f"the tokenizer has no merges, or some that make tokens past the {len(rows)} rows of the model, which a "
            "GGUF file can't hold: write another layout"
        )
    fields = {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": RULE,
        f"{KEY}tokens": [f"[PAD{row}]" if token is None else token for row, token in zip(rows, tokens, strict=True)],
        f"{KEY}token_type": kinds,
        f"{KEY}merges": [" ".join(merge) for merge in tokenizer.merges],
        ADD_BOS: False,
        NFC: tokenizer.to_nfc,
        **dict(zip(ENDS, ends, strict=False)),
    }
    others = {"bos": roles.get("bos_token_id"), "padding": roles.get("pad_token_id", tokenizer.token_to_id(PADDING))}
    return fields | {
        f"{KEY}{role}_token_id": token_id
        for role, token_id in others.items()
        if type(token_id) is int and token_id in rows
    }

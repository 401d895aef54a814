"""A byte-level BPE tokenizer in the older layout: vocab.json, merges.txt, and other tokens in small files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from neox_lib.checkpoints.files import CheckpointError, read_fields
from neox_lib.tokenizer import ENDOFTEXT, PADDING

VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
# The classes of `transformers` that are known, and the roles that tokens have in each unless the files say others. The
# second, which a model of this family has without being told, reads a text in its NFC form.
ENDS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT)
CLASSES = {"GPT2Tokenizer": ENDS, "GPTNeoXTokenizer": {**ENDS, "pad_token": PADDING}}
SAVE_AS_JSON = "transformers' AutoTokenizer can save it as a tokenizer.json, which is read"


def read_vocab_and_merges(vocab: Path) -> Tokenizer:
    """The tokenizer of a `vocab.json` and what lies beside it, as `transformers` reads the same folder; but a token
    that is in none of the files gets no new id.

    Raises CheckpointError for a class that may cut a text differently, and ValueError for ids that leave a gap.
    """
    folder = vocab.parent
    config = read_fields(folder / CONFIG)
    kind = str(config.get("tokenizer_class") or "GPTNeoXTokenizer").removesuffix("Fast")
    unusual = [name for name in ("add_bos_token", "add_eos_token") if config.get(name)]
    if kind not in CLASSES or unusual:
        found = f"{unusual[0]} is true" if unusual else f"a {kind}"
        raise CheckpointError(f"{vocab}: {found} in {CONFIG}; only {' and '.join(CLASSES)} are read so. {SAVE_AS_JSON}")
    if not (folder / MERGES).is_file():
        raise CheckpointError(f"{folder / MERGES}: missing; it belongs to {VOCAB}. Fetch it too")
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(folder / MERGES)))
    if kind == "GPTNeoXTokenizer":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    known = {role: token for role, token in CLASSES[kind].items() if tokenizer.token_to_id(token) is not None}
    add_tokens(tokenizer, folder, known)
    return tokenizer


def special_tokens(fields: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The tokens that have a role by a tokenizer's small files, such as `eos_token`: special, whatever they say."""
    values = [value for name, value in fields.items() if name.endswith(("_token", "special_tokens"))]
    tokens = [token for value in values for token in (value if isinstance(value, list) else [value])]
    yield from (AddedToken(token, special=True) for token in tokens if isinstance(token, str))
    for token in tokens:  # those with flags come last, so that they are kept
        if isinstance(token, Mapping) and "content" in token:
            flags = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "normalized", "single_word")}
            yield AddedToken(token["content"], special=True, **flags)


def add_tokens(tokenizer: Tokenizer, folder: Path, roles: Mapping[str, Any]) -> None:
    """Add the tokens that are matched in the text itself, by a folder's small files; tokens have these `roles` unless
    the files say others. `added_tokens_decoder` of the newer `tokenizer_config.json` comes before the older files.
    Raises ValueError for an id that the library doesn't give, since it counts on without a gap.
    """
    config = {**roles, **read_fields(folder / CONFIG)}
    tokens, said = {}, config.get("added_tokens_decoder")
    fields = config if said else {**config, **read_fields(folder / SPECIAL_MAP)}
    special = {token.content: token for token in special_tokens(fields)}
    if said:
        for token_id, token in said.items():
            tokens[int(token_id)] = AddedToken(**{key: value for key, value in token.items() if key != "__type"})
    else:
        for token, token_id in read_fields(folder / ADDED).items():
            tokens[token_id] = AddedToken(token, special=token in special, normalized=token not in special)
    for token_id, token in sorted(tokens.items()):
        tokenizer.add_tokens([token])
        if (given := tokenizer.token_to_id(token.content)) != token_id:
            raise ValueError(f"{token.content!r} has id {token_id} and would get {given}: ids are missing")
    known = {token.content for token in tokens.values()}
    tokenizer.add_tokens([token for token in special.values() if token.content not in known])

"""The small files beside a model's weights: its tokenizer, which rows stand for tokens, and which tokens end a text."""

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from neox_lib.checkpoints.adapters.layout import is_adapter
from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.checkpoints.cached import find_base
from neox_lib.checkpoints.files import CheckpointError, check_no_pointer, read_fields
from neox_lib.checkpoints.gguf.file import ENDING as GGUF_ENDING
from neox_lib.checkpoints.gguf.file import find_gguf, open_gguf
from neox_lib.checkpoints.gguf.tokenizer import CHAT_TEMPLATE, read_bpe
from neox_lib.checkpoints.huggingface.layout import is_huggingface
from neox_lib.checkpoints.sentencepiece import read_sentencepiece
from neox_lib.checkpoints.slim.layout import is_slim, is_whole
from neox_lib.checkpoints.vocab_and_merges import ADDED, MERGES, VOCAB, read_vocab_and_merges
from neox_lib.config import NeoXConfig
from neox_lib.spelling import count_ids
from neox_lib.tokenizer import ENDOFTEXT, save_tokenizer

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.json", VOCAB, "spiece.model", "tokenizer.model")  # the first that a folder has is its own
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", SETTINGS, "special_tokens_map.json", TEMPLATE)
OLDER_FILES = (ADDED, MERGES, *TOKENIZERS[1:])  # in place of a tokenizer.json
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer file meant by a path: the file itself, or the one of a folder or of a file of weights. A GGUF file
    holds its own; beside other weights it is another model's.

    20B's release keeps its `20B_tokenizer.json` one level above its slim folder; a file above any other folder is
    another model's. An adapter without one has its base model's. Raises FileNotFoundError when there is none,
    CheckpointError for a folder with several GGUF files.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a model or a tokenizer JSON there")
    if path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir():
        places = [path / name for name in (*TOKENIZERS, "20B_tokenizer.json")]
        if slim := is_slim(path) or is_whole(path):
            places.append(path.absolute().parent / "20B_tokenizer.json")
        found = next((place for place in places if place.is_file()), None)
        if found is None and is_adapter(path):
            return find_tokenizer(find_base(path))
        if found is None and not (slim or is_huggingface(path) or any(path.glob("*.int[48].safetensors"))):
            found = find_gguf(path)
        path = found or places[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no tokenizer there; give a tokenizer JSON, such as 20B_tokenizer.json")
    return path


def tokenizer_beside(folder: Path) -> Path | None:
    """The tokenizer file of a folder of weights, if it has one."""
    try:
        return find_tokenizer(folder)
    except FileNotFoundError:
        return None


def open_tokenizer(file: str | Path) -> Tokenizer:
    """The fast tokenizer (Hugging Face `tokenizers`) of a file, or in a GGUF file; its ids are `BPETokenizer.encode`'s.

    A file may still hold the truncation and padding of its last training batch: they are switched off. Raises
    ValueError when the file is no tokenizer or one that reads no text.
    """
    file = Path(file)
    try:
        if file.is_file():
            check_no_pointer(file)
        if file.name == VOCAB:
            tokenizer = read_vocab_and_merges(file)
        elif file.name in OLDER_FILES:
            tokenizer = read_sentencepiece(file)
        elif file.suffix == GGUF_ENDING:
            with tempfile.TemporaryDirectory() as folder:
                save_tokenizer(read_bpe(file), path := Path(folder, "tokenizer.json"))
                tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for ids in ([], tokenizer.encode("a text").ids):
            tokenizer.decode(ids)
    except CheckpointError:
        raise
    except BaseException as error:  # the library raises bare Exceptions, and a panic of Rust is not even one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file}: not a tokenizer file: {' '.join(str(error).split())[:200]}") from error
    return tokenizer


def chat_template(tokenizer: Path) -> tuple[str | None, Path]:
    """The chat template in a GGUF file, or beside a tokenizer's file, and the file that it is in; None where there is
    none. Raises CheckpointError for one that is no text.
    """
    file, said = tokenizer.with_name(TEMPLATE), None
    if tokenizer.suffix == GGUF_ENDING:
        file, said = tokenizer, open_gguf(tokenizer).fields.get(CHAT_TEMPLATE) or None
    elif file.is_file():
        try:
            said = file.read_text("utf-8")
        except ValueError as error:
            raise CheckpointError(f"{file}: not a text in UTF-8 ({error}); fetch it again") from error
    else:
        file = tokenizer.with_name(SETTINGS)
        said = read_fields(file).get("chat_template")
        if isinstance(said, list):  # several by name
            with contextlib.suppress(TypeError, KeyError):
                said = {each["name"]: each["template"] for each in said}.get("default")
    if not isinstance(said, str | None):
        raise CheckpointError(f"{file}: its chat_template is a {type(said).__name__}, expected a text; correct it")
    return said, file


def copy_as_json(tokenizer: Path, target: Path) -> None:
    """Write a tokenizer's file as a JSON of `tokenizers`: another layout translated, such a JSON as it is."""
    if tokenizer.name in OLDER_FILES or tokenizer.suffix == GGUF_ENDING:
        open_tokenizer(tokenizer).save(str(target))
    else:
        shutil.copyfile(tokenizer, target)


def end_token_of(folder: Path, tokenizer: Tokenizer | None, unknown: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that end a text by the tokenizer's files, else `<|endoftext|>`; `unknown` without a tokenizer."""
    name = None
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        name = read_fields(folder / file).get("eos_token") or name
    name = name.get("content") if isinstance(name, Mapping) else name or ENDOFTEXT
    if not isinstance(name, str):
        raise CheckpointError(f"{folder}: the tokenizer's eos_token is {name!r}; expected a token")
    if tokenizer is None:
        return unknown if name == ENDOFTEXT else ()
    token_id = tokenizer.token_to_id(name)
    return () if token_id is None else (token_id,)


def with_vocabulary(config: NeoXConfig, folder: Path, fields: Mapping[str, Any]) -> NeoXConfig:
    """A config with what the files beside the weights say: which rows stand for tokens, and which tokens end a text.

    The tokenizer counts the rows. The end token comes from `generation_config.json`, else from the `fields` of the
    weights' own config, else from the tokenizer; without any of them it is 0, as in 20B, and never the 2 of
    `transformers`. Raises CheckpointError for an end that is not an id, and for another model's tokenizer.
    """
    file, rows, tokenizer = tokenizer_beside(folder), config.tokenizer_vocab_size, None
    try:
        if file is not None and (tokenizer := open_known(file)) is not None:
            rows = count_rows(file, tokenizer, config.vocab_size)
        said = read_fields(folder / GENERATION).get("eos_token_id")
        said = fields.get("eos_token_id", fields.get("eos_token_ids")) if said is None else said
        if said is None:
            said = end_token_of(folder, tokenizer, unknown=() if "eos_token_id" in fields else (0,))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    ends = said if isinstance(said, list | tuple) else [said]
    if not all(type(token_id) is int and token_id < 2**31 for token_id in ends):
        raise CheckpointError(
            f"{folder}: its config's eos_token_id is {said!r}; expected a token's id or a list of them"
        )
    found = {"tokenizer_vocab_size": rows, "eos_token_ids": tuple(token_id for token_id in ends if token_id >= 0)}
    return config if found.items() <= vars(config).items() else replace(config, **found)


def open_known(file: Path) -> Tokenizer | None:
    """`open_tokenizer`; but a file in an older layout that is of another kind than ours doesn't keep the model from
    being read, since another tokenizer may be given: a message says so, and there is none.
    """
    try:
        return open_tokenizer(file)
    except ValueError as error:
        if file.name not in OLDER_FILES:
            raise
        logger.warning("%s. Until then give another tokenizer", error)
        return None


def count_rows(file: Path, tokenizer: Tokenizer, vocab_size: int) -> int:
    """How many of `vocab_size` rows the tokenizer in `file` reaches. A few added tokens past them, such as a [PAD]
    that the model was not trained with, give a warning: they can't be read. Raises CheckpointError for another model's.
    """
    tokens = count_ids(tokenizer)
    own = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if tokens < 1 or own > vocab_size + 1:
        raise CheckpointError(
            f"{file}: its ids end at {tokens - 1} and the config says vocab_size {vocab_size}; tokenizer and "
            "weights belong to different models. Fetch both from one place"
        )
    if tokens > vocab_size:
        logger.warning(
            f"{file}: its ids end at {tokens - 1} and the model has {vocab_size} rows: it can't read "
            f"{', '.join(repr(tokenizer.id_to_token(token_id)) for token_id in range(vocab_size, tokens)[:3])}"
        )
    return min(tokens, vocab_size)


def role_fields(config: NeoXConfig, source: Path | None = None) -> dict[str, Any]:
    """The ids of a model's control tokens by role, as both JSON files of a Hugging Face folder name them: those in the
    `source` folder's files, and the ends of a text, None where there is none.
    """
    ends = list(config.eos_token_ids)
    fields: dict[str, Any] = {"bos_token_id": ends[0] if ends else None}
    for path in [source / "config.json", source / GENERATION] if source else []:
        fields |= {name: value for name, value in read_fields(path).items() if name in ROLES}
    return fields | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def write_beside(folder: Path, config: NeoXConfig, tokenizer: Path | None, source: Path | None) -> None:
    """Put a model's small files into its new folder: the tokenizer with its roles and chat template, and, where the
    source's files say more than `config` does, a `generation_config.json`.
    """
    if tokenizer is not None:
        older = tokenizer.name in OLDER_FILES  # whose roles belong to a class that would not read a tokenizer.json
        for name in TOKENIZER_FILES if tokenizer.name == "tokenizer.json" else TOKENIZER_FILES[-1:] if older else ():
            if (tokenizer.parent / name).is_file():
                shutil.copyfile(tokenizer.parent / name, folder / name)
        copy_as_json(tokenizer, folder / "tokenizer.json")
        if tokenizer.suffix == GGUF_ENDING and (template := chat_template(tokenizer)[0]):
            write_text_atomically(folder / TEMPLATE, template)
    roles, said = role_fields(config, source), {} if source is None else read_fields(source / GENERATION)
    if said or roles != role_fields(config):
        write_text_atomically(folder / GENERATION, json.dumps(said | roles, indent=2) + "\n")

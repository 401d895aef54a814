"""Tokenizers without a tokenizer.json: vocab.json with merges.txt, and sentencepiece's models, token for token."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from neox_lib import create_model, create_tokenizer
from neox_lib.checkpoints.convert import convert_to_gguf, convert_to_huggingface
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.generation import greedy_generate_text
from neox_lib.tokenizer import WHITESPACE_RUNS, save_tokenizer, train_tokenizer
from tests.small_models import WITH_TOKENIZER

TEXTS = ["the fox and the hen and the fox, na\u00efve \u00e9t\u00e9 123 456\n\n  def f(x): return x"]
SAMPLES = [
    *("the fox", "", "<|endoftext|>", "def f(x):\n        return x   <|end|>  y", "foxes fox 123 \U0001f98a"),
    *(
        "  the   fox<|endoftext|> and <|user|> hen <|end|> x",
        "nai\u0308ve e\u0301te\u0301 <|padding|> <|e\u0301|> <|\u00e9|>",
    ),
]
FLAGS = {"lstrip": True, "rstrip": True, "normalized": True, "single_word": False}


def older_layout(folder: Path, added: list[str] | None = None, special: Any = None, config: Any = None) -> Path:
    """The files of a byte-level BPE tokenizer as transformers wrote them before tokenizer.json. Returns vocab.json."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(train_tokenizer(TEXTS, 320), folder / "made.json")
    model = json.loads((folder / "made.json").read_text())["model"]
    (folder / "made.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    numbered = {token: len(model["vocab"]) + index for index, token in enumerate(added or [])}
    if config and "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            numbered.pop(token["content"]): token for token in config["added_tokens_decoder"]
        }
    for name, content in (("added_tokens", numbered), ("special_tokens_map", special), ("tokenizer_config", config)):
        if content:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "vocab.json"


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"added": list(WHITESPACE_RUNS)},
        {
            "config": {"tokenizer_class": "GPT2Tokenizer"},
            "added": ["<|user|>", "<|end|>"],
            "special": {"eos_token": "<|end|>", "additional_special_tokens": ["<|user|>"]},
        },
        {
            "config": {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": True},
            "added": ["<|end|>", "<|e\u0301|>"],
            "special": {"eos_token": {"content": "<|end|>", **FLAGS}, "pad_token": "<|e\u0301|>"},
        },
        {"special": {"eos_token": {"content": "<|endoftext|>", **FLAGS}, "unk_token": "<|endoftext|>"}},
        {
            "config": {
                "tokenizer_class": "GPTNeoXTokenizerFast",
                "added_tokens_decoder": [
                    {"content": "<|user|>", "special": True, **FLAGS},
                    {"content": "fox", "special": False, **FLAGS, "single_word": True},
                ],
            },
            "added": ["<|user|>", "fox"],
        },
    ],
    ids=["plain", "runs of spaces", "GPT-2's", "a space before", "flags of a known token", "newer config"],
)
def test_vocab_and_merges_give_the_ids_of_transformers(tmp_path, files):
    from transformers import AutoTokenizer

    vocab = older_layout(tmp_path, **files)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), create_tokenizer(tmp_path)
    for text in SAMPLES:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert create_tokenizer(vocab).to_str() == ours.to_str()


def test_a_model_with_an_older_tokenizer_writes_text_and_is_converted_with_it(tmp_path, random_model):
    """Rows behind the tokenizer's are padding, and the converted folder holds a tokenizer.json with the same ids."""
    write_huggingface(random_model(WITH_TOKENIZER), tmp_path / "m")
    for name in ("generation_config.json", "config.json"):
        fields = json.loads((tmp_path / "m" / name).read_text())
        fields.pop("eos_token_id")
        (tmp_path / "m" / name).write_text(json.dumps(fields))
    older_layout(tmp_path / "m", ["<|end|>"], {"eos_token": "<|end|>"})
    tokenizer, model = create_tokenizer(tmp_path / "m"), create_model(tmp_path / "m", device="cpu")
    end = tokenizer.token_to_id("<|end|>")
    assert end is not None and model.config.tokenizer_vocab_size == end + 1 and model.config.eos_token_ids == (end,)
    text = greedy_generate_text(model, tokenizer, "the fox", 20)
    convert_to_huggingface(tmp_path / "m", tmp_path / "c")
    model, tokenizer = create_model(tmp_path / "c", device="cpu"), create_tokenizer(tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").is_file() and model.config.eos_token_ids == (end,)
    assert greedy_generate_text(model, tokenizer, "the fox", 20) == text
    pytest.importorskip("gguf", reason="needs gguf")
    assert create_tokenizer(convert_to_gguf(tmp_path / "m", tmp_path / "m.gguf")).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "a LlamaTokenizer in tokenizer_config.json; only GPT2Tokenizer and"),
        ({"add_bos_token": True}, "add_bos_token is true"),
    ],
)
def test_a_class_that_may_cut_a_text_differently_is_refused(tmp_path, config, said):
    older_layout(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=f"vocab.json: {said}.*AutoTokenizer can save it as a tokenizer.json"):
        create_tokenizer(tmp_path)


def test_files_that_miss_something_are_named(tmp_path):
    vocab = older_layout(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|far|>": 400}')
    with pytest.raises(
        ValueError, match=r"vocab\.json: not a tokenizer file: '<\|far\|>' has id 400 and would get 297"
    ):
        create_tokenizer(vocab)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt: missing; it belongs to vocab\.json"):
        create_tokenizer(vocab)


# sentencepiece


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number * 8 + 2) + varint(len(value)) + value


# What rinna's models have: pieces for bytes, no space put before a text, all spaces kept.
RINNA = field(3, 1) + field(35, 1), field(3, 0) + field(4, 0)
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
PIECES = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<NL>", 0.0, USER_DEFINED)]
PIECES += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
WORDS = ["\u2581the", "\u2581fox", "the", "fox", "\u72d0", "\u306f", "\u2581", "x", "t", "h", "e", "<", "N", "L", ">"]
PIECES += [(word, -1.0 - index / 4, 1) for index, word in enumerate(WORDS)]


def write_spiece(folder: Path, trainer: bytes = b"", normalizer: bytes = b"", name: str = "spiece.model") -> Path:
    pieces = (field(1, text) + field(2, score) + field(3, kind) for text, score, kind in PIECES)
    content = b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)
    (folder / name).write_bytes(content)
    return folder / name


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


def test_a_text_keeps_its_spaces_lines_and_unknown_characters(tmp_path):
    """transformers' own converter loses all three; rinna's models were trained with them."""
    write_spiece(tmp_path, *RINNA)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}')
    tokenizer = create_tokenizer(tmp_path)
    assert pieces_of(tokenizer, "the fox") == ["the", "\u2581fox"], "no space before, no end behind"
    assert pieces_of(tokenizer, " \u72d0\u306f  x") == ["\u2581", "\u72d0", "\u306f", "\u2581", "\u2581", "x"]
    assert pieces_of(tokenizer, "x\n\u00e9") == ["x", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert pieces_of(tokenizer, "the<NL>x</s>") == ["the", "<NL>", "x", "</s>"]
    text = " the  fox\n\u72d0\u306f \U0001f98a<NL>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(text) for text, _, _ in PIECES] == list(range(len(PIECES))), "ids are the file's"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": len(PIECES)}))
    assert pieces_of(create_tokenizer(tmp_path), "the<|user|>x") == ["the", "<|user|>", "x"]
    assert tokenizer.decode(tokenizer.encode("x</s>").ids) == "x"


def test_sentencepieces_defaults_put_a_space_before_and_drop_others(tmp_path):
    write_spiece(tmp_path, name="tokenizer.model")
    tokenizer = create_tokenizer(tmp_path)
    assert pieces_of(tokenizer, "  fox   the ") == ["\u2581fox", "\u2581the"]
    assert pieces_of(tokenizer, "x") == ["\u2581", "x"] and pieces_of(tokenizer, "") == []
    assert tokenizer.decode(tokenizer.encode("fox the").ids) == "fox the"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (field(2, field(3, 2)), r"spiece\.model: of sentencepiece's models only unigram.*AutoTokenizer can save it"),
        (field(3, field(5, 0)), r"spiece\.model: of sentencepiece's models only unigram"),
        (b"\x0a\xff", r"spiece\.model: not a tokenizer file: truncated or damaged, expected a sentencepiece model"),
        (b"\x0a\x7fabc", r"spiece\.model: not a tokenizer file: truncated or damaged"),
    ],
    ids=["BPE", "spaces as they are", "truncated", "shorter than it says"],
)
def test_another_model_than_unigram_is_refused(tmp_path, content, said):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        create_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_read_does_not_keep_its_model_from_being_read(tmp_path, random_model, caplog):
    """generate --tokenizer gives another."""
    write_huggingface(random_model(WITH_TOKENIZER), tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    assert create_model(tmp_path, device="cpu").config.tokenizer_vocab_size == WITH_TOKENIZER.vocab_size
    assert "merges.txt: missing; it belongs to vocab.json. Fetch it too. Until then give another" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"user_defined_symbols": ["<NL>"]},
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    ],
    ids=["rinna's", "the defaults", "no normalization"],
)
def test_ids_and_texts_are_sentencepieces_own(tmp_path, settings):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    draw = random.Random(0)
    words = [
        "the",
        "fox",
        "hen",
        "runs",
        "into",
        "a",
        "house",
        "\u00e9t\u00e9",
        "\u72d0",
        "\u306f",
        "\u898b\u305f",
        "\uff21\uff22",
    ]
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(200)]
    prefix, quiet = str(tmp_path / "spiece"), {"hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, vocab_size=340, **quiet, **settings
    )
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model"), create_tokenizer(tmp_path)
    parts = [
        *words,
        " ",
        "  ",
        "\n",
        "\t",
        "<NL>",
        "\U0001f98a",
        "e\u0301",
        "\u333f",
        "\u2026",
        "\u3000",
        "\u00a0",
        "zz",
    ]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randint(0, 8)))
        ids = theirs.encode(text)
        assert ours.encode(text).ids == ids, text
        assert 0 in ids or ours.decode(ids) == theirs.decode(ids)

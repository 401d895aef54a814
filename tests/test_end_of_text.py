"""The end of a text, and which rows stand for tokens: both come with the model, and go along wherever it is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import hugging_face_config, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from neox_lib.__main__ import main
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.distributed.loading import build_rank
from neox_lib.generation import greedy_generate, prompt_ids, stream_generate
from neox_lib.loading import create_model, create_tokenizer, use_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.playground.session import Session
from neox_lib.tokenizer import ENDOFTEXT
from tests.small_models import BASE

CONFIG = replace(BASE, vocab_size=24, tokenizer_vocab_size=24)
CPU = torch.device("cpu")


def tokenizer_with(tokens: dict[int, str], size: int = 24) -> Tokenizer:
    """Words w0, w1 and so on, with some of them replaced."""
    vocab = {tokens.get(token_id, f"w{token_id}"): token_id for token_id in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Hugging Face model of random numbers, and the folder where it lies."""
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(hugging_face_config(CONFIG)).eval()
    randomize(model, seed=5)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(theirs, tmp_path) -> Path:
    """That folder without a word on where a text ends."""
    shutil.copytree(theirs[1], tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    say(tmp_path / "m", "config.json", eos_token_id=None)
    return tmp_path / "m"


def say(folder: Path, file: str, **fields) -> None:
    """Write fields of a JSON file; None takes one away."""
    path = folder / file
    known = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))


def ends_of(folder: Path) -> tuple[int, ...]:
    return open_checkpoint(folder).config.eos_token_ids


ends = st.integers(0, 23) | st.lists(st.integers(0, 23), min_size=1, max_size=4, unique=True)


@settings(max_examples=40, deadline=None)
@given(ends=ends, prompt=st.integers(0, 23), in_config=st.booleans())
def test_a_text_ends_where_transformers_ends_it(theirs, tmp_path_factory, ends, prompt, in_config):
    """Another end is an endless text, or one that breaks off at a word."""
    from transformers import GenerationConfig

    model, source = theirs
    folder = tmp_path_factory.mktemp("ends")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    say(folder, "generation_config.json", eos_token_id=None if in_config else ends)
    say(folder, "config.json", eos_token_id=ends if in_config else 2)
    words = GenerationConfig(max_length=24, do_sample=False, eos_token_id=ends, pad_token_id=0)
    ids = torch.tensor([[prompt]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=words)[0].tolist()
    found = create_model(folder, device="cpu", dtype="float32")
    assert greedy_generate(found, ids, 24)[0] == expected
    steps = stream_generate(found, ids, 23)
    assert [prompt, *(step.token_id for step in steps)] == expected
    shutil.rmtree(folder)


def test_who_says_where_a_text_ends_and_in_which_order(folder):
    """generation_config.json before config.json before the tokenizer; where nobody says it, 0 and not 2."""
    assert ends_of(folder) == (0,)
    tokenizer_with({5: "</s>"}).save(str(folder / "tokenizer.json"))
    assert ends_of(folder) == (), "a tokenizer that says nothing: id 0 is a word of it"
    tokenizer_with({5: "</s>", 7: ENDOFTEXT}).save(str(folder / "tokenizer.json"))
    assert ends_of(folder) == (7,)
    say(folder, "special_tokens_map.json", eos_token={"content": "</s>"})
    assert ends_of(folder) == (5,)
    say(folder, "tokenizer_config.json", eos_token="w9")
    assert ends_of(folder) == (9,)
    say(folder, "config.json", eos_token_id=2)
    assert ends_of(folder) == (2,)
    say(folder, "generation_config.json", eos_token_id=[3, 4])
    assert ends_of(folder) == (3, 4)


@pytest.mark.parametrize("wrong", ["2", 2.0, True, [1, "2"], {"id": 2}])
def test_an_end_that_is_no_id_is_named(folder, wrong):
    say(folder, "generation_config.json", eos_token_id=wrong)
    with pytest.raises(CheckpointError, match=r"eos_token_id is .*expected a token's id or a list"):
        open_checkpoint(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: can't be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("noted", [True, False], ids=["in config.json", "in an older config.json"])
def test_a_slim_folder_ends_at_endoftext(random_model, tmp_path, noted):
    write_slim(random_model(replace(CONFIG, eos_token_ids=(6,))), tmp_path / "s", ranks=2)
    tokenizer_with({7: ENDOFTEXT}).save(str(tmp_path / "20B_tokenizer.json"))
    if not noted:
        say(tmp_path / "s", "config.json", eos_token_ids=None)
    config = open_checkpoint(tmp_path / "s").config
    assert config.eos_token_ids == ((6,) if noted else (7,))
    checkpoint = open_checkpoint(tmp_path / "s")
    rank = build_rank(config, checkpoint.parts(), 1, 2, CPU, lambda name: torch.float32)
    assert rank.config.eos_token_ids == config.eos_token_ids


WAYS = {
    "huggingface": ["huggingface"],
    "slim": ["slim"],
    "int8": ["int8"],
    "over slim to huggingface": ["slim", "huggingface"],
    "over huggingface to int8": ["slim", "huggingface", "int8"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_conversion_keeps_the_end_the_roles_and_the_chat_template(folder, tmp_path, way):
    """A program that reads the result must stop, pad and take turns as it would with the source."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    special = tokenizer_with({1: "<pad>", 5: "</s>", 6: "<user>"})
    special.add_special_tokens(["<pad>", "</s>", "<user>"])
    source = PreTrainedTokenizerFast(tokenizer_object=special, eos_token="</s>", pad_token="<pad>")
    source.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
    source.save_pretrained(folder)
    say(folder, "config.json", eos_token_id=5, bos_token_id=4, pad_token_id=1)
    say(folder, "generation_config.json", eos_token_id=[5, 8], temperature=0.7)
    for number, layout in enumerate(WAYS[way]):
        target = tmp_path / str(number)
        assert main(["convert", str(folder), str(target), "--to", layout]) == 0
        folder = target
    assert ends_of(folder) == (5, 8)
    found = AutoTokenizer.from_pretrained(folder)
    assert (found.eos_token_id, found.pad_token_id, sorted(found.all_special_ids)) == (
        5,
        1,
        sorted(source.all_special_ids),
    )
    assert found.chat_template == source.chat_template
    said = json.loads((folder / "generation_config.json").read_text())
    assert {"bos_token_id": 4, "eos_token_id": [5, 8], "pad_token_id": 1, "temperature": 0.7}.items() <= said.items()
    if layout == "huggingface":
        config = json.loads((folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (4, [5, 8], 1)


def test_the_playground_and_an_empty_prompt_know_the_models_end(theirs, random_model):
    model = random_model(replace(CONFIG, eos_token_ids=(9, 11)))
    tokenizer = tokenizer_with({9: "</s>"})
    assert prompt_ids(tokenizer, "", model.config).tolist() == [[9]]
    with pytest.raises(ValueError, match="the prompt is empty, and the model has no token that begins a text"):
        prompt_ids(tokenizer, "")
    for final, said in ((11, "The model ended the text after 1 token."), (0, "Wrote 1 token.")):
        model.final_linear.weight.data.fill_(0)
        model.norm.bias.data.fill_(1)
        model.norm.weight.data.fill_(0)
        model.final_linear.weight.data[final] = 1
        session = Session(model, tokenizer)
        session.set(tokens=1)
        session.set_prompt("w5")
        session.generate()
        assert session.worker.join(60) and session.state.status == said


# Which rows stand for tokens


@torch.inference_mode()
def chosen_of(folder: Path, wanted: int) -> int:
    """What a folder's model writes when it finds row `wanted` likeliest."""
    model = create_model(folder, device="cpu", dtype="float32")
    return forced(model, wanted)


def forced(model: NeoXModel, wanted: int) -> int:
    model.norm.weight.data.fill_(0)
    model.norm.bias.data.fill_(1)
    model.final_linear.weight.data.fill_(0)
    model.final_linear.weight.data[wanted] = 1
    return next(iter(stream_generate(model, torch.tensor([[3]]), 1))).token_id


def test_only_a_tokenizer_makes_rows_padding(folder, tmp_path):
    """Fine-tuning gives padding rows to tokens of its own; who cut them off would never write one."""
    assert chosen_of(folder, 22) == 22
    tokenizer_with({}, size=20).save(str(folder / "tokenizer.json"))
    say(folder, "config.json", tokenizer_vocab_size=10)  # a note of ours that others carried along
    assert chosen_of(folder, 19) == 19 and chosen_of(folder, 22) < 20
    model = create_model(folder, device="cpu", dtype="float32")
    use_tokenizer(model, tokenizer_with({}, size=23))  # another one, given apart
    assert forced(model, 22) == 22
    write_slim(create_model(folder, device="cpu", dtype="float32"), tmp_path / "s", ranks=1)
    assert chosen_of(tmp_path / "s", 22) < 20
    tokenizer_with({}, size=23).save(str(tmp_path / "s" / "tokenizer.json"))
    assert chosen_of(tmp_path / "s", 22) == 22


def test_a_pad_token_past_the_rows_is_noted_and_another_models_tokenizer_refused(folder, caplog):
    tokenizer = tokenizer_with({})
    tokenizer.add_special_tokens(["[PAD]", "<user>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert chosen_of(folder, 23) == 23
    assert "its ids end at 25 and the model has 24 rows: it can't read '[PAD]', '<user>'" in caplog.text
    tokenizer_with({}, size=26).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="belong to different models"):
        open_checkpoint(folder)


def test_a_tokenizer_above_the_folder_is_a_slim_models_only(folder, random_model, tmp_path):
    tokenizer_with({}, size=20).save(str(tmp_path / "20B_tokenizer.json"))
    write_slim(random_model(CONFIG), tmp_path / "s", ranks=1)
    assert create_tokenizer(tmp_path / "s").get_vocab_size() == 20
    with pytest.raises(FileNotFoundError, match="no tokenizer there"):
        create_tokenizer(folder)
    assert open_checkpoint(folder).config.tokenizer_vocab_size == 24


def test_a_batchs_truncation_and_padding_are_switched_off(folder):
    """A tokenizer saved after its last training batch cuts every prompt, or fills it up."""
    tokenizer = tokenizer_with({})
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9, pad_id=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = create_tokenizer(folder)
    assert loaded.truncation is None and loaded.padding is None
    assert loaded.encode("w5").ids == [5]

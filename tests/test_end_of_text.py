"""The end of a text, and which rows stand for tokens: both come with the model, and go along wherever it is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import hugging_face_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from neox_lib.__main__ import main
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.distributed.loading import build_rank
from neox_lib.generation import greedy_generate, prompt_ids, stream_generate
from neox_lib.loading import create_model, create_sampling, create_tokenizer, use_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.playground.session import Session
from neox_lib.sampling import Sampling
from neox_lib.tokenizer import ENDOFTEXT
from tests.small_models import BASE, randomize

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


@pytest.fixture(scope="module")
def ours(theirs):
    return create_model(theirs[1], device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def letters():
    """Our tokenizer and theirs: # begins a prompt, and each other token is a letter from a to f, or two of them."""
    from transformers import PreTrainedTokenizerFast

    pairs = [(left, right) for left in "abc" for right in "abcdef"][:17]
    tokens = ["#", *"abcdef", *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE({token: token_id for token_id, token in enumerate(tokens)}, pairs))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@settings(max_examples=10, deadline=None)
@given(
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    drawn=st.lists(st.integers(0, 12), max_size=2),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=2),
)
def test_stop_strings_end_a_text_where_transformers_ends_it(theirs, ours, letters, stops, drawn, sizes):
    """Within tokens and across them, in each row of a batch; their text shows the stop string and ours doesn't."""
    (model, _), (tokenizer, their_tokenizer) = theirs, letters
    prompts = [[0] * size for size in sizes]
    for place in drawn:  # parts of a text that the model writes
        ids = [step.token_id for step in stream_generate(ours, [prompts[0]], 12, stop_token_ids=())]
        stops = [*stops, tokenizer.decode(ids)[place : place + 5]]
    how = {"tokenizer": tokenizer, "sampling": Sampling(stop_strings=stops), "stop_token_ids": ()}
    rows, texts, ended = [list(prompt) for prompt in prompts], [""] * len(prompts), [False] * len(prompts)
    for step in stream_generate(ours, prompts, 12, **how):
        for row, before in enumerate(ended):
            if not before:
                rows[row].append(step.token_ids[row])
            texts[row] += step.texts[row]
            assert not (before and step.texts[row])
        ended = step.ended
    for prompt, row, text in zip(prompts, rows, texts, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stop_strings=stops,
            tokenizer=their_tokenizer,
        )[0].tolist()
        whole = tokenizer.decode(row[len(prompt) :])
        assert row == expected
        assert whole.startswith(text) and not any(stop in text for stop in stops)
        assert text == whole or whole[len(text) :].startswith(tuple(stops))


def test_a_control_tokens_name_is_a_stop_string_too():
    """Many a chat model ends its turn with a token that its config doesn't name."""
    tokenizer = tokenizer_with({6: "<|im_end|>"})
    tokenizer.add_special_tokens(["<|im_end|>"])
    model = NeoXModel(CONFIG).eval()
    sampling = Sampling(stop_strings=("w9w9w9", "<|im_end|>"))
    assert [forced(model, 6, tokenizer=tokenizer, sampling=sampling) for _ in range(2)] == [6, 6]
    steps = list(stream_generate(model, [[3], [4]], 5, tokenizer=tokenizer, sampling=sampling))
    assert [(step.texts, step.ended) for step in steps] == [(["", ""], [True, True])]
    with pytest.raises(ValueError, match=r"stop_strings \['w1'\] are found in text; give the tokenizer too"):
        stream_generate(model, [[3]], 5, sampling=Sampling(stop_strings=("w1",)))


# What a model's own files say of choosing


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.7},
        {"do_sample": True, "top_k": 0, "min_p": 0.2, "repetition_penalty": 1.4},
        {"do_sample": True, "top_k": 3, "typical_p": 1.0, "num_beams": 1, "suppress_tokens": []},
        {"do_sample": False, "temperature": 0.6, "top_k": 3, "repetition_penalty": 2.0, "typical_p": 0.5},
    ],
    ids=str,
)
def test_a_models_own_defaults_are_those_of_transformers(theirs, folder, said):
    """Where nothing is said, transformers draws from 50 tokens, and greedily takes the likeliest."""
    from transformers import GenerationConfig

    say(folder, "generation_config.json", **said)
    ids = torch.tensor([[5, 9, 9, 3]])
    expected = theirs[0].generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig.from_pretrained(folder, max_new_tokens=1, pad_token_id=0),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    scores, sampling = expected.scores[0], create_sampling(folder)
    found = sampling.probabilities(expected.logits[0], ids)
    if said.get("do_sample"):
        torch.testing.assert_close(found.float(), scores.softmax(dim=-1))
    else:
        assert found.argmax() == scores.argmax() == expected.sequences[0, -1]
        assert found.max() == 1


def test_defaults_with_stop_strings_and_where_there_are_none(folder, tmp_path):
    say(folder, "generation_config.json", stop_strings=["w1", "w2w3"], temperature=None)
    assert create_sampling(folder) == Sampling(stop_strings=("w1", "w2w3"), top_k=50, top_p=1.0)
    assert create_sampling(folder / "model.safetensors") == create_sampling(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    said = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2, "target_modules": ["dense"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    assert create_sampling(adapter) == create_sampling(folder)
    (folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: missing, so this model has no defaults"):
        create_sampling(folder)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"num_beams": 4}, "num_beams is 4, which we can't do"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p is 0.5, which we can't do"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id is 0, which we can't do"),
        ({"suppress_tokens": [3]}, r"suppress_tokens is \[3\], which we can't do"),
        ({"top_p": 7}, "top_p must be above 0 and at most 1, got 7"),
        ({"temperature": "0.8"}, "temperature must be a number, got '0.8'"),
        ({"do_sample": 1}, "do_sample must be true or false, got 1"),
        ({"stop_strings": [3]}, "stop_strings must be texts"),
    ],
    ids=str,
)
def test_defaults_that_cant_be_followed_are_named(folder, said, reason):
    """A text that was chosen in another way than the model's makers chose would be taken for the model's."""
    say(folder, "generation_config.json", **{"do_sample": True, **said})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {reason}"):
        create_sampling(folder)


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


def forced(model: NeoXModel, wanted: int, **how) -> int:
    model.norm.weight.data.fill_(0)
    model.norm.bias.data.fill_(1)
    model.final_linear.weight.data.fill_(0)
    model.final_linear.weight.data[wanted] = 1
    return next(iter(stream_generate(model, torch.tensor([[3]]), 1, **how))).token_id


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

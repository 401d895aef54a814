"""GGUF: llama.cpp runs our model and tokenizer, what comes back is what went out, and a file that lies is refused."""

import errno
import json
import struct
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import torch.nn.functional as F

from neox_lib import create_chat_template
from neox_lib.__main__ import main
from neox_lib.checkpoints.checkpoint import ModelCheckpoint
from neox_lib.checkpoints.convert import convert_to_gguf, convert_to_huggingface
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.gguf import writer
from neox_lib.checkpoints.gguf.config import rows_by_head
from neox_lib.checkpoints.gguf.writer import write_gguf
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.config import NeoXConfig, parameter_shapes
from neox_lib.loading import create_model, create_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.rope_scaling import RopeScaling
from neox_lib.tokenizer import save_tokenizer, train_tokenizer
from tests.small_models import WITH_TOKENIZER, YARN, family, load, randomize

FAMILY = {name: config for name, config in family(WITH_TOKENIZER).items() if name != "dynamic rotary"}
FAMILY["yarn"] = replace(FAMILY["yarn"], rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=200))
IDS = torch.randint(2, 270, (1, 40), generator=torch.Generator().manual_seed(3))
real_gelu = F.gelu


def model_of(config: NeoXConfig = WITH_TOKENIZER) -> NeoXModel:
    model = NeoXModel(config).eval().requires_grad_(False)
    randomize(model, seed=1)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A tokenizer for `WITH_TOKENIZER`, with the layout of 20B's."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_tokenizer(["the quick brown fox jumps over the lazy dog, once upon a time"], 300), path)
    return path


@pytest.fixture
def write(tokenizer, tmp_path):
    """A model as a GGUF file."""

    def write(model: NeoXModel, dtype: str = "float32") -> Path:
        return write_gguf(ModelCheckpoint(model), tmp_path / f"{dtype}.gguf", tokenizer, dtype)

    return write


class Llama:
    """llama.cpp with a file, all in fp32: its cache is fp16 by default, and its flash attention rounds too."""

    def __init__(self, file: Path):
        engine = pytest.importorskip("xllamacpp")
        settings = engine.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 256, 1
        settings.warmup, settings.fit_params, settings.verbosity = False, False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = engine.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = engine.Server(settings)

    def complete(self, prompt: str | list[int], tokens: int, scores: int = 0) -> dict:
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": scores}
        return self.server.handle_completions(asked)["choices"][0]

    def log_probabilities(self, ids: list[int], vocab_size: int) -> torch.Tensor:
        """Of the next token: `[V]`."""
        top = self.complete(ids, 1, vocab_size)["logprobs"]["content"][0]["top_logprobs"]
        assert len(top) == vocab_size
        return torch.tensor([each["logprob"] for each in sorted(top, key=lambda each: each["id"])])

    def encode(self, text: str) -> list[int]:
        body = json.dumps({"content": text}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def gelu_of_llama(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """The tanh form from a table of all fp16 numbers, between -10 and 10."""
    table = real_gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_llama_computes_the_same_scores(write, monkeypatch, config):
    """Whatever a model's rules. Its GELU is taken over for the comparison; with ours it is the size of the rounding."""
    model = model_of(config)
    theirs = Llama(write(model)).log_probabilities(IDS[0].tolist(), config.vocab_size)
    ours = model(IDS)[0, -1].log_softmax(-1)
    assert (theirs - ours).abs().max() < 2e-3 * max(1, theirs.std())
    monkeypatch.setattr(F, "gelu", gelu_of_llama)
    assert (theirs - model(IDS)[0, -1].log_softmax(-1)).abs().max() < 2e-4


@pytest.mark.parametrize(("dtype", "error"), [("float16", 0.01), ("bfloat16", 0.2), ("q8_0", 0.1), ("q4_0", 0.6)])
def test_llama_computes_rounded_scores_from_rounded_weights(write, dtype, error):
    """`error` is relative to the spread of the scores, far below that of a wrong model."""
    model = model_of()
    theirs = Llama(write(model, dtype)).log_probabilities(IDS[0].tolist(), WITH_TOKENIZER.vocab_size)
    ours = model(IDS)[0, -1].log_softmax(-1)
    assert 1e-4 < (theirs - ours).abs().max() / ours.std() < error


def test_llama_writes_the_text_of_the_shipped_model_and_so_do_we(tmp_path, capsys):
    file = tmp_path / "model.gguf"
    assert main(["convert", str(SHIPPED_MODEL), str(tmp_path), "--to", "gguf"]) == 0
    assert f"wrote {file}, 0.01 GB; llama-completion --model {file}" in capsys.readouterr().out
    assert main(["generate", "Once upon a time", "--tokens", "12"]) == 0
    expected = capsys.readouterr().out
    assert main(["generate", "Once", "--model", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf: no such file or folder; expected a model" in capsys.readouterr().err
    for path in (file, tmp_path):
        assert main(["generate", "Once upon a time", "--tokens", "12", "--model", str(path)]) == 0
        assert capsys.readouterr().out == expected
    assert main(["info", str(file)]) == 0
    assert "the whole model in F16" in capsys.readouterr().out
    text = Llama(file).complete("Once upon a time", 12)["text"]
    assert expected.strip() == f"Once upon a time{text}".strip()


TEXTS = [
    "We're off, 3 of us: I'LL stay",
    "def f(x):\n    return x\n\n\n\ty  # 12345  ",
    f"{' ' * 2}hello{' ' * 25}x{' ' * 60}\n  \r\n",
    "<|endoftext|> one<|padding|>two <|endoftext",
    "日本語のテキスト, héllo, нещо, កាន់តែពិសេស 🙂👩‍👩‍👧\u00a0\u2003x",
]


def test_llama_reads_texts_as_the_released_tokenizer_does(tokenizer_20b_path, tmp_path):
    config = NeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, rotary_pct=0.5)
    file = write_gguf(ModelCheckpoint(model_of(config)), tmp_path, tokenizer_20b_path, "float16")
    llama, released = Llama(file), create_tokenizer(tokenizer_20b_path)
    for text in TEXTS:
        assert llama.encode(text) == released.encode(text).ids, text


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_there_and_back_is_the_same_model(write, dtype, config):
    """To the bit. llama.cpp needs every bias and an output matrix: missing ones are zeros or a copy."""
    model = model_of(config).to(getattr(torch, dtype))
    checkpoint = open_checkpoint(write(model, dtype))
    assert checkpoint.config == replace(config, attention_bias=True, tie_word_embeddings=False)
    assert checkpoint.dtype == checkpoint.float_dtype == getattr(torch, dtype)
    found = dict(checkpoint.tensors())
    assert {name: tensor.dtype for name, tensor in found.items()} == checkpoint.dtypes()
    for name, tensor in ModelCheckpoint(model).tensors():
        assert torch.equal(found.pop(name), tensor.to(checkpoint.dtypes()[name])), name
    for name, tensor in found.items():
        expected = model.word_embeddings.weight if name == "final_linear.weight" else torch.zeros(len(tensor))
        assert torch.equal(tensor, expected), name


def test_q8_0_is_what_the_package_decodes(write):
    file = write(model_of(), "q8_0")
    checkpoint = open_checkpoint(file)
    assert checkpoint.dtype == torch.float16 and checkpoint.files()[0].part == "the whole model in Q8_0"
    ours, names = dict(checkpoint.tensors()), {"token_embd.weight": "word_embeddings.weight"}
    names["blk.1.attn_qkv.weight"] = "layers.1.attention.query_key_value.weight"
    for tensor in gguf.GGUFReader(file).tensors:
        if name := names.pop(tensor.name, None):
            expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(ours[name], rows_by_head(name, expected, WITH_TOKENIZER.num_attention_heads))
    assert not names
    assert load(file)(IDS).isfinite().all() and create_model(file, device="cpu", dtype="int8")(IDS).isfinite().all()


def test_a_file_of_another_program_is_read(write, monkeypatch):
    """Without the keys that only we write, without biases of attention or an output matrix."""
    whole = writer.gguf_fields
    ours = ("hidden_activation", "head_count_kv", "vocab_size", "use_parallel_residual", "freq_base")
    monkeypatch.setattr(
        writer, "gguf_fields", lambda config: {key: v for key, v in whole(config).items() if not key.endswith(ours)}
    )
    monkeypatch.setattr(
        writer,
        "plan",
        lambda config, kind: {name: (kind, shape) for name, shape in parameter_shapes(config).items()},
    )
    config = replace(WITH_TOKENIZER, tie_word_embeddings=True, attention_bias=False)
    model = model_of(config)
    file = write(model)
    assert open_checkpoint(file).config == config
    assert torch.equal(load(file)(IDS), model(IDS))


@pytest.mark.parametrize("normalizer", ["NFC", "none"])
def test_the_tokenizer_comes_back(tokenizer, tmp_path, normalizer):
    """Ids, control tokens, texts, chat template; through a second file, and into a Hugging Face folder too."""
    source = tmp_path / "source"
    write_huggingface(model_of(replace(WITH_TOKENIZER, eos_token_ids=(0, 5))), source, tokenizer)
    said, template = [{"role": "user", "content": "a fox"}], "{{ messages[0].content + eos_token }}"
    (source / "chat_template.jinja").write_text(template)
    if normalizer == "none":
        fields = json.loads((source / "tokenizer.json").read_text())
        (source / "tokenizer.json").write_text(json.dumps(fields | {"normalizer": None}))
    file = convert_to_gguf(convert_to_gguf(source, tmp_path / "first.gguf"), tmp_path / "m.gguf")
    convert_to_huggingface(file, tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == template
    released = create_tokenizer(source)
    for path in (file, tmp_path / "back"):
        found = create_tokenizer(path)
        assert found.get_vocab() == released.get_vocab()
        assert create_chat_template(path).text(said) == "a fox<|endoftext|>"
        for text in (*TEXTS, "e\u0301"):
            ids = found.encode(text).ids
            assert ids == released.encode(text).ids and found.decode(ids) == released.decode(ids), text
        config = open_checkpoint(path).config
        assert config.eos_token_ids == (0, 5) and config.tokenizer_vocab_size == 300


def test_a_folder_names_its_one_file(write, tmp_path):
    for dtype in ("float32", "float16"):
        write(model_of(), dtype)
    for opened in (open_checkpoint, create_tokenizer):
        with pytest.raises(CheckpointError, match=r"float16\.gguf, float32\.gguf; give the path of one of them"):
            opened(tmp_path)


def test_a_folder_may_be_named_like_a_file(tokenizer, tmp_path):
    (tmp_path / "m.gguf").mkdir()
    file = write_gguf(ModelCheckpoint(model_of()), tmp_path / "m.gguf", tokenizer)
    assert file == tmp_path / "m.gguf" / "model.gguf" and open_checkpoint(tmp_path / "m.gguf").file.path == file


def test_a_file_beside_other_weights_is_another_model_s(write, tmp_path):
    write(model_of())
    for name in ("training_args.bin", "._float32.gguf", "vision.safetensors"):
        (tmp_path / name).write_text("no weights")
    assert create_tokenizer(tmp_path).get_vocab_size() == 300
    assert open_checkpoint(tmp_path).files()[0].file == "float32.gguf"
    write_huggingface(model_of(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer there"):
        create_tokenizer(tmp_path)
    assert open_checkpoint(tmp_path).files()[0].file == "model.safetensors"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["IN", "a.gguf", "--to", "slim", "--dtype", "q8_0"], "--dtype belongs to --to gguf"),
        (["IN", "a.gguf", "--to", "gguf", "--ranks", "2"], "--ranks belongs to --to slim"),
        (["IN", "notes.txt", "--to", "gguf"], "give a folder or a name that ends in .gguf"),
        (["bare", "a.gguf", "--to", "gguf"], "no tokenizer beside it"),
        (["dynamic", "a.gguf", "--to", "gguf"], "llama.cpp runs only linear, and yarn"),
        (["betas", "a.gguf", "--to", "gguf"], "llama.cpp runs only linear, and yarn"),
        (["ends", "a.gguf", "--to", "gguf"], "texts end with the tokens [0, 1, 2, 3], and a GGUF file names one to 3"),
        (["narrow", "a.gguf", "--to", "gguf", "--dtype", "q4_0"], "rows of 40 numbers, and Q4_0 needs multiples of 32"),
        (["wide", "a.gguf", "--to", "gguf", "--dtype", "float16"], "holds 100,000, but torch.float16 ends at"),
        (["broken", "a.gguf", "--to", "gguf", "--dtype", "q8_0"], "holds nan, which Q8_0 can't"),
        (["words", "a.gguf", "--to", "gguf"], "model is 'WordLevel', expected 'BPE'"),
        (["bytes", "a.gguf", "--to", "gguf"], "no merges, or some that make tokens past the 384 rows"),
        (["out/model.gguf", "out", "--to", "gguf"], "out/model.gguf: is the file to read from"),
        (["out/model.gguf", "out/model.gguf", "--to", "gguf"], "out/model.gguf: is the file to read from"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_can_not_be_written_is_said_and_nothing_is_left(tokenizer, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    source, config = arguments[0], WITH_TOKENIZER
    changes = {
        "dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0)},
        "betas": {"rope_scaling": YARN},
        "ends": {"eos_token_ids": (0, 1, 2, 3)},
        "narrow": {"hidden_size": 40},
    }
    model = model_of(replace(config, **changes.get(source, {})))
    if source in ("wide", "broken"):
        model.layers[1].mlp.dense_h_to_4h.weight[0, 0] = 1e5 if source == "wide" else float("nan")
    if source == "out/model.gguf":
        write_gguf(ModelCheckpoint(model), "out", tokenizer)
    else:
        write_huggingface(model, source, None if source == "bare" else tokenizer)
    if source in ("words", "bytes"):
        fields = json.loads(tokenizer.read_text())
        words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        fields["model"] = words if source == "words" else fields["model"] | {"merges": []}
        Path(source, "tokenizer.json").write_text(json.dumps(fields))
    Path("notes.txt").write_text("mine")
    assert main(["convert", *arguments]) == 2
    assert said in capsys.readouterr().err.replace("IN", source)
    assert not Path("a.gguf").exists() and not list(tmp_path.rglob("*.partial"))


def test_without_the_package_files_are_read_and_the_command_that_installs_it_is_named(write, monkeypatch):
    file = write(model_of())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert torch.equal(load(file)(IDS), model_of()(IDS))
    with pytest.raises(CheckpointError, match="install it by `pip install gguf`"):
        write(model_of(), "float16")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_in_the_middle_leaves_the_old_file_whole(write, tmp_path, monkeypatch, error):
    file = write(model_of())
    before, encoded = file.read_bytes(), writer.encoded

    def stop(name, *rest):
        if name.startswith("layers.1"):
            raise error
        return encoded(name, *rest)

    monkeypatch.setattr(writer, "encoded", stop)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write(model_of(replace(WITH_TOKENIZER, layer_norm_eps=1e-3)))
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.fixture(scope="module")
def raw(tmp_path_factory, tokenizer) -> bytes:
    """A small file in fp16."""
    path = tmp_path_factory.mktemp("raw") / "m.gguf"
    return write_gguf(ModelCheckpoint(model_of()), path, tokenizer, "float16").read_bytes()


def key(name: str, kind: int, value: bytes) -> bytes:
    """A key with its value, as a file has them."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def number(name: str, value: int) -> bytes:
    return key(name, 4, struct.pack("<I", value))


def text(name: str, value: str) -> bytes:
    return key(name, 8, struct.pack("<Q", len(value)) + value.encode())


LAYERS, EPSILON, HEADS = "gptneox.block_count", "gptneox.attention.layer_norm_epsilon", "gptneox.attention.head_count"
TOKENS, KIND, RULE = "tokenizer.ggml.tokens", "tokenizer.ggml.model", "tokenizer.ggml.pre"
START, ENDING, NORM = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.eos_token_id", b"blk.1.ffn_norm.bias"
DAMAGE = "truncated, damaged or no GGUF file"
ARCHITECTURE, WIDTH = "general.architecture", "gptneox.feed_forward_length"
LIES = {
    "another format": (b"GGUF", b"GGML", DAMAGE),
    "another version": (b"GGUF\x03", b"GGUF\x01", "but of version 1; version 2 or 3, little-endian, is read here"),
    "big-endian": (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "a GGUF file, but big-endian; version 2 or 3"),
    "more tensors": (b"GGUF\x03\0\0\0\x1c", b"GGUF\x03\0\0\0\x1d", DAMAGE),
    "endless tensors": (b"GGUF\x03\0\0\0\x1c\0\0\0", b"GGUF\x03\0\0\0\x1c\0\0\xff", DAMAGE),
    "an endless list": (TOKENS.encode() + b"\x09\0\0\0\x08\0\0\0\x80\x01\0\0\0", None, DAMAGE),
    "another architecture": (
        text(ARCHITECTURE, "gptneox"),
        text(ARCHITECTURE, "stablel"),
        "the model is a 'stablel'",
    ),
    "no layers": (LAYERS.encode(), b"gptneox.block_Count", "lacks 'block_count'"),
    "fewer layers": (number(LAYERS, 2), number(LAYERS, 1), "unexpected blk.1.attn_norm.bias; a GPT-NeoX model of its"),
    "more layers": (number(LAYERS, 2), number(LAYERS, 3), "lacks blk.2.attn_norm.weight"),
    "other layers": (number(LAYERS, 2), number(LAYERS, 2**31), "num_hidden_layers must be 10,000 at most"),
    "no epsilon": (EPSILON.encode(), EPSILON.upper().encode(), "lacks 'attention.layer_norm_epsilon'"),
    "less than nothing": (
        number(WIDTH, 128),
        key(WIDTH, 5, struct.pack("<i", -4)),
        "intermediate_size must be a positive",
    ),
    "grouped heads": (number(f"{HEADS}_kv", 4), number(f"{HEADS}_kv", 2), "keys and values have fewer heads"),
    "another shape": (
        number(WIDTH, 128),
        number(WIDTH, 64),
        "ffn_up.weight has shape [128, 32], its keys expect [64, 32]",
    ),
    "an unknown activation": (b"gelu_fast", b"relu_fast", "hidden_activation is 'relu_fast'"),
    "a name twice": (NORM, b"blk.0.ffn_norm.bias", "two tensors of one name"),
    "a key twice": (b"bos_token_id", b"eos_token_id", "tokenizer.ggml.eos_token_id twice"),
    "an end that is none": (number(ENDING, 0), number(ENDING, 384), "texts end with"),
    "another tokenizer": (text(KIND, "gpt2"), text(KIND, "bert"), "its tokenizer is 'bert' with the rule 'olmo'"),
    "a beginning of its own": (
        key(START, 7, b"\0"),
        key(START, 7, b"\1"),
        "add_bos_token is set, which is not read here. Give the model's tokenizer.json",
    ),
    "another rule": (text(RULE, "olmo"), text(RULE, "dbrx"), "with the rule 'dbrx'; only 'gpt2' with one of"),
    "a merge of no token": (
        b"\x03\0\0\0\0\0\0\0o n",
        b"\x03\0\0\0\0\0\0\0n n",
        "merges are not pairs that make tokens",
    ),
    "a token twice": (b"\x01\0\0\0\0\0\0\0$", b"\x01\0\0\0\0\0\0\0#", "tokens holds a token twice"),
}


@pytest.mark.parametrize(("old", "new", "said"), LIES.values(), ids=LIES)
def test_a_file_that_lies_is_refused_in_one_line(raw, tmp_path, old, new, said):
    assert raw.count(old) == 1
    file = tmp_path / "lie.gguf"
    file.write_bytes(raw.replace(old, new or old[:-1] + b"\xff"))
    with pytest.raises(CheckpointError, match=r"lie\.gguf") as error:
        open_checkpoint(file)
        create_tokenizer(file)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 4, 12, 500, 8000, -32])
def test_a_truncated_file_is_named(raw, tmp_path, length):
    file = tmp_path / "short.gguf"
    file.write_bytes(raw[:length])
    with pytest.raises(CheckpointError, match=r"short\.gguf: truncated"):
        open_checkpoint(file)


def test_a_part_of_a_model_and_a_pointer_say_what_to_do(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("split.count", 2, struct.pack("<H", 3)))
    with pytest.raises(CheckpointError, match="one of 3 parts of a model; join them with `llama-gguf-split --merge`"):
        open_checkpoint(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_checkpoint(file)


def test_types_that_can_not_be_read_are_named(write):
    with pytest.raises(CheckpointError, match=r"attn_qkv\.weight is Q4_0; F32, F16, BF16 and Q8_0 are read here. Run"):
        open_checkpoint(write(model_of(), "q4_0"))


def test_a_file_cut_while_it_is_read_is_named(write):
    file = write(model_of())
    tensors: Iterator = open_checkpoint(file).tensors()
    next(tensors)
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(CheckpointError, match=r"float32\.gguf: changed while it was read"):
        list(tensors)

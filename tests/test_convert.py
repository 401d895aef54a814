"""convert: the same model in other files, whatever the way there; and when it fails, nothing is lost or left over."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neox_lib.__main__ import main
from neox_lib.checkpoints import files, safetensors_writer
from neox_lib.checkpoints.convert import convert_to_huggingface, convert_to_slim
from neox_lib.checkpoints.files import SHIPPED_MODEL, CheckpointError
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import write_quantized
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel
from tests.small_models import YARN, load, randomize

CONFIG = NeoXConfig(
    vocab_size=2048,
    tokenizer_vocab_size=2048,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=64,
)
TO = {"slim": lambda source, target: convert_to_slim(source, target, ranks=2), "huggingface": convert_to_huggingface}
TOKENIZER = (SHIPPED_MODEL / "tokenizer.json").read_text()
OTHER_RULES = {"tie_word_embeddings": True, "hidden_act": "gelu", "attention_bias": False, "rope_scaling": YARN}


def make(folder: Path, layout: str, config: NeoXConfig = CONFIG) -> Path:
    """A random fp16 model in a layout, with the shipped tokenizer beside it."""
    model = NeoXModel(config)
    randomize(model, seed=0)
    if layout == "slim":
        write_slim(model.half(), folder, ranks=2, spread_seed=0)
        (folder / "tokenizer.json").write_text(TOKENIZER)
    else:
        write_huggingface(model.half(), folder, SHIPPED_MODEL / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """One model in both layouts."""
    return {layout: make(tmp_path_factory.mktemp("source") / layout, layout) for layout in TO}


def content(folder: Path) -> dict[str, bytes]:
    """Everything that lies in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def assert_same(first: Path, second: Path) -> None:
    """Two checkpoints hold one model: config, and every number in its own dtype."""
    ours, theirs = open_checkpoint(first), open_checkpoint(second)
    assert ours.config == theirs.config
    for (name, tensor), (other_name, other) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert name == other_name and tensor.dtype == other.dtype and torch.equal(tensor, other), name


@pytest.mark.parametrize("via", TO)
@pytest.mark.parametrize("start", TO)
@pytest.mark.parametrize("config", [{}, OTHER_RULES], ids=["untied", "tied and scaled"])
def test_there_and_back_is_the_same_model(tmp_path, start, via, config):
    """To the bit, and its tokenizer comes along."""
    source = make(tmp_path / "a", start, replace(CONFIG, **config))
    TO[via](source, tmp_path / "b")
    TO[start](tmp_path / "b", tmp_path / "c")
    assert_same(source, tmp_path / "b")
    assert_same(source, tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == TOKENIZER


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_comes_out_of_hugging_face_files(sources, tmp_path, ranks):
    convert_to_slim(sources["huggingface"], tmp_path / "s", ranks)
    assert len(list((tmp_path / "s").glob("layer_02-model_*"))) == ranks
    assert_same(sources["huggingface"], tmp_path / "s")


def test_precisions_that_differ_survive(tmp_path):
    """fp16 matrices with fp32 norms are neither rounded nor blown up."""
    model = NeoXModel(CONFIG).half()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.randn(parameter.shape)
    write_slim(model, tmp_path / "a", ranks=1)
    convert_to_huggingface(tmp_path / "a", tmp_path / "b")
    convert_to_slim(tmp_path / "b", tmp_path / "c", ranks=2)
    found = load(tmp_path / "c").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert found["norm.weight"].dtype == torch.float32


# The command


def test_the_command_converts_both_ways_and_the_result_generates(sources, tmp_path, capsys):
    assert main(["convert", str(sources["slim"]), str(tmp_path / "h"), "--to", "huggingface"]) == 0
    assert main(["convert", str(tmp_path / "h"), str(tmp_path / "s"), "--to", "slim", "--ranks", "4"]) == 0
    capsys.readouterr()
    texts = []
    for folder in (sources["slim"], tmp_path / "h", tmp_path / "s"):
        assert main(["generate", "the fox", "--model", str(folder), "--tokens", "8", "--no-stop"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > len("the fox\n")


def test_info_tells_what_is_in_hugging_face_files(tmp_path, capsys):
    model = NeoXModel(CONFIG).half()
    write_huggingface(model, tmp_path / "m", shard_bytes=132_000)
    assert main(["info", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert f"{CONFIG.parameter_count():,}" in out and "float16" in out
    assert "model-00001-of-00003.safetensors" in out and "blocks 0 to 2" in out and "output matrix" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{huggingface}", "new", "--to", "slim", "--ranks", "3"], "3 ranks do not divide the attention heads"),
        (["{slim}", "new", "--to", "huggingface", "--ranks", "2"], "--ranks belongs to --to slim"),
        (["{slim}", "{slim}", "--to", "huggingface"], "is the folder to read from"),
        (["{slim}", "{huggingface}", "--to", "huggingface"], "already holds a model"),
        (["{slim}", "{huggingface}", "--to", "slim"], "already holds a model"),
        (["{huggingface}", "{slim}", "--to", "huggingface"], "already holds a model"),
        (["nowhere", "new", "--to", "huggingface"], "nowhere: no such folder"),
        (["rounded", "new", "--to", "slim"], "int8 weights, which can be run but not converted"),
    ],
)
def test_what_cannot_be_converted_is_one_line(sources, tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    write_quantized(open_checkpoint(sources["slim"]), "rounded")
    before = {layout: content(folder) for layout, folder in sources.items()}
    assert main(["convert", *(argument.format(**sources) for argument in argv)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("neox_lib: ") and err.count("\n") == 1 and said in err, err
    assert not Path("new").exists()
    assert {layout: content(folder) for layout, folder in sources.items()} == before


# When it fails in the middle


def fail_at(monkeypatch, number: int, error: BaseException) -> None:
    """The moves to a final name from the `number`th on raise `error`."""
    real, moves = os.replace, iter(range(number))

    def move(source, target):
        if next(moves, None) is None:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", move)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("to", TO)
def test_whatever_interrupts_it_the_target_is_as_it_was(sources, tmp_path, monkeypatch, to, error):
    """Ctrl-C or a full disk at every file in turn: what lay in the folder stays, what was begun is gone."""
    source, target = sources["slim" if to == "huggingface" else "huggingface"], tmp_path / "t"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    before, expected = content(target), (CheckpointError, OSError) if isinstance(error, OSError) else KeyboardInterrupt
    for number in range(100):
        fail_at(monkeypatch, number, error)
        try:
            with pytest.raises(expected):
                TO[to](source, target)
        except pytest.fail.Exception:  # `number` moves were enough
            break
        monkeypatch.undo()
        assert content(target) == before
    monkeypatch.undo()
    assert number > 3
    assert_same(source, target)


@pytest.mark.parametrize("to", TO)
def test_another_tokenizer_in_the_target_is_not_written_over(sources, tmp_path, to):
    """It may be the only copy of one that somebody trained."""
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"already holds tokenizer\.json; give another folder"):
        TO[to](sources["slim"], tmp_path)
    assert content(tmp_path) == {"tokenizer.json": b"mine"}


class FullDisk:
    """A file that takes `room` bytes and then refuses, as a full disk does."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000], ids=["one file", "shards"])
def test_a_disk_that_fills_up_between_two_tensors_is_told_in_one_line(sources, tmp_path, monkeypatch, shard_bytes):
    real = safetensors_writer.write_each
    room = [150_000]

    def write_each(file, *arguments):
        full = FullDisk(file, room[0])
        try:
            return real(full, *arguments)
        finally:
            room[0] = full.room

    monkeypatch.setattr(safetensors_writer, "write_each", write_each)
    weights = open_checkpoint(sources["slim"])
    with pytest.raises(CheckpointError, match=r"model.*safetensors: could not be written \(No space left on device\)"):
        write_huggingface(weights, tmp_path / "t", shard_bytes=shard_bytes)
    assert room[0] < 0 and not (tmp_path / "t").exists()


def test_a_disk_without_room_is_said_before_anything_is_written(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 100_000)
    for source, to in (("slim", "huggingface"), ("huggingface", "slim")):
        with pytest.raises(CheckpointError, match=r"the files need 0\.00 GB and the disk has 0\.00 GB free"):
            TO[to](sources[source], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_damage_found_on_the_way_leaves_nothing_behind(sources, tmp_path):
    """A source that turns out bad at its last layer must not leave a target that lacks it."""
    source = make(tmp_path / "s", "slim")
    path = source / "layer_07-model_00-model_states.pt"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="layer_07-model_00"):
        convert_to_huggingface(source, tmp_path / "t")
    assert not (tmp_path / "t").exists()


SLOW = """
import sys, time
from neox_lib.checkpoints import convert
from neox_lib.checkpoints.huggingface import writer as huggingface_writer
real = huggingface_writer.write_safetensors

def slow(path, *arguments):
    real(path, *arguments)
    print(path.name, flush=True)
    time.sleep(30)

huggingface_writer.write_safetensors = slow
huggingface_writer.write_huggingface.__defaults__ = (None, 50_000)
from neox_lib.__main__ import main
sys.exit(main(["convert", sys.argv[1], sys.argv[2], "--to", "huggingface"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are sent the POSIX way")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_no_half_model(sources, tmp_path, how):
    """After Ctrl-C nothing is there; after a kill what is there is refused, and converting again completes it."""
    target = tmp_path / "t"
    command = [sys.executable, "-c", SLOW, str(sources["slim"]), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "model-00001-of-00004.safetensors\n"
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if how == signal.SIGINT:
        assert process.returncode == 130 and not target.exists()
    else:
        with pytest.raises(CheckpointError, match="a save into this folder was interrupted; save again"):
            open_checkpoint(target)
    convert_to_huggingface(sources["slim"], target)
    assert sorted(content(target)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert_same(sources["slim"], target)

"""The command line: what a newcomer types, and what they read when something is wrong."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import neox_lib
from neox_lib import cli, generation
from neox_lib.__main__ import main, parse
from neox_lib.checkpoints.convert import convert_to_gguf
from neox_lib.checkpoints.slim.writer import write_slim
from neox_lib.cli.train import give_tokenizer
from neox_lib.config import NeoXConfig, format_bytes
from neox_lib.evaluation.corpus import stories_of
from neox_lib.model import NeoXModel
from neox_lib.sampling import Sampling
from neox_lib.tokenizer import save_tokenizer, train_tokenizer
from tests.small_models import WITH_TOKENIZER, load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model with its tokenizer, as a slim folder of two ranks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_slim(NeoXModel(WITH_TOKENIZER).to(torch.float16), folder, ranks=2, spread_seed=0)
    save_tokenizer(train_tokenizer(["the fox and the hen and the fox"], 300), folder / "tokenizer.json")
    return folder


def test_generate_writes_prompt_and_continuation_to_stdout_and_speed_to_stderr(checkpoint, capsys):
    assert main(["generate", "the fox", "--model", str(checkpoint), "--tokens", "8", "--no-stop"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the fox") and len(out) > len("the fox\n")
    assert "tokens/s" in err and "prefill of" in err and "8 new tokens" in err


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_any_precision_writes_a_text_of_the_same_length(checkpoint, capsys, dtype):
    """Rounding may change a token, so lengths are compared."""
    argv = ["generate", "the", "--model", str(checkpoint), "--tokens", "8", "--no-stop", "--device", "cpu"]
    assert main([*argv, "--dtype", dtype]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("the") and "8 new tokens" in said.err and f", {dtype}, cpu" in said.err


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfthe fox", "\ufeffthe fox".encode("utf-16-le"), "\ufeffthe fox".encode("utf-16-be"), b"the fox"],
    ids=["utf-8", "utf-16", "utf-16 big end first", "without"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_a_byte_order_mark_on_stdin_is_no_part_of_the_prompt(checkpoint, capsys, monkeypatch, content, encoding):
    """Windows PowerShell puts one before what it pipes: the model would continue another text than the one typed."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding))
    assert main(["generate", "-", "--model", str(checkpoint), "--tokens", "2", "--no-stop"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("the fox") and "prefill of 2 tokens" in told.err


def test_what_the_terminal_cannot_spell_is_replaced_and_ends_nothing(checkpoint, monkeypatch):
    """A prompt with an umlaut on a plain ASCII terminal: the answer is worth more than the one letter."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert main(["generate", "the f\u00f6x \u2192", "--model", str(checkpoint), "--tokens", "2", "--no-stop"]) == 0
    assert shown.getvalue().startswith(b"the f?x ?")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top-p", "0.9", "--seed", "3"], "--top-p, --seed: without effect at temperature 0"),
        (["--top-k", "5"], "--top-k: without effect at temperature 0"),
        (["--top-p", "0.9", "--seed", "3", "--temperature", "0.5"], None),
        ([], None),
    ],
)
def test_cuts_and_seeds_without_a_temperature_get_a_line(checkpoint, capsys, words, said):
    """Two seeds that give one text look like a bug, and without a word nobody finds out why."""
    assert main(["generate", "the", "--model", str(checkpoint), "--tokens", "2", *words]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("neox_lib: ")]
    assert len(lines) == (said is not None) and all(said in line for line in lines)


def test_what_is_given_counts_more_than_the_models_own_defaults(checkpoint, tmp_path, monkeypatch):
    """And each setting arrives where the text is written."""
    shutil.copytree(checkpoint, tmp_path / "model")
    said = {"do_sample": True, "temperature": 0.7, "top_k": 7, "min_p": 0.1, "stop_strings": ["x"]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(said))
    found = []
    monkeypatch.setattr(generation, "stream_generate", lambda *_, sampling, **__: found.append(sampling) or iter(()))
    argv = ["generate", "the", "--model", str(tmp_path / "model"), "--defaults"]
    for more in ([], ["--top-k", "3", "--seed", "4", "--stop", "a", "--stop", "b", "--repetition-penalty", "1.2"]):
        assert main([*argv, *more]) == 0
    own = Sampling(0.7, top_k=7, top_p=1.0, min_p=0.1, stop_strings=("x",))
    given = replace(own, top_k=3, seed=4, stop_strings=("a", "b"), repetition_penalty=1.2)
    assert found == [own, given]


def test_the_same_seed_writes_the_same_text_and_another_seed_another(checkpoint, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["generate", "the", "--model", str(checkpoint), "--temperature", "1", "--seed", seed, "--no-stop"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_no_cache_writes_the_same_text(checkpoint, capsys):
    texts = []
    for extra in ([], ["--no-cache"]):
        main(["generate", "the hen", "--model", str(checkpoint), "--tokens", "20", *extra])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "x", "--model", "no/such/folder"], "no/such/folder"),
        (["generate", "x", "--tokens", "5000"], "256"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--min-p", "2"], "min_p must be from 0 to 1"),
        (["generate", "x", "--defaults"], "generation_config.json: missing"),
        (["generate", "x", "--dtype", "float8"], "float8"),
        (["generate", "x", "--device", "abacus"], "abacus"),
        (["generate", "\udcff"], "lone surrogate"),
        (["generate", "x", "--revision", "step7"], "models have no revision 'step7'"),
        (["info", "--revision", "step7"], "models have no revision 'step7'"),
        (["convert", "{model}", "elsewhere", "--revision", "step7"], "models have no revision 'step7'"),
        (["info", "no/such/folder"], "no/such/folder"),
        (["info", "--preset", "3b"], "no Pythia of size '3b'"),
        (["info", "--preset", "1b", "--tokens", "5000"], "context of 2048"),
        (["convert", "{model}", "{model}", "--ranks", "1"], "is the folder to read from"),
        (["convert", "{model}", "elsewhere", "--ranks", "3"], "3 ranks"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(checkpoint, capsys, monkeypatch, tmp_path, argv, said):
    monkeypatch.chdir(tmp_path)
    argv = [argument.format(model=checkpoint) for argument in argv]
    if argv[0] == "generate" and "--model" not in argv:
        argv += ["--model", str(checkpoint)]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("neox_lib: ") and err.count("\n") == 1 and said in err, err
    assert "Traceback" not in out + err


def test_info_tells_cost_and_files_without_loading_weights(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("neox_lib.checkpoints.slim.reader.merge_as_stored", None)
    assert main(["info", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    config = NeoXConfig.from_json(checkpoint / "config.json")
    assert f"{config.parameter_count():,}" in out and "threads on a CPU" in out
    assert format_bytes(config.weight_bytes(torch.float16)) in out and "int8" in out
    assert "layer_00-model_01-model_states.pt" in out and "block 1" in out


def test_convert_to_another_number_of_ranks_keeps_the_model(checkpoint, tmp_path, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / "four"), "--ranks", "4"]) == 0
    before, after = (load(folder).state_dict() for folder in (checkpoint, tmp_path / "four"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert main(["generate", "the", "--model", str(tmp_path / "four"), "--tokens", "3"]) == 0, "tokenizer came along"


def test_a_full_disk_leaves_no_part_of_a_tokenizer(tmp_path, monkeypatch, capsys):
    """The next call would take it for the run's own."""
    stories = tmp_path / "stories.txt"
    stories.write_text("the fox and the hen " * 500)
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("no space left on device")))
    assert main(["train", str(tmp_path / "run"), "--stories", str(stories), "--validation", str(stories)]) == 2
    assert "no space left" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def test_train_makes_a_model_that_generate_loads(tmp_path, capsys, monkeypatch):
    """A reader can train a model of their own with one command, and going on after the end changes nothing."""
    stories = tmp_path / "stories.txt"
    tales = (Path(neox_lib.__file__).parent / "assets" / "wilde_tales.txt").read_text("utf-8")
    stories.write_text(f"{tales[:8_000]}\n<|endoftext|>\n{tales[8_000:9_000]}")
    argv = ["train", str(tmp_path / "run"), "--stories", str(stories), "--prompt", "The Prince"]
    argv += ["--tokens", "8192", "--windows", "0:128,256"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "step 0: The Prince" in said.out and "step 1: The Prince" in said.out, "a sample before and after"
    assert "bits per byte on the held-out stories" in said.out and "loss ▁" in said.err
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    first = load(tmp_path / "run" / "model").state_dict()
    assert main(argv) == 0
    second = load(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert main(["generate", "The", "--model", str(tmp_path / "run" / "model"), "--tokens", "5"]) == 0


def test_a_run_starts_from_any_model_and_says_before_training_what_it_can_not_write(checkpoint, tmp_path, capsys):
    """A GGUF file holds its tokenizer, and 256 tokens of context; 7 ranks used to fail after hours."""
    stories = tmp_path / "stories.txt"
    stories.write_text("the fox and the hen " * 20)
    pytest.importorskip("gguf", reason="needs gguf")
    file = convert_to_gguf(checkpoint, tmp_path / "m.gguf")
    argv = ["train", str(tmp_path / "run"), "--stories", str(stories), "--validation", str(stories)]
    argv += ["--start-from", str(file), "--tokens", "32", "--batch-tokens", "32", "--windows", "0:16"]
    argv += ["--learning-rate", "0"]
    assert main([*argv, "--ranks", "7"]) == 2
    assert "7 ranks do not divide" in capsys.readouterr().err and not (tmp_path / "run" / "state.pt").exists()
    assert main(argv) == 0
    before, after = (load(folder).state_dict() for folder in (checkpoint, tmp_path / "run" / "model"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_stories_of_a_model_are_whole_different_and_the_same_again(tmp_path, capsys, monkeypatch):
    """What lessons train and calibrate on is made by a command, and can be made again."""
    monkeypatch.setattr("neox_lib.cli.write_stories.ROWS", 6)
    argv = ["write-stories", str(tmp_path / "a.txt"), "--bytes", "1500", "--temperature", "0.7"]
    assert main(argv) == 0
    assert main(["write-stories", str(tmp_path / "b.txt"), *argv[2:]]) == 0
    text = (tmp_path / "a.txt").read_text("utf-8")
    assert text == (tmp_path / "b.txt").read_text("utf-8")
    stories = stories_of(text)
    assert 1500 <= len(text) < 4000
    assert len(set(stories)) == len(stories) > 1
    assert all(story == story.strip() for story in stories)
    assert f"{len(stories)} stories, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.txt", "--temperature", "0"], "temperature must be above 0"),
        (["a.txt", "--temperature", "nan"], "temperature must be above 0"),
        (["a.txt", "--bytes", "0"], "bytes must be 1 or more"),
        (["a.txt"], "none of 2 texts ended within 3 tokens"),
        (["."], "Is a directory"),
        (["a.txt", "--model", "gpt/neox", "--revision", "step1"], "no revision step1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_stories_that_can_not_be_written_are_known_at_once(tmp_path, capsys, monkeypatch, arguments, said):
    """Not after an hour of drawing, and not never: a model that ends no text would be drawn from for good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("neox_lib.cli.write_stories.ROWS", 2)
    monkeypatch.setattr("neox_lib.cli.write_stories.MOST_TOKENS", 3)

    def local_tokenizer(_path, revision):
        raise ValueError(f"no revision {revision}")

    if "--model" in arguments:
        monkeypatch.setattr("neox_lib.loading.local_tokenizer", local_tokenizer)
    assert main(["write-stories", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_starts_from_another_takes_its_tokenizer(checkpoint, tmp_path):
    """Weights mean nothing under another tokenizer, and every loss would still look like a number."""
    give_tokenizer(tmp_path / "run", stories=[], start_from=checkpoint)
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()
    other = tmp_path / "other" / "tokenizer.json"
    other.parent.mkdir()
    save_tokenizer(train_tokenizer(["another text in other words"], 300), other)
    with pytest.raises(ValueError, match=r"tokenizer\.json differ; a run and the model that it starts from"):
        give_tokenizer(tmp_path / "other", stories=[], start_from=checkpoint)


def test_ctrl_c_keeps_the_text_so_far(checkpoint):
    """Stopping a slow answer must not lose what was already written, nor end in a traceback."""
    command = [sys.executable, "-m", "neox_lib", "generate", "the fox", "--model", str(checkpoint), "--tokens", "240"]
    command += ["--no-stop", "--no-cache"]
    slow = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=slow)
    assert process.stdout is not None
    written = process.stdout.read(8)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert (written + rest).startswith(b"the fox")
    assert b"Traceback" not in err
    assert process.returncode in (130, 0)  # 0: it was faster than the signal


def test_help_needs_no_piece_of_the_library():
    """`--help` still works while a learner's own piece is broken."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from neox_lib.__main__ import build_parser\n"
        "print(build_parser().format_help())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = set(re.findall(r"^    ([a-z][a-z-]+) ", done.stdout, re.MULTILINE))
    modules = [
        path for path in Path(cli.__file__).parent.glob("*.py") if "def add(commands)" in path.read_text("utf-8")
    ]
    verbs = {path.stem.replace("_", "-") for path in modules}
    assert shown == verbs, "every module of cli is a command, and every command is in the help"


@pytest.mark.parametrize("argv", [["slides", "02"], ["playground"]], ids=" ".join)
def test_what_a_server_understands_is_passed_on_to_it(argv):
    """JupyterLab and Voila have hundreds of options; ours would not know them."""
    further = ["--no-browser", "--port", "8890", "--ServerApp.ip=0.0.0.0"]
    assert parse([*argv, *further]).further == further


def test_no_other_command_swallows_a_mistyped_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--quick"])
    assert ended.value.code == 2 and "unrecognized arguments: --quick" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_gets_no_traceback(checkpoint):
    command = f"{sys.executable} -m neox_lib generate 'the fox' --model {checkpoint} --tokens 200 --no-stop | head -c 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "the" and "Traceback" not in done.stderr


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (41e9, "38.2 GiB")])
def test_byte_counts_are_written_with_binary_units(count, text):
    assert format_bytes(int(count)) == text

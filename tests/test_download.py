"""Models from the Hub, against a small Hub on 127.0.0.1: nothing whole is fetched twice or trusted unseen."""

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import neox_lib
from neox_lib import create_model, create_tokenizer
from neox_lib.__main__ import main
from neox_lib.checkpoints import quantized_stream
from neox_lib.checkpoints.cached import cached_folder, is_hub_name
from neox_lib.checkpoints.convert import convert_to_quantized
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import file_in_folder, write_quantized
from neox_lib.hub import DownloadError, download, download_quantized, download_to_folder
from neox_lib.playground.widget import Playground
from neox_lib.quantization import linear as quantization
from neox_lib.tokenizer import save_tokenizer, train_tokenizer
from tests.hub_server import HubServer
from tests.small_models import WITH_TOKENIZER

NAME = "someone/small-model"
INT8_FILE = file_in_folder(torch.int8)
SMALL_FILES = {
    "tokenizer_config.json": b"{}",
    "generation_config.json": b"{ }",  # equal files would be fetched once
    "config.json": b'{"model_type": "gpt_neox"}',
    "tokenizer.json": Tokenizer(models.BPE({"a": 0}, [])).to_str().encode(),
}
SMALL = set(SMALL_FILES)
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, which this process takes for the real one, and an empty cache."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's tries
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def model_files(**weights: bytes) -> dict[str, bytes]:
    """Small files of a model, and under the names of others content that is none."""
    return SMALL_FILES | {"README.md": b"# A model", "tf_model.h5": b"of no use to us"} | weights


@pytest.fixture
def stored(hub):
    """Weights of 300,000 bytes in one file, on the Hub, in both formats."""
    return hub.put(NAME, model_files(**{"model.safetensors": os.urandom(300_000), "pytorch_model.bin": b"the same"}))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A model that runs, as a Hugging Face folder of shards with its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("real")
    save_tokenizer(train_tokenizer(["the fox and the hen and the fox"], 300), folder / "tokenizer.json")
    model = neox_lib.NeoXModel(WITH_TOKENIZER).to(torch.float16)
    write_huggingface(model, folder / "model", folder / "tokenizer.json", shard_bytes=30_000)
    return folder / "model"


@pytest.fixture(scope="module")
def real_int8(real, tmp_path_factory) -> bytes:
    """What a conversion of `real` to int8 gives."""
    return write_quantized(open_checkpoint(real), tmp_path_factory.mktemp("int8")).read_bytes()


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def broken(content: bytes) -> bytes:
    return content[: len(content) // 2]


def interrupted(content: bytes) -> bytes:
    """Ctrl-C in the middle of a file."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    return broken(content)


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("neox_lib: ")]
    assert err.splitlines()[-1] == lines[-1] and not out
    return lines[-1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_the_files_that_we_need_are_fetched_and_the_better_format_of_two(hub, stored):
    folder = download(NAME)
    assert names(folder) == SMALL | {"model.safetensors"} == set(hub.fetched)
    assert all((folder / name).read_bytes() == stored[name] for name in names(folder))


def test_of_shards_those_that_the_index_names_are_fetched(hub):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    shards = {f"model-{number}.safetensors": b"weights" for number in (1, 2, 3)}
    hub.put(NAME, model_files(**{"model.safetensors.index.json": index, "pytorch_model.bin": b"x"}, **shards))
    expected = SMALL | {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}
    assert names(download(NAME)) == expected


def test_a_model_that_has_only_bin_files_is_fetched_as_that(hub):
    hub.put(NAME, model_files(**{"pytorch_model.bin": b"weights"}))
    assert (download(NAME) / "pytorch_model.bin").read_bytes() == b"weights"


def test_the_cache_is_shared_with_other_programs(hub, stored):
    """Gigabytes that transformers would fetch a second time were not cached but hidden."""
    huggingface_hub.hf_hub_download(NAME, "model.safetensors")
    folder = download(NAME)
    assert Path(huggingface_hub.snapshot_download(NAME, local_files_only=True)) == folder
    assert set(Counter(hub.fetched).values()) == {1}


@pytest.mark.parametrize(
    ("shard", "said"),
    [("../../outside.safetensors", "files beside it"), ("model-1.safetensors", "has no 'model-1.safetensors'")],
)
def test_an_index_that_names_what_is_not_there_reaches_no_other_file(hub, capsys, shard, said):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub.put(NAME, model_files(**{"model.safetensors.index.json": index, "../../outside.safetensors": b"x"}))
    assert main(["download", NAME]) == 2
    assert said in one_line(capsys)
    assert set(hub.fetched) == SMALL | {"model.safetensors.index.json"}


def test_without_room_on_the_disk_nothing_is_fetched(hub, stored, capsys, monkeypatch):
    monkeypatch.setattr("neox_lib.checkpoints.files.free_bytes", lambda folder: 200_000)
    assert main(["download", NAME]) == 2
    said = capsys.readouterr().err
    assert "0.3 MB in 1 file(s) to fetch" in said and "GB free" in said and "make room" in said
    assert set(hub.fetched) == SMALL


def test_a_connection_that_breaks_is_one_clear_line_and_whole_files_are_kept(hub, capsys):
    shards = {"model-1.safetensors": b"whole", "model-2.safetensors": b"broken"}
    index = json.dumps({"weight_map": {name: name for name in shards}}).encode()
    hub.put(NAME, model_files(**{"model.safetensors.index.json": index}, **shards))
    hub.on_the_way["model-2.safetensors"] = broken
    assert main(["download", NAME]) == 2
    assert "run it again: complete files are kept" in one_line(capsys)
    hub.on_the_way.clear()
    assert (download(NAME) / "model-2.safetensors").read_bytes() == b"broken"
    assert hub.fetched.count("model-1.safetensors") == 1


@pytest.mark.parametrize("to", [[], ["--to", "mine"]], ids=["cache", "folder"])
def test_after_ctrl_c_the_same_words_go_on_and_what_is_incomplete_is_no_model(
    hub, stored, tmp_path, monkeypatch, capsys, to
):
    monkeypatch.chdir(tmp_path)
    hub.on_the_way["tokenizer.json"] = interrupted
    assert main(["download", NAME, *to]) == 130
    assert "stopped; complete files are kept" in one_line(capsys)
    assert cached_folder(NAME) is None and not Path("mine").exists()
    hub.on_the_way.clear()
    assert main(["download", NAME, *to]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert names(folder) == SMALL | {"model.safetensors"}
    assert hub.fetched.count("model.safetensors") == 1
    assert not Path("mine.unfinished").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("to", [[], ["--to", "mine"]], ids=["cache", "folder"])
def test_damaged_bytes_are_refused_and_removed(hub, stored, tmp_path, monkeypatch, capsys, name, to):
    """Weights with a flipped bit load without a word; only the checksum tells, and the library compares sizes."""
    monkeypatch.chdir(tmp_path)
    hub.on_the_way[name] = flipped
    assert main(["download", NAME, *to]) == 2
    assert f"{name} arrived damaged" in one_line(capsys)
    assert cached_folder(NAME) is None and not Path("mine").exists()
    hub.on_the_way.clear()
    assert main(["download", NAME, *to]) == 0
    assert (Path(capsys.readouterr().out.strip()) / name).read_bytes() == stored[name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["download", "someone/else"], "no such model"),
        (["download", NAME, "--revision", "step7"], "no revision 'step7'"),
        (["download", "not/a/name"], "not a model's name"),
        (["download", "someone/gated"], "owners must grant access"),
        (["download", "someone/text-only"], "expected config.json and model*.safetensors"),
        (["generate", "x", "--model", "someone/else"], "no file or folder someone/else here"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_line(hub, stored, capsys, words, said):
    hub.put("someone/gated", model_files(**{"model.safetensors": b"weights"}))
    hub.put("someone/text-only", {"README.md": b"# Nothing yet"})
    hub.gated.add("someone/gated")
    assert main(words) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize(("status", "said"), [(500, "HTTP status 500"), (403, "log in"), (200, "login page")])
def test_a_hub_that_answers_with_something_else_is_one_clear_line(hub, stored, capsys, status, said):
    hub.status = status
    assert main(["download", NAME]) == 2
    assert said in one_line(capsys)


def test_no_network_is_one_clear_line(hub, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert main(["download", NAME]) == 2
    line = one_line(capsys)
    assert NAME in line and "can't be fetched" in line


def test_without_a_network_a_whole_copy_in_the_cache_will_do_even_an_older_one(hub, stored, capsys):
    """A newer revision that was interrupted takes nothing away."""
    folder = download(NAME)
    hub.put(NAME, stored | {"model.safetensors": b"newer weights"})
    hub.on_the_way["model.safetensors"] = broken
    assert main(["download", NAME]) == 2
    hub.status = 503
    capsys.readouterr()
    assert main(["download", NAME]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(folder) and "Using the copy in the cache" in err


def test_a_copy_in_the_cache_that_lacks_a_shard_is_not_taken_for_whole(hub, real):
    hub.add(NAME, real)
    folder = download(NAME)
    assert cached_folder(NAME) == folder
    (folder / SHARDS[1]).unlink()
    assert cached_folder(NAME) is None


def test_a_folder_never_holds_files_of_two_revisions(hub, stored, tmp_path):
    """A Pythia's 154 revisions have the same names and sizes, and would load together."""
    hub.put(NAME, stored | {"model.safetensors": os.urandom(300_000)}, "step2")
    folder = download_to_folder(NAME, tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"mine: already exists; give a new folder"):
        download_to_folder(NAME, folder, "step2")
    hub.on_the_way["config.json"] = broken
    for revision in ("main", "step2"):
        with pytest.raises(DownloadError):
            download_to_folder(NAME, tmp_path / "other", revision)
    hub.on_the_way.clear()
    assert (download_to_folder(NAME, tmp_path / "other") / "model.safetensors").read_bytes() == stored[
        "model.safetensors"
    ]
    assert names(tmp_path) == {"mine", "other"}, "and nothing is left beside it"


def test_create_model_takes_a_name_on_the_hub_and_says_what_it_fetches(hub, real, capsys):
    hub.add(NAME, real)
    model = create_model(NAME)
    assert "to fetch" in capsys.readouterr().err
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), create_model(real)(ids))


def test_another_revision_is_another_model_and_needs_no_network_either(hub, real, random_model, tmp_path, monkeypatch):
    """Pythia's training steps are revisions of one name: taking main for step 1000 would go unnoticed."""
    step = tmp_path / "step"
    write_huggingface(random_model(WITH_TOKENIZER, seed=1), step, real / "tokenizer.json")
    hub.add(NAME, real)
    hub.add(NAME, step, revision="step1000")
    ids = torch.arange(20)[None]
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert torch.equal(create_model(NAME, revision="step1000")(ids), create_model(step)(ids))
        assert torch.equal(create_model(NAME)(ids), create_model(real)(ids))
    play = Playground(NAME, revision="step1000")
    assert torch.equal(play.state.model(ids), create_model(step)(ids))
    assert main(["convert", NAME, str(tmp_path / "slim"), "--revision", "step1000"]) == 0
    assert torch.equal(create_model(tmp_path / "slim")(ids), create_model(step)(ids))
    assert main(["generate", "the fox", "--model", NAME, "--revision", "step1000", "--tokens", "1"]) == 0
    assert main(["generate", "the fox", "--model", NAME, "--revision", "step2000", "--tokens", "1"]) == 2


def test_info_asks_the_hub_for_no_weights_and_after_a_download_for_nothing(hub, real, capsys, monkeypatch):
    """What a model costs is asked before it is fetched; and Pythia's 154 revisions have one name."""
    hub.add(NAME, real, revision="step1000")
    words = ["info", NAME, "--revision", "step1000"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert set(hub.fetched) == SMALL | {"model.safetensors.index.json"}
    assert f"{NAME} on the Hub, revision step1000, commit " in said and "float16" in said
    assert all(f"{name} " in said for name in SHARDS) and "not fetched yet" in said and "hidden_size" in said
    assert main(["info", NAME]) == 2 and "no revision 'main'" in one_line(capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words) == 2 and "HF_HUB_OFFLINE" in one_line(capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = download(NAME, "step1000")
    hub.requests.clear()
    capsys.readouterr()
    assert main(words) == 0
    assert f"read from                  {folder}\n" in capsys.readouterr().out and not hub.requests


def test_an_adapter_brings_its_base_model_and_needs_no_network_then(hub, real, tmp_path, capsys, monkeypatch):
    """The base is named in its config, with a revision: nobody knows that name by heart."""
    base, adapter = "someone/base", tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base, "revision": "step7"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.gpt_neox.layers.0.attention.dense"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    hub.add(NAME, adapter)
    assert main(["generate", "the fox", "--model", str(adapter)]) == 2
    assert f"adapter_config.json: its base model is not here; on the Hub: {base}: there is no such" in one_line(capsys)
    hub.add(base, real, revision="step7")
    assert main(["info", str(adapter)]) == 2
    assert "not in the Hub's cache; fetch it with: python -m neox_lib download someone/base" in one_line(capsys)
    assert main(["info", NAME]) == 2 and f"an adapter of {base}; download both" in one_line(capsys)
    int8 = ["download", NAME, "--to", "int8", str(tmp_path / "int8")]
    assert main(int8) == 2 and "then convert it to int8" in one_line(capsys)
    assert main(["generate", "the fox", "--model", NAME, "--tokens", "1"]) == 0
    assert cached_folder(base, "step7") is not None
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = dict(open_checkpoint(real).tensors())["layers.0.attention.dense.weight"].float() + 4
    for source in (NAME, adapter):
        assert torch.equal(create_model(source).layers[0].attention.dense.weight, expected)
        assert create_tokenizer(source).to_str() == create_tokenizer(real).to_str()
    capsys.readouterr()
    assert main(["info", NAME]) == 0
    assert f"LoRA of rank 2 on {cached_folder(base, 'step7')}" in capsys.readouterr().out
    assert not hub.requests


QUANTIZED = {"model_type": "gpt_neox", "quantization_config": {"quant_method": "gptq", "bits": 4}}
NOT_FETCHED = {
    "quantized": (QUANTIZED, {}, "quantized by GPTQ (0.00 GB, in half precision 41.11 GB), which can't be read here"),
    "AutoGPTQ's own names": ({"model_type": "gpt_neox"}, {"quantize_config.json": b"{}"}, "quantized by GPTQ"),
    "another architecture": ({"model_type": "llama"}, {}, "model_type is 'llama'"),
}


@pytest.mark.parametrize(("config", "more", "said"), NOT_FETCHED.values(), ids=NOT_FETCHED)
def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(hub, capsys, tmp_path, config, more, said):
    """Gigabytes later it would be no better."""
    weights = "gptq_model-4bit.safetensors" if more else "model.safetensors"
    hub.put(NAME, model_files(**{weights: b"weights", "config.json": json.dumps(config).encode()} | more))
    int8 = ["download", NAME, "--to", "int8", str(tmp_path / "int8")]
    for words in (["download", NAME], int8, ["info", NAME]):
        assert main(words) == 2 and said in one_line(capsys)
    assert weights not in hub.fetched


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt", "added_tokens.json"), ("spiece.model",)])
def test_a_tokenizer_in_an_older_layout_comes_with_all_of_its_files(hub, names):
    small = {name: content for name, content in SMALL_FILES.items() if name != "tokenizer.json"}
    content = {
        "vocab.json": b'{"a": 0, "b": 1}',
        "merges.txt": b"#version: 0.2\n",
        "added_tokens.json": b'{"<|end|>": 2}',
    }
    content["spiece.model"] = b"\x0a\x09\x0a\x05<unk>\x18\x02\x0a\x05\x0a\x01b\x18\x01"
    hub.put(NAME, small | {name: content[name] for name in names} | {"model.safetensors": b"weights"})
    for _ in range(2):
        assert create_tokenizer(NAME).token_to_id("b") == 1
    assert set(hub.fetched) == {*names, "tokenizer_config.json"} and len(hub.fetched) == len(names) + 1
    assert {*names} <= {path.name for path in download(NAME).iterdir()}


def test_once_cached_a_model_needs_no_network(hub, real, capsys, monkeypatch):
    """In a classroom without a network the second run must be as good as the first."""
    hub.add(NAME, real)
    words = ["generate", "the fox", "--model", NAME, "--tokens", "3", "--no-stop"]
    assert main(words) == 0
    first = capsys.readouterr().out
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == first and first.startswith("the fox") and "HF_HUB_OFFLINE" not in err
    assert not hub.requests


def test_offline_what_is_not_cached_is_one_clear_line(hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["generate", "x", "--model", NAME]) == 2
    assert "HF_HUB_OFFLINE" in one_line(capsys)
    assert not hub.requests


def test_create_tokenizer_fetches_the_tokenizer_alone(hub, real):
    hub.add(NAME, real)
    for _ in range(2):
        assert create_tokenizer(NAME).encode("the fox").ids == create_tokenizer(real).encode("the fox").ids
    assert hub.fetched == ["tokenizer.json"]


def test_a_folder_of_that_name_wins(hub, real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / NAME).symlink_to(real)
    create_model(NAME)
    create_tokenizer(NAME)
    assert not hub.requests


@pytest.mark.parametrize(
    "path",
    [
        *("./runs/model", "../runs", "~/model", "/runs/model", "runs/first/model", "runs\\model", "model", ""),
        *("runs/model.int8.safetensors", "runs/tokenizer.json", "runs/", "/runs", "C:/runs", "runs/my model"),
        Path("runs/model"),
    ],
)
def test_what_is_clearly_a_path_is_never_looked_up(path):
    """A typing error in a path must not become a question to a stranger's server."""
    assert not is_hub_name(path)


@pytest.fixture
def shards_held(monkeypatch) -> list[int]:
    """How many shards lie on the disk, whole or in part, each time that one is quantized."""
    held, add = [], quantized_stream.QuantizedStream.add

    def counted(self, shard):
        held.append(sum(name in SHARDS or name.endswith(".incomplete") for name in names(shard.parent)))
        add(self, shard)

    monkeypatch.setattr(quantized_stream.QuantizedStream, "add", counted)
    return held


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_stream_gives_what_a_conversion_gives_and_holds_one_shard_at_a_time(
    hub, real, tmp_path, capsys, shards_held, kind
):
    """That is the whole point: 22 GB of disk instead of 62."""
    hub.add(NAME, real)
    assert main(["download", NAME, "--to", kind, str(tmp_path / "small")]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "small") and f"the {kind} file takes" in err and "GB free" in err
    expected = convert_to_quantized(real, tmp_path / "whole", quantization.QUANTIZED[kind])
    assert (tmp_path / "small" / expected.name).read_bytes() == expected.read_bytes()
    assert names(tmp_path / "small") == SMALL | {expected.name} and not (tmp_path / "small.unfinished").exists()
    assert shards_held == [1, 1, 1, 1]


def test_damaged_weights_end_the_stream_in_one_line(hub, real, tmp_path, capsys):
    name = "layers.1.input_layernorm.bias"
    model = create_model(real, dtype="float16")
    model.get_parameter(name)[0] = float("nan")
    write_huggingface(model, tmp_path / "bad", real / "tokenizer.json")
    hub.add(NAME, tmp_path / "bad")
    assert main(["download", NAME, "--to", "int8", str(tmp_path / "small")]) == 2
    assert f"{name} holds NaN or infinity" in one_line(capsys) and not (tmp_path / "small" / INT8_FILE).exists()


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_in_one_file_streams_too(hub, real, real_int8, tmp_path, single):
    write_huggingface(create_model(real, dtype="float16"), tmp_path / "one", real / "tokenizer.json")
    if single.endswith(".bin"):
        torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "one" / single)
        (tmp_path / "one" / "model.safetensors").unlink()
    hub.add(NAME, tmp_path / "one")
    assert (download_quantized(NAME, tmp_path / "small") / INT8_FILE).read_bytes() == real_int8


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["fetch", "write_each", "write_text_atomically"])
def test_an_int8_stream_goes_on_behind_the_shards_that_are_done(
    hub, real, real_int8, tmp_path, monkeypatch, shards_held, where
):
    """A day of download is not lost with the power, and a shard that had arrived is not fetched again."""
    hub.add(NAME, real)
    calls, function = [], getattr(quantized_stream, where, None)

    def stop_at_the_third(*given):
        calls.append(function(*given))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "fetch":
            patch.setitem(hub.on_the_way, SHARDS[2], interrupted)
        else:
            patch.setattr(quantized_stream, where, stop_at_the_third)
        download_quantized(NAME, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    next(tmp_path.rglob("parts")).joinpath("of_a_killed_process.incomplete").touch()
    assert (download_quantized(NAME, tmp_path / "small") / INT8_FILE).read_bytes() == real_int8
    assert [hub.fetched.count(name) for name in SHARDS] == [1, 1, 2 if where == "fetch" else 1, 1]
    assert set(shards_held) == {1}


def test_a_shard_counts_as_done_only_once_it_is_on_the_disk(hub, real, tmp_path, monkeypatch):
    """The other way round a loss of power leaves a hole full of zeros that nothing would ever notice."""
    hub.add(NAME, real)
    events = []

    def logged(event, function):
        return lambda *given: (function(*given), events.append(event))

    monkeypatch.setattr(quantized_stream, "write_each", logged("written", quantized_stream.write_each))
    monkeypatch.setattr(quantized_stream.os, "fsync", logged("flushed", os.fsync))
    monkeypatch.setattr(
        quantized_stream, "write_text_atomically", logged("noted", lambda path, text: path.write_text(text))
    )
    download_quantized(NAME, tmp_path / "small")
    assert events == ["written", "flushed", "noted"] * len(SHARDS)


def test_what_another_revision_left_is_not_quantized_for_this_one(hub, real, random_model, tmp_path):
    """All revisions of a Pythia have files of the same names and sizes: what one left is not the other's."""
    write_huggingface(random_model(WITH_TOKENIZER, 1).half(), tmp_path / "later", real / "tokenizer.json", 30_000)
    hub.add(NAME, real)
    hub.add(NAME, tmp_path / "later", "later")
    hub.on_the_way[SHARDS[2]] = broken
    with pytest.raises(DownloadError):
        download_quantized(NAME, tmp_path / "small")
    hub.on_the_way.clear()
    expected = write_quantized(open_checkpoint(tmp_path / "later"), tmp_path / "converted").read_bytes()
    assert (download_quantized(NAME, tmp_path / "small", "later") / INT8_FILE).read_bytes() == expected


def test_without_room_for_the_int8_file_no_shard_is_fetched(hub, real, tmp_path, monkeypatch, capsys):
    hub.add(NAME, real)
    monkeypatch.setattr("neox_lib.checkpoints.files.free_bytes", lambda folder: 40_000)
    assert main(["download", NAME, "--to", "int8", str(tmp_path / "small")]) == 2
    assert "make room" in one_line(capsys)
    assert not set(SHARDS) & set(hub.fetched)


@pytest.mark.parametrize("indexed", [True, False], ids=["by its index", "by its shards"])
def test_a_model_that_lacks_a_tensor_is_found_out(hub, real, tmp_path, indexed):
    """Before any shard is fetched, where there is an index: that is 40 GB early."""
    index = json.loads((real / "model.safetensors.index.json").read_text())
    del index["weight_map"]["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    hub.put(NAME, {path.name: path.read_bytes() for path in real.iterdir()})
    if indexed:
        hub.models[NAME]["main"]["model.safetensors.index.json"] = json.dumps(index).encode()
    else:
        del hub.models[NAME]["main"]["model.safetensors.index.json"]
        hub.models[NAME]["main"]["model.safetensors"] = (real / SHARDS[0]).read_bytes()
    with pytest.raises(CheckpointError, match=r"lacks gpt_neox\..*, which config.json asks for"):
        download_quantized(NAME, tmp_path / "small")
    assert not set(SHARDS) & set(hub.fetched)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": 64}, r"-of-00004\.safetensors: gpt_neox\..* has shape .* expected"),
        ({"torch_dtype": "bfloat16"}, r"is torch\.float16, expected torch\.bfloat16 from config\.json; download"),
    ],
)
def test_a_shard_that_is_not_the_configs_is_named(hub, real, tmp_path, change, said):
    files = hub.add(NAME, real)
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | change).encode()
    with pytest.raises(CheckpointError, match=said):
        download_quantized(NAME, tmp_path / "small")


def test_a_folder_that_is_there_is_not_written_into(hub, real, tmp_path):
    hub.add(NAME, real)
    with pytest.raises(CheckpointError, match="already exists"):
        download_quantized(NAME, tmp_path)

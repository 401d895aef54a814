"""Models from the Hub, against a small Hub on 127.0.0.1: no byte is fetched twice, and none is trusted unseen."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load_file

import neox_lib
from neox_lib import create_model, create_tokenizer
from neox_lib.__main__ import main
from neox_lib.checkpoints.files import CheckpointError
from neox_lib.checkpoints.huggingface.writer import write_huggingface
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import INT8_FILE, write_int8
from neox_lib.hub import fetch, unfinished
from neox_lib.hub.download import cached_folder, download_to_cache, download_to_folder
from neox_lib.hub.download_int8 import download_int8
from neox_lib.hub.listing import DownloadError
from neox_lib.hub.names import is_hub_name
from neox_lib.tokenizer import save_tokenizer, train_tokenizer
from tests.small_models import WITH_TOKENIZER

NAME = "someone/small-model"
CONFIG = WITH_TOKENIZER


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, which this process takes for the real one, and an empty cache."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(fetch, "PAUSES", (0.0,) * 5)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def model_files(**more: bytes) -> dict[str, bytes]:
    """Files under the names of a model, with content that is none."""
    small = {"config.json": b'{"model_type": "gpt_neox"}', "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    return small | {"README.md": b"# A model", "tf_model.h5": b"of no use to us"} | more


@pytest.fixture
def stored(hub, tmp_path):
    """Weights of 300,000 bytes in one file, on the Hub, in both formats."""
    return hub.put(NAME, model_files(**{"model.safetensors": os.urandom(300_000), "pytorch_model.bin": b"the same"}))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A model that runs, as a Hugging Face folder of shards with its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("real")
    save_tokenizer(train_tokenizer(["the fox and the hen and the fox"], 300), folder / "tokenizer.json")
    model = neox_lib.NeoXModel(CONFIG).to(torch.float16)
    write_huggingface(model, folder / "model", folder / "tokenizer.json", shard_bytes=30_000)
    return folder / "model"


def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """For a process of its own that takes `hub` for the Hub, with this test's cache."""
    mine = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
    return {**os.environ, **mine, "OMP_NUM_THREADS": "1"}


def stop_when_holding(
    hub: HubServer, words: list[str], tmp_path: Path, how: signal.Signals, arrived: int
) -> tuple[int, str]:
    """Run a command until the Hub holds a file back and its first bytes have `arrived` in a file of their own; stop it
    there, and return its exit code and stderr.
    """
    command = [sys.executable, "-m", "neox_lib", *words]
    process = subprocess.Popen(command, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True)
    assert hub.troubles.holding.wait(100), process.communicate()
    while arrived not in {path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}:
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    hub.troubles.held.clear()
    hub.troubles.go_on.set()
    return process.returncode, err


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("neox_lib: ")]
    assert err.splitlines()[-1] == lines[-1] and not out
    return lines[-1]


def test_only_the_files_that_we_need_are_fetched_and_the_better_format_of_two(hub, stored):
    folder = download_to_cache(NAME)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert all((folder / name).read_bytes() == stored[name] for name in names)
    assert not hub.fetches("pytorch_model.bin") and not hub.fetches("tf_model.h5")


def test_other_programs_find_the_model_in_the_cache(hub, stored):
    """Gigabytes that transformers would fetch a second time were not cached but hidden."""
    folder = download_to_cache(NAME)
    theirs = huggingface_hub.snapshot_download(NAME, allow_patterns=["*.json", "*.safetensors"], local_files_only=True)
    assert Path(theirs) == folder
    assert len(hub.fetches("model.safetensors")) == 1


def test_what_others_have_cached_is_not_fetched_again(hub, stored):
    theirs = huggingface_hub.snapshot_download(NAME, allow_patterns=["*.json", "*.safetensors"])
    assert download_to_cache(NAME) == Path(theirs)
    assert len(hub.fetches("model.safetensors")) == 1


def test_of_shards_those_that_the_index_names_are_fetched(hub):
    index = json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    )
    shards = {f"model-{number}.safetensors": os.urandom(1000) for number in (1, 2, 3)}
    hub.put(NAME, model_files(**{"model.safetensors.index.json": index.encode(), **shards}))
    names = {path.name for path in download_to_cache(NAME).iterdir()}
    assert {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"} < names
    assert "model-3.safetensors" not in names


def test_a_model_that_has_only_bin_files_is_fetched_as_that(hub):
    hub.put(NAME, model_files(**{"pytorch_model.bin": b"weights"}))
    assert (download_to_cache(NAME) / "pytorch_model.bin").read_bytes() == b"weights"


def test_a_hostile_index_reaches_no_file_outside(hub):
    index = json.dumps({"weight_map": {"a": "../../../../outside.safetensors"}}).encode()
    hub.put(NAME, model_files(**{"model.safetensors.index.json": index, "../../../../outside.safetensors": b"x"}))
    with pytest.raises(DownloadError, match="not among the model's files"):
        download_to_cache(NAME)


def test_the_bytes_and_the_free_disk_are_said_before_anything_large_is_fetched(hub, stored, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("neox_lib.hub.download.fetch", stop)
    assert main(["download", NAME]) == 130
    err = capsys.readouterr().err
    assert "0.3 MB in 4 file(s)" in err and "GB free" in err


def test_a_broken_connection_goes_on_where_it_broke(hub, stored, tmp_path):
    hub.troubles.broken["model.safetensors"] = [30_000] * 8
    folder = download_to_folder(NAME, tmp_path / "mine")
    assert hub.fetches("model.safetensors") == [30_000 * number for number in range(9)]
    assert (folder / "model.safetensors").read_bytes() == stored["model.safetensors"]


def test_a_server_that_sends_the_whole_file_again_does_no_harm(hub, stored):
    hub.troubles.broken["model.safetensors"] = [100_000]
    hub.troubles.no_ranges = True
    assert (download_to_cache(NAME) / "model.safetensors").read_bytes() == stored["model.safetensors"]


def test_when_tries_run_out_the_next_run_goes_on_from_there(hub, stored, capsys):
    hub.troubles.broken["model.safetensors"] = [100_000] + [0] * 6
    assert main(["download", NAME]) == 2
    assert "100,000 of the 300,000 bytes" in one_line(capsys)
    assert main(["download", NAME]) == 0
    assert hub.fetches("model.safetensors")[-1] == 100_000
    assert "have arrived before" in capsys.readouterr().err


def test_after_ctrl_c_a_download_goes_on_where_it_stopped(hub, stored, tmp_path):
    """A fetched byte is on the disk, and the next run begins behind it."""
    hub.troubles.held["model.safetensors"] = 200_000
    code, err = stop_when_holding(hub, ["download", NAME], tmp_path, signal.SIGINT, 200_000)
    assert code == 130 and "neox_lib: stopped; what has arrived is kept" in err and "Traceback" not in err
    folder = download_to_cache(NAME)
    assert hub.fetches("model.safetensors") == [0, 200_000]
    assert (folder / "model.safetensors").read_bytes() == stored["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_bytes_are_refused_and_removed(hub, stored, tmp_path, capsys, name):
    """Weights with a flipped bit load without a word; only the checksum tells."""
    hub.troubles.damaged.add(name)
    assert main(["download", NAME, "--to", str(tmp_path / "mine")]) == 2
    assert "damaged" in (line := one_line(capsys)) and name in line
    assert not [path for path in (tmp_path / "mine").iterdir() if name in path.name]
    hub.troubles.damaged.clear()
    folder = download_to_folder(NAME, tmp_path / "mine")
    assert (folder / name).read_bytes() == stored[name]


def test_a_token_is_shown_to_the_hub_alone(hub, stored, monkeypatch):
    """Large files come from another host, by a link that needs no token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download_to_cache(NAME)
    shown = {request.path.startswith("/large") for request in hub.requests if request.token}
    assert shown == {False}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["download", "someone/else"], "no such model"),
        (["download", NAME, "--revision", "step7"], "no revision 'step7'"),
        (["download", "not/a/name"], "not a model's name"),
        (["download", "someone/gated"], "access one by one"),
        (["download", "someone/text-only"], "expected config.json and model*.safetensors"),
        (["generate", "x", "--model", "someone/else"], "no file or folder someone/else here"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_line(hub, stored, capsys, words, said):
    hub.put("someone/gated", model_files(**{"model.safetensors": b"weights"}))
    hub.put("someone/text-only", {"README.md": b"# Nothing yet"})
    hub.repos["someone/gated"].gated = True
    assert main(words) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize(("status", "said"), [(500, "HTTP status 500"), (403, "log in"), (200, "login page")])
def test_a_hub_that_answers_with_something_else_is_one_clear_line(hub, stored, capsys, status, said):
    hub.troubles.all_answers = status
    assert main(["download", NAME]) == 2
    assert said in one_line(capsys)


def test_no_network_is_one_clear_line(hub, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert main(["download", NAME]) == 2
    line = one_line(capsys)
    assert NAME in line and "can't be reached" in line and "check the network" in line


def test_without_a_network_a_whole_copy_in_the_cache_will_do(hub, stored, capsys):
    folder = download_to_cache(NAME)
    hub.troubles.all_answers = 503
    capsys.readouterr()
    assert main(["download", NAME]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(folder) and "Taking the copy in the cache" in err


def test_a_copy_in_the_cache_that_lacks_a_shard_is_not_taken_for_whole(hub, real):
    hub.add(NAME, real)
    folder = download_to_cache(NAME)
    assert cached_folder(NAME) == folder
    next(folder.glob("model-00002*")).unlink()
    assert cached_folder(NAME) is None


def test_without_room_on_the_disk_nothing_is_fetched(hub, stored, capsys, monkeypatch):
    monkeypatch.setattr("neox_lib.checkpoints.files.free_bytes", lambda folder: 200_000)
    assert main(["download", NAME]) == 2
    line = one_line(capsys)
    assert "GB free" in line and "make room" in line
    assert not hub.fetches("model.safetensors") and not hub.fetches("tokenizer.json")


def test_a_disk_that_fills_up_keeps_what_has_arrived(hub, stored, capsys, monkeypatch, tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("neox_lib.hub.fetch.os.fsync", full)
        assert main(["download", NAME, "--to", str(tmp_path / "mine")]) == 2
        assert "No space left on device" in one_line(capsys)
    assert not (tmp_path / "mine" / "config.json").exists()
    download_to_folder(NAME, tmp_path / "mine")
    assert hub.fetches("config.json") == [0], "it had arrived"


def test_two_at_once_fetch_once(hub, stored):
    """A class that starts the same cell in two notebooks appends to the same unfinished file."""
    hub.troubles.held["model.safetensors"] = 100_000
    with ThreadPoolExecutor() as pool:
        first = pool.submit(download_to_cache, NAME)
        assert hub.troubles.holding.wait(20)
        hub.troubles.held.clear()
        second = pool.submit(download_to_cache, NAME)
        time.sleep(0.2)
        assert not second.done()
        hub.troubles.go_on.set()
    assert first.result() == second.result()
    assert hub.fetches("model.safetensors") == [0]


def test_a_folder_of_ones_own_is_checked_and_not_fetched_again(hub, stored, tmp_path, capsys):
    assert main(["download", NAME, "--to", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mine")
    assert main(["download", NAME, "--to", str(tmp_path / "mine")]) == 0
    assert "all of it is there already" in capsys.readouterr().err
    assert hub.fetches("model.safetensors") == [0]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not (tmp_path / "hub").exists()


def test_a_folder_never_holds_half_of_one_revision_and_half_of_another(hub, stored, tmp_path):
    """A Pythia's 154 revisions have the same names and sizes, and would load together."""
    later = {**stored, "model.safetensors": os.urandom(300_000)}
    hub.put(NAME, later, "step2")
    folder = download_to_folder(NAME, tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: differs from the Hub's"):
        download_to_folder(NAME, folder, "step2")
    assert (folder / "model.safetensors").read_bytes() == stored["model.safetensors"]
    other = download_to_folder(NAME, tmp_path / "other", "step2")
    assert (other / "model.safetensors").read_bytes() == later["model.safetensors"]


def test_create_model_takes_a_name_on_the_hub_and_says_what_it_fetches(hub, real, capsys):
    hub.add(NAME, real)
    model = create_model(NAME)
    assert "to fetch" in capsys.readouterr().err
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), create_model(real)(ids))


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
    assert create_tokenizer(NAME).encode("the fox").ids == create_tokenizer(real).encode("the fox").ids
    assert {Path(request.path).name for request in hub.requests if "/resolve/" in request.path} == {"tokenizer.json"}


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


SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]


def same_int8(folder: Path, source: Path, tmp_path: Path) -> bool:
    """Whether an int8 model is, byte for byte, what a conversion of the `source` folder gives."""
    by_conversion = write_int8(open_checkpoint(source), tmp_path / "by_conversion")
    return (folder / INT8_FILE).read_bytes() == by_conversion.read_bytes()


def test_the_int8_stream_gives_what_a_conversion_gives(hub, real, tmp_path, capsys):
    hub.add(NAME, real)
    assert main(["download", NAME, "--to", "int8", str(tmp_path / "small")]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "small") and "the int8 file takes" in err and "GB free" in err
    assert same_int8(tmp_path / "small", real, tmp_path)
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {INT8_FILE, "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_damaged_weights_end_the_stream_in_one_line(hub, real, tmp_path, capsys):
    name = "layers.1.input_layernorm.bias"
    model = create_model(real, dtype="float16")
    model.get_parameter(name)[0] = float("nan")
    write_huggingface(model, tmp_path / "bad", real / "tokenizer.json")
    hub.add(NAME, tmp_path / "bad")
    assert main(["download", NAME, "--to", "int8", str(tmp_path / "small")]) == 2
    assert f"{name} holds NaN or infinity" in one_line(capsys) and not (tmp_path / "small" / INT8_FILE).exists()


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_in_one_file_streams_too(hub, real, tmp_path, single):
    model = create_model(real, dtype="float16")
    write_huggingface(model, tmp_path / "one", real / "tokenizer.json")
    if single.endswith(".bin"):
        torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "one" / single)
        (tmp_path / "one" / "model.safetensors").unlink()
    hub.add(NAME, tmp_path / "one")
    assert same_int8(download_int8(NAME, tmp_path / "small"), real, tmp_path)


@pytest.fixture
def shards_held(monkeypatch) -> list[int]:
    """How many shards lie on the disk each time that one is quantized."""
    held, write_part = [], unfinished.UnfinishedFile.write_part

    def counted(self, *arguments):
        held.append(sum(path.suffix == ".safetensors" for path in self.path.parent.iterdir()))
        write_part(self, *arguments)

    monkeypatch.setattr(unfinished.UnfinishedFile, "write_part", counted)
    return held


def test_the_stream_holds_one_shard_at_a_time(hub, real, tmp_path, shards_held):
    """That is the whole point: 22 GB of disk instead of 62."""
    hub.add(NAME, real)
    download_int8(NAME, tmp_path / "small")
    assert shards_held == [1, 1, 1, 1]


def test_a_killed_int8_stream_goes_on_where_it_stopped(hub, real, tmp_path):
    """A day of download is not lost with the power: finished shards are not fetched again, nor the half of the next."""
    hub.add(NAME, real)
    hub.troubles.held[SHARDS[2]] = 10_001
    words = ["download", NAME, "--to", "int8", str(tmp_path / "small")]
    stop_when_holding(hub, words, tmp_path, signal.SIGKILL, 10_001)
    assert not (tmp_path / "small" / INT8_FILE).exists()
    folder = download_int8(NAME, tmp_path / "small")
    assert [hub.fetches(name) for name in SHARDS] == [[0], [0], [0, 10_001], [0]]
    assert same_int8(folder, real, tmp_path)


@pytest.mark.parametrize("where", ["write_each", "write_text_atomically"])
def test_an_end_while_a_shard_is_quantized_costs_no_new_fetch(hub, real, tmp_path, monkeypatch, shards_held, where):
    hub.add(NAME, real)
    calls, function = [], getattr(unfinished, where)

    def stop_at_the_third(*given):
        calls.append(function(*given))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, where, stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            download_int8(NAME, tmp_path / "small")
    folder = download_int8(NAME, tmp_path / "small")
    assert [hub.fetches(name) for name in SHARDS] == [[0]] * 4
    assert set(shards_held) == {1}
    assert same_int8(folder, real, tmp_path)


def test_a_shard_counts_as_done_only_once_it_is_on_the_disk(hub, real, tmp_path, monkeypatch):
    """The other way round a loss of power leaves a hole full of zeros that nothing would ever notice."""
    hub.add(NAME, real)
    events = []

    def logged(event, function):
        return lambda *given: (function(*given), events.append(event))

    system = SimpleNamespace(fsync=logged("flushed", os.fsync), replace=logged("named", os.replace))
    monkeypatch.setattr(unfinished, "os", system)
    monkeypatch.setattr(unfinished, "write_each", logged("written", unfinished.write_each))
    monkeypatch.setattr(unfinished, "write_text_atomically", logged("noted", unfinished.write_text_atomically))
    download_int8(NAME, tmp_path / "small")
    assert events == ["noted", *["written", "flushed", "noted"] * len(SHARDS), "named"]


def test_what_another_revision_left_is_not_taken_for_this_one(hub, real, random_model, tmp_path):
    """All revisions of a Pythia have files of the same names and sizes."""
    write_huggingface(random_model(CONFIG, 1).half(), tmp_path / "later", real / "tokenizer.json", shard_bytes=30_000)
    hub.add(NAME, real)
    hub.add(NAME, tmp_path / "later", "later")
    for revision in ("main", "later"):
        hub.troubles.broken[SHARDS[2]] = [5_000] + [0] * 6
        with pytest.raises(DownloadError, match="they are kept"):
            download_int8(NAME, tmp_path / "small", revision)
    assert same_int8(download_int8(NAME, tmp_path / "small"), real, tmp_path)


def test_a_whole_shard_of_another_revision_is_not_quantized_for_this_one(
    hub, real, random_model, tmp_path, monkeypatch
):
    """It lies there under the same name, complete and with a right checksum: the other revision's."""
    write_huggingface(random_model(CONFIG, 1).half(), tmp_path / "later", real / "tokenizer.json", shard_bytes=30_000)
    hub.add(NAME, real)
    hub.add(NAME, tmp_path / "later", "later")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unfinished, "write_each", stop)
        download_int8(NAME, tmp_path / "small")
    assert same_int8(download_int8(NAME, tmp_path / "small", "later"), tmp_path / "later", tmp_path)


def test_another_revision_brings_its_own_config(hub, real, tmp_path):
    """With another's activation the weights would load, and write nonsense."""
    files = {path.name: path.read_bytes() for path in real.iterdir()}
    config = json.loads(files["config.json"]) | {"hidden_act": "gelu"}
    hub.put(NAME, files)
    hub.put(NAME, files | {"config.json": json.dumps(config).encode()}, "exact")
    hub.troubles.broken[SHARDS[2]] = [0] * 6
    with pytest.raises(DownloadError, match="they are kept"):
        download_int8(NAME, tmp_path / "small")
    assert create_model(download_int8(NAME, tmp_path / "small", "exact")).config.hidden_act == "gelu"


def test_without_room_for_the_int8_file_no_shard_is_fetched(hub, real, tmp_path, monkeypatch, capsys):
    hub.add(NAME, real)
    monkeypatch.setattr("neox_lib.checkpoints.files.free_bytes", lambda folder: 40_000)
    assert main(["download", NAME, "--to", "int8", str(tmp_path / "small")]) == 2
    assert "make room" in one_line(capsys)
    assert not any(hub.fetches(name) for name in SHARDS)


def test_a_disk_that_fills_up_while_quantizing_keeps_what_is_done(hub, real, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    hub.add(NAME, real)
    words = ["download", NAME, "--to", "int8", str(tmp_path / "small")]
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "write_each", full)
        assert main(words) == 2
        assert "No space left on device" in one_line(capsys)
    assert main(words) == 0
    assert hub.fetches(SHARDS[0]) == [0]


def test_an_index_that_lacks_a_tensor_is_found_out_before_any_shard_is_fetched(hub, real, tmp_path):
    files = {path.name: path.read_bytes() for path in real.iterdir()}
    index = json.loads(files["model.safetensors.index.json"])
    del index["weight_map"]["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    hub.put(NAME, files | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match=r"lacks gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight"):
        download_int8(NAME, tmp_path / "small")
    assert not any(hub.fetches(name) for name in SHARDS)


def test_a_shard_of_another_model_is_named(hub, real, tmp_path):
    config = json.loads((real / "config.json").read_text())
    files = {path.name: path.read_bytes() for path in real.iterdir()}
    hub.put(NAME, files | {"config.json": json.dumps(config | {"intermediate_size": 64}).encode()})
    with pytest.raises(CheckpointError, match=r"-of-00004\.safetensors: gpt_neox\..* has shape .* expected"):
        download_int8(NAME, tmp_path / "small")


def test_a_folder_that_holds_a_model_is_not_written_into(hub, real, tmp_path):
    hub.add(NAME, real)
    folder = download_int8(NAME, tmp_path / "small")
    for taken in (folder, download_to_folder(NAME, tmp_path / "whole")):
        with pytest.raises(CheckpointError, match="already holds a model"):
            download_int8(NAME, taken)

"""Processes that work as one: how they find each other, which of them speaks, and how all end when one fails."""

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from neox_lib.loading import choose_device

FIRST_FAILURE = "neox_lib/first failure"  # key in the store that all ranks share; its value: rank, exit code, message
LOST = re.compile(r"Connection \w+ by peer|Connection refused|Broken pipe|Timed out|NCCL error", re.IGNORECASE)


class RankFailed(RuntimeError):
    """A rank failed or was lost, and so all of them ended; the message says which and why, in one line."""


class Terminated(Exception):
    """SIGTERM came: the launcher ends this rank."""


def rank_device(device: str | torch.device) -> torch.device:
    """This rank's own device: the GPU of its number on this machine, or the CPU.

    Raises ValueError when there are fewer GPUs than ranks, or when one GPU is named for all.
    """
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return chosen
    local, there_are = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if chosen.index is not None:
        raise ValueError(f"{chosen} was asked for, and each rank needs a GPU of its own; give device cuda or auto")
    if local >= there_are:
        raise ValueError(
            f"rank {local} of this machine finds {there_are} GPU(s); start as many ranks as there are GPUs, or give "
            "device cpu"
        )
    return torch.device("cuda", local)


def join_ranks(device: torch.device) -> None:
    """Meet the other ranks, as torchrun's environment says: through nccl on GPUs, gloo on CPUs.

    torchrun gives each process one thread unless OMP_NUM_THREADS says otherwise; here the ranks of a machine share its
    cores.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return
    if os.environ.get("OMP_NUM_THREADS") == "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo")


def shared_store(timeout_seconds: float = 10) -> Store:
    """The launcher's table of keys and values, which outlives every rank."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))


def first_failure(store: Store, rank: int, code: int, message: str) -> tuple[int, int, str]:
    """Note a failure unless an earlier one is noted; the first one's rank, exit code and message.

    What a rank says before it ends comes before what the others notice of its end, so the first one is the cause.
    """
    mine = f"{rank}\n{code}\n{message}"
    noted = store.compare_set(FIRST_FAILURE, "", mine)
    text = noted.decode("utf-8", "replace") if isinstance(noted, bytes) else str(noted)
    first_rank, first_code, first_message = text.split("\n", 2)
    return int(first_rank), int(first_code), first_message


def describe_failure(error: BaseException, rank: int, ranks: int) -> tuple[int, str]:
    """Exit code and one line for what ended a rank; no line for Ctrl-C and for a reader that closed the pipe."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, BrokenPipeError):
        return 0, ""
    if isinstance(error, ValueError | OSError):
        return 2, text
    if isinstance(error, Terminated):
        return 1, f"rank {rank} of {ranks} was told to end: another rank was lost, or the launcher was stopped"
    if isinstance(error, RuntimeError) and (how := LOST.search(text)):
        return 1, (
            f"rank {rank} of {ranks} lost another rank ({how[0]}), which was killed or crashed, perhaps for lack of "
            "memory; all ranks end"
        )
    return 1, f"rank {rank} of {ranks} failed: {type(error).__name__}: {text}"


@contextlib.contextmanager
def as_rank(device: str | torch.device) -> Iterator[None]:
    """Join the other ranks, on this rank's device of that kind, and be one of them while the block runs.

    All of them run the same block; only rank 0's output is shown. When a rank fails, the first to fail says so in one
    line on stderr, and each of them ends its process at once, without waiting for the others.
    """
    rank, ranks, stderr = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.stderr

    def terminate(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    with contextlib.ExitStack() as stack:
        if rank > 0:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        try:
            join_ranks(rank_device(device))
            yield
            dist.destroy_process_group()
        except (Exception, KeyboardInterrupt) as error:
            code, message = describe_failure(error, rank, ranks)
            first_rank = rank
            with contextlib.suppress(RuntimeError):  # the launcher is gone, and its store with it
                first_rank, code, message = first_failure(shared_store(), rank, code, message)
            if first_rank == rank and message:
                print(f"neox_lib: {message}", file=stderr, flush=True)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)  # torch's own end would wait for ranks that are gone


def read_once(read: Callable[[], str]) -> str:
    """The text that `read` gives, of standard input perhaps, which the ranks share: rank 0 reads it and tells the
    others."""
    text = [read() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(text, src=0)
    return text[0]


def _serve_rank(pipe: Connection, environment: dict[str, str], device: str, work: Callable, arguments: tuple) -> None:
    """The life of one process of `on_ranks`: join, work, hand the result back as bytes."""
    os.environ.update(environment)
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    try:
        torch.set_num_threads(1)
        join_ranks(rank_device(device))
        pipe.send_bytes(pickle.dumps((True, work(*arguments))))
    except BaseException as error:
        code, message = describe_failure(error, rank, ranks)
        with contextlib.suppress(RuntimeError, OSError):
            _, _, message = first_failure(shared_store(), rank, code, message)
            pipe.send_bytes(pickle.dumps((False, message)))
        os._exit(1)
    dist.destroy_process_group()


def on_ranks(ranks: int, work: Callable[..., Any], *arguments, device: str = "cpu") -> list[Any]:
    """Run `work(*arguments)` in `ranks` new processes of this machine that have joined; every rank's result, in order.

    `work` is a function of a module, not of a notebook's cell: a new process must be able to import it. Raises
    RankFailed, after ending the others, when one of them fails or is killed.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # it imports what the first work needs once, for all ranks of all calls
        context.set_forkserver_preload(["neox_lib.distributed.ranks", work.__module__])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    processes, pipes = [], []
    try:
        for rank in range(ranks):
            words = shared | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
            pipe, their_end = context.Pipe(duplex=False)
            environment = {name: str(value) for name, value in words.items()}
            given = (their_end, environment, device, work, arguments)
            process = context.Process(target=_serve_rank, args=given, daemon=True)
            process.start()
            their_end.close()
            processes.append(process)
            pipes.append(pipe)
        return _collect(pipes, store)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collect(pipes: list[Connection], store: Store) -> list[Any]:
    """Each rank's result, in order of ranks. Raises RankFailed at the first that has none."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in results]):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                succeeded, result = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                lost = f"rank {rank} of {len(pipes)} was lost: it was killed or crashed, perhaps for lack of memory"
                succeeded, result = False, first_failure(store, rank, 1, lost)[2]
            if not succeeded:
                raise RankFailed(result)
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]

"""Processes that work as one: how they find each other, whose output is shown, and how all stop when one fails."""

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from neox_lib.loading import choose_device

FIRST_FAILURE = "neox_lib/first failure"  # key in the store shared by all ranks; its value: rank, exit code, message
LOST = re.compile(r"Connection \w+ by peer|Connection refused|Broken pipe|Timed out|NCCL error", re.IGNORECASE)


class RankFailed(RuntimeError):
    """A rank failed or was lost, and so all were stopped; the message says which and why, in one line."""


class Terminated(Exception):
    """Raised on SIGTERM: the launcher stops this rank."""


def rank_device(device: str | torch.device) -> torch.device:
    """This rank's device: the GPU with its number on this machine, or the CPU.

    Raises ValueError if there are fewer GPUs than ranks, or if a single GPU is named for all.
    """
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return chosen
    local, there_are = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if chosen.index is not None:
        raise ValueError(f"{chosen} was asked for, but each rank needs its own GPU; use device cuda or auto")
    if local >= there_are:
        raise ValueError(
            f"rank {local} of this machine finds {there_are} GPU(s); start as many ranks as there are GPUs, or use "
            "device cpu"
        )
    return torch.device("cuda", local)


def join_ranks(device: torch.device) -> None:
    """Join the other ranks in a process group, as torchrun's environment variables say: through nccl on GPUs, gloo on
    CPUs.

    torchrun gives each process one thread unless OMP_NUM_THREADS says otherwise; here the ranks of a machine divide its
    cores among them.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return
    if os.environ.get("OMP_NUM_THREADS") == "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo")


def shared_store(timeout_seconds: float = 10) -> Store:
    """The launcher's key-value store, which outlives every rank."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))


def first_failure(store: Store, rank: int, code: int, message: str) -> tuple[int, int, str]:
    """Record a failure unless one is recorded already; returns the first one's rank, exit code and message.

    A rank reports its error before the others notice that it is gone, so the first one is the cause.
    """
    mine = f"{rank}\n{code}\n{message}"
    noted = store.compare_set(FIRST_FAILURE, "", mine)
    text = noted.decode("utf-8", "replace") if isinstance(noted, bytes) else str(noted)
    first_rank, first_code, first_message = text.split("\n", 2)
    return int(first_rank), int(first_code), first_message


def describe_failure(error: BaseException, rank: int, ranks: int) -> tuple[int, str]:
    """Exit code and a one-line message for what stopped a rank; no message for Ctrl-C and a closed pipe."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, BrokenPipeError):
        return 0, ""
    if isinstance(error, ValueError | OSError):
        return 2, text
    if isinstance(error, Terminated):
        return 1, f"rank {rank} of {ranks} was told to stop: another rank was lost, or the launcher was stopped"
    if isinstance(error, RuntimeError) and (how := LOST.search(text)):
        return 1, (
            f"rank {rank} of {ranks} lost another rank ({how[0]}), which was killed or crashed, perhaps for lack of "
            "memory; all ranks stop"
        )
    return 1, f"rank {rank} of {ranks} failed: {type(error).__name__}: {text}"


@contextlib.contextmanager
def as_rank(device: str | torch.device) -> Iterator[None]:
    """Act as one of the ranks while the block runs, on this rank's device of the given kind.

    All of them run the same block; only rank 0's output is shown. When a rank fails, the first to fail reports it in
    one line on stderr, and each process exits at once, without waiting for the others.
    """
    rank, ranks, stderr = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.stderr

    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    with contextlib.ExitStack() as stack:
        if rank > 0:
            silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        try:
            join_ranks(rank_device(device))
            yield
            dist.destroy_process_group()
        except (Exception, KeyboardInterrupt) as error:
            code, message = describe_failure(error, rank, ranks)
            first_rank = rank
            with contextlib.suppress(RuntimeError):  # the launcher is gone, and so is its store
                first_rank, code, message = first_failure(shared_store(), rank, code, message)
            if first_rank == rank and message:
                print(f"neox_lib: {message}", file=stderr, flush=True)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)  # torch's own shutdown would wait for ranks that are gone


def read_once(read: Callable[[], Any]) -> Any:
    """What `read` gives, such as standard input, which the ranks share: rank 0 reads it and broadcasts it."""
    text = [read() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(text, src=0)
    return text[0]


def _serve_rank(pipe: Connection, environment: dict[str, str], device: str, work: Callable, arguments: tuple) -> None:
    """What one process of `on_ranks` runs: join, work, send the result back as bytes."""
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
    """Run `work(*arguments)` in `ranks` new processes on this machine, one process group; returns the results in rank
    order.

    `work` must be defined in a module, not in a notebook cell, because a new process has to import it. Raises
    RankFailed, after stopping the others, if one fails or is killed.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # what the first call needs is imported once, for all ranks of all calls
        context.set_forkserver_preload(["neox_lib.distributed.ranks", work.__module__])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    processes, pipes = [], []
    try:
        for rank in range(ranks):
            variables = shared | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
            pipe, their_end = context.Pipe(duplex=False)
            environment = {name: str(value) for name, value in variables.items()}
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
    """The results in rank order. Raises RankFailed at the first rank without one."""
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

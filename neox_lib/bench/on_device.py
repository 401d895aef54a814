"""Speed on a GPU: fp16 models of any shape, their random weights made on the device, against transformers there."""

import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from neox_lib.bench.baselines import hugging_face_generate, hugging_face_twin, is_installed
from neox_lib.bench.candidates import Generate, our_generate
from neox_lib.bench.measure import bytes_per_token, time_answer
from neox_lib.bench.table import Row, Timing
from neox_lib.checkpoints.build import empty_model, fill_model
from neox_lib.config import NeoXConfig, parameter_shapes, preset
from neox_lib.model import NeoXModel
from neox_lib.precision import Precision, check_memory

SHAPES = ["1.4b", "6.9b", "20b"]
BASELINES: dict[str, dict[str, Any]] = {
    "transformers": {},
    "compiled": {"cache_implementation": "static"},
}  # what `generate` of theirs is given


def copy_bandwidth(device: torch.device, megabytes: int = 1024, repeats: int = 7) -> float:
    """Bytes per second that a copy on the device moves, read and written: the best of several."""
    source = torch.ones(megabytes * 2**18, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds[1:])


def model_on(device: torch.device, config: NeoXConfig) -> NeoXModel:
    """A model of that shape in fp16 with random weights, matrices of standard deviation 0.02: none of them is ever in
    the host's memory. Raises CheckpointError if the device is too small.
    """
    check_memory(config, Precision(torch.float16, torch.float16), device)
    generator = torch.Generator(device).manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in parameter_shapes(config).items():
            tensor = torch.full(shape, float(name.endswith("norm.weight")), dtype=torch.float16, device=device)
            yield name, tensor if len(shape) == 1 else tensor.normal_(std=0.02, generator=generator)

    return fill_model(empty_model(config), tensors())


def describe_device(device: torch.device, bandwidth: float) -> str:
    """The device and the versions, without which a figure says nothing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    libraries = f", transformers {version('transformers')}" if is_installed("transformers") else ""
    cuda = f" for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return (
        f"{name}, a copy moves {bandwidth / 1e9:.0f} GB/s, read and written; Python {platform.python_version()}, "
        f"torch {torch.__version__}{cuda}{libraries}"
    )


def run_on(
    device: torch.device,
    shape: str,
    prompts: Sequence[int],
    new_tokens: int = 65,
    rounds: int = 3,
    against: Sequence[str] = tuple(BASELINES),
) -> Iterator[Row]:
    """Yields a Row as soon as it is measured: each prompt length, ours in turns with each baseline, all on the same
    fp16 weights. Raises CheckpointError for a shape that the device has no room for.
    """
    model = model_on(device, preset(shape))
    sides: dict[str, Generate] = {"": our_generate(model)}
    if against:
        twin = hugging_face_twin(model, torch.float16)  # shares the weights
        sides |= {name: hugging_face_generate(twin, **BASELINES[name]) for name in against}
    for prompt in prompts:
        ids = torch.randint(model.config.tokenizer_vocab_size, (1, prompt), device=device)
        for generate in sides.values():
            generate(ids, new_tokens)  # warm-up: what is compiled is compiled for this length
        timings: dict[str, list[Timing]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, generate in sides.items():
                timings[name].append(time_answer(generate, ids, new_tokens))
        read = bytes_per_token(model, prompt, new_tokens)
        for name in against or [""]:
            yield Row(shape, prompt, "float16", name, timings[""], timings[name] if name else [], read)

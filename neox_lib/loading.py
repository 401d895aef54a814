"""From any checkpoint to a model that is ready to run, its tokenizer, and its own way of writing."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from neox_lib.checkpoints.adapters.layout import is_adapter
from neox_lib.checkpoints.build import build_model
from neox_lib.checkpoints.cached import find_base
from neox_lib.checkpoints.files import SHIPPED_MODEL
from neox_lib.checkpoints.generation_settings import read_sampling
from neox_lib.checkpoints.opening import open_checkpoint
from neox_lib.checkpoints.quantized import build_quantized_model
from neox_lib.checkpoints.tokenizer_files import GENERATION, find_tokenizer, open_tokenizer
from neox_lib.config import NeoXConfig
from neox_lib.decoding.step import use_compiled_step
from neox_lib.hub import local_path, local_tokenizer
from neox_lib.model import NeoXModel
from neox_lib.precision import check_memory, choose_precision, shrink_to_fit
from neox_lib.quantization.linear import QUANTIZED, use_cast_linear
from neox_lib.sampling import Sampling
from neox_lib.spelling import count_ids

logger = logging.getLogger(__name__)

PARAMETERS_PER_THREAD = 10_000_000  # with fewer, a layer takes less time than it takes to wake a thread and wait for it
torchs_threads = chosen_threads = torch.get_num_threads()


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises ValueError for a device that is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"no device is called {device!r}; use auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA GPU; use device='auto' or 'cpu'")
    try:
        if chosen.type != "cuda":
            torch.zeros(1, device=chosen).item()
        elif (chosen.index or 0) >= torch.cuda.device_count():  # a tensor there would cost each rank memory on GPU 0
            raise RuntimeError(f"torch finds {torch.cuda.device_count()} GPU(s), counted from 0")
    except Exception as error:  # each kind of device reports its absence in its own way
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"device {chosen} can't be used here ({reason}); use device='auto' or 'cpu'") from None
    return chosen


def threads_for(config: NeoXConfig) -> int:
    """Threads with which torch computes a model of this size on a CPU: a small one has one, which waits for no other.

    What a user has set, by OMP_NUM_THREADS or `torch.set_num_threads`, stays.
    """
    set_by_user = "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != chosen_threads
    if set_by_user:
        return torch.get_num_threads()
    return max(1, min(torchs_threads, config.parameter_count() // PARAMETERS_PER_THREAD))


def use_threads(config: NeoXConfig) -> None:
    """Compute with `threads_for` this model, the one loaded last."""
    global chosen_threads
    threads = threads_for(config)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        chosen_threads = threads


def create_model(
    path: str | Path | None = None,
    use_cache: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str = "main",
) -> NeoXModel:
    """Load a model for inference: from a slim, Hugging Face, LoRA, int8 or int4 folder, from such a file, or by its
    name on the Hugging Face Hub, such as "EleutherAI/pythia-70m" (see `local_path`); without a path, the shipped model.
    `revision` is a branch, tag or commit on the Hub, such as "step1000", one of Pythia's training steps.

    `use_cache` is the default for generation with this model. `device` "auto" is CUDA, else the CPU. For `dtype` "auto"
    see `choose_precision` and `shrink_to_fit`; when large matrices stay in half precision or are quantized to fit, a
    message says so. "int8" and "int4" quantize while loading, unless the weights are so already.
    Raises CheckpointError for an incomplete checkpoint and for a model that doesn't fit into memory, ValueError for a
    device or dtype that is not available, DownloadError for a model on the Hub that can't be fetched.
    """
    chosen_device = choose_device(device)
    checkpoint = open_checkpoint(local_path(SHIPPED_MODEL if path is None else path, revision))
    precision = choose_precision(checkpoint, chosen_device, dtype)
    if dtype == "auto":
        precision = shrink_to_fit(checkpoint.config, precision, chosen_device)
    check_memory(checkpoint.config, precision, chosen_device)
    if precision.notice:
        logger.info(precision.notice)
    if precision.matrices in QUANTIZED.values():
        model = build_quantized_model(checkpoint, precision.matrices, chosen_device, precision.others)
    else:
        model = build_model(checkpoint, chosen_device, precision.dtype_of)
    model.use_cache = use_cache
    if chosen_device.type == "cpu":
        use_compiled_step(use_cast_linear(model))
        use_threads(model.config)
    return model


def use_tokenizer(model: NeoXModel, tokenizer: Tokenizer) -> None:
    """Take the number of rows that stand for tokens from a tokenizer that is not beside the model's weights."""
    rows = min(count_ids(tokenizer), model.config.vocab_size)
    model.config = replace(model.config, tokenizer_vocab_size=rows)


def create_tokenizer(path: str | Path | None = None, revision: str = "main") -> Tokenizer:
    """The fast tokenizer (Hugging Face `tokenizers`) from a file, from a model's folder, or by a model's name on the
    Hub (only the tokenizer is fetched); without a path, the shipped model's.

    Raises FileNotFoundError when there is none, ValueError when the file is not a tokenizer, DownloadError for one on
    the Hub that can't be fetched.
    """
    return open_tokenizer(find_tokenizer(local_tokenizer(SHIPPED_MODEL if path is None else path, revision)))


def create_sampling(path: str | Path | None = None, revision: str = "main") -> Sampling:
    """A model's own defaults, as its `generation_config.json` says them and `transformers` applies them; an adapter
    without any has its base model's. The model is given as to `create_model`; one on the Hub is downloaded. Raises
    CheckpointError as `read_sampling` does.
    """
    local = local_path(SHIPPED_MODEL if path is None else path, revision)
    folder = local if local.is_dir() else local.parent
    if is_adapter(folder) and not (folder / GENERATION).exists():
        folder = find_base(folder)
    return read_sampling(folder)

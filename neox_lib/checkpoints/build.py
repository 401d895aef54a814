"""Fills an empty model so that it runs: the one place where parameters are put into a model.

Built in notebook 05.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neox_lib.checkpoints.checkpoint import Checkpoint, cast
from neox_lib.checkpoints.slim.partition import merge_shards
from neox_lib.config import NeoXConfig
from neox_lib.model import NeoXModel


class WithoutInitialValues(TorchFunctionMode):
    """While active, `torch.nn.init` leaves tensors as they are.

    Loading replaces them anyway, and drawing random numbers on the meta device makes torch import its compiler, which
    takes longer than loading the shipped model.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(config: NeoXConfig) -> NeoXModel:
    """A model of names, shapes and structure only: its parameters are on the meta device and take no memory."""
    with torch.device("meta"), WithoutInitialValues():
        return NeoXModel(config)


def whole_tensors(
    checkpoint: Checkpoint, device: str | torch.device, dtype_of: Callable[[str], torch.dtype | None]
) -> Iterator[tuple[str, Tensor]]:
    """Parameter names and whole tensors on `device` in `dtype_of(name)`, or as stored for None. Each has its own
    memory, so no file stays mapped. Raises CheckpointError as `cast` does.
    """
    for name, parts in checkpoint.parts():
        dtype, single = dtype_of(name) or parts[0].dtype, len(parts) == 1
        yield name, cast(name, parts[0] if single else merge_shards(name, parts), device, dtype, copy=single)
        del parts  # or their file would stay mapped while the next one is opened


def fill_model(model: NeoXModel, tensors: Iterable[tuple[str, Tensor]]) -> NeoXModel:
    """Replace each parameter by the tensor of its name, without copying; the model then runs, gradients off.

    The output matrix of a tied model becomes its embedding again, and cos and sin are computed on the weights' device.
    """
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.final_linear.weight = model.word_embeddings.weight
    model.rotary.fill(model.norm.weight.device)
    return model.eval()


def build_model(
    checkpoint: Checkpoint,
    device: str | torch.device = "cpu",
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> NeoXModel:
    """The model of a checkpoint, every parameter on `device` in `dtype_of(name)`, or as stored.

    It starts on the meta device, without memory, and each tensor goes straight to its final place, so the process
    never holds much more than the model itself. Raises CheckpointError as `whole_tensors` and `Checkpoint.parts` do.
    """
    return fill_model(empty_model(checkpoint.config), whole_tensors(checkpoint, device, dtype_of))

"""Weights in FBGEMM's own layout, the fastest on a CPU: fp16 as it is, for long sessions.

Packing takes time and frees the plain weight, so it is up to the caller: `pack_half`, and `pack_int8` in
int8_packing.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.decoding.linear import FastLinear, Model

PACK_NUMBERS = 2**25  # packed at a time: packing needs them in fp32, 128 MB


def has_fbgemm() -> bool:
    """Whether this torch can pack weights: its build has FBGEMM (x86), and the CPU at least AVX2."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and "AVX" in torch.backends.cpu.get_cpu_capability()


class PackedWeight(nn.Module):
    """A linear layer whose weight lives only in FBGEMM's layout: not a parameter, but saved unpacked under its name."""

    in_features: int
    out_features: int
    itemsize: int  # bytes of a number, in either layout

    @property
    def weight(self) -> Tensor:
        raise NotImplementedError

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


class PackedLinear(PackedWeight):
    """A FastLinear whose fp16 weight lives only in FBGEMM's layout: `[..., in]` -> `[..., out]`.

    Exact to fp32: neither activations nor results are rounded to fp16. `weight` is unpacked each time it is read, for
    saving and for the plain formula, and is no longer a parameter. Raises TypeError for a weight not in fp16.
    """

    itemsize = 2

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if linear.weight.dtype != torch.float16:
            raise TypeError(f"only fp16 weights can be packed, this one is {linear.weight.dtype}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        prepack, rows = torch.ops.quantized.linear_prepack_fp16, max(1, PACK_NUMBERS // linear.in_features)
        biases = [None] * -(-linear.out_features // rows) if linear.bias is None else linear.bias.float().split(rows)
        blocks = zip(linear.weight.detach().split(rows), biases, strict=True)
        self.packed = [prepack(block.float(), bias) for block, bias in blocks]
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The original fp16 weight `[out, in]`: a new tensor."""
        return torch.cat([torch.ops.quantized.linear_unpack_fp16(block)[0].half() for block in self.packed])

    def forward(self, input: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        if needs_gradient or input.dtype != torch.float32 or not input.is_cpu or input.dim() < 2:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.weight.to(input.device, input.dtype), bias)
        multiply = torch.ops.quantized.linear_dynamic_fp16
        products = [multiply(input, block) for block in self.packed]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def pack_layers(model: nn.Module, wanted: Callable[[nn.Module], bool], pack: Callable[[Any], nn.Module]) -> None:
    """Replace every `wanted` layer on the CPU with its `pack`, in place, using all threads.

    Each weight is freed once packed, so no second copy of the model remains. A tied output matrix is left alone: the
    embedding reads the same memory.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if wanted(child) and child.weight.is_cpu and id(child.weight) not in embeddings
    ]

    def replace(place: tuple[nn.Module, str, nn.Module]) -> None:
        module, name, child = place
        setattr(module, name, pack(child))
        child.weight = None  # type: ignore[assignment]  # `places` still holds the layer

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(replace, places))


def pack_half(model: Model) -> Model:
    """Replace every fp16 FastLinear inside `model` with a PackedLinear, in place, and return the model.

    For long sessions on a CPU with FBGEMM; elsewhere, and for other dtypes, nothing changes. Packing takes about 5 ns
    per weight on two cores, using all threads, and pays off after about 250 tokens. The allocator may return some of
    the freed memory late. Packed weights can't be replaced: load others first, then pack.
    """
    if has_fbgemm():
        pack_layers(
            model,
            lambda child: type(child) is FastLinear and child.weight.dtype == torch.float16,
            PackedLinear,
        )
    return model

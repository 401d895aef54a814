"""What the model would say after each layer, and which part of it gave a logit its value.

Built in notebook 11.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from neox_lib.inspection.hooks import require_hooks
from neox_lib.model import NeoXModel


@torch.inference_mode()
def residual_streams(model: NeoXModel, input_ids: Tensor) -> Tensor:
    """The residual stream after 0, 1, ... L layers: ids `[B, T]` -> `[L + 1, B, T, C]`."""
    streams: list[Tensor] = []
    model(input_ids, last_only=True, on_layer=lambda depth, hidden: streams.append(hidden))
    return torch.stack(streams)


@torch.inference_mode()
def logit_lens(model: NeoXModel, input_ids: Tensor) -> Tensor:
    """The logits that the last norm and the output matrix make of the stream after each layer: ids `[B, T]` ->
    `[L + 1, B, T, V]`; the last row is the model's own logits.

    Each layer's stream is normalized by its own mean and variance. (nostalgebraist 2020, "interpreting GPT: the logit
    lens".) The memory grows with L, T and V: for a long text take `lens_of_last`.
    """
    return model.final_linear(model.norm(residual_streams(model, input_ids)))


@torch.inference_mode()
def lens_of_last(
    model: NeoXModel, ids: list[int], on_progress: Callable[[int, int], bool | None] | None = None
) -> Tensor:
    """The lens at the last position only: T ids -> `[L + 1, V]`, fp32, on the CPU.

    `on_progress(done, total)` is called after each layer; when it returns False the pass ends with Stopped.
    """
    rows, layers = [], len(model.layers)

    def look(depth: int, hidden: Tensor) -> bool | None:
        rows.append(model.final_linear(model.norm(hidden[:, -1]))[0].float().cpu())
        return on_progress(depth, layers) if on_progress is not None and depth > 0 else None

    model(torch.tensor([ids], device=model.norm.weight.device), last_only=True, on_layer=look)
    return torch.stack(rows)


@torch.inference_mode()
def residual_parts(model: NeoXModel, input_ids: Tensor) -> dict[str, Tensor]:
    """What the residual stream is the sum of, in the order in which it is added: ids `[B, T]` -> name -> `[B, T, C]`.

    The names are "embedding", "attention 0", "mlp 0", "attention 1", and so on. The last norm reads their sum. Raises
    ValueError for a model whose passes call no hooks.
    """
    require_hooks(model)
    modules: dict[str, nn.Module] = {"embedding": model.word_embeddings}
    for depth, layer in enumerate(model.layers):
        modules |= {f"attention {depth}": layer.attention, f"mlp {depth}": layer.mlp}  # type: ignore[dict-item]
    parts: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda _module, _inputs, output: parts.update({name: output})

    with ExitStack() as hooks:  # on leaving, each hook is removed, also after an error
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(keep(name)))
        model(input_ids, last_only=True)
    return {name: part.to(model.norm.weight.dtype) for name, part in parts.items()}


def attribute(parts: Tensor, norm: nn.LayerNorm, row: Tensor) -> Tensor:
    """What each part of a stream adds to a logit: parts `[N, C]`, whose sum the norm reads, and a row `[C]` of the
    output matrix -> `[N + 1]`. The last number is what the norm's bias adds; all together are the logit.

    The norm divides by the deviation of the sum, which all parts made together: it is frozen there, and all else in the
    norm is linear. For a difference of two logits give the difference of their rows. (Elhage et al. 2021, "A
    Mathematical Framework for Transformer Circuits".)
    """
    deviation = (parts.sum(dim=0).var(unbiased=False) + norm.eps).sqrt()
    centred = parts - parts.mean(dim=-1, keepdim=True)
    added = (norm.weight * centred / deviation) @ row
    return torch.cat([added, (norm.bias @ row)[None]])


def split_dense(merged: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    """What each head adds through `dense`: the heads' outputs side by side `[..., C]` and the weight `[C, C]` ->
    `[H, ..., C]`. Their sum and the bias are what attention adds to the stream.

    Head h fills numbers h D to (h + 1) D - 1 of `merged`, which meet those columns of the weight. Raises ValueError for
    a weight of whole numbers.
    """
    if not weight.is_floating_point():
        raise ValueError(f"the weight of dense is {weight.dtype}, expected floating point: load with dtype='float32'")
    slices, columns = merged.chunk(num_heads, dim=-1), weight.to(merged.dtype).chunk(num_heads, dim=1)
    return torch.stack([each @ own.T for each, own in zip(slices, columns, strict=True)])

"""The training loop: windows of text, the loss, one AdamW step after another.

Built in notebook 10.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox_lib.model import NeoXModel
from neox_lib.training.plan import TrainingPlan


@torch.no_grad()
def initialize(model: NeoXModel, seed: int) -> None:
    """20B's initialization (`configs/20B.yml`): small_init everywhere, wang_init for matrices that write to the
    residual.

    Standard deviations sqrt(2 / 5C) (Nguyen & Salazar 2019) and 2 / (L sqrt(C)); biases 0, norms 1.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden_size, layers = model.config.hidden_size, model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes_residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            deviation = 2 / layers / hidden_size**0.5 if writes_residual else (2 / (5 * hidden_size)) ** 0.5
            parameter.normal_(0, deviation, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def next_token_loss(logits: Tensor, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token: logits `[B, T, V]`, windows `[B, T + 1]` -> a single number.

    Position t has read tokens 0 to t of its window and is judged by token t + 1. Computed in fp32.
    """
    targets = windows[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def sample_batch(stories: Tensor, mix: Tensor, plan: TrainingPlan, step: int) -> Tensor:
    """The windows of one step, `[B, length + 1]`: `mix_share` of them from `mix`; the same step always gets the same
    ones. The stories must be longer than the window.
    """
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    length = plan.window_length(step)
    count = plan.batch_tokens // length
    from_mix = round(count * plan.mix_share) if len(mix) > length else 0
    rows = []
    for stream, number in ((stories, count - from_mix), (mix, from_mix)):
        starts = torch.randint(len(stream) - length, (number,), generator=generator) if number else []
        rows += [stream[start : start + length + 1] for start in starts]
    return torch.stack(rows)


def make_optimizer(model: NeoXModel, plan: TrainingPlan) -> torch.optim.Optimizer:
    """AdamW, without weight decay on biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(step: int, steps: int, warmup_steps: int, highest: float) -> float:
    """The rate of step 0 .. steps - 1: a linear warm-up to `highest`, then half a cosine down to nearly 0.

    >>> [round(learning_rate_at(step, 8, 2, 1.0), 2) for step in range(8)]
    [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return highest * 0.5 * (1 + math.cos(math.pi * progress))


def training_step(
    model: NeoXModel,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    learning_rate: float,
    dtype: torch.dtype = torch.float32,
) -> float:
    """One update on windows `[B, length + 1]`, in parts of about 2,048 tokens, which fit the processor's caches better.

    Returns the loss before the update, in nats per token. Raises ValueError, before it, for NaN or infinite gradients.
    """
    rows = max(1, 2048 // batch.shape[1])
    total = 0.0
    for part in batch.split(rows):
        with torch.autocast(part.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(part[:, :-1])
        loss = next_token_loss(logits, part) * (len(part) / len(batch))
        loss.backward()
        total += loss.item()
    if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():  # an update would spoil every weight
        raise ValueError(
            f"the gradients are NaN or infinite, at a loss of {total:.3g}; the state on the disk is still whole: start "
            "anew in another folder with a lower learning rate"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def training_steps(
    model: NeoXModel, optimizer: torch.optim.Optimizer, plan: TrainingPlan, stories: Tensor, mix: Tensor, first: int = 0
) -> Iterator[tuple[int, float]]:
    """Follow the plan from step `first` on; after each update, yield (steps done, loss before it).

    Batches, dropout and learning rate depend on nothing but the plan and the step's number. So a run that was stopped
    and goes on with the same weights and the same optimizer ends as if it had never stopped.
    """
    for step in range(first, plan.steps):
        batch = sample_batch(stories, mix, plan, step)
        rate = learning_rate_at(step, plan.steps, plan.warmup_steps, plan.learning_rate)
        torch.manual_seed(plan.seed * 1_000_003 + step)
        model.train()
        yield step + 1, training_step(model, optimizer, batch, rate, getattr(torch, plan.dtype))

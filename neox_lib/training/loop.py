"""The loop that trained the shipped model: windows of stories, AdamW, a cosine schedule, and a saved state to
resume.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from neox_lib.block import Block
from neox_lib.checkpoints.atomic import write_atomically, write_text_atomically
from neox_lib.config import NeoXConfig
from neox_lib.evaluation.corpus import stories_of, story_stream
from neox_lib.evaluation.likelihood import negative_log_likelihood
from neox_lib.model import NeoXModel


@dataclass(frozen=True)
class TrainingPlan:
    """What to train on and how fast to learn.

    `windows` holds (share of the steps done, window lengths): from that share on, the steps take these lengths in turn.
    Short windows are cheap; without some long ones the model would fail at the end of its context. A corpus that is
    read many times is memorized; `dropout` and a larger `weight_decay` counter that.

    `dtype` is what matrix products compute in; the weights stay in fp32.

    Raises ValueError, naming the setting, for one out of range.
    """

    total_tokens: int = 20_000_000
    batch_tokens: int = 8192
    mix_share: float = 0.25
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.0
    warmup_steps: int = 200
    dtype: str = "float32"
    windows: tuple[tuple[float, tuple[int, ...]], ...] = ((0.0, (256, 256, 256, 2048)),)
    seed: int = 0

    def __post_init__(self):
        first, lengths = min(share for share, _ in self.windows), [each for _, row in self.windows for each in row]
        if not first <= 0 or min(lengths) < 1:
            raise ValueError(
                f"windows are {self.windows}; expected lengths above 0, the first of them from a share of 0 on"
            )
        if self.batch_tokens < self.longest_window:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}; expected the longest window's {self.longest_window} at least"
            )
        if self.total_tokens < self.batch_tokens:
            raise ValueError(
                f"total_tokens is {self.total_tokens}; expected the {self.batch_tokens} of one step at least"
            )
        for name in ("mix_share", "dropout"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {share}; expected a share from 0 to 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; expected float32 or bfloat16")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected 0 or more")

    @property
    def longest_window(self) -> int:
        return max(length for _, lengths in self.windows for length in lengths)

    @property
    def steps(self) -> int:
        return self.total_tokens // self.batch_tokens

    def window_length(self, step: int) -> int:
        lengths = [lengths for share, lengths in self.windows if step >= share * self.steps][-1]
        return lengths[step % len(lengths)]

    def learning_rate_at(self, step: int) -> float:
        """A linear warm-up, then half a cosine down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


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


def add_dropout(model: NeoXModel, probability: float) -> None:
    """While the model is in training mode, drop a share of what each layer's two branches add to the residual stream.

    Hooks leave the model as it is: 20B was trained without dropout (`configs/20B.yml`), on text read once.
    (Srivastava et al. 2014.)
    """

    def drop(module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, probability, training=module.training)

    for block in model.layers:
        assert isinstance(block, Block)
        block.attention.dense.register_forward_hook(drop)
        block.mlp.dense_4h_to_h.register_forward_hook(drop)


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
        loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()) * (len(part) / len(batch))
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


def spread_sample(stream: Tensor, windows: int, length: int) -> Tensor:
    """Up to `windows` windows of `length` tokens, spread evenly over a stream `[N]`, joined; a short stream whole."""
    count = min(windows, len(stream) // length)
    starts = [(len(stream) - length) * index // max(1, count - 1) for index in range(count)]
    return torch.cat([stream[start : start + length] for start in starts]) if count else stream


def train(
    config: NeoXConfig,
    plan: TrainingPlan,
    stories: Tensor,
    mix: Tensor,
    validation: Tensor,
    folder: Path,
    start: NeoXModel | None = None,
) -> tuple[NeoXModel, list[dict]]:
    """Train a model on token streams `[N]`; returns it (fp32) and the history of losses.

    `folder/state.pt` is written every five minutes, and a second call resumes from it; `folder/history.json` holds
    step, tokens, loss, validation loss (nats per token, in windows of the whole context) and seconds of training.
    A run begins with the weights of `start`, else with random ones. Raises ValueError for texts that are shorter than
    the longest window, and if the state in the folder belongs to another config, plan, text or start.
    """
    check_lengths(config, plan, stories, validation)
    model = NeoXModel(config)
    initialize(model, plan.seed)
    if start is not None:
        model.load_state_dict(start.state_dict())
    if plan.dropout:
        add_dropout(model, plan.dropout)
    optimizer = make_optimizer(model, plan)
    parts = {"model": model, "optimizer": optimizer}
    identity = {
        "identity": json.dumps([config.stored_fields(), dataclasses.asdict(plan)]),
        "origin": digest(stories, mix, *(start.state_dict().values() if start else ())),
    }
    history, step, seconds = restore(folder / "state.pt", identity, parts)
    saved_at = last = time.monotonic()
    losses = []
    with tqdm(total=plan.steps, initial=step, unit="step", mininterval=10) as bar:
        while step < plan.steps:
            batch = sample_batch(stories, mix, plan, step)
            torch.manual_seed(plan.seed * 1_000_003 + step)
            model.train()
            rate, dtype = plan.learning_rate_at(step), getattr(torch, plan.dtype)
            losses.append(training_step(model, optimizer, batch, rate, dtype))
            step += 1
            seconds, last = seconds + time.monotonic() - last, time.monotonic()
            bar.update()
            if step % 100 == 0 or step == plan.steps:
                model.eval()
                validation_loss = (
                    negative_log_likelihood(model, validation, config.max_position_embeddings).mean().item()
                )
                loss = sum(losses) / len(losses)
                losses.clear()
                history.append(
                    {"step": step, "tokens": step * plan.batch_tokens, "loss": round(loss, 4)}
                    | {"validation_loss": round(validation_loss, 4), "seconds": round(seconds)}
                )
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{validation_loss:.3f}")
            if time.monotonic() - saved_at > 300 or step == plan.steps:
                save(folder, identity, parts, history, step, seconds)
                saved_at = time.monotonic()
    return model.eval(), history


def check_lengths(config: NeoXConfig, plan: TrainingPlan, stories: Tensor, validation: Tensor) -> None:
    """Raise ValueError, before hours of training, for windows past the context and for texts that are too short."""
    length, context = plan.longest_window, config.max_position_embeddings
    if length > context:
        raise ValueError(f"a window of {length} tokens exceeds the context of {context}; give shorter windows")
    if len(stories) <= length:
        raise ValueError(f"{len(stories)} tokens of stories do not fill a window of {length} + 1; add more text")
    if len(validation) < 2:
        raise ValueError("the held-out text is empty; give some stories")


def digest(*tensors: Tensor) -> str:
    """A number, in hexadecimal digits, that changes with any bit of the tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def save(folder: Path, identity: dict[str, str], parts: dict, history: list[dict], step: int, seconds: float) -> None:
    """Write everything that a later call needs to resume, atomically; `parts` have a `state_dict` each."""
    state = {name: part.state_dict() for name, part in parts.items()} | identity
    state |= {"history": history, "step": step, "seconds": seconds}
    write_atomically(folder / "state.pt", lambda temporary: torch.save(state, temporary))
    write_text_atomically(folder / "history.json", json.dumps(history, indent=1))


def restore(path: Path, identity: dict[str, str], parts: dict) -> tuple[list[dict], int, float]:
    """Load a saved state into its parts, if there is one; returns history, steps done and seconds spent. Raises
    ValueError, saying what differs, for the state of another run.
    """
    if not path.exists():
        return [], 0, 0.0
    state = torch.load(path, weights_only=True)
    before, now = (ChainMap(*json.loads(each["identity"])) for each in (state, identity))
    advice = "use another folder to start a new run"
    if unknown := now.keys() - before.keys():
        raise ValueError(f"{path} is of an earlier version, without {', '.join(sorted(unknown))}; {advice}")
    if before != now:
        names = sorted(name for name in before if before[name] != now.get(name))
        raise ValueError(f"{path} belongs to another config or plan, with another {', '.join(names)}; {advice}")
    if state.get("origin", identity["origin"]) != identity["origin"]:  # the first states had none
        raise ValueError(f"{path} belongs to a run on other texts or from other weights; {advice}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["history"], state["step"], state["seconds"]


def read_streams(tokenizer, paths: Iterable[Path]) -> Tensor:
    """The token stream of some corpus files, `[N]`; empty if there are none."""
    return story_stream(tokenizer, [story for path in paths for story in stories_of(Path(path).read_text("utf-8"))])

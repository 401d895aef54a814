"""The loop that trained the shipped model: windows of stories, AdamW or Muon, a cosine schedule or an average of the
weights, and a saved state to resume.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections import ChainMap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from neox_lib.block import Block
from neox_lib.checkpoints.atomic import write_atomically, write_text_atomically
from neox_lib.config import NeoXConfig
from neox_lib.evaluation.likelihood import negative_log_likelihood, stories_of, story_stream
from neox_lib.model import NeoXModel
from neox_lib.training.names import with_other_names


@dataclass(frozen=True)
class TrainingPlan:
    """What to train on and how fast to learn.

    `windows` holds (share of the steps done, window lengths): from that share on, the steps take these lengths in turn.
    Short windows are cheap; without some long ones the model would fail at the end of its context. A corpus that is
    read many times is memorized; `dropout` and a larger `weight_decay` counter that.

    `optimizer` "muon" trains the layers' matrices with Muon (Jordan et al. 2024), the rest with AdamW. `dtype` is what
    matrix products compute in; the weights stay in fp32. From the share `average_from` of the steps on, the learning
    rate no longer falls, and the run's result is the mean of the weights after all those steps: as good as a rate that
    falls to zero where the steps are few, and better where two such results are averaged once more (Izmailov et al.
    2018, https://arxiv.org/abs/1803.05407; Wortsman et al. 2022, https://arxiv.org/abs/2203.05482).

    Raises ValueError, naming the setting, for one out of range.
    """

    total_tokens: int = 20_000_000
    batch_tokens: int = 8192
    mix_share: float = 0.25
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.0
    warmup_steps: int = 200
    optimizer: str = "adamw"
    dtype: str = "float32"
    average_from: float = 1.0
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
        if self.total_tokens != 0 and self.total_tokens < self.batch_tokens:
            raise ValueError(
                f"total_tokens is {self.total_tokens}; expected 0, or the {self.batch_tokens} of one step at least"
            )
        for name in ("mix_share", "dropout", "average_from"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {share}; expected a share from 0 to 1")
        for name, known in (("optimizer", ("adamw", "muon")), ("dtype", ("float32", "bfloat16"))):
            if (chosen := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {chosen!r}; expected {' or '.join(known)}")
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
        """A linear warm-up, then half a cosine down to zero, or to where averaging begins."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        falling = max(0, min(step, round(self.average_from * self.steps)) - self.warmup_steps)
        progress = falling / max(1, self.steps - self.warmup_steps)
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


def make_optimizers(model: NeoXModel, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """AdamW, without weight decay on biases and norms; if the plan says so, beside Muon for the layers' matrices.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982).
    """
    rate, decay = plan.learning_rate, plan.weight_decay
    inner, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        by_muon = plan.optimizer == "muon" and name.startswith("layers.")
        (vectors if parameter.dim() != 2 else inner if by_muon else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)]
    if inner:
        optimizers += [torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]
    return optimizers


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
    optimizers: list[torch.optim.Optimizer],
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
    for optimizer in optimizers:
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
    average, optimizers = AveragedModel(model), make_optimizers(model, plan)
    parts = {"model": model, "average": average} | {f"optimizer{i}": each for i, each in enumerate(optimizers)}
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
            losses.append(training_step(model, optimizers, batch, rate, dtype))
            step += 1
            if step > plan.average_from * plan.steps:
                average.update_parameters(model)
            seconds, last = seconds + time.monotonic() - last, time.monotonic()
            bar.update()
            if step % 100 == 0 or step == plan.steps:
                judged = best_weights(model, average).eval()
                validation_loss = (
                    negative_log_likelihood(judged, validation, config.max_position_embeddings).mean().item()
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
    return best_weights(model, average).eval(), history


def check_lengths(config: NeoXConfig, plan: TrainingPlan, stories: Tensor, validation: Tensor) -> None:
    """Raise ValueError, before hours of training, for windows past the context and for texts that are too short."""
    length, context = plan.longest_window, config.max_position_embeddings
    if plan.steps and length > context:
        raise ValueError(f"a window of {length} tokens exceeds the context of {context}; give shorter windows")
    if plan.steps and len(stories) <= length:
        raise ValueError(f"{len(stories)} tokens of stories do not fill a window of {length} + 1; add more text")
    if len(validation) < 2:
        raise ValueError("the held-out text is empty; give some stories")


def digest(*tensors: Tensor) -> str:
    """A number, in hexadecimal digits, that changes with any bit of the tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def mean_of(models: Sequence[NeoXModel]) -> NeoXModel:
    """The first of some models, its weights now the mean of all. Raises ValueError if they differ in shape."""
    first = models[0]
    for number, model in enumerate(models):
        if model.config.stored_fields() != first.config.stored_fields():
            raise ValueError(f"model {number + 1} has another shape than the first; the mean needs models of one shape")
    states = [model.state_dict() for model in models]
    first.load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]})
    return first


def best_weights(model: NeoXModel, average: AveragedModel) -> NeoXModel:
    """The averaged model once averaging has begun, until then the model itself."""
    return cast(NeoXModel, average.module) if average.n_averaged > 0 else model


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


def read_streams(tokenizer, paths: Iterable[Path], retellings: int = 0) -> Tensor:
    """The token stream of some corpus files, `[N]`, and behind it `retellings` of their stories with other names."""
    stories = [story for path in paths for story in stories_of(Path(path).read_text("utf-8"))]
    retold = [story for seed in range(retellings) for story in with_other_names(stories, seed)]
    return story_stream(tokenizer, stories + retold)

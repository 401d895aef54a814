"""A run of the training loop: its folder, a saved state to resume, losses and samples on the way."""

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from neox_lib.block import Block
from neox_lib.checkpoints.atomic import write_atomically, write_text_atomically
from neox_lib.config import NeoXConfig
from neox_lib.evaluation.corpus import stories_of
from neox_lib.evaluation.likelihood import negative_log_likelihood
from neox_lib.model import NeoXModel
from neox_lib.training.loop import initialize, make_optimizer, training_steps
from neox_lib.training.plan import TrainingPlan

REPORT_EVERY = 100  # steps


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
    write: Callable[[NeoXModel], str] | None = None,
) -> tuple[NeoXModel, list[dict]]:
    """Train a model on token streams `[N]`; returns it (fp32) and the history of losses.

    `folder/state.pt` is written every minute, and a second call resumes from it. `folder/history.json` holds a
    row for the start and for every hundred steps: step, tokens, loss (mean since the row before; none at the start),
    validation loss (nats per token, in the plan's longest windows), seconds of training, and a sample, if `write`
    makes one of the model. A run begins with the weights of `start`, else with random ones. Raises ValueError for
    texts that are shorter than the longest window, and if the state in the folder belongs to another config, plan,
    text or start.
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
    history, first, seconds = restore(folder / "state.pt", identity, parts)

    def report(step: int, losses: Sequence[float]) -> None:
        row = {"step": step, "tokens": step * plan.batch_tokens}
        row |= judge(model, validation, plan.longest_window, losses, write)
        history.append(row | {"seconds": round(seconds)})
        write_text_atomically(folder / "history.json", json.dumps(history, indent=1))
        if write:
            tqdm.write(f"step {step}: {row['sample']}\n")

    if not history:
        report(0, [])
    saved_at = last = time.monotonic()
    losses: list[float] = []
    live = 0.5 if sys.stderr.isatty() else 10  # seconds between two looks
    with tqdm(total=plan.steps, initial=first, unit="step", mininterval=live) as bar:
        for step, loss in training_steps(model, optimizer, plan, stories, mix, first):
            losses.append(loss)
            seconds, last = seconds + time.monotonic() - last, time.monotonic()
            bar.set_postfix_str(f"loss {curve(losses)} {loss:.2f}", refresh=False)
            bar.update()
            if step % REPORT_EVERY == 0 or step == plan.steps:
                report(step, losses[-((step - 1) % REPORT_EVERY + 1) :])
            if time.monotonic() - saved_at > 60 or step == plan.steps:
                save(folder / "state.pt", identity, parts, history, step, seconds)
                saved_at = time.monotonic()
    return model.eval(), history


def judge(
    model: NeoXModel,
    validation: Tensor,
    length: int,
    losses: Sequence[float],
    write: Callable[[NeoXModel], str] | None,
) -> dict:
    """What a row of the history says about a model: the mean of its last losses, validation loss, and a sample."""
    model.eval()
    held_out = negative_log_likelihood(model, validation, length).mean().item()
    row: dict = {"loss": round(sum(losses) / len(losses), 4)} if losses else {}
    return row | {"validation_loss": round(held_out, 4)} | ({"sample": write(model)} if write else {})


def curve(losses: Sequence[float], width: int = 24) -> str:
    """Losses as a line of text: up to `width` bars, each the mean of an equal share, scaled to the highest and lowest.

    >>> curve([4.0, 3.0, 2.0, 2.0, 1.0])
    '█▆▃▃▁'
    """
    bars, count = "▁▂▃▄▅▆▇█", min(width, len(losses))
    edges = [len(losses) * index // count for index in range(count + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(bars[round(7 * (mean - low) / span)] for mean in means)


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


def save(path: Path, identity: dict[str, str], parts: dict, history: list[dict], step: int, seconds: float) -> None:
    """Write everything that a later call needs to resume, atomically; `parts` have a `state_dict` each."""
    state = {name: part.state_dict() for name, part in parts.items()} | identity
    state |= {"history": history, "step": step, "seconds": seconds}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


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


def read_stories(paths: Iterable[Path]) -> list[str]:
    """The stories of some corpus files."""
    return [story for path in paths for story in stories_of(Path(path).read_text("utf-8"))]


def hold_out(stories: list[str]) -> tuple[list[str], list[str]]:
    """(stories to train on, the last twentieth to judge by). Raises ValueError for fewer than two stories."""
    if len(stories) < 2:
        raise ValueError("there is only one story, so none can be held out; add more, or give --validation")
    count = max(1, len(stories) // 20)
    return stories[:-count], stories[-count:]

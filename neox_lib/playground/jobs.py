"""The jobs that need the model: writing and looking. Each runs in the worker and ends soon after `stopping` is set."""

import threading
import time
from collections.abc import Callable

import torch

from neox_lib.generation import Step, stream_generate
from neox_lib.inspection.attention import attention_of_last
from neox_lib.inspection.lens import lens_of_last
from neox_lib.inspection.tokens import candidate, likeliest
from neox_lib.model import Stopped
from neox_lib.playground.settings import Settings
from neox_lib.playground.state import State
from neox_lib.playground.streaming import Throttle, follow
from neox_lib.sampling import check_scores

Say = Callable[[str, str], None]  # called with (phase, status) when something has changed


def progress(stopping: threading.Event, say: Say, what: str) -> Callable[[int, int], bool]:
    """A callback between layers: it reports progress, and returns False once Stop was pressed."""
    throttle = Throttle()
    throttle.ready()  # a short pass needs no progress report

    def report(done: int, total: int) -> bool:
        if done < total and throttle.ready():
            say("reading", f"{what}: {done} of {total} layers.")
        return not stopping.is_set()

    return report


def write(state: State, prompt: list[int] | None, stopping: threading.Event, say: Say) -> None:
    """Continue the current branch, or start a new one from `prompt`, with the current settings.

    Settings changed while it streams apply to the next run. What was written is kept, however the run ends.
    """
    settings, state.error = state.settings, ""
    if prompt is None and state.ended:
        state.chosen = len(state.branches.branch.ids)
        state.forget_looks()
        status = (
            "The text has ended. Generate starts over from the prompt; a token taken after the end begins another text."
        )
        look(state, stopping, say, status) if settings.use_cache else say("idle", status)
        return
    begins = state.branches.branch.ids if prompt is None else prompt
    room = state.context - len(begins)
    if room < 1:
        say(
            "idle",
            f"No room to write: the text has {len(begins):,} tokens and this model's context holds {state.context:,}. "
            "Nothing is lost; shorten the prompt or go back.",
        )
        return
    branch = state.branches.start(prompt) if prompt is not None else state.branches.branch
    wanted, start = min(settings.tokens, room), len(branch.ids)
    state.chosen = start
    state.forget_looks()
    say("reading", "Reading the prompt.")
    cache = state.recall.room_for(branch.ids, start + wanted) if settings.use_cache else None
    steps = stream_generate(
        state.model,
        torch.tensor([branch.ids]),
        wanted,
        tokenizer=state.tokenizer,
        sampling=settings.sampling(start - branch.given),
        use_cache=settings.use_cache,
        cache=cache,
        on_progress=progress(stopping, say, "Reading the prompt"),
    )
    moments = [time.perf_counter()]
    waiting: list[Step] = []  # tokens of what may become a stop string

    def take(step: Step) -> None:
        if len(moments) > 1:  # the first one reads the prompt as well
            state.costs.add(settings.use_cache, len(branch.ids) + len(waiting), step.seconds)
        moments.append(time.perf_counter())
        waiting.append(step)
        while len(waiting) > sum(step.held):
            settled = waiting.pop(0)
            branch.add(settled.token_id, settled.log_probability)
            if state.chosen == len(branch.ids) - 1:  # else somebody has chosen a token of the text
                state.chosen = len(branch.ids)
        if settings.use_cache and not waiting:  # else the cache holds more than the text
            glance(state, stopping)

    try:
        follow(steps, stopping, take, lambda: say("writing", f"Writing: {len(moments) - 1} of {wanted} tokens."))
    finally:
        state.recall.keep(branch.ids)
    added, stop_string = len(branch.ids) - start, bool(waiting) and waiting[-1].ended[0]
    finish(state, settings, moments, added, stop_string, wanted, stopping, say)


def finish(
    state: State,
    settings: Settings,
    moments: list[float],
    added: int,
    stop_string: bool,
    wanted: int,
    stopping: threading.Event,
    say: Say,
) -> None:
    """Report how a run ended, and score what could come next where that costs only one token's pass.

    `moments` are the start and then the time of each token: the speed is the one a person saw, drawing included. Those
    of a `stop_string` at the end are not `added` to the text.
    """
    written = len(moments) - 1
    if written:
        state.prefill_seconds = moments[1] - moments[0]
    if written > 1:
        state.tokens_per_second = (written - 1) / (moments[-1] - moments[1])
    if not written:
        say("idle", "Stopped while reading the prompt; no token was written.")
        return
    amount = f"{added} token{'' if added == 1 else 's'}"
    if stop_string:
        status = f"Stopped after {amount}: a stop string comes next."
    elif state.ended:
        status = f"The model ended the text after {amount}."
    elif written < wanted:
        status = f"Stopped after {amount}."
    elif wanted < settings.tokens:
        status = f"Wrote {amount}; the context of {state.context:,} is full."
    else:
        status = f"Wrote {amount}."
    if settings.use_cache and not stopping.is_set():
        look(state, stopping, say, status)
    say("idle", status)


def glance(state: State, stopping: threading.Event) -> None:
    """Between two tokens, score the candidates at the chosen position, unless that is done; costs one token's pass.

    Needs a cache that holds the text, and leaves it unchanged, so the run is not affected.
    """
    branch, position = state.branches.branch, state.chosen
    if state.scored == position or not 0 < position < len(branch.ids):
        return
    state.recall.keep(branch.ids)
    try:
        logits = state.recall.logits_after(branch.ids[:position], lambda *_: not stopping.is_set())
    except Stopped:
        return
    keep_scores(state, position, logits)


def keep_scores(state: State, position: int, logits: torch.Tensor) -> None:
    """Store the likeliest tokens at a position, and the one that stands there."""
    ids = state.branches.branch.ids
    state.candidates = likeliest(logits, state.tokenizer)
    state.taken = candidate(logits, state.tokenizer, ids[position]) if position < len(ids) else None
    state.scored = position  # set last: if another position is chosen meanwhile, these are not shown


def look(state: State, stopping: threading.Event, say: Say, status: str = "") -> None:
    """Score the candidates at the chosen position, unless that is done, and compute its attention or the lens, if that
    is shown.
    """
    branch, position = state.branches.branch, state.chosen
    state.attention = state.lens = None
    say("looking", status or "Looking.")
    report = progress(stopping, say, "Looking")
    try:
        if position > 0 and state.scored != position:
            keep_scores(state, position, state.recall.logits_after(branch.ids[:position], report))
        if state.watching == "lens" and position > 0:
            logits = lens_of_last(state.model, branch.ids[:position], report)
            check_scores(logits, "layer")
            state.lens = logits.log_softmax(dim=-1)
        if state.watching == "attention":
            attention = attention_of_last(state.model, branch.ids[: position + 1], report)
            check_scores(attention.flatten(1), "layer")
            state.attention = attention
    except Stopped:
        status = "Stopped looking."
    say("idle", status or "Ready.")

"""The jobs that need the model: to write on, and to look. Each runs in the worker and ends soon after `stopping`."""

import threading
import time
from collections.abc import Callable

import torch

from neox_lib.generation import ENDOFTEXT_ID, Step, stream_generate
from neox_lib.inspection.attention import attention_of_last
from neox_lib.inspection.tokens import candidate, likeliest
from neox_lib.model import Stopped
from neox_lib.playground.settings import Settings
from neox_lib.playground.state import State
from neox_lib.playground.streaming import Throttle, follow
from neox_lib.sampling import check_scores

Say = Callable[[str, str], None]  # (phase, status): something has changed


def progress(stopping: threading.Event, say: Say, what: str) -> Callable[[int, int], bool]:
    """What is called between layers: it tells how far a pass is, and carries Stop."""
    throttle = Throttle()
    throttle.ready()  # a pass that is over in a moment is not worth a word

    def report(done: int, total: int) -> bool:
        if done < total and throttle.ready():
            say("reading", f"{what}: {done} of {total} layers.")
        return not stopping.is_set()

    return report


def write(state: State, prompt: list[int] | None, stopping: threading.Event, say: Say) -> None:
    """Write on the road in hand, or on a new one from `prompt`, as the settings say now.

    A change of settings while it streams is for the next run. What was written stays, whatever ends it.
    """
    settings, state.error = state.settings, ""
    begins = state.roads.road.ids if prompt is None else prompt
    room = state.context - len(begins)
    if room < 1:
        return say(
            "idle",
            f"No room to write: the text has {len(begins):,} tokens and this model's context holds {state.context:,}. "
            "Nothing is lost; shorten the prompt or go back.",
        )
    road = state.roads.start(prompt) if prompt is not None else state.roads.road
    wanted, start = min(settings.tokens, room), len(road.ids)
    state.chosen = start
    state.forget_looks()
    say("reading", "Reading the prompt.")
    cache = state.recall.room_for(road.ids, start + wanted) if settings.use_cache else None
    steps = stream_generate(
        state.model,
        torch.tensor([road.ids]),
        wanted,
        sampling=settings.sampling(start - road.given),
        use_cache=settings.use_cache,
        cache=cache,
        on_progress=progress(stopping, say, "Reading the prompt"),
    )
    moments = [time.perf_counter()]

    def take(step: Step) -> None:
        at_end = state.chosen == len(road.ids)
        if len(moments) > 1:  # the first one reads the prompt as well
            state.costs.add(settings.use_cache, len(road.ids), step.seconds)
        moments.append(time.perf_counter())
        road.add(step.token_id, step.log_probability)
        state.chosen = len(road.ids) if at_end else state.chosen
        if settings.use_cache:
            glance(state, stopping)

    try:
        follow(steps, stopping, take, lambda: say("writing", f"Writing: {len(moments) - 1} of {wanted} tokens."))
    finally:
        state.recall.keep(road.ids)
    finish(state, settings, moments, wanted, stopping, say)


def finish(
    state: State, settings: Settings, moments: list[float], wanted: int, stopping: threading.Event, say: Say
) -> None:
    """Say how a run ended, and look at what could come next where that costs one token's pass.

    `moments` are the start and then the time of each token: speed is what a person saw, the page's share included.
    """
    written = len(moments) - 1
    if written:
        state.prefill_seconds = moments[1] - moments[0]
    if written > 1:
        state.tokens_per_second = (written - 1) / (moments[-1] - moments[1])
    if not written:
        return say("idle", "Stopped while the prompt was read; no token was written.")
    words = f"{written} token{'s' if written > 1 else ''}"
    if state.roads.road.ids[-1] == ENDOFTEXT_ID:
        status = f"The model ended the text after {words}."
    elif written < wanted:
        status = f"Stopped after {words}."
    elif wanted < settings.tokens:
        status = f"Wrote {words}; the context of {state.context:,} is full."
    else:
        status = f"Wrote {words}."
    if settings.use_cache and not stopping.is_set():
        look(state, stopping, say, status)
    say("idle", status)


def glance(state: State, stopping: threading.Event) -> None:
    """Between two tokens: score what could stand at the chosen position, if nobody has; one token's pass.

    Needs a cache that holds the text, and leaves it as it was: the run goes on as if nobody had looked.
    """
    road, position = state.roads.road, state.chosen
    if state.scored == position or not 0 < position < len(road.ids):
        return
    state.recall.keep(road.ids)
    try:
        logits = state.recall.logits_after(road.ids[:position], lambda *_: not stopping.is_set())
    except Stopped:
        return
    keep_scores(state, position, logits)


def keep_scores(state: State, position: int, logits: torch.Tensor) -> None:
    """Keep the likeliest tokens at a position, and what stands there."""
    ids = state.roads.road.ids
    state.candidates = likeliest(logits, state.tokenizer)
    state.taken = candidate(logits, state.tokenizer, ids[position]) if position < len(ids) else None
    state.scored = position  # last: another position may be chosen at any moment, and then these are not shown


def look(state: State, stopping: threading.Event, say: Say, status: str = "") -> None:
    """Score what could stand at the chosen position, if nobody has, and, when watched, what its token looks at."""
    road, position = state.roads.road, state.chosen
    state.attention = None
    say("looking", status or "Looking.")
    report = progress(stopping, say, "Looking")
    try:
        if position > 0 and state.scored != position:
            keep_scores(state, position, state.recall.logits_after(road.ids[:position], report))
        if state.watching:
            attention = attention_of_last(state.model, road.ids[: position + 1], report)
            check_scores(attention.flatten(1), "layer")
            state.attention = attention
    except Stopped:
        return say("idle", "Stopped looking.")
    say("idle", status or "Ready.")

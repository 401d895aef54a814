"""A playground as plain values (prompt, settings, every branch with its probabilities), and as a JSON file of them."""

import json
from pathlib import Path

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.playground.branches import Branch, Branches
from neox_lib.playground.settings import Settings
from neox_lib.playground.state import State
from neox_lib.playground.token_text import spell, text_of

FORMAT = "neox playground 1"


def content(state: State) -> dict:
    """Everything that `read` restores; the texts are there for human readers."""
    branches = []
    for branch in list(state.branches.branches):
        tokens = spell(state.tokenizer, list(branch.ids))  # a copy: the worker may be writing
        rows = [
            {"id": token.token_id, "text": token.text, "log_probability": score}
            for token, score in zip(tokens, branch.scores, strict=False)
        ]
        place = {"given": branch.given, "parent": branch.parent, "fork": branch.fork}
        branches.append({"text": text_of(tokens)} | place | {"tokens": rows})
    head = {"format": FORMAT, "model": state.name, "prompt": state.prompt, "settings": vars(state.settings) | {}}
    return head | {"current": state.branches.current, "branches": branches}


def to_json(state: State) -> str:
    return json.dumps(content(state), ensure_ascii=False, indent=1) + "\n"


def save(state: State, path: str | Path) -> None:
    """Write the file, whole or not at all."""
    write_text_atomically(Path(path), to_json(state))


def branch_from(entry: dict, number: int, state: State) -> Branch:
    """One branch of a file. Raises ValueError for one that this model can't have."""
    ids = [token["id"] for token in entry["tokens"]]
    scores = [token["log_probability"] for token in entry["tokens"]]
    given, parent, fork = entry["given"], entry["parent"], entry["fork"]
    limit = state.model.config.tokenizer_vocab_size
    for token_id, score in zip(ids, scores, strict=True):
        if type(token_id) is not int or not 0 <= token_id < limit:
            raise ValueError(f"token id {token_id!r} is outside this model's vocabulary of {limit}")
        if score is not None and (type(score) not in (int, float) or not score <= 1e-3):
            raise ValueError(f"log-probability {score!r} must be a number of at most 0")
    if not 1 <= len(ids) <= state.context:
        raise ValueError(f"a branch of {len(ids)} tokens; this model's context holds 1 to {state.context}")
    if type(given) is not int or not 0 <= given <= len(ids):
        raise ValueError(f"given is {given!r}, expected 0 to {len(ids)}")
    if type(fork) is not int or not 0 <= fork < len(ids):
        raise ValueError(f"fork is {fork!r}, expected 0 to {len(ids) - 1}")
    if parent is not None and (type(parent) is not int or not 0 <= parent < number):
        raise ValueError(f"parent is {parent!r}, expected an earlier branch")
    text = text_of(spell(state.tokenizer, ids))
    if text != entry["text"]:
        raise ValueError(
            f"its ids decode to {text[:40]!r} here, not {str(entry['text'])[:40]!r}: another tokenizer wrote it"
        )
    return Branch(ids, scores, given, parent, fork)


def read(state: State, saved: object) -> tuple[str, Settings, Branches]:
    """What `content` gave. Raises ValueError naming the place, for what this model can't have written."""
    place = ""
    try:
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f'not a playground file: "format" should be "{FORMAT}"')
        place = "prompt and settings: "
        settings = Settings().changed(saved["settings"])
        prompt, current = saved["prompt"], saved["current"]
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is {prompt!r}, expected text")
        branches = []
        entries = saved["roads"] if "roads" in saved else saved["branches"]  # "roads" in older files
        for number, entry in enumerate(entries):
            place = f"branch {number}: "
            branches.append(branch_from(entry, number, state))
        place = ""
        if type(current) is not int or not 0 <= current < max(1, len(branches)):
            raise ValueError(f"current is {current!r}, but there are {len(branches)} branches")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{place}{what}") from error
    return prompt, settings, Branches(branches, current)


def restore(state: State, prompt: str, settings: Settings, branches: Branches) -> None:
    state.prompt, state.settings, state.branches = prompt, settings, branches
    state.chosen = len(branches.branch.ids) if len(branches) else 0
    state.forget_looks()


def read_into(state: State, path: str | Path) -> None:
    """Restore what `save` wrote. Raises ValueError naming the file and the place, and leaves the state unchanged."""
    try:
        found = read(state, json.loads(Path(path).read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    restore(state, *found)

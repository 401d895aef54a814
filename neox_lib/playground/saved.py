"""A playground as a JSON file: prompt, settings, every road with its text and probabilities; and back, checked."""

import json
from pathlib import Path

from neox_lib.checkpoints.atomic import write_text_atomically
from neox_lib.playground.pieces import spell, text_of
from neox_lib.playground.roads import Road
from neox_lib.playground.settings import Settings
from neox_lib.playground.state import State

FORMAT = "neox playground 1"


def to_json(state: State) -> str:
    """All that `read_into` restores; text and pieces are there for people who read the file."""
    roads = []
    for road in state.roads.roads:
        pieces = spell(state.tokenizer, road.ids)
        rows = [
            {"id": piece.token_id, "text": piece.text, "log_probability": score}
            for piece, score in zip(pieces, road.scores, strict=True)
        ]
        place = {"given": road.given, "parent": road.parent, "fork": road.fork}
        roads.append({"text": text_of(pieces)} | place | {"tokens": rows})
    content = {"format": FORMAT, "model": state.name, "prompt": state.prompt, "settings": vars(state.settings)}
    return json.dumps(content | {"current": state.roads.current, "roads": roads}, ensure_ascii=False, indent=1) + "\n"


def save(state: State, path: str | Path) -> None:
    """Write the file, whole or not at all."""
    write_text_atomically(Path(path), to_json(state))


def road_from(entry: dict, number: int, state: State) -> Road:
    """One road of a file. Raises ValueError for what can't be a road of this model."""
    ids = [token["id"] for token in entry["tokens"]]
    scores = [token["log_probability"] for token in entry["tokens"]]
    given, parent, fork = entry["given"], entry["parent"], entry["fork"]
    limit = state.model.config.tokenizer_vocab_size
    for token_id, score in zip(ids, scores, strict=True):
        if type(token_id) is not int or not 0 <= token_id < limit:
            raise ValueError(f"token id {token_id!r} is outside this model's vocabulary of {limit}")
        if score is not None and (type(score) not in (int, float) or not score <= 1e-3):
            raise ValueError(f"log-probability {score!r} is no number of at most 0")
    if not 1 <= len(ids) <= state.context:
        raise ValueError(f"a road of {len(ids)} tokens; this model's context holds 1 to {state.context}")
    if type(given) is not int or not 0 <= given <= len(ids):
        raise ValueError(f"given is {given!r}, expected 0 to {len(ids)}")
    if type(fork) is not int or not 0 <= fork < len(ids):
        raise ValueError(f"fork is {fork!r}, expected 0 to {len(ids) - 1}")
    if parent is not None and (type(parent) is not int or not 0 <= parent < number):
        raise ValueError(f"parent is {parent!r}, expected an earlier road")
    text = text_of(spell(state.tokenizer, ids))
    if text != entry["text"]:
        raise ValueError(
            f"its ids spell {text[:40]!r} here, not {str(entry['text'])[:40]!r}: another tokenizer wrote it"
        )
    return Road(ids, scores, given, parent, fork)


def read_into(state: State, path: str | Path) -> None:
    """Restore what `save` wrote. Raises ValueError naming file and place; the state is then as it was."""
    place = ""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'it is no playground file: "format" should be "{FORMAT}"')
        place = "prompt and settings: "
        settings = Settings().changed(content["settings"])
        prompt, current = content["prompt"], content["current"]
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is {prompt!r}, expected text")
        roads = []
        for number, entry in enumerate(content["roads"]):
            place = f"road {number}: "
            roads.append(road_from(entry, number, state))
        place = ""
        if type(current) is not int or not 0 <= current < max(1, len(roads)):
            raise ValueError(f"current is {current!r}, but there are {len(roads)} roads")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {place}{what}") from error
    state.prompt, state.settings = prompt, settings
    state.roads.roads, state.roads.current = roads, current
    state.chosen = len(roads[current].ids) if roads else 0
    state.forget_looks()

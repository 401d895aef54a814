"""A State as plain values for a page: what JSON can hold, small enough to be sent twenty times a second."""

import math
import time

from neox_lib.config import NeoXConfig, format_bytes
from neox_lib.inspection.tokens import Candidate
from neox_lib.playground.costs import model_in_words, needs_of_20b
from neox_lib.playground.pieces import Piece, Speller, spell, text_of
from neox_lib.playground.roads import Road
from neox_lib.playground.state import State
from neox_lib.tokenizer import encode_text

SETTLED = 64  # tokens: only the last, incomplete block of so many is sent again while text streams
SHOWN_OF_PROMPT = 600  # tokens of a prompt that are drawn as spans; all are counted
READY_PROMPTS = {
    "a fox": "Once upon a time, a fox",
    "two friends": "Tom and his sister went to the beach.",
    "a lost key": "The old man had a secret box. He could not find the key.",
    "a question": '"Why are you sad?" asked the bear.',
}


class Text:
    """The road in hand as pieces, spelled on from where they were: a whole text is not spelled anew for each token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.road: Road | None = None
        self.pieces: list[Piece] = []
        self.rows: list[list] = []
        self.speller = Speller(tokenizer)

    def update(self, road: Road | None) -> None:
        if road is not self.road or road is None:
            self.road, self.pieces, self.rows, self.speller = road, [], [], Speller(self.tokenizer)
        if road is not None:
            for index in range(len(self.pieces), len(road.ids)):
                piece, score = self.speller.push(road.ids[index]), road.scores[index]
                self.pieces.append(piece)
                self.rows.append([*row_of(piece), None if score is None else round(score, 4)])

    def view(self, road: Road | None) -> dict:
        """`settled` + `tail` are the text, [id, text, control, log-probability] each; the first `given` its prompt."""
        self.update(road)
        edge = len(self.rows) // SETTLED * SETTLED
        return {"settled": self.rows[:edge], "tail": self.rows[edge:], "given": road.given if road else 0}


def row_of(piece: Piece) -> list:
    return [piece.token_id, piece.text, int(piece.control)]


def facts_view(state: State) -> dict:
    config: NeoXConfig = state.model.config
    return {
        "model": model_in_words(state.name, config, state.model.word_embeddings.weight.dtype),
        "context": state.context,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "vocabulary": config.tokenizer_vocab_size,
        "prompts": list(READY_PROMPTS.items()),
    }


def prompt_view(state: State) -> dict:
    """The prompt's tokens, their number, how long that took, and what is to be said about it."""
    started = time.perf_counter()
    ids = encode_text(state.tokenizer, state.prompt)  # type: ignore[arg-type]
    milliseconds = round(1e3 * (time.perf_counter() - started), 1)
    over = len(ids) - state.context
    note = ""
    if not ids:
        note = "Empty: the model begins a text of its own, after <|endoftext|>."
    elif over >= 0:
        note = f"{len(ids):,} tokens are {over + 1:,} too many: the context holds {state.context:,}, one of them new."
    elif len(ids) + state.settings.tokens > state.context:
        note = f"Only {state.context - len(ids):,} tokens fit behind it."
    rows = [row_of(piece) for piece in spell(state.tokenizer, ids[:SHOWN_OF_PROMPT])]
    return {"pieces": rows, "count": len(ids), "over": over >= 0, "note": note, "ms": milliseconds}


def candidate_row(each: Candidate) -> list:
    return [each.token_id, each.text, round(each.score, 4), each.rank]


def bars_view(state: State, text: Text) -> dict:
    """The likeliest tokens at the chosen position as [id, text, log-probability, rank], and what stands there."""
    before = text_of(text.pieces[: state.chosen])
    candidates, taken = (state.candidates, state.taken) if state.scored == state.chosen else ([], None)
    shares = sum(math.exp(each.score) for each in candidates)
    return {
        "position": state.chosen,
        "before": before[-40:],
        "rows": [candidate_row(each) for each in candidates],
        "rest": round(max(0.0, 1 - shares), 4),
        "taken": candidate_row(taken) if taken else None,
    }


def attention_view(state: State) -> dict:
    """What one head looks at, from the chosen token: `weights` has a number for each token up to it."""
    layer, head = state.layer, state.head
    weights = [] if state.attention is None else [round(value, 4) for value in state.attention[layer, head].tolist()]
    return {"layer": layer, "head": head, "weights": weights}


def roads_view(state: State) -> list[dict]:
    """Each road around the place where it left another, or where the first other one left it."""
    roads, rows = state.roads.roads, []
    for number, road in enumerate(roads):
        forks = [each.fork for each in roads if each.parent == number]
        place = road.fork if road.parent is not None else min(forks, default=road.given)
        pieces = spell(state.tokenizer, road.ids)
        scores = [score for score in road.scores if score is not None]
        row = {"before": text_of(pieces[:place])[-30:], "at": text_of(pieces[place : place + 1])}
        row |= {"after": text_of(pieces[place + 1 :])[:400], "current": number == state.roads.current}
        row |= {"tokens": len(road.ids), "mean": round(math.exp(sum(scores) / len(scores)), 4) if scores else None}
        rows.append(row)
    return rows


def costs_view(state: State) -> dict:
    return {"with": state.costs.curve(True), "without": state.costs.curve(False)}


def speed_view(state: State) -> list[str]:
    """What is written under the text: this model's speed and memory, and what 20B would need."""
    tokens = len(state.roads.road.ids) if len(state.roads) else 0
    lines = []
    if state.prefill_seconds:
        lines.append(f"prompt and first token {1e3 * state.prefill_seconds:,.0f} ms")
    if state.tokens_per_second:
        lines.append(f"{state.tokens_per_second:,.1f} tokens/s")
    if tokens:
        cache = state.model.config.kv_cache_bytes(tokens, state.model.norm.weight.dtype)
        kept = format_bytes(cache) if state.settings.use_cache else f"off ({format_bytes(cache)} if it were on)"
        lines.append(f"KV cache {kept}")
    needed = tokens or max(1, len(encode_text(state.tokenizer, state.prompt)))  # type: ignore[arg-type]
    return [" · ".join(lines), needs_of_20b(needed)]

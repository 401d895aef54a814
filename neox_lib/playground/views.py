"""A State as plain values for a page: JSON values, small enough to be sent 20 times a second."""

import json
import math
import time

from neox_lib.config import NeoXConfig, format_bytes
from neox_lib.inspection.tokens import Candidate, token_label
from neox_lib.playground.branches import Branch
from neox_lib.playground.costs import describe_model, needs_of_20b
from neox_lib.playground.state import State
from neox_lib.playground.token_text import Speller, TokenText, spell, text_of
from neox_lib.tokenizer import encode_text

SETTLED = 64  # tokens per block: while text streams, only the last, incomplete block is sent again
SHOWN_OF_PROMPT = 600  # a prompt's tokens drawn as spans; all are counted
READY_PROMPTS = {
    "a brave mouse": "Once upon a time, there was a brave little mouse",
    "two friends": "Tom and his sister went to the beach.",
    "a lost key": "The old man had a secret box. He could not find the key.",
    "a question": '"Why are you sad?" asked the bear.',
}


class Text:
    """The current branch as tokens. New ones are appended, so the text is not decoded again for each of them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.branch: Branch | None = None
        self.tokens: list[TokenText] = []
        self.rows: list[list] = []
        self.speller = Speller(tokenizer)

    def update(self, branch: Branch | None) -> None:
        if branch is not self.branch or branch is None:
            self.branch, self.tokens, self.rows, self.speller = branch, [], [], Speller(self.tokenizer)
        if branch is not None:
            for index in range(len(self.tokens), len(branch.ids)):
                token, score = self.speller.push(branch.ids[index]), branch.scores[index]
                self.tokens.append(token)
                self.rows.append([*row_of(token), None if score is None else round(score, 4)])

    def view(self, branch: Branch | None) -> dict:
        """`settled` + `tail` are the text, [id, text, control, log-probability] each."""
        self.update(branch)
        edge = len(self.rows) // SETTLED * SETTLED
        return {"settled": self.rows[:edge], "tail": self.rows[edge:]}


def row_of(token: TokenText) -> list:
    return [token.token_id, token.text, int(token.control)]


def facts_view(state: State) -> dict:
    config: NeoXConfig = state.model.config
    return {
        "model": describe_model(state.name, config, state.model.word_embeddings.weight.dtype),
        "context": state.context,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "vocabulary": config.tokenizer_vocab_size,
        "chat": state.template is not None,
        "prompts": list(READY_PROMPTS.items()),
        "kind": json.dumps([state.name, state.prompt, vars(state.settings)]),  # the same for the same cell run again
    }


def prompt_view(state: State) -> dict:
    """The prompt's tokens, their count, the time it took, and a note for the user."""
    started = time.perf_counter()
    ids = encode_text(state.tokenizer, state.prompt)  # type: ignore[arg-type]
    milliseconds = round(1e3 * (time.perf_counter() - started), 1)
    over = len(ids) - state.context
    note = ""
    if not ids:
        ends = [token_label(state.tokenizer, token_id) for token_id in state.model.config.eos_token_ids[:1]]
        note = f"Empty: the model starts a text of its own, after {ends[0]}." if ends else "Empty: give it a word."
    elif over >= 0:
        note = f"{len(ids):,} tokens are {over + 1:,} too many: the context holds {state.context:,}, one of them new."
    elif len(ids) + state.settings.tokens > state.context:
        note = f"Only {state.context - len(ids):,} tokens fit after it."
    rows = [row_of(token) for token in spell(state.tokenizer, ids[:SHOWN_OF_PROMPT])]
    return {"tokens": rows, "count": len(ids), "over": over >= 0, "note": note, "ms": milliseconds}


def candidate_row(each: Candidate) -> list:
    return [each.token_id, each.text, round(each.score, 4), each.rank]


def bars_view(state: State, text: Text) -> dict:
    """The likeliest tokens at the chosen position as [id, text, log-probability, rank], and the token there."""
    before = text_of(text.tokens[: state.chosen])
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
    """One head's attention from the chosen token: `weights` has a number for each token up to it."""
    layer, head = state.layer, state.head
    weights = [] if state.attention is None else [round(value, 4) for value in state.attention[layer, head].tolist()]
    return {"layer": layer, "head": head, "weights": weights}


def lens_view(state: State) -> dict:
    """What each layer would say at the chosen position: a row of its likeliest token, that token's log-probability, and
    that of the `last` word, which the last layer finds likeliest; the row of the embedding comes first.
    """
    if state.lens is None:
        return {"position": state.chosen, "last": "", "rows": []}
    scores, ids = state.lens.max(dim=-1)
    last = state.lens[:, ids[-1]]
    words = [token_label(state.tokenizer, token_id) for token_id in ids.tolist()]
    pairs = zip(scores.tolist(), last.tolist(), strict=True)
    rows = [[word, round(score, 4), round(of_last, 4)] for word, (score, of_last) in zip(words, pairs, strict=True)]
    return {"position": state.chosen, "last": words[-1], "rows": rows}


def branches_view(state: State) -> list[dict]:
    """An excerpt of each branch around its fork, or around the first fork from it."""
    branches, rows = state.branches.branches, []
    for number, branch in enumerate(branches):
        forks = [each.fork for each in branches if each.parent == number]
        place = branch.fork if branch.parent is not None else min(forks, default=branch.given)
        tokens = spell(state.tokenizer, branch.ids)
        scores = [score for score in branch.scores if score is not None]
        row = {"before": text_of(tokens[:place])[-30:], "at": text_of(tokens[place : place + 1])}
        row |= {"after": text_of(tokens[place + 1 :])[:400], "current": number == state.branches.current}
        row |= {"tokens": len(branch.ids), "mean": round(math.exp(sum(scores) / len(scores)), 4) if scores else None}
        rows.append(row)
    return rows


def costs_view(state: State) -> dict:
    return {"with": state.costs.curve(True), "without": state.costs.curve(False)}


def tokens_in_hand(state: State) -> int:
    return len(state.branches.branch.ids) if len(state.branches) else 0


def speed_view(state: State) -> str:
    """The line below everything: this model's speed and memory; empty while there is no text."""
    parts = []
    if state.prefill_seconds:
        parts.append(f"prompt and first token {1e3 * state.prefill_seconds:,.0f} ms")
    if state.tokens_per_second:
        parts.append(f"{state.tokens_per_second:,.1f} tokens/s")
    if tokens := tokens_in_hand(state):
        cache = state.model.config.kv_cache_bytes(tokens, state.model.norm.weight.dtype)
        kept = format_bytes(cache) if state.settings.use_cache else f"off ({format_bytes(cache)} if it were on)"
        parts.append(f"KV cache {kept}")
    return " · ".join(parts)


def needs_view(state: State) -> str:
    """What 20B would need for this text, or for the prompt before there is one."""
    prompt = len(encode_text(state.tokenizer, state.prompt))  # type: ignore[arg-type]
    return needs_of_20b(tokens_in_hand(state) or max(1, prompt))

"""The playground as a page without a kernel shows it: a still picture in HTML, and the same in plain text."""

import html
import math

from neox_lib.playground.state import State
from neox_lib.playground.token_text import spell, text_of
from neox_lib.playground.views import SHOWN_OF_PROMPT, branches_view, candidate_row
from neox_lib.tokenizer import encode_text

# From likely to unlikely: least probability, background, underline, label. Black text is readable on each.
LEVELS = (
    (0.5, "#fdf3dc", "none", "50 % or more"),
    (0.1, "#fbdc9a", "1px dotted #111", "10 to 50 %"),
    (0.01, "#f5bd45", "2px solid #111", "1 to 10 %"),
    (0.0, "#ef9a3d", "4px double #111", "below 1 %"),
)
# A page reopened without its kernel can't show the widget below; the picture replaces its error message.
INSTEAD = (
    "<style>.jp-OutputArea-child:has(.np-still) + .jp-OutputArea-child:has(.jupyter-widgets):not(:has(.np))"
    "{display:none}</style>"
)
BOX = "border:1px solid #999;border-radius:6px;padding:8px 12px;margin:6px 0;background:#fff;color:#111"


def level_of(probability: float) -> int:
    """Which of LEVELS a probability belongs to.

    >>> [level_of(probability) for probability in (0.9, 0.1, 0.001)]
    [0, 1, 3]
    """
    return next(index for index, (least, *_) in enumerate(LEVELS) if probability >= least)


def percent(probability: float) -> str:
    """
    >>> [percent(probability) for probability in (0.523, 0.0042, 0.00001)]
    ['52 %', '0.4 %', 'below 0.1 %']
    """
    if probability < 0.001:
        return "below 0.1 %"
    return f"{100 * probability:.0f} %" if probability >= 0.1 else f"{100 * probability:.1f} %"


def span(text: str, token_id: int, score: float | None) -> str:
    """A token tinted by probability; the prompt's tokens are grey."""
    title, background, underline = f"id {token_id}", "#e9ecef", "none"
    if score is not None:
        probability = math.exp(score)
        _, background, underline, _ = LEVELS[level_of(probability)]
        title += f", {percent(probability)}"
    shown = html.escape(text).replace("\n", "&#8629;<br>")
    return (
        f'<span title="{title}" style="background:{background};border-bottom:{underline};padding:2px 0">{shown}</span>'
    )


def legend() -> str:
    samples = (
        f'<span style="background:{background};border-bottom:{underline};padding:1px 6px;color:#111">{label}</span>'
        for _, background, underline, label in LEVELS
    )
    return f"<p>Probability of each token: {' '.join(samples)}</p>"


def branch_html(state: State) -> str:
    """The current branch as tinted tokens, or the prompt's tokens where nothing has been written."""
    if len(state.branches):
        branch = state.branches.branch
        tokens = zip(spell(state.tokenizer, branch.ids), branch.scores, strict=True)
        return "".join(span(token.text, token.token_id, score) for token, score in tokens)
    ids = encode_text(state.tokenizer, state.prompt)  # type: ignore[arg-type]
    return "".join(span(token.text, token.token_id, None) for token in spell(state.tokenizer, ids[:SHOWN_OF_PROMPT]))


def visible(text: str) -> str:
    """A token as HTML, with spaces and line ends made visible."""
    return html.escape(text).replace(" ", "&middot;").replace("\n", "&#8629;")


def candidates_html(state: State) -> str:
    """The next-token view as a table with bars."""
    rows = []
    for _, text, score, _ in map(candidate_row, state.candidates):
        share = math.exp(score)
        bar = f'<div style="background:#0072B2;height:12px;width:{100 * share:.1f}%"></div>'
        bar = f'<div style="background:#e9ecef;width:200px">{bar}</div>'
        rows.append(f"<tr><td><code>{visible(text)}</code></td><td>{bar}</td><td>{percent(share)}</td></tr>")
    if not rows:
        return ""
    return f"<p>The likeliest tokens at position {state.chosen}:</p><table>{''.join(rows)}</table>"


def picture_html(state: State) -> str:
    """A still picture of a playground: text with tints, legend, likeliest tokens, other branches."""
    branches = "".join(
        f"<li>&hellip;{html.escape(branch['before'])}<b>{html.escape(branch['at'])}</b>{html.escape(branch['after'])}</li>"
        for branch in branches_view(state)
    )
    branches = f"<p>Branches:</p><ol>{branches}</ol>" if len(state.branches) > 1 else ""
    text = f'<div style="white-space:pre-wrap;line-height:1.9;font-size:16px">{branch_html(state)}</div>'
    note = "<p><i>A still picture: run this cell to play.</i></p>"
    parts = f"<p><b>Prompt playground</b></p>{text}{legend()}{candidates_html(state)}{branches}{note}"
    return f'{INSTEAD}<div class="np-still" style="{BOX}">{parts}</div>'


def text_in_hand(state: State) -> str:
    """The text of the current branch, or the prompt where nothing has been written."""
    return text_of(spell(state.tokenizer, state.branches.branch.ids)) if len(state.branches) else state.prompt


def picture_text(state: State) -> str:
    """The same in plain text."""
    lines = ["Prompt playground. Run this cell to play.", text_in_hand(state)]
    if state.candidates:
        shares = (f"{each.text!r} {percent(math.exp(each.score))}" for each in state.candidates[:5])
        lines.append(f"Likeliest at position {state.chosen}: " + ", ".join(shares))
    return "\n".join(lines)

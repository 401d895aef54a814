"""The figures of notebook 03: one query's way to its output, two heads, the rows of the projection, maps of weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from neox_lib.course.figures.parallel_residual import arrow, box
from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, SKY, Picture, Steps, lines, new_figure

# Colour, hatching and text colour of query, key and value; the hatching tells them apart in grey print too.
ROLES = {"query": (BLUE, "", "white"), "key": (ORANGE, "//", "black"), "value": (SKY, "..", "black")}


def short(numbers: Tensor) -> str:
    """A small vector as a reader would write it down: two digits at most after the point."""
    return "[" + ", ".join(f"{round(number, 2):g}" for number in numbers.tolist()) + "]"


def attention_step(tokens: Sequence[str], scores: Tensor, value: Tensor, position: int) -> Picture:
    """One query's way to its output: `scores` `[T]` (-inf where masked), their softmax as bars, the values `[T, D]`
    times these weights, and the sum.
    """
    weights = scores.softmax(-1)
    output = weights @ value
    figure = new_figure(11, 1.6 + 0.62 * len(tokens))
    axes = figure.add_subplot()
    axes.set_xlim(0, 11)
    axes.set_ylim(-1.45, len(tokens) + 0.55)
    axes.axis("off")
    left, width = 3.6, 2.4
    heads = ((0.6, "key of"), (2.3, "score\nq . k / root of D"), (left + width / 2, "weight\nafter softmax"))
    for x, title in (*heads, (8.6, "weight x value")):
        axes.text(x, len(tokens) + 0.1, title, ha="center", va="center", fontsize=FONT_SIZE)
    for row, token in enumerate(tokens):
        y, seen = len(tokens) - 1 - row, bool(weights[row] > 0)
        ink = "black" if seen else "#6b6b6b"
        box(axes, 0.6, y, 1.0, token, "white" if seen else "#e4e4e4")
        axes.text(2.3, y, f"{scores[row]:.2f}" if seen else "hidden", ha="center", va="center", color=ink, fontsize=14)
        axes.barh(y, width, left=left, height=0.5, color="white", edgecolor="#9a9a9a")
        axes.barh(y, width * weights[row].item(), left=left, height=0.5, color=BLUE, edgecolor="black")
        axes.text(left + width + 0.12, y, f"{weights[row]:.2f}", va="center", color=ink, fontsize=14)
        if seen:
            axes.text(8.6, y, f"{weights[row]:.2f} x {short(value[row])}", ha="center", va="center", fontsize=14)
    axes.plot([6.9, 10.4], [-0.52, -0.52], color="black", linewidth=1.6)
    axes.text(8.6, -0.98, f"sum = {short(output)}", ha="center", va="center", fontsize=15, fontweight="bold")
    asks = f'the query of "{tokens[position]}"'
    axes.text(0.1, -0.98, f"{asks}, position {position}", va="center", fontsize=15, fontweight="bold")
    rows = [f"{t}: score {s:.2f}, weight {w:.2f}" for t, s, w in zip(tokens, scores, weights, strict=True) if w > 0]
    alt = f"{asks[0].upper() + asks[1:]} meets each key it may see. {'; '.join(rows)}. Weights times values add up to "
    return Picture(figure, f"{alt}{short(output)}.")


def attention_walk(tokens: Sequence[str], query: Tensor, key: Tensor, value: Tensor) -> Steps:
    """The picture of each position in turn, under a causal mask; the last stands still. All three are `[T, D]`."""
    scores = query @ key.T / query.shape[-1] ** 0.5
    scores = scores.masked_fill(scores.new_ones(scores.shape).triu(1).bool(), float("-inf"))
    labels = [f"{position}: {token}" for position, token in enumerate(tokens)]
    steps = {label: attention_step(tokens, scores[at], value, at) for at, label in enumerate(labels)}
    return Steps(steps, labels[-1], "position")


def two_heads() -> Picture:
    """From x by three matrices to two heads, each with its columns, side by side again, and through `dense`."""
    figure = new_figure(11, 3.9)
    axes = figure.add_subplot()
    axes.set_xlim(0, 13.2)
    axes.set_ylim(-0.2, 4.5)
    axes.axis("off")
    box(axes, 0.65, 2, 1.0, "x\n[T, C]", height=1.1)
    for y, role in zip((3.6, 2.0, 0.4), ROLES, strict=True):
        colour, hatch, ink = ROLES[role]
        arrow(axes, (1.2, 2), (1.5, 2), (1.5, y), (1.75, y))
        box(axes, 2.55, y, 1.5, f"x @ W_{role[0]}")
        arrow(axes, (3.35, y), (3.75, y))
        for half in range(2):
            shade = axes.barh(y, 1, left=3.8 + half, height=0.62, color=colour, hatch=hatch, edgecolor="black")
            shade[0].set_zorder(3)
            draw_word(axes, f"{role[0]}_{half}", 4.3 + half, y, ink, "white" if hatch else colour)
        arrow(axes, (5.85, y), (6.2, y), (6.2, 2.0 + 0.16 * (y - 2)), (6.6, 2.0 + 0.16 * (y - 2)))
    for y, head in ((2.75, 0), (1.25, 1)):
        box(axes, 7.6, y, 1.7, f"head {head}\none_head", height=1.0)
        arrow(axes, (8.5, y), (8.9, y), (8.9, 2), (9.2, 2))
    axes.plot([6.62, 6.62], [0.7, 3.3], color="black", linewidth=1.6)
    box(axes, 10.05, 2, 1.6, "side by side\n[T, C]", height=1.1)
    arrow(axes, (10.9, 2), (11.25, 2))
    box(axes, 12.1, 2, 1.6, "@ W_dense\n[T, C]", height=1.1)
    axes.text(4.8, 4.25, "columns: left half, right half", ha="center", va="center", fontsize=FONT_SIZE)
    alt = (
        "Multi-head attention with two heads. x is multiplied by three matrices. The left half of the columns of each "
        "product, q_0, k_0 and v_0, goes to head 0, the right half, q_1, k_1 and v_1, to head 1. Each head runs "
        "one_head. The outputs are put side by side and multiplied by W_dense."
    )
    return Picture(figure, alt)


def qkv_rows(num_heads: int, head_dim: int) -> Picture:
    """The rows of `query_key_value`, head after head, above the places where a flat split would cut them."""
    figure = new_figure(10, 3.4)
    axes = figure.add_subplot()
    rows = 3 * num_heads * head_dim
    for block in range(3 * num_heads):
        role = list(ROLES)[block % 3]
        colour, hatch, ink = ROLES[role]
        axes.barh(1, head_dim, left=block * head_dim, height=0.8, color=colour, hatch=hatch, edgecolor="black")
        name = f"{role[0]}_{block // 3}"
        draw_word(axes, name, (block + 0.5) * head_dim, 1, ink, "white" if hatch else colour)
    for third, role in enumerate(ROLES):
        colour, hatch, ink = ROLES[role]
        left, width = third * rows / 3, rows / 3
        axes.barh(0, width, left=left, height=0.6, color=colour, hatch=hatch, edgecolor="black")
        draw_word(axes, f"taken for {role}", left + width / 2, 0, ink, "white" if hatch else colour)
    for head in range(num_heads + 1):  # where one head ends and the next begins
        axes.plot([3 * head * head_dim] * 2, [0.5, 1.5], color="black", linewidth=4, solid_capstyle="butt")
    axes.set_title(f"{num_heads} heads of size {head_dim}, a bold line after each head", fontsize=FONT_SIZE + 1)
    axes.set_yticks([0, 1], ["a flat split", "the file"])
    axes.set_xticks(range(0, rows + 1, head_dim))
    axes.set_xlim(0, rows)
    axes.set_xlabel("row of query_key_value", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.spines[["top", "right", "left"]].set_visible(False)
    alt = (
        f"The {rows} rows of query_key_value for {num_heads} heads of size {head_dim}. In the file: q_0, k_0, v_0, "
        "then q_1, k_1, v_1, and so on, head after head. Below, a flat split cuts the same rows into three thirds "
        "and takes the first for queries, the second for keys, the third for values: each third mixes all three."
    )
    return Picture(figure, alt)


def draw_word(axes, word: str, x: float, y: float, ink: str, colour: str) -> None:
    """A word in the middle of a block, on a plain patch so that hatching does not run through it."""
    box = {"facecolor": colour, "edgecolor": "none", "pad": 2}
    axes.text(x, y, word, ha="center", va="center", color=ink, fontsize=FONT_SIZE, bbox=box, zorder=4)


def over_head_size(curves: Mapping[str, Sequence[float]], sizes: Sequence[int], alt: str) -> Picture:
    """The largest weight, from 0 to 1, against the head size; the log axis has a tick at each of `sizes`."""
    series = {label: (sizes, values) for label, values in curves.items()}
    picture = lines(
        series, "One query and 16 keys, all random", "head size D (log scale)", "largest weight, mean", alt, log_x=True
    )
    (axes,) = picture.figure.axes
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=FONT_SIZE, frameon=False, loc="center right")
    return picture


def attention_maps(maps: Mapping[str, Tensor], tokens: Sequence[str], alt: str) -> Picture:
    """Maps of `[T, T]` attention weights side by side, on one scale from 0 to 1; rows are queries, columns keys.

    Up to five tokens give a small map with its numbers in it, more a large one without.
    """
    few = len(tokens) <= 5
    figure = new_figure(4.2 * len(maps), 3.3) if few else new_figure(5.4 * len(maps), 5.2)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    labels = [token.replace("Ġ", "") for token in tokens]  # the tokenizer's sign for a leading space
    for panel, (title, weights) in zip(panels, maps.items(), strict=True):
        panel.imshow(weights.numpy(), cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(title, fontsize=FONT_SIZE + 1)
        panel.set_xticks(range(len(labels)), labels, rotation=0 if few else 90, fontsize=FONT_SIZE)
        panel.set_yticks(range(len(labels)), labels, fontsize=FONT_SIZE)
        panel.set_xlabel("token looked at", fontsize=FONT_SIZE)
        if few:
            write_numbers(panel, weights)
    panels[0].set_ylabel("token that looks", fontsize=FONT_SIZE)
    scale = figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.8)
    scale.set_label("weight", fontsize=FONT_SIZE)
    scale.ax.tick_params(labelsize=FONT_SIZE - 1)
    return Picture(figure, alt)


def write_numbers(axes, weights: Tensor) -> None:
    """Each weight in its own cell, black on bright cells and white on dark ones."""
    for row, numbers in enumerate(weights.tolist()):
        for column, weight in enumerate(numbers):
            ink = "black" if weight > 0.5 else "white"
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=ink, fontsize=FONT_SIZE)

"""The figures of notebook 03: the rows of the fused projection, and maps of attention weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, SKY, Picture, lines, new_figure

# Colour, hatching and text colour of query, key and value; the hatching tells them apart in grey print too.
ROLES = {"query": (BLUE, "", "white"), "key": (ORANGE, "//", "black"), "value": (SKY, "..", "black")}


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
        draw_word(axes, name, (block + 0.5) * head_dim, 1, ink, colour)
    for third, role in enumerate(ROLES):
        colour, hatch, ink = ROLES[role]
        left, width = third * rows / 3, rows / 3
        axes.barh(0, width, left=left, height=0.6, color=colour, hatch=hatch, edgecolor="black")
        draw_word(axes, f"taken for {role}", left + width / 2, 0, ink, colour)
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
    axes.text(x, y, word, ha="center", va="center", color=ink, fontsize=FONT_SIZE, bbox=box)


def over_head_size(curves: Mapping[str, Sequence[float]], sizes: Sequence[int], alt: str) -> Picture:
    """The largest weight, from 0 to 1, against the head size; the log axis has a tick at each of `sizes`."""
    series = {label: (sizes, values) for label, values in curves.items()}
    picture = lines(series, "One query, 16 keys, random", "head size D", "largest weight, mean", alt, log_x=True)
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

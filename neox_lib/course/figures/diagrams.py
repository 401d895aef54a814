"""The map of the model: the same drawing in every notebook, with the part that it teaches highlighted."""

import itertools

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, Picture, new_figure

# Name: (label, x, y, width, height), in units of the drawing, in the order in which data passes through them.
PLACES = {
    "tokenizer": ("01 tokenizer\ntext to ids", 0.15, 1.75, 1.75, 0.9),
    "embedding": ("embedding\nids to vectors", 2.3, 1.75, 1.75, 0.9),
    "attention": ("03 attention\nlooks back", 5.0, 2.2, 3.35, 1.0),
    "rotary": ("02 rotary\npositions", 6.85, 2.29, 1.4, 0.82),
    "mlp": ("04 MLP\nworks alone", 5.0, 1.1, 3.35, 0.8),
    "output": ("norm, output\ntoken scores", 9.55, 1.75, 1.75, 0.9),
    "generation": ("06 generation\nchoose, append", 11.7, 1.75, 1.85, 0.9),
    "checkpoint": ("05 checkpoint: the trained numbers in these boxes (rotary has none)", 2.3, 0.1, 9.0, 0.55),
}
ARROWS = [
    [(1.9, 2.2), (2.3, 2.2)],
    [(4.05, 2.05), (4.7, 2.05)],
    [(4.7, 2.05), (4.7, 2.7), (5.0, 2.7)],
    [(4.7, 2.05), (4.7, 1.5), (5.0, 1.5)],
    [(4.7, 2.05), (8.55, 2.05)],
    [(8.35, 2.7), (8.72, 2.7), (8.72, 2.22)],
    [(8.35, 1.5), (8.72, 1.5), (8.72, 1.88)],
    [(8.89, 2.05), (9.53, 2.05)],
    [(11.3, 2.2), (11.7, 2.2)],
    [(12.6, 2.65), (12.6, 3.95), (3.2, 3.95), (3.2, 2.65)],
]


def model_map(*lit: str) -> Picture:
    """GPT-NeoX from text to the next token; the parts named in `lit` are coloured and have a bold frame.

    Raises KeyError for a part that the map does not have.
    """
    names = [PLACES[name][0].replace("\n", ": ") for name in lit]
    figure = new_figure(11.5, 3.6)
    axes = figure.add_subplot()
    axes.set_xlim(0, 13.7)
    axes.set_ylim(0, 4.35)
    axes.axis("off")
    block = FancyBboxPatch(
        (4.42, 0.95), 4.6, 2.75, boxstyle="round,pad=0.05", facecolor="#f1f1f1", edgecolor="#777777", linestyle="--"
    )
    axes.add_patch(block)
    axes.text(6.7, 3.47, "one of 44 blocks (norms not drawn)", ha="center", va="center", fontsize=FONT_SIZE)
    axes.text(7.9, 4.13, "the new token", ha="center", va="center", fontsize=FONT_SIZE)
    for points in ARROWS:
        for start, end in itertools.pairwise(points):
            style = "-|>" if end == points[-1] else "-"
            patch = FancyArrowPatch(
                start, end, arrowstyle=style, mutation_scale=14, shrinkA=0, shrinkB=0, color="black"
            )
            axes.add_patch(patch)
    axes.text(8.72, 2.05, "+", ha="center", va="center", fontsize=FONT_SIZE + 5, fontweight="bold")
    for name, (label, x, y, width, height) in PLACES.items():
        draw_place(axes, label, (x, y, width, height), chosen=name in lit)
    here = f"You are here: {'; '.join(names)}." if names else "No part is highlighted."
    alt = (
        "Map of GPT-NeoX, a transformer. Text goes through the tokenizer, the embedding, and a stack of blocks. In "
        "each block, attention, with rotary positions inside it, and an MLP read the same input and add to it; the "
        "block's norms are not drawn. A last norm and the output matrix score every token; generation chooses one, "
        f"which goes back in at the embedding. The checkpoint holds the trained numbers; rotary has none. {here}"
    )
    return Picture(figure, alt)


def draw_place(axes, label: str, place: tuple[float, float, float, float], chosen: bool) -> None:
    """A labelled box at `place` (x, y, width, height); bold and coloured if chosen."""
    x, y, width, height = place
    box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", zorder=3)
    box.set(facecolor=ORANGE if chosen else "white", edgecolor="black" if chosen else BLUE)
    box.set_linewidth(3 if chosen else 1.3)
    axes.add_patch(box)
    weight = "bold" if chosen else "normal"
    middle = x + (0.95 if label.startswith("03") else width / 2)  # room for rotary, which is inside attention
    centre = (middle, y + height / 2)
    axes.text(*centre, label, ha="center", va="center", fontsize=FONT_SIZE - 1, fontweight=weight, zorder=4)

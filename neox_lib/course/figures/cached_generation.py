"""The figures of notebook 06: a cache that fills, and one distribution under several settings."""

from collections.abc import Mapping, Sequence

from matplotlib.patches import Rectangle
from torch import Tensor

from neox_lib.course.figures.plots import (
    BLUE,
    FONT_SIZE,
    ORANGE,
    SKY,
    VERMILION,
    Picture,
    Steps,
    as_list,
    finish_axes,
    new_figure,
)

LOOKS = [(SKY, ""), (BLUE, "//"), (ORANGE, ".."), (VERMILION, "xx")]
HELD, NEW = "#d3e9f8", "#e9a83a"  # light and dark, in grey too


def cache_filling(tokens: Sequence[str], passes: Sequence[int], capacity: int) -> Steps:
    """The cache of one layer after each pass, row by row: a slider adds the passes one after the other.

    `passes` are the numbers of tokens that the passes read; `tokens` are the texts of them all.
    """
    names = ["start", "prefill", *(f"decode {number}" for number in range(1, len(passes)))]
    pictures = {name: filled(tokens, passes[:done], capacity, len(passes)) for done, name in enumerate(names)}
    return Steps(pictures, names[-1], "pass")


def filled(tokens: Sequence[str], passes: Sequence[int], capacity: int, rows: int) -> Picture:
    """The cache before any pass and after each of `passes`, in a picture with room for `rows` passes."""
    figure = new_figure(13, 1.5 + 0.78 * (rows + 1))
    axes = figure.add_subplot()
    axes.set_xlim(-5.2, capacity * 1.6 + 6)
    axes.set_ylim(-1.25 * rows - 0.9, 1.9)
    axes.axis("off")
    axes.set_title("The cache of one layer: a key and a value per cell", fontsize=FONT_SIZE + 2)
    for position in range(capacity):
        axes.text(1.6 * position + 0.8, 1.2, str(position), ha="center", va="center", fontsize=FONT_SIZE)
    axes.text(-0.4, 1.2, "position", ha="right", va="center", fontsize=FONT_SIZE)
    held = 0
    for row, new in enumerate([0, *passes]):
        label = "start" if row == 0 else f"prefill reads {new}" if row == 1 else f"decode reads {new}"
        axes.text(-0.4, -1.25 * row + 0.45, label, ha="right", va="center", fontsize=FONT_SIZE)
        for position in range(capacity):
            fresh, full = held <= position < held + new, position < held + new
            cell = Rectangle((1.6 * position, -1.25 * row), 1.6, 0.95, facecolor=NEW if fresh else HELD)
            cell.set(edgecolor="black", linewidth=2.2 if fresh else 1, linestyle="-" if full else ":")
            if not full:
                cell.set_facecolor("white")
            axes.add_patch(cell)
            if full:
                place = (1.6 * position + 0.8, -1.25 * row + 0.45)
                axes.text(*place, tokens[position].strip(), ha="center", va="center", fontsize=FONT_SIZE - 1)
        held += new
        meets = "" if row == 0 else f"{new} quer{'y' if new == 1 else 'ies'}, {held} keys"
        words = f"length {held}" + (f": {meets}" if meets else "")
        axes.text(1.6 * capacity + 0.3, -1.25 * row + 0.45, words, ha="left", va="center", fontsize=FONT_SIZE)
    story = "; ".join(
        f"a pass reads {new} token{'s' if new > 1 else ''} and fills positions up to {sum(passes[: number + 1]) - 1}"
        for number, new in enumerate(passes)
    )
    story = f"; {story}" if story else ""
    alt = (
        f"A row of {capacity} cells for each moment. At the start all are empty{story}. New cells are dark, "
        "those held from before are light and unchanged, the rest stay empty."
    )
    return Picture(figure, alt)


def grouped_bars(names: Sequence[str], groups: Mapping[str, Tensor], title: str, y_label: str, alt: str) -> Picture:
    """For each name, one bar per group, `label: [V]`; up to four groups, told apart by colour and hatching."""
    figure = new_figure(10, 4.8)
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for index, ((label, values), (colour, hatch)) in enumerate(zip(groups.items(), LOOKS[: len(groups)], strict=True)):
        places = [place + (index - (len(groups) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, as_list(values), width, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.set_xticks(range(len(names)), list(names))
    axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish_axes(axes, title, "token", y_label)
    axes.set_axisbelow(True)
    return Picture(figure, alt)


def temperature_bars(names: Sequence[str], odds: Mapping[str, Tensor], unchanged: str, still: str) -> Steps:
    """The probabilities of the same tokens at several temperatures: a slider changes it, an outline shows `unchanged`.

    `odds` maps each temperature's label to the tokens' probabilities, `[V]`.
    """
    return Steps({label: reshaped(names, values, odds[unchanged], label) for label, values in odds.items()}, still, "T")


def reshaped(names: Sequence[str], values: Tensor, before: Tensor, label: str) -> Picture:
    """One bar per token, in percent on a scale from 0 to 100, and an outline where it was at temperature 1."""
    figure = new_figure(10, 4.8)
    axes = figure.add_subplot()
    axes.bar(list(names), [100 * value for value in as_list(values)], width=0.7, color=SKY, label=f"T = {label}")
    axes.bar(
        list(names),
        [100 * value for value in as_list(before)],
        width=0.7,
        fill=False,
        edgecolor="black",
        linewidth=2,
        label="T = 1, the model's own",
    )
    for place, (now, then) in enumerate(zip(as_list(values), as_list(before), strict=True)):
        axes.text(place, 100 * max(now, then) + 1.5, f"{100 * now:.0f}", ha="center", fontsize=FONT_SIZE)
    axes.set_ylim(0, 100)
    axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish_axes(axes, f"The likeliest next tokens at temperature {label}", "next token", "probability, %")
    first = 100 * as_list(values)[0], 100 * as_list(before)[0]
    alt = (
        f"Bars from 0 to 100 % for the {len(names)} likeliest next tokens, with the model's own odds as outlines. At "
        f"temperature {label} the first has {first[0]:.0f} %, at temperature 1 it has {first[1]:.0f} %."
    )
    return Picture(figure, alt)

"""Figures of notebook 06: one distribution under several settings."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from neox_lib.lesson.plots import BLUE, FONT_SIZE, ORANGE, SKY, VERMILION, Picture, as_list, finish_axes, new_figure

LOOKS = [(SKY, ""), (BLUE, "//"), (VERMILION, "xx")]


def grouped_bars(names: Sequence[str], groups: Mapping[str, Tensor], title: str, y_label: str, alt: str) -> Picture:
    """For each name a bar of every group, `label: [V]`; up to three groups, told apart by colour and hatching."""
    figure = new_figure()
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for index, ((label, values), (colour, hatch)) in enumerate(zip(groups.items(), LOOKS, strict=False)):
        places = [place + (index - (len(groups) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, as_list(values), width, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.set_xticks(range(len(names)), list(names))
    axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish_axes(axes, title, "token", y_label)
    return Picture(figure, alt)


def nucleus_bars(names: Sequence[str], probabilities: Tensor, kept: int, p: float, title: str, alt: str) -> Picture:
    """Probabilities from the likeliest down, the first `kept` filled, with their running sum and the line at p."""
    figure = new_figure()
    axes = figure.add_subplot()
    colours = [BLUE if place < kept else "white" for place in range(len(names))]
    axes.bar(list(names), as_list(probabilities), color=colours, edgecolor="black", width=0.6)
    sums = as_list(probabilities.cumsum(-1))
    axes.plot(list(names), sums, "o-", color=ORANGE, linewidth=2.4, label="sum so far")
    axes.axhline(p, color="black", linestyle="--", linewidth=1.6)
    axes.text(len(names) - 0.5, p - 0.02, f"p = {p}", ha="right", va="top", fontsize=FONT_SIZE)
    axes.legend(fontsize=FONT_SIZE, frameon=False, loc="center right")
    finish_axes(axes, title, "token, likeliest first (filled: kept)", "probability")
    return Picture(figure, alt)

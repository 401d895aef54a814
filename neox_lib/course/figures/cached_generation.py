"""The figure of notebook 06: one distribution under several settings."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from neox_lib.course.figures.plots import (
    BLUE,
    FONT_SIZE,
    ORANGE,
    SKY,
    VERMILION,
    Picture,
    as_list,
    finish_axes,
    new_figure,
)

LOOKS = [(SKY, ""), (BLUE, "//"), (ORANGE, ".."), (VERMILION, "xx")]


def grouped_bars(names: Sequence[str], groups: Mapping[str, Tensor], title: str, y_label: str, alt: str) -> Picture:
    """For each name, one bar per group, `label: [V]`; up to four groups, told apart by colour and hatching."""
    figure = new_figure()
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

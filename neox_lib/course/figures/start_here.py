"""The figure of notebook 00: which parts hold a model's parameters."""

from collections.abc import Mapping

from neox_lib.course.figures.plots import BLUE, FONT_SIZE, GREEN, ORANGE, SKY, Picture, finish_axes, new_figure

# Colour, hatching and text colour of each part in turn; the hatching tells them apart in grey print too.
LOOKS = [(ORANGE, "//", "black"), (BLUE, "", "white"), (SKY, "..", "black"), (GREEN, "xx", "black")]


def share_bars(models: Mapping[str, Mapping[str, int]], title: str, x_label: str) -> Picture:
    """One bar per model, divided into its parts' shares: `{model: {part: count}}`, the same parts in each."""
    figure = new_figure(9, 3.4)
    axes = figure.add_subplot()
    totals = {model: sum(parts.values()) for model, parts in models.items()}
    start = dict.fromkeys(models, 0.0)
    for part, (colour, hatch, ink) in zip(next(iter(models.values())), LOOKS, strict=False):
        shares = {model: 100 * models[model][part] / totals[model] for model in models}
        names, widths, lefts = list(shares), list(shares.values()), [start[model] for model in shares]
        axes.barh(names, widths, left=lefts, color=colour, hatch=hatch, edgecolor="white", height=0.6, label=part)
        for row, (width, left) in enumerate(zip(widths, lefts, strict=True)):
            share, middle = f"{width:.0f} %", left + width / 2
            if width >= 6:
                box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
                axes.text(middle, row, share, ha="center", va="center", color=ink, fontsize=FONT_SIZE, bbox=box)
            elif width >= 1:  # no room inside
                axes.text(left + 0.6, row - 0.33, share, ha="left", va="bottom", fontsize=FONT_SIZE)
        start = {model: start[model] + shares[model] for model in models}
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    finish_axes(axes, title, x_label, "")
    axes.grid(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=FONT_SIZE, frameon=False
    )
    told = [
        f"{model}: " + ", ".join(f"{part} {count / totals[model]:.0%}" for part, count in parts.items())
        for model, parts in models.items()
    ]
    return Picture(figure, f"Bars, each divided into shares. {title}: {'; '.join(told)}")

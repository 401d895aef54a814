"""The figures of notebook 05: how shards merge, how large each file is, what fits into which memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from neox_lib.config import NeoXConfig
from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, SKY, Picture, finish_axes, new_figure

GIB = 2**30
RANK_COLOURS = {1.0: ("#9ecae8", ""), 2.0: ("#f7d48a", "//")}  # rank 0, rank 1; in grey told apart by the hatching
BOTH = ("#e3e3e3", "")


def draw_matrix(axes, values: Tensor, owners: Tensor, left: float, label: str) -> float:
    """Draw a small matrix as numbered squares, coloured by the rank they came from. Returns its right edge."""
    values, owners = values.reshape(-1, values.shape[-1]), owners.reshape(-1, owners.shape[-1])
    rows, columns = values.shape
    top = rows / 2
    for row in range(rows):
        for column in range(columns):
            colour, hatch = RANK_COLOURS.get(owners[row, column].item(), BOTH)
            corner = (left + column, top - row - 1)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="#555555", hatch=hatch, linewidth=1))
            place = (corner[0] + 0.5, corner[1] + 0.47)
            axes.text(
                *place,
                f"{values[row, column].item():g}",
                ha="center",
                va="center",
                fontsize=FONT_SIZE - 1,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
            )
    axes.text(left + columns / 2, top + 0.25, label, ha="center", va="bottom", fontsize=FONT_SIZE)
    return left + columns


def merge_picture(
    panels: Mapping[str, tuple[Sequence[Tensor], Callable[[list[Tensor]], Tensor]]], title: str, alt: str
) -> Picture:
    """Two ranks' parts and what they merge into: one panel per rule, the two rules for matrices first.

    `panels` maps a rule's name to its parts and its merge.
    """
    figure = new_figure(12, 5.4)
    figure.suptitle(title, fontsize=FONT_SIZE + 2)
    grid = figure.add_gridspec(2, 2, height_ratios=(5.2, 2.4))
    for number, (name, (parts, merge)) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        owners = [torch.full_like(part, rank + 1.0) for rank, part in enumerate(parts)]
        right = 0.0
        for rank, part in enumerate(parts):
            right = draw_matrix(axes, part, owners[rank], right + (0.8 if rank else 0.0), f"rank {rank}")
        axes.annotate(
            "", (right + 1.5, 0), (right + 0.3, 0), arrowprops={"arrowstyle": "-|>", "linewidth": 2, "color": "black"}
        )
        right = draw_matrix(axes, merge(list(parts)), merge(owners), right + 1.8, "merged")
        axes.set_title(name, fontsize=FONT_SIZE + 1, fontweight="bold", loc="left")
        axes.set_xlim(-0.3, 15)
        axes.set_ylim((-2.1, 3.1) if number < 2 else (-0.6, 1.8))
        axes.set_aspect("equal")
        axes.axis("off")
    return Picture(figure, alt)


def file_bars(sizes: Mapping[int, float], title: str, alt: str) -> Picture:
    """The size in MB of one rank's file per layer index; an index without a bar has no file."""
    figure = new_figure(11, 4.5)
    axes = figure.add_subplot()
    axes.bar(list(sizes), list(sizes.values()), color=BLUE, width=0.8)
    last = max(sizes)
    axes.set_xticks([index for index in (0, 2, last - 3, last) if index in sizes])
    axes.set_xlim(-1, last + 1)
    norm = last - 1  # the final norm: its bar is too low to be seen
    axes.annotate(
        str(norm),
        (norm, 0),
        (norm, 0.3 * max(sizes.values())),
        ha="center",
        fontsize=FONT_SIZE,
        arrowprops={"arrowstyle": "-|>", "color": "black"},
    )
    finish_axes(axes, title, "NN in layer_NN-model_RR-model_states.pt", "MB in each rank's file")
    return Picture(figure, alt)


def memory_bars(needs: Mapping[str, Mapping[str, int]], memories: Sequence[int], title: str, alt: str) -> Picture:
    """Bytes, stacked by what needs them, and a line at each memory size in GiB."""
    figure = new_figure(11, 4.5)
    axes = figure.add_subplot()
    kinds = list(next(iter(needs.values())))
    starts = dict.fromkeys(needs, 0.0)
    for kind, colour, hatch in zip(kinds, (BLUE, ORANGE, SKY), ("", "//", ".."), strict=False):
        widths = [need[kind] / GIB for need in needs.values()]
        lefts = list(starts.values())
        axes.barh(list(needs), widths, left=lefts, color=colour, hatch=hatch, edgecolor="white", height=0.6, label=kind)
        starts = {name: start + width for (name, start), width in zip(starts.items(), widths, strict=True)}
    for row, end in enumerate(starts.values()):
        axes.text(1, row, f"{end:.2f} GiB in total", va="center", fontsize=FONT_SIZE, color="white")
    for memory in memories:
        axes.axvline(memory, color="black", linestyle="--", linewidth=1.2, zorder=0)
        axes.text(memory, -0.56, str(memory), ha="center", va="bottom", fontsize=FONT_SIZE, backgroundcolor="white")
    axes.invert_yaxis()
    axes.legend(fontsize=FONT_SIZE, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(kinds))
    finish_axes(axes, "", "GiB; a dashed line is a memory size", "")
    axes.set_title(title, fontsize=FONT_SIZE + 1, pad=32)
    axes.grid(False)
    return Picture(figure, alt)


@dataclass(frozen=True)
class MemoryCalculator:
    """Choose model, precision and context; read what is needed and where it fits.

    `needs(config, precision, tokens)` gives the bytes of each part by its name. As a cell's last expression it shows
    controls where a kernel runs; its text form shows the first choice.
    """

    models: Mapping[str, NeoXConfig]
    precisions: Sequence[str]
    needs: Callable[[NeoXConfig, str, int], Mapping[str, int]]
    memories: Sequence[int] = (8, 16, 24, 40, 80)

    def answer(self, model: str, precision: str, tokens: int) -> str:
        """What that choice needs and where it fits, in two lines."""
        needs = self.needs(self.models[model], precision, tokens)
        total = sum(needs.values())
        parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in needs.items())
        fits = ", ".join(f"{memory} GB {'yes' if total <= memory * GIB else 'no'}" for memory in self.memories)
        return f"{model}, {precision}, {tokens} tokens: {total / GIB:.2f} GiB ({parts})\nfits into: {fits}"

    def _repr_mimebundle_(self, **_) -> dict:
        model = next(iter(self.models))
        text = self.answer(model, self.precisions[0], self.models[model].max_position_embeddings)
        bundle = {"text/plain": text, "text/html": as_html(text)}
        return (self.widget()._repr_mimebundle_() or {}) | bundle

    def widget(self):
        """Two menus and a slider; every change shows the new answer."""
        import ipywidgets

        model = ipywidgets.Dropdown(options=list(self.models), description="model")
        precision = ipywidgets.Dropdown(options=list(self.precisions), description="precision")
        longest = max(config.max_position_embeddings for config in self.models.values())
        tokens = ipywidgets.IntSlider(value=longest, min=0, max=longest, step=128, description="context")
        shown = ipywidgets.HTML()

        def update(_=None) -> None:
            shown.value = as_html(self.answer(str(model.value), str(precision.value), int(tokens.value or 0)))

        for control in (model, precision, tokens):
            control.observe(update, "value")
        update()
        return ipywidgets.VBox([model, precision, tokens, shown])


def as_html(text: str) -> str:
    """The answer in large type, line by line. It holds no text from outside, so nothing is escaped."""
    return f'<p style="font-size:16px">{"<br>".join(text.splitlines())}</p>'

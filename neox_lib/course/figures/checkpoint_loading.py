"""The figures of notebook 05: two ranks share a pair of layers, how shards merge, file sizes, what fits where."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from neox_lib.config import NeoXConfig
from neox_lib.course.figures.plots import BLUE, FONT_SIZE, ORANGE, SKY, Picture, finish_axes, new_figure

GIB = 2**30
RANK_COLOURS = {1.0: "#d3e9f8", 2.0: "#e9a83a"}  # rank 0 is light, rank 1 dark, in grey too; what both hold is white


def draw_matrix(axes, values: Tensor, owners: Tensor, left: float, label: str, middle: float = 0) -> float:
    """Draw a small matrix as numbered squares, coloured by the rank they came from. Returns its right edge."""
    values, owners = values.reshape(-1, values.shape[-1]), owners.reshape(-1, owners.shape[-1])
    rows, columns = values.shape
    top = middle + rows / 2
    for row in range(rows):
        for column in range(columns):
            colour = RANK_COLOURS.get(owners[row, column].item(), "white")
            corner = (left + column, top - row - 1)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="#333333", linewidth=1.2))
            number = f"{values[row, column].item():g}"
            axes.text(corner[0] + 0.5, corner[1] + 0.47, number, ha="center", va="center", fontsize=FONT_SIZE + 1)
    axes.text(left + columns / 2, top + 0.2, label, ha="center", va="bottom", fontsize=FONT_SIZE)
    return left + columns


def draw_arrow(axes, *points: tuple[float, float]) -> None:
    """A line through the points with an arrowhead at the last."""
    for start, end in itertools.pairwise(points):
        head = "-|>" if end == points[-1] else "-"
        line = {"arrowstyle": head, "linewidth": 2, "color": "black", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 18}
        axes.annotate("", end, start, arrowprops=line)


def pair_picture(first: Tensor, second: Tensor, x: Tensor) -> Picture:
    """Two ranks go through a column-parallel layer `first` and a row-parallel one, `second`; an all-reduce follows.

    Both matrices are `[4, 4]`, `x` is `[4]`.
    """
    figure = new_figure(13, 6.2)
    axes = figure.add_subplot()
    axes.set_xlim(-0.4, 23.9)
    axes.set_ylim(-4.8, 6.2)
    axes.set_aspect("equal")
    axes.axis("off")
    draw_matrix(axes, x[:, None], torch.zeros(4, 1), 0, "x")
    parts = []
    for rank, middle in ((0, 2.5), (1, -2.5)):
        half = slice(2 * rank, 2 * rank + 2)
        inner = first[half] @ x
        parts.append(second[:, half] @ inner)
        owner = [torch.full_like(each, rank + 1.0) for each in (first[half], inner, second[:, half], parts[-1])]
        draw_arrow(axes, (1.2, 0), (1.8, 0), (1.8, middle), (2.6, middle))
        draw_matrix(axes, first[half], owner[0], 2.8, f"rank {rank}: its rows", middle)
        draw_arrow(axes, (7.0, middle), (8.0, middle))
        draw_matrix(axes, inner[:, None], owner[1][:, None], 8.2, "half", middle)
        draw_arrow(axes, (9.4, middle), (11.2, middle))
        draw_matrix(axes, second[:, half], owner[2], 11.5, f"rank {rank}: its columns", middle)
        draw_arrow(axes, (13.7, middle), (14.7, middle))
        draw_matrix(axes, parts[-1][:, None], owner[3][:, None], 14.9, "a part", middle)
        draw_arrow(axes, (16.1, middle), (18.2, middle), (18.2, 0.62 if middle > 0 else -0.62))
    axes.plot([18.2], [0], "o", markersize=34, color="white", markeredgecolor="black", markeredgewidth=2)
    axes.text(18.2, -0.05, "+", ha="center", va="center", fontsize=FONT_SIZE + 9)
    axes.text(18.7, -1.0, "all-reduce", ha="left", va="center", fontsize=FONT_SIZE + 1, fontweight="bold")
    draw_arrow(axes, (18.9, 0), (21.5, 0))
    draw_matrix(axes, torch.stack(parts).sum(dim=0)[:, None], torch.zeros(4, 1), 21.7, "on both ranks")
    for place, words in ((4.8, "column-parallel"), (12.5, "row-parallel")):
        axes.text(place, 6.1, words, ha="center", va="top", fontsize=FONT_SIZE + 2, fontweight="bold")
    halves = f"{as_words(parts[0])} and {as_words(parts[1])}"
    alt = (
        "Two ranks side by side. Both get x. Column-parallel: each rank multiplies its two rows of the first matrix by "
        "x and has half of the numbers. Row-parallel: each multiplies its two columns of the second matrix by that "
        f"half and has a part of every result, {halves}. All-reduce: the parts are added up to "
        f"{as_words(parts[0] + parts[1])}, on both ranks."
    )
    return Picture(figure, alt)


def as_words(values: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in values.tolist())


def merge_picture(
    panels: Mapping[str, tuple[Sequence[Tensor], Callable[[list[Tensor]], Tensor]]], title: str, alt: str
) -> Picture:
    """Two ranks' parts and what they merge into: one framed panel per rule, the two rules for matrices first.

    `panels` maps a rule's name to its parts and its merge.
    """
    figure = new_figure(13, 5.7)
    figure.suptitle(title, fontsize=FONT_SIZE + 3)
    grid = figure.add_gridspec(2, 2, height_ratios=(5.4, 2.6))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    for number, (name, (parts, merge)) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        owners = [torch.full_like(part, rank + 1.0) for rank, part in enumerate(parts)]
        right = 0.0
        for rank, part in enumerate(parts):
            right = draw_matrix(axes, part, owners[rank], right + (0.8 if rank else 0.0), f"rank {rank}")
        draw_arrow(axes, (right + 0.25, 0), (right + 1.35, 0))
        right = draw_matrix(axes, merge(list(parts)), merge(owners), right + 1.6, "merged")
        axes.set_title(name, fontsize=FONT_SIZE + 1, fontweight="bold", loc="left")
        axes.set_xlim((right - 15.4) / 2, (right + 15.4) / 2)
        axes.set_ylim((-2.4, 3.2) if number < 2 else (-0.9, 1.6))
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#999999")
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
        start = max([end, *(memory for memory in memories if end < memory < end + 9)])  # not on a line
        axes.text(start + 1, row, f"{end:.2f} GiB", va="center", fontsize=FONT_SIZE)
    for memory in memories:
        on_white = [withStroke(linewidth=4, foreground="white")]  # so that a line is seen on a bar too
        axes.axvline(memory, color="black", linestyle="--", linewidth=1.6, zorder=3, path_effects=on_white)
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

"""Figures in one style: tensors and labels in, a picture with its alternative text out."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color/): told apart by colour-blind readers too
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
FONT_SIZE = 13
STYLES = [(BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-"), (SKY, "--")]


@dataclass(frozen=True)
class Picture:
    """A finished figure. As a cell's last expression it shows as an image with text for screen readers.

    `alt` says what there is to see. `figure` is kept so that tests can assert on what was drawn.
    """

    figure: Figure
    alt: str

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        data = base64.b64encode(self.png()).decode("ascii")
        image = f'<img alt="{html.escape(self.alt)}" src="data:image/png;base64,{data}" style="max-width: 100%">'
        return {"text/html": image, "text/plain": f"Figure: {self.alt}"}

    def png(self) -> bytes:
        """The figure in 256 colours, for a third of the bytes; a map, whose colours are numbers, in all that it has."""
        buffer, small = io.BytesIO(), io.BytesIO()
        self.figure.savefig(buffer, format="png")
        drawn = Image.open(buffer).convert("RGB")
        if not self.figure.findobj(lambda artist: isinstance(artist, AxesImage | QuadMesh)):
            drawn = drawn.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        drawn.save(small, "png")
        return small.getvalue()


@dataclass(frozen=True)
class Steps:
    """Pictures of one thing that moves, each under the label of its step, with a slider where a kernel runs.

    Elsewhere (a stored notebook, the site, print) the picture of the step `still` stands for all of them.
    """

    pictures: Mapping[str, Picture]
    still: str
    name: str  # what the slider moves along, such as "position"

    def _repr_mimebundle_(self, **_) -> dict:
        return (self.widget()._repr_mimebundle_() or {}) | self.pictures[self.still]._repr_mimebundle_()

    def widget(self):
        """The slider above the picture; arrow keys move it."""
        import ipywidgets

        shown = {label: each._repr_mimebundle_()["text/html"] for label, each in self.pictures.items()}
        slider = ipywidgets.SelectionSlider(
            options=list(shown), value=self.still, description=self.name, layout={"width": "60%"}
        )
        picture = ipywidgets.HTML(shown[self.still])
        slider.observe(lambda change: setattr(picture, "value", shown[change["new"]]), "value")
        return ipywidgets.VBox([slider, picture])


def new_figure(width: float = 8, height: float = 4.5) -> Figure:
    """An empty figure, its size in inches, at 100 dots per inch."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def finish_axes(axes, title: str, x_label: str, y_label: str) -> None:
    """Labels large enough for the back of a room, and no frame at the top and on the right."""
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    axes.set_xlabel(x_label, fontsize=FONT_SIZE)
    axes.set_ylabel(y_label, fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def as_list(values) -> list[float]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def lines(
    series: Mapping[str, tuple], title: str, x_label: str, y_label: str, alt: str, log_x: bool = False, log_y=False
) -> Picture:
    """Curves, each `label: (x values, y values)`: they differ in colour and in dashes, so that grey print works too."""
    figure = new_figure()
    axes = figure.add_subplot()
    for (label, (x, y)), (colour, style) in zip(series.items(), STYLES, strict=False):
        axes.plot(as_list(x), as_list(y), style, color=colour, linewidth=2.4, label=label)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    if len(series) > 1:  # on white, for curves may run behind it
        axes.legend(fontsize=FONT_SIZE, framealpha=0.9, edgecolor="none")
    finish_axes(axes, title, x_label, y_label)
    return Picture(figure, alt)


def bars(values: Mapping[str, float], title: str, y_label: str, alt: str, number_format: str = "{:.3g}") -> Picture:
    """One bar per name, with its value above it."""
    figure = new_figure()
    axes = figure.add_subplot()
    drawn = axes.bar(list(values), list(values.values()), color=BLUE, width=0.6)
    axes.bar_label(drawn, [number_format.format(value) for value in values.values()], fontsize=FONT_SIZE, padding=3)
    axes.margins(y=0.12)
    finish_axes(axes, title, "", y_label)
    return Picture(figure, alt)


def heat_map(
    matrix: Tensor,
    title: str,
    x_label: str,
    y_label: str,
    alt: str,
    unit: str,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    annotate: bool = False,
) -> Picture:
    """A `[rows, columns]` matrix as colours from dark (low) to bright (high), with a scale named `unit`.

    `x_ticks` and `y_ticks` label columns and rows; `annotate` writes each number into its cell, for small matrices.
    """
    rows, columns = matrix.shape
    figure = new_figure(8, 6 if x_ticks else 4.5)
    axes = figure.add_subplot()
    image = axes.imshow(matrix.numpy(), cmap="cividis", aspect="auto", interpolation="nearest")
    scale = figure.colorbar(image, ax=axes)
    scale.set_label(unit, fontsize=FONT_SIZE)
    scale.ax.tick_params(labelsize=FONT_SIZE - 1)
    finish_axes(axes, title, x_label, y_label)
    axes.grid(False)
    if x_ticks is not None:
        axes.set_xticks(range(columns), x_ticks, rotation=60 if max(map(len, x_ticks)) > 3 else 0, ha="center")
    if y_ticks is not None:
        axes.set_yticks(range(rows), y_ticks)
    if annotate:
        middle = (matrix.max() + matrix.min()).item() / 2
        for row in range(rows):
            for column in range(columns):
                value = matrix[row, column].item()
                colour = "black" if value > middle else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=FONT_SIZE)
    return Picture(figure, alt)


def loss_curves(history: list[dict]) -> Figure:
    """Training and validation loss against tokens seen; `history` as `training.run.train` returns it."""
    figure = new_figure()
    axes = figure.add_subplot()
    for key, name, colour, style in (
        ("loss", "training", BLUE, "-"),
        ("validation_loss", "validation", VERMILION, "--"),
    ):
        points = [(row["tokens"] / 1e6, row[key]) for row in history if key in row]  # at the start, validation only
        tokens, losses = zip(*points, strict=True)
        axes.plot(tokens, losses, style, color=colour, linewidth=2.2, label=f"{name}, {losses[-1]:.2f} at the end")
    axes.legend(fontsize=FONT_SIZE, frameon=False)
    finish_axes(axes, "What the model has learned", "million tokens seen", "loss, nats per token")
    return figure


@dataclass(frozen=True)
class TokenSpans:
    """Tokens as coloured spans, each with its id as a tooltip; neighbours differ in colour and by a border.

    `tokens` holds (text, token id) pairs. Text is escaped, spaces and line ends are made visible.
    """

    tokens: tuple[tuple[str, int], ...]
    colours = ("#cfe8f7", "#fde9c4", "#cdeee2", "#f6d9c9", "#efdcea")

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        spans = []
        for index, (text, token_id) in enumerate(self.tokens):
            shown = html.escape(text).replace(" ", "&middot;").replace("\n", "&#8629;<br>")
            style = f"background:{self.colours[index % len(self.colours)]};color:#111;border-right:1px solid #555"
            spans.append(f'<span title="id {token_id}" style="{style};padding:1px 2px">{shown}</span>')
        page = f'<div style="font-family:monospace;font-size:16px;line-height:2">{"".join(spans)}</div>'
        return {"text/html": page, "text/plain": "|".join(text for text, _ in self.tokens)}


def token_spans(tokenizer, ids: Sequence[int]) -> TokenSpans:
    """The tokens of `ids` as spans; a token that is no whole character shows its bytes, such as <E2 82>."""
    from neox_lib.inspection.tokens import token_label

    return TokenSpans(tuple((token_label(tokenizer, token_id), int(token_id)) for token_id in ids))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal random numbers from a CPU generator: the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

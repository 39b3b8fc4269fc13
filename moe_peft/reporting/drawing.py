"""Drawing: a sheet laid out in inches, once as SVG that takes the page's colours, once as PNG.

Heat maps are one hue whose opacity grows with the value: they read on a light and on a dark ground, and by those who
tell no colours apart. Where values may be negative, numbers in the cells tell their sign.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_peft.reporting.theme import HEAT, INK, LINE, MUTED, PAPER, SERIES, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAP = 0.08
"""Inches between a label and what it labels."""
LETTER = 0.066
"""Inches of a letter of the usual size, at most."""
KEY = 3.5
"""Inches that a heat map's key needs, its unit included."""
CELLS_WITH_NUMBERS = 600
MOST_PIXELS = 30_000
"""Of a PNG's longer side; matplotlib draws no more than twice as many."""
LABELS = 24
SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 5.0,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.5,
    "image.composite_image": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "moe_peft",
}


class Picture(NamedTuple):
    """A finished figure and the numbers that were drawn."""

    name: str
    """The stem of its files."""
    title: str
    caption: str
    """What a reader looks for, in a sentence."""
    alt: str
    svg: str
    png: bytes
    header: list[str]
    rows: list[tuple]


class Sheet:
    """A figure that is laid out in inches from its top left corner.

    Args:
        width: inches.
        height: inches.
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor=PAPER)
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Adds axes."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Writes a line whose middle is at a height."""
        style = {"va": "center_baseline", "fontsize": 8} | style
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)

    def legend(self, left: float, top: float, labels: Sequence[str], colors: Sequence[str], styles: Any = None) -> None:
        """Writes a line of labels, each after a short stroke of its colour."""
        from matplotlib.lines import Line2D

        for label, color, style in zip(labels, colors, styles or "-" * len(labels), strict=True):
            x, y = [left / self.width, (left + 0.22) / self.width], [1 - top / self.height] * 2
            self.figure.add_artist(Line2D(x, y, color=color, ls=style, linewidth=1.8))
            self.text(left + 0.28, top, label, color=MUTED)
            left += 0.28 + LETTER * len(label) + 0.2

    def picture(
        self, name: str, title: str, caption: str, alt: str, header: Sequence[str], rows: Sequence[tuple]
    ) -> Picture:
        """Renders it."""
        png, svg = io.BytesIO(), io.StringIO()
        dpi = min(160.0, MOST_PIXELS / max(self.width, self.height))
        self.figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None, "Description": alt})
        self.figure.patch.set_visible(False)
        self.figure.savefig(svg, format="svg", metadata={"Date": None})
        text = themed(svg.getvalue(), name, self.width, self.height)
        return Picture(name, title, caption, alt, text, png.getvalue(), list(header), list(rows))


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Within it, sheets are drawn in the house's style, and nobody else's settings count."""
    import logging
    import warnings

    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The PNG's font lacks some scripts' letters; the page's has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def short(name: str, limit: int = 26) -> str:
    """Cuts a name that is too long for a picture, and keeps it on one line."""
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 1] + "…"


def gutter(names: Sequence[str]) -> float:
    """Inches that labels need beside an axis."""
    return 2 * GAP + LETTER * max((len(short(name)) for name in names), default=0)


def heat(axes: "Axes", values: np.ndarray, top: float, gamma: float = 1.0, numbers: str | None = None) -> None:
    """Fills axes with a heat map: nothing at 0, the full colour at `top`, a grey cell where there is no value.

    What is below 0 has a colour of its own, full at -`top`.

    Args:
        axes: to draw in; rows from the top.
        values: [rows, columns], nan for nothing.
        top: the value of the full colour.
        gamma: exponent of the opacity; below 1 small values show better.
        numbers: format of the number in every cell where it does not come to 0; None writes none.
    """
    from matplotlib.colors import to_rgb

    opacity = np.clip(np.abs(np.nan_to_num(values)) / top, 0, 1) ** gamma
    missing = np.isnan(values)
    image = np.empty((*values.shape, 4))
    image[..., :3] = np.where(values[..., None] < 0, to_rgb(SERIES[1]), to_rgb(HEAT))
    image[missing, :3] = to_rgb("#8a919a")
    image[..., 3] = np.where(missing, 0.18, opacity)
    axes.imshow(image, interpolation="none", aspect="auto")
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.tick_params(length=0)
    if numbers is not None and values.size <= CELLS_WITH_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            text = format(value, numbers)
            if not np.isnan(value) and text.strip("0."):
                color = "#ffffff" if opacity[row, column] > 0.8 else INK
                axes.text(column, row, text, ha="center", va="center_baseline", fontsize=7, color=color)


def matrix(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, top: float, gamma: float, numbers: str
) -> tuple[Sheet, float]:
    """Draws a heat map with names on both sides and room for a key below it.

    Returns:
        The sheet, and how far from its left the map begins.
    """
    left, above = gutter(rows), gutter(columns) if max(map(len, columns)) > 4 else 0.3
    wide, high = span(len(columns), 0.36), span(len(rows), 0.26)
    sheet = Sheet(left + max(wide, KEY) + 0.2, above + high + 0.5)
    axes = sheet.axes(left, above, wide, high)
    heat(axes, values, top, gamma, numbers)
    upright = above > 0.3
    label_axis(axes.yaxis, rows, most=int(high / 0.13))
    label_axis(axes.xaxis, columns, most=int(wide / (0.13 if upright else 0.34)), rotation=90 if upright else 0)
    axes.xaxis.tick_top()
    return sheet, left


def span(cells: int, usual: float) -> float:
    """Inches for so many cells, which are of the usual size unless they would be wider than two pages."""
    return cells * max(min(usual, 20 / cells), 0.02)


def label_axis(axis: Any, names: Sequence[str], most: int = LABELS, **style: Any) -> None:
    """Labels the places 0, 1, … of an axis; every second, third, … where they would be too many."""
    step = -(-len(names) // most)
    axis.set_ticks(range(0, len(names), step), [short(name) for name in names[::step]], **style)


def key(
    sheet: Sheet, left: float, top: float, marks: dict[float, str], high: float, unit: str = "", gamma: float = 1.0
) -> None:
    """Draws what a heat map's colour means: a strip from 0 to `high`, with marks below it and the unit beside it."""
    axes = sheet.axes(left, top, 1.6, 0.1)
    heat(axes, np.linspace(0, 1, 48)[None, :], 1.0)  # even steps of opacity, whatever the exponent
    axes.set_yticks([])
    axes.set_xticks([47 * (value / high) ** gamma for value in marks], list(marks.values()), fontsize=7)
    axes.tick_params(length=2, pad=2)
    sheet.text(left + 1.72, top + 0.05, unit, color=MUTED, fontsize=7.5)

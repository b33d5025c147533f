"""Inline SVGs with axes, drawn by matplotlib: curves, over-optimisation, values with intervals.

Text and axes take the page's text colour, to be readable in light and dark, and lines differ in
more than their colour. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fourstage.report.files import Metric, Points

INK = "#010203"  # stands for the page's text colour until the SVG is text
COLOURS = ("#3a85d0", "#e0762f", "#2e9e6b", "#b05cc8", "#c8434f", "#8a7a2e")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"


def lines(xlabel: str, ylabel: str, series: Mapping[str, Points]) -> str:
    """One line for each of the series, points (x, y)."""

    def draw(axes: Any) -> None:
        for n, (name, points) in enumerate(series.items()):
            marker = "." if len(points) < 20 else None
            style = {"color": _nth(COLOURS, n), "ls": _nth(DASHES, n), "marker": marker}
            axes.plot(*zip(*points, strict=True), label=name, lw=1.4, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _svg(draw, (4.6, 2.7), ylabel, xlabel)


def over_optimisation(xlabel: str, ylabel: str, series: Mapping[str, Points]) -> str:
    """Scores against KL, x on a square-root axis (Gao et al. 2022, arXiv 2210.10760, section 3).

    Every rollout is a dot, and the line joins means of `group_size` neighbours in KL. A small KL
    may have a negative estimate, which is drawn at 0.
    """

    def draw(axes: Any) -> None:
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        furthest = max(x for points in series.values() for x, _ in points)
        for n, (name, points) in enumerate(series.items()):
            points = sorted((max(x, 0.0), y) for x, y in points)
            style = {"color": _nth(COLOURS, n), "marker": MARKERS[n], "ls": "none"}
            axes.plot(*zip(*points, strict=True), ms=3, alpha=0.35, mew=0, **style)
            means = neighbours(points, group_size(points))
            style |= {"ls": _nth(DASHES, n), "ms": 5}
            axes.plot(*zip(*means, strict=True), label=name, lw=1.6, **style)
        axes.set_xlim(0, max(furthest, 1e-3) * 1.05)
        axes.locator_params("x", nbins=5)

    return _svg(draw, (5.0, 3.0), ylabel, xlabel)


def intervals(
    groups: Sequence[str], ylabel: str, series: Mapping[str, Sequence[Metric | None]]
) -> str:
    """For each group and each of the series a value with its interval, if it was measured; each of
    the series has at least one."""

    def draw(axes: Any) -> None:
        for n, (name, cells) in enumerate(series.items()):
            shift = 0.7 * ((n + 0.5) / len(series) - 0.5)
            x, y, low, high = np.array(
                [
                    (at + shift, cell["value"], cell["low"], cell["high"])
                    for at, cell in enumerate(cells)
                    if cell is not None and cell["value"] is not None
                ]
            ).T
            style = {"color": _nth(COLOURS, n), "fmt": _nth(MARKERS, n), "ms": 5, "capsize": 2}
            axes.errorbar(x, y, np.maximum(0, [y - low, high - y]), label=name, **style)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.5, len(groups) + 0.15)  # the legend stands beside the last group

    return _svg(draw, (5.0, 3.0), ylabel, legend="right")


def group_size(points: Points) -> int:
    """How many rollouts each point of the over-optimisation line averages: 12 points or so."""
    return math.ceil(len(points) / 12)


def neighbours(points: Points, width: int) -> Points:
    """Means of each `width` neighbouring points, in the order given."""
    parts = [points[at : at + width] for at in range(0, len(points), width)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _nth(values: Sequence[str], n: int) -> str:
    return values[n % len(values)]


def _svg(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    title: str,
    xlabel: str = "",
    legend: str = "best",
) -> str:
    """The axes that `draw` fills, as inline SVG without sizes, times or styles of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor")
    ink += ("xtick.color", "ytick.color", "grid.color")
    fixed = {"svg.hashsalt": "fourstage", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style would change the bytes
        matplotlib.rcParams.update(fixed | dict.fromkeys(ink, INK))
        figure = Figure(figsize=size)
        # inches round the axes; a layout engine would draw everything three times
        left, right, bottom, top, (width, height) = 0.55, 0.1, 0.5, 0.3, size
        inside = (1 - (left + right) / width, 1 - (bottom + top) / height)
        axes = figure.add_axes((left / width, bottom / height, *inside))
        draw(axes)
        axes.set_xlabel(xlabel)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc=legend)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return re.sub(r"\s*\n\s*", "\n", svg).strip().replace(INK, "currentColor")

"""The report's drawings as inline SVGs, made by matplotlib: curves, over-optimisation, values with
intervals, the ladder as a graph, the routers' heat maps.

Text and axes take the page's text colour, to be readable in light and dark, and whatever a colour
says is also said by a shape or in text. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourstage.report.files import Metric, Points

INK = "#010203"  # stands for the page's text colour until the SVG is text
COLOURS = ("#3a85d0", "#e0762f", "#2e9e6b", "#b05cc8", "#c8434f", "#8a7a2e")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"
GROUPS = 12  # of neighbouring rollouts in the over-optimisation chart


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

    Every rollout is a dot, and the line joins means of neighbours in KL. A small KL may have a
    negative estimate, which is drawn at 0.
    """

    def draw(axes: Any) -> None:
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        furthest = max(x for points in series.values() for x, _ in points)
        for n, (name, points) in enumerate(series.items()):
            points = sorted((max(x, 0.0), y) for x, y in points)
            style = {"color": _nth(COLOURS, n), "marker": MARKERS[n], "ls": "none"}
            axes.plot(*zip(*points, strict=True), ms=3, alpha=0.35, mew=0, **style)
            style |= {"ls": _nth(DASHES, n), "ms": 5}
            axes.plot(*zip(*thinned(points, GROUPS), strict=True), label=name, lw=1.6, **style)
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


def thinned(points: Points, most: int) -> Points:
    """At most `most` points: means of neighbours, in the order given."""
    width = max(1, math.ceil(len(points) / most))
    parts = [points[at : at + width] for at in range(0, len(points), width)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


@dataclass(frozen=True)
class Node:
    """A stage of the ladder: its name, lines of small text, and the stages that it started from."""

    name: str
    lines: Sequence[str]
    parents: Sequence[str]


def lineage(nodes: Sequence[Node], across: bool) -> str:
    """The nodes, each after its parents, with arrows: from left to right, or downwards.

    A node that is another's second parent (the reward model) is drawn beside the line.
    """
    level: dict[str, int] = {}
    for node in nodes:  # parents come first
        level[node.name] = max((level[p] + 1 for p in node.parents if p in level), default=0)
    aside = {parent for node in nodes for parent in node.parents[1:]}
    width, height = 138, 30 + 15 * max(len(node.lines) for node in nodes)
    corners = {}
    for name, at in level.items():
        x, y = (at, name in aside) if across else (name in aside, at)
        corners[name] = x * (width + 28), y * (height + 26)
    right, bottom = (max(values) for values in zip(*corners.values(), strict=True))

    def draw(axes: Any) -> None:
        from matplotlib.patches import FancyBboxPatch

        boxes: dict[str, Any] = {}
        for node in nodes:
            x, y = corners[node.name]
            shape, fill = "round,pad=0,rounding_size=7", (COLOURS[0], 0.13)
            box = FancyBboxPatch((x, y), width, height, shape, fc=fill, ec=COLOURS[0])
            boxes[node.name] = axes.add_patch(box)
            axes.text(x + 9, y + 19, node.name, size=14, weight="bold")
            for n, line in enumerate(node.lines):
                axes.text(x + 9, y + 36 + 15 * n, line, size=10)
            for parent in (parent for parent in node.parents if parent in boxes):
                ends = [(a + width / 2, b + height / 2) for a, b in (corners[parent], (x, y))]
                arrow = {"arrowstyle": "-|>", "patchA": boxes[parent], "patchB": box, "color": INK}
                axes.annotate("", ends[1], ends[0], arrowprops=arrow)

    return _svg(draw, ((right + width + 4) / 72, (bottom + height + 4) / 72))


def heat_map(shares: Sequence[Sequence[float]], top: float) -> str:
    """Layers down, experts across: each layer's shares of load; `top` has the deepest colour.

    Each line ends with the busiest expert's load over the mean and the number of dead experts.
    """
    experts = len(shares[0])
    height, size = (24, 9 if experts <= 8 else 7) if experts <= 16 else (14, 0)
    left, cell, right = 20, 272 / experts, 300

    def draw(axes: Any) -> None:
        from matplotlib.colors import ListedColormap

        axes.text(left, 9, f"expert 0 to {experts - 1}, share of load in %")
        axes.text(right, 9, "max/mean, dead")
        x, y = left + cell * np.arange(experts + 1), 16 + height * np.arange(len(shares) + 1)
        depth = 0.85 * np.array(shares) / top
        colour = ListedColormap([COLOURS[0]])
        axes.pcolormesh(x, y, depth, cmap=colour, alpha=depth, edgecolor=INK, linewidth=0.3)
        for layer, row in enumerate(shares):
            middle = {"y": y[layer] + height / 2, "va": "center_baseline"}
            axes.text(2, s=str(layer), **middle)
            for expert, share in enumerate(row if size else ()):
                text = f"{100 * share:.{0 if share == 0 or share >= 0.1 else 1}f}"
                axes.text(x[expert] + cell / 2, s=text, size=size, ha="center", **middle)
            dead = sum(share == 0 for share in row)
            axes.text(right, s=f"{max(row) * experts:.2f}, {dead}", **middle)

    return _svg(draw, (5.4, (20 + height * len(shares)) / 72))


def _nth(values: Sequence[str], n: int) -> str:
    return values[n % len(values)]


def _svg(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    title: str = "",
    xlabel: str = "",
    legend: str = "best",
) -> str:
    """The axes that `draw` fills, as inline SVG without sizes, times or styles of its own.

    Without a title there are no axes to see, and x and y are points from the top left corner.
    """
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
        left, right, bottom, top = (0.55, 0.1, 0.5, 0.3) if title else (0, 0, 0, 0)
        width, height = size
        inside = (1 - (left + right) / width, 1 - (bottom + top) / height)
        axes = figure.add_axes((left / width, bottom / height, *inside))
        if not title:
            axes.set(xlim=(-2, 72 * width - 2), ylim=(72 * height - 2, -2))
            axes.axis("off")
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

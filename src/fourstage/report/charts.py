"""The report's drawings, made by matplotlib: goals before and after, curves, over-optimisation,
values with intervals, groups of seeds as dots, the ladder as a graph, the routers' heat maps.

In the page, text and axes take the page's text colour, to be readable in light and dark; in a file
of its own a drawing is black on white. Whatever a colour says is also said by a shape or in text.
The same figures give the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourstage.report.files import Metric, Points

INK = "#010203"  # stands for the page's text colour until the SVG is text
COLOURS = ("#3a85d0", "#e0762f", "#2e9e6b", "#b05cc8", "#c8434f", "#8a7a2e")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"
NAME = 40  # characters of a group's name in a dot plot
GROUPS = 12  # of neighbouring rollouts in the over-optimisation chart


@dataclass(frozen=True)
class Drawing:
    """An inline <svg> without sizes, times or styles of its own, and what it was drawn from."""

    svg: str
    plot: Any  # matplotlib's figure

    def files(self, title: str) -> dict[str, bytes]:
        """The drawing under its title as files, by their endings."""
        from matplotlib.transforms import Bbox

        width, height = self.plot.get_size_inches()
        top = height + 0.35
        found = {}
        with _style():
            self.plot.text(0, (top - 0.1) / height, title, size=11, va="top")
            for kind, data in (("svg", {"Date": None}), ("png", {"Software": None})):
                out = io.BytesIO()
                box = Bbox([[-0.1, -0.1], [width + 0.1, top]])
                options = {"facecolor": "white", "dpi": 160, "metadata": data}
                self.plot.savefig(out, format=kind, bbox_inches=box, **options)
                found[kind] = out.getvalue().replace(INK.encode(), b"#000000")
        return found


@dataclass(frozen=True)
class Strip:
    """A key before and after a stage, on a scale of its own whose right end is the better one."""

    stage: str
    title: str
    said: str  # the values in text
    cells: tuple[Metric, Metric]  # a cell without a value is not drawn
    scale: tuple[float, float]  # from left to right
    ends: tuple[str, str]  # the same in text


def before_after(strips: Sequence[Strip]) -> Drawing:
    """One strip below the other: a hollow circle before, a filled diamond after, with intervals."""
    left, right, height, top = 4, 352, 45, 20

    def draw(axes: Any) -> None:
        looks = ("before", INK, "o", "none", -4), ("after", COLOURS[0], "D", COLOURS[0], 4)
        for n, (name, colour, marker, fill, _) in enumerate(looks):
            x = left + 4 + 60 * n
            axes.plot(x, 7, marker=marker, ms=6, color=colour, mfc=fill)
            axes.text(x + 8, 7, name, size=10, va="center_baseline")
        axes.text(right, 7, "further right is better", size=10, ha="right", va="center_baseline")
        for n, strip in enumerate(strips):
            y = top + height * n
            axes.text(left, y + 10, strip.stage, size=10, weight="bold")
            axes.text(left + 58, y + 10, strip.title, size=10)
            axes.text(right, y + 10, strip.said, size=10, ha="right")
            axes.plot([left, right], [y + 24, y + 24], color=INK, lw=0.8, alpha=0.35)
            for x, text, side in zip((left, right), strip.ends, ("left", "right"), strict=True):
                axes.text(x, y + 39, text, size=8, ha=side)
            start, end = strip.scale
            for cell, (_, colour, marker, fill, shift) in zip(strip.cells, looks, strict=True):
                if cell["value"] is None:
                    continue
                x, a, b = (
                    left + (right - left) * (cell[key] - start) / (end - start)
                    for key in ("value", "low", "high")
                )
                error = None if a == b else np.maximum(0, [[x - min(a, b)], [max(a, b) - x]])
                style = {"fmt": marker, "ms": 6, "color": colour, "mfc": fill, "capsize": 2.5}
                axes.errorbar(x, y + 24 + shift, xerr=error, **style)

    return _drawing(draw, (5.0, (top + height * len(strips)) / 72))


def lines(xlabel: str, ylabel: str, series: Mapping[str, Points]) -> Drawing:
    """One line for each of the series, points (x, y)."""

    def draw(axes: Any) -> None:
        for n, (name, points) in enumerate(series.items()):
            marker = "." if len(points) < 20 else None
            style = {"color": _nth(COLOURS, n), "ls": _nth(DASHES, n), "marker": marker}
            axes.plot(*zip(*points, strict=True), label=name, lw=1.4, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _drawing(draw, (4.6, 2.7), ylabel, xlabel)


def over_optimisation(xlabel: str, ylabel: str, series: Mapping[str, Points]) -> Drawing:
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

    return _drawing(draw, (5.0, 3.0), ylabel, xlabel)


def intervals(
    groups: Sequence[str], ylabel: str, series: Mapping[str, Sequence[Metric | None]]
) -> Drawing:
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
        axes.set_xlim(-0.5, len(groups) + 0.35)  # the legend stands beside the last group

    return _drawing(draw, (5.0, 3.0), ylabel, legend="right")


def thinned(points: Points, most: int) -> Points:
    """At most `most` points: means of neighbours, in the order given."""
    width = max(1, math.ceil(len(points) / most))
    parts = [points[at : at + width] for at in range(0, len(points), width)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


@dataclass(frozen=True)
class Dots:
    """A group in a panel: a dot for each run, and their mean with its interval."""

    name: str
    values: Sequence[float]
    mean: float
    ends: tuple[float, float] | None  # of the interval


def row_names(names: Sequence[str]) -> list[str]:
    """The names as they fit beside the rows: if one is too long, all go without the settings that
    they share, and what is still too long is cut in the middle."""
    if max(map(len, names)) > NAME:
        parts = [re.split(r", (?![^{]*\})", name) for name in names]
        same = set.intersection(*map(set, parts)) if len(names) > 1 else set()
        left = [", ".join(part for part in each if part not in same) for each in parts]
        names = [short or name for short, name in zip(left, names, strict=True)]
    half = NAME // 2
    return [n if len(n) <= NAME else f"{n[:half]}…{n[half + 1 - NAME :]}" for n in names]


def dot_plot(panels: Sequence[tuple[str, Sequence[Dots]]]) -> Drawing:
    """One panel below the other, each with a title and a scale of its own: groups as rows, a hollow
    circle for each run, a filled diamond for their mean with its interval."""
    labels = [row_names([dots.name for dots in groups]) for _, groups in panels]
    longest = max(len(name) for names in labels for name in names)
    left, right, step, top, below = 12 + 4.6 * longest, 436, 15, 26, 30
    heights = [top + step * len(groups) + below for _, groups in panels]

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        y = 0
        for (title, groups), names, height in zip(panels, labels, heights, strict=True):
            every = [v for d in groups for v in (*d.values, d.mean, *(d.ends or ()))]
            edge = 0.05 * (max(every) - min(every)) or 0.05 * abs(max(every)) or 1.0
            start, end = min(every) - edge, max(every) + edge
            bottom = y + top + step * len(groups)

            def at(value: float, start: float = start, end: float = end) -> float:
                return left + (right - left) * (value - start) / (end - start)

            axes.text(2, y + 14, title, size=10, weight="bold")
            axes.plot([left, right], [bottom, bottom], color=INK, lw=0.8, alpha=0.5)
            ticks = MaxNLocator(5).tick_values(start, end)
            for tick in (float(tick) for tick in ticks if start <= tick <= end):
                axes.plot([at(tick)] * 2, [y + top - 4, bottom], color=INK, lw=0.6, alpha=0.15)
                axes.text(at(tick), bottom + 11, f"{tick:.6g}", size=8, ha="center")
            for n, dots in enumerate(groups):
                middle = y + top + step * n + 4
                axes.text(2, middle, names[n], size=8.5, va="center_baseline")
                style = {"marker": "o", "ls": "none", "ms": 4, "mfc": "none", "color": COLOURS[1]}
                axes.plot([at(v) for v in dots.values], [middle] * len(dots.values), **style)
                low, high = dots.ends or (dots.mean, dots.mean)
                error = (
                    None if low == high else [[at(dots.mean) - at(low)], [at(high) - at(dots.mean)]]
                )
                style = {"fmt": "D", "ms": 4.5, "color": COLOURS[0], "capsize": 2.5}
                axes.errorbar(at(dots.mean), middle, xerr=error, **style)
            y += height

    return _drawing(draw, (440 / 72, sum(heights) / 72))


@dataclass(frozen=True)
class Node:
    """A stage of the ladder: its name, lines of small text, and the stages that it started from."""

    name: str
    lines: Sequence[str]
    parents: Sequence[str]


def lineage(nodes: Sequence[Node], across: bool) -> Drawing:
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

    return _drawing(draw, ((right + width + 4) / 72, (bottom + height + 4) / 72))


def heat_map(shares: Sequence[Sequence[float]], top: float) -> Drawing:
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

    return _drawing(draw, (5.4, (20 + height * len(shares)) / 72))


def _nth(values: Sequence[str], n: int) -> str:
    return values[n % len(values)]


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib with this module's style: a user's own would change the bytes."""
    import matplotlib

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor")
    ink += ("xtick.color", "ytick.color", "grid.color")
    fixed = {"svg.hashsalt": "fourstage", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(fixed | dict.fromkeys(ink, INK))
        yield


def _drawing(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    title: str = "",
    xlabel: str = "",
    legend: str = "best",
) -> Drawing:
    """The axes that `draw` fills. Without a title there are no axes to see, and x and y are points
    from the top left corner."""
    from matplotlib.figure import Figure

    with _style():
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
    svg = re.sub(r"\s*\n\s*", "\n", svg).strip()
    return Drawing(svg.replace(INK, "currentColor"), figure)

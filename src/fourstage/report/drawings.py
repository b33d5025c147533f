"""Inline SVGs without axes: the ladder as a graph, and the routers' heat maps.

They take the page's text colour, and whatever a colour says is also said in text.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

COLOUR = "#3a85d0"


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
    size = (width, height) if across else (height, width)  # along the line, and beside it
    corners = {
        name: (at * (size[0] + 28), (size[1] + 26) * (name in aside)) for name, at in level.items()
    }

    def xy(point: tuple[int, int]) -> tuple[int, int]:
        return point if across else (point[1], point[0])

    parts = []
    for node in nodes:
        for parent in node.parents:
            if parent in corners:
                path = map(xy, _arrow(corners[parent], corners[node.name], size))
                d = "L".join(f"{x} {y}" for x, y in path)
                parts.append(f'<path d="M{d}" {_LINE} marker-end="url(#tip)"/>')
    parts += [_box(node, xy(corners[node.name]), width, height) for node in nodes]
    right = max(xy(corner)[0] for corner in corners.values()) + width
    bottom = max(xy(corner)[1] for corner in corners.values()) + height
    return _wrapped((-2, -2, right + 4, bottom + 4), [_TIP, *parts])


_LINE = 'fill="none" stroke="currentColor" stroke-width="1.2"'
_TIP = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
    'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
)


def _box(node: Node, corner: tuple[int, int], width: int, height: int) -> str:
    x, y = corner
    rect = (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{COLOUR}" '
        f'fill-opacity="0.13" stroke="{COLOUR}" stroke-width="1.2"/>'
    )
    texts = [_label(x + 9, y + 19, node.name, 14, 'font-weight="600"')]
    texts += [_label(x + 9, y + 36 + 15 * n, line, 11) for n, line in enumerate(node.lines)]
    return "\n".join([rect, *texts])


def _arrow(
    start: tuple[int, int], end: tuple[int, int], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Points (along, beside) from box to box: straight on, or with one bend to the side or back."""
    (a0, b0), (a1, b1) = start, end
    long, broad = size
    if b0 < b1:  # leaves at its side
        turn = (a0 + long // 2, b1 + broad // 2)
        return [(turn[0], b0 + broad), turn, (a1, turn[1])]
    if b0 > b1:  # arrives at the other's side
        turn = (a1 + long // 2, b0 + broad // 2)
        return [(a0 + long, turn[1]), turn, (turn[0], b1 + broad)]
    return [(a0 + long, b0 + broad // 2), (a1, b1 + broad // 2)]


def heat_map(shares: Sequence[Sequence[float]], top: float) -> str:
    """Layers down, experts across: each layer's shares of load; `top` has the deepest colour.

    Each line ends with the busiest expert's load over the mean and the number of dead experts.
    """
    experts = len(shares[0])
    cell = min(34, max(6, 400 // experts))
    has_room = cell >= 24  # for the shares as text
    height, left = 24 if has_room else 14, 24
    right = left + cell * experts
    parts = [_label(left, 10, f"expert 0 to {experts - 1}, share of load in %", 10)]
    parts.append(_label(right + 6, 10, "max/mean, dead", 10))
    for layer, row in enumerate(shares):
        y = 16 + height * layer
        middle = y + height // 2 + 4
        parts.append(_label(2, middle, str(layer), 10))
        for expert, share in enumerate(row):
            x = left + cell * expert
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{height}" fill="{COLOUR}" '
                f'fill-opacity="{0.85 * share / top:.3f}" stroke="currentColor" '
                'stroke-opacity="0.25" stroke-width="0.5"/>'
            )
            if has_room:
                text = f"{100 * share:.0f}" if share == 0 or share >= 0.1 else f"{100 * share:.1f}"
                parts.append(_label(x + cell // 2, middle, text, 9, 'text-anchor="middle"'))
        dead = sum(share == 0 for share in row)
        parts.append(_label(right + 6, middle, f"{max(row) * experts:.2f}, {dead}", 10))
    return _wrapped((0, 0, right + 96, 20 + height * len(shares)), parts)


def _label(x: int, y: int, text: str, size: int, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" {style}>{html.escape(text)}</text>'


def _wrapped(box: tuple[int, int, int, int], parts: Sequence[str]) -> str:
    """An <svg> that never grows much beyond the size that its text is meant for."""
    head = f'viewBox="{" ".join(map(str, box))}" style="max-width: {1.2 * box[2]:.0f}px"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}>\n{body}\n</svg>'

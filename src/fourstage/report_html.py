"""A document of a few kinds of blocks, written as Markdown and as one self-contained HTML page.

Text in the blocks is plain text: both writers escape it. The same blocks give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Answers:
    """One prompt and what each stage answered: (stage, answer, or None for no sample, remark)."""

    prompt: str
    by_stage: Sequence[tuple[str, str | None, str]]


@dataclass(frozen=True)
class Charts:
    """Line charts over training steps: (title, unit, series). Only the HTML page draws them."""

    charts: Sequence[tuple[str, str, dict[str, Points]]]


Block = Heading | Paragraph | Bullets | Table | Answers | Charts


# --- Markdown


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as GitHub-flavoured Markdown."""
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_inline(text)}"
        case Paragraph(text):
            return _line(text)
        case Bullets(items):
            return "\n".join(f"- {_line(item)}" for item in items)
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(
                "| "
                + " | ".join(cell if line is lines[1] else _inline(cell) for cell in line)
                + " |"
                for line in lines
            )
        case Answers(prompt, by_stage):
            parts = [f"### {_inline(prompt)}"]
            for stage, answer, remark in by_stage:
                parts.append(f"**{_inline(stage)}**" + (f" ({_inline(remark)})" if remark else ""))
                if answer is not None:
                    parts.append(_fenced(answer))
            return "\n\n".join(parts)
        case Charts():
            return "The curves are drawn in report.html."


def _line(text: str) -> str:
    """`text` as a paragraph of one line, whatever it begins with."""
    return re.sub(r"^(\d*)([#+.)-]+(?=\s|$)|\[)", r"\1\\\2", _inline(text))


def _inline(text: str) -> str:
    """One line of Markdown that shows `text` as it is."""
    line = re.sub(r"\s*\n\s*", " / ", _visible(text)).strip()
    line = re.sub(r"([\\`*<>|&~$]|\](?=[(\[])|\[(?=\^))", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{_visible(text)}\n{fence}"


def _visible(text: str) -> str:
    """Control characters, which neither format may hold, as the replacement character."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


# --- HTML

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --link: #2a6fb8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: left;
  vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11.5rem, 100%), 1fr));
  gap: .6rem; }
.answers > div { background: var(--soft); border: 1px solid var(--line); border-radius: .4rem;
  padding: .5rem .7rem; }
.answers small { opacity: .75; }
pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.4 ui-monospace, monospace; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .9rem; }
svg { width: 100%; height: auto; } svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  .wide { overflow: visible; } th, td { padding: .2rem .4rem; }
  figure, tr, .answers > div { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page: no script, nothing loaded, light and dark, phone and print."""
    body = "\n".join(_html_block(block, n) for n, block in enumerate(blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(_visible(text))


def _html_block(block: Block, number: int) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_text(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_text(item)}</li>" for item in items) + "\n</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
            lines = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            return (
                f'<div class="wide">\n<table>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
            )
        case Answers(prompt, by_stage):
            cells = "\n".join(_answer(*item) for item in by_stage)
            return f'<h3>{_text(prompt)}</h3>\n<div class="answers">\n{cells}\n</div>'
        case Charts(charts):
            figures = "\n".join(
                f"<figure>\n<figcaption>{_text(title)}</figcaption>\n"
                f"{line_chart(title, unit, series, f'c{number}-{n}-')}\n</figure>"
                for n, (title, unit, series) in enumerate(charts)
            )
            return f'<div class="charts">\n{figures}\n</div>'


def _cell(text: str) -> str:
    """A cell that breaks before an interval and not within it."""
    text = re.sub(r"\[[^\]]*\]| %|n \d+", lambda m: m.group().replace(" ", "\xa0"), text)
    return f"<td>{_text(text)}</td>"


def _answer(stage: str, answer: str | None, remark: str) -> str:
    small = f" <small>({_text(remark)})</small>" if remark else ""
    # the newline after <pre> is dropped by HTML, so that an answer's own first newline stays
    body = "" if answer is None else f"\n<pre>\n{_text(answer)}</pre>"
    return f"<div><strong>{_text(stage)}</strong>{small}{body}</div>"


_INK = "#010203"  # stands for the page's own text colour until the SVG is text
_COLOURS = ("#3a85d0", "#e0762f", "#2e9e6b", "#b05cc8", "#c8434f", "#8a7a2e")


def line_chart(title: str, unit: str, series: dict[str, Points], prefix: str) -> str:
    """An inline SVG of the series against training steps; `prefix` keeps its ids apart.

    Text and axes take the page's colour, so that the chart is readable in light and dark.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style would change the bytes
        matplotlib.rcParams.update(
            {"svg.hashsalt": prefix, "svg.fonttype": "none", "font.size": 9}
            | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _INK)
            | dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _INK)
        )
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), colour in zip(series.items(), _COLOURS * len(series), strict=False):
            marker = "." if len(points) < 20 else None
            axes.plot(*zip(*points, strict=True), label=name, color=colour, lw=1.4, marker=marker)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    label = html.escape(_visible(title), quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return re.sub(r"\s*\n\s*", "\n", svg).strip().replace(_INK, "currentColor")

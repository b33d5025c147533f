"""A document of a few kinds of blocks, written as Markdown and as one self-contained HTML page.

The blocks hold plain text, which both writers escape. The same blocks give the same bytes. Drawings
are in the page, and files of their own in a folder, which Markdown shows.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourstage.files import write_atomic
from fourstage.report.charts import Drawing


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
class Code:
    text: str
    language: str


@dataclass(frozen=True)
class Cell:
    """A table cell of (text, tone) parts; tone: "", "small", "better", "worse" or "unclear". It is
    only a colour, so the text has to say the same."""

    parts: Sequence[tuple[str, str]]

    @property
    def text(self) -> str:
        """All parts on one line."""
        parts = (text if tone == "small" else f"; {text}" for text, tone in self.parts)
        return " ".join(parts).replace(" ; ", "; ").removeprefix("; ")


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


@dataclass(frozen=True)
class Answers:
    """One prompt and each stage's (stage, answer, remarks), the remarks with their tones as in a
    cell; the answer is None if not asked."""

    prompt: str
    by_stage: Sequence[tuple[str, str | None, Sequence[tuple[str, str]]]]


@dataclass(frozen=True)
class Figure:
    """A drawing with a title of its own, and one line that says how to read it."""

    title: str
    drawing: Drawing
    caption: str = ""

    @property
    def name(self) -> str:
        """Of its files."""
        return _slug(self.title)


@dataclass(frozen=True)
class Figures:
    """Drawings side by side; `kind` is their CSS class. Of a "ladder", the page shows the first on
    a wide screen and the second on a narrow one; Markdown has the first."""

    figures: Sequence[Figure]
    kind: str = "charts"


@dataclass(frozen=True)
class Fold:
    """A section that the page shows when asked to."""

    heading: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Bullets | Code | Table | Answers | Figures | Fold


def write(
    folder: Path, name: str, title: str, blocks: Sequence[Block], drawings: str = "figures"
) -> None:
    """<name>.md and <name>.html in the folder; drawings replace those in its folder `drawings`."""
    place = folder / drawings
    files = {
        place / f"{figure.name}.{kind}": content
        for figure in _figures(blocks)
        for kind, content in figure.drawing.files(figure.title).items()
    }
    text = {".md": markdown(blocks, drawings), ".html": page(title, blocks)}
    files |= {folder / f"{name}{kind}": content.encode() for kind, content in text.items()}
    for path, content in files.items():
        write_atomic(path, content)
    for old in {*place.glob("*.svg"), *place.glob("*.png")} - files.keys():
        old.unlink()


def _figures(blocks: Sequence[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figures):
            yield from block.figures
        elif isinstance(block, Fold):
            yield from _figures(block.blocks)


def _slug(text: str) -> str:
    """A name for files and links: "ppo: KL to the reference" -> "ppo-kl-to-the-reference"."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


# --- Markdown


def markdown(blocks: Sequence[Block], drawings: str = "figures") -> str:
    """The blocks as GitHub-flavoured Markdown, with drawings from a folder beside it."""
    return "\n\n".join(_markdown_block(block, drawings) for block in blocks) + "\n"


def _markdown_block(block: Block, drawings: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_inline(text)}"
        case Paragraph(text):
            return _line(text)
        case Bullets(items):
            return "\n".join(f"- {_line(item)}" for item in items)
        case Code(text, language):
            return _fenced(text, language)
        case Table(header, rows):
            lines = [[*map(_inline, header)], ["---"] * len(header)]
            lines += [[_inline(plain(cell)) for cell in row] for row in rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Answers(prompt, by_stage):
            parts = [f"### {_inline(prompt)}"]
            for stage, answer, remarks in by_stage:
                said = _inline(", ".join(text for text, _ in remarks))
                parts.append(f"**{_inline(stage)}**" + f" ({said})" * bool(said))
                if answer is not None:
                    parts.append(_fenced(answer))
            return "\n\n".join(parts)
        case Figures(figures, kind):
            shown = figures[:1] if kind == "ladder" else figures
            parts = [f"![{_inline(f.title)}]({drawings}/{f.name}.png)" for f in shown]
            return "\n\n".join([*parts, *(_line(f.caption) for f in shown if f.caption)])
        case Fold(heading, blocks):
            return markdown([Heading(heading), *blocks], drawings).rstrip("\n")


def plain(cell: str | Cell) -> str:
    """A table cell on one line."""
    return cell.text if isinstance(cell, Cell) else cell


def _line(text: str) -> str:
    """`text` as a paragraph of one line, also if it begins like a list or a heading."""
    return re.sub(r"^(\d*)([#+.)-]+(?=\s|$)|\[)", r"\1\\\2", _inline(text))


def _inline(text: str) -> str:
    """One line of Markdown that shows `text` as it is."""
    line = re.sub(r"\s*\n\s*", " / ", visible(text)).strip()
    line = re.sub(r"([\\`*<>|&~$]|\](?=[(\[])|\[(?=\^))", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)


def _fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def visible(text: str) -> str:
    """Control characters, which neither format allows, become the replacement character."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


# --- HTML

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --better: #0b6b39;
  --worse: #a8201a; --quiet: #5c5c5c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --better: #63d297; --worse: #ff9a8f; --quiet: #a9a9a9; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: .4rem; }
p, li, h1, h2, h3 { overflow-wrap: anywhere; } p, li { max-width: 60rem; }
ul { padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: left;
  vertical-align: top; }
td { font-size: .92rem; } td b { font-weight: inherit; white-space: nowrap; }
td span { display: block; white-space: nowrap; }
th { font-size: .85rem; vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; min-width: 6.5rem;
  max-width: 11rem; overflow-wrap: break-word; font-weight: 600; }
.small, .unclear { font-size: .8rem; color: var(--quiet); }
.better, .worse { font-size: .8rem; font-weight: 600; }
.better { color: var(--better); } .worse { color: var(--worse); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(10.5rem, 100%), 1fr));
  gap: .6rem; }
.answers > div { background: var(--soft); border: 1px solid var(--line); border-radius: .4rem;
  padding: .5rem .7rem; }
.answers span { margin-right: .4rem; white-space: nowrap; }
pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.4 ui-monospace, monospace; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr));
  gap: 1.2rem 1rem; margin-bottom: 1.2rem; }
.large { max-width: 38rem; }
.ladder figure:last-child { max-width: 24rem; margin: 0 auto; }
summary { cursor: pointer; padding: .3rem 0; } summary h2 { display: inline; }
nav summary { font-weight: 600; } nav div { columns: 15rem; }
nav a { color: inherit; display: block; padding: .3rem 0; }
figure { margin: 0; } figcaption { font-size: .85rem; } figcaption strong { font-size: .95rem; }
svg { display: block; width: 100%; height: auto; fill: currentColor; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media (min-width: 48rem) { .ladder figure:last-child { display: none; } }
@media (max-width: 47.99rem) {
  .ladder figure:first-child { display: none; }
}
@page { size: A4; margin: 12mm; }
@media print {
  :root { color-scheme: light; }
  body { font-size: 9pt; max-width: none; padding: 0; }
  nav { display: none; } details::details-content { content-visibility: visible; }
  .ladder figure:first-child { display: block; } .ladder figure:last-child { display: none; }
  .wide { overflow: visible; } table { width: 100%; }
  th, td { padding: .15rem .3rem; font-size: 7.5pt; }
  th:first-child, td:first-child { position: static; min-width: 0; }
  .small, .unclear, .better, .worse { font-size: 6.5pt; }
  .charts { grid-template-columns: 1fr 1fr; }
  .answers { grid-template-columns: repeat(auto-fit, minmax(6.8rem, 1fr)); gap: .3rem; }
  .answers > div { padding: .2rem .3rem; } pre { font-size: 6.5pt; }
  figure, tr, .answers > div { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page: no script, nothing loaded, light and dark, phone and print."""
    parts = [_html_block(block) for block in blocks]
    headings = [
        block.heading if isinstance(block, Fold) else block.text
        for block in blocks
        if isinstance(block, Fold) or (isinstance(block, Heading) and block.level == 2)
    ]
    if headings:
        links = "\n".join(f'<a href="#{_slug(text)}">{_text(text)}</a>' for text in headings)
        menu = f"<summary>On this page</summary>\n<div>\n{links}\n</div>"
        parts.insert(1, f"<nav>\n<details>\n{menu}\n</details>\n</nav>")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(visible(text))


def _html_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="{_slug(text)}">{_text(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_text(item)}</li>" for item in items) + "\n</ul>"
        case Code(text, _):
            return f"<pre>\n{_text(text)}</pre>"
        case Table(header, rows):
            head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
            lines = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            return (
                f'<div class="wide" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
            )
        case Answers(prompt, by_stage):
            cells = "\n".join(_answer(*item) for item in by_stage)
            return f'<h3>{_text(prompt)}</h3>\n<div class="answers">\n{cells}\n</div>'
        case Figures(figures, kind):
            drawn = "\n".join(map(_figure, figures))
            return f'<div class="{kind}">\n{drawn}\n</div>'
        case Fold(heading, blocks):
            inner = "\n".join(map(_html_block, blocks))
            head = _html_block(Heading(heading))
            return f"<details>\n<summary>{head}</summary>\n{inner}\n</details>"


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):  # a setting such as lr=1e-3 isn't broken at its hyphen
        text = re.sub("[^ =]+=[^ ]{1,16}(?![^ ])", r"<b>\g<0></b>", _text(cell))
        return f"<td>{text}</td>"
    return f"<td>{_spans(cell.parts)}</td>"


def _spans(parts: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<span class="{tone}">{_text(text)}</span>' for text, tone in parts)


def _answer(stage: str, answer: str | None, remarks: Sequence[tuple[str, str]]) -> str:
    # the newline after <pre> is dropped by HTML, so that an answer's own first newline stays
    body = "" if answer is None else f"\n<pre>\n{_text(answer)}</pre>"
    return f"<div><strong>{_text(stage)}</strong> {_spans(remarks)}{body}</div>"


def _figure(figure: Figure) -> str:
    """The drawing; its name keeps its ids distinct from those of the page's other drawings."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}-", figure.drawing.svg)
    label = html.escape(visible(figure.title), quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    caption = f" {_text(figure.caption)}" if figure.caption else ""
    title = f"<strong>{_text(figure.title)}</strong>"
    return f"<figure>\n<figcaption>{title}{caption}</figcaption>\n{svg}\n</figure>"

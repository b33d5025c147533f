"""What the page shows, as HTML in which every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fourstage.arena.contestants import Answer, Judged


@dataclass(frozen=True)
class Column:
    """What one contestant was asked and has said. turns: questions and answers, the last one last;
    kind: a class for the style."""

    title: str
    turns: Sequence[tuple[str, str]] = ()
    note: str = ""
    kind: str = ""


def columns(found: Sequence[Column]) -> str:
    """Boxes side by side, each with a conversation that scrolls and stays at its end."""
    return f'<div class="side-by-side">{"".join(map(_box, found))}</div>'


def _box(one: Column) -> str:
    # dir=auto: right-to-left text doesn't turn what is beside it round
    turns = [
        f'<p class="asked" dir="auto">{escape(asked)}</p>' * bool(asked)
        + f'<p class="answer" dir="auto">{escape(said)}</p>'
        for asked, said in one.turns
    ]
    title = escape(one.title)
    return (
        f'<section class="said {one.kind}"><h3>{title}</h3>'
        f'<div class="turns" tabindex="0" role="group" aria-label="{title}">'
        f"<div>{''.join(turns)}</div></div>"
        f'<p class="note">{escape(one.note)}</p></section>'
    )


def line(text: str) -> str:
    """A message, which screen readers say."""
    return f'<p class="line" role="status" dir="auto">{escape(text)}</p>'


def table(caption: str, header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    label = escape(caption)
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{label}"><table>'
        f"<caption>{label}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def growing(said: Answer) -> str:
    """The note under an answer that isn't judged yet."""
    return f"{len(said.ids)} tokens …" if said.ids else ""


def note(said: Answer, judged: Judged, left_out: int) -> str:
    """What is known of a finished answer, in a line. left_out: earlier questions of the
    conversation that the model's context didn't hold."""
    parts = [f"{len(said.ids)} tokens", f"log p {said.logprob:.1f}"]
    if judged.reward is not None:
        parts.append(f"learned reward {judged.reward:.2f}")
    if judged.score is not None:
        parts.append(f"true score {judged.score:.2f}")
    if judged.correct is not None:
        parts.append("right" if judged.correct else "wrong")
    if not said.stopped:
        parts.append("cut off")
    if left_out:
        was = "question was" if left_out == 1 else "questions were"
        parts.append(f"context full: the first {left_out} {was} not read")
    return " · ".join(parts)

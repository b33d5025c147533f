"""The report in a few lines: sentences for the page, and the ending of the command."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from fourstage.report.files import Sample
from fourstage.report.goals import goals, taxes
from fourstage.report.html import visible
from fourstage.report.keys import gained, short
from fourstage.report.ladder import Row, leaves_policy

FIRST_PROMPT = "What is an LLM?"
MARKS = {True: "✓ right", False: "✗ wrong", None: ""}
QUOTED = 200  # characters of an answer in a sentence
FOUND = {  # a goal's tone -> what the stages did
    "better": "clearly improved",
    "unclear": "did not clearly change",
    "worse": "clearly worsened",
    "": "could not be judged on",
}


def prompts(rows: Sequence[Row]) -> list[str]:
    """What the rows were asked: the first prompt first, then as the last row was asked."""
    found = dict.fromkeys(prompt for row in reversed(rows) for prompt in row.answers)
    return sorted(found, key=lambda prompt: prompt != FIRST_PROMPT)


def marks(said: Sample) -> list[tuple[str, str]]:
    """Whether an answer is right and whole, as the parts of a cell."""
    tone = "better" if said.right else "worse"
    right = [] if said.right is None else [(MARKS[said.right], tone)]
    return right + [("cut off", "small")] * (not said.stopped)


# --- sentences


def sentences(rows: list[Row]) -> list[str]:
    """What happened: on the stages' goals, in the last answer, and to the goals of other stages."""
    return [_on_goals(rows), *_last_answer(rows), *_on_other_goals(rows)]


def _on_goals(rows: list[Row]) -> str:
    found: dict[str, list[str]] = {tone: [] for tone in FOUND}
    for goal in goals(rows):
        tone = goal.tone if goal.is_compared else ""
        found[tone].append(f"{goal.stage} ({short(goal.name)} {goal.step})")
    said = [
        " and ".join(filter(None, [", ".join(each[:-1]), each[-1]]))
        + f" {FOUND[tone]} {'its own goal' if len(each) == 1 else 'their own goals'}"
        for tone, each in found.items()
        if each
    ]
    return f"On data that no stage trained on, {'; '.join(said)}."


def _last_answer(rows: list[Row]) -> list[str]:
    if not (asked := prompts(rows)):
        return []
    row = [row for row in rows if asked[0] in row.answers][-1]
    said = row.answers[asked[0]]
    how = {True: "answers correctly", False: "answers wrongly", None: "answers"}[said.right]
    answer = shortened(_quoted(said), QUOTED)
    return [f'Asked "{one_line(asked[0])}", {row.stage} {how}: "{answer}"']


def _on_other_goals(rows: list[Row]) -> list[str]:
    """Nothing if no stage could lose anything."""
    later = [row for row in rows if _may_lose(row) and leaves_policy(row.stage)]
    unknown = [row.stage for row in later if not row.differences]
    if len(unknown) == len(later):
        return ["What it cost the goals of other stages was not measured."] if later else []
    lost: dict[str, list[str]] = {}
    for row, name in taxes(rows):
        said = f"{row.stage} {gained(name, row.differences[name]['value'])}"
        lost.setdefault(name, []).append(said)
    rest = f" Not measured: {', '.join(unknown)}." if unknown else ""
    if lost:
        said = "; ".join(f"{short(name)} ({', '.join(each)})" for name, each in lost.items())
        return [f"The alignment tax, lost on the goals of other stages: {said}.{rest}"]
    return [f"No stage clearly lost on the goal of another: no alignment tax was found.{rest}"]


def _may_lose(row: Row) -> bool:
    """Whether it started from anything but random weights."""
    return bool(row.parents) or (row.parent is not None and not row.parent.is_random)


# --- the ending


def ending(rows: list[Row], width: int) -> list[str]:
    """What a terminal shows: each stage's answer to the first prompt and its goal, a line each."""
    lines: list[str] = []
    if asked := prompts(rows):
        said = {row.stage: row.answers[asked[0]] for row in rows if asked[0] in row.answers}
        answers = _columns([[stage, MARKS[s.right], _quoted(s)] for stage, s in said.items()])
        lines = [one_line(asked[0]), *answers, ""]
    each = [
        [goal.stage, short(goal.name), goal.step, " ".join(text for text, _ in goal.parts)]
        for goal in goals(rows)
    ]
    lines += ["Each stage's goal, before → after, with the difference's 95 % interval"]
    return [shortened(line, width) for line in [*lines, *_columns(each), ""]]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines of aligned columns, without the empty ones."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        "".join(
            f"  {set_cell_size(text, width)}"
            for text, width in zip(row, widths, strict=True)
            if width
        ).rstrip()
        for row in rows
    ]


def one_line(text: str) -> str:
    return " ".join(visible(text).split())


def _quoted(said: Sample) -> str:
    """The answer on one line, which ends with an ellipsis if it was cut off."""
    return one_line(said.answer) + "…" * (not said.stopped)


def shortened(text: str, width: int) -> str:
    """At most so many columns of a terminal, with an ellipsis for what is left out."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip(" …") + "…"

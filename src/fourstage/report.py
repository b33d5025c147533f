"""What did each stage do? One report from the files under outputs/runs, and from nothing else.

`python -m fourstage.report` picks the latest finished run that no other finished run started from
(`run=` picks another: an id, <stage>-<id>, a folder, or a stage's name), joins its row with those
of its ancestors and of the random weights, and writes outputs/report/{report.md, report.html,
stages.json}. The same runs give the same bytes: no time of day stands in them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from fourstage.report_files import (
    Files,
    Metric,
    Points,
    ReportError,
    Row,
    Run,
    choose,
    ladder,
    other_tips,
    read_rows,
    read_runs,
)
from fourstage.report_html import (
    Answers,
    Block,
    Bullets,
    Charts,
    Heading,
    Paragraph,
    Table,
    markdown,
    page,
)

USAGE = "usage: python -m fourstage.report [outputs=outputs] [run=NAME]"
FIRST_PROMPT = "What is an LLM?"
NONE = "–"

# the columns of the stage table; the rest of the suite has a table of its own
HEADINGS = {
    "bits_per_char": "bits per character (lower is better)",
    "well_formed": "well-formed answers",
    "reasoning_accuracy": "reasoning accuracy",
    "preference_score": "true preference score",
    "reward_model_score": "reward-model score",
    "pair_accuracy": "held-out pairs ordered right",
}
SHARES = ("well_formed", "reasoning_accuracy", "pair_accuracy")  # shown in percent
# what each stage is for; the reward model is held against a coin, the others against their parent
GOALS = {
    "pretrain": "bits_per_char",
    "sft": "well_formed",
    "reward": "pair_accuracy",
    "ppo": "preference_score",
    "grpo": "reasoning_accuracy",
}
COIN = {"value": 0.5, "low": 0.5, "high": 0.5}
# the charts: title, unit, and how the names of their metrics.csv columns end
PANELS = (
    ("loss", "nats", ("loss", "pair_nll")),
    ("accuracy", "share", ("accuracy", "pass_at_1")),
    ("reward", "reward", ("score", "gold_score", "reward")),
    ("KL to the reference", "nats", ("kl",)),
)
MOST_POINTS = 300  # a longer curve is drawn as means of neighbouring points


def write_report(outputs: Path, name: str | None = None) -> Path:
    """Write report.md, report.html and stages.json into outputs/report and return that folder.

    Raises ReportError where there is no such run to report on.
    """
    files = Files()
    runs = read_runs(outputs, files)
    tip = choose(runs, name, outputs)
    line = ladder(tip, runs, files)
    rows = read_rows(line, files)
    others = other_tips(runs, line)
    blocks = document(rows, tip, files, others)
    folder = outputs / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages.json").write_text(stages_json(rows, files.suite), encoding="utf-8")
    (folder / "report.md").write_text(markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(page(f"fourstage: {tip.name}", blocks), encoding="utf-8")
    return folder


def stages_json(rows: list[Row], suite: str) -> str:
    """The stage table for programs: one row a stage, metrics as the evaluation wrote them."""
    table = [
        {"stage": row.stage, "run": row.id, "parents": row.parents, "metrics": row.metrics}
        for row in rows
    ]
    return json.dumps({"suite": suite, "rows": table}, indent=1, allow_nan=False) + "\n"


# --- the document


def document(rows: list[Row], tip: Run, files: Files, others: list[Run]) -> list[Block]:
    """The report, from the answer (what did each stage do?) to the details."""
    return [
        Heading(f"From random weights to {tip.stage}", 1),
        *_introduction(tip, files.suite, others),
        Heading("What each stage did"),
        Paragraph(
            "Every row was measured on the same held-out data: value, 95 % interval, and n, the "
            "number of answers, problems, pairs or blocks of text."
        ),
        metric_table(rows, list(HEADINGS)),
        Heading("Each stage on its own goal"),
        goal_table(rows),
        *_kl(rows),
        *_answers(rows),
        *_curves(rows, files),
        Heading("What it cost"),
        cost_table(rows),
        *_more(rows),
        Heading("What is missing"),
        Bullets(_missing(rows, files.problems) or ["nothing"]),
    ]


def _introduction(tip: Run, suite: str, others: list[Run]) -> list[Block]:
    blocks: list[Block] = []
    if tip.is_debug:
        blocks.append(
            Paragraph(
                "These are debug runs of a few steps a stage: they show that the path works, and "
                "their figures say nothing about the method."
            )
        )
    facts = [f"Run {tip.name}", *(f"{key} {value}" for key, value in tip.facts().items())]
    blocks.append(Paragraph(", ".join(facts) + f"; evaluation suite {suite}."))
    if others:
        names = ", ".join(run.name for run in others)
        blocks.append(Paragraph(f"Other ladders found (run=NAME reports on one): {names}."))
    return blocks


def metric_table(rows: list[Row], names: Sequence[str]) -> Table:
    """One line a stage, one column for each of the metrics that any row has."""
    names = [name for name in names if any(name in row.metrics for row in rows)]
    lines = [
        [row.stage, *(_cell(name, row.metrics.get(name), with_n=True) for name in names)]
        for row in rows
    ]
    return Table(["stage", *(HEADINGS.get(name, name) for name in names)], lines)


def _cell(name: str, metric: Metric | None, with_n: bool = False) -> str:
    """value [low, high], shares in percent."""
    if metric is None or metric["value"] is None:
        return NONE
    is_share = name.split("/")[0] in SHARES
    scale, digits = (100, 1) if is_share else (1, 3)
    value, low, high = (  # + 0.0 makes -0.0 a plain zero
        f"{round(scale * metric[key], digits) + 0.0:.{digits}f}" for key in ("value", "low", "high")
    )
    text = f"{value}{' %' if is_share else ''} [{low}, {high}]"
    return f"{text}, n {metric['n']}" if with_n else text


def goal_table(rows: list[Row]) -> Table:
    """What each stage gained on its own goal over the row that it started from."""
    by_id = {row.id: row for row in rows}  # None: the random weights, before pre-training
    lines = []
    for row in rows:
        if row.run is None:
            continue
        name = GOALS[row.stage]
        after = row.metrics[name]
        if row.stage == "reward":
            before, shown = COIN, "50.0 % (a coin)"
        else:
            parent = by_id.get(row.run.parents.get("policy"))
            before = parent.metrics[name] if parent else {"value": None}
            shown = f"{_cell(name, before)} ({parent.stage})" if parent else NONE
        gain, verdict = compare(name, before, after)
        lines.append([row.stage, HEADINGS[name], shown, _cell(name, after), gain, verdict])
    return Table(["stage", "goal", "before", "after", "gain", "95 % intervals"], lines)


def compare(name: str, before: Metric, after: Metric) -> tuple[str, str]:
    """The difference of two cells, and whether their intervals overlap."""
    if before["value"] is None or after["value"] is None:
        return NONE, "not measured"
    gain = after["value"] - before["value"]
    above, below = after["low"] > before["high"], after["high"] < before["low"]
    better, worse = (below, above) if name == "bits_per_char" else (above, below)
    text = f"{100 * gain:+.1f} points" if name in SHARES else f"{gain:+.3f}"
    return text, "apart: better" if better else "apart: worse" if worse else "overlap"


def _kl(rows: list[Row]) -> list[Block]:
    """How far the reinforcement stages went from the sft policy."""
    cells = {row.stage: row.metrics.get("kl_to_sft") for row in rows}
    known = [
        f"{stage} {_cell('kl_to_sft', cells[stage])}"
        for stage in ("ppo", "grpo")
        if stage in cells and _cell("kl_to_sft", cells[stage]) != NONE
    ]
    return [Paragraph(f"KL from the sft policy, nats an answer: {', '.join(known)}.")] * bool(known)


def _answers(rows: list[Row]) -> list[Block]:
    asked = [row for row in rows if row.answers]
    prompts = dict.fromkeys(prompt for row in reversed(asked) for prompt in row.answers)
    blocks: list[Block] = []
    for prompt in sorted(prompts, key=lambda prompt: prompt != FIRST_PROMPT):
        by_stage: list[tuple[str, str | None, str]] = []
        for row in asked:
            answer, stopped = row.answers.get(prompt, (None, True))
            remark = "not asked" if answer is None else "" if stopped else "cut off"
            by_stage.append((row.stage, answer, remark))
        blocks.append(Answers(prompt, by_stage))
    return [Heading("The same prompts, answered by every stage"), *blocks] if blocks else []


def _curves(rows: list[Row], files: Files) -> list[Block]:
    charts = []
    for row in rows:
        if row.run is not None:
            columns = files.curves(row.run.folder / "metrics.csv")
            charts += stage_charts(row.stage, columns)
    return [Heading("While training"), Charts(charts)] if charts else []


def stage_charts(
    stage: str, columns: dict[str, Points]
) -> list[tuple[str, str, dict[str, Points]]]:
    """The charts of one stage: (title, unit, series), for the panels that it has columns for."""
    charts = []
    for title, unit, endings in PANELS:
        series = {
            name: thinned(points)
            for name, points in columns.items()
            if name.rsplit("/", 1)[-1] in endings
        }
        if series:
            charts.append((f"{stage}: {title}", unit, series))
    return charts


def thinned(points: Points) -> Points:
    """At most MOST_POINTS points: means over runs of neighbours, in the order given."""
    width = math.ceil(len(points) / MOST_POINTS)
    parts = [points[at : at + width] for at in range(0, len(points), width)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def cost_table(rows: list[Row]) -> Table:
    """Time, work and memory of each stage, and their sum."""
    costs = {row.stage: row.run.costs() for row in rows if row.run}
    columns = {
        "time": ("seconds", _duration),
        "of it training": ("train_seconds", _duration),
        "steps": ("steps", "{:,.0f}".format),
        "tokens": ("tokens", "{:,.0f}".format),
        "peak memory, MiB": ("peak_memory_mib", "{:,.0f}".format),
    }

    def line(cost: dict[str, float]) -> list[str]:
        return [show(cost[key]) if key in cost else NONE for key, show in columns.values()]

    total = {
        key: (max if key == "peak_memory_mib" else sum)(found)
        for key, _ in columns.values()
        if (found := [cost[key] for cost in costs.values() if key in cost])
    }
    lines = [
        [row.stage, row.run.name, *line(costs[row.stage])] for row in rows if row.run is not None
    ]
    return Table(["stage", "run", *columns], [*lines, ["together", "", *line(total)]])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _more(rows: list[Row]) -> list[Block]:
    """The rest of the suite, and what the data lost on its way into training."""
    blocks: list[Block] = []
    names = dict.fromkeys(n for row in rows for n in row.metrics if n not in HEADINGS)
    if names:
        blocks += [Heading("More of the suite"), metric_table(rows, list(names))]
    counts = [
        f"{row.stage}: "
        + ", ".join(f"{name.replace('_', ' ')} {count:,.0f}" for name, count in notes.items())
        for row in rows
        if row.run and (notes := row.run.data_notes())
    ]
    if counts:
        blocks += [Heading("What went into training"), Bullets(counts)]
    return blocks


def _missing(rows: list[Row], problems: list[str]) -> list[str]:
    undefined = [
        f"{row.stage}: {HEADINGS.get(name, name)}: {metric['why']}"
        for row in rows
        for name, metric in row.metrics.items()
        if metric["value"] is None
    ]
    return [*problems, *undefined]


def main(arguments: list[str]) -> int:
    """The command: writes the report and prints where it is. Returns the exit code."""
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return 0
    values = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = [argument for argument in arguments if not argument.startswith(("outputs=", "run="))]
    if unknown:
        print(f"error: unknown argument {unknown[0]!r}; {USAGE}", file=sys.stderr)
        return 1
    try:
        folder = write_report(Path(values.get("outputs", "outputs")), values.get("run"))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"report: {folder / 'report.html'} (the same as {folder / 'report.md'}, with plots)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

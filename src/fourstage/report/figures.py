"""Which drawings the report shows, and the data behind them."""

from collections.abc import Sequence

import numpy as np

from fourstage.evaluation import suite
from fourstage.ladder import LADDER
from fourstage.report.charts import (
    Node,
    Strip,
    before_after,
    heat_map,
    intervals,
    lineage,
    lines,
    over_optimisation,
    thinned,
)
from fourstage.report.files import FAULTS, Item, Points
from fourstage.report.goals import COIN, Goal, goals
from fourstage.report.html import Block, Cell, Figure, Figures, Heading, Paragraph, Table
from fourstage.report.keys import NONE, about, change_cell, measured_cell, short, shown
from fourstage.report.ladder import Row
from fourstage.report.tables import duration

Curves = dict[str, dict[str, Points]]  # stage -> column of metrics.csv -> points

# the learning curves: title, unit, and the last parts of their columns' names in metrics.csv
PANELS = (
    ("loss", "nats", ("loss", "pair_nll")),
    ("accuracy", "share", ("accuracy", "pass_at_1")),
    ("reward", "reward", ("score", "true_score", "reward")),
    ("KL to the reference", "nats an answer", ("kl",)),
    ("answer length", "tokens", ("answer_length",)),
    ("router balance", "share", ("load_entropy", "drift")),
    ("busiest expert", "times the mean", ("max_over_mean",)),
)
# ppo's reward has the KL of a whole answer, grpo's loss that of a token
UNITS = {("grpo", "KL to the reference"): "nats a token"}
MOST_POINTS = 300  # a longer curve is drawn as means of neighbouring points
SCORES = {"train/score": "learned reward", "train/true_score": "true score"}


def goal_figures(rows: list[Row]) -> list[Block]:
    """Each stage's goal before and after it; nothing if none was measured."""
    strips = [_strip(goal) for goal in goals(rows) if goal.after["value"] is not None]
    text = "On held-out data, with 95 % intervals; each goal has a scale of its own."
    title = "Goals before and after"
    return [Figures([Figure(title, before_after(strips), text)], "large")] if strips else []


def _strip(goal: Goal) -> Strip:
    """Shares stand between 0 and 100 %, other keys within what was measured."""
    cells = goal.before, goal.after
    low, high = 0.0, 1.0
    if not about(goal.name).is_share:
        ends = [cell[key] for cell in cells if cell["value"] is not None for key in ("low", "high")]
        edge = 0.1 * (max(ends) - min(ends)) or 1.0
        low, high = min(ends) - edge, max(ends) + edge
    scale = (high, low) if about(goal.name).better == "lower" else (low, high)
    said = f"{goal.step}, {goal.tone if goal.is_compared else goal.verdict}"
    left, right = (shown(goal.name, end) for end in scale)
    name = short(goal.name) + " (from a coin)" * (goal.before is COIN)
    return Strip(goal.stage, name, said, cells, scale, (left, right))


def lineage_figures(rows: list[Row]) -> list[Block]:
    """The ladder as a picture: from left to right, and downwards for a narrow screen."""
    stage_of = {row.id: row.stage for row in rows}
    own = {goal.stage: goal for goal in goals(rows)}
    nodes = []
    for row in rows:
        if row.run is None:
            kind = ["weights", "before training"] if row.is_random else ["pretrained", "checkpoint"]
            nodes.append(Node(row.stage, kind, []))
            continue
        parents = [] if LADDER[row.stage].parents else [first.stage for first in rows[:1]]
        parents += [stage_of[parent] for parent in row.parents if parent in stage_of]
        goal, seconds = own[row.stage], row.cost("seconds")
        time = NONE if seconds is None else duration(seconds)
        lines_ = [row.run.id, short(goal.name), goal.step, time]
        nodes.append(Node(row.stage, lines_, parents))
    text = "Each stage with its run, its own goal on held-out data before and after, and its time."
    titles = {"The ladder": True, "The ladder downwards": False}
    drawn = [Figure(title, lineage(nodes, across), text) for title, across in titles.items()]
    return [Figures(drawn, "ladder")]


def learning_curves(curves: Curves) -> list[Block]:
    """Each stage's curves side by side."""
    text = "Lines are named as the columns of metrics.csv"
    if "ppo" in curves:
        text += " (train/score: the learned reward; train/true_score: the true score)"
    text += "."
    points = max((len(p) for columns in curves.values() for p in columns.values()), default=0)
    if points > MOST_POINTS:
        text += f" Of more than {MOST_POINTS} points, means of neighbouring ones are drawn."
    found = [panels(stage, columns) for stage, columns in curves.items()]
    blocks = [
        Figures([Figure(name, lines("step", unit, series)) for name, unit, series in charts])
        for charts in found
        if charts
    ]
    return [Heading("While training"), Paragraph(text), *blocks] if blocks else []


def panels(stage: str, columns: dict[str, Points]) -> list[tuple[str, str, dict[str, Points]]]:
    """A stage's charts, (title, unit, series): the PANELS that it has columns for."""
    found = []
    for name, unit, endings in PANELS:
        series = {
            column: thinned(points, MOST_POINTS)
            for column, points in columns.items()
            if column.rsplit("/", 1)[-1] in endings
        }
        if series:
            found.append((f"{stage}: {name}", UNITS.get((stage, name), unit), series))
    return found


def over_optimisation_blocks(columns: dict[str, Points] | None) -> list[Block]:
    """PPO's learned reward and true score against the KL from its reference (Gao et al. 2022)."""
    if columns is None:
        return []
    heading = Heading("Scores against KL over PPO")
    kl = dict(columns.get("train/kl", ()))
    series = {
        name: [(kl[step], score) for step, score in columns.get(column, ()) if step in kl]
        for column, name in SCORES.items()
    }
    series = {name: points for name, points in series.items() if points}
    if not series:
        return [heading, Paragraph("Not drawn: metrics.csv has no KL with scores beside it.")]
    text = (
        "Dots are PPO's rollouts; lines join the means of neighbours in KL. x is on a square-root "
        "axis, as in Gao et al. 2022 (arXiv 2210.10760)."
    )
    blocks: list[Block] = [heading]
    if len(series) == 2:
        text += (
            " Over-optimisation would show as a learned reward that rises while the true score "
            "falls."
        )
    elif "true score" not in series:
        only = "only data=embedded has the hidden rule that labels its pairs."
        blocks.append(Paragraph(f"The true score is not known for this data: {only}"))
    drawing = over_optimisation("KL from the sft policy, nats an answer", "score", series)
    title = " and ".join(series).capitalize()
    return [*blocks, Figures([Figure(title, drawing, text)], "large"), _score_table(series)]


def _score_table(series: dict[str, Points]) -> Table:
    """The same as numbers: means over quarters of the rollouts, in order of their KL."""
    means = {name: thinned(sorted(points), 4) for name, points in series.items()}
    first = next(iter(means.values()))
    rows = [
        [
            f"{round(x, 2) + 0.0:.2f}",
            *(f"{m[at][1]:.3f}" if at < len(m) else NONE for m in means.values()),
        ]
        for at, (x, _) in enumerate(first)
    ]
    return Table(["mean KL, nats", *means], rows)


def difficulty_blocks(rows: list[Row]) -> list[Block]:
    """Every stage's accuracy on easy, medium and hard problems, and what grpo changed."""
    names = [f"reasoning_accuracy/difficulty_{level}" for level in suite.DIFFICULTIES]
    known = [row for row in rows if any(row.value(name) is not None for name in names)]
    if not known:
        return []
    series = {row.stage: [row.metrics.get(name) for name in names] for row in known}
    drawing = intervals(suite.DIFFICULTIES, "share of problems right", series)
    text = (
        "Greedy answers to held-out problems, with 95 % intervals. Each task's problems are split "
        "into thirds by the length of the worked solution, or of the question if there is none. "
        "The thirds hold different mixes of tasks, so compare stages at one difficulty."
    )
    figure = Figures([Figure("Reasoning accuracy by difficulty", drawing, text)], "large")
    grpo = next((row for row in rows if row.stage == "grpo" and row.parent), None)
    table: list[list[str | Cell]] = []
    for level, name in zip(suite.DIFFICULTIES, names, strict=True):
        table.append([level, *(measured_cell(name, row.metrics.get(name)) for row in known)])
        if grpo:
            table[-1].append(change_cell(name, grpo.differences.get(name)))
    head = ["problems", *series]
    if grpo and grpo.parent:
        head.append(f"grpo − {grpo.parent.stage}")
    return [Heading("Accuracy by difficulty"), figure, Table(head, table)]


def heat_map_blocks(rows: list[Row]) -> list[Block]:
    """Each expert's share of load, layer by layer: a drawing for each stage, all on one scale."""
    heading = Heading("What the routers do")
    shares = {row.stage: loads(row.items) for row in rows}
    known = {stage: share for stage, share in shares.items() if share is not None}
    if not known:
        whys = [row.metrics.get("router_entropy", {}).get("why") for row in rows]
        why = next(filter(None, whys), "the evaluations hold no router items")
        return [heading, Paragraph(f"No heat maps: {why}.")]
    top = max(float(share.max()) for share in known.values())
    experts = next(iter(known.values())).shape[1]
    text = (
        f"Share of the held-out tokens that each expert of each layer gets. An even share is "
        f"{100 / experts:.1f} %; the deepest colour is {100 * top:.1f} %"
        f"{' in every drawing' * (len(known) > 1)}."
    )
    figures = [
        Figure(f"{stage}: routers", heat_map(share.tolist(), top)) for stage, share in known.items()
    ]
    return [heading, Paragraph(text), Figures(figures)]


def loads(items: Sequence[Item]) -> np.ndarray | None:
    """Each expert's share of its layer's load [L, E] over the router items; None without a load."""
    try:
        total = np.sum([np.array(i["load"], float) for i in items if i["set"] == "router"], 0)
        each = total.sum(1, keepdims=True)
    except FAULTS:  # no items, or broken ones
        return None
    return total / each if (each > 0).all() and (total >= 0).all() else None

"""`python -m fourstage report compare`: several ladders side by side, in groups of seeds.

It writes outputs/report/{compare.md, compare.html, compare.json}, and its drawing in compare/.
docs/compare.md says how to read them. Groups are rows, so that any number fits on the page.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from fourstage.files import write_atomic
from fourstage.ladder import stages
from fourstage.report.charts import Dots, dot_plot
from fourstage.report.compare_json import content
from fourstage.report.comparison import Comparison, Ladder, Line, compare
from fourstage.report.contrasts import Compared, Difference, Group, gain_of, mean_of
from fourstage.report.goals import COIN, goals
from fourstage.report.html import (
    Block,
    Bullets,
    Cell,
    Figure,
    Figures,
    Fold,
    Heading,
    Paragraph,
    Table,
    plain,
    write,
)
from fourstage.report.keys import NONE, about, gained, interval, shown, title
from fourstage.report.kl_curves import kl_blocks
from fourstage.report.ladder import Row, leaves_policy
from fourstage.report.statistics import Mean
from fourstage.report.tables import COSTS, benchmark_title, missing

MANY = 12  # ladders or groups that are listed without being asked
MEANS = (
    "A mean is over the group's seeds (each the mean of its runs), with Student's t interval; of "
    "one run it is its value, with the interval over its items, which says nothing of other seeds."
)
DIFFERENCES = (
    " Differences are to the first group. They are paired over the seeds that both groups have (t "
    "interval of the differences), where all were asked the same items; without common seeds they "
    "are by Welch's t, and of one run each of one seed they are paired over the items, without a p "
    "value."
)
CALLED = (
    ": a difference is called better or worse if it is at most 0.05 (without a p value: if the "
    "interval excludes 0). Intervals are 95 % each, without correction."
)


def write_comparison(
    outputs: Path, words: Sequence[str], tell: Callable[[list[str]], None] = lambda lines: None
) -> Path:
    """Write the comparison into outputs/report and return that folder. `words`: names, `all`,
    conditions, by=KEY,KEY, base=KEY=VALUE; `tell` is called with its ending. Raises UserError
    unless they mean two finished ladders or more."""
    found = compare(outputs, words)
    folder = outputs / "report"
    heading = f"fourstage: {len(found.ladders)} ladders"
    write(folder, "compare", heading, document(found), "compare")
    text = json.dumps(content(found), indent=1, allow_nan=False) + "\n"
    write_atomic(folder / "compare.json", text)
    tell(ending(found))
    return folder


def ending(found: Comparison) -> list[str]:
    """What the command prints: the last stage's goal by group, and the differences."""
    lines = []
    for table in found.goals[-1:]:
        rows = [[plain(c) for c in row[:5:2]] for row in _compared_table(table).rows[:MANY]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(f"{table.stage}: {title(table.key)}")
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        more = len(table.groups) - MANY
        lines += [f"  and {more} more groups"] * (more > 0)
    return lines


def document(found: Comparison) -> list[Block]:
    """The comparison, from what the ladders are to every figure."""
    by_part = [line for line in found.figures if "/" in line.key]
    whole = [line for line in found.figures if "/" not in line.key]
    return [
        Heading(f"{len(found.ladders)} ladders compared", 1),
        *_introduction(found),
        *_drawn(found.goals),
        Heading("Each stage on its own goal"),
        *_compared(found.goals),
        *_effects(found.goals),
        *kl_blocks(found.by_stage.get("ppo", []), found.files),
        *_others(found.others),
        Fold("Each ladder", [_ladder_table(found)]),
        Fold("The whole suite", [Paragraph(_SPREAD), _table(whole, found)]),
        *[Fold("By task and by difficulty", [_table(by_part, found)])] * bool(by_part),
        *([Heading("Public benchmarks"), _table(found.public, found)] if found.public else []),
        Heading("What it cost"),
        _table(found.costs, found),
        Heading("What is missing"),
        Bullets([*dict.fromkeys(found.files.problems), *_missing(found.ladders)] or ["nothing"]),
    ]


# --- what is compared


def _introduction(found: Comparison) -> list[Block]:
    debug = [ladder.tip.name for ladder in found.ladders if ladder.tip.is_debug]
    if len(debug) > MANY:
        debug[MANY:] = [f"and {len(debug) - MANY} more"]
    return [
        *[
            Paragraph(
                f"Debug runs, too short for their figures to mean anything: {', '.join(debug)}."
            )
        ]
        * bool(debug),
        Paragraph(f"{_what(found)} Evaluation suite {found.files.suite}."),
        *map(Paragraph, found.files.suite_notes("NAME")),
        *map(Paragraph, _code(found.differs)),
        *map(Paragraph, _incomplete(found.ladders)),
        *([_group_table(found)] if len(found.groups) > 1 else []),
        *_settings_table(found.differs),
    ]


def _what(found: Comparison) -> str:
    """How many ladders there are, and what they differ in."""
    seeds = {unit.seeds for group in found.groups for unit in group.blocks.values()}
    if len(found.groups) > 1:
        by = f" by {', '.join(found.by)}" if found.by else ""
        return f"{len(found.groups)} groups{by}, the seeds within each."
    if len(seeds) > 1:
        return f"{len(seeds)} seeds: they share all settings that can change a figure."
    return "They share all settings that can change a figure."


def _code(differs: Mapping[str, list[str]]) -> list[str]:
    """That the ladders were not all made by the same code."""
    said = [
        f"{name.removeprefix('versions.')} {', '.join(_distinct(', '.join(values).split(', ')))}"
        for name, values in differs.items()
        if name.startswith(("git.", "versions."))
    ]
    text = f"Not all were made by the same code, which makes no group: {'; '.join(said)}."
    return [text] if said else []


def _incomplete(ladders: Sequence[Ladder]) -> list[str]:
    """That some ladders lack ancestors, which makes their routes shorter."""
    names = []
    for ladder in ladders:
        runs = [row.run for row in ladder.by_stage.values() if row.run]
        if {parent for run in runs for parent in run.parents.values()} - {run.id for run in runs}:
            names.append(ladder.tip.name)
    text = (
        "Ancestors are missing or can't be read, so that the route and the settings aren't whole "
        f"and may make a group of their own: {', '.join(_distinct(names))}. The last section says "
        "which."
    )
    return [text] if names else []


def _distinct(values: Sequence[str]) -> list[str]:
    found = [value for value in dict.fromkeys(values) if value != NONE]
    more = [f"and {len(found) - MANY} more"] if len(found) > MANY else []
    return found[:MANY] + more


def _group_table(found: Comparison) -> Table:
    lasts = {
        group.label: dict.fromkeys(unit.row.stage for unit in group.blocks.values())
        for group in found.groups
    }
    return Table(
        ["group", "ladders", "seeds", "up to"],
        [
            [
                group.label,
                str(len(group.blocks)),
                "; ".join(_distinct([unit.seeds for unit in group.blocks.values()])),
            ]
            + [", ".join(lasts[group.label])]
            for group in found.groups
        ],
    )


def _settings_table(differs: Mapping[str, list[str]]) -> list[Block]:
    """The settings that differ, and their values."""
    names = [name for name in differs if not name.startswith(("git.", "versions."))]
    if not set(names) - {"seed"}:
        return []
    rows = [[name, "; ".join(_distinct(differs[name]))] for name in names]
    table = Table(["setting that differs", "values"], rows)
    return [Fold("Settings that differ", [table])] if len(names) > MANY else [table]


# --- the goals by group


def _drawn(tables: Sequence[Compared]) -> list[Block]:
    """The dot plot: a panel for each stage's goal."""
    panels = []
    for table in tables:
        scale = 100 if about(table.key).is_share else 1
        dots = [
            Dots(
                group.label,
                [scale * value for value in group.values_of(table.key).values()],
                scale * mean.value,
                None
                if mean.low is None or mean.high is None
                else (scale * mean.low, scale * mean.high),
            )
            for group in table.groups
            if (found := mean_of(group, table.key)) is not None
            for mean in [found[0]]
        ]
        unit = ", %" if scale == 100 else ""
        better = {"lower": " (lower is better)"}.get(about(table.key).better or "", "")
        panels.append((f"{table.stage}: {about(table.key).title}{unit}{better}", dots))
    text = (
        "A circle is a run, the diamond the mean of its group, with the 95 % interval over seeds "
        "(of one run: over its items)."
    )
    return [Figures([Figure("Goals by group", dot_plot(panels), text)], "large")] if panels else []


def _compared(tables: Sequence[Compared]) -> list[Block]:
    """A table for each key: a row for each group."""
    differences = [d for table in tables for d in table.differences]
    family = _family(differences)
    more = DIFFERENCES + (family + CALLED if family else "") if differences else ""
    blocks: list[Block] = [Paragraph(MEANS + more)]
    for table in tables:
        blocks += [Paragraph(f"{table.stage}: {title(table.key)}"), _compared_table(table)]
    return blocks


def _family(found: Sequence[Difference]) -> str:
    """How many p values are corrected together."""
    n = sum(difference.adjusted is not None for difference in found)
    if n < 2:
        return " There is one p value, which Holm's correction leaves as it is" * n
    return f" Each of the {n} p values is also given after Holm's correction for {n} tests"


def _compared_table(table: Compared) -> Table:
    key, first = table.key, table.groups[0].label
    several = len(table.groups) > 1
    start = {
        unit.row.parent.stage
        for group in table.groups
        for unit in group.blocks.values()
        if unit.row.parent
    }
    before = "a coin" if not leaves_policy(table.stage) else ", ".join(sorted(start))
    rows: list[list[str | Cell]] = []
    for group, difference in zip(table.groups, [None, *table.differences], strict=True):
        found = mean_of(group, key)
        cells = NONE if found is None else _mean_cell(key, *found)
        gain = gain_of(group, key, partial(_before, key))
        row: list[str | Cell] = [
            group.label,
            _runs(group, key),
            cells,
            NONE if gain is None else _gain_cell(key, *gain, len(group.values_of(key))),
        ]
        if several:
            row += [_difference_cell(key, difference), difference.how if difference else ""]
        rows.append(row)
    head = ["group", "runs", "mean", f"gain over {before}" if before else "gain"]
    return Table([*head, *[f"− ({first})", "how"] * several], rows)


def _runs(group: Group, key: str) -> str:
    """How many runs have the key, of how many seeds if some share one, and of how many runs if
    others have it by another suite."""
    values = group.values_of(key)
    runs, seeds = len(values), len(group.by_seed(values))
    text = f"{runs} runs of {seeds} seed{'s' * (seeds != 1)}" if seeds < runs else str(runs)
    others = group.of_other_suites(key)
    return f"{text}; not {others} of another suite" if others else text


def _before(key: str, row: Row) -> float | None:
    """The key in the policy that a run started from; of reward models, a coin's."""
    if not leaves_policy(row.stage):
        return COIN["value"]
    is_alike = row.parent is not None and len({row.suite, row.parent.suite} - {""}) < 2
    return row.parent.value(key) if row.parent and is_alike else None


def _mean_cell(key: str, mean: Mean, over: str) -> Cell:
    text = _interval(key, mean)
    return Cell([(shown(key, mean.value), ""), (text + " over items" * (over == "items"), "small")])


def _gain_cell(key: str, mean: Mean, runs: int, of: int) -> Cell:
    note = f", {runs} of {of} runs" * (runs < of)
    return Cell([(gained(key, mean.value), ""), (_interval(key, mean, "+") + note, "small")])


def _interval(key: str, mean: Mean, sign: str = "") -> str:
    if mean.low is None:
        return "one seed" if mean.n < 2 else "all the same"
    return interval(key, {"low": mean.low, "high": mean.high}, sign)


def _difference_cell(key: str, difference: Difference | None) -> str | Cell:
    if difference is None:
        return "the first"
    mean = difference.mean
    if mean is None:
        return NONE
    verdict = difference.verdict(key)
    word = "" if verdict == "unclear" else f" {verdict}"
    parts = [(f"{gained(key, mean.value)}{word}", verdict)]
    if mean.low is not None:
        parts.append((_interval(key, mean, "+"), "small"))
    elif mean.n > 1:
        parts.append(("all the same: no interval", "small"))
    if mean.p is not None and difference.adjusted is not None:
        parts.append((f"p {_p(mean.p)}, Holm {_p(difference.adjusted)}", "small"))
    return Cell(parts)


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _effects(tables: Sequence[Compared]) -> list[Block]:
    """What each setting changes, where several do."""
    rows: list[list[str | Cell]] = [
        [
            effect.setting,
            f"{effect.end} − {effect.start}",
            f"{table.stage}: {about(table.key).title}",
            _difference_cell(table.key, effect.difference),
            effect.difference.how,
        ]
        for table in tables
        for effect in table.effects
    ]
    if not rows:
        return []
    text = (
        "The mean difference between two values of one setting, over the seeds and the settings of "
        "the others that were run with both."
    )
    family = _family([e.difference for t in tables for e in t.effects])
    head = ["setting", "values", "goal", "effect", "how"]
    return [
        Heading("The effect of each setting"),
        Paragraph(text + family + "." * bool(family)),
        Table(head, rows),
    ]


def _others(tables: Sequence[Compared]) -> list[Block]:
    """The other stages' goals after the last stages."""
    if not tables or len(tables[0].groups) < 2:
        return []
    text = "The same for goals of other stages, measured after the last one."
    family = _family([d for table in tables for d in table.differences])
    blocks: list[Block] = [Paragraph(text + family + "." * bool(family))]
    for table in tables:
        blocks += [Paragraph(f"{table.stage}: {title(table.key)}"), _compared_table(table)]
    return [Fold("The last stage on the other goals", blocks)]


# --- every figure


_SPREAD = (
    "sd is the sample standard deviation over n different runs (ladders that share a run count it "
    f"once). {NONE}: one run only, which has no spread; shares are in percent. compare.json has "
    "the value of every ladder."
)


def _ladder_table(found: Comparison) -> Table:
    """Each ladder's goals, before and after each stage; the ladders by group."""
    by_tip = {ladder.tip.folder: ladder for ladder in found.ladders}
    ladders = [by_tip[u.row.folder] for group in found.groups for u in group.blocks.values()]
    each = [{g.stage: g.step for g in goals(one.by_stage.values())} for one in ladders]
    names = [stage for stage in stages() if any(stage in steps for steps in each)]
    rows = [
        [one.label, one.tip.name, *(steps.get(stage, NONE) for stage in names)]
        for one, steps in zip(ladders, each, strict=True)
    ]
    return Table(["ladder", "its last run", *(f"{name}: its goal" for name in names)], rows)


def _table(found: Sequence[Line], comparison: Comparison) -> Table:
    """A row for each figure, and for each group that has other values of it."""
    known: dict[str, tuple[str, Callable[[float], str]]] = {
        **{cost.key: (cost.title, cost.show) for cost in COSTS},
        **{key: (benchmark_title(one), one.shown) for key, one in comparison.asked.items()},
    }
    at = {ladder.tip.folder: n for n, ladder in enumerate(comparison.ladders)}
    groups = comparison.groups
    is_split = 1 < len(groups) <= MANY
    parts = {g.label: [at[u.row.folder] for u in g.blocks.values()] for g in groups}
    rows: list[list[str | Cell]] = []
    for line in found:
        name, show = known.get(line.key) or (title(line.key), partial(shown, line.key))
        for label, ladders in (parts if is_split else {"": list(at.values())}).items():
            values = _of_runs(line, comparison, ladders)
            if not values:
                continue
            cells = [show(fmean(values)), NONE if len(values) < 2 else show(_sd(values))]
            cells += [f"{show(min(values))} to {show(max(values))}", str(len(values))]
            shown_cells = [Cell([(text, "")]) for text in cells]
            rows.append([f"{line.stage}: {name}", *[label] * is_split, *shown_cells])
    return Table(["stage: key", *["group"] * is_split, "mean", "sd", "min to max", "n"], rows)


def _sd(values: Sequence[float]) -> float:
    return 0.0 if min(values) == max(values) else stdev(values)


def _of_runs(line: Line, found: Comparison, ladders: Sequence[int]) -> list[float]:
    """The values of some ladders' different runs."""
    by_run = {
        found.ladders[n].by_stage[line.stage].folder: value
        for n in ladders
        if (value := line.values[n]) is not None
    }
    return list(by_run.values())


def _missing(ladders: Sequence[Ladder]) -> list[str]:
    """Keys without a value and the reason, with the ladders that it is true of."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for one in ladders:
        for (stage, why), titles in missing(one.by_stage.values()).items():
            found.setdefault((stage, ", ".join(titles), why), []).append(one.label)
    return [
        f"{stage} ({'all' if len(of) == len(ladders) else '; '.join(_distinct(of))}): {text}: {why}"
        for (stage, text, why), of in found.items()
    ]

"""compare.json: every figure of a comparison, for programs."""

from dataclasses import asdict
from typing import Any

from fourstage.report.comparison import Comparison
from fourstage.report.contrasts import Compared, Difference, mean_of
from fourstage.report.statistics import Mean

DIGITS = 6  # of figures


def content(found: Comparison) -> dict[str, Any]:
    """compare.json."""
    label = {one.tip.folder: one.label for one in found.ladders}
    return {
        "suite": found.files.suite,
        "ladders": [
            {
                "label": ladder.label,
                "run": ladder.tip.name,
                "runs": {stage: row.id for stage, row in ladder.by_stage.items()},
            }
            for ladder in found.ladders
        ],
        "differs": found.differs,
        "groups": [
            {
                "label": group.label,
                "seeds": [unit.seeds for unit in group.blocks.values()],
                "ladders": [label[unit.row.folder] for unit in group.blocks.values()],
            }
            for group in found.groups
        ],
        "comparisons": [row for table in (*found.goals, *found.others) for row in _rows(table)],
        "effects": [
            {
                **{"stage": table.stage, "key": table.key, "setting": one.setting},
                **{"from": one.start, "to": one.end},
                **_difference(one.difference, table.key),
            }
            for table in (*found.goals, *found.others)
            for one in table.effects
        ],
        "metrics": [asdict(line) for line in (*found.figures, *found.public)],
        "costs": [asdict(line) for line in found.costs],
    }


def _rows(table: Compared) -> list[dict[str, Any]]:
    """A row for each group that has the key."""
    rows = []
    for group, difference in zip(table.groups, [None, *table.differences], strict=True):
        if (found := mean_of(group, table.key)) is None:
            continue
        mean, over = found
        row = {"stage": table.stage, "key": table.key, "group": group.label, **_mean(mean)}
        row |= {"over": over, "values": dict(group.values_of(table.key))}
        if difference:
            row["difference"] = {
                "to": table.groups[0].label,
                **_difference(difference, table.key),
            }
        rows.append(row)
    return rows


def _difference(found: Difference, key: str) -> dict[str, Any]:
    """Its figures, null where there are none, and how they came about."""
    figures = _mean(found.mean) if found.mean else dict.fromkeys(("n", "mean", "low", "high"))
    p, adjusted_p = (found.mean.p if found.mean else None), found.adjusted
    more = {"p": p, "p_holm": adjusted_p, "how": found.how, "verdict": found.verdict(key)}
    return figures | more


def _mean(mean: Mean) -> dict[str, Any]:
    ends = {name: getattr(mean, name) for name in ("low", "high")}
    rounded = {name: None if end is None else round(end, DIGITS) for name, end in ends.items()}
    return {"n": mean.n, "mean": round(mean.value, DIGITS), **rounded}

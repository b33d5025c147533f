"""How far the true score follows the learned one as PPO moves away from its reference, by group.

A seed's rollouts are put into bins of their KL; each seed has a mean in a bin, and a group the
mean of its seeds, with Student's t interval over the seeds (Gao et al. 2022, arXiv 2210.10760).
"""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from fourstage.report.charts import over_optimisation
from fourstage.report.contrasts import Group
from fourstage.report.figures import SCORES
from fourstage.report.files import Files
from fourstage.report.html import Block, Cell, Figure, Figures, Heading, Paragraph, Table
from fourstage.report.statistics import Mean, t_mean

EDGES = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)  # of the bins, nats an answer
MOST_DRAWN = 3  # groups, of two lines each
TEXT = (
    "KL from the policy that ppo started from, nats an answer, while training. Over-optimisation "
    "shows as a learned reward that rises on while the true score falls. A mean is over the seeds "
    "that have rollouts in the bin, with Student's t interval over them."
)

Rollout = tuple[float, list[float]]  # its KL, and its SCORES


def kl_blocks(groups: Sequence[Group], files: Files) -> list[Block]:
    """A table and a drawing of ppo's groups; nothing if no run has both scores and the KL."""
    rows: list[list[str | Cell]] = []
    series: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        by_seed: dict[str, list[Rollout]] = defaultdict(list)
        for unit in group.blocks.values():
            if unit.row.run:
                curves = files.curves(unit.row.run.folder / "metrics.csv")
                by_seed[unit.seeds] += rollouts(curves)
        seeds = list(by_seed.values())
        for at, name in enumerate(SCORES.values()):
            points = [(kl, scores[at]) for seed in seeds for kl, scores in seed]
            series |= {f"{group.label}: {name}": points} if points else {}
        for where, means in binned(seeds).items():
            rows.append([group.label, where, str(means[0].n), *map(_cell, means)])
    if not rows:
        return []
    drawn = dict(list(series.items())[: len(SCORES) * MOST_DRAWN])
    chart = over_optimisation("KL from the reference, nats an answer", "score", drawn)
    return [
        Heading("Scores as KL grows in ppo"),
        Paragraph(TEXT),
        Figures([Figure("Scores against KL", chart, "Dots are rollouts of all seeds.")], "large"),
        Table(["group", "KL", "seeds", *SCORES.values()], rows),
    ]


def rollouts(columns: dict[str, list[tuple[float, float]]]) -> list[Rollout]:
    """Those of a run's metrics.csv that have a KL and all scores."""
    kl, *scores = (dict(columns.get(name, ())) for name in ("train/kl", *SCORES))
    steps = [step for step in kl if all(step in score for score in scores)]
    return [(kl[step], [score[step] for score in scores]) for step in steps]


def binned(seeds: Sequence[Sequence[Rollout]]) -> dict[str, list[Mean]]:
    """The bin in words -> the mean of each score over the seeds that have rollouts in it."""
    of_seeds: dict[int, list[list[float]]] = defaultdict(list)
    for seed in seeds:
        by_bin: dict[int, list[list[float]]] = defaultdict(list)
        for kl, scores in seed:
            by_bin[bisect.bisect_right(EDGES, kl)].append(scores)
        for at, found in by_bin.items():
            of_seeds[at].append([fmean(column) for column in zip(*found, strict=True)])
    return {
        words(at): [t_mean(column) for column in zip(*of_seeds[at], strict=True)]
        for at in sorted(of_seeds)
    }


def words(at: int) -> str:
    if at == 0:
        return f"below {EDGES[0]:g}"
    return f"{EDGES[at - 1]:g} to {EDGES[at]:g}" if at < len(EDGES) else f"from {EDGES[-1]:g}"


def _cell(mean: Mean) -> Cell:
    text = "one seed" if mean.n < 2 else "all the same"
    if mean.low is not None and mean.high is not None:
        text = f"[{mean.low:.3f}, {mean.high:.3f}]"
    return Cell([(f"{mean.value:.3f}", ""), (text, "small")])

"""What did each stage do? One report from the files under outputs/runs, and from nothing else.

    python -m fourstage report [outputs=outputs] [run=NAME]
    python -m fourstage report compare [NAME ... | all] [KEY=VALUE ...] [by=KEY,KEY]
                                       [base=KEY=VALUE] [outputs=outputs]

For example:

    python -m fourstage report run=grpo
    python -m fourstage report compare stage=grpo seed=0,1,2
    python -m fourstage report compare tag=lr_sweep base=lr=3e-4

The first takes the latest finished run that no other started from (or `run=`: an id, <stage>-<id>,
a folder, or a stage's name) and compares it with its ancestors and the weights they began with in
outputs/report/{report.md, report.html, stages.json} and its drawings in figures/. The second
compares ladders, in groups by the settings that differ: those named, `all`, or those that fulfil
the conditions, which may be of any setting (stages.sft.lr=1e-3). docs/compare.md explains it. The
same runs give the same bytes: the files contain no times of day.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from fourstage.errors import UserError
from fourstage.files import write_atomic
from fourstage.report import figures, tables
from fourstage.report.compare import write_comparison
from fourstage.report.files import Files, Metric
from fourstage.report.goals import goal_table
from fourstage.report.html import Answers, Block, Bullets, Fold, Heading, Paragraph, write
from fourstage.report.keys import NONE, keys, measured
from fourstage.report.ladder import (
    Row,
    Run,
    choose,
    ladder,
    leaves_policy,
    notes_on_items,
    other_items,
    read_rows,
    read_runs,
    tips,
    with_differences,
)
from fourstage.report.summary import ending, marks, prompts, sentences

NOT_ASKED = [("not asked", "small")]
# stages.json keeps a renamed metric under its old name too, for the programs that read it
FORMER_NAMES = {"preference_score": "true_score"}


def write_report(
    outputs: Path, name: str | None = None, tell: Callable[[list[Row]], None] = lambda rows: None
) -> Path:
    """Write report.md, report.html, stages.json and figures/ into outputs/report and return that
    folder; `tell` is called with what was read. Raises UserError if there is no such run."""
    files = Files()
    runs = read_runs(outputs, files)
    tip = choose(runs, name, outputs)
    line = ladder(tip, runs, files)
    rows = with_differences(read_rows(line, files), files)
    curves = {stage: files.curves(run.folder / "metrics.csv") for stage, run in line.items()}
    others = [run.name for run in tips(runs) if run not in line.values()]
    folder = outputs / "report"
    write(folder, "report", f"fourstage: {tip.name}", document(rows, tip, curves, files, others))
    write_atomic(folder / "stages.json", stages_json(rows, files.suite))
    tell(rows)
    return folder


def stages_json(rows: list[Row], suite: str) -> str:
    """The stage table for programs: for each stage the metrics as the evaluation wrote them, and
    the paired differences to the policy that it started from. Public benchmarks are metrics whose
    names begin with benchmark/."""
    table = [
        {
            "stage": row.stage,
            "run": row.id,
            "parents": row.parents,
            "metrics": _with_old_names(row.metrics)
            | {key: one.cell for key, one in row.benchmarks.items()},
            "differences": _with_old_names(row.differences),
        }
        for row in rows
    ]
    return json.dumps({"suite": suite, "rows": table}, indent=1, allow_nan=False) + "\n"


def _with_old_names(metrics: dict[str, Metric]) -> dict[str, Metric]:
    return metrics | {old: metrics[new] for old, new in FORMER_NAMES.items() if new in metrics}


def document(
    rows: list[Row], tip: Run, curves: figures.Curves, files: Files, others: list[str]
) -> list[Block]:
    """The report, from the answer (what did each stage do?) to the details."""
    whole, parts = keys(rows)
    by_part: list[Block] = [
        tables.suite_table(rows, parts),
        Paragraph("And the differences to the parent:"),
        _changes(rows, parts),
    ]
    notes = tables.data_notes(rows)
    absent = [
        f"{stage}: {'; '.join(names)}: {why}"
        for (stage, why), names in tables.missing(rows).items()
    ]
    return [
        Heading(f"From {_start(rows)} to {tip.stage}", 1),
        *map(Paragraph, _warnings(rows, tip, files)),
        Bullets(sentences(rows)),
        *figures.goal_figures(rows),
        *_answers(rows),
        Heading("The runs"),
        *map(Paragraph, _facts(tip, files, others)),
        *figures.lineage_figures(rows),
        Heading("What each stage did"),
        Paragraph(_how_to_read(rows)),
        tables.stage_table(rows),
        Heading("Each stage on its own goal"),
        goal_table(rows),
        *_kl(rows),
        Heading("What each stage changed"),
        Paragraph(
            "For every key the paired difference to the policy that the stage started from. The "
            "alignment tax is what it lost on the goals of other stages"
            f"{'; random weights have nothing to lose' * rows[0].is_random}."
        ),
        _changes(rows, whole),
        *_benchmarks(rows),
        *figures.learning_curves(curves),
        *figures.over_optimisation_blocks(curves.get("ppo")),
        *figures.difficulty_blocks(rows),
        *figures.heat_map_blocks(rows),
        Heading("What it cost"),
        *tables.cost_table(rows),
        Fold("The whole suite", [tables.suite_table(rows, whole)]),
        *[Fold("By task and by difficulty", by_part)] * bool(parts),
        *([Heading("What went into training"), Bullets(notes)] if notes else []),
        Heading("What is missing"),
        Bullets([*files.problems, *absent] or ["nothing"]),
    ]


def _start(rows: list[Row]) -> str:
    """What the ladder starts from, for readers."""
    names = [row.stage for row in rows if row.run is None and not row.is_random]
    return names[0] if names else "random weights"


def _warnings(rows: list[Row], tip: Run, files: Files) -> list[str]:
    debug = (
        "These are debug runs of a few steps a stage: they show that the path works, and their "
        "figures say nothing about the method."
    )
    return [
        *[debug] * tip.is_debug,
        *files.suite_notes(tip.name),
        *notes_on_items(rows, tip.name),
    ]


def _facts(tip: Run, files: Files, others: list[str]) -> list[str]:
    facts = [f"Run {tip.name}", *(f"{key} {value}" for key, value in tip.facts().items())]
    said = [", ".join(facts) + f"; evaluation suite {files.suite}."]
    if others:
        said.append(f"Other ladders found (run=NAME reports on one): {', '.join(others)}.")
    return said


def _how_to_read(rows: list[Row]) -> str:
    text = (
        "A cell has the value, its 95 % interval, and n, the number of answers, problems, pairs or "
        "blocks of text. "
    )
    if not any(map(other_items, rows)):
        text = f"Every row was measured on the same held-out data. {text}"
    if any(row.differences for row in rows):
        text += (
            "Below it is the difference to the policy that the stage started from, with the paired "
            "95 % interval over the items of both; it is called better or worse if that interval "
            "excludes 0. "
        )
    text += f"{NONE}: not measured; the last section says why."
    if not all(leaves_policy(row.stage) for row in rows):
        text += " A reward model gives no answers, and only reward models are asked about pairs."
    return text


def _kl(rows: list[Row]) -> list[Block]:
    """How far the reinforcement stages went from the sft policy."""
    cells = {
        row.stage: row.metrics.get("kl_to_sft") for row in rows if row.stage in ("ppo", "grpo")
    }
    shown = {stage: measured("kl_to_sft", cell) for stage, cell in cells.items()}
    known = ", ".join(f"{stage} {text}" for stage, text in shown.items() if text != NONE)
    return [Paragraph(f"KL from the sft policy, nats an answer: {known}.")] if known else []


def _benchmarks(rows: list[Row]) -> list[Block]:
    if not any(row.benchmarks for row in rows):
        return []
    text = (
        "Measured by lm-eval on each stage's export: the value with its 95 % interval, n items, "
        "and what guessing gives. Where lm-eval has no standard error there is no interval; one "
        "without width is no evidence. Generated answers are asked for in the chat format from sft "
        "on, and after the bare prompt before that. Differences between stages are not paired here."
    )
    return [Heading("Public benchmarks"), Paragraph(text), tables.benchmark_table(rows)]


def _answers(rows: list[Row]) -> list[Block]:
    blocks = [
        Answers(
            prompt,
            [
                (row.stage, said.answer, marks(said)) if said else (row.stage, None, NOT_ASKED)
                for row in rows
                if row.answers
                for said in [row.answers.get(prompt)]
            ],
        )
        for prompt in prompts(rows)
    ]
    right = (
        "Right: the answer ended by itself and has the sentence that is known to be right or, for "
        "a problem, the right result; its steps are not judged."
    )
    heading = Heading("The same prompts, answered by every stage")
    return [heading, Paragraph(right), *blocks] if blocks else []


def _changes(rows: list[Row], names: list[str]) -> Block:
    table = tables.change_table(rows, names)
    return table if table.rows else Paragraph("None was measured: the last section says why.")


def main(arguments: list[str]) -> None:
    """Write the report, print what came out and where it is. Raises UserError for a mistake in the
    command."""
    is_comparison = arguments[:1] == ["compare"]
    outputs, name, names = "outputs", None, []
    for argument in arguments[is_comparison:]:
        if argument.startswith("outputs="):
            outputs = argument.removeprefix("outputs=")
        elif is_comparison:
            names.append(argument)
        elif argument.startswith("run="):
            name = argument.removeprefix("run=")
        else:
            raise UserError(f"unknown argument {argument!r} (see --help)")
    if is_comparison:
        folder = write_comparison(Path(outputs), names, _print)
        print(f"comparison: {folder / 'compare.html'} (the same as {folder / 'compare.md'})")
    else:
        width = shutil.get_terminal_size().columns
        folder = write_report(Path(outputs), name, lambda rows: _print(ending(rows, width)))
        print(f"report: {folder / 'report.html'} (the same as {folder / 'report.md'})")


def _print(lines: list[str]) -> None:
    """Characters that the output can't encode become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    print("\n".join(lines).encode(encoding, "replace").decode(encoding))

"""The model card of an exported run: what it is, what each stage did, and how to load it."""

from __future__ import annotations

from pathlib import Path

from fourstage.report import tables
from fourstage.report.files import Files
from fourstage.report.html import Bullets, Code, Heading, Paragraph, markdown
from fourstage.report.ladder import (
    RANDOM,
    Run,
    ladder,
    leaves_policy,
    read_rows,
    read_run,
    read_runs,
    with_differences,
)
from fourstage.runs.records import start_name

FRONT = """\
---
library_name: {library}
pipeline_tag: {task}
tags:
- fourstage
---

"""


def model_card(folder: Path, library: str, usage: str) -> str:
    """The card of a finished run in Markdown, with the front matter that Hugging Face's hub reads.
    `usage` is an example in Python, for the library."""
    files = Files()
    runs = read_runs(folder.parent.parent, files)
    tip = read_run(folder)
    line = ladder(tip, runs, files)
    rows = with_differences(read_rows(line, files), files)
    is_policy = leaves_policy(tip.stage)
    kind, task = ("A language", "generation") if is_policy else ("A reward", "classification")
    facts = ", ".join(f"{key} {value}" for key, value in tip.facts().items())
    blocks = [
        Heading(tip.name, 1),
        Paragraph(
            f"{kind} model trained by fourstage up to the stage {tip.stage}: {facts}. It is for "
            "research on what each stage of training does: expect wrong answers."
        ),
        Heading("Use"),
        Code(usage, "python"),
        Heading("Lineage"),
        Bullets(_lineage(line)),
        Heading("What each stage did"),
        Paragraph(
            "Measured on held-out data: the value, its 95 % interval and n, then the paired "
            "difference to the stage that it started from, with its interval."
        ),
        tables.stage_table(rows),
    ]
    return FRONT.format(library=library, task=f"text-{task}") + markdown(blocks)


def _lineage(line: dict[str, Run]) -> list[str]:
    """What each run started from and which commit trained it, a line each."""
    names = {run.id: run.name for run in line.values()}
    found = []
    for run in line.values():
        parents = " and ".join(names.get(parent, parent) for parent in run.parents.values())
        start = start_name(run.record)
        parents = parents or ("random weights" if start == RANDOM else start)
        commit = run.record.get("git", {}).get("commit")
        found.append(f"{run.name}, from {parents}" + (f"; commit {commit[:12]}" if commit else ""))
    return found

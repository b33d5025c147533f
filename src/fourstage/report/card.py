"""The model card of an exported run: what it is, what each stage did, and how to load it."""

from __future__ import annotations

from pathlib import Path

from fourstage.report import tables
from fourstage.report.files import Files
from fourstage.report.html import Bullets, Code, Heading, Paragraph, markdown
from fourstage.report.ladder import Run, choose, ladder, read_rows, read_runs, with_differences

FRONT = """\
---
library_name: transformers
tags:
- fourstage
---

"""


def model_card(outputs: Path, folder: Path, usage: str) -> str:
    """The card of a run in Markdown, with the front matter that Hugging Face's hub reads; `usage`
    is an example in Python."""
    files = Files()
    runs = read_runs(outputs, files)
    tip = choose(runs, str(folder), outputs)
    line = ladder(tip, runs, files)
    rows = with_differences(read_rows(line, files), files)
    facts = ", ".join(f"{key} {value}" for key, value in tip.facts().items())
    blocks = [
        Heading(tip.name, 1),
        Paragraph(
            f"A language model that fourstage trained up to its stage {tip.stage}: {facts}. It is "
            "made for research on what each stage of training does, not for use: expect wrong "
            "answers."
        ),
        Heading("Use"),
        Code(usage, "python"),
        Heading("Lineage"),
        Bullets([_run(run) for run in line.values()]),
        Heading("What each stage did"),
        Paragraph(
            "On held-out data: value, 95 % interval and n; below it the paired difference to the "
            "stage that it started from."
        ),
        tables.stage_table(rows),
    ]
    return FRONT + markdown(blocks)


def _run(run: Run) -> str:
    """A run in one line."""
    parents = " and ".join(run.parents.values()) or "random weights"
    commit = str(run.record.get("git", {}).get("commit"))[:12]
    return f"{run.name}, from {parents}, commit {commit}"

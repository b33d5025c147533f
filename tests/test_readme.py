"""Every command that the README and the documents for users name exists and means what they say."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from fourstage.__main__ import COMMANDS as NAMES
from fourstage.ladder import place, stages
from fourstage.lineage.plan import make_plan
from tests.fakes import config

ROOT = Path(__file__).parent.parent
DOCS = ("data", "results", "runs", "serving", "setup")
FILES = ("README.md", "sweeps/README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCS))
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in FILES}
COMMANDS = sorted(
    {
        found.replace("\\|", "|").strip().rstrip("`")
        for text in TEXTS.values()
        for found in re.findall(
            r"(python (?:train\.py|-m fourstage)[^`\n#]*)", re.sub(r"\\\n +", "", text)
        )
    }
)


def combinations(words: list[str]) -> list[list[str]]:
    """The overrides of each job of a command."""
    jobs: list[list[str]] = [[]]
    for override in OverridesParser.create().parse_overrides(words):
        key = override.get_key_element()
        if override.is_interval_sweep():
            values = [f"{key}={end}" for end in (override.value().start, override.value().end)]
        elif override.is_sweep_override():
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values = [override.input_line]
        jobs = [[*job, value] for job in jobs for value in values]
    return jobs


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_a_training_command_makes_a_plan(command: str, tmp_path: Path, monkeypatch) -> None:
    text = tmp_path / "my texts" / "a, b.txt"
    text.parent.mkdir()
    text.write_text("All the world's a stage, and all the men and women merely players.\n" * 50)
    if "mine/" in command:
        (tmp_path / "mine").mkdir()
        monkeypatch.chdir(tmp_path)
        exec(re.search(r"(?s)<<'END'\n(.*?)\nEND", TEXTS["docs/data.md"])[1], {})
    command = command.replace("my texts/a, b.txt", str(text)).replace("=FILE", f"='\"{text}\"'")
    command = command.replace("data.root=mirror", f"data.root={tmp_path}")
    words = shlex.split(command)[2:]
    for job in combinations([word for word in words if not word.startswith(("-", "hydra"))]):
        if {"sweep=seeds", "sweep=slurm", "sweep=joblib"} & set(job):
            continue  # only Hydra's own multirun reads them: test_train_cli.py
        job = [word for word in job if not word.startswith("trainer=")]  # ZeRO needs GPUs
        command = config(*job, f"outputs={tmp_path}/outputs", "trainer=cpu")
        plan, wanted = make_plan(command), command["stage"]
        assert [run.stage for run in plan.runs] == [
            stage
            for stage in stages()[: place(wanted) + 1]
            if "stages.grpo.parent=sft" not in job or stage in ("pretrain", "sft", "grpo")
        ]


def test_modules_and_make_targets_exist() -> None:
    for name in {m for c in COMMANDS for m in re.findall(r"-m (fourstage\.\w+)", c)}:
        assert importlib.util.find_spec(name), name
    named = {n for c in COMMANDS for n in re.findall(r"-m fourstage (\w+)", c)}
    assert named - {"COMMAND"} == set(NAMES)
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    named = {t for text in TEXTS.values() for t in re.findall(r"(?:`|    )make ([a-z-]+)", text)}
    assert named and named <= targets


def test_links_lead_to_files_and_headings() -> None:
    for path in [ROOT / name for name in FILES] + sorted((ROOT / "docs").glob("*.md")):
        prose = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", path.read_text("utf-8"))
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            name, _, heading = link.partition("#")
            if "://" in name:
                continue
            target = path.parent / name if name else path
            assert target.exists(), f"{path.name}: {link}"
            if heading:
                lines = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M)
                assert heading in {line.lower().replace(" ", "-") for line in lines}, link


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    there = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert there == set(re.findall(r"^- \[(\w+\.md)\]", index, re.M))


def test_the_tree_names_every_module() -> None:
    tree = (ROOT / "docs" / "code.md").read_text("utf-8")
    modules = {path.stem for path in (ROOT / "src/fourstage").glob("*.py")} - {"__init__"}
    assert {m for m in modules if not re.search(rf"\b{m}\.py\b", tree)} == set()

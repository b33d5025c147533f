"""What a command says: its plan, what it came to, and other commands to paste."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fourstage.data import DataConfig
from fourstage.ladder import LADDER
from fourstage.lineage.parents import named_parents, parent_key, recorded
from fourstage.lineage.plan import Plan
from fourstage.report.files import Files
from fourstage.report.goals import NO_COMPARISON, goals
from fourstage.report.keys import measured, title
from fourstage.report.ladder import choose, ladder, read_rows, read_runs
from fourstage.stages import StageSettings
from fourstage.tracking.callbacks import clock


def show(plan: Plan, console: Console, commit: str | None) -> None:
    """Print the plan: what is found, what is trained, its size and time, and warnings."""

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    command = plan.command
    total, active = command.model.count_params(plan.vocab_size)
    debug = f", debug={command.debug}" if command.debug else ""
    say(
        f"{command.model.name}: {total:,} parameters, {active:,} active; "
        f"data {command.data.title}, seed {command.seed}, "
        f"{command.trainer.accelerator} {command.trainer.precision}{debug}"
    )
    table = Table("stage", "run", "from", "budget", "time", "status")
    for run in plan.runs:
        settings = run.settings
        time = "?" if run.estimate is None else clock(run.estimate)
        table.add_row(
            run.stage,
            run.id,
            run.start.name if run.start else ", ".join(run.parents.values()),
            budget(settings),
            time if run.to_do else "",
            run.status + (" (again)" if command.force and run is plan.runs[-1] else ""),
        )
    console.print(table)
    for warning in dict.fromkeys(line for run in plan.runs for line in run.warnings):
        say(f"warning: {warning}")
    for note in filter(None, [*(run.hint for run in plan.runs), evaluated_otherwise(plan)]):
        say(f"note: {note}")
    for run in plan.runs:
        made_by = run.record.get("git", {}).get("commit")
        if commit and made_by and made_by != commit:
            say(
                f"warning: {run.name} was made by commit {made_by[:8]}, this is {commit[:8]} "
                f"(stage={run.stage} force=true trains it again)"
            )


def budget(settings: StageSettings) -> str:
    """How long a stage trains."""
    if settings.as_is:
        return "none: as it is"
    return settings.max_time or f"{settings.max_steps} steps x {settings.batch_size}"


def evaluated_otherwise(plan: Plan) -> str:
    """How to repeat stored evaluations with other settings or held-out data than this command."""
    settings = asdict(plan.command.evaluation)
    changes: dict[str, int] = {}
    names: dict[str, list[str]] = {"with other settings": [], "on other held-out data": []}
    for run in plan.runs:
        config = run.record.get("config", {})
        stored = config.get("evaluation", {})
        if changed := {k: v for k, v in settings.items() if stored.get(k, v) != v}:
            names["with other settings"].append(run.name)
            changes |= changed
        data = recorded(DataConfig, run.record, "data") if "data" in config else None
        if data not in (None, plan.command.data):
            names["on other held-out data"].append(run.name)
    said = [
        f"{', '.join(runs)} {'was' if len(runs) == 1 else 'were'} evaluated {how}"
        for how, runs in names.items()
        if runs
    ]
    if not said:
        return ""
    tip = plan.runs[-1]  # its ancestors are evaluated on its data
    other_settings, other_data = names.values()
    last = tip.name if other_data else other_settings[-1]
    words = ["evaluation", f"run={last}"]
    words += ["ladder=true"] * (len(other_settings) > 1 or bool(other_data))
    words += [f"evaluation.{key}={value}" for key, value in changes.items()]
    when = "when this is done, " if last == tip.name and tip.to_do else ""
    return f"{'; '.join(said)}: {when}{command_of(plan, *words)}"


def ending(plan: Plan, folder: Path, overrides: Sequence[str]) -> str:
    """What the stage that was asked for came to, where it is, and which commands to try next."""
    stage = plan.command.stage
    shows = ["report"] if LADDER[stage].leaves == "scalar" else ["chat", "report"]
    commands = [command_of(plan, show, f"run={folder.name}") for show in shows]
    if (following := next_stage(plan)) is not None:
        more = [*same_parents(plan, following), *missing_file(plan, following)]
        commands.append(train_command(following, [*overrides, *more]))
    lines = [gain(plan.store.outputs, folder.name), f"run: {folder}", "next:"]
    return "\n".join([*lines, *(f"  {command}" for command in commands)])


def next_stage(plan: Plan) -> str | None:
    """The first stage that starts from this one; those that the config tells to come first."""
    stage, settings = plan.command.stage, plan.command.stages
    heirs = [
        name
        for name in LADDER
        if name != stage and stage in named_parents(name, settings[name]).values()
    ]
    told = [
        name for name in heirs if settings[name].parent == stage != LADDER[name].parents["policy"]
    ]
    return next(iter([*told, *heirs]), None)


def same_parents(plan: Plan, stage: str) -> list[str]:
    """The settings that name, for the next stage, the runs that this command named for its own."""
    planned = [run.stage for run in plan.runs]
    named: dict[str, str] = {}
    for folder in (f for run in plan.runs for f in run.parent_folders.values()):
        its = folder.name.rpartition("-")[0]
        if its not in planned:
            named[its] = folder.name
    wanted = named_parents(stage, plan.command.stages[stage])
    return [
        f"{parent_key(stage, role)}={named[its]}" for role, its in wanted.items() if its in named
    ]


def missing_file(plan: Plan, stage: str) -> list[str]:
    """The setting that names a stage's own file, if it still has to be given."""
    data, source = plan.command.data, LADDER[stage].source
    from_gym = source == "reasoning" and data.reasoning.chosen
    is_there = data.embedded or getattr(data, source).path or from_gym
    return [] if is_there else [f"data.{source}.path=FILE"]


def gain(outputs: Path, name: str) -> str:
    """A run's goal before and after it, with 95 % intervals, as in its report."""
    files = Files()
    runs = read_runs(outputs, files)
    tip = choose(runs, name, outputs)
    rows = read_rows(ladder(tip, runs, files), files)
    goal = next(goal for goal in goals(rows) if goal.stage == tip.stage)
    if goal.after["value"] is None:
        return f"{tip.stage}: {title(goal.name)} not measured: {goal.after['why']}"
    before, after = (measured(goal.name, cell) for cell in (goal.before, goal.after))
    start = f" ({goal.start})" if goal.start else ""
    doubt = f"; {goal.verdict}" if goal.verdict in NO_COMPARISON else ""
    return f"{tip.stage}: {title(goal.name)} {before}{start} → {after} (95 % intervals{doubt})"


# --- commands to paste


def command_of(plan: Plan, *words: str) -> str:
    """`python -m fourstage ...` for the runs of this plan."""
    outputs = plan.command.outputs
    where = [] if outputs == "outputs" else [f"outputs={outputs}"]
    return shlex.join([python_word(), "-m", "fourstage", *words, *where])


def train_command(stage: str, overrides: Sequence[str]) -> str:
    """The command that trains another stage of the same ladder."""
    not_kept = ("stage=", "ancestors=", "force=", "sweep=")
    kept = [override for override in overrides if not override.startswith(not_kept)]
    script = Path(sys.argv[0])  # train.py, wherever it is
    train = str(script) if script.name == "train.py" else "train.py"
    flags = [word for word in sys.argv[1:] if word.startswith("--config")]
    return shlex.join([python_word(), train, *flags, f"stage={stage}", *kept])


def python_word() -> str:
    """This interpreter, as short as the shell understands it here."""
    here, path = Path.cwd(), Path(sys.executable)
    if shutil.which("python") == sys.executable:  # an activated .venv
        return "python"
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

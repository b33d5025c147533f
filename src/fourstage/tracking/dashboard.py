"""W&B dashboards as code: a workspace to explore runs in, and a report with the same panels.

    python -m fourstage dashboard [outputs=outputs] [project=fourstage] [entity=NAME]
                                  [mode=auto|online|offline]

For example:

    python -m fourstage dashboard mode=offline

dashboard_spec.py says which panel shows which keys. Where runs of a stage differ in a setting, the
report also has the stage's goal by the values of that setting. Online (if a key is configured, as
for the runs themselves) both are saved to W&B, replacing those of an earlier call. Their JSON is
written to outputs/dashboard/ either way: the same runs give the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourstage.errors import UserError
from fourstage.files import read_json, write_atomic
from fourstage.interruptions import run_command
from fourstage.job import LoggerConfig
from fourstage.runs.records import read_record
from fourstage.settings import build
from fourstage.tracking.dashboard_spec import (
    SECTIONS,
    STEP,
    Panel,
    Section,
    resolved,
    sweep_sections,
)

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

TITLE = "From random weights to reasoning"
REAL_RUNS = "Tags() not in ['debug']"  # debug runs would distort a mean over seeds


def known_keys(outputs: Path) -> tuple[set[str], list[str]]:
    """The summary keys of the finished runs under `outputs`; a line for each unreadable folder."""
    from fourstage.tracking.wandb_content import benchmark_summary, summary

    keys: set[str] = set()
    broken: list[str] = []
    for folder in sorted(path for path in (outputs / "runs").glob("*") if path.is_dir()):
        try:
            record = read_record(folder)
            if record["status"] == "finished":
                keys |= summary(folder, record["cost"]).keys()
                keys |= benchmark_summary(folder).keys()
        except UserError as error:
            broken.append(str(error))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            broken.append(f"{folder}: its evaluation is broken ({error!r})")
    return keys, broken


def widget(panel: Panel) -> Any:
    """The wandb-workspaces panel; three fit into the 24 columns of a report."""
    from wandb_workspaces.reports import v2 as wr

    keys, layout = list(panel.keys), wr.Layout(w=8, h=8)
    match panel.kind:
        case "bars":
            return wr.BarPlot(title=panel.title, metrics=keys, orientation="v", layout=layout)
        case "lines":
            regex = f"^{re.escape(keys[0]).replace(re.escape('*'), '.*')}$"
            shown = {"metric_regex": regex} if "*" in keys[0] else {"y": keys}
            return wr.LinePlot(title=panel.title, x=panel.x, layout=layout, **shown)
        case "scatter":
            x, y = wr.SummaryMetric(panel.x), wr.SummaryMetric(keys[0])
            return wr.ScatterPlot(title=panel.title, x=x, y=y, layout=layout)
        case "table":
            return wr.WeavePanelSummaryTable(table_name=keys[0], layout=wr.Layout(w=24, h=12))


def workspace(entity: str, project: str, sections: list[Section]) -> Workspace:
    """The panels of the sections that group by stage, over runs that are grouped so, in the order
    of the ladder."""
    from wandb_workspaces import workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ws.Section(
                name=section.name,
                panels=[widget(panel) for panel in section.panels],
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=3),
            )
            for section in sections
            if section.groupby == ("JobType",)
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=REAL_RUNS,
            groupby=[ws.Metric("JobType")],
            order=[ws.Ordering(ws.Metric("CreatedTimestamp"), ascending=True)],
        ),
    )


def report(entity: str, project: str, sections: list[Section]) -> Report:
    """All sections' panels under headings, with a sentence each. If `entity` is given, W&B is asked
    for the project when the report is written or saved."""
    from wandb_workspaces.reports import v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for section in sections:
        of_stage = f" and Metric('JobType') == '{section.stage}'" if section.stage else ""
        runs = wr.Runset(
            entity=entity,
            project=project,
            name=section.name if section.stage else "by stage",
            filters=REAL_RUNS + of_stage,
            groupby=list(section.groupby),
            order=[wr.OrderBy("CreatedTimestamp", ascending=True)],
        )
        grid = wr.PanelGrid(runsets=[runs], panels=[widget(panel) for panel in section.panels])
        blocks += [wr.H2(section.name), wr.P(section.text), grid]
    return wr.Report(project=project, entity=entity, title=TITLE, blocks=blocks, width="fluid")


def write(outputs: Path, project: str, sections: list[Section]) -> Path:
    """workspace.json and report.json, as W&B would get them, in outputs/dashboard."""
    folder = outputs / "dashboard"
    for make in (workspace, report):
        model = make("", project, sections)._to_model()
        tree = model.model_dump(mode="json", by_alias=True, exclude_none=True)
        text = without_random_ids(json.dumps(tree, indent=1, ensure_ascii=False))
        write_atomic(folder / f"{make.__name__}.json", text + "\n")
    return folder


def without_random_ids(text: str) -> str:
    """The same JSON with "1", "2", ... for the ids that wandb-workspaces draws at random."""
    numbers: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return f'{found[1]}"{numbers.setdefault(found[2], str(len(numbers) + 1))}"'

    return re.sub(r'("(?:id|__id__)": )"([^"]+)"', numbered, text)


def save(outputs: Path, entity: str, project: str, sections: list[Section]) -> list[str]:
    """Save both to W&B and return their addresses. Raises whatever wandb raises.

    outputs/dashboard/saved.json remembers the addresses, so that the next call replaces both; to
    start anew after deleting them in W&B, remove that file too.
    """
    import wandb

    entity = entity or wandb.Api().default_entity
    path = outputs / "dashboard" / "saved.json"
    saved = read_json(path) if path.exists() else {}
    place = saved.setdefault(f"{entity}/{project}", {})
    contents = {workspace: ("sections", "settings", "runset_settings"), report: ("blocks", "width")}
    for make, parts in contents.items():
        view = new = make(entity, project, sections)
        if make.__name__ in place:
            view = type(new).from_url(place[make.__name__])
            for part in parts:
                setattr(view, part, getattr(new, part))
        view.save()
        place[make.__name__] = view.url
        write_atomic(path, json.dumps(saved, indent=1) + "\n")
    return list(place.values())


def main(arguments: list[str]) -> None:
    """Run the command. Raises UserError for an unknown argument, for mode=online without a key,
    and if W&B refuses (the JSON is written first)."""
    from fourstage.report.files import Files
    from fourstage.report.groups import swept
    from fourstage.report.ladder import read_runs, tips
    from fourstage.tracking.wandb_settings import entity_of, project_of, wandb_mode

    values = dict(argument.partition("=")[::2] for argument in arguments)
    outputs = Path(values.pop("outputs", "") or "outputs")
    logger = build(LoggerConfig, values, "")
    mode, why = wandb_mode(logger)
    if why and logger.mode == "online":
        raise UserError(f"mode=online: {why}: run `wandb login` or set WANDB_API_KEY")
    keys, broken = known_keys(outputs)
    for line in broken:
        print(f"skipped: {line}", file=sys.stderr)
    runs = read_runs(outputs, Files())
    sweeps = sweep_sections(swept(runs.values()), len(tips(runs)))
    sections = [*resolved(SECTIONS, keys), *sweeps]
    project, entity = project_of(logger), entity_of(logger) or ""
    folder = write(outputs, project, sections)
    if mode != "online":
        print(
            f"W&B: {why or mode}: the dashboards are written to {folder}/workspace.json and "
            "report.json; to send them: wandb login, wandb sync the runs, and this command again"
        )
        return
    try:
        addresses = save(outputs, entity, project, sections)
    except Exception as error:  # wandb raises anything from its own errors to TypeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"W&B did not save the dashboards of project {project!r}: {reason}; their JSON "
            f"is in {folder}"
        ) from error
    print("\n".join(f"W&B: saved {address}" for address in addresses))


if __name__ == "__main__":
    run_command(main)

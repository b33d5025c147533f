"""The dashboards: every key that is logged is shown, and what is written is what W&B takes."""

from __future__ import annotations

import csv
import json
import re
import shutil
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import wandb
from wandb_workspaces.reports.v2 import PanelGrid, Report
from wandb_workspaces.reports.v2.internal import ReportViewspec
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.tracking import dashboard
from fourstage.tracking.dashboard_spec import (
    SECTIONS,
    STEP,
    Panel,
    Section,
    resolved,
    sweep_sections,
)

# W&B's own tables of a run; test_wandb_offline.py reads them back
TABLES = {"ladder", "samples", "samples_by_stage"}
# what a run logs only on a GPU, or with other settings than debug=fast
OPTIONAL = {
    "cost/mfu",
    "cost/peak_gpu_memory_mib",
    "speed/mfu",
    "eval*/pass_at_4*",
    "eval*/pass_at_8*",
    "eval*/knowledge_reworded",  # the first prompts are about held-out facts
    "benchmark*",  # `python -m fourstage benchmark` does
    "eval_random/distinct_2",  # random weights may answer no two words
}


def is_shown(key: str, sections) -> bool:
    keys = [k for section in sections for panel in section.panels for k in panel.keys]
    return any(fnmatchcase(key, pattern) for pattern in keys)


@pytest.fixture(scope="module")
def logged(ladder) -> set[str]:
    """Every key of the ladder's W&B runs: the columns of metrics.csv, the summaries, the tables.

    The ends of the intervals are left out: the table `ladder` shows them.
    """
    keys = set(TABLES)
    for path in (ladder / "runs").glob("*/metrics.csv"):
        with open(path, newline="") as file:
            keys |= set(next(csv.reader(file)))
    keys |= dashboard.known_keys(ladder)[0]
    return {key for key in keys if not key.startswith(("eval_low/", "eval_high/"))} - {"step"}


def test_every_key_that_the_stages_log_is_shown(logged) -> None:
    assert len(logged) > 80
    assert not sorted(key for key in logged if not is_shown(key, SECTIONS))


def test_every_key_of_every_panel_is_logged(logged) -> None:
    shown = {key for section in SECTIONS for p in section.panels for key in (*p.keys, p.x)}
    silent = {key for key in shown - {STEP} if not any(fnmatchcase(one, key) for one in logged)}
    assert not sorted(k for k in silent if not any(fnmatchcase(k, p) for p in OPTIONAL))


def test_a_key_without_a_panel_is_noticed(logged) -> None:
    without_router = [section for section in SECTIONS if section.name != "router"]
    lost = {key for key in logged if not is_shown(key, without_router)}
    assert {"router/load_entropy", "router/max_over_mean"} <= lost
    assert all(key.startswith(("router/", "eval/router", "eval_random/router")) for key in lost)
    assert not is_shown("train/new", SECTIONS)
    assert is_shown("router/drift/layer11", SECTIONS) and not is_shown("router/drift/", SECTIONS)


def test_the_sections() -> None:
    names = [section.name for section in SECTIONS]
    assert names == ["ladder", "losses", "preference", "reasoning", "router", "samples", "system"]
    for section in SECTIONS:
        for panel in section.panels:
            assert panel.keys and (panel.kind in ("bars", "lines") or len(panel.keys) == 1)
            assert panel.kind != "lines" or len(panel.keys) == 1 or "*" not in "".join(panel.keys)


def test_a_sweep_is_shown_by_the_settings_that_differ(logged) -> None:
    found = sweep_sections({"grpo": ["stages.grpo.lr", "model.name"]}, n_ladders=6)
    sweep, ladders = found
    assert sweep.groupby == ("config.stages.grpo.lr", "config.model.name")
    assert sweep.stage == "grpo" and "grpo by grpo.lr, model.name: " in sweep.text
    assert ladders.groupby == ("Group", "JobType") and ladders.stage == ""
    every = sweep_sections({stage: ["model.name"] for stage in LADDER}, n_ladders=2)
    shown = {key for section in every for panel in section.panels for key in panel.keys}
    assert shown <= logged
    assert sweep_sections({}, n_ladders=1) == []


def test_the_reports_runs_are_grouped_by_nested_keys_of_the_config() -> None:
    [section] = sweep_sections({"grpo": ["stages.grpo.lr"]}, n_ladders=1)
    tree = dashboard.report("", "p", [section])._to_model().model_dump(mode="json", by_alias=True)
    [grid] = panel_grids(tree)
    [runs] = grid["metadata"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "stages.value.grpo.lr"}]
    filters = json.dumps(runs["filters"])
    assert '"value": ["debug"]' in filters and '"name": "jobType"' in filters and "grpo" in filters
    assert dashboard.workspace("", "p", [section]).sections == []


def test_patterns_of_bars_become_the_keys_that_are_there() -> None:
    sections = (
        Section(
            "s",
            "text",
            (
                Panel("bars", "tasks", ("eval/solved", "eval/solved/*")),
                Panel("bars", "none", ("eval/other/*",)),
                Panel("lines", "layers", ("router/drift/layer*",)),
            ),
        ),
    )
    [section] = resolved(sections, {"eval/solved/b", "eval/solved/a", "eval/solve"})
    assert [panel.keys for panel in section.panels] == [
        ("eval/solved", "eval/solved/a", "eval/solved/b"),
        ("router/drift/layer*",),
    ]


def test_panels_of_wandb() -> None:
    def config(panel: Panel) -> dict:
        return dashboard.widget(panel)._to_model().model_dump(by_alias=True)["config"]

    layers = config(Panel("lines", "layers", ("router/drift/layer*",)))
    assert (layers["useMetricRegex"], layers["xAxis"]) == (True, STEP)
    regex = re.compile(layers["metricRegex"])
    assert regex.search("router/drift/layer12") and not regex.search("router/drift")
    assert not regex.search("other/router/drift/layer1")
    scores = config(Panel("lines", "scores", ("train/score", "train/true_score"), "train/kl"))
    assert (scores["xAxis"], scores["metrics"]) == ("train/kl", ["train/score", "train/true_score"])
    point = config(Panel("scatter", "score", ("train/score",), "train/kl"))
    assert (point["xAxis"], point["yAxis"]) == ("summary:train/kl", "summary:train/score")
    bars = config(Panel("bars", "b", ("eval/bits_per_char",)))
    assert (bars["metrics"], bars["vertical"]) == (["eval/bits_per_char"], True)
    table = json.dumps(config(Panel("table", "t", ("samples_by_stage",))))
    assert '"val": "samples_by_stage"' in table


# --- the command


@pytest.fixture
def no_key(tmp_path, monkeypatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def panel_grids(tree: dict) -> list[dict]:
    return [block for block in tree["spec"]["blocks"] if block["type"] == "panel-grid"]


def test_without_a_key_the_json_is_written_and_loads_back(no_key, ladder, tmp_path, capsys) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "runs").symlink_to(ladder / "runs")
    dashboard.main([f"outputs={outputs}"])
    folder = outputs / "dashboard"
    assert capsys.readouterr().out == (
        f"W&B: no API key: the dashboards are written to {folder}/workspace.json and report.json; "
        "to send them: wandb login, wandb sync the runs, and this command again\n"
    )
    texts = [(folder / f"{name}.json").read_text() for name in ("workspace", "report")]
    dashboard.main([f"outputs={outputs}", "mode=offline"])
    assert texts == [(folder / f"{name}.json").read_text() for name in ("workspace", "report")]
    assert capsys.readouterr().out.startswith("W&B: offline: the dashboards")

    # they are valid for wandb-workspaces, and it makes its objects of them
    trees = [json.loads(text) for text in texts]
    models = [View.model_validate(trees[0]), ReportViewspec.model_validate(trees[1])]
    dumped = [m.model_dump(mode="json", by_alias=True, exclude_none=True) for m in models]
    assert dumped[0] == trees[0] and panel_grids(dumped[1]) == panel_grids(trees[1])
    workspace, report = Workspace._from_model(models[0]), Report._from_model(models[1])
    sections = {section.name: section.panels for section in workspace.sections}
    assert list(sections) == [section.name for section in SECTIONS]
    by_task = next(p for p in sections["reasoning"] if p.title.startswith("accuracy by task"))
    assert "eval/reasoning_accuracy/chain_sum" in [metric.name for metric in by_task.metrics]
    grids = [block for block in report.blocks if isinstance(block, PanelGrid)]
    assert [len(grid.panels) for grid in grids] == [len(panels) for panels in sections.values()]

    # real runs, grouped by stage, which is the runs' job_type, against the runs' own x axis
    runsets = [grid.runsets[0] for grid in grids]
    assert {(*runs.groupby, runs.filters) for runs in runsets} == {
        ("run.JobType", workspace.runset_settings.filters)
    }
    view = trees[0]["spec"]["section"]
    assert view["runSets"][0]["grouping"] == [{"section": "run", "name": "jobType"}]
    assert view["runSets"][0]["filters"]["filters"] == [
        {
            "key": {"section": "run", "name": "tags"},
            "op": "NIN",
            "value": ["debug"],
            "disabled": False,
        }
    ]
    assert view["settings"]["xAxis"] == STEP and view["settings"]["useRunsTableGroupingInPanels"]


def test_it_needs_no_run_and_leaves_out_the_panels_that_need_one(no_key, tmp_path) -> None:
    dashboard.main([f"outputs={tmp_path}", "project=other"])
    text = (tmp_path / "dashboard" / "workspace.json").read_text()
    assert json.loads(text)["project"] == "other"
    assert "eval/bits_per_char" in text and "by task" not in text


@pytest.mark.parametrize(
    ("file", "text"),
    [("run.json", "{"), ("run.json", "[]"), ("run.json", "{}"), ("run.json", None)]
    + [("eval.json", text) for text in ("{", "[]", '{"metrics": {"x": 3}}')],
)
def test_a_broken_run_is_named_and_skipped(no_key, ladder, tmp_path, capsys, file, text) -> None:
    (tmp_path / "runs").mkdir()
    for folder in (ladder / "runs").iterdir():
        (tmp_path / "runs" / folder.name).mkdir()
        for name in ("run.json", "eval.json"):
            shutil.copy(folder / name, tmp_path / "runs" / folder.name)
    bad = next((tmp_path / "runs").glob("sft-*"))
    (bad / file).unlink()
    if text is not None:
        (bad / file).write_text(text)
    dashboard.main([f"outputs={tmp_path}"])
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith(f"skipped: {bad}")
    assert (
        "eval/reasoning_accuracy/chain_sum" in (tmp_path / "dashboard/workspace.json").read_text()
    )


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("run=sft", "run: unknown key, known are name, project, entity, mode"),
        ("mode", "mode: expected one of auto, online, offline, disabled, got ''"),
        ("mode=on", "mode: expected one of auto, online, offline, disabled, got 'on'"),
        ("mode=online", "mode=online: no API key: run `wandb login` or set WANDB_API_KEY"),
    ],
)
def test_mistakes_are_one_line(no_key, tmp_path, argument, says) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        dashboard.main([f"outputs={tmp_path}", argument])
    assert "\n" not in str(error.value) and not (tmp_path / "dashboard").exists()


class Server:
    """What W&B's GraphQL server answers to wandb-workspaces: it keeps the views that are saved."""

    def __init__(self) -> None:
        self.views: dict[str, dict] = {}

    def __call__(self, api: object, query: str, variables: dict) -> dict:
        if "upsertView(" in query:
            made = variables.get("id") is None
            name = variables.get("id") or f"view{len(self.views) + 1}000"  # reads as base64
            view = {
                **{key: variables[key] for key in ("name", "displayName", "spec")},
                "id": name,
                "project": {"name": variables["projectName"], "entityName": "me", "id": "1"},
            }
            self.views[name] = view
            return {"upsertView": {"view": view, "inserted": made}}
        if "ProjectInternalId" in query:
            return {"project": {"id": "p", "internalId": "1"}}
        if "allViews" in query:
            name = variables["viewName"]
            found = [{"node": v} for v in self.views.values() if v["name"] == name]
            spec = {"spec": json.dumps({"version": -1, **json.loads(found[0]["node"]["spec"])})}
            return {"project": {"allViews": {"edges": [{"node": {**found[0]["node"], **spec}}]}}}
        assert "SpecificReport" in query
        return {"view": self.views[variables["reportId"]]}


@pytest.fixture
def server(no_key, monkeypatch) -> Server:
    server = Server()
    api = SimpleNamespace(
        default_entity="me",
        client=SimpleNamespace(app_url="https://wandb.test"),
        projects=lambda entity: [SimpleNamespace(name="fourstage")],
    )
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "Api", lambda: api)
    for module in ("workspaces.internal", "reports.v2.interface"):
        monkeypatch.setattr(f"wandb_workspaces.{module}.execute_graphql", server)
    return server


def test_online_both_are_saved_and_the_next_call_replaces_them(server, tmp_path, capsys) -> None:
    dashboard.main([f"outputs={tmp_path}"])
    first = capsys.readouterr().out.splitlines()
    assert [line.split("?")[0].split("--")[0] for line in first] == [
        "W&B: saved https://wandb.test/me/fourstage",
        "W&B: saved https://wandb.test/me/fourstage/reports/From-random-weights-to-reasoning",
    ]
    assert len(server.views) == 2
    before = {name: json.loads(view["spec"]) for name, view in server.views.items()}
    grids = panel_grids({"spec": before["view2000"]})
    assert all(g["metadata"]["runSets"][0]["project"]["entityName"] == "me" for g in grids)
    bank = before["view1000"]["section"]["panelBankConfig"]
    assert [s["name"] for s in bank["sections"]] == [section.name for section in SECTIONS]

    dashboard.main([f"outputs={tmp_path}", "mode=online"])
    assert capsys.readouterr().out.splitlines() == first and len(server.views) == 2
    after = json.loads(server.views["view1000"]["spec"])["section"]["panelBankConfig"]
    assert [s["name"] for s in after["sections"]] == [s["name"] for s in bank["sections"]]
    assert json.loads(server.views["view2000"]["spec"])["width"] == "fluid"
    assert (tmp_path / "dashboard" / "report.json").exists()


def test_a_server_that_refuses_costs_one_line_and_the_json_is_there(
    server, tmp_path, monkeypatch
) -> None:
    def refuse(*args: object) -> None:
        raise wandb.errors.CommError("permission denied\nlong story")

    for module in ("workspaces.internal", "reports.v2.interface"):
        monkeypatch.setattr(f"wandb_workspaces.{module}.execute_graphql", refuse)
    with pytest.raises(UserError, match="did not save .*permission denied") as error:
        dashboard.main([f"outputs={tmp_path}"])
    assert "\n" not in str(error.value)
    assert {p.name for p in (tmp_path / "dashboard").iterdir()} == {"workspace.json", "report.json"}

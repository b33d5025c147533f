"""What is one new file elsewhere is known everywhere: in the table, the charts, the lists."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import yaml

from fourstage import chat, ladder, tokenizer
from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.evaluation.__main__ import main as evaluate
from fourstage.files import read_json
from fourstage.ladder import LADDER, Stage, stages
from fourstage.lineage.climb import climb
from fourstage.lineage.plan import make_plan
from fourstage.model.weights import load_policy
from fourstage.report import write_report
from fourstage.runs.__main__ import main as runs
from fourstage.runs.records import read_record, write_record
from fourstage.runs.store import RunStore
from fourstage.stages import grpo
from fourstage.tokenizer import Tokenizer
from tests.fakes import QUICK, config

STAGE = Stage(
    name="smooth",
    source="chat",
    goal="chat_exact",
    parents={"policy": "sft"},
    module="tests.toys.stage",
)
SETTINGS = Path(__file__).parent / "toys" / "stage.yaml"


def tree(*overrides: str, **changes) -> dict:
    values = config(*QUICK, *overrides)
    values["stages"]["smooth"] = yaml.safe_load(SETTINGS.read_text()) | changes
    return values


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(ladder.LADDER, "smooth", STAGE)


def test_a_stage_is_a_file_a_row_and_its_settings(known, own_ladder, capsys):
    outputs = own_ladder
    folder = climb(tree("stage=smooth", f"outputs={outputs}"))
    record = read_record(folder)
    assert folder.name == f"smooth-{record['id']}" and record["status"] == "finished"
    assert record["parents"] == {"policy": read_record(RunStore(outputs).find("sft"))["id"]}
    assert record["config"]["stages"]["smooth"]["smoothing"] == 0.1
    assert "smooth: " in (said := capsys.readouterr().out) and "chat" in said.split("next:")[1]

    write_report(outputs, folder.name)
    table = json.loads((outputs / "report" / "stages.json").read_text())
    rows = {row["stage"]: row for row in table["rows"]}
    assert list(rows) == ["random", "pretrain", "sft", "smooth"]
    assert rows["smooth"]["metrics"]["bits_per_char"]["value"] > 0
    page = (outputs / "report" / "report.html").read_text()
    assert page.count("smooth") > 5

    runs(["list", f"outputs={outputs}"])
    assert folder.name in capsys.readouterr().out
    assert stages()[-1] == "smooth" and chat.furthest(outputs) == folder
    again = climb(tree("stage=smooth", f"outputs={outputs}"))
    assert again == folder and "found" in capsys.readouterr().out


def test_a_stage_may_change_its_network_and_take_another(known, own_ladder, monkeypatch):
    """Its own shape is in config.json, and counts for what starts from it."""

    def pruned(job):
        prepared = prepare(job)
        policy = prepared.module.policy
        policy.blocks, policy.config = policy.blocks[:1], replace(policy.config, n_layers=1)
        return prepared

    prepare = STAGE.code.prepare
    monkeypatch.setattr(STAGE.code, "prepare", pruned)
    words = [f"outputs={own_ladder}", "model.n_layers=2"]
    folder = climb(tree("stage=smooth", *words))
    assert read_json(folder / "config.json")["model"]["n_layers"] == 1
    assert load_policy(folder)[0].config.n_layers == 1

    monkeypatch.setattr(STAGE.code, "prepare", prepare)
    heir = tree("stage=smooth", *words, parent=folder.name)
    with pytest.raises(UserError, match="is of another model .*: n_layers 1, not 2"):
        make_plan(heir)
    monkeypatch.setitem(ladder.LADDER, "smooth", replace(STAGE, takes_any_shape=True))
    again = climb(heir)
    assert again != folder and read_json(again / "config.json")["model"]["n_layers"] == 1


def test_its_mistakes_are_one_line(known, tmp_path):
    for changes, line in (
        ({"smoothing": 2.0}, "stages.smooth.smoothing: must be between 0 and 1, got 2.0"),
        ({"parent": "grpo"}, None),
        ({"parent": "smooth"}, "stages.smooth.parent: smooth cannot descend from smooth: name"),
        ({"parent": "reward"}, "stages.smooth.parent: reward will not do, expected a language"),
    ):
        values = tree("stage=smooth", f"outputs={tmp_path}", **changes)
        if line is None:
            assert [run.stage for run in make_plan(values).runs][-2:] == ["grpo", "smooth"]
            continue
        with pytest.raises(UserError, match=line):
            make_plan(values)


def test_a_run_of_a_stage_that_is_not_known_here_is_named_and_left_alone(own_ladder, capsys):
    outputs = own_ladder
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LADDER, "smooth", STAGE)
        folder = climb(tree("stage=smooth", f"outputs={outputs}"))
    capsys.readouterr()
    before = (folder / "run.json").read_bytes()
    runs(["list", f"outputs={outputs}"])
    said = capsys.readouterr()
    assert "not known here (smooth)" in said.err and "sft-" in said.out
    write_report(outputs, "grpo")
    climb(config(*QUICK, "stage=sft", f"outputs={outputs}"))
    assert (folder / "run.json").read_bytes() == before

    grpo_run = RunStore(outputs).find("grpo")
    write_record(grpo_run, parents={"policy": folder.name.split("-")[1]})
    (grpo_run / "eval.json").unlink()  # else it is kept, as it says more
    evaluate([f"run={grpo_run.name}", f"outputs={outputs}"])
    runs(["show", grpo_run.name, f"outputs={outputs}"])


def lower_case() -> Tokenizer:
    """Without capitals: 77 tokens."""
    backend = json.loads(Tokenizer.char()._backend.to_str())
    kept = [t for t in backend["model"]["vocab"] if not (len(t) == 1 and t.isupper())]
    backend["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    backend["normalizer"]["normalizers"].append({"type": "Lowercase"})
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(backend)))


def test_a_tokenizer_is_a_function_in_a_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tokenizer.TOKENIZERS, "lower", lower_case)
    words = [*QUICK, f"outputs={tmp_path}", "tokenizer.name=lower"]
    folder = climb(config(*words, "stage=grpo"))
    policy, own = load_policy(folder)
    assert policy.vocab_size == own.vocab_size == 77
    assert own.decode(own.encode("What is an LLM?")) == "what is an llm?"
    write_report(tmp_path)
    assert len(json.loads((tmp_path / "report" / "stages.json").read_text())["rows"]) == 6
    chat.main([f"run={folder.name}", f"outputs={tmp_path}", "prompt=HI", "temperature=0"])
    assert capsys.readouterr().out
    with pytest.raises(
        UserError, match="tokenizer.name: expected one of char, lower, bpe, hf, got 'none'"
    ):
        make_plan(config(*words, "tokenizer.name=none"))


def test_an_evaluation_key_is_a_row_in_the_suite(monkeypatch, own_ladder):
    shouts = suite._share("chat answers that shout", ["chat"], shouted)
    monkeypatch.setitem(suite.DEFINITIONS, "chat_shouted", shouts)
    evaluate(["run=sft", f"outputs={own_ladder}"])
    stored = read_json(RunStore(own_ladder).find("sft") / "eval.json")["metrics"]["chat_shouted"]
    assert stored["n"] == 4 and 0 <= stored["low"] <= stored["value"] <= stored["high"] <= 1
    write_report(own_ladder, "sft")
    rows = json.loads((own_ladder / "report" / "stages.json").read_text())["rows"]
    assert rows[-1]["metrics"]["chat_shouted"] == stored
    assert "chat answers that shout" in (own_ladder / "report" / "report.html").read_text()


def shouted(item: suite.Item) -> bool:
    return "!" in item["answer"]


def test_a_loss_is_a_recipe_and_its_parts(monkeypatch, own_ladder):
    def by_sum(loss_BA, mask_BA, totals):
        return (loss_BA * mask_BA).sum() / 1000

    monkeypatch.setitem(grpo.REDUCTIONS, "sum", by_sum)
    monkeypatch.setitem(grpo.RECIPES, "toy", grpo.Recipe("mean", "token", "sum", clip_high=0.3))
    words = [*QUICK, "stage=grpo", f"outputs={own_ladder}", "stages.grpo.loss=toy"]
    folder = climb(config(*words))
    settings = read_record(folder)["config"]["stages"]["grpo"]
    assert (settings["loss"], settings["clip_high"]) == ("toy", 0.3)
    assert RunStore(own_ladder).find("grpo") == folder

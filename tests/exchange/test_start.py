"""Ladders that start from a pretrained checkpoint: their plans, their runs and their reports."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourstage.errors import UserError
from fourstage.evaluation.__main__ import main as evaluate
from fourstage.lineage.climb import climb
from fourstage.lineage.plan import make_plan
from fourstage.lineage.runner import train_stage
from fourstage.model.weights import load_policy
from fourstage.report import write_report
from fourstage.report.compare import write_comparison
from fourstage.report.files import Files
from fourstage.report.goals import taxes
from fourstage.report.ladder import ladder, read_rows, read_runs, with_differences
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore
from fourstage.tracking.wandb_content import ladder_table, samples_by_stage
from tests.exchange.checkpoints import logits, network, save
from tests.fakes import FakeTrain, config, run
from tests.ladders import write_ladder

IDS_BT = torch.arange(60).view(2, 30)
VOCAB = 103


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(network("glm"), tmp_path_factory.mktemp("hf") / "tiny-glm")


def planned(*words: str, stage: str = "sft"):
    return make_plan(config(*words, f"stage={stage}"), words)


@pytest.fixture
def words(tmp_path, checkpoint) -> list[str]:
    """Of a command on the embedded data."""
    where = [f"outputs={tmp_path}/outputs", f"stages.pretrain.parent=hf:{checkpoint}"]
    return [*where, "debug=fast", "logger=none", "trainer=cpu"]


def test_model_and_tokenizer_are_the_checkpoint_s(words, checkpoint) -> None:
    plan = planned(*words, stage="grpo")
    model = plan.command.model
    assert (model.name, model.d_model, model.n_layers, model.num_experts) == ("tiny-glm", 32, 2, 4)
    assert (plan.command.tokenizer.name, plan.command.tokenizer.path) == ("hf", str(checkpoint))
    assert plan.runs[0].start.name == "tiny-glm" and plan.runs[0].parents == {}
    assert [run.start for run in plan.runs[1:]] == [None] * 4
    ids = [run.id for run in plan.runs]
    assert ids != [run.id for run in planned(words[0], *words[2:], stage="grpo").runs]


def test_the_id_is_of_the_content(words, checkpoint, tmp_path) -> None:
    before = [run.id for run in planned(*words).runs]
    moved = tmp_path / "tiny-glm"
    moved.symlink_to(checkpoint)
    there = [*words, f"stages.pretrain.parent=hf:{moved}"]
    assert [run.id for run in planned(*there).runs] == before
    copy = save(network("glm"), tmp_path / "another name")
    there = [*words, f"stages.pretrain.parent='hf:{copy}'"]
    assert [run.id for run in planned(*there).runs] == before
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "lm_head.weight": -weights["lm_head.weight"]}, copy / "model.safetensors")
    after = [run.id for run in planned(*there).runs]
    assert not set(after) & set(before)


def test_as_it_is_no_setting_of_pretrain_and_no_corpus_counts(words) -> None:
    as_is = [*words, "stages.pretrain.max_steps=0"]
    before = planned(*as_is).runs
    for more in (
        "stages.pretrain.lr=1e-9",
        "stages.pretrain.block_size=9999",
        "data.corpus.heldout=0.2",
    ):
        assert [run.id for run in planned(*as_is, more).runs] == [run.id for run in before], more
    assert before[0].id != planned(*words).runs[0].id
    assert before[0].data["digest"] == ""


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model=moe_nano", r"model=moe_nano: .* its own model, whose d_model is 32, not 64"),
        ("model.d_model=64", r"model.d_model=64: .* whose d_model is 32, not 64: leave model.d_m"),
        ("model.max_seq_len=1024", r"model.max_seq_len=1024: .* has positions for 512 tokens"),
        ("tokenizer=char", "tokenizer=char: .* brings its own tokenizer: leave tokenizer out"),
        ("stages.pretrain.parent=sft", "must be null: .* or from a pretrained checkpoint: hf:F"),
        (
            "stages.pretrain.parent=hf:/nowhere",
            "stages.pretrain.parent: there is no folder /nowhere",
        ),
        ("stages.sft.parent=hf:/x", "stages.sft.parent: only pretrain starts from a checkpoint"),
        ("stages.sft.max_steps=0", "stages.sft.max_steps: must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, word, line) -> None:
    with pytest.raises(UserError, match=line) as caught:
        planned(*words, word)
    assert "\n" not in str(caught.value)


def test_without_a_checkpoint_there_are_steps(tmp_path) -> None:
    with pytest.raises(UserError, match="stages.pretrain.max_steps: must be at least 1, got 0"):
        planned(f"outputs={tmp_path}", "stages.pretrain.max_steps=0")


def test_what_a_checkpoint_says_nothing_about_may_be_typed(words) -> None:
    more = ["model.dropout=0.1", "model.max_seq_len=300", "model.expert_path=loop"]
    model = planned(*words, *more, "model.d_model=32").command.model
    assert (model.dropout, model.max_seq_len, model.expert_path) == (0.1, 300, "loop")
    assert planned(*words).command.model.max_seq_len == 512


def test_a_tokenizer_of_more_tokens_than_the_embedding_has_rows(tmp_path) -> None:
    folder = save(network("qwen", vocab_size=90), tmp_path / "small")
    with pytest.raises(UserError, match="the tokenizer has 103 tokens, .* vocab_size 90"):
        planned(f"outputs={tmp_path}/o", f"stages.pretrain.parent=hf:{folder}")


def test_later_commands_agree(words, checkpoint) -> None:
    """The same command for a later stage, and one that names a run as the parent."""
    train = FakeTrain()

    def with_model(job):
        shape = {"kind": "policy", "vocab_size": VOCAB, "model": asdict(job.model)}
        (job.folder / "config.json").write_text(json.dumps(shape))
        (job.folder / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
        return train(job)

    run([*words, "model.dropout=0.1"], "sft", with_model)
    assert train.stages == ["pretrain", "sft"] and train.jobs[0].start.name == "tiny-glm"
    before = planned(*words, "model.dropout=0.1", stage="grpo")
    assert [run.status for run in before.runs] == ["found", "found", "train", "train", "train"]
    sft = before.runs[1].folder
    assert read_record(before.runs[0].folder)["start"]["name"] == "tiny-glm"
    bare = [words[0], *words[2:], f"stages.reward.parent={sft.name}"]
    (reward,) = planned(*bare, stage="reward").runs
    assert reward.id == before.runs[2].id
    with pytest.raises(UserError, match="stages.reward.parent=sft-.* brings its own model, whose"):
        planned(*bare, "model.dropout=0.2", stage="reward")
    with pytest.raises(UserError, match="stages.reward.parent=sft-.* brings its own tokenizer"):
        planned(*bare, "tokenizer=char", stage="reward")


@pytest.mark.parametrize("steps", [0, 2])
def test_a_ladder(steps, words, checkpoint, tmp_path, capsys) -> None:
    if steps == 0:
        words = [*words, "stages.pretrain.max_steps=0"]
    words = [*words, "stages.grpo.parent=sft"]
    tree = config(*words, "stage=grpo")
    climb(tree, overrides=words)
    said = capsys.readouterr().out
    assert ("none: as it is" in said) == (steps == 0) and "tiny-glm: 42,400" in said
    store = RunStore(tmp_path / "outputs")
    pretrain, sft, grpo = (store.find(stage) for stage in ("pretrain", "sft", "grpo"))
    policy, _ = load_policy(pretrain)
    expected = logits(network("glm"), IDS_BT)[..., :VOCAB]
    with torch.no_grad():
        found = policy.eval().logits(policy(IDS_BT).hidden_BTD)
    same = torch.allclose(found, expected, atol=1e-4)
    assert same == (steps == 0)

    climb(tree, overrides=words)
    assert "training" not in capsys.readouterr().out

    before = {path: path.read_bytes() for path in pretrain.glob("eval*")}
    assert len(before) == 4
    evaluate([f"run={pretrain.name}", f"outputs={tmp_path}/outputs"])
    assert {path: path.read_bytes() for path in pretrain.glob("eval*")} == before
    is_copy = before[pretrain / "eval.json"] == before[pretrain / "eval_random.json"]
    assert is_copy == (steps == 0)

    job = SimpleNamespace(stage="sft", folder=sft, run_id="x", ancestors={"pretrain": pretrain})
    later = ["sft"] if steps == 0 else ["pretrain", "sft"]
    columns = samples_by_stage(job)[0]  # with each row's answers, whether they are right
    assert columns[2::2] == ["tiny-glm", *later] and columns[3] == "tiny-glm: right"
    assert {row[0] for row in ladder_table(job)[1]} == {"tiny-glm", "pretrain", "sft"}

    folder = write_report(tmp_path / "outputs", grpo.name)
    rows = {row["stage"]: row for row in json.loads((folder / "stages.json").read_text())["rows"]}
    assert list(rows) == ["tiny-glm", "pretrain", "sft", "grpo"]
    assert rows["tiny-glm"]["run"] is None
    assert rows["tiny-glm"]["metrics"]["bits_per_char"]["value"] > 0
    page = (folder / "report.md").read_text()
    assert "# From tiny-glm to grpo" in page and "random weights" not in page
    assert ".csv is" not in page and ".jsonl is" not in page, "no file is missing or empty"


def test_data_files_without_a_corpus(words, tmp_path, capsys) -> None:
    chats = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(40)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    words = [*words, "stages.pretrain.max_steps=0", "data=files", f"data.chat.path={path}"]
    climb(config(*words, "stage=pretrain"), overrides=words)
    assert "bits per character" in capsys.readouterr().out
    store = RunStore(tmp_path / "outputs")
    folder = store.find("pretrain")
    cell = json.loads((folder / "eval.json").read_text())["metrics"]["bits_per_char"]
    assert cell == {
        "value": None,
        "why": "stages.pretrain needs data.corpus.path=FILE (text to learn from)",
    }
    assert {"metrics.csv", "samples.jsonl", "model.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    assert planned(*words, "data.chat.demonstrations=0").runs[0].status == "found"


def test_rows_of_several_ladders_are_named_for_their_starts(tmp_path) -> None:
    """A checkpoint that is called like a stage, and random weights."""
    for seed in (0, 1):
        write_ladder(tmp_path, seed, n=10, steps=5)
    (path,) = (tmp_path / "runs").glob("pretrain-pretraina*/run.json")
    start = {"name": "sft", "folder": "/there", "digest": "0"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "start": start}))
    write_comparison(tmp_path, ["all"])
    found = json.loads((tmp_path / "report" / "compare.json").read_text())
    rows = {line["stage"]: line["n"] for line in found["metrics"]}
    assert list(rows)[:2] == ["sft (checkpoint)", "random"] and "pretrain" in rows
    assert (rows["sft (checkpoint)"], rows["random"], rows["sft"]) == (1, 1, 2)


def test_what_a_checkpoint_could_it_can_lose(tmp_path) -> None:
    """The alignment tax of pretrain, if it ends below where it started."""
    tip = write_ladder(tmp_path, n=60, steps=5, stages=("pretrain",))
    for name in ("eval.json", "eval_items.jsonl"):  # the start is the better one
        own, start = tip / name, tip / name.replace(".json", "_random.json")
        own.rename(tip / "aside")
        start.rename(own)
        (tip / "aside").rename(start)
    record = json.loads((tip / "run.json").read_text())
    for start, expected in ((None, set()), ("tiny", {"pretrain"})):
        more = {"start": {"name": start, "folder": "", "digest": ""}} if start else {}
        (tip / "run.json").write_text(json.dumps(record | more))
        runs = read_runs(tmp_path, Files())
        rows = with_differences(read_rows(ladder(*runs.values(), runs, Files()), Files()), Files())
        goals_of_others = [replace(rows[1], stage=stage) for stage in ("ppo", "grpo")]
        lost = taxes([*rows, *(replace(row, parent=rows[1]) for row in goals_of_others)])
        assert {row.stage for row, _ in lost} & {"pretrain"} == expected


def test_a_checkpoint_that_changes_after_the_plan(words, tmp_path, checkpoint) -> None:
    copy = save(network("glm"), tmp_path / "copy")
    words = [*words, f"stages.pretrain.parent=hf:{copy}"]

    def train(job):
        save(network("glm", n_shared_experts=2), copy)
        return train_stage(job)

    with pytest.raises(UserError, match="has changed since the run was planned"):
        climb(config(*words, "stage=pretrain"), overrides=words, train=train)

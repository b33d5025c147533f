"""Run ids, mistakes in a config, parents and estimates: everything before training."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest

from fourstage.errors import UserError
from fourstage.ladder import LADDER
from fourstage.lineage.climb import climb
from fourstage.lineage.plan import make_plan
from fourstage.runs.records import write_record
from fourstage.runs.store import RunStore
from tests.fakes import FakeTrain, config, ids, run


def test_ids_are_letters_and_do_not_change(base) -> None:
    first = ids(base)
    assert list(first) == list(LADDER) and first == ids(base)
    assert len(set(first.values())) == 5
    assert all(re.fullmatch("[a-z]{10}", run_id) for run_id in first.values())


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ("model.balance=bias", []),
        ("model.z_loss_coef=0.1", []),
        ("model.balance=switch", ["pretrain", "sft"]),
        ("model.dropout=0.1", ["pretrain", "sft"]),
    ],
)
def test_the_size_of_a_piece_counts_where_the_weights_depend_on_it(base, model, stages) -> None:
    for stage in LADDER:
        one, other = (
            ids([*base, model, f"stages.{stage}.micro_batch_size={size}"], stage) for size in (2, 3)
        )
        assert (one[stage] != other[stage]) == (stage in stages), stage
    more = ids([*base, model, "trainer.devices=2"])
    assert (more["pretrain"] != ids([*base, model])["pretrain"]) == bool(stages)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", LADDER),
        ("model.d_expert=48", LADDER),
        ("debug=fast", LADDER),
        ("trainer.precision=bf16-mixed", LADDER),
        ("stages.pretrain.lr=0.00123", LADDER),
        ("stages.pretrain.optimizer=adamw", LADDER),
        ("stages.sft.batch_size=16", ("sft", "reward", "ppo", "grpo")),
        ("stages.reward.margin=0.5", ("reward", "ppo", "grpo")),
        ("stages.ppo.kl_coef=0.123", ("ppo", "grpo")),
        ("stages.grpo.loss=dapo", ("grpo",)),
        ("stages@stages.grpo=grpo_dapo", ("grpo",)),
        ("stages.grpo.parent=sft", ("grpo",)),
        # none of these moves a weight
        ("stages.pretrain.val_every=7", ()),
        ("stages.sft.micro_batch_size=4", ()),
        ("stages.grpo.checkpoint_every=1", ()),
        ("trainer.strategy=ddp", ()),
        ("trainer.devices=2", ()),
        ("logger=wandb", ()),
        ("force=true", ()),
        ("keep_checkpoints=true", ()),
        ("evaluation.max_pairs=5", ()),
        ("model.name=other", ()),
        ("stages.pretrain.lr=7e-3", ()),  # what it is, written otherwise
    ],
)
def test_what_determines_the_weights_determines_the_id(base, override, changed) -> None:
    before, after = ids(base), ids([*base, override])
    assert [stage for stage in after if after[stage] != before[stage]] == [
        stage for stage in changed if stage in after
    ]


def test_only_the_source_that_a_stage_reads_counts(base, tmp_path) -> None:
    before = ids(base)
    more = {"prompt": "Say 99", "chosen": "It is 99.", "rejected": "No."}
    with open(tmp_path / "files" / "preference.jsonl", "a") as file:
        file.write(json.dumps(more) + "\n")
    after = ids(base)
    assert [stage for stage in after if after[stage] != before[stage]] == ["reward", "ppo", "grpo"]
    files = tmp_path / "files"
    files.rename(tmp_path / "moved")  # the content counts, not where it lies
    moved = [override.replace("/files/", "/moved/") for override in base]
    assert ids(moved) == after


def test_every_hashed_setting_of_every_stage_changes_the_id(base) -> None:
    tree, plain = config(*base, "stage=grpo"), ids(base)
    for stage in LADDER:
        kind = LADDER[stage].code.Settings
        for field in dataclasses.fields(kind):
            value = tree["stages"][stage][field.name]
            if isinstance(value, bool):
                other = not value
            elif isinstance(value, int | float):
                other = value / 2 if isinstance(value, float) and value else value + 2
            else:
                continue  # parents, max_time, words
            changed = copy.deepcopy(tree) | {"stage": stage}
            changed["stages"][stage][field.name] = other
            differs = make_plan(changed).runs[-1].id != plain[stage]
            assert differs == (field.name not in kind.NOT_HASHED), (
                stage,
                field.name,
            )


def test_equal_times_are_one_run(base) -> None:
    times = ("00:00:02:00", "0:0:2:0", "00:00:01:60", "00:00:03:00")
    of = [ids([*base, f"stages.pretrain.max_time={t}"], "pretrain")["pretrain"] for t in times]
    assert of[0] == of[1] == of[2] != of[3]


MISTAKES = [
    ("stage=foo", "stage: expected one of pretrain, sft, reward, ppo, grpo, got 'foo'"),
    ("seed=1.5", "seed: expected a whole number, got 1.5"),
    ("seed=abc", "seed: expected a whole number, got 'abc'"),
    ("seed=-1", "seed: must be between 0 and 4294967295, got -1"),
    ("seed=99999999999999999999", "seed: must be at most 9223372036854775807 in size, got 99999"),
    ("evaluation.seed=-1", "evaluation.seed: must be between 0 and 4294967295, got -1"),
    ("stages.grpo=null", "stages.grpo: expected keys and values, got None"),
    ("+stages.dpo={lr: 1}", "stages.dpo: unknown key"),
    ("evaluation=null", "evaluation: expected keys and values, got None"),
    ("model.d_model=30", "d_model: must be a multiple of 4 in 32-true, got 30: take 28 or 32, or"),
    ("model.d_expert=3", "model.d_expert: must be a multiple of 4 in 32-true, got 3: take 4, or"),
    ("model.n_layers=1000000000000", "stages.pretrain: 37,312,000,000,013,248 parameters"),
    (
        "model.num_experts=1000000000000",
        "2,048 tokens at once take at least 185,012,817 GiB of memory",
    ),
    (
        "stages.pretrain.batch_size=1000000000000",
        "87,872 parameters and 256,000,000,000,000 tokens",
    ),
    ("stages.grpo.group_size=1000000000000", "87,872 parameters and 10,240,000,000,000,000 tokens"),
    ("stages.sft.batch_size=100000000000000000000", "must be at most 9223372036854775807 in size"),
    ("stages.reward.pairs_per_prompt=1000000000000", "stages.reward: 87,872 parameters and"),
    ("evaluation.samples=1000000000000", "evaluation.samples: must be at most 1000, got"),
    ("stages.grpo.temperature=1e-40", "stages.grpo.temperature: must be at least 0.01, got 1e-40"),
    ("stages.ppo.max_steps=0", "stages.ppo.max_steps: must be at least 1, got 0"),
    ("evaluation.max_new_tokens=505", "505 tokens leave no room for a prompt in model.max_seq_len"),
    ("stages.sft.max_tokens=10", "no train record fits into stages.sft.max_tokens=10"),
    ("stages.reward.max_tokens=8", "no train record fits into stages.reward.max_tokens=8"),
    ("stages.ppo.max_prompt_tokens=3", "stages.ppo.max_prompt_tokens: none of"),
    ("stages.grpo.max_prompt_tokens=3", "stages.grpo.max_prompt_tokens: none of"),
    ("ancestors=no", "ancestors: expected one of train, require, got"),
    ("model.num_experts=0", "model.num_experts: must be at least 1, got 0"),
    ("+model.width=3", "model.width: unknown key"),
    ("trainer.devices=0", "trainer.devices: must be at least 1"),
    ("trainer.devices=3", "rows cannot be shared evenly by 3"),
    ("trainer.precision=16-mixed", "trainer.precision: no 16-mixed on a CPU: take 32-true"),
    ("trainer.precision=bf16-true", "trainer.precision: expected one of auto, 32-true, 16-mixed,"),
    ("trainer.strategy=zero9", "trainer.strategy: expected one of auto, ddp, zero1, zero2, zero3,"),
    ("trainer.accelerator=tpu", "trainer.accelerator: expected one of"),
    ("evaluation.max_pairs=0", "evaluation.max_pairs: must be at least 1"),
    ("stages.grpo.group_size=1", "stages.grpo.group_size: must be at least 2, got 1"),
    ("stages.sft.lr=-1", "stages.sft.lr: must be above 0, got -1.0"),
    ("stages.ppo.max_time=later", "stages.ppo.max_time: expected DD:HH:MM:SS"),
    ("stages.reward.lr=fast", "stages.reward.lr: expected a number, got 'fast'"),
    ("stages.pretrain.block_size=513", "513 tokens do not fit model.max_seq_len=512"),
    ("stages.grpo.max_new_tokens=500", "max_prompt_tokens + max_new_tokens: 596 tokens do not fit"),
    ("stages.pretrain.parent=sft", "stages.pretrain.parent: must be null"),
    ("stages.sft.parent=grpo", "stages.sft.parent: sft cannot descend from grpo"),
    ("stages.grpo.parent=grpo", "stages.grpo.parent: grpo cannot descend from grpo"),
    ("stages.grpo.parent=reward", "stages.grpo.parent: reward will not do, expected a language"),
    ("stages.ppo.reward_parent=sft", "stages.ppo.reward_parent: sft will not do, expected a rew"),
    ("stages.ppo.parent=nope", "stages.ppo.parent: unknown run 'nope'"),
    ("stages.ppo.parent=12345", "stages.ppo.parent: expected text or null, got 12345"),
    ("data.corpus.path=null", "stages.pretrain needs data.corpus.path=FILE"),
    ("data.root=/no/such", "data.root: /no/such is not there: name the folder that holds"),
    ("data.reasoning.path=/nope.jsonl", "/nope.jsonl: no such file"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_before_anything_trains(base, tmp_path, override, message) -> None:
    stage = [] if override.startswith("stage=") else ["stage=grpo"]
    train = FakeTrain()
    with pytest.raises(UserError) as caught:
        climb(config(*base, *stage, override), train=train)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert train.jobs == [] and not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize("group", ["stages.grpo", "stages", "model", "data.chat", "evaluation"])
def test_a_deleted_group_is_one_line(base, group) -> None:
    """As `~stages.grpo` deletes it."""
    tree = config(*base)
    parent, _, key = group.rpartition(".")
    del (tree[parent] if parent else tree)[key]
    with pytest.raises(UserError, match=f"^{group}: missing, expected keys and values$"):
        make_plan(tree)


def test_half_precision_wants_wider_rows_and_the_loop_none(base) -> None:
    half = [*base, "trainer.precision=bf16-mixed"]
    with pytest.raises(UserError) as caught:
        ids([*half, "model.d_expert=36"], "pretrain")
    assert str(caught.value) == (
        "model.d_expert: must be a multiple of 8 in bf16-mixed, got 36: take 32 or 40, or "
        "model.expert_path=loop, which is slower"
    )
    assert ids([*base, "model.d_expert=36"], "pretrain")
    assert ids([*half, "model.d_expert=3", "model.expert_path=loop"], "pretrain")
    dense = ["model.num_experts=1", "model.top_k=1", "model.d_expert=3"]
    assert ids([*half, *dense], "pretrain")


def test_a_stage_that_cannot_fit_is_refused_until_it_is_there(base, monkeypatch) -> None:
    monkeypatch.setattr(
        "fourstage.lineage.command.machine_memory", lambda: 87_872 * 16 + 8 * 8 * 256
    )
    assert run(base, "pretrain").stages == ["pretrain"]  # 16 bytes a parameter, 8 a token
    monkeypatch.setattr(
        "fourstage.lineage.command.machine_memory", lambda: 87_872 * 16 + 8 * 8 * 256 - 1
    )
    assert run(base, "pretrain").stages == []
    with pytest.raises(UserError, match="^stages.pretrain: 87,872 parameters and 2,048 tokens at"):
        run([*base, "seed=1"], "pretrain")


def test_sampled_pairs_need_room_for_a_prompt(base) -> None:
    embedded = [o for o in base if not o.startswith("data")]
    with pytest.raises(UserError, match="^stages.reward.max_new_tokens: 60 tokens leave no room"):
        run([*embedded, "debug=fast", "stages.reward.max_new_tokens=60"], "reward")
    run([*base, "stages.reward.max_new_tokens=250"], "reward")  # pairs of a file are not sampled


def test_a_mistake_in_a_stage_that_is_not_needed_is_one_too(base) -> None:
    with pytest.raises(UserError, match=r"^stages\.grpo\.lr: must be above 0, got -1\.0$"):
        run([*base, "stages.grpo.lr=-1"], "pretrain")


def test_a_parent_of_another_model_or_tokenizer(base, tmp_path) -> None:
    run(base, "sft")
    folder = RunStore(tmp_path / "outputs").find("sft")
    parent = f"stages.grpo.parent={folder.name}"
    with pytest.raises(UserError, match=r"is of another model \(moe_nano: d_expert 32, not 48\)"):
        run([*base, parent, "model.d_expert=48"])
    write_record(folder, config={"tokenizer": {"name": "bpe"}})
    with pytest.raises(UserError, match="has another tokenizer"):
        run([*base, parent])
    with pytest.raises(UserError, match="stages.grpo.parent: .*this run is not finished"):
        write_record(folder, status="running")
        run([*base, parent])


def test_time_left_is_estimated_from_runs_of_the_same_kind(base, tmp_path) -> None:
    run([*base, "stages.sft.max_steps=100"], "sft")
    folder = RunStore(tmp_path / "outputs").find("sft")
    write_record(folder, cost={"seconds": 50.0, "eval_seconds": 20.0})  # 30 s for 100 steps
    before = RunStore(tmp_path / "outputs").find("pretrain")
    write_record(before, cost={"seconds": 90.0, "eval_seconds": 40.0})
    plan = make_plan(config(*base, "seed=1", "stage=reward", "stages.sft.max_steps=300"))
    assert [r.estimate for r in plan.runs][1:] == [110.0, None]
    timed = config(*base, "seed=1", "stages.pretrain.max_time=00:00:02:00")
    assert make_plan(timed).runs[0].estimate == 120.0 + 40.0
    train = run([*base, "seed=1", "stages.sft.max_steps=300"], "reward")
    assert train.jobs[0].plan_left == [("sft", 110.0), ("reward", None)]


def test_only_the_time_of_the_steps_grows_with_them(base, tmp_path) -> None:
    run([*base, "stages.sft.max_steps=3"], "sft")
    folder = RunStore(tmp_path / "outputs").find("sft")
    write_record(folder, cost={"seconds": 10.5, "train_seconds": 0.5, "eval_seconds": 4.0})
    plan = make_plan(config(*base, "seed=1", "stage=sft", "stages.sft.max_steps=300"))
    assert plan.runs[-1].estimate == 100 * 0.5 + 10.0  # set-up and evaluation are done once

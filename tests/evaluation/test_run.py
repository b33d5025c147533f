"""On which held-out sets a run is evaluated, and with which models."""

from __future__ import annotations

import json

import pytest
import torch

from fourstage.data import DataConfig
from fourstage.evaluation.run import heldout_sets, parent_policy, start_weights
from fourstage.job import EvaluationConfig, LoggerConfig, StageJob, TrainerConfig
from fourstage.stages.prepare import device_of
from fourstage.tokenizer import TokenizerConfig
from tests.data.conftest import make
from tests.stages.tiny import TINY, TOKENIZER, distance, weights


def files(folder, name, records):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return {"path": str(folder / f"{name}.jsonl"), "heldout_path": None}


def own_data(folder, **records) -> DataConfig:
    return make("files", heldout=0.3, **{k: files(folder, k, r) for k, r in records.items()})


def conversation(question, answer):
    return {"instruction": question, "input": "", "output": answer}


def test_every_answer_of_a_held_out_prompt_is_a_reference(tmp_path):
    rows = [conversation(f"Say {i}", f"{i}, {word}") for i in range(20) for word in ("yes", "no")]
    heldout = heldout_sets(own_data(tmp_path, chat=rows), TOKENIZER, tmp_path)
    assert 0 < len(heldout.chats) < 20
    for chat in heldout.chats:
        number = chat.prompt_messages[-1]["content"].removeprefix("Say ")
        assert chat.references == (f"{number}, yes", f"{number}, no")


def test_without_chats_the_pairs_give_prompts_and_chosen_answers_are_references(tmp_path):
    rows = [
        {"prompt": f"Say {i}", "chosen": f"{i}, {word}", "rejected": "No."}
        for i in range(20)
        for word in ("yes", "sure")
    ]
    heldout = heldout_sets(own_data(tmp_path, preference=rows), TOKENIZER, tmp_path)
    assert heldout.chats and not heldout.has_true_score
    for chat in heldout.chats:
        number = chat.prompt_messages[-1]["content"].removeprefix("Say ")
        assert chat.references == (f"{number}, yes", f"{number}, sure")


def test_a_source_that_is_not_there_says_why(tmp_path):
    heldout = heldout_sets(own_data(tmp_path), TOKENIZER, tmp_path)
    assert "data.corpus.path" in heldout.corpus
    assert "data.preference.path" in heldout.chats
    assert "data.reasoning.path" in heldout.problems


def job(tmp_path, **changes) -> StageJob:
    one = dict.fromkeys(("max_prompts", "max_problems", "max_pairs", "max_new_tokens"), 1)
    values = {
        "stage": "pretrain",
        "trainer": TrainerConfig(accelerator="cpu", precision="32-true"),
        **changes,
    }
    return StageJob(
        run_id="a",
        folder=tmp_path,
        outputs=tmp_path,
        settings=None,
        model=TINY,
        tokenizer=TokenizerConfig(),
        data=make("files"),
        digest="",
        logger=LoggerConfig(name="none"),
        evaluation=EvaluationConfig(seed=0, **one),
        seed=3,
        group="a",
        **values,
    )


def test_start_weights_are_those_of_the_seed_and_draw_nothing_else(tmp_path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, two = (weights(start_weights(job(tmp_path), TOKENIZER)) for _ in range(2))
    assert distance(one, two) == 0
    assert torch.equal(torch.get_rng_state(), before)
    other = job(tmp_path)
    other.seed = 4
    assert distance(one, weights(start_weights(other, TOKENIZER))) > 0
    parent = parent_policy(job(tmp_path), TOKENIZER)
    assert distance(one, weights(parent)) == 0  # what pre-training starts from


def test_a_parent_that_was_removed_says_so(tmp_path):
    removed = parent_policy(job(tmp_path, stage="sft"), TOKENIZER)
    assert removed == "the parent run is not there any more"


@pytest.mark.parametrize("accelerator", ["cpu", "gpu", "mps"])
def test_a_run_is_evaluated_where_it_was_trained_or_on_the_cpu(tmp_path, accelerator):
    trainer = TrainerConfig(accelerator=accelerator, precision="32-true")
    here = {
        "cpu": "cpu",
        "gpu": "cuda" if torch.cuda.is_available() else "cpu",
        "mps": "mps" if torch.backends.mps.is_available() else "cpu",
    }
    assert device_of(job(tmp_path, trainer=trainer)).type == here[accelerator]

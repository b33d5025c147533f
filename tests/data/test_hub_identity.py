"""What a set on the hub is known by: name, commit and settings, without a download."""

from __future__ import annotations

import json

import pytest

from fourstage import data
from fourstage.data import hub as hub_module
from fourstage.data.known_sets import KNOWN
from fourstage.errors import UserError
from tests.data.hub_sets import C


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"path": "hf:gsm8k"}, "path: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
        ({"path": "hf:me/mine@"}, "path: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
        ({"path": f"hf:me/mine@{C}", "revision": C}, "revision: .* names one already"),
        ({"path": ["hf:openai/gsm8k"]}, "path: name one set on the hub alone"),
        ({"path": "a.jsonl", "split": "train"}, "split: only for a set on the hub"),
        ({"path": "hf:openai/gsm8k", "split": "test"}, "split: 'test' is the held-out split too"),
        ({"path": "a.jsonl", "heldout_path": "hf:openai/gsm8k"}, "heldout_path: expected files"),
        (
            {"path": "hf:openai/gsm8k", "heldout_path": "a", "heldout_split": "test"},
            "heldout_split: heldout_path is given too",
        ),
    ],
)
def test_settings_that_make_no_sense(files, settings, line) -> None:
    with pytest.raises(UserError, match=f"^data.reasoning.{line}"):
        files(reasoning=settings)


def test_the_commit_of_a_set_without_one_is_part_of_the_id(files, tmp_path) -> None:
    """A mirror tells it by the notes of the hub's client, else by its content."""
    repo = tmp_path / "me" / "mine"
    repo.mkdir(parents=True)
    (repo / "train.jsonl").write_text('{"prompt": "Hi", "response": "Hello."}\n')

    def digest(path):
        hub_module.pinned.cache_clear()
        config = files(chat={"path": path}, root=str(tmp_path))
        (at,) = data.fetched(config, "sft")["hub"].values()
        return data.digest(config, "sft"), at

    first = digest("hf:me/mine")
    assert first == digest("hf:me/mine") and len(first[1]) == 40
    (repo / "train.jsonl").write_text('{"prompt": "Hi", "response": "Bye."}\n')
    second = digest("hf:me/mine")
    assert second[0] != first[0] and second[1] != first[1]
    note = repo / ".cache" / "huggingface" / "download" / "train.jsonl.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{C}\n1\n")
    assert digest("hf:me/mine") == digest(f"hf:me/mine@{C}")


def test_identity_is_name_commit_and_settings(files) -> None:
    hub = {"corpus": {"path": "hf:roneneldan/TinyStories"}, "chat": {"path": "hf:tatsu-lab/alpaca"}}
    pinned = KNOWN["roneneldan/TinyStories"].revision

    def ids(**changes):
        config = files(
            **{
                k: {**hub.get(k, {}), **v} if isinstance(v, dict) else v
                for k, v in (hub | changes).items()
            }
        )
        return data.digest(config, "pretrain"), data.digest(config, "sft")

    before = ids()
    same = ids(
        root="/a/mirror", corpus={"path": f"hf:roneneldan/TinyStories@{pinned}", "split": "train"}
    )
    assert same == before
    for settings in (
        {"revision": C},
        {"split": "validation", "heldout_split": "train"},
        {"max_records": 5},
        {"columns": {"text": "text"}},
    ):
        pretrain, sft = ids(corpus=settings)
        assert pretrain != before[0] and sft == before[1]
    pretrain, sft = ids(chat={"max_answer_chars": 9})
    assert pretrain == before[0] and sft != before[1]
    assert ids(heldout=0.2) != before


def test_ids_of_sets_on_the_hub_survive_growth() -> None:
    from tests.data.conftest import make

    stages = ("pretrain", "sft", "reward", "ppo", "grpo")
    found = " ".join(data.digest(make("public"), stage) for stage in stages)
    assert found == "3ece5020694d d503836771ab 3912a704169d 3912a704169d 34d45ee07a57"


def test_files_beside_a_set_count_by_their_contents(files, tmp_path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": "Hi", "response": "Hello."}\n')
    settings = {"chat": {"path": str(path)}, "reasoning": {"path": "hf:openai/gsm8k"}}
    before = data.digest(files(**settings), "sft")
    other = path.rename(tmp_path / "other.jsonl")
    same = settings | {"chat": {"path": str(other)}}
    assert data.digest(files(**same), "sft") == before
    other.write_text('{"prompt": "Hi", "response": "Bye."}\n')
    assert data.digest(files(**same), "sft") != before


def test_other_held_out_prompts_are_told(files) -> None:
    chat = {"path": "hf:tatsu-lab/alpaca"}
    config = files(chat=chat, reasoning={"path": "hf:openai/gsm8k"})
    record = {
        "stage": "sft",
        "data": {"digest": data.digest(config, "sft"), **data.fetched(config, "sft")},
    }
    assert data.other_source(config, record) is None
    other = files(chat=chat, reasoning={"path": "hf:EleutherAI/hendrycks_math"})
    assert data.digest(other, "sft") == record["data"]["digest"]
    assert data.other_source(other, record) == "other held-out prompts were taken out of its chat"


def test_a_source_that_is_missing_is_told_before_anything_is_fetched(files) -> None:
    config = files(chat={"path": "hf:tatsu-lab/alpaca"})
    with pytest.raises(UserError, match="stages.pretrain needs data.corpus.path=FILE"):
        data.digest(config, "pretrain")


def test_max_records_of_files(files, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    empty = [{"question": "", "answer": "#### 1"}]
    records = empty + [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = files(reasoning={"path": str(path), "max_records": 30})
    problems = data.load_reasoning(config)
    assert (
        len(problems.train)
        + len(problems.heldout)
        + problems.notes["dropped_with_a_heldout_prompt"]
        == 30
    )
    assert problems.notes["unusable_empty_text"] == 1

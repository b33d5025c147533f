"""The arena's votes as preference pairs, and which runs they make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fourstage import data
from fourstage.arena.votes import Side, Vote, Votes
from fourstage.data.files import Row, read_rows
from fourstage.data.heldout import heldout_keys
from fourstage.data.preference import load_preference, load_prompts
from fourstage.data.schemas import Unusable, pair_from
from fourstage.data.split import is_heldout
from fourstage.errors import UserError
from fourstage.lineage.climb import climb
from tests.data.conftest import make
from tests.fakes import QUICK, config, ids

USER, YES = {"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes?"}


def vote(i: int = 0, choice="left", left="Good.", right="Bad.", prompt="Say so", **changes) -> Vote:
    options = {"seed": 1, "temperature": 0.7, "max_new_tokens": 9}
    sides = [
        Side(run=run, answer=text, stopped=changes.pop(f"{name}_stopped", True), **options)
        for name, run, text in (("left", "sft-a", left), ("right", "ppo-b", right))
    ]
    voted = "2026-11-29T12:00:00+00:00"
    return Vote(
        id=f"v{i}", voted=voted, prompt=prompt, choice=choice, left=sides[0], right=sides[1]
    )


def row(one: Vote, **changes) -> Row:
    return Row(json.loads(json.dumps(one.row | changes)), "votes.jsonl, line 7")


def write(path: Path, votes: list[Vote]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one.row) + "\n" for one in votes), "utf-8")
    return str(path)


def pairs(path: str, **changes):
    return make("embedded", **{"preference": {"path": path}, **changes})


# --- a row


def test_a_vote_is_a_pair():
    read = row(vote())
    assert pair_from(read) == data.Pair(
        [{"role": "user", "content": "Say so"}], "Good.", "Bad.", is_vote=True
    )
    assert read.unread() == []
    swapped = pair_from(row(vote(choice="right")))
    assert (swapped.chosen, swapped.rejected) == ("Bad.", "Good.")
    talk = [USER, YES, USER]
    assert pair_from(row(vote(prompt=talk))).messages == talk


def test_answers_that_were_cut_off_have_no_end():
    pair = pair_from(row(vote(choice="right", left_stopped=False)))
    assert pair.unfinished == ("rejected",)
    pair = pair_from(row(vote(left_stopped=False, right_stopped=False)))
    assert pair.unfinished == ("chosen", "rejected")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (row(vote(choice="tie")), "ties"),
        (row(vote(choice="both_bad")), "ties"),
        (row(vote(right="")), "empty_text"),
        (row(vote(left=" \n")), "empty_text"),
        (row(vote(prompt=[USER, YES])), "turns_out_of_order"),
    ],
)
def test_votes_that_are_left_out(read, reason):
    with pytest.raises(Unusable) as caught:
        pair_from(read)
    assert caught.value.reason == reason


@pytest.mark.parametrize("value", ["chosen", 5, {"chosen": 1}, ["left"], [None], [["chosen"]]])
def test_unfinished_must_be_a_list_of_sides(value):
    with pytest.raises(UserError, match='line 7: "unfinished" must be a list of "chosen" and'):
        pair_from(row(vote(), unfinished=value))


def test_only_of_a_vote_unfinished_is_read():
    """Other files may have such a field; their pairs, and so their runs' ids, are as before."""
    other = Row({"prompt": "q", "chosen": "a", "rejected": "b", "unfinished": 1}, "f, line 1")
    assert pair_from(other) == data.Pair([USER], "a", "b")
    other = Row({"prompt": "q", "chosen": "a", "rejected": "b", "arena": "x"}, "f, line 1")
    assert pair_from(other) == data.Pair([USER], "a", "b")


# --- a file


def test_what_is_left_out_is_counted(tmp_path):
    chats = make("embedded")
    held, trained = [
        [text for i in range(200) if is_heldout(text := f"Say {i} please", chats.heldout) is side]
        for side in (True, False)
    ]
    asked = [c.prompt_messages[0]["content"] for c in data.load_chat(chats).heldout]
    out, hashed_out = [
        next(text for text in asked if is_heldout(text, chats.heldout) is side)
        for side in (False, True)
    ]
    cast = [
        *(vote(prompt=text) for text in held + trained),
        *(vote(choice=choice) for choice in ("tie", "both_bad", "tie")),
        vote(left="Same.", right="Same.", prompt=trained[0]),
        vote(left="", prompt=trained[0]),
        vote(prompt=out),  # of the chat source's held-out side: typed by somebody
        vote(prompt=hashed_out),
    ]
    found = load_preference(pairs(write(tmp_path / "votes.jsonl", cast)))
    assert [p.messages[0]["content"] for p in found.train] == trained
    kept = [p.messages[0]["content"] for p in found.heldout]
    assert kept == [*held, hashed_out]
    assert {name: n for name, n in found.notes.items() if n} == {
        "unusable_ties": 3,
        "unusable_empty_text": 1,
        "equal_answers_dropped": 1,
        "dropped_with_a_heldout_prompt": 1,
    }


def test_every_text_that_the_page_keeps_is_read(tmp_path):
    votes = Votes(tmp_path / "votes.jsonl")
    odd = ["half \ud83d", "\u2028 \r\n x", "\x00\x07", "🦊", "<b>&amp;</b>"]
    for i, text in enumerate(odd):
        votes.add(vote(i, left=f"a{text}", prompt=f"Say {text}"))
    rows = read_rows(str(votes.path))
    found = [pair_from(one) for one in rows]
    assert found[0].chosen == "ahalf \ufffd" and found[0].messages[0]["content"].endswith("\ufffd")
    assert found[1].chosen == "a\u2028 \n x"
    assert [p.chosen for p in found[2:]] == [f"a{text}" for text in odd[2:]]


def test_a_file_of_ties_says_so(tmp_path):
    path = write(tmp_path / "votes.jsonl", [vote(choice="tie")])
    with pytest.raises(UserError, match="votes.jsonl, line 1: a vote without a winner"):
        load_preference(pairs(path))


def test_too_few_votes_say_what_is_missing(tmp_path):
    text = next(text for i in range(50) if not is_heldout(text := f"Say {i}", 0.2))
    path = write(tmp_path / "votes.jsonl", [vote(prompt=text), vote(choice="tie")])
    message = r"nothing on the held-out side of the split, 1 on the other \(1 unusable ties\)"
    with pytest.raises(UserError, match=message):
        load_preference(pairs(path))


# --- which runs they make


def test_votes_leave_the_runs_below_as_they_are(tmp_path):
    """Even if what they hold out is what sft trains on: it gave the answers already."""
    chats = data.prompts_only(data.load_chat(make("embedded"))).train
    cast = [vote(i, prompt=c.prompt_messages) for i, c in enumerate(chats[:300])]
    path = write(tmp_path / "votes.jsonl", cast)
    before, after = ids([]), ids([f"data.preference.path={path}"])
    assert [stage for stage in before if before[stage] == after[stage]] == ["pretrain", "sft"]
    found = load_preference(pairs(path))
    held = {p.messages[0]["content"] for p in found.heldout}
    assert len(held) > 5
    assert not held & {m["content"] for p in found.train for m in p.messages}  # as earlier turns
    assert not held & {
        m["content"] for c in load_prompts(pairs(path)).train for m in c.prompt_messages
    }
    plain = [{k: v for k, v in one.row.items() if k != "arena"} for one in cast]
    Path(path).write_text("".join(json.dumps(one) + "\n" for one in plain))
    other = ids([f"data.preference.path={path}"])  # of any other file they are taken out
    assert not set(other.values()) & set(before.values())


def test_another_choice_and_another_end_make_another_run(tmp_path):
    path = tmp_path / "votes.jsonl"
    words = [f"data.preference.path={path}"]

    def reward(**changes) -> str:
        asked = [vote(i, prompt=f"Say {i}", **changes) for i in range(60)]
        write(path, asked)
        return ids(words, "reward")["reward"]

    found = {reward(), reward(choice="right"), reward(left_stopped=False)}
    assert len(found) == 3
    again = reward()
    assert again in found
    moved = [vote(100 + i, prompt=f"Say {i}") for i in range(60)]
    write(path, [*moved, vote(choice="tie")])
    assert ids(words, "reward")["reward"] == again  # who voted when, and ties, change nothing


def test_reward_and_ppo_train_on_votes(ladder, tmp_path, capsys):
    """The ladder of the votes, on the base of the one that gave the answers."""
    chats = data.prompts_only(data.load_chat(make("embedded"))).train
    cast = [
        vote(i, prompt=c.prompt_messages, left=f"Good {i}.", right_stopped=i % 3 > 0)
        for i, c in enumerate(chats[:120])
    ]
    path = write(tmp_path / "votes.jsonl", [*cast, vote(choice="tie")])
    words = [*QUICK, f"data.preference.path={path}"]
    assert ids(words, "ppo")["sft"] in {p.name[4:] for p in (ladder / "runs").glob("sft-*")}
    outputs = shutil.copytree(ladder, tmp_path / "outputs")
    there = {p.name for p in (outputs / "runs").iterdir()}
    tip = climb(config(*words, "stage=ppo", f"outputs={outputs}"))
    new = {p.name.split("-")[0] for p in (outputs / "runs").iterdir() if p.name not in there}
    assert new == {"reward", "ppo"}
    said = capsys.readouterr().out
    assert "unusable ties 1" in said and "not read" not in said
    record = json.loads((tip / "run.json").read_text())
    assert record["status"] == "finished"
    assert heldout_keys(pairs(path)) == heldout_keys(make("embedded"))

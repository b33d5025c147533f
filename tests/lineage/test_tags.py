"""tag=NAME: words for run.json that change no run."""

from __future__ import annotations

import pytest

from fourstage.errors import UserError
from fourstage.lineage.climb import climb
from fourstage.runs.records import read_record
from fourstage.runs.store import RunStore
from tests.fakes import FakeTrain, config, ids, run


def tags(tmp_path) -> dict[str, list[str]]:
    """By stage."""
    records = RunStore(tmp_path / "outputs").records().values()
    return {record["stage"]: record["tags"] for record in records}


def test_every_run_of_the_plan_has_the_tag(base, tmp_path) -> None:
    first = run([*base, "tag=first"], stage="sft")
    assert tags(tmp_path) == {"pretrain": ["first"], "sft": ["first"]}
    assert [job.tags for job in first.jobs] == [("first",), ("first",)]
    second = run([*base, "tag=[lr.1,night-2,lr.1]"], stage="reward")  # two are reused
    assert second.stages == ["reward"] and second.jobs[0].tags == ("lr.1", "night-2")
    assert tags(tmp_path) == {
        "pretrain": ["first", "lr.1", "night-2"],
        "sft": ["first", "lr.1", "night-2"],
        "reward": ["lr.1", "night-2"],
    }
    run([*base, "tag='first,last'"], stage="reward")  # all found; the first ones aren't needed
    assert tags(tmp_path)["reward"] == ["lr.1", "night-2", "first", "last"]
    assert tags(tmp_path)["pretrain"] == ["first", "lr.1", "night-2", "last"]


def test_a_tag_changes_no_id_and_no_config(base, tmp_path) -> None:
    assert ids([*base, "tag=x"]) == ids(base)
    run([*base, "tag=x"], stage="pretrain")
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert "tag" not in read_record(folder)["config"]


def test_a_resumed_run_keeps_its_tags(base, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run([*base, "tag=a"], "pretrain", FakeTrain(fail_in="pretrain", checkpoint=True))
    again = run([*base, "tag=b"], "pretrain")
    assert again.jobs[0].resume and again.jobs[0].tags == ("a", "b")
    assert tags(tmp_path) == {"pretrain": ["a", "b"]}


def test_a_run_that_is_trained_again_keeps_its_tags(base, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run([*base, "tag=a"], "pretrain", FakeTrain(fail_in="pretrain"))  # before a checkpoint
    run([*base, "tag=b"], "pretrain")
    again = run([*base, "tag=c", "force=true"], "pretrain")
    assert again.jobs[0].tags == ("a", "b", "c") and not again.jobs[0].resume
    assert tags(tmp_path) == {"pretrain": ["a", "b", "c"]}


def test_no_tag_is_an_empty_list(base, tmp_path) -> None:
    train = run(base, stage="pretrain")
    assert tags(tmp_path) == {"pretrain": []} and train.jobs[0].tags == ()


@pytest.mark.parametrize("tag", ["'a b'", "''", "[a,'']", "'a,,b'", "a/b", "'a,b!'"])
def test_a_tag_is_a_word(base, tag) -> None:
    with pytest.raises(UserError, match=r"tag: expected words of letters, .* got '.*': tag=NAME"):
        climb(config(*base, "stage=pretrain", f"tag={tag}"), train=FakeTrain())


@pytest.mark.parametrize("tag", ["5", "[a,5]", "true", "{a: b}"])
def test_a_tag_is_text(base, tag) -> None:
    with pytest.raises(UserError, match="tag: expected text or a list"):
        climb(config(*base, "stage=pretrain", f"tag={tag}"), train=FakeTrain())

"""What a command says before and after it trains."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.lineage import climb as lineage
from fourstage.lineage.climb import climb
from fourstage.lineage.messages import python_word
from tests.fakes import FakeTrain, config, ids, own_files, run


class Evaluated(FakeTrain):
    """Leaves an eval.json too: a tenth well-formed after pretrain, nine tenths after sft."""

    def __call__(self, job):
        value = {"pretrain": 0.1, "sft": 0.9}.get(job.stage)
        cell = {"value": value, "n": 50, "low": value, "high": 0.95} if value else {"value": None}
        cell |= {} if value else {"why": "no pairs"}
        metrics = {"pair_accuracy" if job.stage == "reward" else "well_formed": cell}
        evaluation = {"suite": "2", "seed": 0, "metrics": metrics}
        (job.folder / "eval.json").write_text(json.dumps(evaluation))
        return super().__call__(job)


def test_the_end_says_what_it_came_to_where_it_is_and_what_comes_next(
    base, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    of, place = ids(base), base[0].removeprefix("outputs=")
    run(base, "sft", Evaluated())
    expected = f"""\
sft: well-formed answers 10.0 % [10.0, 95.0] (pretrain) → 90.0 % [90.0, 95.0] (95 % intervals)
run: {place}/runs/sft-{of["sft"]}
next:
  python -m fourstage chat run=sft-{of["sft"]} outputs={place}
  python -m fourstage report run=sft-{of["sft"]} outputs={place}
  python train.py stage=reward {" ".join(base)}
"""
    assert capsys.readouterr().out.endswith(expected)
    run(base, "sft")  # found
    assert capsys.readouterr().out.endswith(expected)
    run(base, "reward", Evaluated())
    said = capsys.readouterr().out
    assert "\nreward: held-out pairs ordered right not measured: no pairs\nrun: " in said
    assert "fourstage chat" not in said
    run(base, "grpo", Evaluated())
    assert "train.py" not in capsys.readouterr().out


def test_the_next_command_goes_where_the_ladder_goes(base, capsys) -> None:
    run([*base, "experiment=no_preferences"], "sft")
    assert f"  {python_word()} train.py stage=grpo " in capsys.readouterr().out
    only_text = [o for o in base if "chat" not in o]
    run(only_text, "pretrain")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"  {python_word()} train.py stage=sft {' '.join(only_text)} data.chat.path=FILE"


def test_the_next_command_names_the_runs_that_this_one_named(base, capsys) -> None:
    """Else ppo would begin at another sft run than its reward model."""
    run(base, "sft")
    sft = f"sft-{ids(base)['sft']}"
    words = [*base, f"stages.reward.parent={sft}"]
    climb(config(*words, "stage=reward", "seed=1"), overrides=words, train=Evaluated())
    following = capsys.readouterr().out.splitlines()[-1]
    assert f"stages.reward.parent={sft}" in following and f"stages.ppo.parent={sft}" in following
    words.append(f"stages.ppo.parent={sft}")
    climb(config(*words, "stage=reward", "seed=2"), overrides=words, train=Evaluated())
    assert capsys.readouterr().out.splitlines()[-1].count("stages.ppo.parent") == 1


def test_the_next_command_names_the_script_and_its_config_folder(base, capsys, monkeypatch) -> None:
    script = ["/elsewhere/train.py", "--config-dir=mine", "stage=pretrain"]
    monkeypatch.setattr("sys.argv", script)
    run(base, "pretrain")
    said = capsys.readouterr().out.splitlines()[-1]
    assert " /elsewhere/train.py --config-dir=mine stage=sft " in said


def test_one_item_is_no_interval(base, capsys) -> None:
    class One(Evaluated):
        def __call__(self, job):
            found = super().__call__(job)
            path = job.folder / "eval.json"
            path.write_text(path.read_text().replace('"high": 0.95', '"high": 0.9'))
            return found

    run(base, "sft", One())
    assert "→ 90.0 % [90.0, 90.0] (95 % intervals; an interval without width)" in (
        capsys.readouterr().out
    )


def test_own_files_among_embedded_data_are_said(base, capsys) -> None:
    files = [o for o in base if o != "data=files"]
    run(files, "pretrain")
    said = "data embedded with files of corpus, chat, preference, reasoning, seed 0"
    assert said in capsys.readouterr().out


def test_a_parent_that_did_not_train_on_this_data_is_warned_of(base, tmp_path, capsys) -> None:
    run(base, "pretrain")
    parent = ids(base, "pretrain")["pretrain"]
    named = f"stages.sft.parent=pretrain-{parent}"
    run([*base, named], "sft")
    assert "warning:" not in capsys.readouterr().out
    without = [o for o in base if "corpus" not in o]
    run([*without, named, "seed=2"], "sft")
    assert (
        f"warning: pretrain-{parent} may have trained on what is held out now: with these data "
        "settings there is no corpus to compare with its own (data.corpus.path names one)\n"
    ) in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("Another text altogether, of many words.\n" * 40)
    run([*base, named, f"data.corpus.path={tmp_path}/other.txt", "seed=3"], "sft")
    assert "its corpus is another than it was trained on" in capsys.readouterr().out


def test_another_commit_is_said(base, capsys, monkeypatch) -> None:
    monkeypatch.setattr(lineage, "git_state", lambda: {"commit": "a" * 40, "dirty": False})
    run(base, "pretrain")
    run(base, "pretrain")
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(lineage, "git_state", lambda: {"commit": "b" * 40, "dirty": False})
    assert run(base, "pretrain").stages == []
    assert "was made by commit aaaaaaaa, this is bbbbbbbb" in capsys.readouterr().out


def test_a_command_to_paste_survives_the_shell(base, tmp_path) -> None:
    files = own_files(tmp_path / "my texts, [a]")
    path = f'data.corpus.path="{tmp_path}/my texts, [a]/corpus.txt"'  # as Hydra wants it
    tree = config(*[o for o in files if "corpus" not in o and "my texts" not in o], path, *base)
    with pytest.raises(UserError) as caught:
        climb(tree | {"stage": "sft", "ancestors": "require"}, overrides=["stage=sft", path])
    command = str(caught.value).split("trained first: ")[1]
    assert shlex.split(command) == [python_word(), "train.py", "stage=pretrain", path]


def test_a_command_to_paste_names_this_interpreter(tmp_path, monkeypatch) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for found, here, word in (
        (str(python), tmp_path, "python"),  # activated
        ("/usr/bin/python", tmp_path, ".venv/bin/python"),
        (None, Path("/"), str(python)[1:]),
        (None, Path(__file__).parents[1], str(python)),
    ):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        monkeypatch.chdir(here)
        assert python_word() == word


def test_an_unfinished_run_with_another_budget_is_named(base, capsys) -> None:
    stopped = FakeTrain("pretrain", KeyboardInterrupt(), checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        run([*base, "stages.pretrain.max_steps=40"], "pretrain", stopped)
    capsys.readouterr()
    longer = [*base, "stages.pretrain.max_steps=80"]
    assert "note:" not in capsys.readouterr().out
    run([*longer, "seed=1"], "pretrain")  # differs in more
    assert "note:" not in capsys.readouterr().out
    assert run([*longer, "stages.pretrain.max_time=00:00:01:00"], "pretrain").stages
    timed = capsys.readouterr().out
    assert "stages.pretrain.max_steps=40 stages.pretrain.max_time=null continues it" in timed
    assert run(longer, "pretrain").stages == ["pretrain"]
    line = f"note: {stopped.jobs[0].run_id} is unfinished and differs only in its budget: "
    assert f"{line}stages.pretrain.max_steps=40 continues it" in capsys.readouterr().out
    assert run(longer, "pretrain").stages == [] and "note:" not in capsys.readouterr().out


def test_other_settings_of_a_stored_evaluation_are_named(base, tmp_path, capsys) -> None:
    run(base, "sft")
    run([*base, "seed=0"], "sft")
    assert "note:" not in capsys.readouterr().out
    fewer = [*base, "evaluation.max_problems=9", "evaluation.samples=4"]
    assert run(fewer, "sft").stages == []
    of = ids(base, "sft")
    assert (
        f"note: pretrain-{of['pretrain']}, sft-{of['sft']} were evaluated with other settings: "
        f"{python_word()} -m fourstage evaluation run=sft-{of['sft']} ladder=true "
        f"evaluation.max_problems=9 evaluation.samples=4 outputs={tmp_path}/outputs\n"
    ) in capsys.readouterr().out


def test_other_data_of_a_stored_evaluation_is_named(base, tmp_path, capsys) -> None:
    run(base, "pretrain")
    shorter = [*base, "data.chat.max_answer_chars=50"]
    assert run(shorter, "sft").stages == ["sft"]
    of = ids(shorter, "sft")
    assert (
        f"note: pretrain-{of['pretrain']} was evaluated on other held-out data: when this is done, "
        f"{python_word()} -m fourstage evaluation run=sft-{of['sft']} ladder=true "
        f"outputs={tmp_path}/outputs\n"
    ) in capsys.readouterr().out

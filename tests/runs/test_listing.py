"""`runs` with conditions: the list, its JSON, and what rm takes and leaves."""

from __future__ import annotations

import json
import re

import pytest

from fourstage.errors import UserError
from fourstage.runs.__main__ import main
from fourstage.runs.store import RunStore
from tests.runs.ladders import make_run

HEARTBEAT = {"time": "2026-01-01T09:59:00+00:00", "host": "node7", "pid": 12}


@pytest.fixture
def store(tmp_path) -> RunStore:
    """pretrain a <- sft b, c; b <- grpo d, e, f, g; h is a debug run of its own."""
    store = RunStore(tmp_path)
    make_run(store, "pretrain", "a", goal={"bits_per_char": 1.5}, heartbeat=HEARTBEAT)
    on_a, on_b = {"parents": {"policy": "a" * 10}}, {"parents": {"policy": "b" * 10}}
    make_run(store, "sft", "b", **on_a, goal={"knowledge_answered": None, "well_formed": 0.5})
    make_run(store, "sft", "c", **on_a, goal={"knowledge_answered": None, "well_formed": 0.75})
    for letter, value in zip("defg", (0.25, 0.75, 0.5, None), strict=True):
        tags = {"tags": ["lr", letter]} if letter in "de" else {}
        goal = {"reasoning_accuracy": value, "bits_per_char": {"d": 1.0}.get(letter, 2.0)}
        goal |= {"reasoning_accuracy/gcd": 1.0 if letter == "d" else 0.5}
        make_run(store, "grpo", letter, **on_b, goal=goal, lr=ord(letter) / 1000, **tags)
    make_run(store, "pretrain", "h", debug="fast", status="running", finished=None)
    return store


def listed(store: RunStore, capsys, *words: str) -> list[dict]:
    main([*words, "--json", f"outputs={store.outputs}"])
    return json.loads(capsys.readouterr().out)


def letters(store: RunStore) -> str:
    return "".join(sorted(record["id"][0] for record in store.records().values()))


def test_json_is_a_stable_list(store, capsys) -> None:
    (found,) = listed(store, capsys, "id=" + "a" * 10)
    found["bytes"] = 0 < found["bytes"] < 100_000
    assert found == {
        "id": "aaaaaaaaaa",
        "name": "pretrain-aaaaaaaaaa",
        "stage": "pretrain",
        "status": "finished",
        "parents": {},
        "tags": [],
        "group": "aaaaaaaaaa",
        "model": "moe_nano",
        "seed": 0,
        "debug": None,
        "started": "2026-01-01T09:00:00.000+00:00",
        "finished": "2026-01-01T10:00:00.000+00:00",
        "seconds": 61.5,
        "step": None,
        "max_steps": None,
        "bytes": True,
        "heartbeat": HEARTBEAT,
        "goal": {"name": "bits_per_char", "value": 1.5},
    }


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", "ahbcdefg"),
        ("stage=sft", "bc"),
        ("stage=grpo tag=lr", "de"),
        ("tag=d", "d"),
        ("stages.grpo.lr=0.101,0.102", "ef"),
        ("status=interrupted", "h"),
        ("debug=true", "h"),
        ("debug=false stage=pretrain", "a"),
        ("debug=fast", "h"),
        ("stage!=grpo,sft", "ah"),
        ("parent=" + "a" * 10, "bc"),
        ("stage=grpo sort=goal", "dfeg"),
        ("stage=grpo sort=-goal", "efdg"),
        ("stage=pretrain sort=finished", "ah"),
        ("stage=sft sort=-step", "bc"),  # none of them has one
    ],
)
def test_conditions_and_order(store, capsys, words, wanted) -> None:
    assert "".join(run["id"][0] for run in listed(store, capsys, *words.split())) == wanted


def test_a_goal_that_the_data_does_not_define_has_another_in_its_place(store, capsys) -> None:
    (found,) = listed(store, capsys, "id=" + "c" * 10)
    assert found["goal"] == {"name": "well_formed", "value": 0.75}
    (found,) = listed(store, capsys, "id=" + "h" * 10)  # not evaluated yet
    assert found["goal"] == {"name": "bits_per_char", "value": None}


def test_nothing_but_json_on_stdout(tmp_path, store, capsys) -> None:
    (store.root / "sft-broken").mkdir()
    (store.root / "sft-broken" / "run.json").write_text("{")
    main(["list", "json=true", f"outputs={store.outputs}"])
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 8 and "sft-broken/run.json: broken" in said.err
    assert listed(RunStore(tmp_path / "empty"), capsys) == []


def test_how_far_a_run_is(store, capsys) -> None:
    for letter, budget, text in (
        ("k", {"max_steps": 600, "max_time": None}, "step,loss\n10,2.5\n120,2.1\n130,"),
        ("l", {"max_steps": 130, "max_time": None}, "step\n120\n130\n"),
        ("m", {"max_steps": 600, "max_time": "00:00:02:00"}, "step,loss\n7,\n"),
        ("n", {"max_steps": 600, "max_time": None}, "step,loss\n"),
        ("o", {"max_steps": 600}, "step,loss\n" + "".join(f"{n},1\n" for n in range(20_000))),
    ):
        config = {"seed": 0, "model": {"name": "moe_nano"}, "stages": {"sft": budget}}
        (make_run(store, "sft", letter, config=config) / "metrics.csv").write_text(text)
    found = {run["id"][0]: (run["step"], run["max_steps"]) for run in listed(store, capsys)}
    assert found["k"] == (120, 600) and found["l"] == (130, 130) and found["m"] == (7, None)
    assert found["n"] == (None, 600) and found["o"] == (19_999, 600)
    main(["list", f"outputs={store.outputs}"])
    lines = {
        line.split()[1][:5]: line.split("│")
        for line in capsys.readouterr().out.splitlines()
        if "sft-" in line
    }
    steps = {name[-1]: cells[-4].strip() for name, cells in lines.items()}
    assert steps == {"b": "", "c": "", "k": "120/600", "l": "130", "m": "7", "n": "", "o": "19999"}


def test_the_order_of_steps(store, capsys) -> None:
    for letter, step in (("b", 90), ("c", 100), ("d", 20)):
        (folder,) = store.root.glob(f"*-{letter * 10}")
        (folder / "metrics.csv").write_text(f"step\n{step}\n")
    found = [run["step"] for run in listed(store, capsys, "sort=step")]
    assert found == [20, 90, 100, None, None, None, None, None]


def test_an_odd_budget_is_none(store, capsys) -> None:
    config = {"seed": 0, "model": {"name": "moe_nano"}, "stages": {"sft": {"max_steps": "x"}}}
    (make_run(store, "sft", "k", config=config) / "metrics.csv").write_text("step\n7\n")
    main([f"outputs={store.outputs}"])
    assert re.search(r"sft-k{10}.*│ 7 ", capsys.readouterr().out)


def test_a_run_that_is_its_own_parent_is_broken(store) -> None:
    folder = make_run(store, "sft", "k", parents={"policy": "k" * 10})
    assert "sft-kkkkkkkkkk/run.json: broken (it is its own parent)" in store.broken()[0]
    assert folder not in store.records()


def test_tags_and_names_are_shown_as_they_are(store, capsys) -> None:
    config = {"seed": 0, "model": {"name": "[b]m[/b]"}, "stages": {"sft": {}}}
    make_run(store, "sft", "k", config=config, tags=["[red]x[/red]", ":smile:", "[/]"])
    main(["stage=sft", f"outputs={store.outputs}"])
    shown = "".join(capsys.readouterr().out.split())
    for text in ("[b]m[/b]", "[red]x[/red]", ":smile:", "[/]"):
        assert text in shown


def test_the_table_has_tags_where_there_are_some(store, capsys) -> None:
    main(["tag=lr", f"outputs={store.outputs}"])
    assert re.search(r"│ lr, d +│", capsys.readouterr().out)
    main(["stage=sft", f"outputs={store.outputs}"])
    assert "tags" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("sort=xyz", "sort=xyz: known are name, status, model"),
        ("sort=", "sort=: known are name, status, model"),
        ("sort=goal sort=seed", "sort: given twice"),
        ("show sft --json", "--json: only the list has it"),
        ("rm stage=sft --json", "--json: only the list has it"),
        ("rm stage=grpo keep_best=1 keep_best=2", "keep_best: given twice"),
        ("stage=grpp", "no run has stage=grpp: did you mean grpo"),
        ("ouputs=x", "no run has a setting 'ouputs'"),
        ("foo", "^unknown word 'foo': known are list, show, rm, trim, --json .see --help."),
        ("shwo sft", "^unknown word 'shwo': did you mean show"),
        ("--josn", "^unknown word '--josn': did you mean --json"),
        ("foo --json", "^unknown word 'foo'"),
        ("list --josn", "^list: '--josn' has no place here; usage: "),
        ("show", "^show: which runs.* usage: "),
        ("trim sft most_gb=1", "^trim: 'sft' has no place here; usage: "),
        ("rm", "^rm: which runs.* usage: "),
        ("rm keep_best=1", "^rm: which runs.* usage: "),
        ("rm dry_run=true", "^rm: which runs.* usage: "),
        ("rm sft stage=sft", "^rm: 'sft' has no place here; usage: "),
        ("rm stage=sft force=true", "force=true: only with NAME"),
        ("rm grpo keep_best=1", "keep_best=, by=: only with conditions"),
        ("rm grpo dry_run=true by=goal", "keep_best=, by=: only with conditions"),
        ("rm stage=grpo by=pass_at_1", "by= needs keep_best=N"),
        ("rm stage=grpo keep_best=1 by=", "by=: no side of it is better"),
        ("rm grpo grpo", "grpo: grpo-.* is named twice"),
        ("rm cccccccccc sft-cccccccccc", "sft-cccccccccc: sft-cccccccccc is named twice"),
        ("rm cccccccccc nobody", "unknown run 'nobody'"),
        ("rm cccccccccc nobody force=true", "unknown run 'nobody'"),
        ("rm cccccccccc bbbbbbbbbb", "sft-bbbbbbbbbb: .* descend from it"),
        ("rm bbbbbbbbbb dry_run=true", "sft-bbbbbbbbbb: .* descend from it"),
        ("rm stage=grpo keep_best=-1", "keep_best: must be at least 0, got -1"),
        ("rm stage=grpo keep_best=x", "keep_best: expected a whole number or null, got 'x'"),
        ("rm stage=grpo keep_best=1 by=kl_to_sft", "by=kl_to_sft: no side of it is better"),
        ("rm stage=grpo keep_best=1 by=accuracy", "by=accuracy: .*reasoning_accuracy"),
        ("rm stage=grpo keep_best=1 by=win_rate", "keep_best: no grpo run has win_rate"),
        ("rm stage=sft,grpo keep_best=1 by=win_rate", "keep_best: no sft or grpo run has win_rate"),
        ("trim", "most_gb: missing"),
        ("trim most_gb=0", "most_gb: must be above 0"),
        ("trim most_gb=1 stage=sft", "unknown option 'stage=sft'"),
    ],
)
def test_wrong_words_remove_nothing(store, words, line) -> None:
    with pytest.raises(UserError, match=line):
        main([*words.split(), f"outputs={store.outputs}"])
    assert letters(store) == "abcdefgh"


def test_conditions_without_runs(tmp_path) -> None:
    with pytest.raises(UserError, match=r"output=x: .*has no runs \(outputs=FOLDER\)"):
        main(["output=x", f"outputs={tmp_path}"])


def test_rm_of_all_debug_runs(store, capsys) -> None:
    make_run(store, "sft", "i", debug="tiny", parents={"policy": "h" * 10})
    main(["rm", "debug=true", "dry_run=true", f"outputs={store.outputs}"])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in said[:2]] == [
        "would remove sft-iiiiiiiiii",  # before the one that it descends from
        "would remove pretrain-hhhhhhhhhh",
    ]
    assert said[2].startswith("would remove 2 runs, 0.") and letters(store) == "abcdefghi"
    main(["rm", "debug=true", f"outputs={store.outputs}"])
    assert letters(store) == "abcdefg" and "removed 2 runs" in capsys.readouterr().out
    main(["rm", "debug=true", f"outputs={store.outputs}"])
    assert "removed 0 runs, 0.0 MB" in capsys.readouterr().out


def test_rm_of_several_names_takes_heirs_first(store, capsys) -> None:
    names = ["a" * 10, *(letter * 10 for letter in "bcdefg")]
    main(["rm", *names, "dry_run=true", f"outputs={store.outputs}"])
    would = re.findall(r"would remove \w+-(\w)", capsys.readouterr().out)
    assert letters(store) == "abcdefgh"
    main(["rm", *names, f"outputs={store.outputs}"])
    assert re.findall(r"removed \w+-(\w)", capsys.readouterr().out) == would == list("cdefgba")
    assert letters(store) == "h"


def test_rm_by_name_with_dry_run_and_force_removes_nothing(store, capsys) -> None:
    main(["rm", "b" * 10, "force=true", "dry_run=true", f"outputs={store.outputs}"])
    assert capsys.readouterr().out.startswith("would remove sft-bbbbbbbbbb (0.0 MB)")
    assert letters(store) == "abcdefgh"


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("stage=grpo keep_best=3", "abcdefh"),
        ("stage=grpo keep_best=1", "abceh"),
        ("stage=grpo keep_best=0", "abch"),
        ("stage=grpo keep_best=9", "abcdefgh"),
        ("stage=grpo keep_best=1 by=bits_per_char", "abcdh"),  # lower is better
        ("stage=grpo keep_best=1 by=reasoning_accuracy/gcd", "abcdh"),  # of one task
        ("seed=0 keep_best=1 by=reasoning_accuracy", "abceh"),  # no other stage has it
        ("stage=sft,grpo keep_best=1", "abceh"),  # each stage's own; e descends from b
        ("stage=pretrain,sft", "abdefg"),  # c and h have no heirs
        ("stage!=none-such", "abcdefgh"),
    ],
)
def test_rm_keeps_the_best_and_what_others_descend_from(store, capsys, words, left) -> None:
    try:
        main(["rm", *words.split(), f"outputs={store.outputs}"])
    except UserError as error:
        assert "none-such" in str(error)
    assert letters(store) == left
    kept = re.findall(r"kept (.*): (.*)", capsys.readouterr().out)
    if words.startswith("seed=0"):
        why = "none has reasoning_accuracy"
        assert kept == [("all pretrain runs", why), ("all sft runs", why)]
    if words == "stage=sft,grpo keep_best=1":
        assert kept == [("sft-bbbbbbbbbb", "grpo-eeeeeeeeee descends from it")]


def test_rm_of_everything_leaves_what_is_trained_and_its_ancestors(store, capsys) -> None:
    with store.locked("grpo", "d" * 10):
        for path in (store.root / ("grpo-" + "d" * 10)).glob("run.json"):
            path.write_text(path.read_text().replace('"finished"', '"running"', 1))
        main(["rm", "seed=0", f"outputs={store.outputs}"])
    assert letters(store) == "abd"
    assert re.findall(r"kept (.*)", capsys.readouterr().out) == [
        "grpo-dddddddddd: it is running",
        "pretrain-aaaaaaaaaa: sft-bbbbbbbbbb descends from it",
        "sft-bbbbbbbbbb: grpo-dddddddddd descends from it",
    ]

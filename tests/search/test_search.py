"""A search with a train.py that is a function, and its own one with a script that is not."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fourstage.errors import UserError
from fourstage.interruptions import AGAIN, advice
from fourstage.search import training
from fourstage.search.__main__ import search
from fourstage.search.space import split_words
from fourstage.search.training import TrialFailed, last_line
from fourstage.search.trials import ask
from tests.search.fake import FakeTrainPy

optuna = pytest.importorskip("optuna")

LR = "stages.grpo.lr=tag(log,interval(1e-5,1e-1))"
EPOCHS = "stages.grpo.epochs=range(1,12)"
WORDS = ["name=try", "stage=grpo", "model=moe_nano", LR, EPOCHS, "seeds=2"]


@pytest.fixture
def fake(tmp_path) -> FakeTrainPy:
    return FakeTrainPy(tmp_path)


def found(fake: FakeTrainPy, name: str = "try") -> dict:
    return json.loads((fake.outputs / "search" / name / "search.json").read_text())


def test_a_search_and_what_it_says(fake, capsys) -> None:
    folder = search([*WORDS, "trials=4", "seed=5"], fake.trainer)
    assert folder == fake.outputs / "search" / "try"
    result = found(fake)
    trials = fake.trained[:4]
    for words, trial in zip(trials, result["trials"], strict=True):
        assert words == ["stage=grpo", "model=moe_nano", *trial["words"], "seed=5", "tag='try'"]
        given = dict(word.split("=", 1) for word in words)
        assert 1e-5 <= float(given["stages.grpo.lr"]) <= 1e-1
        assert 1 <= int(given["stages.grpo.epochs"]) <= 11
        assert trial["value"] == fake.value(given) and trial["why"] == ""
        assert trial["runs"][0].startswith("grpo-")
    values = [trial["value"] for trial in result["trials"]]
    best = result["trials"][values.index(max(values))]
    assert result["best_trial"] == best["number"] and result["winner"]["settings"] == best["words"]
    # the winner and the default, on seeds of their own
    again = [(words[2:-2], words[-2]) for words in fake.trained[4:]]
    own = best["words"]
    assert again == [([], "seed=6"), (own, "seed=6"), ([], "seed=7"), (own, "seed=7")]
    assert result["fresh_seeds"] == [6, 7] and result["trial_seeds"] == [5]
    given = dict(word.split("=", 1) for word in own)
    assert result["winner"]["values"] == [fake.value({**given, "seed": s}) for s in "67"]
    assert result["default"]["values"] == [fake.value({"seed": s}) for s in "67"]
    gain = result["winner"]["values"][0] - result["default"]["values"][0]
    assert math.isclose(result["difference"]["value"], gain)
    text = capsys.readouterr().out
    assert (folder / "search.md").read_text() in text
    assert "which is the best of 4 and so, by chance, too high on average" in text
    assert "| winner - default (above 0 is better) | +" in text
    assert b"<svg" in (folder / "search.svg").read_bytes()


def test_intervals_by_hand(fake) -> None:
    """Three fresh seeds: t with two degrees of freedom is 4.303."""
    values = {"1": 0.5, "2": 0.6, "3": 0.4}
    fake.value = lambda w: values.get(w["seed"], 0.0) + (0.125 if "stages.grpo.lr" in w else 0.0)
    search(["name=try", "stage=grpo", LR, "trials=1", "seeds=3"], fake.trainer)
    mean = found(fake)["default"]["mean"]
    assert math.isclose(mean["value"], 0.5) and math.isclose(
        mean["high"] - mean["low"], 2 * 4.30265 * 0.1 / math.sqrt(3), rel_tol=1e-5
    )
    difference = found(fake)["difference"]
    assert math.isclose(difference["value"], 0.125)


def test_the_same_search_gives_the_same_bytes_and_trains_nothing(fake) -> None:
    folder = search([*WORDS, "trials=3"], fake.trainer)
    names = ("search.json", "search.md", "search.svg", "fresh.svg")
    before, trained = [(folder / name).read_bytes() for name in names], len(fake.trained)
    search([*WORDS, "trials=3"], fake.trainer)
    assert [(folder / name).read_bytes() for name in names] == before
    more = [words[-2] for words in fake.trained[trained:]]
    assert more == ["seed=1", "seed=1", "seed=2", "seed=2"], "only train.py's own reuse is asked"
    search([*WORDS, "trials=5"], fake.trainer)  # more of them
    assert len(found(fake)["trials"]) == 5
    assert not list(folder.glob("trial-*.lock"))


def test_killed_after_trial_7_and_continued_it_has_the_same_trials(tmp_path) -> None:
    whole, cut = FakeTrainPy(tmp_path / "whole"), FakeTrainPy(tmp_path / "cut")
    search([*WORDS, "trials=14"], whole.trainer)
    cut.dies_in = 8
    with pytest.raises(KeyboardInterrupt):
        search([*WORDS, "trials=14"], cut.trainer)
    assert len(cut.trained) == 9
    cut.dies_in = None
    search([*WORDS, "trials=14"], cut.trainer)
    assert cut.trained[9] == cut.trained[8], "the trial that was running"
    assert found(cut)["trials"] == found(whole)["trials"]
    assert cut.trained[:8] + cut.trained[9:] == whole.trained


def test_a_kill_before_a_trial_has_its_words_or_its_line_is_whole(tmp_path) -> None:
    whole, cut = FakeTrainPy(tmp_path / "whole"), FakeTrainPy(tmp_path / "cut")
    search([*WORDS, "trials=4"], whole.trainer)
    search([*WORDS, "trials=2"], cut.trainer)
    journal = cut.outputs / "search" / "try" / "journal.log"
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.load_study(study_name="try", storage=optuna.storages.JournalStorage(backend))
    study.ask()
    with open(journal, "a") as file:
        file.write('{"op_code": 4, "wor')
    search([*WORDS, "trials=4"], cut.trainer)
    words = [[trial["words"] for trial in found(fake)["trials"]] for fake in (whole, cut)]
    assert words[0] == words[1]


def test_two_commands_share_a_search(fake) -> None:
    """Together they run the trials once each; either waits for the other's last one."""
    slow, both = fake.train, threading.Barrier(2, timeout=60)
    began: list[list[str]] = []

    def train(words, log):
        if words not in began and len(began) < 2:  # the first two trials run at once
            began.append(list(words))
            both.wait()
        return slow(words, log)

    trainer = training.Trainer(fake.settings, train)
    threads = [
        threading.Thread(target=search, args=([*WORDS, "trials=6"], trainer)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    trials = found(fake)["trials"]
    assert len(trials) == 6 and len({tuple(trial["words"]) for trial in trials}) == 6
    on_trials = [words for words in fake.trained if words[-2] == "seed=0"]
    assert len(on_trials) == 6


def test_a_repeated_trial_starts_no_training(fake) -> None:
    words = ["name=try", "stage=grpo", "stages.grpo.epochs=choice(4,6)", "trials=12", "seeds=2"]
    search(words, fake.trainer)
    on_trials = [words for words in fake.trained if words[-2] == "seed=0"]
    assert sorted(words[1] for words in on_trials) == [
        "stages.grpo.epochs=4",
        "stages.grpo.epochs=6",
    ]
    by_words = {trial["words"][0]: trial["value"] for trial in found(fake)["trials"]}
    assert len(found(fake)["trials"]) == 12 and by_words["stages.grpo.epochs=6"] > 0.5


def test_a_failed_trial_is_told_and_the_search_goes_on(fake, capsys) -> None:
    def value(words):
        return math.nan if int(words.get("stages.grpo.epochs", 1)) > 6 else 0.5

    fake.value = value
    search(["name=try", "stage=grpo", EPOCHS, "trials=8", "seeds=2", "seed=1"], fake.trainer)
    trials = found(fake)["trials"]
    failed = [trial for trial in trials if trial["value"] is None]
    assert failed and len(failed) < 8 == len(trials)
    assert {trial["why"] for trial in failed} == {"grpo, after step 3: out of memory"}
    text = capsys.readouterr().out
    assert f"of which {len(failed)} failed" in text
    assert "failed: grpo, after step 3: out of memory" in text


def test_a_full_disk_ends_the_search_and_fails_no_trial(tmp_path) -> None:
    """Neither in a trial nor on the fresh seeds: afterwards all is as if it had never been full."""
    whole, cut = FakeTrainPy(tmp_path / "whole"), FakeTrainPy(tmp_path / "cut")
    search([*WORDS, "trials=3"], whole.trainer)
    for trials in (1, 3):
        cut.is_full = True
        with pytest.raises(UserError, match="^disk full: free space"):
            search([*WORDS, f"trials={trials}"], cut.trainer)
        cut.is_full = False
        search([*WORDS, f"trials={trials}"], cut.trainer)
    assert found(cut)["trials"] == found(whole)["trials"]
    before = len(cut.trained)
    cut.is_full = True  # on a fresh seed
    with pytest.raises(UserError, match="^disk full: free space"):
        search([*WORDS, "trials=3"], cut.trainer)
    assert len(cut.trained) == before + 1


def test_where_everything_fails_it_ends(fake) -> None:
    fake.value = lambda words: math.nan
    with pytest.raises(
        UserError, match="the first 3 trials failed: grpo, after step 3.*remove .*/try$"
    ):
        search([*WORDS, "trials=9"], fake.trainer)
    assert len(fake.trained) == 3


def test_where_all_trials_failed_the_folder_to_remove_is_named(fake) -> None:
    fake.value = lambda words: math.nan
    folder = fake.outputs / "search" / "try"
    for _ in range(2):
        with pytest.raises(UserError, match="all trials failed: grpo, after.*out of mem") as error:
            search([*WORDS, "trials=2"], fake.trainer)
        assert str(error.value).endswith(f"to begin again, remove {folder}")


def test_a_goal_that_the_data_does_not_define(fake) -> None:
    fake.value = lambda words: None
    line = r"the first 3 trials failed: grpo-\w+: its eval.json has no value of reasoning_accuracy"
    with pytest.raises(UserError, match=line):
        search([*WORDS, "trials=9"], fake.trainer)


def test_a_default_that_fails_leaves_no_difference(fake, capsys) -> None:
    fake.value = lambda words: 0.5 if "stages.grpo.lr" in words else math.nan
    search([*WORDS, "trials=2"], fake.trainer)
    assert found(fake)["difference"] is None and found(fake)["default"]["values"] == [None, None]
    assert "| default | failed | failed |  |  |" in capsys.readouterr().out


def test_a_winner_that_fails_on_fresh_seeds(fake, capsys) -> None:
    fake.value = lambda words: 0.5 if words["seed"] == "0" else math.nan
    folder = search([*WORDS, "trials=2"], fake.trainer)
    text = capsys.readouterr().out
    assert "winner, seed 1: failed: grpo, after step 3: out of memory" in text
    assert "| winner | failed | failed |  |  |" in text and "fresh.svg" not in text
    assert not (folder / "fresh.svg").exists()


def test_less_is_better_for_bits(fake) -> None:
    fake.value = lambda words: float(words.get("stages.pretrain.lr", 3))
    words = ["name=bits", "stages.pretrain.lr=interval(1,2)", "trials=6", "seeds=2"]
    search(words, fake.trainer)
    result = found(fake, "bits")
    values = [trial["value"] for trial in result["trials"]]
    assert result["trials"][result["best_trial"]]["value"] == min(values)
    assert result["difference"]["value"] < 0 and result["better"] == "lower"


def test_the_mean_of_several_seeds_for_a_trial(fake) -> None:
    search([*WORDS, "trials=2", "trial_seeds=3"], fake.trainer)
    trial = found(fake)["trials"][0]
    given = dict(word.split("=", 1) for word in trial["words"])
    values = [fake.value({**given, "seed": seed}) for seed in "012"]
    assert math.isclose(trial["value"], sum(values) / 3) and len(trial["runs"]) == 3
    assert found(fake)["fresh_seeds"] == [3, 4]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["name=try", "stage=grpo"], "no range to search"),
        ([LR], "name: missing"),
        (["name=../x", LR], "name: expected one word"),
        (["name=b", LR, "name=c"], "name: given twice"),
        (["name=b", LR, "trials=3", "trials=3"], "trials: given twice"),
        (["name=try", LR, "trials=0"], "trials: must be at least 1"),
        (["name=try", LR, "trials=x"], "trials: expected a whole number"),
        (["name=try", LR, "seeds=1"], "seeds: must be at least 2"),
        (["name=try", LR, "sampler=grid"], "sampler: expected one of tpe, random"),
        (["name=try", LR, "tag=x"], "tag=x: a search tags its runs"),
        (["name=try", LR, "force=true"], "force=true: "),
        (["name=try", LR, "stage=distill"], "stage: expected one of pretrain"),
        (["name=try", "stages.grpo.lrr=1,2"], r"stages.grpo.lrr: no such setting: did you mean lr"),
        (["name=try", "stages.grpo.lr=interval(-1,1)"], "stages.grpo.lr: must be above 0"),
        (["name=try", "stages.grpo.lr=choice(1,0)"], "stages.grpo.lr: must be above 0"),
        (["name=try", LR.replace("interval", "intervall")], "^stages.grpo.lr=tag.*: no range"),
    ],
)
def test_bad_words_train_nothing(fake, words, line) -> None:
    with pytest.raises(UserError, match=line):
        search(words, fake.trainer)
    assert fake.trained == [] and not (fake.outputs / "search").exists()


def test_another_space_under_the_same_name(fake) -> None:
    search([*WORDS, "trials=1"], fake.trainer)
    for change in (["model=moe_tiny"], ["sampler=random"], ["seed=1"]):
        kept = [word for word in WORDS if word.split("=")[0] != change[0].split("=")[0]]
        with pytest.raises(UserError, match="is another search: .*another name=") as error:
            search([*kept, "trials=1", *change], fake.trainer)
        said = str(error.value).partition("another search: ")[2].rpartition(" (sampler=")[0]
        assert shlex.split(said) == ["model=moe_nano", "stage=grpo", LR, EPOCHS]
    search([*reversed(WORDS[1:3]), WORDS[0], *WORDS[3:], "trials=1"], fake.trainer)  # other order


def test_quoted_words_can_be_pasted(fake) -> None:
    words = ["name=try", "stage=grpo", "+x='a b'", EPOCHS, "trials=1"]
    search(words, fake.trainer)
    with pytest.raises(UserError) as error:
        search([*words, "seed=1"], fake.trainer)
    said = str(error.value).partition("another search: ")[2].rpartition(" (sampler=")[0]
    assert shlex.split(said) == ["+x='a b'", "stage=grpo", EPOCHS]


def test_a_broken_journal_is_one_line(fake) -> None:
    folder = search([*WORDS, "trials=1"], fake.trainer)
    (folder / "journal.log").write_text("{\n{}\n")
    with pytest.raises(UserError, match="journal.log: broken"):
        search([*WORDS, "trials=1"], fake.trainer)


def test_tpe_beats_random_on_a_quadratic_in_the_mean_of_20_seeds() -> None:
    _, ranges = split_words(["x=interval(-5,5)", "y=interval(-5,5)"])

    def best(sampler, seed: int) -> float:
        study = optuna.create_study()
        for _ in range(30):
            number, words = ask(study, ranges, sampler, seed)
            x, y = (float(word.split("=")[1]) for word in words)
            study.tell(number, (x - 2) ** 2 + (y + 1) ** 2)
        return study.best_value

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    means = {kind: sum(best(kind, s) for s in range(20)) / 20 for kind in ("tpe", "random")}
    assert means["tpe"] < 0.5 * means["random"]


# --- the real way to train.py, with another script in its place

LOST = OSError("gloo: Connection closed by peer")
PASSING = {
    "full": advice(OSError(errno.ENOSPC, "No space left on device"), "", {}),
    "temporary": advice(FileNotFoundError("No usable temporary directory found"), "", {}),
    "peer": advice(LOST, "", {}),
    "wandb": f"sft-x, after step 3: W&B's process wandb-core has ended: {AGAIN}",
    "hydra": "outputs/hydra: No space left on device: free space, or choose another outputs=FOLDER",
    "limit": "outputs takes 2 GB, more than 1, and there are no checkpoints left to drop: remove",
}
CHECK = """
import json, sys
for words, config in json.load(sys.stdin):
    if "c=0" in words:
        sys.exit("error: c: must be above 0, got 0")
"""
SCRIPT = """
import signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
CODES = {"bad": "grpo-x, after step 3: out of memory\\n", **PASSING}
if "--cfg" in sys.argv:
    if "b" in words:
        sys.exit("b: no such setting")
    print("stage: grpo\\nseed: 3\\noutputs: out")
    sys.exit()
if words["a"] in CODES:
    sys.exit(CODES[words["a"]])
if words["a"] == "wait":
    def stop(signum, frame):
        print("saved", flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(600)
print("run: elsewhere\\nrun: the/folder\\nnext:\\n")
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.replace("PASSING", repr(PASSING)))
    monkeypatch.setattr(training, "SCRIPT", path)
    monkeypatch.setattr(training, "CHECK", [sys.executable, "-c", CHECK])
    return path


def test_a_process_of_train_py(script, tmp_path) -> None:
    log = tmp_path / "log"
    assert training.settings([["a=1"]]) == {"stage": "grpo", "seed": 3, "outputs": "out"}
    with pytest.raises(UserError, match="^b: no such setting$"):
        training.settings([["a=1"], ["b=1"]])
    with pytest.raises(UserError, match="^c: must be above 0, got 0$"):
        training.settings([["a=1"], ["c=0"]])
    assert training.train(["a=1"], log) == Path("the/folder") and "elsewhere" in log.read_text()
    with pytest.raises(TrialFailed, match="^grpo-x, after step 3: out of memory$"):
        training.train(["a=bad"], log)
    assert log.read_text().endswith("\ntrain.py ended with code 1\n")
    assert last_line("") == ""


@pytest.mark.parametrize("name", PASSING)
def test_what_is_not_the_words_fault_is_no_failed_trial(script, tmp_path, name) -> None:
    with pytest.raises(UserError) as caught:
        training.train([f"a={name}"], tmp_path / "log")
    assert not isinstance(caught.value, TrialFailed)
    assert str(caught.value) == f"{PASSING[name]} (of the search)"


def test_a_process_that_took_others_along_by_its_lack_of_memory(script, tmp_path) -> None:
    lines = f"grpo-x: {advice(MemoryError(), 'stages.grpo', {'micro_batch_size': 8})}", LOST
    script.write_text(f"import sys; print({lines[0]!r}); sys.exit({PASSING['peer']!r})")
    with pytest.raises(TrialFailed):
        training.train(["a=1"], tmp_path / "log")


def test_a_disk_too_full_for_the_line_that_says_so(script, tmp_path) -> None:
    """Both processes may write 1024 bytes to a file, which take no line more."""
    script.write_text("import sys; sys.stdout.write(2000 * 'x'); sys.stdout.flush()")
    code = (
        "from pathlib import Path; from fourstage.search import training\n"
        f"training.SCRIPT = Path({str(script)!r})\n"
        f"training.train([], Path({str(tmp_path / 'log')!r}))"
    )
    command = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("OSError: [Errno 27] File too large")


def test_the_check_is_train_pys_own(tmp_path) -> None:
    """A value that the typed settings refuse, in the last of three commands."""
    words = [f"outputs={tmp_path / 'outputs'}", "model=moe_nano"]
    bad = "stages.pretrain.lr=-1"
    with pytest.raises(UserError, match=r"^stages\.pretrain\.lr: must be above 0, got -1\.0$"):
        training.settings([words, [*words, "stages.pretrain.lr=1e-5"], [*words, bad]])
    with pytest.raises(UserError, match="^x: unknown key"):
        training.settings([[*words, "+x='a b'"]])
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_train_py_first_and_the_trial_stays_open(script, tmp_path) -> None:
    """The process that searches is stopped; its train.py saves, and nothing is left running."""
    code = (
        "import sys; from pathlib import Path; from fourstage.search import training\n"
        "from fourstage.interruptions import handle_stops, stop_now\n"
        f"training.SCRIPT = Path({str(script)!r}); handle_stops(stop_now)\n"
        f"training.train(['a=wait'], Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 60
    while not (tmp_path / "log").exists() or "ready" not in (tmp_path / "log").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert (tmp_path / "log").read_text() == "ready\nsaved\n"


def test_a_train_py_that_somebody_stopped_is_no_failed_trial(script, tmp_path) -> None:
    script.write_text('import sys; print("grpo-x, step 3: stopped by SIGTERM"); sys.exit(143)')
    with pytest.raises(UserError, match="stopped by SIGTERM") as caught:
        training.train(["a=1"], tmp_path / "log")
    assert not isinstance(caught.value, TrialFailed)


def test_without_a_checkout(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training, "SCRIPT", tmp_path / "train.py")
    with pytest.raises(UserError, match="a search needs a checkout of the repository"):
        training.settings([["a=1"]])

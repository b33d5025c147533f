"""train.py: the config tree, what is typed, what is printed, and how it ends."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

import train
from fourstage.interruptions import STOPS
from fourstage.lineage import runner
from fourstage.lineage.words import (
    as_hydra_reads,
    line_of,
    name_folders,
    refuse_nameless_groups,
)
from tests.fakes import CONF, FakeTrain, config, own_files

REPO = CONF.parent


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs train.py in this process with a FakeTrain; returns (exit code, what was trained)."""
    files = own_files(tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str, fake: FakeTrain | None = None) -> tuple[int, FakeTrain]:
        fake = fake or FakeTrain()
        monkeypatch.setattr(runner, "train_stage", fake)
        flags = [a for a in arguments if a.startswith("-")]  # Hydra wants them before all overrides
        overrides = ["model=moe_nano", *files, *(a for a in arguments if a not in flags)]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *overrides])
        GlobalHydra.instance().clear()
        try:
            train.main()
        except SystemExit as exit:
            if isinstance(exit.code, str):  # what the interpreter does with it
                print(exit.code, file=sys.stderr)
                return 1, fake
            return exit.code or 0, fake
        return 0, fake

    return run


def test_a_ladder_and_where_things_lie(call, tmp_path, capsys) -> None:
    code, fake = call("stage=sft")
    assert (code, fake.stages) == (0, ["pretrain", "sft"])
    out = capsys.readouterr().out
    assert "moe_nano: 87,872 parameters, 63,296 active; data files, seed 0, cpu 32-true" in out
    assert "finished sft-" in out
    assert {path.name for path in tmp_path.iterdir()} == {"files", "outputs"}
    outputs = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert outputs == {"hydra", "locks", "runs"}
    assert not list(tmp_path.rglob(".hydra")) and not list(tmp_path.rglob("*.log"))
    assert call("stage=sft")[1].stages == []


def test_a_multirun_shares_ancestors_and_goes_on_after_a_failure(call, tmp_path, capsys) -> None:
    code, fake = call("-m", "stage=ppo,grpo", "seed=0,abc,1", "outputs=elsewhere")
    ladder = ["pretrain", "sft", "reward", "ppo"]
    assert (code, fake.stages) == (1, [*ladder, *ladder, "grpo", "grpo"])
    assert "job 1 failed: seed: expected a whole number, got 'abc'" in capsys.readouterr().err
    assert len(list((tmp_path / "elsewhere" / "runs").iterdir())) == 10
    assert list((tmp_path / "elsewhere" / "hydra").glob("*/multirun.yaml"))
    assert {path.name for path in tmp_path.iterdir()} == {"files", "elsewhere"}


def test_sweep_seeds(call) -> None:
    code, fake = call("sweep=seeds")
    assert code == 0 and fake.stages.count("pretrain") == 3 and fake.stages.count("grpo") == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["seed=abc"], "seed: expected a whole number, got 'abc'"),
        (["stage=foo"], "stage: expected one of pretrain, sft, reward, ppo, grpo, got 'foo'"),
        (["stages.pretrain.lr=${nope}"], "Interpolation key 'nope' not found"),
        (["experiment=real_cpu"], "data.root: not set: data.root=FOLDER names the folder with "),
        (["data.corpus.path=/nope.txt"], "/nope.txt: no such file (paths count from the folder"),
        (["outputs=null"], "outputs: expected a folder, got None"),
        (["outputs="], "outputs: expected a folder, got ''"),
        (["outputs=/dev/null"], "/dev/null/hydra: Not a directory: free space, or choose another"),
    ],
)
def test_a_mistake_is_one_line(call, capsys, arguments, line) -> None:
    code, fake = call(*arguments)
    assert (code, fake.stages) == (1, [])
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("stagee=sft", "Could not override 'stagee'"),
        ("model=huge", "Could not find 'model/huge'"),
        ("debug=slow", "Could not find 'debug/slow'"),
        ("stages@stages.grpo=nope", "Could not find 'stages/nope'"),
    ],
)
def test_what_hydra_refuses(call, capsys, argument, words) -> None:
    code, fake = call(argument)
    err = capsys.readouterr().err
    assert (code, fake.stages) == (1, []) and words in err and "Traceback" not in err


def test_a_sweep_file_is_a_multirun() -> None:
    def read(*found: str) -> list[str]:
        return as_hydra_reads(list(found), str(CONF))

    assert read("sweep=seeds", "seed=0,1") == ["--multirun", "sweep=seeds", "seed=0,1"]
    assert read("-m", "sweep=seeds") == ["--multirun", "sweep=seeds"]
    for others in (["--cfg", "job", "sweep=seeds"], ["hydra.mode=RUN", "sweep=seeds"], ["seed=1"]):
        assert read(*others) == others


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("model=null", "dense_small, dense_tiny, moe_large, "),
        ("debug=null", "fast; or leave debug out"),
        ("data=5", "embedded, files, public; or leave data out"),
        ("+experiment=true", "no_preferences, own_data, real_cpu, tinystories_gpu; or leave "),
        ("tokenizer=", "bpe, char, hf; or leave tokenizer out"),
        ("stages@stages.grpo=null", "grpo, grpo_dapo, grpo_dr, grpo_gspo, ppo, "),
    ],
)
def test_a_group_without_a_name_is_one_line(argument, options) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"{argument}: expected one of {options}")):
        refuse_nameless_groups(["seed=1", argument], str(CONF))
    fine = ["--help", "stage=5", "model=moe_nano", "~debug", "seed=null", "model.name=null", "=1"]
    refuse_nameless_groups(fine, str(CONF))


def test_a_terminal_without_unicode_sees_escapes(call, monkeypatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("fourstage.lineage.messages.gain", lambda outputs, name: "1 → 2")
    assert call("stage=pretrain")[0] == 0
    screen.flush()
    assert b"\n1 \\u2192 2\nrun: " in screen.buffer.getvalue()


def test_help_begins_with_what_it_is_and_commands_that_compose() -> None:
    words = [sys.executable, str(REPO / "train.py"), "--help"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert text.startswith("Train one small language model stage by stage")
    examples = re.findall(r"^  python train\.py (?:-m )?(.+?)(?:  .*)?$", text, re.M)
    assert len(examples) == 5
    for example in examples:
        config(*(word.split(",")[0] for word in example.split()))
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert set(re.findall(r"^(\w+): \w", text, re.M)) == groups
    assert "--cfg job" in text and "stages:\n" not in text  # no dump
    null = subprocess.run([*words[:2], "model=null"], capture_output=True, text=True)
    assert null.returncode == 1 and null.stderr.startswith("model=null: expected one of dense_")
    assert null.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["stages.sft.lrr=3"], "stages.sft.lrr: no such setting: did you mean lr?"),
        (["stagee=sft"], "stagee: no such setting: did you mean stage or stages or tag?"),
        (["foo.bar=1"], "foo: no such setting: known are ancestors, data, debug, evaluation, "),
        (["model=moe_nan"], "model=moe_nan: no such model: did you mean moe_nano or moe_tiny or "),
        (["debug=fastt"], "debug=fastt: no such debug: did you mean fast?"),
        (["stages@stages.grpo=nope"], "stages=nope: no such stages: known are grpo, grpo_dapo, "),
        (["data.reasoning.tasks.gcd={}"], "data.reasoning.tasks.gcd: data.reasoning.only={gcd: "),
        (["stages.sft.lr"], "Error parsing override 'stages.sft.lr': missing EQUAL at"),
        (["+experiment=no_preferences"], "experiment is given already: leave out the plus sign"),
        (["-m", "seed=1,2", "dry=1"], "dry: no such setting: known are "),
        (["-m", "hydra/sweeper=ax"], "hydra/sweeper=ax: not installed: pip install hydra-ax-swee"),
        (["-m", "hydra/launcher=x"], "hydra/launcher=x: no such launcher is installed"),
        (["model=null"], "model=null: expected one of dense_small, "),
    ],
)
def test_words_that_hydra_refuses_are_one_line(words, line, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.reported, "run_and_report", train.reported.run_and_report)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as caught:
        train.run()
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit if words == ["model=null"] else Exception) as caught:
        train.run()


def test_a_full_disk_is_one_line(call, capsys) -> None:
    full = OSError(28, "No space left on device", "outputs/x")
    code, _ = call(fake=FakeTrain("pretrain", full))
    assert code == 1
    line = "disk full at outputs/x: free space and run the same command again: it resumes\n"
    assert capsys.readouterr().err == line


def test_slurm_that_is_not_there_is_one_line(monkeypatch) -> None:
    def main() -> None:
        raise RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(sys, "argv", ["train.py", "stage=pretrain"])
    monkeypatch.setattr(train.reported, "run_and_report", train.reported.run_and_report)
    with pytest.raises(SystemExit, match="slurm cluster. Without SLURM, leave out sweep=slurm$"):
        train.run()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit doesn't stand for a full disk")
@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_a_disk_that_is_full_from_the_start_is_one_line(multirun, tmp_path) -> None:
    """Of temporary files too, without which PyTorch can't be imported."""
    none = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", sys.executable, "train.py"]
    words = [*multirun, "stage=pretrain", "debug=fast", f"outputs={tmp_path}"]
    done = subprocess.run([*none, *words], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"(disk full|no folder for temporary files): free space.*\n", done.stderr)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1), SystemExit()])
def test_stopping_says_how_to_go_on(call, capsys, stop) -> None:
    code, _ = call("stage=sft", fake=FakeTrain("pretrain", stop))
    assert (code, capsys.readouterr().err) == (130, "stopped: the same command resumes\n")
    assert call("stage=sft")[1].stages == ["pretrain", "sft"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_in_one_line(call, capsys, signum, code) -> None:
    class Signalled(FakeTrain):
        def __call__(self, job):
            os.kill(os.getpid(), signum)
            return super().__call__(job)

    before = [signal.getsignal(s) for s in STOPS]
    try:
        assert call("stage=sft", fake=Signalled())[0] == code
    finally:
        for s, handler in zip(STOPS, before, strict=True):
            signal.signal(s, handler)
    line = f"stopped by {signum.name}: run the same command again: it resumes\n"
    assert capsys.readouterr().err == line


def test_a_bug_and_full_error_show_a_traceback(call, capsys, monkeypatch) -> None:
    assert call(fake=FakeTrain("pretrain", TypeError("a bug")))[0] == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "TypeError: a bug" in err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="seed: expected"):
        call("seed=abc")


@pytest.mark.parametrize("command", ["dashboard", "scaling"])
def test_a_command_that_was_a_module_says_how_it_is_typed_now(command) -> None:
    typed = [sys.executable, "-m", f"fourstage.{command}"]
    done = subprocess.run(typed, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"it is now: python -m fourstage {command}" in done.stderr


def test_command_lines_answer_without_pytorch(tmp_path) -> None:
    """One process each: help and the list of runs come at once."""
    help_of_dashboard = ["-m", "fourstage", "dashboard", "--help"]
    for words in (
        [str(REPO / "train.py"), "--help"],
        ["-m", "fourstage", "runs"],
        help_of_dashboard,
    ):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *words],
            cwd=tmp_path,
            env={"PYTHONPATH": str(REPO / "src"), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "lightning", "datasets", "wandb"}, words
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_that_ends_is_not_taken_for_ctrl_c(tmp_path) -> None:
    options = f"stage=pretrain model=moe_nano debug=fast logger=none outputs={tmp_path}"
    piped = f"{sys.executable} train.py {options} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the reader of this command's output has ended" in done.stderr


@pytest.mark.parametrize(
    "folder",
    [
        "/a b",
        "rel/x",
        "/a=b,c",
        "/it's",
        '/a "x"',
        "/back\\slash\\",
        '/a\\"b',
        "/{a}[b](c)",
        "/ü 你",
    ],
)
def test_a_folder_as_a_tokenizer(folder) -> None:
    group, path = name_folders([f"tokenizer=hf:{folder}", "seed=1"])[:2]
    assert group == "tokenizer=hf"
    parsed = OverridesParser.create().parse_override(path)
    assert (parsed.key_or_group, parsed.value()) == ("tokenizer.path", folder)
    if '"' not in folder:
        assert name_folders([f'tokenizer="hf:{folder}"']) == [group, path]


def test_folders_in_a_sweep() -> None:
    assert name_folders(["-m", "tokenizer=hf:/x", "seed=0,1"])[1:3] == [
        "tokenizer=hf",
        'tokenizer.path="/x"',
    ]
    others = ["stage=sft", "tokenizer=bpe", "tokenizer.path=hf:x", "data.chat.path=hf:a/b"]
    assert name_folders(others) == others
    for words in (["-m", "tokenizer=char,hf:/x"], ["tokenizer=char,hf:/x"]):
        with pytest.raises(SystemExit, match="a sweep can't hold hf:FOLDER: run each tokenizer"):
            name_folders(words)
    with pytest.raises(SystemExit, match="quote a folder with a comma: 'tokenizer=\"hf:/x,bpe\"'"):
        name_folders(["--multirun", "tokenizer=hf:/x,bpe"])


@pytest.mark.parametrize("value", ["hf:/a b, c=d", "it's.txt", "x(1).txt", "[a.txt"])
def test_a_value_that_hydra_cannot_read_is_shown_quoted(value) -> None:
    def parsed(word):
        return OverridesParser.create().parse_overrides([word])[0]

    with pytest.raises(OverrideParseException) as caught:
        parsed(f"data.corpus.path={value}")
    line = line_of(caught.value, str(CONF))
    assert line.startswith(f"data.corpus.path={value}: Hydra can't read the value: quote it: ")
    (word,) = shlex.split(line.partition("quote it: ")[2])
    assert parsed(word).value() == value
    for word in ("seed", "foo bar=1"):
        with pytest.raises(OverrideParseException) as caught:
            parsed(word)
        assert "quote it" not in line_of(caught.value, str(CONF))


@pytest.mark.parametrize(("model", "size"), [("moe_tiny", 4096), ("moe_small", 32_768)])
def test_the_vocabulary_follows_the_model(model, size) -> None:
    expected = {"name": "bpe", "vocab_size": size}
    assert config("tokenizer=bpe", f"model={model}")["tokenizer"] == expected


def test_a_tokenizer_that_is_not_there_is_one_line(call, capsys) -> None:
    for words, line in (
        (["tokenizer=hf"], "tokenizer.path: missing: tokenizer=hf:FOLDER names a folder"),
        (["tokenizer=hf", "tokenizer.path=/no"], "/no/tokenizer.json: no tokenizer there"),
        (["tokenizer=bpe", "tokenizer.vocab_size=9"], "tokenizer.vocab_size: must be between 261"),
    ):
        assert call(*words)[0] == 1
        assert capsys.readouterr().err.startswith(line)

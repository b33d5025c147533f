"""What a model writes is judged where it can do no harm, in bounded time."""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from fourstage.data import sandbox
from fourstage.data.sandbox import Sandbox
from fourstage.data.verifiers import EVALUATED, is_plausible
from fourstage.data.verify import FROM_FILE, verify_all
from tests.test_arrows import ROOT
from tests.verdicts import verify

# --- the sandbox itself, without any filter in front of it


@pytest.fixture(scope="module")
def evaluator():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    judges = Sandbox("tests.evaluation.evaluator")
    judges.map(["1"])
    os.environ["PYTHONPATH"] = before or ""
    yield judges
    judges.close()


ATTACKS = (
    "__import__('os').system('touch {file}')",
    "__import__('subprocess').run(['touch', '{file}'])",
    "open('{file}', 'w')",
    "open('{file}', 'a')",
    "__import__('os').open('{file}', 65)",
    "__import__('os').mkdir('{file}')",
    "__import__('os').symlink('/', '{file}')",
    "__import__('os').rename('{victim}', '{file}')",
    "__import__('os').remove('{victim}')",
    "__import__('os').truncate('{victim}', 0)",
    "__import__('os').chmod('{victim}', 0)",
    "__import__('shutil').rmtree('{folder}')",
    "__import__('os').fork()",
    "__import__('os').kill({pid}, 9)",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('os').execv('/bin/sh', ['sh', '-c', 'touch {file}'])",
    "__import__('os').posix_spawn('/bin/touch', ['touch', '{file}'], dict())",
    "__import__('socket').socket()",
    "__import__('ctypes').CDLL(None)",
    "__import__('pathlib').Path('{file}').touch()",
    "__import__('tempfile').NamedTemporaryFile()",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_left_behind(evaluator, attack, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    os.chmod(victim, 0o644)
    names = {"file": tmp_path / "made", "victim": victim, "folder": tmp_path, "pid": os.getpid()}
    server = evaluator._server.pid
    assert evaluator.map(["1 + 1", attack.format(**names), "2 + 2"]) == [2, None, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "whole" and victim.stat().st_mode & 0o777 == 0o644
    assert evaluator._server.pid == server, "the server lives on"


@pytest.mark.parametrize(
    "attack",
    [
        "9**9**9",
        "[0] * 10**12",
        "'x' * 10**11",
        "[i for i in iter(int, 1)]",
        "__import__('os')._exit(0)",
        "exit()",
        "float('nan')",
        "__import__('sys').setrecursionlimit(10**9) or (f := lambda: f()) and f()",
        "__import__('re').match('(a+)+$', 'a' * 40 + 'b')",
        "open('relative', 'w')",
        "print('forged', flush=True)",
        "__import__('os').write(1, b'[1]')",
    ],
)
def test_what_hangs_grows_or_dies_has_no_result(evaluator, attack):
    found = evaluator.map(["1", attack, "2"])
    assert found[::2] == [1, 2] and found[1] in (None, 3), "what was written went nowhere"
    assert not Path("relative").exists()


def test_a_result_that_waits_is_not_lost(evaluator, monkeypatch):
    """Many lines come at once: those behind the first are in the buffer, not in the pipe."""
    ours, theirs = os.pipe()
    os.write(theirs, b"1\n2\n3\n")
    monkeypatch.setattr(sandbox, "PATIENCE", 0.01)
    assert list(sandbox.lines_of(ours)) == [b"1", b"2", b"3"]
    for end in (ours, theirs):
        os.close(end)


def test_an_interrupted_call_gives_nothing_to_the_next(evaluator):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        evaluator.map(["__import__('time').sleep(1.5)", "77"])
    signal.signal(signal.SIGALRM, before)
    os.environ["PYTHONPATH"] = str(ROOT)
    assert evaluator.map(["8", "9"]) == [8, 9]


def test_no_place_to_write_judges_all_the_same(evaluator, monkeypatch):
    """In a container that is read-only; and a worker that cannot be locked up judges nothing."""
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    judges = Sandbox("tests.evaluation.evaluator")
    assert judges.map(["1 + 1"]) == [2]
    judges.close()


def test_the_current_folder_is_not_imported_from(tmp_path, monkeypatch):
    (tmp_path / "select.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    judges = Sandbox("tests.evaluation.evaluator")
    assert judges.map(["1"]) == [1]
    judges.close()


def test_no_zombies_and_no_folders_stay(evaluator, tmp_path):
    children = Path(f"/proc/{evaluator._server.pid}/task/{evaluator._server.pid}/children")
    evaluator.map(["exit()", "1", "exit()"])
    if children.exists():
        assert children.read_text() == ""


def test_a_killed_server_is_started_again(evaluator):
    evaluator._server.kill()
    evaluator._server.wait()
    os.environ["PYTHONPATH"] = str(ROOT)
    assert evaluator.map(["1"]) == [1]


def test_a_fork_has_a_server_of_its_own(evaluator):
    evaluator.map(["1"])
    server = evaluator._server.pid
    child = os.fork()
    if child == 0:
        same = evaluator.map(["3"]) == [3] and evaluator._server.pid != server
        evaluator.close()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert evaluator.map(["1"]) == [1] and evaluator._server.pid == server


def test_the_server_ends_with_its_program():
    code = (
        "import os, signal; from fourstage.data.sandbox import Sandbox\n"
        "judges = Sandbox('tests.evaluation.evaluator'); judges.map(['1'])\n"
        "print(judges._server.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    server = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{server}/stat").read_text().split()[2] == "Z":
            break  # nobody waits for it here
        time.sleep(0.05)
    else:
        pytest.fail("the server is still there")
    assert "Traceback" not in done.stderr


def test_the_limits_are_those_of_the_processor(evaluator):
    """A machine that is busy with other things makes nobody's answer wrong."""
    assert "ITIMER_PROF" in inspect.getsource(sandbox.work)
    assert evaluator.map(["__import__('time').sleep(1.5) or 5"]) == [5]
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0), "of the worker alone"


# --- every task of reasoning-gym

HOSTILE = (
    "__import__('os').system('touch {file}')",
    "open('{file}','w')",
    "[open('{file}','w') for x in 'a']",
    "().__class__.__base__.__subclasses__()",
    "9**9**9",
    "((((9**9)**9)**9)**9)**9",
    "(9**99)**99**9",
    "x**9999999",
    "factorial(10**9)",
    "1e999999999",
    "9" * 3999,
    "9" * 60 + "!",
    "1 " * 60 + "!",
    "x" * 3000 + "!",
    "nan",
    "inf",
    "nan+nanj",
    "1/0",
    "(" * 1900 + "1" + ")" * 1900,
    "[" * 1900 + "]" * 1900,
    "sin(" * 400 + "x" + ")" * 400,
    "-" * 3999 + "1",
    "a" * 1999 + "!" * 1999,
    "A -> B " * 400,
    "1 " * 1900,
    "x" * 100_000,
    "a\0b",
    "\ud800",
    "lambda: 0",
    "(x:=1)",
    "exec('import os')",
    "__import__('os').kill({pid},9)",
    "exit()",
)
NO_DEFAULT = "composite"  # needs data sets named


def problem(task: str) -> SimpleNamespace:
    """One with the task's default arguments, as it is stored."""
    entry = reasoning_gym.create_dataset(task, size=1, seed=0)[0]
    return SimpleNamespace(task=task, entry=json.loads(json.dumps(entry, default=str)))


def attack(task: str, folder: Path) -> None:
    one = problem(task)
    for hostile in HOSTILE:
        hostile = hostile.replace("{file}", f"{folder}/made").replace("{pid}", str(os.getpid()))
        start = time.monotonic()
        assert verify(one, f"#### {hostile}") < 1.0, (task, hostile[:60])
        assert time.monotonic() - start < 2 + sandbox.PATIENCE / 5, (task, hostile[:60])
    assert not list(folder.iterdir())


@pytest.mark.parametrize("task", ["countdown", "string_insertion", "complex_arithmetic", "knights"])
def test_hostile_answers(task, tmp_path):
    attack({"knights": "knights_knaves"}.get(task, task), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(DATASETS) - {NO_DEFAULT}))
def test_hostile_answers_to_every_task(task, tmp_path):
    attack(task, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(DATASETS) - {NO_DEFAULT}))
def test_right_answers_stay_right(task):
    one = problem(task)
    answer = one.entry["answer"]
    if not isinstance(answer, str):
        pytest.skip(f"{task} has no single answer")
    assert is_plausible(answer.strip(), task, one.entry)
    assert verify(one, f"#### {answer}") == 1.0


def test_the_tasks_that_evaluate_are_known():
    """By their verifiers' code: a new reasoning-gym may have others."""
    found = set()
    for task, (dataset, _) in DATASETS.items():
        names = {
            node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(dataset))))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
        }
        code = inspect.getsource(dataset.score_answer)
        if names & {"eval", "exec", "parse_expr", "sympify", "literal_eval"}:
            called = ("eval(answer", "exec(", "parse_expr(answer", "sympify(", "literal_eval(")
            if any(call in code for call in called):
                found.add(task)
    assert found == set(EVALUATED)


def test_many_answers_are_judged_as_one_by_one():
    gym = [problem("chain_sum"), problem("gcd")]
    file = SimpleNamespace(task=FROM_FILE, entry={"answer": r"2\sqrt{3}"})
    problems = [gym[0], file, gym[1], gym[0], file, gym[1]]
    texts = [
        f"#### {gym[0].entry['answer']}",
        r"#### \sqrt{12}",
        "#### 7x",
        "no mark",
        "#### 9**9**9",
        f"so\n#### {gym[1].entry['answer']}",
    ]
    assert verify_all(problems, texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert verify_all(problems, texts) == [
        verify(*row) for row in zip(problems, texts, strict=True)
    ]

"""The terminal chat: its logic with a scripted voice, and the command with a real, tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from fourstage.chat import Chat, ChatSettings, Voice, converse, furthest, load_voice, main
from fourstage.errors import UserError
from fourstage.model import ModelConfig, ScalarModel, Transformer
from fourstage.model.weights import save_weights
from fourstage.settings import from_arguments
from fourstage.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = Tokenizer.char()


class Script:
    """A voice that says what is written down, and keeps what it was asked."""

    def __init__(self, *answers: str, max_seq_len: int = 512) -> None:
        self.answers = list(answers)
        self.voice = Voice("sft-script", TOKENIZER, max_seq_len, self.speak)
        self.asked: list[tuple[str, int]] = []

    def speak(self, prompt: list[int], seed: int) -> Iterator[int]:
        self.asked.append((TOKENIZER.decode(prompt, keep_special=True), seed))
        answer = self.answers.pop(0)
        if answer == "!interrupt":
            yield from TOKENIZER.encode("half an ans")
            raise KeyboardInterrupt
        if answer == "!too long":
            raise UserError("a prompt is too long")
        yield from [*TOKENIZER.encode(answer), TOKENIZER.eot_id]

    def open_voice(self, name: str) -> Voice:
        if name == "nobody":
            raise UserError("unknown run 'nobody'")
        return replace(self.voice, name=name)

    def chat(self, **settings: object) -> Chat:
        return Chat(ChatSettings(**settings), self.voice, self.open_voice)


def talk(chat: Chat, *lines: str | BaseException) -> str:
    """What is printed for these lines; an exception is raised instead of a line."""
    waiting, written = list(lines), []

    def read() -> str:
        line = waiting.pop(0) if waiting else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    converse(chat, read, written.append)
    assert not waiting
    return "".join(written)


def test_the_conversation_grows_and_each_answer_has_its_seed() -> None:
    script = Script("I am.", "Yes.")
    said = talk(script.chat(seed=7), "Who are you?", "", "Sure?")
    assert said == "(sft-script; /help for commands)\nI am.\nYes.\n\n"
    assert script.asked == [
        ("<bos><user>Who are you?<eot><assistant>", 7),
        (
            "<bos><user>Who are you?<eot><assistant>I am.<eot><user>Sure?<eot><assistant>",
            8,
        ),
    ]


def test_commands() -> None:
    script = Script("a", "b", "c")
    chat = script.chat()
    said = talk(chat, "1", "/reset", "2", "/stage ppo", "3", "/help", "/quit")
    prompts = [f"<bos><user>{i}<eot><assistant>" for i in "123"]
    assert script.asked == [(prompt, 0) for prompt in prompts]
    assert chat.voice.name == "ppo"
    assert "(a new conversation)\n" in said and "(ppo, a new conversation)\n" in said
    assert "/stage NAME" in said


@pytest.mark.parametrize("line", ["/nonsense", "/stage", "/quit now", "/stage nobody"])
def test_a_wrong_command_is_one_line_and_the_chat_goes_on(line: str) -> None:
    script = Script("still here")
    said = talk(script.chat(), line, "hello").splitlines()
    wrong = "error: /stage: name a stage or a run" if line == "/stage" else "error: unknown "
    assert said[1].startswith(wrong) and said[2] == "still here"


def test_an_answer_that_cannot_be_given_leaves_the_conversation_as_it_was() -> None:
    script = Script("!too long", "ok")
    chat = script.chat()
    assert "error: a prompt is too long\nok\n" in talk(chat, "long", "short")
    assert [message["content"] for message in chat.messages] == ["short", "ok"]


def test_control_c_ends_an_answer_and_then_the_chat() -> None:
    script = Script("!interrupt", "ok")
    chat = script.chat()
    said = talk(chat, "hello", "go on", KeyboardInterrupt())
    assert said.endswith("half an ans (stopped)\nok\n\n")
    assert chat.messages[1] == {"role": "assistant", "content": "half an ans"}


def test_the_oldest_exchange_is_forgotten_first() -> None:
    script = Script("one", "two", "three", max_seq_len=60)
    talk(script.chat(max_new_tokens=10, history=9), "1" * 15, "2" * 15, "3" * 15)
    assert [prompt.count("<user>") for prompt, _ in script.asked] == [1, 2, 2]
    assert script.asked[2][0].startswith("<bos><user>222")
    assert script.asked[2][1] == 2  # its own seed all the same


@pytest.mark.parametrize(("history", "seen"), [(0, "1111"), (1, "1222"), (2, "1233")])
def test_the_model_sees_so_many_earlier_exchanges(history: int, seen: str) -> None:
    script = Script("a", "b", "c", "d")
    talk(script.chat(history=history), "w", "x", "y", "z")
    assert "".join(str(prompt.count("<user>")) for prompt, _ in script.asked) == seen
    last = "<user>y<end><assistant>c" if history else "<bos><user>z"
    assert last.split("<end>")[0] in script.asked[3][0]


def test_unknown_characters_are_counted() -> None:
    said = talk(Script("a").chat(), "naïve 😀")
    assert "(2 characters unknown to the tokenizer were replaced)\n" in said


def test_one_shot_says_so_on_stderr(outputs: Path, capsys: pytest.CaptureFixture) -> None:
    main([f"outputs={outputs}", "prompt=Who? 😀", "max_new_tokens=5"])
    said = capsys.readouterr()
    assert said.err == "1 character unknown to the tokenizer was replaced\n"
    assert said.out == one_shot(capsys, outputs, "prompt=Who? �", "max_new_tokens=5")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("temprature=1", "temprature: unknown key, did you mean temperature?"),
        ("temperature=hot", "temperature: expected a number, got 'hot'"),
        ("seed=1.5", "seed: expected a whole number, got '1.5'"),
        ("max_new_tokens=0", "max_new_tokens: must be at least 1, got 0"),
        ("seed=-1", "seed: must be between 0 and 4294967295, got -1"),
        ("prompt= ", "prompt: it is empty"),
        ("sft", "'sft': expected key=value, such as run=sft"),
    ],
)
def test_wrong_arguments(argument: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_arguments(ChatSettings, [argument])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_arguments() -> None:
    arguments = ["run=12345", "prompt=1 + 1 = ?", "temperature=0", "seed=3"]
    settings = from_arguments(ChatSettings, arguments)
    assert settings == ChatSettings(run="12345", prompt="1 + 1 = ?", temperature=0.0, seed=3)


# --- with real models


def save_run(outputs: Path, stage: str, run_id: str, seed: int) -> Path:
    """A finished run of moe_nano with random weights."""
    folder = outputs / "runs" / f"{stage}-{run_id}"
    folder.mkdir(parents=True)
    config = ModelConfig(**yaml.safe_load((ROOT / "conf/model/moe_nano.yaml").read_text()))
    torch.manual_seed(seed)
    model = Transformer(config, TOKENIZER.vocab_size)
    save_weights(folder, ScalarModel(model) if stage == "reward" else model, TOKENIZER)
    record = {"id": run_id, "stage": stage, "name": folder.name, "parents": {}, "debug": None}
    record |= {"status": "finished", "started": "2026-01-01", "finished": "2026-01-02"}
    shape = {"seed": 0, "model": {"name": "moe_nano"}, "stages": {stage: {}}}
    record |= {"group": run_id, "config": shape, "cost": {"seconds": 1.0}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    for seed, stage in enumerate(("pretrain", "sft", "reward")):
        save_run(outputs, stage, "abc"[seed] * 10, seed=10 + seed)
    return outputs


def one_shot(capsys: pytest.CaptureFixture, outputs: Path, *arguments: str) -> str:
    main([f"outputs={outputs}", "prompt=Who are you?", "max_new_tokens=20", *arguments])
    return capsys.readouterr().out


def test_one_shot_prints_the_answer_only_and_the_same_again(
    outputs: Path, capsys: pytest.CaptureFixture
) -> None:
    answers = {
        run: one_shot(capsys, outputs, f"run={run}") for run in ("pretrain", "sft", "random")
    }
    assert all(1 < len(answer) <= 21 and answer.endswith("\n") for answer in answers.values())
    assert len(set(answers.values())) == 3
    for run, answer in answers.items():
        assert one_shot(capsys, outputs, f"run={run}") == answer
        assert one_shot(capsys, outputs, f"run={run}", "seed=1") != answer
    assert one_shot(capsys, outputs, "temperature=0") == one_shot(
        capsys, outputs, "run=bbbbbbbbbb", "temperature=0", "seed=9"
    )


def test_random_is_drawn_from_the_seed(outputs: Path) -> None:
    def says(seed: int) -> list[int]:
        voice = load_voice(ChatSettings(outputs=str(outputs), seed=seed), "random")
        return list(voice.speak(TOKENIZER.prompt([{"role": "user", "content": "Who?"}]), 0))

    assert says(5) == says(5) != says(6)


def test_the_furthest_stage_that_writes_is_talked_to(outputs: Path, tmp_path: Path) -> None:
    assert furthest(outputs).name == "sft-bbbbbbbbbb"
    with pytest.raises(UserError, match="no finished pretrain run"):
        furthest(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=reward"], "holds a reward model, but a language model is needed"),
        (["run=nobody"], "unknown run 'nobody'"),
        (["top_p=0"], "top_p: must be above 0"),
        (["temperature=1e-40"], "temperature: must be 0 \\(greedy\\) or at least 0.01, got 1e-40"),
        (["max_new_tokens=600"], "max_seq_len"),
    ],
)
def test_mistakes(
    outputs: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        one_shot(capsys, outputs, *arguments)
    assert capsys.readouterr().out == ""


def process(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "fourstage", "chat", *arguments]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def test_a_mistake_is_one_line_on_stderr_with_exit_code_1() -> None:
    out, err = (chat := process("rum=sft")).communicate(timeout=60)
    assert (chat.returncode, out, err) == (1, "", "error: rum: unknown key, did you mean run?\n")


def test_help_does_not_wait_for_pytorch() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-X", "importtime", "-m", "fourstage", "chat", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Talk to the model of any stage.\n\n    python -m fourstage chat")
    assert "prompt=" in done.stdout and "| torch\n" not in done.stderr


@pytest.mark.slow
def test_a_terminal_session_ends_cleanly(outputs: Path) -> None:
    options = (f"outputs={outputs}", "max_new_tokens=5")
    chat = process(*options)
    out, err = chat.communicate("hello\n/stage random\nhello\n", timeout=120)  # then end of file
    assert chat.returncode == 0 and err == "" and "(untrained moe_nano" in out
    chat = process(*options)
    while chat.stdout.readline()[:1] != "(":
        pass
    chat.send_signal(signal.SIGINT)
    out, err = chat.communicate(timeout=120)
    assert chat.returncode == 0 and err == ""


def test_bytes_of_a_character_are_shown_together() -> None:
    """A token may hold a part of a character; what stays a part is shown at the end."""
    bpe = Tokenizer.bpe(["ab"], 261)
    for answer, cut in (("a你🙂b", 0), ("é🙂", 2)):
        script = Script(answer)
        token_ids = bpe.encode(answer)
        token_ids = token_ids[: len(token_ids) - cut]
        voice = replace(script.voice, tokenizer=bpe, speak=lambda *_, ids=token_ids: iter(ids))
        chat = Chat(ChatSettings(), voice, script.open_voice)
        said = [piece for piece in chat.answer("x") if piece]
        assert said == (["a", "你", "🙂", "b"] if cut == 0 else ["é", "\ufffd"])
        assert chat.messages[-1]["content"] == "".join(said) == bpe.decode(token_ids)

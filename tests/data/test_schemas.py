"""Records and files as people have them: used, or named in one line, or left out and counted."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pyarrow import parquet

from fourstage import data
from fourstage.data.files import Row, files_of, is_text, read_rows, read_text
from fourstage.data.fits import lost_on_reading
from fourstage.data.schemas import (
    Unusable,
    conversation_from,
    document_from,
    pair_from,
    problem_from,
)
from fourstage.data.solutions import boxed
from fourstage.data.userfiles import usable
from fourstage.data.verify import has_form
from fourstage.errors import UserError
from fourstage.settings import build
from tests.data.conftest import make
from tests.fakes import CONF
from tests.verdicts import verify


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def record(**values) -> Row:
    return Row(values, "f.jsonl, line 7")


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


S_TURNS = [system("s"), user("a"), assistant("b")]
HUMAN, GPT = {"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}
ODD_ROLES = [{"role": " USER", "content": "a"}, {"role": "Model", "content": "b"}]
ALPACA = {"instruction": "a", "input": "", "output": "b"}
TURNS = [user("a"), assistant("b")]


# --- what is read


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({**ALPACA, "system": "s"}, [system("s"), *TURNS]),
        ({**ALPACA, "system": " "}, TURNS),
        ({**ALPACA, "system": None, "history": None}, TURNS),
        ({**ALPACA, "history": [["x", "y"]]}, [user("x"), assistant("y"), *TURNS]),
        ({"messages": TURNS, "system": "s"}, [system("s"), *TURNS]),
        ({"messages": [system("own"), *TURNS], "system": "s"}, [system("own"), *TURNS]),
        ({"messages": [system(""), *TURNS]}, TURNS),
        (
            {"conversations": [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]},
            TURNS,
        ),
        (
            {"messages": [{"role": " USER", "content": "a"}, {"role": "Model", "content": "b"}]},
            TURNS,
        ),
        (
            {"messages": [{"role": "user", "content": [part("a"), part("c")]}, assistant("b")]},
            [user("a\nc"), assistant("b")],
        ),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, TURNS),
        (
            {"prompt": [system("s"), user("a")], "completion": [assistant("b")]},
            [system("s"), *TURNS],
        ),
        ({"prompt": "a", "completion": "b", "system": "s"}, [system("s"), *TURNS]),
        # as `datasets` stores a sequence of objects
        ({"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}, TURNS),
    ],
)
def test_conversations(values, messages):
    assert conversation_from(record(**values)).messages == messages


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            [user("q")],
        ),
        (
            {"prompt": "q", "system": "s", "chosen": "good", "rejected": "bad"},
            [system("s"), user("q")],
        ),
        (
            {"prompt": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")},
            [user("q")],
        ),
        (
            {
                "prompt": [{"role": "User", "content": [part("q")]}],
                "chosen": [{"from": "Assistant", "value": "good"}],
                "rejected": [{"from": "Assistant", "value": "bad"}],
            },
            [user("q")],
        ),
    ],
)
def test_pairs(values, prompt):
    pair = pair_from(record(**values))
    assert (pair.messages, pair.chosen, pair.rejected) == (prompt, "good", "bad")


def test_a_text_that_begins_like_a_dialogue_is_a_text():
    says = "Human: a species, or a genus?"
    assert conversation_from(record(prompt=says, response="a")).messages[0] == user(says)
    assert pair_from(record(prompt=says, chosen="good", rejected="bad")).messages == [user(says)]
    asked = pair_from(record(prompt="\n\nHuman: q", chosen="good", rejected="bad")).messages
    open_turn = record(prompt="Human: q\n\nAssistant:", chosen="good", rejected="bad")
    assert asked == pair_from(open_turn).messages == [user("q")]


def test_answers_to_other_turns_are_no_pair():
    sides = {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}
    with pytest.raises(Unusable, match="answer different prompts"):
        pair_from(record(prompt="q", **sides))


def test_a_prompt_beside_whole_dialogues_is_part_of_them():
    said = [user("p"), assistant("x"), user("q")]
    sides = {"chosen": [*said, assistant("good")], "rejected": [*said, assistant("bad")]}
    for prompt in ("p", "q", said):  # the first turn, the last, all
        assert pair_from(record(prompt=prompt, **sides)).messages == said
    spoken = {name: [system("s"), *turns] for name, turns in sides.items()}
    assert pair_from(record(prompt="q", **spoken)).messages == [system("s"), *said]
    for other in ("r", [user("r")]):
        with pytest.raises(Unusable, match="answer different prompts"):
            pair_from(record(prompt=other, **sides))


def test_an_answer_may_hold_a_dialogue():
    text = "Human: hi\n\nAssistant: yo\n\nHuman: bye\n\nAssistant: bye"
    pair = pair_from(record(prompt="write one", chosen=text, rejected=text + "!"))
    assert (pair.chosen, pair.rejected) == (text, text + "!")


def test_messages_of_other_makers():
    turns = [
        {"role": "developer", "content": "s"},
        {"role": None, "from": "human", "content": None, "value": "q"},
        assistant("a"),
    ]
    expected = [system("s"), user("q"), assistant("a")]
    assert conversation_from(record(messages=turns)).messages == expected
    assert conversation_from(record(instruction="q", response="a")).messages == expected[1:]
    one = record(prompt=user("q"), chosen="good", rejected="bad")
    assert pair_from(one).messages == [user("q")]
    with pytest.raises(Unusable, match="weight 0"):
        conversation_from(record(messages=[user("q"), {**assistant("a"), "weight": 0}]))
    uneven = {"role": ["user", "assistant"], "content": ["a"]}
    with pytest.raises(UserError, match='the columns of "messages" differ in length'):
        conversation_from(record(messages=uneven))


def test_an_input_may_be_a_number_but_no_object():
    (asked, _) = conversation_from(record(instruction="i", input=5, output="o")).messages
    assert asked == user("i\n5")
    with pytest.raises(UserError, match='"input" must be a text, got dict'):
        conversation_from(record(instruction="i", input={"a": 1}, output="o"))


def test_an_unknown_schema_names_the_key_for_other_names():
    with pytest.raises(UserError, match=r"data.reasoning.columns=\{question: YOUR_NAME, ...\}$"):
        problem_from(record(problem="q", solution="a"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [([253402300800000000], pyarrow.timestamp("us")), ([0], pyarrow.timestamp("us", "Foo/Bar"))],
)
def test_times_that_python_does_not_have(values, kind, tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["a"], "crawled": pyarrow.array(values, kind)}), path
    )
    with pytest.raises(UserError, match="a.parquet: not a readable Parquet file") as caught:
        read_rows(str(path))
    assert "\n" not in str(caught.value)


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array(["1"]), pyarrow.array(["2"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["answer", "answer"]), path)
    with pytest.raises(UserError, match="two columns are named 'answer': rename one"):
        read_rows(str(path))


def test_a_long_field_of_a_table_is_read(write):
    (row,) = read_rows(write("a.csv", "text\n" + "x" * 200_000 + "\n"))
    assert row.get("text") == "x" * 200_000


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (72, "72"),
        (-1.5, "-1.5"),
        (r"We add. The answer is \boxed{7}.", "7"),
        (r"\boxed{1} is wrong: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed 7.", "7"),
        (r"so \fbox{7}", "7"),
        ("so\n#### 8 \\boxed{9}", "8 \\boxed{9}"),
        ("#### Step 1\nadd\n#### Step 2\nadd more\n#### 7", "7"),
        ("so\n##### 7", "7"),
        ("the answer is #### 7", "7"),
        ("so\n#### 7\nThat is what we wanted.", "7"),
        ("so\n#### 1 2\n3 4", "1 2\n3 4"),
        ("so\n#### 3 1/2\nI hope that helps.", "3 1/2"),
        ("so\n#### 42\n\n---", "42"),
        ("#### Step 1: Think\n2+2.\n\n#### Step 2: Solve\nSo it is \\boxed{4}.", "4"),
        ("We have $\\boxed{4}$ eggs.\n#### Check\n2+2=4 ok.", "4"),
        ("#### Solution\nWe have 3 apples.\n\n#### Answer: 3", "3"),
        (r"$\boxed{42}$. #### is a mark", "42"),
        (r"Therefore $\boxed3$.", "3"),
        (r"Therefore $\boxed\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"$\framebox{3}$", "3"),
        (r"x \boxed{5} \boxed{", "5"),
        ("2+2=4.\n\nThe answer is: 4", "4"),
        ("Reasoning...\nAnswer: $4$", "$4$"),
        ("x <<1+1=2>>2\n#### <<5=5>>5", "5"),
        ("if a<<b and c>>d\n#### 3", "3"),
    ],
)
def test_problems(answer, result):
    problem = problem_from(record(question="How many?", answer=answer))
    assert problem.answer == result and problem.worked.endswith(f"#### {result}")
    assert verify(problem, problem.worked) == 1.0 and has_form(problem.worked, problem)


def test_marks_within_a_solution_are_no_result():
    problem = problem_from(record(question="?", answer="#### Step 1\nadd <<1+6=7>>7\nso #### 7"))
    assert problem.worked == "Step 1\nadd 7\nso\n#### 7"


def test_signs_that_are_no_calculator_stay():
    problem = problem_from(record(question="?", answer="if a<<b and c>>d\n#### 3"))
    assert problem.worked == "if a<<b and c>>d\n#### 3"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("#### Step 1\nThink of 2+2.\n\n#### Step 2\nIt is four.", "more than a result follows"),
        ("First we add them.\nThen we have four.", "no '#### RESULT' and no"),
        (r"Hence $\boxed{x=1}$ or $\boxed{x=2}$.", "several results are in boxes"),
        (r"$x=\boxed{5}$ and $y=\boxed{7}$", "several results are in boxes"),
        ("x\n#### 5\0", "nothing follows"),
    ],
)
def test_a_solution_without_one_result_is_left_out(answer, why):
    with pytest.raises(Unusable, match=why):
        problem_from(record(question="?", answer=answer))


def test_not_a_number_is_no_answer():
    with pytest.raises(Unusable, match="the answer is nan, which is no number"):
        problem_from(record(question="?", answer=float("nan")))


def test_boxed():
    assert boxed(r"\boxed{a{b}c}") == "a{b}c"
    assert boxed(r"\boxed{open") is None and boxed("none") is None


# --- what cannot be used, by its reason; the same in every schema

EMPTY = ("", "  ", None)


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_text_is_unusable_wherever_it_stands(empty):
    conversations = (
        {"instruction": empty, "output": "b"},
        {"instruction": "a", "output": empty},
        {"messages": [user("a"), {"role": "assistant", "content": empty}]},
        {"messages": [{"role": "user", "content": empty}, assistant("b")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": empty}]},
        {"prompt": "a", "response": empty},
        {"prompt": empty, "completion": "b"},
        {**ALPACA, "history": [["x", ""]]},
    )
    for values in conversations:
        with pytest.raises(Unusable, match="is empty: fill it") as caught:
            conversation_from(record(**values))
        assert caught.value.reason == "empty_text"
    for side in ("prompt", "chosen", "rejected"):
        values = {"prompt": "a", "chosen": "b", "rejected": "c", side: empty}
        with pytest.raises(Unusable, match=f'"{side}" is empty'):
            pair_from(record(**values))
    for side in ("question", "answer"):
        with pytest.raises(Unusable, match=f'"{side}" is empty'):
            problem_from(record(**{"question": "a", "answer": "b", side: empty}))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}], "tools"),
        ([user("a"), {"role": "tool", "content": "x"}, assistant("b")], "tools"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, assistant("b")], "not_text"),
        ([{"role": "narrator", "content": "a"}, assistant("b")], "unknown_role"),
        ([user("a"), user("b"), assistant("c")], "turns_out_of_order"),
        ([user("a")], "without_an_answer"),
    ],
)
def test_other_reasons(messages, reason):
    with pytest.raises(Unusable) as caught:
        conversation_from(record(messages=messages))
    assert caught.value.reason == reason and "\n" not in str(caught.value)


def test_reasons_and_unread_fields_are_counted():
    records = [
        record(**ALPACA, tools=["t"], id=5),
        record(**ALPACA, tools=[], id=6, note=""),
        record(instruction="a", output=""),
        record(messages=[user("a"), {"role": "tool", "content": "x"}, assistant("b")]),
    ]
    notes = Counter()
    built = list(usable(records, conversation_from, notes))
    assert len(built) == 2
    assert notes == {
        "unusable_empty_text": 1,
        "unusable_tools": 1,
        "not_read_tools": 1,
        "not_read_id": 2,
    }


# --- files


@pytest.fixture
def write(tmp_path):
    def write(name: str, content) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chats(n: int = 60) -> list[dict[str, str]]:
    return [{"instruction": f"q{i}", "output": "a"} for i in range(n)]


def test_a_line_says_which_fields_are_not_read(write):
    rows = [{**row, "tools": "x"} for row in chats()]
    config = make("files", chat={"path": write("a.jsonl", lines(rows))})
    assert lost_on_reading(config, "sft") == ["data.chat: fields that are not read: tools (60)"]


def test_a_folder_a_list_and_packed_files(write, tmp_path):
    rows = chats(6)
    (tmp_path / "more").mkdir()
    write("more/b.json", rows[2:3])
    write("more/a.jsonl.gz", gzip.compress(lines(rows[:2]).encode()))
    write("more/c.tsv", "instruction\toutput\nq3\ta\n")
    write("more/notes.md", "no data")
    last = [write("d.csv", 'instruction,output\n"q4",a\n'), write("e.jsonl", lines(rows[5:]))]
    found = read_rows([str(tmp_path / "more"), *last])
    assert [r.values for r in found] == rows
    assert found[0].where.endswith("a.jsonl.gz, line 1")
    assert [Path(file).name for file in files_of(str(tmp_path / "more"))] == [
        "a.jsonl.gz",
        "b.json",
        "c.tsv",
    ]
    texts = [write("x.txt", "some text"), write("y.txt.gz", gzip.compress(b"more"))]
    assert is_text(texts) and [read_text(file) for file in texts] == ["some text", "more"]
    with pytest.raises(UserError, match="give the one or the other"):
        is_text([texts[0], last[0]])


def test_a_source_takes_several_texts(write):
    paths = [write("a.txt", "one " * 100), write("b.txt", "two " * 100)]
    corpus = data.load_corpus(make("files", corpus={"path": paths}))
    assert "".join([*corpus.train, *corpus.heldout]) == "one " * 100 + "two " * 100


def test_columns_of_json_are_rows(write):
    table = {"instruction": ["q0", "q1"], "output": ["a", "a"]}
    assert [r.values for r in read_rows(write("a.json", table))] == chats(2)
    one = {"messages": TURNS}
    assert [r.values for r in read_rows(write("b.json", one))] == [one]


def test_own_names_of_fields(write):
    rows = [{"problem": f"{i} + 1?", "solution": str(i + 1), "answer": "no"} for i in range(60)]
    path = write("a.jsonl", lines(rows))
    columns = {"question": "problem", "answer": "solution"}
    config = make("files", reasoning={"path": path, "columns": columns})
    problems = data.load_reasoning(config)
    assert {p.answer for p in problems.train} <= {str(i + 1) for i in range(60)}
    with pytest.raises(UserError, match="no field 'task' for question: it has problem, solution"):
        read_rows(path, {"question": "task"})


def test_columns_and_lists_on_the_command_line():
    overrides = [
        "data=files",
        "data.reasoning.columns={question: problem}",
        "data.chat.path=[a.jsonl,'b c.jsonl']",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = OmegaConf.to_container(compose("config", overrides).data, resolve=True)
    config = build(data.DataConfig, tree, "data")
    assert config.reasoning.columns == {"question": "problem"}
    assert config.chat.path == ["a.jsonl", "b c.jsonl"]


@pytest.mark.parametrize("name", ["chat[v1].parquet", "a?.parquet", "b*.parquet", "c::d.parquet"])
def test_a_name_is_no_pattern(write, tmp_path, name):
    """`datasets` would read chatv.parquet for chat[v1].parquet."""
    for beside in ("chatv.parquet", "ax.parquet", "bx.parquet", "d.parquet"):
        parquet.write_table(pyarrow.table({"text": ["another file"]}), tmp_path / beside)
    parquet.write_table(pyarrow.table({"text": ["this one"]}), tmp_path / name)
    assert [r.values for r in read_rows(str(tmp_path / name))] == [{"text": "this one"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_how_to_read(write, encoding):
    rows = [{"text": "Zoë"}, {"text": "b"}]
    text = lines(rows).replace("\\u00eb", "ë")
    assert [r.values for r in read_rows(write("a.jsonl", text.encode(encoding)))] == rows
    assert read_text(write("a.txt", "Zoë\r\nb\rc".encode(encoding))) == "Zoë\nb\nc"


def test_marks_between_files_that_were_joined(write):
    joined = b"\xef\xbb\xbf" + lines(chats(1)).encode() + b"\xef\xbb\xbf" + lines(chats(2)).encode()
    assert len(read_rows(write("a.jsonl", joined))) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "ab\ncd".encode("utf-16-le"), "line 1: a NUL character.*iconv -f utf-16le"),
        ("a.txt", "caf\u00e9".encode("latin1"), "not UTF-8 text .byte 3.*iconv -f latin1"),
        ("a.txt", "\u00e9".encode("utf-16-le") + b"\xff\0", "not UTF-8 text.*iconv -f utf-16le"),
        ("a.txt", b"\xff\xfea", "not UTF-16 text"),
        ("a.txt", b"one\0two", "line 1: a NUL character"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "this is gzip .name it .gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:40], "not a whole gzip file"),
        ("a.jsonl.gz", b"{}", "not a whole gzip file"),
        ("a.txt", b"PK\x03\x04...", "a zip archive"),
        ("a.jsonl", b"PAR1...", "this is Parquet"),
        ("a.parquet", b"{}", "not a readable Parquet file"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1: a number of too many digits"),
        ("a.json", '[{"text": ' + "9" * 5000 + "}]", "a number of too many digits"),
        ("a.json", '[{"text": ' + "[" * 100_000, "nested too deep"),
        ("a.csv", "a,b\n1\n", "rows of different lengths"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "not a table .a quote is not closed"),
        ("a.csv", "a,b,a\n1,2,3\n", "two columns are named 'a'"),
        ("a.csv", "question;answer\n1;2\n", "separated by semicolons"),
        ("a.csv", 'a,b\n"x","1\n2"\n"y" z,3\n', "a.csv, line 4: not a table"),
        ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', "a.csv, line 3: not a table .a quote is not closed"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, row 2: rows of different lengths: give each 2 fields"),
    ],
)
def test_files_that_cannot_be_read(write, name, content, message):
    path = write(name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_text(path) if name.endswith(".txt") else read_rows(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="not a file"):
        read_rows(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_rows(str(tmp_path / "loop.jsonl"))
    with pytest.raises(UserError, match="an empty list of files"):
        files_of([])
    for name in ("x" * 5000, "a\0b", "~nobody-of-this-name/a.txt"):
        with pytest.raises(UserError, match="no such file"):
            files_of(name)


READ = {
    "corpus": (document_from, 1),
    "chat": (conversation_from, 7),
    "preference": (pair_from, 6),
    "reasoning": (problem_from, 4),
}


@pytest.mark.parametrize("source", READ)
def test_the_records_of_the_documentation(source) -> None:
    text = (CONF.parent / "docs" / "data.md").read_text("utf-8")
    (section,) = re.findall(rf"(?m)^`data\.{source}\.path`, for .*\n((?:(?!`).*\n)+)", text)
    rows = [Row(json.loads(line), "docs/data.md") for line in section.splitlines() if "{" in line]
    build, n = READ[source]
    found = [build(row) for row in rows]
    assert len(found) == n and not any(row.unread() for row in rows)
    if source == "chat":
        assert {c.messages[-1]["content"] for c in found} == {"5", "Hello."}
    if source == "preference":
        assert {(p.chosen, p.rejected) for p in found} == {("Hello.", "What?"), ("5", "6")}
    if source == "reasoning":
        assert {p.answer for p in found} == {"5"}

"""data=files: every schema and kind of file, and a clear line for every bad one."""

import json

import pytest

from fourstage import data
from fourstage.data.files import Row, read_rows, read_text
from fourstage.data.schemas import conversation_from, document_from, pair_from, problem_from
from fourstage.data.split import is_heldout
from fourstage.data.verify import has_form
from fourstage.errors import UserError
from fourstage.ladder import LADDER
from tests.verdicts import verify

DIALOGUE = "\n\nHuman: a: b?\n\nAssistant: no\n\nyes\n\nHuman: q\n\nAssistant:"


def record(**values):
    return Row(values, "f.jsonl, line 7")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path):
    """Writes a file and gives its path."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        elif name.endswith(".parquet"):
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(content), path)
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    return write


# --- schemas


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"instruction": "Add.", "input": "", "output": "2"}, [user("Add."), assistant("2")]),
        ({"instruction": "Add.", "output": "2"}, [user("Add."), assistant("2")]),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            [user("Add.\n1 1"), assistant("2")],
        ),
        ({"messages": [user("a"), assistant("b")]}, [user("a"), assistant("b")]),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    user("a"),
                    assistant("b"),
                    user("c"),
                ]
            },
            [{"role": "system", "content": "s"}, user("a"), assistant("b")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b\r\nc"},
                ]
            },
            [user("a"), assistant("b\nc")],
        ),
        ({"prompt": "a", "response": "b"}, [user("a"), assistant("b")]),
        ({"prompt": "a", "completion": " b "}, [user("a"), assistant("b")]),
        ({"prompt": "a\ud83d", "response": "\ude00b"}, [user("a\ufffd"), assistant("\ufffdb")]),
    ],
)
def test_chat_schemas(values, messages):
    assert conversation_from(record(**values)).messages == messages


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, [user("q")]),
        (
            {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
            [user("q")],
        ),
        (
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("good")],
                "rejected": [user("q"), assistant("bad")],
            },
            [user("q")],
        ),
        (
            {
                "chosen": [user("q"), assistant("good")],
                "rejected": [user("q"), assistant("bad")],
            },
            [user("q")],
        ),
        (
            {
                "chosen": f"{DIALOGUE} good",
                "rejected": f"{DIALOGUE} bad",
            },
            [user("a: b?"), assistant("no\n\nyes"), user("q")],
        ),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
            [user("q")],
        ),
        ({"instruction": "q", "input": "x", "chosen": "good", "rejected": "bad"}, [user("q\nx")]),
    ],
)
def test_preference_schemas(values, prompt):
    pair = pair_from(record(**values))
    assert (pair.messages, pair.chosen, pair.rejected) == (prompt, "good", "bad")


def test_gsm8k_schema():
    problem = problem_from(
        record(question="How many?", answer="48/2 = <<48/2=24>>24 clips.\n#### 1,024")
    )
    assert problem.worked == "48/2 = 24 clips.\n#### 1,024" and problem.answer == "1,024"
    assert has_form(problem.worked, problem) and verify(problem, problem.worked) == 1.0
    assert verify(problem, "#### 1024") == 1.0 and verify(problem, "#### 24") == 0.0
    bare = problem_from(record(question="q", answer="7"))
    tight = problem_from(record(question="q", answer="so\n####7"))
    assert (tight.worked, tight.answer) == ("so\n#### 7", "7")
    assert bare.worked == "#### 7" and verify(bare, "#### 7.0") == 1.0


BAD_RECORDS = [
    (document_from, {"txt": "a"}, 'unknown schema ("txt"): needs "text"'),
    (document_from, {"text": 5}, '"text" must be a text, got int'),
    (conversation_from, {"instruction": "a"}, "unknown schema"),
    (conversation_from, {"instruction": "a", "output": ""}, '"output" is empty'),
    (conversation_from, {"instruction": None, "output": "b"}, '"instruction" is empty'),
    (conversation_from, {"messages": "a"}, "must be a list of messages"),
    (conversation_from, {"messages": ["a"]}, "objects with role and content"),
    (conversation_from, {"messages": [{"role": "user"}]}, "lacks a role or a text"),
    (conversation_from, {"messages": []}, "no answer of the assistant"),
    (conversation_from, {"messages": [user("a")]}, "no answer of the assistant"),
    (conversation_from, {"messages": [assistant("b"), assistant("b")]}, "must take turns"),
    (pair_from, {"prompt": "a", "chosen": "b"}, "unknown schema"),
    (pair_from, {"prompt": 1, "chosen": "b", "rejected": "c"}, '"prompt" must be a text'),
    (pair_from, {"prompt": [assistant("a")], "chosen": "b", "rejected": "c"}, "end with a message"),
    (pair_from, {"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "chosen must end with"),
    (pair_from, {"chosen": "b", "rejected": "c"}, "chosen has no prompt in it"),
    (
        pair_from,
        {"chosen": [user("q"), assistant("b")], "rejected": [user("r"), assistant("c")]},
        "different prompts",
    ),
    (problem_from, {"question": "a"}, 'needs "question" and "answer"'),
    (problem_from, {"question": "a", "answer": "x #### "}, "nothing follows"),
]


@pytest.mark.parametrize(("build", "values", "message"), BAD_RECORDS)
def test_a_bad_record_names_itself(build, values, message):
    with pytest.raises(UserError) as caught:
        build(record(**values))
    assert str(caught.value).startswith("f.jsonl, line 7: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- kinds of files


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_records_of_every_kind_of_file(write, name):
    rows = [{"text": "one", "n": 1}, {"text": "two é", "n": 2}]
    assert [r.values for r in read_rows(write(name, rows))] == rows


def test_json_variants(write):
    lines = '{"text": "a"}\n\n{"text": "b"}\n'
    assert [r.where.split(", ")[1] for r in read_rows(write("a.json", lines))] == [
        "line 1",
        "line 3",
    ]
    assert read_rows(write("b.json", {"data": [{"text": "a"}]}))[0].values == {"text": "a"}
    assert read_text(write("c.txt", b"\xef\xbb\xbfa\r\nb")) == "a\nb"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2: broken JSON"),
        ("a.json", '[{"text": "a"},\n {"text": b}]', "a.json, line 2: broken JSON"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "a.jsonl, line 1: nested too deep"),
        ("a.json", "5", "expected a list of objects"),
        ("a.json", "[]", "the file has no records"),
        ("a.jsonl", '"text"\n', "a.jsonl, line 1: expected an object"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", " \n\n", "the file is empty"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8 text (byte 10)"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.doc", "text\na\n", "unknown kind of file"),
        ("a.txt", "a", "plain text has no records"),
    ],
)
def test_a_bad_file_names_itself_and_what_to_do(write, name, content, message):
    path = write(name, content)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(path) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_text, read_rows])
def test_missing_files_and_folders(tmp_path, read):
    for suffix in ("txt", "json", "jsonl", "parquet", "csv"):
        with pytest.raises(UserError, match="no such file"):
            read(str(tmp_path / f"none.{suffix}"))
    with pytest.raises(UserError, match="a folder without a .json, .jsonl, "):
        read(str(tmp_path))
    with pytest.raises(UserError, match="^'': no such file"):
        read("")


def test_a_text_that_is_no_utf8_or_empty(write):
    for content, message in ((b"caf\xe9", "not UTF-8"), (b"", "is empty"), (b"\n", "is empty")):
        with pytest.raises(UserError, match=message):
            read_text(write("a.txt", content))


# --- sources


def test_a_text_is_split_by_position(write, files):
    text = "".join(f"line {i}\n" for i in range(500))
    corpus = data.load_corpus(files(corpus={"path": write("a.txt", text)}))
    assert len(corpus.train) == len(corpus.heldout) == 1
    (train,), (heldout,) = corpus.train, corpus.heldout
    assert train + heldout == text and len(train) == int(0.9 * len(text))


def test_text_records_are_split_by_hash(write, files):
    rows = [{"text": f"document {i}"} for i in range(200)]
    corpus = data.load_corpus(files(corpus={"path": write("a.jsonl", rows)}))
    backwards = data.load_corpus(files(corpus={"path": write("b.jsonl", rows[::-1])}))
    assert 5 < len(corpus.heldout) < 50 and len(corpus.train) + len(corpus.heldout) == 200
    assert set(corpus.heldout) == set(backwards.heldout)


def test_a_separate_test_file(write, files):
    rows = [{"instruction": f"q{i}", "output": "a"} for i in range(20)]
    paths = {"path": write("a.json", rows), "heldout_path": write("b.json", rows[:5])}
    chats = data.load_chat(files(chat=paths))
    assert len(chats.heldout) == 5 and len(chats.train) == 15
    assert chats.notes["dropped_from_train_as_heldout"] == 5


def test_unusable_records_are_counted_and_left_out(write, files):
    rows = [{"instruction": f"q{i}", "output": "a" if i else ""} for i in range(60)]
    chats = data.load_chat(files(chat={"path": write("a.json", rows)}))
    assert chats.notes["unusable_empty_text"] == 1
    assert len(chats.train) + len(chats.heldout) == 59
    with pytest.raises(UserError, match='record 1: "output" is empty'):
        data.load_chat(files(chat={"path": write("b.json", rows[:1])}))


def test_an_unanswered_dialogue_or_problem_is_no_reason_to_stop(write, files):
    hh = "\n\nHuman: q{}\n\nAssistant: {}"
    rows = [{"chosen": hh.format(i, "a"), "rejected": hh.format(i, "b")} for i in range(60)]
    rows[3]["rejected"] = hh.format(3, "").strip(" ")
    config = files(preference={"path": write("hh.jsonl", rows)})
    assert data.load_preference(config).notes["unusable_without_an_answer"] == 1
    assert data.left_out(config, "reward") == {"unusable_without_an_answer": 1}

    rows = [{"question": f"q{i}", "answer": f"so\n#### {i if i else ''}"} for i in range(60)]
    paths = {"path": write("a.jsonl", rows), "heldout_path": write("b.jsonl", rows[:2])}
    problems = data.load_reasoning(files(reasoning=paths))
    assert problems.notes["unusable_no_result"] == 2
    assert (len(problems.train), len(problems.heldout)) == (58, 1)


def test_worked_problems_without_a_reasoning_source_say_what_to_do(write, files):
    config = files(corpus={"path": write("a.txt", "some text " * 90), "problems": 5})
    with pytest.raises(
        UserError, match="give data.reasoning.path=FILE .* data.chat.demonstrations=0"
    ):
        data.load_corpus(config)


def test_answers_over_the_limit_are_counted_and_left_out(write, files):
    rows = [{"instruction": f"q{i}", "output": "a" * (1 + i % 2)} for i in range(200)]
    chats = data.load_chat(files(chat={"path": write("a.json", rows), "max_answer_chars": 1}))
    assert chats.notes["unusable_too_long"] == 100
    assert {c.answer for c in chats.train} == {"a"}


def test_too_few_records_to_hold_any_out(write, files):
    asked = next(f"q {i}" for i in range(99) if not is_heldout(f"q {i}", 0.1))
    rows = [{"prompt": asked, "chosen": "a", "rejected": "b"}]
    with pytest.raises(UserError, match="nothing on the held-out side of the split, 1 on the"):
        data.load_preference(files(preference={"path": write("a.json", rows)}))
    equal = [{"prompt": f"q {i}", "chosen": "a", "rejected": "a"} for i in range(9)]
    with pytest.raises(UserError, match=r"0 on the other \(9 equal answers dropped\)"):
        data.load_preference(files(preference={"path": write("b.json", equal)}))


def test_pairs_split_by_prompt_and_drop_equal_answers(write, files):
    rows = [
        {"prompt": f"q {i // 2}", "chosen": "a", "rejected": "b" if i % 10 else "a"}
        for i in range(200)
    ]
    config = files(preference={"path": write("a.jsonl", rows)})
    pairs, prompts = data.load_preference(config), data.load_prompts(config)
    sides = [{p.id for p in side} for side in (pairs.train, pairs.heldout)]
    assert sides[1] and not sides[0] & sides[1]
    assert pairs.notes["equal_answers_dropped"] == 20
    assert [{c.id for c in side} for side in (prompts.train, prompts.heldout)] == sides
    assert len(prompts.train) == len(sides[0])


def test_heldout_problems_are_in_no_other_source(write, files):
    """A test file of problems, whose questions stand in the user's text, chats and pairs too."""
    questions = [f"How many apples are {i} apples?" for i in range(80)]
    test = [{"question": q, "answer": f"#### {i}"} for i, q in enumerate(questions[:20])]
    train = [{"question": q, "answer": f"#### {i}"} for i, q in enumerate(questions)]
    chats = [{"prompt": q.upper(), "response": "some"} for q in questions]
    chats += [{"prompt": f"Say {i}.", "response": q} for i, q in enumerate(questions)]
    pairs = [{"prompt": q, "chosen": "a", "rejected": "b"} for q in questions]
    pairs += [
        {"prompt": f"Say {i}.", "chosen": "a", "rejected": q} for i, q in enumerate(questions)
    ]
    text = "".join(
        f"Some words.\n\nQ: {q}\n\nMore words, number {i}.\n\n" for i, q in enumerate(questions)
    )
    config = files(
        corpus={"path": write("a.txt", text), "problems": 30},
        chat={"path": write("c.json", chats), "demonstrations": 30},
        preference={"path": write("p.json", pairs)},
        reasoning={"path": write("tr.json", train), "heldout_path": write("te.json", test)},
    )
    problems = data.load_reasoning(config)
    # the other sources are split by hash, and what they hold out is held out here too
    held = [i < 20 or is_heldout(q, 0.1) for i, q in enumerate(questions)]
    assert len(problems.heldout) == 20 and len(problems.train) == held.count(False) < 60
    corpus = data.load_corpus(config)
    trained_on = [
        *corpus.train,
        *(m["content"] for c in data.load_chat(config).train for m in c.messages),
        *(f"{p.messages[0]['content']}\n{p.rejected}" for p in data.load_preference(config).train),
        *(p.question for p in problems.train),
    ]
    everything = "\n".join(trained_on).lower()
    for question, is_held in zip(questions, held, strict=True):
        assert (question.lower() in everything) != is_held, question
    assert corpus.notes["paragraphs_dropped_with_a_heldout_prompt"] > 20
    assert "number 3." in next(iter(corpus.train)), "the rest of the text stays"


@pytest.mark.parametrize("stage", LADDER)
def test_a_source_without_a_path_says_which(files, stage):
    with pytest.raises(UserError, match=rf"needs? data\.{LADDER[stage].source}\.path="):
        data.digest(files(), stage)


def test_digests_are_of_the_content_not_of_the_name(write, files):
    rows = [{"text": f"document {i}"} for i in range(50)]
    first = data.digest(files(corpus={"path": write("a.json", rows)}), "pretrain")
    assert first == data.digest(files(corpus={"path": write("b.jsonl", rows)}), "pretrain")
    rows[0]["text"] += "!"
    assert first != data.digest(files(corpus={"path": write("a.json", rows)}), "pretrain")

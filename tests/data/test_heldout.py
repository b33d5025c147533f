"""What one source holds out, no source trains on: whole or inside something else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from fourstage import data
from fourstage.data.corpus import LONG, without_heldout
from fourstage.data.keys import LEAST, keys_of, openings, words
from fourstage.data.records import Conversation
from fourstage.data.split import expressions, normalise
from fourstage.errors import UserError
from tests.data.conftest import make

HELD = {  # source -> what it alone holds out
    "chat": "How many rivers flow into the lake?",
    "preference": "Which of the two hats is larger today?",
    "reasoning": "A farmer has seven goats and buys two. How many?",
}
FIELDS = {
    "chat": ("prompt", "response"),
    "preference": ("prompt", "chosen"),
    "reasoning": ("question", "answer"),
}


def record(source: str, prompt: str, answer: str = "yes") -> dict[str, str]:
    asked, answered = FIELDS[source]
    more = {"rejected": "no"} if source == "preference" else {}
    return {asked: prompt, answered: answer, **more}


@pytest.fixture
def config(tmp_path: Path):
    """A user's files for all four sources: each says each held-out prompt, in four ways."""

    def write(name: str, rows: list[dict[str, str]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    ways = ("{}", "Solve this: {}", "  {} ", 'SO I ASKED, "{}", and left.')
    said = [
        way.format(held.upper() if i % 2 else held)
        for held in HELD.values()
        for i, way in enumerate(ways)
    ]
    plain = [f"Tell me about number {i}, please." for i in range(60)]
    changes: dict[str, dict[str, object]] = {}
    for source in HELD:
        rows = [record(source, text) for text in [*said, *plain]]
        rows += [record(source, f"Say {i}.", f"Well: {text}") for i, text in enumerate(said)]
        test = write(f"{source}-test.jsonl", [record(source, HELD[source])])
        changes[source] = {"path": write(f"{source}.jsonl", rows), "heldout_path": test}
    documents = [
        {"text": f"Title {i}.\n\n{text}\n\nEnd."} for i, text in enumerate([*said, *plain])
    ]
    test = write("corpus-test.jsonl", [{"text": "something else"}])
    changes["corpus"] = {"path": write("corpus.jsonl", documents), "heldout_path": test}
    changes["chat"]["demonstrations"] = 5
    return make("files", **changes)


@pytest.mark.parametrize("source", HELD)
def test_no_source_trains_on_what_another_holds_out(config, source) -> None:
    held = HELD[source].lower()
    texts = {
        "corpus": data.load_corpus(config).train,
        "chat": [m["content"] for c in data.load_chat(config).train for m in c.messages],
        "preference": [
            text
            for p in data.load_preference(config).train
            for text in (p.messages[0]["content"], p.chosen, p.rejected)
        ],
        "prompts": [c.messages[0]["content"] for c in data.load_prompts(config).train],
        "reasoning": [p.question for p in data.load_reasoning(config).train],
    }
    for name, found in texts.items():
        assert not [text for text in found if held in text.lower()], name
        assert sum("about number" in text for text in found) >= 60, f"{name}: the rest stays"
    assert "Title 3." in "".join(texts["corpus"]), "of a document only the paragraph goes"


def test_what_was_left_out_is_counted(config) -> None:
    """12 prompts that say one, 4 of which the own split has taken, and 12 answers that do."""
    assert data.load_corpus(config).notes["paragraphs_dropped_with_a_heldout_prompt"] == 12
    assert data.load_chat(config).notes["dropped_with_a_heldout_prompt"] == 24 - 4
    assert data.load_preference(config).notes["dropped_with_a_heldout_prompt"] == 24 - 4


def test_a_short_prompt_counts_only_as_a_whole_message() -> None:
    hello, how = "Hello", "How are you doing today, friend?"
    assert len(words(hello)) < LEAST <= len(words(how))
    keys = keys_of([], [hello, how])
    assert keys.hold("hello ") and keys.hold(how)
    assert not keys.in_text("Hello") and not keys.in_text("She said hello to him.")
    assert keys.in_text("And how are you doing today, friend? I asked.")
    assert not keys.in_text("how are you doing today, friends?")
    assert keys.in_messages([{"role": "user", "content": "hello"}])
    assert not keys.in_messages([{"role": "assistant", "content": "Hello"}])


def test_typographic_twins_are_one_prompt() -> None:
    keys = keys_of([], ["What\u2019s the name of the king\u2019s eldest daughter?"])
    twin = "What's the name of the king's eldest daughter?"
    assert keys.hold(twin) and keys.in_text(f"He asked: {twin} Nobody knew.")


HIDDEN = "Please tell me exactly where the golden key is"


@pytest.mark.parametrize(
    "said",
    [
        HIDDEN.replace("exactly ", "exactly\n\n"),
        f"- {HIDDEN}?",
        f'"{HIDDEN}"',
        f"_{HIDDEN}_",
        HIDDEN.replace("golden", "**golden**"),
        HIDDEN.replace(" exactly", "\n> exactly"),
        HIDDEN.replace("golden", "gol\u200bden"),
    ],
)
@pytest.mark.parametrize("mark", ["", "- ", "\u00bf", '"', "1) "])
def test_other_spacing_and_signs_hide_nothing(said, mark) -> None:
    keys = keys_of([], [f"{mark}{HIDDEN}"])
    text = f"He wrote: {said} And so on."
    assert without_heldout(text, keys)[0] != text


def test_accents_and_dots_are_one_however_they_are_written() -> None:
    keys = keys_of([], ["Wo ist der \u00e4lteste Ort der Welt\u2026 wei\u00dft du es"])
    other = "wo ist der a\u0308lteste ort der welt... wei\u00dft du es"
    assert keys.hold(other) and keys.in_text(f"Sie fragte: \u00ab{other}\u00bb")


def test_a_short_prompt_is_held_out_as_a_whole_from_problems_too(tmp_path) -> None:
    paths = {}
    rows = {
        "chat": [{"prompt": f"Say number {i} aloud", "response": "ok"} for i in range(30)],
        "held": [{"prompt": "Capital of France?", "response": "Paris"}],
        "problems": [{"question": "Capital of France?", "answer": "#### Paris"}]
        + [{"question": f"{i} and one is?", "answer": f"#### {i + 1}"} for i in range(30)],
    }
    for name, records in rows.items():
        paths[name] = str(tmp_path / f"{name}.jsonl")
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = make(
        "files",
        chat={"path": paths["chat"], "heldout_path": paths["held"]},
        reasoning={"path": paths["problems"]},
    )
    problems = data.load_reasoning(config)
    assert "Capital of France?" not in {p.question for p in problems.train}


def test_every_question_of_a_held_out_dialogue_is_held_out() -> None:
    later = "Where on earth is the old city of Zanzibar?"
    turns = ["Good evening to you", "Hi", later, "There.", "Why?", "So."]
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(turns)
    ]
    asked = openings([Conversation(messages)])
    assert asked == ["Good evening to you", later], "a short one would forbid too much"


def test_a_bad_file_of_another_source_is_named(tmp_path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("words and words\n" * 50)
    config = make("files", corpus={"path": str(text)}, chat={"path": str(tmp_path / "no.jsonl")})
    with pytest.raises(UserError, match="no.jsonl"):
        data.load_corpus(config)


def test_a_text_without_blank_lines_loses_lines_only() -> None:
    keys = keys_of([], [HELD["chat"]])
    lines = [f"line {i} of a long text" for i in range(200)]
    lines[100] += f": {HELD['chat']} None."
    text = "\n".join(lines)
    assert len(text) > LONG
    found, dropped = without_heldout(text, keys)
    assert dropped == 1 and found.split("\n") == lines[:100] + lines[101:]
    broken = text.replace("rivers flow", "rivers\nflow")  # stated over two lines: all of it goes
    assert without_heldout(broken, keys) == ("", 1)


def test_a_prompt_of_several_paragraphs_is_found_in_a_text() -> None:
    prompt = "Read this poem by a sailor.\n\nThe sea is deep.\n\nWhat does it say of the sea?"
    keys = keys_of([], [prompt])
    around = ["Here is one.", "Goodbye to all."]
    assert without_heldout("\n\n".join([around[0], prompt, around[1]]), keys) == (
        "Here is one.\n\nGoodbye to all.",
        3,
    )
    assert without_heldout(f"So: {prompt} Yes.", keys) == ("", 3)
    other = prompt.replace("deep", "blue")
    assert without_heldout(other, keys) == (other, 0)


def test_typographic_twins_of_a_problem_stand_on_one_side(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    marks = "'\u2019"
    rows = [f"What{m}s {i} times the farmer{m}s sheep?" for i in range(200) for m in marks]
    file.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in rows))
    problems = data.load_reasoning(make("files", reasoning={"path": str(file)}))
    sides = [
        {p.question.replace("\u2019", "'") for p in side}
        for side in (problems.train, problems.heldout)
    ]
    assert sides[1] and not sides[0] & sides[1]


def runs(numbers: list[str]) -> set[str]:
    """Every run of neighbours in a sum, by the definition."""
    found = set()
    for start, end in itertools.combinations(range(len(numbers) + 1), 2):
        if end - start > 1:
            found.add(normalise(" + ".join(numbers[start:end]) + " = ?"))
    return found


def test_runs_of_a_chain_and_no_longer_ones() -> None:
    numbers = ["3", "14", "15", "9", "26", "5"]
    text = " + ".join(numbers)
    assert expressions(text) == runs(numbers)
    for longest in (2, 3, 4):
        short = {key for key in runs(numbers) if key.count("+") <= longest}
        assert expressions(text, longest) == short


def test_a_long_chain_costs_as_much_as_its_length() -> None:
    """4 kB of 1 + 1 + ... took minutes: each of its runs, of any length, was written out."""
    chain = " + ".join(str(i) for i in range(3000))
    assert len(expressions(chain, 3)) == 2999 + 2998
    keys = keys_of([data.Problem("7 + 8 + 9 = ?", "24", "chain_sum", None, {})])
    assert keys.longest == 3 and keys.in_text(chain)
    assert not keys.in_text(chain.replace("8", "0"))

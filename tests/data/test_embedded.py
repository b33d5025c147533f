"""The built-in sources, and that no held-out problem stands in any train source."""

import random
import re
import signal
from dataclasses import replace

import pytest

from fourstage import data
from fourstage.data import DataConfig, sources
from fourstage.data.chat import demonstrations
from fourstage.data.corpus import without_heldout
from fourstage.data.heldout import heldout_keys
from fourstage.data.keys import HeldOutKeys, keys_of
from fourstage.data.split import is_heldout, normalise
from fourstage.data.verify import has_form
from fourstage.errors import UserError
from fourstage.ladder import LADDER
from tests.data.conftest import make
from tests.verdicts import verify


def texts_to_train_on(config):
    """Every text of every train source, with the source's name."""
    yield from (("corpus", document) for document in data.load_corpus(config).train)
    for conversation in data.load_chat(config).train:
        yield from (("chat", message["content"]) for message in conversation.messages)
    for conversation in data.load_prompts(config).train:
        yield "preference", conversation.prompt_messages[-1]["content"]
    for problem in data.load_reasoning(config).train:
        yield "reasoning", f"{problem.question}\n{problem.worked}"


def test_no_heldout_problem_stands_in_any_train_source(embedded):
    heldout = data.load_reasoning(embedded).heldout
    sums = [p.entry["metadata"]["expression"] for p in heldout if "expression" in str(p.entry)]
    assert len(sums) > 60
    # found here with plain string search, not with the code that filters
    closed_up = {re.sub(r"\s+", "", text) for text in sums}
    starts = {p.question.lower() for p in heldout}
    seen = set()
    for source, text in texts_to_train_on(embedded):
        seen.add(source)
        low = text.lower()
        assert not any(low.startswith(q) or f"\n{q}" in low for q in starts), (source, text)
        close = re.sub(r"(?<=[\d+*-])[ \t]+(?=[\d+*-])", "", text)
        for chain in re.findall(r"\d+(?:[+*-]\d+)+", close):
            parts = re.findall(r"\d+|[+*-]", chain)
            for start in range(0, len(parts), 2):
                for end in range(start + 3, len(parts) + 1, 2):
                    assert "".join(parts[start:end]) not in closed_up, (source, text)
    assert seen == {"corpus", "chat", "preference", "reasoning"}


def test_no_train_problem_stands_on_a_heldout_side(embedded):
    train = {normalise(p.question) for p in data.load_reasoning(embedded).train}
    for problem in data.load_reasoning(embedded).heldout:
        assert normalise(problem.question) not in train
    for document in data.load_corpus(embedded).heldout:
        assert normalise(document.split("\n")[0]) not in train
    for conversation in data.load_chat(embedded).heldout:
        assert normalise(conversation.messages[0]["content"]) not in train


def test_every_source_splits_by_the_same_function(embedded):
    problems, chats = data.load_reasoning(embedded), data.load_chat(embedded)
    assert all(is_heldout(p.question, 0.2) for p in problems.heldout)
    assert not any(is_heldout(p.question, 0.2) for p in problems.train)
    openings = [{c.messages[0]["content"] for c in s} for s in (chats.train, chats.heldout)]
    assert not {normalise(o) for o in openings[0]} & {normalise(o) for o in openings[1]}


def test_worked_solutions_are_right_and_have_the_form(embedded):
    problems = data.load_reasoning(embedded)
    for problem in (*problems.train, *problems.heldout):
        assert verify(problem, problem.worked) == 1.0, problem
        assert has_form(problem.worked, problem), problem


def test_sizes_and_weights(embedded):
    problems = data.load_reasoning(embedded)
    counts = {
        task: sum(p.task == task for p in problems.train) for task in embedded.reasoning.tasks
    }
    assert counts == {"chain_sum": 229, "products": 114, "gcd": 229, "spell_backward": 229}
    assert abs(len(problems.heldout) - 150) <= 2
    assert len({p.question for p in problems.train}) == len(problems.train)
    assert problems.notes["dropped_with_a_heldout_expression"] > 0
    corpus, chats = data.load_corpus(embedded), data.load_chat(embedded)
    assert sum("\n#### " in document for document in corpus.train) == 500
    assert sum(c.kind == "problem" for c in chats.train) == 400


def of_reference(share: float) -> DataConfig:
    return make(
        "embedded",
        corpus={"problems": 0, "reference": share},
        knowledge={"statements": 0, "answers": 0},
    )


def test_the_corpus_is_the_reference_cut_by_position(embedded):
    from pydoc_data.topics import topics

    corpus = data.load_corpus(of_reference(1.0))
    whole = "".join(topics[name].strip() for name in sorted(topics))
    dropped = corpus.notes["paragraphs_dropped_with_a_heldout_prompt"]
    assert dropped == 0 and "".join([*corpus.train, *corpus.heldout]) == whole
    assert sum(map(len, corpus.train)) == int(0.9 * len(whole))


def test_a_share_of_the_reference_is_whole_topics():
    from pydoc_data.topics import topics

    texts = [topics[name].strip() for name in topics]
    sides = [data.load_corpus(of_reference(share)) for share in (0.3, 0.6, 1.0)]
    some, more, whole = ("".join([*side.train, *side.heldout]) for side in sides)
    assert 0 < len(some) < len(more) < len(whole)
    chosen = [text for text in texts if text in some]
    assert all(text in more for text in chosen) and sum(map(len, chosen)) >= len(some)
    with pytest.raises(UserError, match="data.corpus.reference: must be between 0 and 1, got 1.1"):
        of_reference(1.1)
    with pytest.raises(UserError, match="data.corpus: nothing on the "):
        data.load_corpus(of_reference(0.0))


def problem(question: str, task: str) -> data.Problem:
    return data.Problem(question, "", task, None, {})


def test_a_paragraph_with_a_heldout_problem_is_left_out():
    keys = keys_of(
        [problem("26 + 4 = ?", "chain_sum"), problem("Reverse: hello", "spell_backward")]
    )
    text = "One.\n\nAdd 4+26 here.\n\nTry reverse: HELLO too.\n\nLast 126 + 4."
    assert without_heldout(text, keys) == ("One.\n\nLast 126 + 4.", 2)
    assert without_heldout("Nothing 1 + 1.", keys) == ("Nothing 1 + 1.", 0)


def test_chats_are_text_with_answers(embedded):
    chats = data.load_chat(embedded)
    for conversation in (*chats.train, *chats.heldout):
        roles = [m["role"] for m in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(isinstance(m["content"], str) and m["content"] for m in conversation.messages)


def test_prompts_come_once_and_are_no_problems(embedded):
    prompts = data.load_prompts(embedded)
    ids = [c.id for c in (*prompts.train, *prompts.heldout)]
    assert len(ids) == len(set(ids)) and len(prompts.heldout) > 50
    assert all(c.kind == "chat" for c in prompts.train)
    assert data.load_preference(embedded) is None


def test_digests_follow_the_content_of_one_source(embedded):
    stages = list(LADDER)
    before = {stage: data.digest(embedded, stage) for stage in stages}
    assert before["reward"] == before["ppo"] != before["sft"]
    other = make(
        "embedded",
        heldout=0.2,
        corpus={"problems": 500},
        chat={"demonstrations": 399},
        reasoning={"size": 800, "heldout_size": 150, "tasks": embedded.reasoning.tasks},
    )
    changed = {stage for stage in stages if data.digest(other, stage) != before[stage]}
    assert changed == {"sft"}


def test_without_facts_there_is_nothing_to_chat_about():
    with pytest.raises(UserError, match="or facts to ask about \\(data.know"):
        data.load_chat(make("embedded", knowledge={"terms": 0, "functions": 0}))


def test_sample_prompts(embedded, files):
    prompts = data.sample_prompts(embedded)
    assert prompts[0].messages == [{"role": "user", "content": "What is an LLM?"}]
    assert len(prompts) == 8 == len({p.id for p in prompts})
    heldout = {p.question for p in data.load_reasoning(embedded).heldout}
    assert all(p.messages[0]["content"] == p.problem.question in heldout for p in prompts[5:])
    assert all(len(p.references) == 1 and p.problem is None for p in prompts[:5])
    for ours, theirs in zip(prompts, data.sample_prompts(files()), strict=False):
        assert theirs == replace(ours, references=())  # nothing says what is right


def test_sample_prompts_about_facts_know_the_sentence(monkeypatch):
    config = make("embedded")
    first, second = data.load_facts(config).train[:2]
    llm = next(fact for fact in data.load_facts(config).heldout if fact.name == "LLM")
    asked = ["What is an LLM?", first.questions()[4], second.reworded, "Bye", "Who is Ada?"]
    monkeypatch.setattr(sources, "QUESTIONS", asked)
    references = [prompt.references for prompt in data.sample_prompts(config)[:5]]
    assert references == [(llm.sentence,), (first.sentence,), (second.sentence,), ("Goodbye!",), ()]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {}}, "data.reasoning.tasks.chain_sums: .*did you mean chain_sum"),
        (
            {"chain_sum": {"min_term": 2}},
            "chain_sum.min_term: no such argument: it has min_terms, ",
        ),
        ({"chain_sum": {"min_terms": 9}}, "data.reasoning.tasks.chain_sum: .*min_terms"),
        ({"chain_sum": None}, "data.reasoning.tasks.chain_sum: expected the task's arguments"),
        ({"chain_sum": {"weight": 0}}, "weight: expected a number above 0, .*got 0"),
        ({"chain_sum": {"weight": float("nan")}}, "chain_sum.weight: expected a number .*got nan"),
        ({"gcd": {"weight": 1e308}}, "gcd.weight: expected a number .*at most 100,000, got"),
        ({"chain_sum": {"max_terms": 1e38}}, "chain_sum.max_terms: expected at most .*, got 1e.38"),
        ({"gcd": {"max_value": -(10**20)}}, "tasks.gcd.max_value: expected at most"),
        ({"products": {"max_digits": float("nan")}}, "products.max_digits: expected at most .*nan"),
        ({"chain_sum": {"max_terms": 500_000}}, "chain_sum: .*a question of .* characters"),
    ],
)
def test_bad_tasks_are_one_clear_line(tasks, message):
    with pytest.raises(UserError, match=message) as caught:
        data.load_reasoning(make("embedded", reasoning={"tasks": tasks, "size": 10}))
    assert "\n" not in str(caught.value)


def test_a_task_that_takes_for_ever_is_named(monkeypatch):
    monkeypatch.setattr("fourstage.data.problems.SLOWEST", 0.2)
    handler = signal.getsignal(signal.SIGALRM)
    tasks = {"knights_knaves": {"n_people": 50}}
    with pytest.raises(UserError, match="tasks.knights_knaves: .* no new problem .*n_people.*50"):
        data.load_reasoning(make("embedded", reasoning={"tasks": tasks, "size": 10}))
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": 0.0}, "data.heldout: must be a share between 0 and 1, got 0"),
        ({"corpus": {"problems": -1}}, "data.corpus.problems: must be at least 0, got -1"),
        ({"chat": {"max_answer_chars": 0}}, "data.chat.max_answer_chars: must be at least 1"),
        ({"reasoning": {"size": 0}}, "data.reasoning.size: must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message):
        make("embedded", **changes)


def test_keys_are_empty_without_problems(files):
    assert heldout_keys(files()) == HeldOutKeys()


def test_a_share_of_a_tasks_demonstrations_is_terse() -> None:
    problems = data.load_reasoning(make("embedded")).train
    none, some, whole = (
        [c.answer for c in demonstrations(problems, {"chain_sum": share})] for share in (0, 0.5, 1)
    )
    assert none == [p.worked for p in problems]
    chains = [i for i, p in enumerate(problems) if p.task == "chain_sum"]
    assert all(whole[i] == none[i].rsplit("\n", 1)[-1] for i in chains)
    assert 0.3 < sum(some[i] == whole[i] for i in chains) / len(chains) < 0.7
    assert all(whole[i] == none[i] for i in range(len(problems)) if i not in chains)


def test_a_range_with_few_problems_ends_early_with_all_of_them(monkeypatch):
    import reasoning_gym

    from fourstage.data.problems import _draw

    drawn = []

    class Few:
        """40 different sums, each as likely as the others."""

        def __getitem__(self, i):
            drawn.append(i)
            n = random.Random(i).randrange(40)
            return {
                "question": f"{n} + 1",
                "answer": str(n + 1),
                "metadata": {"expression": f"{n} + 1"},
            }

    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda *_, **__: Few())
    found = list(_draw("tasks", "chain_sum", {}, 100_000))
    assert len({p.question for p in found}) == len(found) == 40
    assert len(drawn) < 1000

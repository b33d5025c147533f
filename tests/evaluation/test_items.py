"""Items against direct computations: text, routers, answers, problems."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import log2

import pytest
import torch

from fourstage.evaluation import items as module
from fourstage.evaluation.items import (
    answers,
    askable,
    batches,
    chat_items,
    completion_items,
    contains,
    distinct,
    draw_seed,
    greedy_chat_items,
    is_exact,
    plain,
    policy_items,
    problem_items,
    sampled_problem_items,
)
from fourstage.evaluation.suite import metrics
from fourstage.evaluation.text import (
    changed_sets,
    corpus_blocks,
    expert_choices,
    expert_loads,
    text_items,
)
from fourstage.rl.rewards import true_score, well_formed
from fourstage.rl.rollout import answer_logprobs, pack
from fourstage.sampling.generate import Generation, generate, sampler_of
from tests.heldout import CHATS, CONFIG, HELDOUT, NOTHING, changed, chat, problem
from tests.stages.tiny import TINY, TOKENIZER, make_policy, without_logprobs
from tests.tokens import tokens_of

DENSE = replace(TINY, num_experts=1, top_k=1)


def of_set(items, name):
    return [item for item in items if item["set"] == name]


def corpus_items(policy, documents):
    blocks = corpus_blocks(tokens_of(documents), TOKENIZER, policy)
    return of_set(text_items(policy, blocks, None, TOKENIZER.unk_id), "corpus")


# --- bits per character


def test_a_uniform_model_needs_log2_v_bits_a_character():
    uniform = make_policy()
    torch.nn.init.zeros_(uniform.head.weight)
    items = corpus_items(uniform, ["x" * 150])
    assert [item["chars"] for item in items] == [64, 64, 22]  # every character once
    for item in items:
        assert item["bits"] == pytest.approx(item["chars"] * log2(103), abs=1e-3)


def test_bits_are_those_of_a_direct_computation():
    """Each block of 64 tokens, the context, on its own; <bos> costs bits, but is no character, and
    <unk> is none either, nor costs any."""
    assert TINY.max_seq_len == 64
    policy = make_policy()
    documents = ["First document. " * 9, "Odd \u2603!", "Last one, " * 95]
    ids = []
    for text in documents:
        ids += [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    items = corpus_items(policy, documents)
    assert sum(item["chars"] for item in items) == sum(map(len, documents)) - 1
    assert [item["id"] for item in items] == list(range(len(items)))
    assert len(items) == 18  # more than one forward holds
    for k, item in enumerate(items):
        block = torch.tensor(ids[64 * k : 64 * k + 65])
        with torch.no_grad():
            logp = policy.logits(policy(block[None, :-1]).hidden_BTD)[0].log_softmax(-1)
        known = block[1:] != TOKENIZER.unk_id
        nats = -logp[torch.arange(len(block) - 1), block[1:]][known].sum().item()
        assert item["bits"] == pytest.approx(nats * 1.442695, abs=1e-2)
        assert item["chars"] == (block[1:][known] != TOKENIZER.bos_id).sum() == item["bytes"]


def test_unknown_text_is_no_success():
    """A model that has learnt to say <unk> knew all of a Chinese text."""
    policy = make_policy()
    torch.nn.init.zeros_(policy.head.weight)
    items = corpus_items(policy, ["\u4f60\u597d" * 40, "ab"])
    assert sum(item["chars"] for item in items) == 2


# --- prompts that are asked


def test_prompts_that_do_not_fit_are_not_asked(capsys):
    """Truncating changes the question; training leaves them out as well."""
    long = "word " * 20
    chats = [chat("Hello?"), chat(long), chat("Bye?")]
    problems = [problem(long, "1"), problem(long + "!", "2")]
    room = len(TOKENIZER.prompt(chats[0].prompt_messages))
    found = askable(replace(HELDOUT, chats=chats, problems=problems), TOKENIZER, room)
    assert found.chats == [chats[0], chats[2]]
    assert found.problems == (
        f"no prompt fits into model.max_seq_len - evaluation.max_new_tokens = {room} tokens"
    )
    said = capsys.readouterr().out
    assert f"1 of 3 held-out chats are not asked: their prompts exceed {room} tokens" in said
    assert "2 of 2 held-out problems are not asked" in said
    assert askable(HELDOUT, TOKENIZER, 500) == HELDOUT and capsys.readouterr().out == ""


# --- routers


def test_router_items_against_one_block_at_a_time():
    """Loads and changed sets of the blocks, read alone and without padding."""
    policy, parent = make_policy(1).eval(), make_policy(2).eval()
    blocks = corpus_blocks(tokens_of(["Some text that is read. " * 9]), TOKENIZER, policy)
    items = of_set(text_items(policy, blocks, parent), "router")
    assert [item["tokens"] for item in items] == [64, 64, 64, 24]
    for block, item in zip(blocks, items, strict=True):
        ids_1T = torch.tensor([block.ids[:-1]])
        with torch.no_grad(), expert_choices(policy) as own, expert_choices(parent) as other:
            policy(ids_1T), parent(ids_1T)
        load, drift = [], []
        for a, b in zip(own, other, strict=True):
            load.append([int((a == e).sum()) for e in range(TINY.num_experts)])
            sets = zip(a.tolist(), b.tolist(), strict=True)
            drift.append(sum(set(x) != set(y) for x, y in sets))
        assert (item["load"], item["drift"]) == (load, drift)
        assert 0 < sum(drift) < TINY.n_layers * item["tokens"]
        assert sum(map(sum, load)) == TINY.n_layers * TINY.top_k * item["tokens"]


def test_loads_and_sets_by_hand():
    """Two rows of three tokens, one layer, 2 of 4 experts; the second row's last is padding."""
    chosen = torch.tensor([[0, 1], [1, 2], [2, 1], [3, 0], [0, 3], [2, 2]])
    valid_BT = torch.tensor([[True, True, True], [True, True, False]])
    assert expert_loads([chosen], valid_BT, 4).tolist() == [[[1, 3, 2, 0]], [[2, 0, 0, 2]]]
    before = torch.tensor([[1, 0], [1, 3], [1, 2], [3, 0], [0, 1], [0, 0]])
    assert changed_sets([chosen], [before], valid_BT).tolist() == [[1], [1]]


def test_no_set_differs_from_ones_own():
    policy = make_policy()
    blocks = corpus_blocks(HELDOUT.corpus, TOKENIZER, policy)
    for item in of_set(text_items(policy, blocks, policy), "router"):
        assert item["drift"] == [0] * TINY.n_layers
    for item in of_set(text_items(policy, blocks, None), "router"):
        assert item["drift"] is None


def test_the_hooks_are_gone_afterwards():
    policy = make_policy()
    with expert_choices(policy) as chosen:
        policy(torch.tensor([[5, 6]]))
    policy(torch.tensor([[5, 6]]))
    assert len(chosen) == TINY.n_layers
    with pytest.raises(ZeroDivisionError), expert_choices(policy):
        _ = 1 / 0
    assert not any(module._forward_hooks for module in policy.modules())


def test_a_dense_model_has_no_router_items():
    dense = make_policy(model=DENSE)
    assert {item["set"] for item in policy_items(dense, TOKENIZER, HELDOUT, CONFIG, dense)} == {
        "completion",
        "corpus",
        "chat",
        "chat_greedy",
        "reasoning",
        "reasoning_sampled",
    }


def test_without_a_corpus_the_routers_read_the_chats():
    heldout = replace(HELDOUT, corpus="no corpus", problems="none")
    items = policy_items(make_policy(), TOKENIZER, heldout, changed(max_prompts=3), make_policy(2))
    assert {item["set"] for item in items} == {"router", "chat", "chat_greedy", "completion"}
    routers = of_set(items, "router")
    assert [item["id"] for item in routers] == [c.id for c in CHATS[:3]]
    for c, item in zip(CHATS, routers, strict=False):
        assert item["tokens"] == len(TOKENIZER.chat(c.messages)[0]) - 1


def test_nothing_held_out_is_nothing_asked():
    assert policy_items(make_policy(), TOKENIZER, NOTHING, CONFIG, None) == []


# --- chat


def ask(sampler=None, policy=None):
    """Puts records to the policy, or to a stand-in for its sampler."""
    policy = policy or make_policy()
    return partial(answers, policy, TOKENIZER, CONFIG, sampler or sampler_of(policy))


def test_a_sampler_without_log_probs_gives_the_same_items(chats):
    policy = make_policy()
    found = chat_items(ask(without_logprobs(policy), policy), TOKENIZER, HELDOUT, CONFIG)
    for one, other in zip(found, chats, strict=True):
        assert one == {**other, "logprob": pytest.approx(other["logprob"], abs=1e-3)}


@pytest.fixture(scope="module")
def chats():
    return chat_items(ask(), TOKENIZER, HELDOUT, CONFIG)


def test_chat_items_are_what_was_said_and_how_it_is_judged(chats):
    assert {c["stopped"] for c in chats} == {True, False}  # a case worth testing
    for record, item in zip(CHATS, chats, strict=True):
        assert item["id"] == record.id
        assert item["prompt"] == record.messages[0]["content"]
        assert item["prompt_ids"] == TOKENIZER.prompt(record.prompt_messages)
        text, stopped = item["answer"], item["stopped"]
        assert TOKENIZER.decode(item["ids"]) == text
        assert stopped == (item["ids"][-1] == TOKENIZER.eot_id)
        assert stopped or len(item["ids"]) == 12
        assert item["true_score"] == pytest.approx(true_score(text, stopped, ["It is."]), abs=1e-6)
        assert item["well_formed"] == well_formed(text, stopped)
        assert item["distinct_1"] == distinct(text, 1)


def test_the_stored_log_probability_is_the_policys(chats):
    prompts, ids = [c["prompt_ids"] for c in chats], [c["ids"] for c in chats]
    zeros, stopped = [[0.0] * len(i) for i in ids], [c["stopped"] for c in chats]
    rollout = pack(prompts, Generation(ids, zeros, stopped), TOKENIZER.pad_id)
    with torch.no_grad():
        logprobs = (answer_logprobs(make_policy(), rollout) * rollout.mask).sum(1)
    assert [c["logprob"] for c in chats] == pytest.approx(logprobs.tolist(), abs=1e-3)


def test_an_answer_does_not_depend_on_what_is_asked_beside(chats, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 1)  # one prompt a batch
    turned = replace(HELDOUT, chats=CHATS[::-1])
    alone = chat_items(ask(), TOKENIZER, turned, CONFIG)[::-1]
    few = chat_items(ask(), TOKENIZER, HELDOUT, changed(max_prompts=2))
    for other in (alone, few):
        assert [c["answer"] for c in other] == [c["answer"] for c in chats][: len(other)]


def test_prompts_of_like_length_go_together(monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 100)
    lengths = [90, 20, 30, 25, 200, 20]
    assert list(batches(lengths)) == [[1, 5, 3], [2], [0], [4]]  # 3 * 25 fit, 4 * 30 do not
    assert list(batches([])) == []


def test_draws_differ_by_seed_item_and_sample():
    seeds = {draw_seed(s, "chat", item, k) for s in (0, 1) for item in "ab" for k in (0, 1)}
    assert len(seeds | {draw_seed(0, "reasoning", "a")}) == 9
    assert draw_seed(0, "chat", "a") == draw_seed(0, "chat", "a")


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "contained"),
    [
        ("It's  GREAT!", "its great.", True, True),
        ("Well, it is so.", "It is", False, True),
        ("I know.", "no", False, False),  # words, not letters
        ("yes no", "no yes", False, False),
        ("", "?!", False, False),  # a reference without words is never met
        ("anything", "", False, False),
        ("long", "long one", False, False),
    ],
)
def test_exact_and_contained(answer, reference, exact, contained):
    assert is_exact(answer, reference) is exact
    assert contains(answer, reference) is contained


def test_normalised_text():
    assert plain(" Don't_stop -- it's\n2,000\t\u00c9t\u00e9! ") == "dontstop its 2000 \u00e9t\u00e9"


def test_any_reference_of_a_prompt_counts():
    said = ask(answers_of("I am well", "so it is then", "no"))
    known = ("Fine.", "I am well."), ("It is.", "no"), ()
    records = [replace(chat(text), references=r) for text, r in zip("abc", known, strict=True)]
    heldout = replace(HELDOUT, chats=records)
    items = greedy_chat_items(said, heldout, CONFIG)
    assert [(i["exact"], i["contained"]) for i in items] == [
        (True, True),
        (False, True),
        (False, False),  # no reference is known
    ]


def test_distinct_n_by_hand():
    assert distinct("the cat the dog the cat", 1) == 0.5
    assert distinct("The cat. the dog, the cat!", 2) == 0.8  # cat-the, the-dog, dog-the: 4 of 5
    assert distinct("one", 1) == 1.0
    assert distinct("one", 2) is None
    assert distinct("?!", 1) is None


# --- problems


def answers_of(*texts, stopped=None):
    """Stands in for decoding: the listed answers, whatever the prompt (all of equal length)."""

    def fake(prompts, sampling):
        assert (sampling.temperature == 0.0) == (sampling.row_seeds is None)
        ids = [TOKENIZER.encode(text) for text in texts]
        return Generation(ids, [[0.0] * len(i) for i in ids], list(stopped or [True] * len(ids)))

    return fake


def test_a_problem_is_right_when_it_stopped_and_the_verifier_accepts():
    problems = [problem(f"{i} + 1 = ?", str(i + 1)) for i in range(4)]
    given = ("1 it is\n#### 1", "#### 3", "#### 3", "4")
    said = ask(answers_of(*given, stopped=(True, True, False, True)))
    items = problem_items(said, problems, CONFIG)
    assert [item["correct"] for item in items] == [True, False, False, False]
    assert [item["well_formed"] for item in items] == [True, True, False, False]
    assert [item["answer"] for item in items] == list(given)
    assert [item["id"] for item in items] == [p.id for p in problems]


def test_part_of_a_score_is_not_right(monkeypatch):
    said = ask(answers_of("#### 1", "#### 2"))
    monkeypatch.setattr(module, "verify_all", lambda problems, texts: [0.99, 1.0])
    problems = [problem("a", "1"), problem("b", "2")]
    items = problem_items(said, problems, CONFIG)
    assert [item["correct"] for item in items] == [False, True]


def test_the_samples_of_a_problem_are_counted():
    given = ("#### 1", "#### 2", "#### 1", "#### 2", "#### 2", "#### 9")
    said = ask(answers_of(*given, stopped=[True] * 3 + [False] * 3))
    problems = [problem("a", "1"), problem("b", "2"), problem("c", "9")]
    config = changed(samples=3, max_sampled_problems=2)
    items = sampled_problem_items(said, problems, config)
    assert [(i["id"], i["samples"], i["correct"]) for i in items] == [
        (problems[0].id, 3, 2),
        (problems[1].id, 3, 0),  # both right ones were cut off
    ]


def test_each_sample_is_drawn_anew():
    asked = []

    def note(prompts, sampling):
        asked.append((prompts, sampling.row_seeds))
        return generate(make_policy(), prompts, sampling)

    sampled_problem_items(ask(note), HELDOUT.problems, CONFIG)
    ((prompts, seeds),) = asked
    assert len(prompts) == 6 == len(set(seeds))
    assert prompts[0] == prompts[1] != prompts[2]


def test_difficulty_is_a_property_of_the_whole_held_out_set():
    """Terciles of the worked solutions' length, of the questions' where there are none."""
    lengths = {"a": 5, "b": 1, "c": 9, "d": 3, "e": 7, "f": 11}
    problems = [problem(name, "1", worked="x" * n) for name, n in lengths.items()]
    items = problem_items(ask(), problems, changed(max_problems=3))
    assert [item["difficulty"] for item in items] == ["medium", "easy", "hard"]
    unworked = [problem("y" * n, "1") for n in lengths.values()]
    items = problem_items(ask(), unworked, CONFIG)
    assert [item["difficulty"] for item in items] == [
        "medium",
        "easy",
        "hard",
        "easy",
        "medium",
        "hard",
    ]


def test_a_question_that_comes_twice_is_asked_once():
    problems = [problem("a", "1"), problem("b", "1"), problem("a", "1")]
    items = problem_items(ask(), problems, CONFIG)
    assert [item["prompt"] for item in items] == ["a", "b"]


def test_a_long_text_is_read_at_equal_distances():
    tokens, policy = tokens_of(["x" * 639]), make_policy()  # 10 blocks of 64
    every = corpus_blocks(tokens, TOKENIZER, policy)
    assert [block.id for block in every] == list(range(10))
    assert corpus_blocks(tokens, TOKENIZER, policy, 10) == every
    assert corpus_blocks(tokens, TOKENIZER, policy, 99) == every
    some = corpus_blocks(tokens, TOKENIZER, policy, 4)
    assert some == [every[0], every[2], every[5], every[7]]


def test_max_blocks_limits_what_is_read_of_the_corpus():
    corpus = tokens_of(["Some text that is read. " * 200])
    heldout = replace(HELDOUT, corpus=corpus, chats="", problems="")
    policy = make_policy()
    items = policy_items(policy, TOKENIZER, heldout, changed(max_blocks=3), None)
    wanted = [block.id for block in corpus_blocks(corpus, TOKENIZER, policy, 3)]
    assert len(wanted) == 3
    assert [item["id"] for item in of_set(items, "corpus")] == wanted
    assert [item["id"] for item in of_set(items, "router")] == wanted


# --- facts


def test_a_fact_is_answered_if_its_sentence_is_there_and_the_answer_ends():
    chats = [chat(f"What is {i}?", "A plain fact.") for i in "abc"]
    heldout = replace(
        HELDOUT,
        chats=chats,
        facts={chats[0].id: "heldout", chats[1].id: "reworded"},
    )
    said = ask(answers_of("Sure! A plain fact. Yes!", "A plain fact.", "No", stopped=(1, 0, 1)))
    items = greedy_chat_items(said, heldout, CONFIG)
    assert [item.get("fact") for item in items] == ["heldout", "reworded", None]
    found = metrics(items, {}, 0)
    assert (found["knowledge_answered"]["value"], found["knowledge_answered"]["n"]) == (1, 1)
    assert (found["knowledge_reworded"]["value"], found["knowledge_reworded"]["n"]) == (0, 1)
    assert found["chat_contained"]["n"] == 3


def test_a_fact_is_completed_if_the_sentence_follows_at_once():
    asked = []

    def sampler(prompts, sampling):
        asked.append((prompts, sampling))
        return answers_of("  a plain fact. And more", "Well, a plain fact.", "a plain factory")(
            prompts, replace(sampling, row_seeds=None)
        )

    statements = [(f"Term {i}:", "A plain fact.") for i in range(3)]
    items = completion_items(sampler, TOKENIZER, statements)
    assert [item["right"] for item in items] == [True, False, False]
    ((prompts, sampling),) = asked
    assert prompts[0] == [TOKENIZER.bos_id, *TOKENIZER.encode("Term 0:")]
    assert (sampling.temperature, sampling.max_new_tokens) == (0.0, len(" A plain fact."))
    assert metrics(items, {}, 0)["knowledge_completed"]["value"] == pytest.approx(1 / 3)

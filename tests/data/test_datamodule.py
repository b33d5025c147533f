"""Batches: resumable, equal over ranks, whole in validation, with every cut counted."""

import numpy as np
import pytest
import torch

from fourstage.batch import IGNORE
from fourstage.data import Conversation, Pair, Problem, Tokens
from fourstage.data.datamodule import (
    WINDOW,
    StepBatches,
    _loaders,
    blocks,
    fit_conversation,
    fit_pair,
    pretrain_data,
    prompt_data,
    reward_data,
    says_the_same,
    sft_data,
)
from fourstage.data.shards import TokenizedCorpus
from fourstage.errors import UserError
from fourstage.tokenizer import Tokenizer
from tests.tokens import tokens_of

TOK = Tokenizer.char()
OPTIONS = {"batch_size": 4, "n_batches": 6, "seed": 3}
LENGTHS = [5 + (7 * i) % 31 for i in range(50)]


def steps(**changes):
    settings = {"n_items": 50, "batch_size": 4, "n_batches": 60, "seed": 1, "collate": list}
    return StepBatches(**(settings | changes))


def conversation(question, answer):
    return Conversation(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )


CHATS = [conversation("q" * (1 + i % 9), "a" * (1 + i % 5)) for i in range(40)]


def rows_of(batch):
    """(ids, targets) of each row of a TokenBatch, without padding."""
    keep = batch.valid
    pairs = zip(batch.ids, batch.targets, keep, strict=True)
    return [(ids[k].tolist(), targets[k].tolist()) for ids, targets, k in pairs]


# --- StepBatches


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_each_epoch_is_another_permutation(lengths):
    one_epoch = [i for step in range(0, 50) for i in steps(lengths=lengths).items(step)]
    assert len(one_epoch) == 200
    # 200 draws of 50 items: each four times, give or take what a window has moved
    counts = torch.bincount(torch.tensor(one_epoch), minlength=50)
    assert counts.sum() == 200 and counts.min() >= 2 and counts.max() <= 6
    if lengths is None:
        assert sorted(one_epoch[:50]) == sorted(one_epoch[50:100]) == list(range(50))
        assert one_epoch[:50] != one_epoch[50:100] != list(range(50))


def test_a_window_holds_each_row_once():
    batches = steps(n_items=WINDOW * 4, lengths=list(range(WINDOW * 4)))
    assert sorted(i for step in range(WINDOW) for i in batches.items(step)) == list(
        range(WINDOW * 4)
    )


def test_lengths_are_brought_together_and_batches_shuffled():
    lengths = [i % 64 for i in range(256)]
    plain = steps(n_items=256)
    bucketed = steps(n_items=256, lengths=lengths)

    def padding(batches):
        groups = [[lengths[i] for i in batches.items(step)] for step in range(64)]
        return sum(max(g) * len(g) - sum(g) for g in groups)

    assert padding(bucketed) < 0.3 * padding(plain)
    longest = [max(lengths[i] for i in bucketed.items(step)) for step in range(WINDOW)]
    assert longest != sorted(longest)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_two_ranks_read_what_one_with_twice_the_rows_reads(lengths):
    one = steps(batch_size=8, lengths=lengths)
    ranks = [steps(batch_size=4, rank=rank, world=2, lengths=lengths) for rank in (0, 1)]
    for step in (0, 1, 5, 40):
        first, second = (rank.items(step) for rank in ranks)
        assert len(first) == len(second) == 4
        assert [*first, *second] == [*one.items(step)[::2], *one.items(step)[1::2]]


def test_the_seed_decides():
    assert steps().items(3) == steps().items(3) != steps(seed=2).items(3)


def test_items_do_not_depend_on_what_was_read_before():
    read = steps(lengths=LENGTHS)
    in_order = [read.items(step) for step in range(60)]
    assert [steps(lengths=LENGTHS).items(step) for step in range(60)] == in_order
    assert [read.items(step) for step in reversed(range(60))] == in_order[::-1]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("stop", [1, 7, 59, 60])
def test_resume_in_the_middle_equals_an_undisturbed_run(lengths, stop):
    def loader():
        return _loaders(steps(lengths=lengths), None, {}).train

    undisturbed = list(loader())
    stopped = loader()
    batches = iter(stopped)
    before = [next(batches) for _ in range(stop)]
    state = stopped.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert before + list(resumed) == undisturbed and len(undisturbed) == len(loader()) == 60


# --- pretrain


def corpus_of(train, heldout, part=None):
    return TokenizedCorpus(tokens_of(train, TOK, part), tokens_of(heldout, TOK, part))


def test_blocks_make_each_token_a_target_once():
    def rows(n_tokens, block_size, *rows):
        return blocks(Tokens([np.arange(n_tokens)], 0, 0, 0), block_size, rows).tolist()

    assert rows(8, 3, 0, 1, 2) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, IGNORE, IGNORE]]
    assert rows(7, 3, 1, 0) == [[3, 4, 5, 6], [0, 1, 2, 3]]
    assert rows(2, 4, 0) == [[0, 1, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize("part", [1, 2, 7, 19, 20, 99])
def test_tokens_are_read_across_files(part):
    tokens = Tokens([np.arange(at, min(at + part, 20)) for at in range(0, 20, part)], 0, 0, 0)
    assert len(tokens) == 20
    for start in range(22):
        for end in range(start, 23):
            assert tokens.read(start, end).tolist() == list(range(20))[start:end]


def test_validation_leaves_out_what_the_tokenizer_does_not_know():
    corpus = corpus_of(["abcdefgh" * 4], ["ab\u2603cd\u2603"])
    loaders = pretrain_data(corpus, TOK, block_size=8, **OPTIONS)
    (batch,) = loaders.val
    targets = [t for t in batch.targets.flatten().tolist() if t != IGNORE]
    assert TOK.decode(targets) == "abcd"
    assert TOK.decode(batch.ids[0, 1:6].tolist()) == "ab\ufffdcd", "the context stays"


@pytest.mark.parametrize("part", [None, 3, 11])
def test_pretrain_batches_and_whole_validation(part):
    corpus = corpus_of(["abcdefgh" * 20, "xyé"], ["held out text, é", "two"], part)
    loaders = pretrain_data(corpus, TOK, block_size=8, **OPTIONS)
    batch = next(iter(loaders.train))
    assert batch.ids.shape == batch.targets.shape == (4, 8)
    assert (batch.ids[:, 1:] == batch.targets[:, :-1]).all() and (batch.targets != IGNORE).all()

    expected = [i for t in ("held out text, é", "two") for i in (TOK.bos_id, *TOK.encode(t))]
    assert expected[0] == TOK.bos_id and expected.count(TOK.bos_id) == 2
    targets = [t for b in loaders.val for row in b.targets for t in row.tolist() if t != IGNORE]
    assert targets == [t for t in expected[1:] if t != TOK.unk_id]
    inputs = [t for b in loaders.val for row in b.ids.tolist() for t in row]
    assert inputs[: len(expected) - 1] == expected[:-1]
    assert loaders.notes == {
        "train_tokens": 164,
        "train_characters": 163,
        "train_unknown_characters": 1,
        "train_bytes": 162,
        "heldout_tokens": 20,
        "heldout_characters": 19,
        "heldout_unknown_characters": 1,
        "heldout_bytes": 18,
        "dropped_tokens": 4,
    }


def test_a_corpus_of_less_than_a_block():
    with pytest.raises(UserError, match="less than one block of 99"):
        pretrain_data(corpus_of(["short"], ["x"]), TOK, block_size=99, **OPTIONS)


# --- sft


def test_sft_targets_are_the_answer_and_its_end():
    loaders = sft_data([conversation("hi", "yo")], CHATS[:1], TOK, max_tokens=32, **OPTIONS)
    batch = next(iter(loaders.train))
    wanted = [TOK.decode([i], keep_special=True) for i in batch.targets[0].tolist() if i != IGNORE]
    assert wanted == ["y", "o", "<eot>"]
    at = (batch.targets[0] != IGNORE).nonzero().flatten().tolist()
    assert TOK.decode(batch.ids[0, at].tolist(), keep_special=True) == "<assistant>yo"


def test_sft_rows_are_padded_on_the_right_and_never_without_a_target():
    loaders = sft_data(CHATS, CHATS[:13], TOK, max_tokens=32, **OPTIONS)
    for batch in (*loaders.train, *loaders.val):
        assert (batch.targets != IGNORE).any(dim=1).all()
        assert (batch.ids[~batch.valid] == TOK.pad_id).all()
        assert (batch.ids[batch.valid] != TOK.pad_id).all()
    val_rows = sorted(row for b in loaders.val for row in rows_of(b))
    chats = (TOK.chat(c.messages) for c in CHATS[:13])
    assert val_rows == sorted(
        (ids[:-1], [i if m else IGNORE for i, m in zip(ids[1:], mask[1:], strict=True)])
        for ids, mask in chats
    )


def test_sft_cuts_drops_and_counts():
    fits, long_question, long_answer = (
        conversation("q" * 5, "a" * 5),
        conversation("q" * 50, "a" * 5),
        conversation("q" * 5, "a" * 50),
    )
    loaders = sft_data(
        [fits, long_question, long_answer, conversation("é", "ü")],
        [fits],
        TOK,
        max_tokens=20,
        **OPTIONS,
    )
    notes = loaders.notes
    assert (notes["train_truncated"], notes["train_dropped"], notes["train_rows"]) == (0, 2, 2)
    assert notes["train_unknown_characters"] == 2
    for conversation_ in (long_question, long_answer):  # truncating changes the question
        assert fit_conversation(conversation_.messages, TOK, 20)[0] is None
    with pytest.raises(UserError, match="no train record fits into max_tokens=20"):
        sft_data([long_answer], [fits], TOK, max_tokens=20, **OPTIONS)


def test_the_oldest_exchanges_go_first():
    turns = conversation("old", "reply").messages + conversation("new", "answer").messages
    system = [{"role": "system", "content": "S"}]
    (ids, mask), cut = fit_conversation([*system, *turns], TOK, 25)
    assert cut
    assert TOK.decode(ids, keep_special=True) == "<bos><user>S\n\nnew<eot><assistant>answer<eot>"
    assert fit_conversation(turns, TOK, 99)[1] is False


# --- reward


def test_pairs_share_the_prompt_and_end_their_turn():
    pairs = [Pair([{"role": "user", "content": "q"}], "good", "b")]
    batch = next(iter(reward_data(pairs, pairs, TOK, max_tokens=32, **OPTIONS).val))
    rows = [
        TOK.decode(ids[0, : int(length)].tolist(), keep_special=True)
        for ids, length in (
            (batch.chosen_ids, batch.chosen_len),
            (batch.rejected_ids, batch.rejected_len),
        )
    ]
    assert rows == ["<bos><user>q<eot><assistant>good<eot>", "<bos><user>q<eot><assistant>b<eot>"]
    assert batch.chosen_ids.shape == batch.rejected_ids.shape
    assert (batch.rejected_ids[0, int(batch.rejected_len) :] == TOK.pad_id).all()


@pytest.mark.parametrize(
    ("unfinished", "answers"),
    [(("rejected",), ["good<eot>", "b"]), (("chosen", "rejected"), ["good", "b"])],
)
def test_an_answer_that_was_cut_off_has_no_end_of_turn(unfinished, answers):
    pair = Pair([{"role": "user", "content": "q"}], "good", "b", unfinished)
    (chosen, rejected), _ = fit_pair(pair, TOK, 32)
    prompt = "<bos><user>q<eot><assistant>"
    assert [TOK.decode(ids, keep_special=True) for ids in (chosen, rejected)] == [
        prompt + answer for answer in answers
    ]


def test_long_pairs_are_cut_alike_or_dropped():
    pairs = [
        Pair([{"role": "user", "content": "0123456789"}], "good", "b"),
        Pair([{"role": "user", "content": "q"}], "good", "b" * 30),
    ]
    loaders = reward_data(pairs, pairs, TOK, max_tokens=14, **OPTIONS)
    assert (loaders.notes["train_truncated"], loaders.notes["train_dropped"]) == (1, 1)
    batch = next(iter(loaders.val))
    chosen = TOK.decode(batch.chosen_ids[0].tolist(), keep_special=True)
    rejected = TOK.decode(batch.rejected_ids[0].tolist(), keep_special=True)
    assert chosen == "<bos><user>56789<eot><assistant>good<eot>"
    assert rejected == "<bos><user>56789<eot><assistant>b<eot><pad><pad><pad>"


def test_pairs_that_say_the_same_to_the_tokenizer_are_no_pairs():
    """Their margin would stay 0 for ever."""
    quotes = Pair([{"role": "user", "content": "q"}], "It\u2019s \u201cso\u201d", 'It\'s "so"')
    real = Pair([{"role": "user", "content": "q"}], "good", "bad")
    cut_off = Pair([{"role": "user", "content": "q"}], "good", "good", ("rejected",))
    assert [says_the_same(p, TOK) for p in (quotes, real, cut_off)] == [True, False, False]
    loaders = reward_data([quotes, real, cut_off], [real], TOK, max_tokens=30, **OPTIONS)
    assert (loaders.notes["train_same_tokens"], loaders.notes["train_rows"]) == (1, 2)


# --- prompts


def test_prompts_keep_their_record_and_place():
    records = [
        Problem("1 + 1 = ?", "2", "chain_sum", "#### 2", {}),
        conversation("a question that is far too long", "x"),
        conversation("hello", "x"),
        Pair([{"role": "user", "content": "well?"}], "a", "b"),
    ]
    loaders = prompt_data(records, TOK, max_prompt_tokens=15, **OPTIONS)
    assert loaders.val is None
    assert loaders.notes == {"prompts": 3, "dropped": 1, "unknown_characters": 0}
    seen = set()
    for batch in loaders.train:
        for ids, record, index in zip(batch.prompt_ids, batch.records, batch.index, strict=True):
            assert records[index] is record
            assert ids == TOK.prompt(record.prompt_messages)
            seen.add(index)
    assert seen == {0, 2, 3}
    with pytest.raises(UserError, match="none of 4 prompts fits into max_prompt_tokens=3"):
        prompt_data(records, TOK, max_prompt_tokens=3, **OPTIONS)

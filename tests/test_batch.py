"""Batches on written-out examples."""

import torch

from fourstage.batch import IGNORE, PairBatch, PromptBatch, Rollout, TokenBatch

T = torch.tensor


def rollout() -> Rollout:
    """Row 0: prompt 10 11 12, answer 20 21 and <eot> 1. Row 1: prompt 13, answer 30, cut off."""
    return Rollout(
        ids=T([[10, 11, 12, 20, 21, 1], [13, 30, 0, 0, 0, 0]]),
        start=T([3, 1]),
        length=T([3, 1]),
        logprobs=T([[-0.1, -0.2, -0.3], [-0.4, 0.0, 0.0]]),
        stopped=T([True, False]),
    )


def test_a_rollout_knows_its_answers():
    r = rollout()
    assert r.mask.tolist() == [[True, True, True], [True, False, False]]
    assert r.valid.tolist() == [[True] * 6, [True] * 2 + [False] * 4]
    assert r.predict_at.tolist() == [[2, 3, 4], [0, 1, 2]]
    assert r.answer_ids[0].tolist() == [20, 21, 1]
    assert r.answer_ids[1, 0] == 30


def test_positions_of_padding_stay_inside_the_rows():
    """A long prompt with a short answer, beside a short prompt with a long answer."""
    r = Rollout(
        ids=T([[10, 11, 12, 20], [13, 30, 31, 1]]),
        start=T([3, 1]),
        length=T([1, 3]),
        logprobs=torch.zeros(2, 3),
        stopped=T([False, True]),
    )
    assert r.predict_at.tolist() == [[2, 2, 2], [0, 1, 2]]
    assert r.inputs.tolist() == [[10, 11, 12], [13, 30, 31]]
    assert r.is_input.tolist() == [[True, True, True], [True, True, True]]
    assert r.answer_ids[r.mask].tolist() == [20, 30, 31, 1]


def test_some_rows_of_a_rollout():
    r = rollout()
    swapped = r.rows(T([1, 0, 1]))
    assert swapped.ids[:, 0].tolist() == [13, 10, 13]
    assert swapped.start.tolist() == [1, 3, 1]
    assert swapped.stopped.tolist() == [False, True, False]
    assert swapped.logprobs[1].tolist() == r.logprobs[0].tolist()


def test_short_rows_lose_the_padding_of_longer_ones():
    part = rollout().rows(T([1]))
    assert part.ids.tolist() == [[13, 30]]
    assert part.mask.tolist() == [[True, False, False]]  # as wide as the scores of all rows
    assert part.valid.tolist() == [[True, True]]
    assert part.is_input.tolist() == [[True]]
    assert part.predict_at.tolist() == [[0, 0, 0]]
    assert part.answer_ids[part.mask].tolist() == [30]


def test_valid_ends_with_the_last_target():
    batch = TokenBatch(
        ids=T([[5, 6, 7, 8], [5, 6, 0, 0], [5, 6, 7, 0]]),
        targets=T([[6, 7, 8, 9], [IGNORE, 7, IGNORE, IGNORE], [IGNORE] * 4]),
    )
    assert batch.valid.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]


def test_rows_of_pairs_stay_together():
    batch = PairBatch(T([[1, 2], [3, 4], [5, 6]]), T([2, 1, 2]), T([[7, 8]] * 3), T([1, 2, 2]))
    part = batch.rows(slice(1, 3))
    assert part.chosen_ids.tolist() == [[3, 4], [5, 6]]
    assert part.chosen_len.tolist() == [1, 2]
    assert part.rejected_len.tolist() == [2, 2]


def test_moving_a_batch_moves_its_tensors():
    moved = PairBatch(T([[1, 2]]), T([2]), T([[7, 8]]), T([1])).to("meta")
    assert isinstance(moved, PairBatch)
    assert {t.device.type for t in vars(moved).values()} == {"meta"}
    prompts = PromptBatch([[1]], ["record"], [0])
    assert prompts.to("meta") is prompts

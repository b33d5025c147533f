"""What other models say of stored answers, against the networks themselves; wins by hand."""

from __future__ import annotations

import pytest
import torch

from fourstage.batch import PairBatch
from fourstage.evaluation.items import chat_items
from fourstage.evaluation.judges import Judges, judged, pair_items, win
from fourstage.model import ScalarModel
from fourstage.rl.rollout import answer_logprobs, final_scores, pack
from fourstage.sampling.generate import Generation
from tests.evaluation.test_items import ask
from tests.heldout import CONFIG, HELDOUT
from tests.stages.tiny import TOKENIZER, make_policy, make_scalar


@pytest.fixture(scope="module")
def chats():
    """A policy's answers, and those of another one that stands for sft."""
    return [chat_items(ask(policy=make_policy(s)), TOKENIZER, HELDOUT, CONFIG) for s in (1, 7)]


def rollout(items):
    prompts, ids = [c["prompt_ids"] for c in items], [c["ids"] for c in items]
    zeros, stopped = [[0.0] * len(i) for i in ids], [c["stopped"] for c in items]
    return pack(prompts, Generation(ids, zeros, stopped), TOKENIZER.pad_id)


def column(said, name):
    return [item[name] for item in said]


def test_scores_and_kl_are_those_of_the_networks(chats):
    reward, sft = make_scalar(), make_policy(7)
    said = judged(chats[0], TOKENIZER, Judges(reward, sft))
    assert [(i["set"], i["id"]) for i in said] == [("chat", c["id"]) for c in chats[0]]
    with torch.no_grad():
        scores = final_scores(reward, rollout(chats[0]))
        own, other = (answer_logprobs(p, rollout(chats[0])) for p in (make_policy(1), sft))
    kl = (own - other).sum(1)
    assert column(said, "reward_model_score") == pytest.approx(scores.tolist(), abs=1e-3)
    assert column(said, "kl_to_sft") == pytest.approx(kl.tolist(), abs=1e-3)
    assert abs(kl.mean()) > 1


def test_the_policy_is_at_no_distance_from_itself(chats):
    said = judged(chats[0], TOKENIZER, Judges(reference=make_policy(1)))
    assert column(said, "kl_to_sft") == pytest.approx([0.0] * 7, abs=1e-3)
    assert "reward_model_score" not in said[0] and "win" not in said[0]


def test_wins_by_both_rules(chats):
    reward = make_scalar()
    said = judged(chats[0], TOKENIZER, Judges(reward, sft_chats=chats[1]))
    true = [[item["true_score"] for item in side] for side in chats]
    learned = [final_scores(reward, rollout(side)).tolist() for side in chats]
    for name, (own, sft) in {"win": true, "win_learned": learned}.items():
        expected = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(own, sft, strict=True)]
        assert column(said, name) == expected
        assert len(set(expected)) > 1  # a case worth testing


def test_the_sft_answers_tie_with_themselves(chats):
    said = judged(chats[1], TOKENIZER, Judges(make_scalar(), sft_chats=chats[1]))
    assert column(said, "win") == column(said, "win_learned") == [0.5] * 7


def test_a_win_by_hand():
    def answer(score, *ids):
        return {"score": score, "ids": list(ids)}

    assert win(answer(2.0, 1), answer(1.0, 2), "score") == 1.0
    assert win(answer(1.0, 1), answer(2.0, 2), "score") == 0.0
    assert win(answer(1.0, 1), answer(1.0, 2), "score") == 0.5
    assert win(answer(1.0001, 1), answer(1.0, 1), "score") == 0.5  # the same answer
    assert win(answer(None, 1), answer(1.0, 2), "score") is None  # no known rule
    assert win(answer(1.0, 1), None, "score") is None  # sft was not asked this


def test_nothing_is_known_at_the_foot_of_a_ladder(chats):
    assert judged(chats[0], TOKENIZER, Judges()) == [
        {"set": "chat", "id": item["id"]} for item in chats[0]
    ]


# --- reward models


def ramp(*scores: float):
    """A reward model that reads a row's score off its last token."""
    table = torch.tensor(scores)

    class Ramp(ScalarModel):
        def forward(self, ids_BT, *, valid_BT):
            return table[ids_BT] * valid_BT - 100.0 * ~valid_BT

    return Ramp(make_policy())


def test_pairs_are_scored_at_their_last_tokens():
    """Scores 0 to 4 of the last tokens; padding would score -100."""
    batch = PairBatch(
        chosen_ids=torch.tensor([[4, 3, 0], [1, 2, 2], [0, 4, 0], [1, 0, 0]]),
        chosen_len=torch.tensor([2, 3, 2, 1]),
        rejected_ids=torch.tensor([[4, 0, 0], [4, 0, 0], [4, 4, 4], [3, 3, 2]]),
        rejected_len=torch.tensor([1, 2, 3, 3]),
    )
    items = pair_items(ramp(0.0, 1.0, 2.0, 3.0, 4.0), [batch, batch])
    assert [(i["chosen"], i["rejected"]) for i in items[:4]] == [(3, 4), (2, 0), (4, 4), (1, 2)]
    assert [item["id"] for item in items] == list(range(8))

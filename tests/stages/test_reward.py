"""The reward model: Bradley-Terry by hand, scores at the right token, and how pairs are made."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch

from fourstage.batch import PairBatch
from fourstage.sampling.generate import Generation, Sampling, sampler_of
from fourstage.stages import RewardModule
from fourstage.stages.reward import bradley_terry_loss, sample_pairs
from tests.device import REPEATED, ROUNDING, close, repeated
from tests.stages.tiny import (
    TINY,
    TOKENIZER,
    biases,
    distance,
    fit,
    make_policy,
    make_scalar,
    settings,
    steady,
    use_sgd,
    weights,
)

T = torch.tensor


def pairs(n: int, tokens: int = 12, pad: int = 0, seed: int = 0) -> PairBatch:
    """Pairs whose two answers are of different length."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(tokens)
    sides = []
    for side in (0, 1):
        length = T([4 + (3 * row + 5 * side) % (tokens - 3) for row in range(n)])
        ids = torch.randint(6, 100, (n, tokens), generator=generator)
        ids[steps >= length[:, None]] = TOKENIZER.pad_id
        sides += [torch.nn.functional.pad(ids, (0, pad)), length]
    return PairBatch(*sides)


def train(batch: PairBatch, model=TINY, **changes):
    scalar = make_scalar(model=model)
    module = RewardModule(
        scalar,
        steady("reward", **{"lr": 0.1, "max_steps": 1, "balance_router": False} | changes),
        0,
    )
    trainer = fit(module, [batch] * module.settings.max_steps)
    return weights(scalar), trainer.callback_metrics


# --- the formula


def test_bradley_terry_by_hand():
    chosen, rejected = T([1.0, 0.0, 2.0]), T([0.0, 0.0, 3.0])
    plain = [log(1 + exp(-1)), log(2), log(1 + exp(1))]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(plain)
    margin = [log(1 + exp(-0.5)), log(1 + exp(0.5)), log(1 + exp(1.5))]
    assert bradley_terry_loss(chosen, rejected, margin=0.5).tolist() == pytest.approx(margin)
    # 0.1 x the square of the sums 1, 0 and 5
    centred = [plain[0] + 0.1, plain[1], plain[2] + 2.5]
    assert bradley_terry_loss(chosen, rejected, centre_coef=0.1).tolist() == pytest.approx(centred)


def test_only_the_difference_counts_without_centring():
    a, b = T([1.0]), T([-0.5])
    assert bradley_terry_loss(a, b).item() == pytest.approx(bradley_terry_loss(a + 7, b + 7).item())


def test_the_score_is_read_at_the_last_real_token(device):
    """Whatever the padding holds, it is the last value of the row alone."""
    scalar, batch = make_scalar().to(device), pairs(6).to(device)
    for fill in (TOKENIZER.pad_id, 50):
        ids = batch.chosen_ids.clone()
        ids[torch.arange(12, device=device) >= batch.chosen_len[:, None]] = fill
        wide = torch.nn.functional.pad(ids, (0, 5), value=fill)
        for padded in (ids, wide):
            got = scalar.last(padded, batch.chosen_len)
            rows = zip(ids, batch.chosen_len.tolist(), strict=True)
            want = torch.stack([scalar(row[None, :n])[0, -1] for row, n in rows])
            close(got, want)


# --- a step


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_one_piece_of_eight_pairs_equals_eight_of_one(monkeypatch, clip_norm):
    use_sgd(monkeypatch)
    start = weights(make_scalar())
    results = [
        train(pairs(8), micro_batch_size=m, max_steps=3, margin=0.3, clip_norm=clip_norm)
        for m in (8, 1, 3)
    ]
    whole, metrics = results[0]
    assert distance(start, whole) > 1e-2
    for pieces, others in results[1:]:
        assert distance(whole, pieces) < ROUNDING
        same = {name: pytest.approx(x.item(), abs=1e-5) for name, x in metrics.items()}
        assert {name: x.item() for name, x in others.items()} == same


def test_wider_padding_changes_nothing(monkeypatch):
    use_sgd(monkeypatch)
    narrow, loss = train(pairs(6))
    wide, wide_loss = train(pairs(6, pad=9))
    assert distance(narrow, wide) < ROUNDING
    assert loss["train/loss"].item() == pytest.approx(wide_loss["train/loss"].item(), rel=ROUNDING)


def test_what_is_logged_is_what_the_scores_say():
    batch, scalar = pairs(5), make_scalar()
    with torch.no_grad():
        chosen = scalar.last(batch.chosen_ids, batch.chosen_len)
        rejected = scalar.last(batch.rejected_ids, batch.rejected_len)
    both = torch.cat([chosen, rejected])
    _, metrics = train(batch, margin=0.5, centre_coef=0.1, micro_batch_size=2)
    want = {
        "loss": bradley_terry_loss(chosen, rejected, 0.5, 0.1).mean(),
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "reward_min": both.min(),
        "reward_mean": both.mean(),
        "reward_max": both.max(),
    }
    for name, value in want.items():
        assert metrics[f"train/{name}"].item() == pytest.approx(value.item(), abs=1e-5), name
    assert 0 < want["accuracy"] < 1


def test_a_step_moves_the_two_answers_apart(monkeypatch):
    use_sgd(monkeypatch)
    batch, scalar = pairs(4), make_scalar()

    def margins() -> torch.Tensor:
        with torch.no_grad():
            chosen = scalar.last(batch.chosen_ids, batch.chosen_len)
            return chosen - scalar.last(batch.rejected_ids, batch.rejected_len)

    before = margins()
    fit(RewardModule(scalar, steady("reward", lr=1e-3, max_steps=1), 0), [batch])
    assert (margins() - before).mean() > 0


def test_the_routers_bias_is_frozen_and_dropout_off():
    start = weights(make_scalar())
    after, plain = train(pairs(6), max_steps=2)
    assert distance(start, after) > 0
    frozen = {name: w for name, w in after.items() if name.endswith("expert_bias_E")}
    assert frozen and not any(bias.any() for bias in frozen.values())
    dropped, metrics = train(pairs(6), replace(TINY, dropout=0.5), max_steps=2)
    repeated(metrics["train/loss"], plain["train/loss"])
    assert distance(after, dropped) <= REPEATED


def test_the_bias_may_move_where_the_settings_say_so():
    scalar = make_scalar()
    fit(RewardModule(scalar, steady("reward", max_steps=1, balance_router=True), 0), [pairs(6)])
    assert any(bias.any() for bias in biases(scalar).values())


# --- validation


def test_a_tie_is_not_right():
    scalar = make_scalar()
    torch.nn.init.zeros_(scalar.head.weight)  # all scores are 0
    module = RewardModule(scalar, steady("reward", max_steps=1), 0)
    one = pairs(5)
    same = PairBatch(one.chosen_ids, one.chosen_len, one.chosen_ids, one.chosen_len)
    metrics = fit(module, [pairs(4)], [same]).callback_metrics
    assert metrics["train/accuracy"] == 0
    assert metrics["val/accuracy"] == 0
    assert metrics["val/pair_nll"].item() == pytest.approx(log(2), rel=1e-5)


def test_validation_counts_every_pair_once_and_knows_no_margin():
    scalar = make_scalar()
    s = steady("reward", lr=1e-12, max_steps=2, margin=3.0, centre_coef=1.0)
    val = [pairs(5, seed=1), pairs(1, seed=2)]
    right, nll = [], []
    with torch.no_grad():
        for batch in val:
            chosen = scalar.last(batch.chosen_ids, batch.chosen_len)
            rejected = scalar.last(batch.rejected_ids, batch.rejected_len)
            right += (chosen > rejected).tolist()
            nll += bradley_terry_loss(chosen, rejected).tolist()
    trainer = fit(RewardModule(scalar, s, 0), [pairs(2)] * 2, val, val_check_interval=1)
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"].item() == pytest.approx(sum(right) / 6)
    assert metrics["val/pair_nll"].item() == pytest.approx(sum(nll) / 6, rel=1e-5)
    # val/loss is nats per token everywhere: no other column may look like it
    assert not [name for name in metrics if name.startswith("val") and name.endswith("loss")]


# --- pairs of the policy's own answers


class Answers:
    """Stands in for sampling: gives the listed answers, two a pair, call after call."""

    def __init__(self, *calls: list[str]) -> None:
        self.calls = list(calls)
        self.prompts: list[list[list[int]]] = []
        self.sampling: list[Sampling] = []

    def __call__(self, prompts, sampling):
        self.prompts.append(prompts)
        self.sampling.append(sampling)
        texts = self.calls.pop(0)
        assert len(texts) == len(prompts)
        ids = [TOKENIZER.encode(text) for text in texts]
        return Generation(ids, None, [not text.endswith("…") for text in texts])


def by_length(index: int, text: str, stopped: bool) -> float:
    return float(len(text))


def make_pairs(answers: Answers, n_prompts: int, judge=by_length, **changes):
    s = settings("reward", **{"pairs_per_prompt": 1, **changes})
    prompts = [[10 + i] for i in range(n_prompts)]
    return sample_pairs(answers, TOKENIZER, prompts, judge, s, seed=3)


def test_the_better_answer_is_the_chosen_one():
    answers = Answers(["longest", "short", "a", "bcd"])
    rows, skipped = make_pairs(answers, 2, max_new_tokens=7, temperature=0.5)
    assert rows == [
        {"prompt": 0, "chosen": "longest", "rejected": "short"},
        {"prompt": 1, "chosen": "bcd", "rejected": "a"},
    ]
    assert skipped == 0
    assert answers.prompts == [[[10], [10], [11], [11]]]
    stop = TOKENIZER.eot_id
    want = Sampling(max_new_tokens=7, stop_id=stop, temperature=0.5, seed=6)
    assert answers.sampling == [want]


def test_ties_are_sampled_once_more_and_then_skipped_and_counted():
    answers = Answers(["a", "b", "cc", "d", "e", "f"], ["g", "hh", "i", "j"])
    rows, skipped = make_pairs(answers, 3)
    assert rows == [
        {"prompt": 1, "chosen": "cc", "rejected": "d"},
        {"prompt": 0, "chosen": "hh", "rejected": "g"},
    ]
    assert skipped == 1
    assert answers.prompts[1] == [[10], [10], [12], [12]]  # only the tied ones
    assert [sampling.seed for sampling in answers.sampling] == [6, 7]  # another draw


def test_an_answer_that_was_cut_off_is_marked():
    rows, _ = make_pairs(Answers(["longest…", "short", "a…", "bcd…"]), 2)
    assert [row.get("unfinished") for row in rows] == [["chosen"], ["chosen", "rejected"]]


def test_a_prompt_may_give_several_pairs():
    answers = Answers(["a", "bb", "ccc", "d", "ee", "f", "g", "hh"])
    rows, _ = make_pairs(answers, 2, pairs_per_prompt=2)
    assert [row["prompt"] for row in rows] == [0, 0, 1, 1]
    assert len(answers.calls) == 0  # nothing tied: no second round


def test_the_judge_hears_which_prompt_was_answered():
    """The second prompt's judge likes short answers; one of its pairs ties and is sampled again."""
    answers = Answers(["a", "bb", "cc", "d", "e", "f"], ["gg", "h"])
    rows, skipped = make_pairs(
        answers, 3, judge=lambda index, text, stopped: (1 - 2 * (index == 1)) * len(text)
    )
    assert [(row["prompt"], row["chosen"]) for row in rows] == [(0, "bb"), (1, "d"), (2, "gg")]
    assert skipped == 0


def test_the_judge_hears_whether_an_answer_stopped():
    answers = Answers(["same", "same…"])
    rows, _ = make_pairs(answers, 1, judge=lambda index, text, stopped: float(stopped))
    assert rows == [
        {"prompt": 0, "chosen": "same", "rejected": "same.", "unfinished": ["rejected"]}
    ]


def test_real_pairs_are_seeded_and_in_the_judges_order(device):
    sampler = sampler_of(make_policy().to(device))
    s = settings("reward", pairs_per_prompt=3, max_new_tokens=10, temperature=1.0)
    prompts = [TOKENIZER.prompt([{"role": "user", "content": text}]) for text in ("a", "Hello")]

    def judge(index: int, text: str, stopped: bool) -> float:
        return len(text) + 0.5 * stopped

    rows, skipped = sample_pairs(sampler, TOKENIZER, prompts, judge, s, seed=1)
    assert (rows, skipped) == sample_pairs(sampler, TOKENIZER, prompts, judge, s, seed=1)
    assert rows != sample_pairs(sampler, TOKENIZER, prompts, judge, s, seed=2)[0]
    assert len(rows) + skipped == 6 and len(rows) > 2
    assert all(len(row["chosen"]) >= len(row["rejected"]) for row in rows)

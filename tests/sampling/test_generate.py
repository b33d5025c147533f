from dataclasses import replace

import pytest
import torch

from fourstage.errors import UserError
from fourstage.model import Transformer
from fourstage.sampling import generate as module
from fourstage.sampling.decode import Decoder
from fourstage.sampling.generate import Sampling, generate, stream
from tests.model.configs import read_config

VOCAB, STOP = 30, 1
NANO = read_config("moe_nano", n_heads=4, n_kv_heads=2, head_dim=16)
LIMITS = {"max_new_tokens": 20, "stop_id": STOP}
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model(device) -> Transformer:
    """Random but opinionated: with large weights the next token depends strongly on the prompt."""
    torch.manual_seed(0)
    return Transformer(replace(NANO, init_std=0.2), VOCAB).to(device)


def answer(model, prompts=PROMPTS, **changes):
    return generate(model, prompts, Sampling(**{**LIMITS, **changes}))


def without_cache(model, prompt, row_seed, *, n=20, temperature=1.0, top_k=0, top_p=1.0):
    """One prompt, one whole forward a token, no batch, no cache."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = Sampling(max_new_tokens=n, stop_id=STOP, **options)
    device = model.embedding.weight.device
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(row_seed)).to(device)
    ids = list(prompt)
    with torch.no_grad():
        for u in uniform:
            hidden = model(torch.tensor([ids], device=device)).hidden_BTD[:, -1]
            log_probs = sampling.log_probs(model.logits(hidden))
            ids.append(sampling.draw(log_probs, u[None]).item())
            if ids[-1] == STOP:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.9},
    ],
)
def test_a_left_padded_batch_with_a_cache_equals_one_forward_a_token(model, sampling):
    seeds = [3, 1, 4, 1, 5]
    got = answer(model, row_seeds=seeds, **sampling)
    want = [without_cache(model, p, s, **sampling) for p, s in zip(PROMPTS, seeds, strict=True)]
    assert got.answer_ids == want
    assert len({tuple(a) for a in want}) > 2  # the model says different things


def test_log_probs_are_those_of_a_training_forward(model, device):
    """The rows as training packs them: right-padded, no mask, no cache, in train mode."""
    got = answer(model, temperature=0.8)
    rows = [p + a for p, a in zip(PROMPTS, got.answer_ids, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    log_probs = (model.logits(model.train()(ids).hidden_BTD) / 0.8).log_softmax(-1).cpu()
    for b, (prompt, tokens) in enumerate(zip(PROMPTS, got.answer_ids, strict=True)):
        at = torch.arange(len(tokens)) + len(prompt) - 1
        want = log_probs[b, at, torch.tensor(tokens)]
        torch.testing.assert_close(torch.tensor(got.logprobs[b]), want, rtol=1e-4, atol=1e-4)


def test_the_seed_decides(model):
    assert answer(model, seed=7) == answer(model, seed=7)
    assert answer(model, seed=7).answer_ids != answer(model, seed=8).answer_ids
    assert answer(model, seed=2**63 - 2) != answer(model, seed=-1)
    twice = answer(model, seed=7).answer_ids
    assert twice[0] != twice[4]  # the same prompt, another row, another draw


def test_a_row_does_not_depend_on_the_others_nor_on_who_has_left(model, monkeypatch):
    prompts, seeds = PROMPTS * 6, list(range(30))
    kept_together = []
    for share in (0.0, 0.75, 1.0):
        monkeypatch.setattr(module, "COMPACT_BELOW", share)
        kept_together.append(answer(model, prompts, row_seeds=seeds, max_new_tokens=60))
    lengths = {len(a) for a in kept_together[0].answer_ids}
    assert len(lengths) > 5  # rows did leave at different times
    for other in kept_together[1:]:
        assert other.answer_ids == kept_together[0].answer_ids
        assert other.stopped == kept_together[0].stopped
    alone = answer(model, prompts[7:8], row_seeds=seeds[7:8], max_new_tokens=60)
    assert alone.answer_ids[0] == kept_together[0].answer_ids[7]


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many rows each step computed."""
    rows = []

    class Counted(Decoder):
        def __call__(self, ids_B):
            rows.append(len(ids_B))
            return super().__call__(ids_B)

    monkeypatch.setattr(module, "Decoder", Counted)
    return rows


def test_finished_rows_leave_the_batch(model, computed):
    prompts = [[i, *prompt] for i, prompt in enumerate(PROMPTS * 6)]
    lengths = [len(a) for a in answer(model, prompts, max_new_tokens=60).answer_ids]
    assert len(computed) == max(lengths)
    for step, rows in enumerate(computed):
        unfinished = sum(length > step for length in lengths)
        assert unfinished <= rows <= unfinished / 0.75


@pytest.mark.parametrize("temperature", [0.15, 0.6, 1.5])
def test_answers_to_one_prompt_are_computed_once_until_they_part(model, computed, temperature):
    """At the lower temperatures answers part late and one after the other."""
    prompts, seeds = PROMPTS[:3] * 16, list(range(48))
    settings = {"max_new_tokens": 25, "temperature": temperature}
    got = answer(model, prompts, row_seeds=seeds, **settings)
    computed_before = computed.copy()
    for prompt, seed, ids, logprobs in zip(
        prompts, seeds, got.answer_ids, got.logprobs, strict=True
    ):
        alone = answer(model, [prompt], row_seeds=[seed], **settings)
        assert alone.answer_ids == [ids]
        assert alone.logprobs[0] == pytest.approx(logprobs, abs=1e-4)
    is_shared = True
    for step, n_rows in enumerate(computed_before):
        unfinished = [
            (p[0], *ids[:step])
            for p, ids in zip(prompts, got.answer_ids, strict=True)
            if len(ids) > step
        ]
        beginnings = len(set(unfinished))
        is_shared &= beginnings <= len(unfinished) / 2
        assert beginnings <= n_rows <= (beginnings if is_shared else len(unfinished)) / 0.75
    assert computed_before[0] == 3 and max(computed_before) == 48


def test_greedy_answers_to_one_prompt_stay_one_row(model, computed):
    got = answer(model, PROMPTS[:1] * 9, temperature=0)
    assert set(computed) == {1}
    assert got.answer_ids == answer(model, PROMPTS[:1], temperature=0).answer_ids * 9


def test_many_prompts_are_answered_in_parts_that_change_nothing(model, monkeypatch):
    whole = answer(model, PROMPTS * 4)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    parts = answer(model, PROMPTS * 4)
    assert (parts.answer_ids, parts.stopped) == (whole.answer_ids, whole.stopped)
    assert sum(parts.logprobs, []) == pytest.approx(sum(whole.logprobs, []), abs=1e-4)


def test_a_longer_limit_only_continues_the_answer(model):
    short, long = answer(model, max_new_tokens=4), answer(model, max_new_tokens=30)
    assert [a[:4] for a in long.answer_ids] == short.answer_ids


def test_an_answer_ends_with_its_stop_token_or_at_the_limit(model):
    got = answer(model, PROMPTS * 10, max_new_tokens=25)
    assert 0 < sum(got.stopped) < len(got.stopped)
    for tokens, logprobs, stopped in zip(got.answer_ids, got.logprobs, got.stopped, strict=True):
        assert tokens.count(STOP) == stopped
        assert tokens[-1] == STOP if stopped else len(tokens) == 25
        assert len(logprobs) == len(tokens)


def test_sampled_frequencies_are_the_probabilities(model, device):
    """4000 first tokens for one prompt: the chi-squared statistic is in its usual range."""
    n = 4000
    got = answer(model, [[5, 6, 7]] * n, max_new_tokens=1)
    with torch.no_grad():
        hidden = model(torch.tensor([[5, 6, 7]], device=device)).hidden_BTD[0, -1]
    want = model.logits(hidden).softmax(-1).cpu() * n
    seen = torch.bincount(torch.tensor(got.answer_ids).flatten(), minlength=VOCAB)
    common = want > 5
    chi2 = ((seen - want) ** 2 / want)[common].sum().item()
    freedom = common.sum().item()
    assert freedom > 5
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_the_filters_by_hand(device):
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]], device=device).log()

    def probs(**settings) -> list[float]:
        return Sampling(**LIMITS, **settings).log_probs(logits).exp()[0].tolist()

    assert probs() == pytest.approx([0.1, 0.5, 0.15, 0.25])
    assert probs(temperature=0.5) == pytest.approx(
        [x / 0.345 for x in (0.01, 0.25, 0.0225, 0.0625)]
    )
    assert probs(top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert probs(top_k=10) == pytest.approx([0.1, 0.5, 0.15, 0.25])
    assert probs(top_p=0.4) == pytest.approx([0, 1, 0, 0])
    assert probs(top_p=0.6) == pytest.approx([0, 2 / 3, 0, 1 / 3])  # the token that reaches p stays
    # top_p after top_k: of (2/3, 1/3) the first alone reaches 0.6
    assert probs(top_k=2, top_p=0.6) == pytest.approx([0, 1, 0, 0])
    assert probs(forbid=(1,)) == pytest.approx([0.2, 0, 0.3, 0.5])
    assert probs(temperature=0.0) == pytest.approx([0.1, 0.5, 0.15, 0.25])


def test_top_k_keeps_exactly_k_of_equals(device):
    kept = Sampling(**LIMITS, top_k=2).log_probs(torch.zeros(1, 5, device=device)).exp()
    assert (kept > 0).sum() == 2


def test_the_draw_is_the_inverse_of_the_cumulated_probability(device):
    log_probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log().expand(6, -1)
    uniform = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-24])
    drawn = Sampling(**LIMITS).draw(log_probs.to(device), uniform.to(device))
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]


def test_forbidden_tokens_never_come(model):
    ever = {t for a in answer(model, PROMPTS * 10).answer_ids for t in a}
    allowed = {t for a in answer(model, PROMPTS * 10, forbid=(STOP, 3)).answer_ids for t in a}
    assert {STOP, 3} <= ever
    assert not {STOP, 3} & allowed


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_no_load_counted(device, monkeypatch, training):
    model = Transformer(replace(NANO, dropout=0.3), VOCAB).to(device).train(training)
    first = answer(model, temperature=0.0)
    assert first == answer(model, temperature=0.0)  # no dropout while it answers
    assert model.training is training and model.blocks[0].training is training
    assert model.load_LE is None
    monkeypatch.setattr(Decoder, "prefill", lambda *_: 1 / 0)  # a forward that fails
    with pytest.raises(ZeroDivisionError):
        answer(model)
    assert model.training is training


def test_stream_says_what_generate_says(model):
    tokens = stream(model, PROMPTS[0], Sampling(**LIMITS, seed=3))
    assert list(tokens) == answer(model, PROMPTS[:1], seed=3).answer_ids[0]
    half_read = stream(model.train(), PROMPTS[0], Sampling(**LIMITS))
    next(half_read)
    half_read.close()
    assert model.training


def test_prompts_that_leave_no_room_are_refused_in_one_line(model):
    room = NANO.max_seq_len - 20
    answer(model, [[5] * room], max_new_tokens=20, temperature=0.0)
    with pytest.raises(UserError) as error:
        answer(model, [[5] * (room + 1)])
    assert str(error.value) == (
        f"a prompt of {room + 1} tokens and 20 new ones exceed the model's max_seq_len of 512: "
        "shorten the prompt or lower max_new_tokens"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be 0 (greedy) or at least 0.01, got -1.0"),
        ({"temperature": 1e-40}, "temperature: must be 0 (greedy) or at least 0.01, got 1e-40"),
        ({"top_k": -1}, "top_k: must be 0 (all tokens) or more, got -1"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1, got 0.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(model, setting, message):
    with pytest.raises(UserError) as error:
        answer(model, **setting)
    assert str(error.value) == message


def test_no_prompts_and_no_tokens_give_no_answers(model):
    assert answer(model, []).answer_ids == []
    nothing = answer(model, max_new_tokens=0)
    assert nothing.answer_ids == [[]] * 5 and nothing.stopped == [False] * 5


def test_it_runs_under_autocast(model, device):
    with torch.autocast(device.type, torch.bfloat16):
        got = answer(model)
    assert all(len(a) for a in got.answer_ids)

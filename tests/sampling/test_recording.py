"""Steps that are recorded once and replayed, by what stands in for a graph (stand_in_graph.py)."""

from __future__ import annotations

import copy
from itertools import pairwise
from statistics import mean

import pytest
import torch

from fourstage.model import Transformer
from fourstage.sampling.decode import Decoder
from fourstage.sampling.generate import Sampling, generate, stream
from fourstage.sampling.kernel_steps import KernelSteps
from fourstage.sampling.recording import LEAST_REPLAYS, RECORD_AFTER, ROWS, RecordedSteps
from tests.model.configs import read_config
from tests.stand_in_graph import StandIn, gaps, record_with

STOP = 3
PROMPTS = [[5, 6, 7], [8, 9], [10] * 9]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    record_with(monkeypatch)
    monkeypatch.setattr(KernelSteps, "supports", lambda model: False)


def make(name: str = "moe_nano", **changes) -> Transformer:
    torch.manual_seed(2)
    return Transformer(read_config(name, init_std=0.2, **changes), 50).eval()


def answers(policy: Transformer, prompts: list[list[int]], records: bool, **changes):
    policy.records_steps = records
    options = {"max_new_tokens": 48, "stop_id": STOP, "seed": 4, **changes}
    return generate(policy, prompts, Sampling(**options))


def assert_same(policy: Transformer, prompts: list[list[int]], atol: float = 1e-4, **changes):
    want, found = (answers(policy, prompts, records, **changes) for records in (False, True))
    assert found.answer_ids == want.answer_ids
    assert sum(found.logprobs, []) == pytest.approx(sum(want.logprobs, []), abs=atol)


def assert_alike(policy: Transformer, prompts: list[list[int]]):
    want, found = (answers(policy, prompts, records) for records in (False, True))
    apart = gaps(found, want)
    assert len(apart) > 100 and mean(apart) < 0.02


@torch.no_grad()
def learn(policy: Transformer, seed: int) -> None:
    """Every weight and router bias is another, at its old place, as after an optimizer's step."""
    torch.manual_seed(seed)
    for x in (*policy.parameters(), *policy.buffers()):
        x.add_(torch.randn_like(x) * 0.05)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("moe_nano", {}),
        ("moe_nano", {"d_shared": 16, "qk_norm": False, "tie_embeddings": True}),
        ("moe_nano", {"n_layers": 1, "top_k": 1}),
        ("dense_tiny", {"n_layers": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_half", [False, True])
def test_a_later_rollout_replays_what_an_earlier_one_recorded(name, changes, is_half):
    """With the weights of then, other prompts, padded or not, rows that part and rows that end."""
    policy = make(name, **changes)
    counts = []
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        for rollout, prompts in enumerate((PROMPTS * 5, [[7, 8, 9]] * 15, PROMPTS[::-1] * 4)):
            learn(policy, rollout)
            (assert_alike if is_half else assert_same)(policy, prompts)
            counts.append(len(StandIn.recorded))
    assert len(set(StandIn.recorded)) == len(StandIn.recorded) == counts[-1]
    assert counts[0] > 0 and len(StandIn.replays) > 60


def test_the_second_of_two_like_rollouts_records_nothing():
    policy = make()
    first = answers(policy, PROMPTS * 5, records=True)
    n = len(StandIn.recorded)
    assert answers(policy, PROMPTS * 5, records=True).answer_ids == first.answer_ids
    assert len(StandIn.recorded) == n > 0


def test_rows_of_a_graph_are_at_most_half_more_than_there_are():
    assert ROWS[:8] == [1, 2, 3, 4, 6, 8, 12, 16] and ROWS[-1] >= 512
    assert all(more / (less + 1) < 1.5 for less, more in pairwise(ROWS))


def test_a_step_is_recorded_once_the_rows_are_steady_and_where_it_pays():
    policy = make()
    answers(policy, PROMPTS, records=True, stop_id=-1, max_new_tokens=40)
    assert StandIn.recorded == [3]
    assert StandIn.replays[0] == (3, 8 + RECORD_AFTER)
    StandIn.recorded.clear()
    answers(make(), PROMPTS, records=True, stop_id=-1, max_new_tokens=LEAST_REPLAYS)
    assert StandIn.recorded == []


def test_memory_does_not_move():
    policy = make()
    answers(policy, PROMPTS * 5, records=True)
    kept = policy.recorded_steps
    where = [x.data_ptr() for cache in kept.caches for x in (cache.k, cache.v)]
    answers(policy, PROMPTS * 4, records=True)
    assert policy.recorded_steps is kept
    assert [x.data_ptr() for cache in kept.caches for x in (cache.k, cache.v)] == where


def test_more_rows_or_longer_ones_are_recorded_anew():
    policy = make()
    answers(policy, PROMPTS, records=True)
    kept = policy.recorded_steps
    for prompts, tokens in ((PROMPTS * 2, 48), (PROMPTS * 2, 90)):
        assert_same(policy, prompts, max_new_tokens=tokens)
        assert policy.recorded_steps is not kept
        kept = policy.recorded_steps
    assert_same(policy, PROMPTS)
    assert policy.recorded_steps is kept


def test_a_network_whose_weights_have_moved_is_recorded_anew():
    policy = make()
    answers(policy, PROMPTS, records=True)
    policy.double().float()
    assert policy.recorded_steps is None
    answers(policy, PROMPTS, records=True)
    policy.blocks[0].attention.qkv.weight.data = policy.blocks[0].attention.qkv.weight * 1.5
    assert_same(policy, PROMPTS)


def test_what_is_no_number_stays_in_its_own_rollout():
    policy = make()
    good = [x.clone() for x in policy.parameters()]
    want = answers(policy, PROMPTS * 2, records=True)
    for value in (torch.nan, None):
        with torch.no_grad():
            for x, kept in zip(policy.parameters(), good, strict=True):
                x.copy_(kept if value is None else torch.full_like(kept, value))
        found = answers(policy, PROMPTS * 2, records=True)
    assert found.answer_ids == want.answer_ids


def test_a_decoder_never_gets_the_rows_of_one_that_is_not_done():
    policy = make()
    sampling = Sampling(max_new_tokens=40, stop_id=-1, seed=3)
    want = list(stream(policy, PROMPTS[0], sampling))
    policy.records_steps = True
    first = stream(policy, PROMPTS[0], sampling)
    found = [next(first) for _ in range(10)]
    assert_same(policy, PROMPTS * 2)
    assert found + list(first) == want
    assert isinstance(Decoder(policy, 12, rows=2).steps, RecordedSteps)


def test_a_copy_of_the_network_records_for_itself():
    policy = make()
    answers(policy, PROMPTS, records=True)
    twin = copy.deepcopy(policy)
    assert twin.recorded_steps is None
    learn(twin, 5)
    assert_same(twin, PROMPTS)
    assert_same(policy, PROMPTS)

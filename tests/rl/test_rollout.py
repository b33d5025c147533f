"""Rollouts: ragged answers into rows, and the same numbers from the sampler and from training."""

from dataclasses import replace

import pytest
import torch

from fourstage.batch import Rollout
from fourstage.errors import UserError
from fourstage.rl import rollout as module
from fourstage.rl.rollout import (
    answer_logprobs,
    answer_texts,
    answer_values,
    final_scores,
    fitted_prompt,
    pack,
)
from fourstage.sampling.generate import Generation, Sampling, generate
from tests.device import close
from tests.stages.tiny import TINY, TOKENIZER, make_policy, make_scalar

PROMPTS = [TOKENIZER.prompt([{"role": "user", "content": text}]) for text in ("a", "Hi you", "so")]


def sample(policy, prompts, *, max_new_tokens=12, **options) -> Rollout:
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_id=TOKENIZER.eot_id, **options)
    return pack(prompts, generate(policy, prompts, sampling), TOKENIZER.pad_id)


@pytest.fixture(scope="module")
def policy(device):
    return make_policy().to(device)


@pytest.fixture(scope="module")
def rollout(policy) -> Rollout:
    """Twelve answers of different length, some of them cut off."""
    got = sample(policy, PROMPTS * 4, seed=3)
    assert len(set(got.length.tolist())) > 2
    assert 0 < got.stopped.sum() < 12
    return got


def wider(r: Rollout, tokens: int, fill: int) -> Rollout:
    """The same answers with more padding at the right, of any token."""
    extra = torch.full((len(r.ids), tokens), fill)
    return replace(
        r,
        ids=torch.cat([r.ids, extra], 1),
        logprobs=torch.nn.functional.pad(r.logprobs, (0, tokens)),
    )


def test_pack_by_hand():
    r = pack(
        prompts=[[10, 11, 12], [13]],
        generation=Generation(
            answer_ids=[[20, 1], [30, 31, 32]],
            logprobs=[[-0.5, -0.25], [-1.0, -2.0, -3.0]],
            stopped=[True, False],
        ),
        pad_id=0,
    )
    assert r.ids.tolist() == [[10, 11, 12, 20, 1], [13, 30, 31, 32, 0]]
    assert r.start.tolist() == [3, 1]
    assert r.length.tolist() == [2, 3]
    assert r.logprobs.tolist() == [[-0.5, -0.25, 0.0], [-1.0, -2.0, -3.0]]
    assert r.stopped.tolist() == [True, False]


def test_a_sample_holds_its_prompts_and_ends_with_its_end_token(rollout):
    eot = TOKENIZER.eot_id
    for row, prompt in enumerate(PROMPTS * 4):
        start, length = int(rollout.start[row]), int(rollout.length[row])
        assert rollout.ids[row, :start].tolist() == prompt
        answer = rollout.ids[row, start : start + length].tolist()
        assert answer.count(eot) == int(rollout.stopped[row])
        assert answer[-1] == eot if rollout.stopped[row] else length == 12
        assert (rollout.ids[row, start + length :] == TOKENIZER.pad_id).all()
        assert (rollout.logprobs[row, :length] < 0).all()
        assert (rollout.logprobs[row, length:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_trainer_agree(policy, temperature):
    """A cached, left-padded forward a token against one right-padded forward in train mode."""
    got = sample(policy, PROMPTS * 4, temperature=temperature, seed=5)
    logprobs = answer_logprobs(policy.train(), got, temperature).cpu()
    gap = (logprobs - got.logprobs).abs()[got.mask]
    assert gap.max() < 1e-4
    other = answer_logprobs(policy, got, 1.3).cpu()  # the temperature matters
    assert (other - got.logprobs).abs()[got.mask].max() > 0.1


def test_scores_are_those_of_one_row_alone_without_padding(policy, rollout, device):
    logprobs = answer_logprobs(policy, rollout)
    for row in range(4):
        start, length = int(rollout.start[row]), int(rollout.length[row])
        ids = rollout.ids[row, : start + length].to(device)
        logp = policy.logits(policy(ids[None]).hidden_BTD)[0].log_softmax(-1)
        at = torch.arange(start - 1, start + length - 1, device=device)
        want = logp[at, ids[start:]]
        close(logprobs[row, :length], want)


@pytest.mark.parametrize("n_prompts", [1, 3, 12])
def test_packing_changes_neither_scores_nor_gradients(policy, device, monkeypatch, n_prompts):
    prompts = [[*PROMPTS[i % 3], 40 + i] for i in range(n_prompts)] * (12 // n_prompts)
    monkeypatch.setattr(module, "MOST_PACKED", 1.0)
    got = sample(policy, prompts, seed=4)
    weight = torch.rand(got.mask.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def scores(got: Rollout) -> list[torch.Tensor]:
        policy.zero_grad()
        policy.take_load()
        logp = answer_logprobs(policy.train(), got)
        (logp * weight).sum().backward()
        gradients = [w.grad.clone() for w in policy.parameters() if w.grad is not None]
        return [logp.detach(), policy.take_load(), *gradients]

    plain, packed = scores(replace(got, rank=None)), scores(got)
    assert len(plain) == len(list(policy.parameters())) + 2
    for one, other in zip(packed, plain, strict=True):
        close(one, other)
    assert (plain[0].cpu()[~got.mask] == 0).all()


def test_both_ways_pass_the_same_modules_in_the_same_order(policy, rollout, monkeypatch):
    """Under ZeRO-3 each fetches its weights from all ranks, of which each may go another way."""

    def passed(most_packed: float) -> list[str]:
        monkeypatch.setattr(module, "MOST_PACKED", most_packed)
        names: list[str] = []
        hooks = [
            layer.register_forward_pre_hook(lambda *_, name=name: names.append(name))
            for name, layer in policy.named_modules()
        ]
        answer_logprobs(policy, rollout)
        for hook in hooks:
            hook.remove()
        return names

    plain, packed = passed(0.0), passed(1.0)
    assert plain[0] == "" and len(plain) > 10  # the network itself, then its layers
    assert packed == plain


@pytest.mark.parametrize("fill", [TOKENIZER.pad_id, 50])
def test_wider_padding_changes_nothing(policy, rollout, device, fill):
    scalar, wide = make_scalar().to(device), wider(rollout, 7, fill)
    mask = rollout.mask
    narrow_wide = rollout, wide
    y, x = (answer_logprobs(policy, r) for r in narrow_wide)
    assert wide.mask[:, : mask.shape[1]].equal(mask) and not wide.mask[:, mask.shape[1] :].any()
    close(x.cpu()[wide.mask], y.cpu()[mask])
    values = [answer_values(scalar, r).cpu()[r.mask] for r in narrow_wide]
    close(*values)
    close(final_scores(scalar, rollout), final_scores(scalar, wide))


def test_values_stand_before_their_tokens_and_the_score_at_the_last_one(rollout, device):
    scalar = make_scalar().to(device)
    values, scores = answer_values(scalar, rollout), final_scores(scalar, rollout)
    for row in range(4):
        start, length = int(rollout.start[row]), int(rollout.length[row])
        alone = scalar(rollout.ids[row : row + 1, : start + length].to(device))[0]
        close(values[row, :length], alone[start - 1 : -1])
        close(scores[row], alone[-1])


def test_answers_as_text(rollout):
    answers = [[*TOKENIZER.encode("Yes."), TOKENIZER.eot_id], TOKENIZER.encode("No")]
    r = pack([[1, 2], [3]], Generation(answers, None, [True, False]), TOKENIZER.pad_id)
    assert answer_texts(r, TOKENIZER) == ["Yes.", "No"]


def test_the_seed_decides_what_is_sampled(policy):
    def ids(seed: int) -> list:
        return sample(policy, PROMPTS, max_new_tokens=6, seed=seed).ids.tolist()

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.parametrize("seed", [20_240_101 * 1_000_003, 2**32 * 1_000_003])
def test_a_large_seed_is_as_good_as_a_small_one(policy, seed):
    """A run's seed is multiplied on its way here; PyTorch's own end at 2^64."""
    one, two = (sample(policy, PROMPTS, max_new_tokens=6, seed=seed + i) for i in (0, 1))
    assert one.ids.tolist() != two.ids.tolist()


def test_a_long_prompt_loses_its_beginning(policy):
    text = "0123456789" * 10
    messages = [{"role": "user", "content": text}]
    whole = TOKENIZER.prompt(messages)
    assert fitted_prompt(TOKENIZER, messages, len(whole)) == whole
    short = fitted_prompt(TOKENIZER, messages, 20)
    assert len(short) == 20
    assert short[:2] == whole[:2]  # <bos><user>
    assert short[2:] == whole[-18:]  # the end of the question, <eot> and <assistant>
    sample(policy, [short], max_new_tokens=TINY.max_seq_len - 20)  # it fits


def test_no_room_for_a_prompt_is_the_users_mistake():
    with pytest.raises(UserError, match="lower max_new_tokens"):
        fitted_prompt(TOKENIZER, [{"role": "user", "content": "Hello"}], 3)

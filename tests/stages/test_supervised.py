"""Next-token training: which tokens count, what a step divides by, and what the router gets."""

from __future__ import annotations

from math import log

import pytest
import torch

from fourstage.batch import IGNORE, TokenBatch
from fourstage.data.datamodule import sft_data
from fourstage.data.records import Conversation
from fourstage.model import Transformer
from fourstage.stages import PretrainModule, SFTModule, supervised
from fourstage.stages.pretrain import bits_per
from fourstage.stages.supervised import next_token_nll
from tests.device import REPEATED, ROUNDING, close, repeated
from tests.stages import tiny
from tests.stages.tiny import (
    TOKENIZER,
    biases,
    distance,
    fit,
    make_policy,
    steady,
    use_sgd,
    weights,
    with_balance,
)

UNBALANCED = with_balance("none")


def ragged(n_rows: int, tokens: int = 12, pad: int = 0, seed: int = 0) -> TokenBatch:
    """Rows of very different length; in each the first tokens are a prompt without targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 100, (n_rows, tokens + 1), generator=generator)
    batch = TokenBatch(ids[:, :-1].clone(), ids[:, 1:].clone())
    for row in range(n_rows):
        end = tokens - row % (tokens - 3)
        batch.ids[row, end:] = TOKENIZER.pad_id
        batch.targets[row, end:] = IGNORE
        batch.targets[row, : row % 3] = IGNORE
    widen = torch.nn.functional.pad
    return TokenBatch(widen(batch.ids, (0, pad)), widen(batch.targets, (0, pad), value=IGNORE))


def chats() -> list[Conversation]:
    turns = [("Hi", "Yo"), ("What is two and two?", "Four, I am told.")]
    pairs = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns
    ]
    return [Conversation(p) for p in [*pairs, pairs[0] + pairs[1]]]


def train_sft(batch: TokenBatch, model=UNBALANCED, policy: Transformer | None = None, **changes):
    policy = policy or make_policy(model=model)
    module = SFTModule(
        policy, steady("sft", **{"lr": 0.1, "max_steps": 1, "balance_router": True} | changes), 0
    )
    trainer = fit(module, [batch] * module.settings.max_steps)
    return weights(policy), trainer.callback_metrics


# --- the loss


def test_next_token_nll_by_hand():
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]]).log() + 3.0
    targets = torch.tensor([[0, IGNORE, 2]])
    assert next_token_nll(logits, targets).item() == pytest.approx(log(2) + log(4))
    assert next_token_nll(logits, torch.full((1, 3), IGNORE)).item() == 0.0


def test_bits_per_character_by_hand():
    assert bits_per(torch.tensor(12 * log(2)), 4).item() == pytest.approx(3.0)


def test_sft_learns_the_assistants_tokens_and_their_end_of_turn_only():
    """The loss is computed again, token by token, on unpadded rows."""
    policy, eot = make_policy(model=UNBALANCED), TOKENIZER.eot_id
    (batch,) = sft_data(
        chats(), chats(), TOKENIZER, max_tokens=64, batch_size=3, n_batches=1, seed=0
    ).val
    total, learnt = 0.0, []
    for chat in chats():
        ids, mask = TOKENIZER.chat(chat.messages)
        with torch.no_grad():
            logp = policy.logits(policy(torch.tensor([ids])).hidden_BTD)[0].log_softmax(-1)
        at = [t for t, m in enumerate(mask) if m]
        total -= sum(logp[t - 1, ids[t]].item() for t in at)
        learnt.append(TOKENIZER.decode([ids[t] for t in at], keep_special=True))
    assert learnt == ["Yo<eot>", "Four, I am told.<eot>", "Yo<eot>Four, I am told.<eot>"]
    n_targets = 3 + 17 + 20
    assert (batch.targets != IGNORE).sum() == n_targets
    assert (batch.targets == eot).sum() == 4
    _, metrics = train_sft(batch, policy=policy)
    assert metrics["train/loss"].item() == pytest.approx(total / n_targets, rel=1e-5)


def test_the_logits_of_a_prompt_get_no_gradient(device):
    """At a target it is softmax - one-hot, elsewhere 0."""
    logits = torch.randn(2, 3, 5).to(device).requires_grad_()
    targets = torch.tensor([[IGNORE, 4, IGNORE], [2, IGNORE, IGNORE]], device=device)
    (got,) = torch.autograd.grad(next_token_nll(logits, targets), logits)
    want = torch.zeros(2, 3, 5, device=device)
    for row, t, target in ((0, 1, 4), (1, 0, 2)):
        want[row, t] = logits[row, t].detach().softmax(-1)
        want[row, t, target] -= 1
    close(got, want)


def test_losing_the_mask_would_show(monkeypatch):
    use_sgd(monkeypatch)
    batch = ragged(4)
    after, metrics = train_sft(batch)
    batch.targets[batch.targets == IGNORE] = 50
    unmasked, others = train_sft(batch)
    assert distance(after, unmasked) > 1e-3
    assert metrics["train/loss"] != others["train/loss"]


def test_validation_is_one_mean_over_all_tokens():
    """Not a mean of the means of batches, which are of different size here."""
    policy = make_policy(model=UNBALANCED)
    val = [ragged(5, seed=1), ragged(1, tokens=5, seed=2), ragged(3, seed=3)]
    with torch.no_grad():
        nll = sum(next_token_nll(policy.logits(policy(b.ids).hidden_BTD), b.targets) for b in val)
    n_tokens = sum(int((b.targets != IGNORE).sum()) for b in val)
    module = PretrainModule(policy, steady("pretrain", lr=1e-12, max_steps=1), 0, 77, 99)
    metrics = fit(module, [ragged(2)], val).callback_metrics
    assert metrics["val/loss"].item() == pytest.approx((nll / n_tokens).item(), rel=1e-5)
    for name, size in (("char", 77), ("byte", 99)):
        expected = (nll / size / log(2)).item()
        assert metrics[f"val/bits_per_{name}"].item() == pytest.approx(expected, rel=1e-5)
    assert [n for n in metrics if n.startswith("val") and n.endswith("loss")] == ["val/loss"]
    assert module.validated_at == 1


def test_a_second_validation_starts_from_nothing():
    policy = make_policy(model=UNBALANCED)
    module = PretrainModule(policy, steady("pretrain", lr=1e-12, max_steps=2), 0, 77, 99)
    seen = []
    monitor = module.validation_metrics
    module.validation_metrics = lambda nll, n: seen.append((nll, n)) or monitor(nll, n)
    fit(module, [ragged(2)] * 2, [ragged(3)], val_check_interval=1)
    assert len(seen) == 2
    for first, second in zip(*seen, strict=True):
        repeated(first, second)


def test_a_uniform_model_pays_log_v():
    policy = make_policy(model=UNBALANCED)
    torch.nn.init.zeros_(policy.head.weight)
    _, metrics = train_sft(ragged(6), policy=policy)
    assert metrics["train/loss"].item() == pytest.approx(log(103), rel=ROUNDING)


# --- invariances of a step


@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_one_piece_of_eight_rows_equals_eight_of_one(monkeypatch, clip_norm):
    use_sgd(monkeypatch)
    results = [
        train_sft(
            ragged(8), with_balance("bias"), micro_batch_size=m, max_steps=3, clip_norm=clip_norm
        )
        for m in (8, 1, 3)
    ]
    start = weights(make_policy())
    whole, metrics = results[0]
    assert distance(start, whole) > 1e-2
    for pieces, others in results[1:]:
        assert distance(whole, pieces) < ROUNDING
        for name in ("train/loss", "train/grad_norm"):
            assert others[name].item() == pytest.approx(metrics[name].item(), rel=1e-5)


@pytest.mark.parametrize("z_loss_coef", [0.0, 0.5])
def test_the_z_loss_adds_up_over_pieces(monkeypatch, z_loss_coef):
    """Whatever share of a piece's tokens are targets: the routers see them all."""
    use_sgd(monkeypatch)
    batch = ragged(8)
    batch.targets[1, :8] = IGNORE  # a long prompt
    model = with_balance("bias", z_loss_coef=z_loss_coef)
    whole, _ = train_sft(batch, model, micro_batch_size=8, max_steps=3)
    for size in (1, 3):
        pieces, _ = train_sft(batch, model, micro_batch_size=size, max_steps=3)
        assert distance(whole, pieces) < ROUNDING
    without, _ = train_sft(batch, with_balance("bias"), micro_batch_size=8, max_steps=3)
    assert (distance(whole, without) > 1e-4) == (z_loss_coef > 0)


def test_pieces_without_a_target_are_no_trouble(monkeypatch):
    use_sgd(monkeypatch)
    batch = ragged(4)
    batch.targets[1:3] = IGNORE
    whole, _ = train_sft(batch, micro_batch_size=4)
    pieces, metrics = train_sft(batch, micro_batch_size=1)
    assert distance(whole, pieces) < ROUNDING
    assert metrics["train/loss"].isfinite()


@pytest.mark.parametrize("balance", ["none", "bias", "switch"])
def test_wider_padding_changes_nothing(monkeypatch, balance):
    use_sgd(monkeypatch)
    model = with_balance(balance, switch_coef=0.5)
    narrow, loss = train_sft(ragged(6), model)
    wide, wide_loss = train_sft(ragged(6, pad=9), model)
    assert distance(narrow, wide) < ROUNDING
    assert loss["train/loss"].item() == pytest.approx(wide_loss["train/loss"].item(), rel=ROUNDING)


# --- the router


def test_the_switch_loss_reaches_the_router(monkeypatch):
    """What it adds to a gradient step is its own gradient, and is not in the logged loss."""
    use_sgd(monkeypatch)
    batch, model = ragged(6), with_balance("switch", switch_coef=0.5)
    policy = make_policy(model=model)
    aux_loss = policy(batch.ids, valid_BT=batch.valid).router.aux_loss
    names = [name for name, _ in policy.named_parameters() if "router.proj" in name]
    assert len(names) == 2
    gradients = torch.autograd.grad(aux_loss, [policy.get_parameter(name) for name in names])
    without, plain = train_sft(batch, UNBALANCED)
    after, metrics = train_sft(batch, model)
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(
            after[name] - without[name], -0.1 * gradient, atol=ROUNDING, rtol=1e-3
        )
    assert metrics["train/loss"].item() == pytest.approx(plain["train/loss"].item(), rel=ROUNDING)


def test_the_bias_moves_once_a_step_by_the_load_of_the_whole_batch():
    policy, batch = make_policy(), ragged(8)
    load_LE = policy.eval()(batch.ids, valid_BT=batch.valid).router.load_LE
    assert load_LE.sum(-1).tolist() == [2.0 * batch.valid.sum()] * 2  # top 2, padding is no load
    step_LE = 0.01 * (load_LE.mean(-1, keepdim=True) - load_LE).sign()
    want_LE = step_LE - step_LE.mean(-1, keepdim=True)
    for micro in (8, 1):
        policy = make_policy()
        train_sft(batch, policy=policy, micro_batch_size=micro)
        torch.testing.assert_close(torch.stack(list(biases(policy).values())), want_LE)


def test_the_bias_stands_still_where_told_to_and_while_validating():
    policy, batch = make_policy(), ragged(8)
    train_sft(batch, policy=policy, balance_router=False, max_steps=2)
    assert not any(bias.any() for bias in biases(policy).values())

    moved = []
    for val in ([], [ragged(8, seed=9)] * 3):
        policy = make_policy()
        s = steady("pretrain", lr=1e-9, max_steps=2, balance_router=True)
        fit(PretrainModule(policy, s, 0, 1, 1), [batch] * 2, val, val_check_interval=1)
        moved.append(biases(policy))
        assert policy.load_LE is None  # nothing is left over
    assert distance(*moved) <= REPEATED


def test_a_dense_model_trains_too():
    dense = with_balance("none", num_experts=1, top_k=1)
    policy = make_policy(model=dense)
    before = weights(policy)
    after, metrics = train_sft(ragged(3), policy=policy)
    assert distance(before, after) > 0
    assert not any(name.startswith("router/") for name in metrics)


@pytest.mark.parametrize("at_once", [4, 64])  # 48 pieces of 33 tokens, and 3
def test_logits_of_a_large_vocabulary_in_pieces(monkeypatch, device, at_once):
    """The same loss, gradients and FLOPs as with all logits at once, and never all of them held."""
    ids, targets = (torch.randint(0, 300, (3, 11)).to(device) for _ in range(2))
    targets[0, :4] = IGNORE
    found = []
    for large in (1000, 100):
        monkeypatch.setattr(supervised, "LARGE_VOCABULARY", large)
        monkeypatch.setattr(supervised, "LOGITS_AT_ONCE", at_once)
        torch.manual_seed(0)
        policy = Transformer(tiny.TINY, 300).to(device)
        held: list[int] = []

        def pack(x, held=held):
            held.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = policy(ids).hidden_BTD
            held.clear()
            nll = supervised.summed_nll(policy, hidden, targets)
        nll.backward()
        found.append(
            (nll, policy.embedding.weight.grad, policy.head.weight.grad, policy.flops, held)
        )
    whole, pieces = found
    for mine, its in zip(pieces[:3], whole[:3], strict=True):
        close(mine, its)
    assert pieces[3] == whole[3]
    assert max(whole[4]) == 33 * 300 and max(pieces[4]) < 33 * 300

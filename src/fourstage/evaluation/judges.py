"""A ladder's other models judge stored answers: the reward model, the sft policy and its answers.
Reward models are judged by held-out pairs.

A row of the table can be older than its judges, so they read the answers from its items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourstage.batch import PairBatch, Rollout
from fourstage.evaluation.items import at_work, batches
from fourstage.evaluation.suite import Item
from fourstage.model import ScalarModel, Transformer
from fourstage.rl.rollout import answer_logprobs, final_scores, pack
from fourstage.sampling.generate import Generation
from fourstage.tokenizer import Tokenizer

NO_REWARD = "no reward model on this ladder yet"
NO_SFT = "no sft policy on this ladder yet"


@dataclass(frozen=True)
class Judges:
    """A ladder's models so far; sft_chats are the sft policy's chat items, or why it has none."""

    reward: ScalarModel | None = None
    reference: Transformer | None = None  # the sft policy
    sft_chats: list[Item] | str = NO_SFT
    device: torch.device | None = None  # where they work; None: where they are


def judged(chats: list[Item], tokenizer: Tokenizer, judges: Judges) -> list[Item]:
    """{"set", "id"} of each chat item, and of these values those that the judges can give:

    kl_to_sft            log p(answer) - log p_sft(answer), nats
    reward_model_score   of the reward model
    win, win_learned     1, 0.5 (a tie) or 0 against the sft answer to the same prompt, by the true
                         hidden rule and by the reward model; the sft answers tie with themselves
    """
    said = [{"set": "chat", "id": item["id"]} for item in chats]
    rivals = [] if isinstance(judges.sft_chats, str) else judges.sft_chats
    scores = {"win": "true_score"}

    def note(name: str, values: Sequence[float | None]) -> None:
        for item, value in zip(said, values, strict=True):
            item[name] = value

    if judges.reference is not None:
        with at_work(judges.reference, judges.device):
            note("kl_to_sft", kl_estimates(judges.reference, chats, tokenizer))
    if judges.reward is not None:
        with at_work(judges.reward, judges.device):
            chats, rivals = (scored(judges.reward, side, tokenizer) for side in (chats, rivals))
        note("reward_model_score", [item["reward_model_score"] for item in chats])
        scores["win_learned"] = "reward_model_score"
    if not isinstance(judges.sft_chats, str):
        rival = {item["id"]: item for item in rivals}
        for name, score in scores.items():
            note(name, [win(item, rival.get(item["id"]), score) for item in chats])
    return said


def win(own: Item, other: Item | None, score: str) -> float | None:
    """1 if the own answer scores higher, 0.5 for equal scores or the same answer, else 0; None if
    there is nothing to compare."""
    if other is None or own[score] is None or other[score] is None:
        return None
    if own["ids"] == other["ids"] or own[score] == other[score]:
        return 0.5  # the same answer's score may differ in its last digit in another batch
    return float(own[score] > other[score])


def scored(reward: ScalarModel, chats: list[Item], tokenizer: Tokenizer) -> list[Item]:
    """The stored answers with the reward model's score of each."""
    scores = _of_each(chats, tokenizer, reward, lambda part: final_scores(reward, part))
    return [item | {"reward_model_score": x} for item, x in zip(chats, scores, strict=True)]


def kl_estimates(reference: Transformer, chats: list[Item], tokenizer: Tokenizer) -> list[float]:
    """log p(answer) - log p_reference(answer) of each stored answer, in nats; its mean over the
    policy's own answers is KL(policy || reference)."""

    def kl(part: Rollout) -> Tensor:
        logp_BA = answer_logprobs(reference, part)
        return part.logprobs.sum(1) - logp_BA.sum(1).cpu()

    return _of_each(chats, tokenizer, reference, kl)


@torch.no_grad()
def _of_each(
    chats: list[Item], tokenizer: Tokenizer, network: nn.Module, judge: Callable[[Rollout], Tensor]
) -> list[float]:
    """judge() of each stored answer, in their order; a batch holds answers of similar length."""
    network.eval()
    found: dict[int, float] = {}
    for rows in batches([len(item["prompt_ids"]) + len(item["ids"]) for item in chats]):
        values = judge(rollout([chats[row] for row in rows], tokenizer)).tolist()
        found |= dict(zip(rows, values, strict=True))
    return [round(found[row], 4) for row in range(len(chats))]


def rollout(chats: list[Item], tokenizer: Tokenizer) -> Rollout:
    """The stored answers; the first token has the sum of log-probabilities, all that is stored."""
    logprobs = [[item["logprob"]] + [0.0] * (len(item["ids"]) - 1) for item in chats]
    prompts, answers = [i["prompt_ids"] for i in chats], [i["ids"] for i in chats]
    said = Generation(answers, logprobs, [item["stopped"] for item in chats])
    return pack(prompts, said, tokenizer.pad_id)


@torch.no_grad()
def pair_items(reward: ScalarModel, pairs: Sequence[PairBatch]) -> list[Item]:
    """A reward model's scores of both answers of each held-out pair."""
    reward.eval()
    device = next(reward.parameters()).device
    items: list[Item] = []
    for batch in pairs:
        there = batch.to(device)
        chosen = reward.last(there.chosen_ids, there.chosen_len).tolist()
        rejected = reward.last(there.rejected_ids, there.rejected_len).tolist()
        for c, r in zip(chosen, rejected, strict=True):
            items.append({"set": "pairs", "id": len(items), "chosen": c, "rejected": r})
    return items

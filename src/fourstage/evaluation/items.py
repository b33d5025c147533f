"""A model's results on the held-out sets: the items that the suite's keys are computed from.

    corpus             the bits of each block of the held-out text
    router             where the routers sent that text's tokens (the chats', if there is no
                       corpus), and how many go to other experts than in the parent stage
    chat               an answer to each held-out chat prompt, sampled at temperature 1, as in RL
    chat_greedy        the greedy answer, compared with the reference answers
    completion         what follows greedily on the beginning of each held-out fact
    reasoning          the greedy answer to each problem, judged by the task's own verifier
    reasoning_sampled  how many of `samples` answers at temperature 1 are right

A sampled answer depends on the seed, the item and the sample's number, not on the other prompts.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fourstage.data import Tokens
from fourstage.data.verify import verify_all
from fourstage.evaluation.suite import Item, difficulties
from fourstage.evaluation.text import chat_blocks, corpus_blocks, text_items
from fourstage.job import EvaluationConfig
from fourstage.model import Transformer
from fourstage.rl.rewards import contains, plain, rule_parts, well_formed
from fourstage.rl.rollout import answer_logprobs, pack
from fourstage.sampling.generate import Sampler, Sampling, sampler_of
from fourstage.tokenizer import Tokenizer

TOKENS_AT_ONCE = 32_768  # of a batch, padding included: the size of its KV cache


@dataclass(frozen=True)
class HeldOut:
    """What no stage trained on; for a source that the data doesn't have, a str that says why."""

    corpus: Tokens | str
    chats: Sequence[Any] | str  # records with id, messages, prompt_messages and references
    problems: Sequence[Any] | str  # records with id, question, worked, task, entry
    has_true_score: bool
    facts: Mapping[str, str] = field(default_factory=dict)  # chat's id -> "heldout", "reworded"
    statements: Sequence[tuple[str, str]] = ()  # of held-out facts: beginning and sentence


def policy_items(
    policy: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: EvaluationConfig,
    parent: Transformer | None,
    tell: Callable[[str], None] = lambda what: None,
    sampler: Sampler | None = None,
) -> list[Item]:
    """Every item of a language model; `parent` is the policy that it started from, `tell` is called
    with the name of each part, and `sampler` answers for the policy, by default itself."""
    ask = partial(answers, policy, tokenizer, config, sampler or sampler_of(policy))
    items: list[Item] = []
    tell("held-out text")
    device = next(policy.parameters()).device
    with nullcontext() if parent is None else at_work(parent, device):
        if not isinstance(heldout.corpus, str):
            blocks = corpus_blocks(heldout.corpus, tokenizer, policy, config.max_blocks)
            items += text_items(policy, blocks, parent, tokenizer.unk_id)
        elif not isinstance(heldout.chats, str):
            blocks = chat_blocks(heldout.chats[: config.max_prompts], tokenizer, policy)
            read = text_items(policy, blocks, parent)
            items += [item for item in read if item["set"] == "router"]
    if not isinstance(heldout.chats, str):
        tell("sampled chat answers")
        items += chat_items(ask, tokenizer, heldout, config)
        tell("greedy chat answers")
        items += greedy_chat_items(ask, heldout, config)
    if heldout.statements:
        tell("facts to complete")
        items += completion_items(sampler or sampler_of(policy), tokenizer, heldout.statements)
    if not isinstance(heldout.problems, str):
        tell("answers to problems")
        items += problem_items(ask, heldout.problems, config)
        tell(f"{config.samples} answers to each problem")
        items += sampled_problem_items(ask, heldout.problems, config)
    return items


@contextmanager
def at_work(network: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The network on a device while it works there: four of moe_large wouldn't fit at once."""
    before = next(network.parameters()).device
    network.to(device or before)
    try:
        yield
    finally:
        network.to(before)


def askable(heldout: HeldOut, tokenizer: Tokenizer, room: int) -> HeldOut:
    """The held-out side without prompts of more than `room` tokens, since truncating changes the
    question; prints how many. All stages of a ladder have the same room and so the same items."""
    sides: dict[str, Sequence[Any] | str] = {}
    for name in ("chats", "problems"):
        records = getattr(heldout, name)
        if isinstance(records, str):
            continue
        fit = [r for r in records if len(tokenizer.prompt(r.prompt_messages)) <= room]
        if len(fit) < len(records):
            lost = f"{len(records) - len(fit):,} of {len(records):,} held-out {name} are not asked"
            print(f"  {lost}: their prompts exceed {room} tokens", flush=True)
            limit = f"model.max_seq_len - evaluation.max_new_tokens = {room} tokens"
            sides[name] = fit or f"no prompt fits into {limit}"
    return replace(heldout, **sides)


# --- answers


@dataclass(frozen=True)
class Answer:
    """One answer; `ids` include the stop token, `logprob` is their sum."""

    text: str
    ids: list[int]
    logprob: float
    stopped: bool


Ask = Callable[..., list[Answer]]  # answers(), given everything but the records and seeds


@torch.no_grad()
def answers(
    policy: Transformer,
    tokenizer: Tokenizer,
    config: EvaluationConfig,
    sampler: Sampler,
    records: Sequence[Any],
    row_seeds: list[int] | None = None,
) -> list[Answer]:
    """An answer to each record's prompt: sampled if there are seeds, else greedy. Prompts of
    similar length share a batch, to keep the padding short. The policy computes log-probs that the
    sampler doesn't know."""
    prompts = [tokenizer.prompt(record.prompt_messages) for record in records]
    found: dict[int, Answer] = {}
    for rows in batches([len(prompt) + config.max_new_tokens for prompt in prompts]):
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            stop_id=tokenizer.eot_id,
            temperature=0.0 if row_seeds is None else 1.0,
            row_seeds=None if row_seeds is None else [row_seeds[row] for row in rows],
        )
        asked_ids = [prompts[row] for row in rows]
        part = sampler(asked_ids, sampling)
        logprobs_of = part.logprobs
        if logprobs_of is None:
            rollout = pack(asked_ids, part, tokenizer.pad_id)
            logprobs_of = answer_logprobs(policy, rollout).tolist()
        for row, ids, logprobs, stopped in zip(
            rows, part.answer_ids, logprobs_of, part.stopped, strict=True
        ):
            found[row] = Answer(tokenizer.decode(ids), ids, sum(logprobs), stopped)
    return [found[row] for row in range(len(prompts))]


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in order of length; a batch holds as many as fit, padded, into TOKENS_AT_ONCE tokens."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (len(batch) + 1) * lengths[row] > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def draw_seed(seed: int, set_name: str, item_id: str, sample: int = 0) -> int:
    """The seed of one sampled answer."""
    key = f"{seed}\x1f{set_name}\x1f{item_id}\x1f{sample}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])


def chat_items(
    ask: Ask, tokenizer: Tokenizer, heldout: HeldOut, config: EvaluationConfig
) -> list[Item]:
    """Sampled answers to the chat prompts, with all that needs no other model to judge."""
    records = heldout.chats[: config.max_prompts]
    seeds = [draw_seed(config.seed, "chat", record.id) for record in records]
    said = ask(records, seeds)
    items = [
        {
            "set": "chat",
            "id": record.id,
            "prompt": record.prompt_messages[-1]["content"],
            "answer": answer.text,
            "stopped": answer.stopped,
            "well_formed": well_formed(answer.text, answer.stopped),
            "distinct_1": distinct(answer.text, 1),
            "distinct_2": distinct(answer.text, 2),
            "true_score": None,
            "friendly": None,
            "logprob": round(answer.logprob, 4),
            "prompt_ids": tokenizer.prompt(record.prompt_messages),
            "ids": answer.ids,
        }
        for record, answer in zip(records, said, strict=True)
    ]
    if heldout.has_true_score:
        for item, record in zip(items, records, strict=True):
            parts = rule_parts(item["answer"], item["stopped"], record.references)
            item |= {"true_score": round(sum(parts), 6), "friendly": parts.friendly}
    return items


def greedy_chat_items(ask: Ask, heldout: HeldOut, config: EvaluationConfig) -> list[Item]:
    """Greedy answers to the chat prompts: do they say what a reference answer says?"""
    records = heldout.chats[: config.max_prompts]
    items = []
    for record, answer in zip(records, ask(records), strict=True):
        items.append(
            {
                "set": "chat_greedy",
                "id": record.id,
                "answer": answer.text,
                "exact": any(is_exact(answer.text, reference) for reference in record.references),
                "contained": any(
                    contains(answer.text, reference) for reference in record.references
                ),
            }
        )
        if record.id in heldout.facts:
            items[-1] |= {"fact": heldout.facts[record.id], "stopped": answer.stopped}
    return items


def completion_items(
    sampler: Sampler, tokenizer: Tokenizer, statements: Sequence[tuple[str, str]]
) -> list[Item]:
    """Statements of facts, continued greedily as far as the sentence goes: what a base model can
    do."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(beginning)] for beginning, _ in statements]
    longest = max(len(tokenizer.encode(f" {sentence}")) for _, sentence in statements)
    sampling = Sampling(max_new_tokens=longest, stop_id=tokenizer.eot_id, temperature=0.0)
    said = map(tokenizer.decode, sampler(prompts, sampling).answer_ids)
    return [
        {
            "set": "completion",
            "id": beginning,
            "answer": text,
            "right": f"{plain(text)} ".startswith(f"{plain(sentence)} "),
        }
        for (beginning, sentence), text in zip(statements, said, strict=True)
    ]


def is_exact(answer: str, reference: str) -> bool:
    """The same words; a reference without words never matches."""
    return plain(answer) == plain(reference) != ""


def distinct(text: str, n: int) -> float | None:
    """Distinct n-grams of words over all n-grams, None if there are none (Li et al. 2016, arXiv
    1510.03055, section 5.2; here for a single answer)."""
    words = plain(text).split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return round(len(set(grams)) / len(grams), 6) if grams else None


# --- problems


def asked(problems: Sequence[Any], at_most: int) -> list[tuple[Any, str]]:
    """The first problems with their difficulty; a repeated question is asked once."""
    distinct_ones = list({problem.id: problem for problem in problems}.values())
    lengths = [len(problem.worked or problem.question) for problem in distinct_ones]
    levels = difficulties([problem.task for problem in distinct_ones], lengths)
    return list(zip(distinct_ones, levels, strict=True))[:at_most]


def problem_items(ask: Ask, problems: Sequence[Any], config: EvaluationConfig) -> list[Item]:
    """Greedy answers to the problems."""
    some = asked(problems, config.max_problems)
    problems = [problem for problem, _ in some]
    said = ask(problems)
    return [
        {
            "set": "reasoning",
            "id": problem.id,
            "task": problem.task,
            "difficulty": difficulty,
            "prompt": problem.question,
            "answer": answer.text,
            "stopped": answer.stopped,
            "well_formed": well_formed(answer.text, answer.stopped, problem),
            "correct": correct,
        }
        for (problem, difficulty), answer, correct in zip(
            some, said, are_correct(problems, said), strict=True
        )
    ]


def sampled_problem_items(
    ask: Ask, problems: Sequence[Any], config: EvaluationConfig
) -> list[Item]:
    """How many of `samples` answers to each problem are right."""
    some = asked(problems, config.max_sampled_problems)
    n = config.samples
    rows = [problem for problem, _ in some for _ in range(n)]
    seeds = [
        draw_seed(config.seed, "reasoning", p.id, sample) for p, _ in some for sample in range(n)
    ]
    right = are_correct(rows, ask(rows, seeds))
    return [
        {
            "set": "reasoning_sampled",
            "id": problem.id,
            "task": problem.task,
            "difficulty": difficulty,
            "samples": n,
            "correct": sum(right[i * n : (i + 1) * n]),
        }
        for i, (problem, difficulty) in enumerate(some)
    ]


def are_correct(problems: Sequence[Any], said: Sequence[Answer]) -> list[bool]:
    """Whether the verifier accepts each answer in full; a truncated one is wrong."""
    scores = verify_all(problems, [answer.text for answer in said])
    return [answer.stopped and score == 1.0 for answer, score in zip(said, scores, strict=True)]

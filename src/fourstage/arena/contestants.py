"""The models that answer, and what is known of their answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from fourstage import data
from fourstage.data.records import Conversation, Message, Problem
from fourstage.errors import UserError
from fourstage.evaluation.judges import scored
from fourstage.evaluation.run import checked_config, data_config, recorded_job, start_weights
from fourstage.ladder import LADDER, REWARD
from fourstage.model import ScalarModel, Transformer
from fourstage.model.weights import load_policy, load_scalar
from fourstage.rl.rewards import reasoning_rewards, true_score
from fourstage.runs.records import read_record, start_name
from fourstage.runs.store import RunStore
from fourstage.sampling.generate import Sampling, stream_logprobs
from fourstage.tokenizer import Tokenizer

PARTIAL = "\ufffd"  # how decoding shows a character whose bytes aren't all there


@dataclass(frozen=True)
class Contestant:
    """A model that answers. name: its stage's, or what the ladder started from; run: <stage>-<id>,
    or start-<id> for what the run of a first stage started from."""

    name: str
    run: str
    model: Transformer
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Answer:
    """What a contestant has said so far. ids: with the token that ended it; logprob: of all of
    them, in nats, under the distribution that they were drawn from; prompt: the ids that it read.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprob: float = 0.0
    stopped: bool = False  # by itself
    is_done: bool = False
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Judged:
    """None where it isn't known. reward: of the ladder's reward model; score: of the hidden rule;
    correct: whether a problem's answer is right."""

    reward: float | None = None
    score: float | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class Arena:
    """Contestants of one ladder, or several runs; what judges their answers, if there is any.

    tip: the run whose record says which data the prompts are from; its reward model judges.
    """

    contestants: list[Contestant]
    tip: Path
    reward: tuple[ScalarModel, Tokenizer] | None = None

    @cached_property
    def config(self) -> data.DataConfig:
        """Raises UserError if the tip's record has none, or another version's."""
        return data_config(self.tip.name, checked_config(self.tip, read_record(self.tip))["data"])

    @cached_property
    def prompts(self) -> list[list[Message]]:
        """Of the conversations that sft trains on: nothing held out. None where they can't be
        read."""
        try:
            return [c.prompt_messages for c in data.prompts_only(data.load_chat(self.config)).train]
        except UserError:
            return []

    @cached_property
    def known(self) -> Mapping[str, Conversation | Problem]:
        """Prompts and problems of both sides, by their texts' id: what the right answers are."""
        found: dict[str, Conversation | Problem] = {}
        for load in (data.load_reasoning, data.load_chat):
            try:
                split = load(self.config)
            except UserError:
                continue
            if load is data.load_chat:
                split = data.prompts_only(split)
            found |= {record.id: record for record in (*split.train, *split.heldout)}
        return found

    def judged(self, one: Contestant, messages: list[Message], answer: Answer) -> Judged:
        """What is known of a finished answer to `messages`."""
        reward = self._reward(one, answer)
        record = self.known.get(Conversation([*messages, {"role": "assistant", "content": ""}]).id)
        if isinstance(record, Problem):
            said = reasoning_rewards([record], [answer.text], [answer.stopped])
            return Judged(reward, correct=said[0].correct == 1.0)
        if record is not None and record.references and self.config.has_hidden_rule:
            score = true_score(answer.text, answer.stopped, record.references)
            return Judged(reward, score=score)
        return Judged(reward)

    def _reward(self, one: Contestant, answer: Answer) -> float | None:
        """None without a reward model, or if it can't read the answer's tokens."""
        if self.reward is None or not answer.ids:
            return None
        network, tokenizer = self.reward
        length = len(answer.prompt) + len(answer.ids)
        if tokenizer.digest != one.tokenizer.digest or length > network.backbone.config.max_seq_len:
            return None
        item = {"prompt_ids": list(answer.prompt), "ids": list(answer.ids)}
        item |= {"logprob": answer.logprob, "stopped": answer.stopped}
        return scored(network, [item], tokenizer)[0]["reward_model_score"]


def open_ladder(store: RunStore, name: str) -> Arena:
    """Every stage of the ladder of a run, after what the ladder started from. Raises UserError if
    there is no such run, or none of them leaves a language model."""
    tip = store.find(name)
    line = {**store.ancestors(tip), read_record(tip)["stage"]: tip}
    found: list[Contestant] = []
    for stage, folder in line.items():
        if not LADDER[stage].parents and (start := start_of(store, folder)):
            found.append(start)
        if LADDER[stage].leaves == "policy":
            found.append(_finished(stage, folder))
    return Arena(found, tip, _reward_of(line))


def open_runs(store: RunStore, names: Sequence[str]) -> Arena:
    """Runs by name. Raises UserError for a run that isn't there or leaves no language model, and
    for one that is named twice."""
    folders = [store.find(name) for name in names]
    if len(set(folders)) < len(folders):
        raise UserError("runs: a run is named twice")
    tip = folders[-1]
    found = [_finished(folder.name, folder) for folder in folders]
    return Arena(found, tip, _reward_of(store.ancestors(tip)))


def _finished(name: str, folder: Path) -> Contestant:
    policy, tokenizer = load_policy(folder)
    return Contestant(name, folder.name, policy.eval(), tokenizer)


def _reward_of(line: Mapping[str, Path]) -> tuple[ScalarModel, Tokenizer] | None:
    if REWARD not in line:
        return None
    network, tokenizer = load_scalar(line[REWARD])
    return network.eval(), tokenizer


def start_of(store: RunStore, folder: Path) -> Contestant | None:
    """What the run of a first stage started from: random weights, or a checkpoint; None if that is
    the run, as it is. Raises UserError if the checkpoint isn't there any more."""
    record = read_record(folder)
    job = recorded_job(folder, record, checked_config(folder, record), {}, store.outputs)
    if job.settings.as_is:
        return None
    tokenizer = Tokenizer.load(folder)
    return Contestant(
        start_name(record), f"start-{record['id']}", start_weights(job, tokenizer).eval(), tokenizer
    )


# --- answering


def fitting(one: Contestant, messages: list[Message], max_new_tokens: int) -> list[Message]:
    """The end of a conversation that the model's context holds with an answer, its oldest exchanges
    left out. Raises UserError if it doesn't hold the last question."""
    room = max(0, one.model.config.max_seq_len - max_new_tokens)
    first = int(messages[0]["role"] == "system")
    while len(ids := one.tokenizer.prompt(messages)) > room and len(messages) > first + 1:
        messages = messages[:first] + messages[first + 2 :]
    if len(ids) > room:
        raise UserError(
            f"the question has {len(ids):,} tokens; {one.name} can read {room:,} beside an answer "
            f"of {max_new_tokens}: shorten one of them"
        )
    return messages


def answer(one: Contestant, messages: list[Message], sampling: Sampling) -> Iterator[Answer]:
    """An answer as it grows, the last one done. Raises UserError as `fitting` does."""
    messages = fitting(one, messages, sampling.max_new_tokens)
    ids: list[int] = []
    logprob = 0.0
    sampling = replace(sampling, stop_id=one.tokenizer.eot_id)
    prompt = one.tokenizer.prompt(messages)
    for token, logp in stream_logprobs(one.model, prompt, sampling):
        ids.append(token)
        logprob += logp
        text = one.tokenizer.decode(ids)
        stopped = token == sampling.stop_id
        is_done = stopped or len(ids) == sampling.max_new_tokens
        text = text if is_done else text.rstrip(PARTIAL)  # the next token may complete a character
        yield Answer(text, tuple(ids), logprob, stopped, is_done, tuple(prompt))


def side_by_side(streams: Sequence[Iterator[Answer]]) -> Iterator[list[Answer]]:
    """Answers that grow in turn, a token of each at a time, until all are done."""
    said = [Answer() for _ in streams]
    growing = dict(enumerate(streams))
    while growing:
        for i, one in list(growing.items()):
            found = next(one, None)
            if found is None:
                del growing[i]
            else:
                said[i] = found
        yield list(said)


# --- two answers to vote on


@dataclass(frozen=True)
class Duel:
    """Two contestants in a random order, which the voter doesn't see."""

    messages: list[Message]
    left: Contestant
    right: Contestant
    seeds: tuple[int, int]


def duel(arena: Arena, messages: list[Message], seed: int, same_run: bool) -> Duel:
    """Two stages drawn from the seed, or two answers of one; so they are if there is only one."""
    draw, among = random.Random(seed), arena.contestants
    pair = [draw.choice(among)] * 2 if same_run or len(among) == 1 else draw.sample(among, 2)
    return Duel(messages, *pair, (draw.randrange(2**31), draw.randrange(2**31)))

"""The page: compare, vote, board. Answers and questions are text, never HTML."""

from __future__ import annotations

import math
import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import gradio as gr

from fourstage.arena.board import rates, strengths
from fourstage.arena.contestants import (
    Answer,
    Arena,
    Contestant,
    Duel,
    answer,
    duel,
    fitting,
    side_by_side,
)
from fourstage.arena.shown import Column, columns, growing, line, note, table
from fourstage.arena.votes import Choice, Side, Vote, Votes, wins
from fourstage.data.records import Message
from fourstage.errors import UserError
from fourstage.sampling.generate import Sampling

EXAMPLES = ("What is an LLM?", "What is overfitting?", "7 - 9 + 2 = ?", "Hello!")
LONGEST = 100_000  # characters of a question that is looked at
MOST_SEED = 2**31 - 1
TEMPERATURES, LENGTHS = (0, 2), (10, 400)
FRAME = 0.05  # seconds between two pictures of answers that grow
CHOICES: dict[Choice, str] = {
    "left": "← Left",
    "tie": "Tie (t)",
    "both_bad": "Both bad (b)",
    "right": "Right →",
}
FILES = resources.files("fourstage.arena")


@dataclass
class Talk:
    """A conversation of one visitor with all contestants, each with answers of its own."""

    questions: list[str] = field(default_factory=list)
    answers: list[list[Answer]] = field(default_factory=list)  # of each question, a contestant each
    latest: int = 0  # goes up with each question: an answer to an older one ends

    def messages(self, i: int, question: str) -> list[Message]:
        """What contestant i has been asked and has said, and the next question."""
        found: list[Message] = []
        for asked, said in zip(self.questions, self.answers, strict=True):
            found += [_user(asked), {"role": "assistant", "content": said[i].text}]
        return [*found, _user(question)]


@dataclass(frozen=True)
class Round:
    """What a voter sees, and what he doesn't see yet."""

    duel: Duel
    sampling: Sampling
    answers: list[Answer]


@dataclass
class Voter:
    """A visitor who votes. seen: the answers that he may vote on; cast: the ids of his votes."""

    seen: Round | None = None
    voted: bool = False  # on the answers that are shown
    cast: list[str] = field(default_factory=list)
    latest: int = 0  # goes up with each draw


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def checked(question: Any) -> str:
    """Raises UserError for a question that can't be asked."""
    text = question[: LONGEST + 1] if isinstance(question, str) else ""
    # half of a surrogate pair is no character, and can't be encoded
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise UserError("ask something first")
    if len(text) > LONGEST:
        raise UserError(f"the question has more than {LONGEST:,} characters: shorten it")
    return text


def number(value: Any, bounds: tuple[int, int], name: str) -> float:
    """Raises UserError for anything but a number within the bounds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not bounds[0] <= value <= bounds[1]:
        raise UserError(f"{name}: give a number from {bounds[0]} to {bounds[1]}")
    return value


def settings(temperature: Any, seed: Any, length: Any) -> Sampling:
    """Raises UserError for a value out of range."""
    return Sampling(
        max_new_tokens=int(number(length, LENGTHS, "tokens")),
        stop_id=0,  # each contestant has its own
        temperature=number(temperature, TEMPERATURES, "temperature"),
        seed=int(number(seed, (0, MOST_SEED), "seed")),
    )


def frames(states: Iterable[list[Answer]]) -> Iterator[list[Answer]]:
    """As many of the states as the eye sees, and the last one."""
    said, shown = None, -math.inf
    for said in states:
        if (now := time.monotonic()) - shown >= FRAME:
            yield said
            said, shown = None, now
    if said is not None:
        yield said


class Page:
    """Handlers of the page's events. Each visitor's state is in his session; what comes from a
    browser is checked here, as anybody may send anything."""

    def __init__(self, arena: Arena, votes: Votes) -> None:
        self.arena, self.votes = arena, votes
        self.voting = threading.Lock()

    def note(self, one: Contestant, asked: list[Message], read: list[Message], said: Answer) -> str:
        return note(said, self.arena.judged(one, read, said), (len(asked) - len(read)) // 2)

    # compare

    def shown(self, talk: Talk, notes: list[str], question: str = "", said: Any = ()) -> str:
        """A conversation, with a question that is being answered."""
        questions = [*talk.questions, *[question] * bool(said)]
        answers = [*talk.answers, *[said] * bool(said)]
        found = []
        for i, (one, known) in enumerate(zip(self.arena.contestants, notes, strict=True)):
            turns = [(q, a[i].text) for q, a in zip(questions, answers, strict=True)]
            found.append(Column(one.name, turns, known))
        return columns(found)

    def ask(
        self, question: Any, talk: Talk, temperature: Any, seed: Any, length: Any
    ) -> Iterator[tuple[Any, str, Talk]]:
        """Yields what to show, a message, and the conversation."""
        models = self.arena.contestants
        try:
            text = checked(question)
            sampling = settings(temperature, seed, length)
            asked = [talk.messages(i, text) for i in range(len(models))]
            read = [
                fitting(one, messages, sampling.max_new_tokens)
                for one, messages in zip(models, asked, strict=True)
            ]
        except UserError as error:
            yield gr.skip(), line(str(error)), talk
            return
        talk.latest += 1
        mine = talk.latest
        said = [Answer()] * len(models)
        yield self.shown(talk, [""] * len(models), text, said), line("answering …"), talk
        streams = [answer(*pair, sampling) for pair in zip(models, read, strict=True)]
        for said in frames(side_by_side(streams)):
            if talk.latest != mine:
                return
            notes = [growing(one) for one in said]
            yield self.shown(talk, notes, text, said), line("answering …"), talk
        notes = [self.note(*found) for found in zip(models, asked, read, said, strict=True)]
        if talk.latest != mine:
            return
        talk.questions.append(text)
        talk.answers.append(said)
        message = f"question {len(talk.questions)} of this conversation: answered"
        if unknown := max(
            one.tokenizer.count_unknown(one.tokenizer.encode(text)) for one in models
        ):
            message += f"; characters that the tokenizer doesn't know: {unknown}"
        yield self.shown(talk, notes), line(message), talk

    def restart(self, talk: Talk) -> tuple[str, str, Talk]:
        nothing = Talk(latest=talk.latest + 1)
        talk.latest += 1  # who is still answering there, ends
        return self.shown(nothing, [""] * len(self.arena.contestants)), line(""), nothing

    # vote

    def draw(
        self, question: Any, same_run: Any, temperature: Any, length: Any, voter: Voter
    ) -> Iterator[tuple[Any, Any, str, Voter]]:
        """Yields what to show, the question, a message, and the voter."""
        draw = random.SystemRandom()
        is_own = isinstance(question, str) and bool(question.strip())
        try:
            sampling = settings(temperature, 0, length)
            if not is_own and not self.arena.prompts:
                raise UserError("this ladder's questions can't be read here: type one")
            messages = [_user(checked(question))] if is_own else draw.choice(self.arena.prompts)
            same_run = same_run is True or len(self.arena.contestants) == 1
            if same_run and sampling.temperature == 0:
                raise UserError("at temperature 0 a stage always says the same: raise it")
            two = duel(self.arena, messages, draw.randrange(MOST_SEED), same_run)
            for one in (two.left, two.right):
                fitting(one, messages, sampling.max_new_tokens)
        except UserError as error:
            yield gr.skip(), gr.skip(), line(str(error)), voter
            return
        voter.latest += 1
        mine = voter.latest
        voter.seen, voter.voted = None, False
        asked = messages[-1]["content"]
        yield self.blind([Answer(), Answer()]), asked, line("answering …"), voter
        streams = [
            answer(one, messages, settings(temperature, seed, length))
            for one, seed in zip((two.left, two.right), two.seeds, strict=True)
        ]
        said: list[Answer] = []
        for said in frames(side_by_side(streams)):
            if voter.latest != mine:
                return
            yield self.blind(said), asked, line("answering …"), voter
        if voter.latest == mine:
            voter.seen = Round(two, sampling, said)
            yield self.blind(said), asked, line("which one do you prefer?"), voter

    def blind(self, said: list[Answer]) -> str:
        notes = ["cut off" * (one.is_done and not one.stopped) for one in said]
        sides = zip(("left", "right"), said, notes, strict=True)
        return columns([Column(side, [("", one.text)], note) for side, one, note in sides])

    def vote(self, choice: Choice, voter: Voter) -> tuple[Any, str, Voter]:
        """What to show, a message, and the voter."""
        with self.voting:  # a double click is one vote
            seen = voter.seen
            if seen is None:
                why = "wait until both answers are there" if voter.latest else "press n first"
                why = "you have voted on these: press n for the next two" if voter.voted else why
                return gr.skip(), line(why), voter
            vote = ballot(seen, choice)
            try:
                self.votes.add(vote)
            except OSError as error:
                why = f"the vote could not be saved ({error.strerror}): try again"
                return gr.skip(), line(why), voter
            voter.cast.append(vote.id)
            voter.seen, voter.voted = None, True
        models = (seen.duel.left, seen.duel.right)
        asked = seen.duel.messages
        found = []
        for side, one, said in zip(("left", "right"), models, seen.answers, strict=True):
            read = fitting(one, asked, seen.sampling.max_new_tokens)
            known = self.note(one, asked, read, said)
            found.append(Column(one.name, [("", said.text)], known, "chosen" * (choice == side)))
        names = f"{models[0].name} on the left, {models[1].name} on the right"
        return columns(found), line(f"saved: {names} (n: the next two)"), voter

    def undo(self, voter: Voter) -> tuple[str, Voter]:
        """A message, and the voter. What was voted on is known now, so it isn't voted on again."""
        with self.voting:
            if not voter.cast:
                return line("you have no vote to take back"), voter
            try:
                there = self.votes.undo(voter.cast[-1])
            except OSError as error:
                why = f"the vote could not be taken back ({error.strerror}): try again"
                return line(why), voter
            voter.cast.pop()
        was = "your last vote is taken back" if there else "your last vote was gone already"
        return line(was), voter

    # board

    def board(self) -> tuple[str, str, str]:
        """A line, and two tables."""
        try:
            votes, broken = self.votes.read()
        except (OSError, ValueError) as error:
            return line(f"the votes could not be read: {error}"), "", ""
        known = {one.run: one.name for one in self.arena.contestants}
        won = wins(votes)
        runs = list(dict.fromkeys([*known, *(run for pair in won for run in pair)]))
        title = {run: f"{known[run]} ({run})" if run in known else run for run in runs}
        title |= {run: run for run in runs if known.get(run) == run}
        ties = sum(vote.choice in ("tie", "both_bad") for vote in votes)
        text = f"{len(votes)} vote{'s' * (len(votes) != 1)}, {ties} without a winner"
        text += f" ({self.votes.path})" + f"; not votes: {broken} of the lines" * bool(broken)
        if not won:
            return line(f"{text}. Vote on two stages, and they are ranked here."), "", ""
        by_strength = [
            [title[x.run], str(x.n), f"{x.value:+.2f} [{x.low:+.2f}, {x.high:+.2f}]"]
            for x in strengths(won, runs)
        ]
        by_pair = [
            [
                title[x.first],
                title[x.second],
                str(x.n),
                f"{100 * x.value:.1f} % [{100 * x.low:.1f}, {100 * x.high:.1f}]",
                "they are apart" if x.more == 0 else "?" if x.more is None else f"{x.more:,}",
            ]
            for x in rates(won, runs)
        ]
        stages = ["stage", "votes", "strength"]
        pairs = ["stage", "against", "votes", "won", "more votes to tell"]
        return (
            line(text),
            table("Strength: Bradley-Terry log-odds [95 %]", stages, by_strength),
            table("How often the first won [95 %]", pairs, by_pair),
        )


def ballot(seen: Round, choice: Choice) -> Vote:
    """A vote of now."""
    two = seen.duel
    sides = [
        Side(
            run=one.run,
            answer=said.text,
            stopped=said.stopped,
            seed=seed,
            temperature=seen.sampling.temperature,
            max_new_tokens=seen.sampling.max_new_tokens,
        )
        for one, said, seed in zip((two.left, two.right), seen.answers, two.seeds, strict=True)
    ]
    asked = two.messages
    return Vote(
        id=uuid.uuid4().hex,
        voted=datetime.now(UTC).isoformat(timespec="seconds"),
        prompt=asked[0]["content"] if len(asked) == 1 else asked,
        choice=choice,
        left=sides[0],
        right=sides[1],
    )


# --- components and events

# values come as they are sent, and Page checks them: Gradio would print a traceback
EVENT: dict[str, Any] = {
    "show_progress": "hidden",
    "api_visibility": "private",
    "preprocess": False,
}


def build(page: Page) -> gr.Blocks:
    """The page's components and events."""
    with gr.Blocks(title="fourstage arena", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Which answer do you prefer?\n"
            "Ask once, and every stage of training answers, from random weights on. "
            "Vote on two answers, blind, and train the next model on your votes."
        )
        with gr.Tab("Compare", id="compare"):
            _compare(page)
        with gr.Tab("Vote", id="vote"):
            _vote(page)
        with gr.Tab("Board", id="board") as tab:
            found = [gr.HTML(line(""), elem_id="counted"), gr.HTML(), gr.HTML()]
            tab.select(page.board, None, found, **EVENT)
    return blocks


def _temperature() -> gr.Slider:
    return gr.Slider(*TEMPERATURES, 0.7, step=0.1, label="temperature (0: the likeliest token)")


def _length() -> gr.Slider:
    return gr.Slider(*LENGTHS, 200, step=10, label="tokens of an answer, at most")


def _compare(page: Page) -> None:
    talk = gr.State(Talk())
    question = gr.Textbox(
        label="question",
        placeholder="What is an LLM?",
        lines=1,
        max_lines=6,
        elem_id="question",
        autofocus=True,
        submit_btn="Ask",
    )
    with gr.Row(elem_classes="examples"):
        examples = [gr.Button(text, size="sm", elem_classes="example") for text in EXAMPLES]
        again = gr.Button("New conversation", size="sm", elem_id="restart")
    with gr.Accordion("Settings", open=False), gr.Row():
        seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=MOST_SEED)
        options = [_temperature(), seed, _length()]
    empty, *_ = page.restart(Talk())
    message = gr.HTML(line(""), elem_id="message")
    shown = gr.HTML(empty, elem_id="answers", js_on_load=None)
    outputs = [shown, message, talk]
    question.submit(page.ask, [question, talk, *options], outputs, **EVENT)
    for example in examples:
        example.click(page.ask, [example, talk, *options], outputs, **EVENT)
    again.click(page.restart, talk, outputs, **EVENT)


def _vote(page: Page) -> None:
    voter = gr.State(Voter())
    draw = gr.Button("Draw two answers (n)", variant="primary", elem_id="draw")
    with gr.Accordion("Settings", open=False):
        question = gr.Textbox(
            label="your own question",
            placeholder="empty: one that sft was trained on",
            elem_id="vote-question",
        )
        alone = len(page.arena.contestants) == 1
        same_run = gr.Checkbox(alone, label="both answers from one stage", interactive=not alone)
        with gr.Row():
            temperature, length = _temperature(), _length()
    asked = gr.Textbox(label="asked", interactive=False, lines=1, elem_id="asked")
    shown = gr.HTML(page.blind([Answer(), Answer()]), elem_id="two-answers", js_on_load=None)
    with gr.Row(elem_classes="choices"):
        buttons = {
            choice: gr.Button(text, elem_id=f"vote-{choice}") for choice, text in CHOICES.items()
        }
    message = gr.HTML(line("press n, or the button above"), elem_id="voted")
    undo = gr.Button("Undo (u)", size="sm", elem_id="undo")
    inputs = [question, same_run, temperature, length, voter]
    draw.click(page.draw, inputs, [shown, asked, message, voter], **EVENT)
    for choice, button in buttons.items():

        def cast(voter: Voter, choice: Choice = choice) -> tuple[Any, str, Voter]:
            return page.vote(choice, voter)

        button.click(cast, voter, [shown, message, voter], **EVENT)
    undo.click(page.undo, voter, [message, voter], **EVENT)

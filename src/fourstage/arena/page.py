"""The page: compare, vote, board. Gradio is imported here only; answers are text, never HTML."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib import resources
from typing import Any

import gradio as gr

from fourstage.arena.board import rates, strengths
from fourstage.arena.contestants import Answer, Arena, Contestant, Duel, answer, duel, side_by_side
from fourstage.arena.votes import Choice, Side, Vote, Votes, wins
from fourstage.data.records import Message
from fourstage.errors import UserError
from fourstage.sampling.generate import Sampling

EXAMPLES = ("What is an LLM?", "What is overfitting?", "7 - 9 + 2 = ?", "Hello!")
LONGEST = 100_000  # characters of a question that is looked at
MOST_SEED = 2**31
SAMPLES = ("two stages", "two answers of one stage")
CHOICES: dict[Choice, str] = {
    "left": "← Left is better",
    "tie": "Tie (t)",
    "both_bad": "Both bad (b)",
    "right": "Right is better →",
}
FILES = resources.files("fourstage.arena")


@dataclass
class Talk:
    """A conversation of one visitor with all contestants, each with answers of its own."""

    questions: list[str] = field(default_factory=list)
    answers: list[list[Answer]] = field(default_factory=list)  # of each question, a contestant each

    def messages(self, i: int, question: str) -> list[Message]:
        """What contestant i has been asked and has said, and the next question."""
        found: list[Message] = []
        for asked, said in zip(self.questions, self.answers, strict=True):
            found += [_user(asked), {"role": "assistant", "content": said[i].text}]
        return [*found, _user(question)]


@dataclass
class Round:
    """What a voter sees, and what he doesn't see yet."""

    duel: Duel
    sampling: Sampling
    answers: list[Answer]
    voted: str | None = None  # the vote's id


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def checked(question: str) -> str:
    """Raises UserError for a question that can't be asked."""
    text = question[: LONGEST + 1].replace("\r\n", "\n").strip()
    if not text:
        raise UserError("ask something first")
    if len(text) > LONGEST:
        raise UserError(f"the question has more than {LONGEST:,} characters: shorten it")
    return text


# --- what is shown


def columns(titles: list[str], texts: list[str], notes: list[str], kinds: list[str]) -> str:
    """Boxes side by side."""
    boxes = [
        f'<section class="said {kind}"><h3>{escape(title)}</h3>'
        f'<div tabindex="0">{escape(text)}</div><p>{escape(note)}</p></section>'
        for title, text, note, kind in zip(titles, texts, notes, kinds, strict=True)
    ]
    return f'<div class="side-by-side" aria-live="polite">{"".join(boxes)}</div>'


def table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide" tabindex="0">{whole}</div>'


def note(arena: Arena, one: Contestant, messages: list[Message], said: Answer) -> str:
    """What is known of a finished answer, in a line."""
    if not said.is_done:
        return f"{len(said.ids)} tokens …"
    parts = [f"{len(said.ids)} tokens", f"log p {said.logprob:.1f}"]
    judged = arena.judged(one, messages, said)
    if judged.reward is not None:
        parts.append(f"learned reward {judged.reward:.2f}")
    if judged.score is not None:
        parts.append(f"true score {judged.score:.2f}")
    if judged.correct is not None:
        parts.append("right" if judged.correct else "wrong")
    return " · ".join([*parts, *["cut off"] * (not said.stopped)])


# --- the page


class Page:
    """Handlers of the page's events. Each visitor's state is in his session."""

    def __init__(self, arena: Arena, votes: Votes) -> None:
        self.arena, self.votes = arena, votes
        self.names = [one.name for one in arena.contestants]

    def sampling(self, temperature: float, seed: float, length: float) -> Sampling:
        return Sampling(
            max_new_tokens=int(length), stop_id=0, temperature=temperature, seed=int(seed)
        )

    # compare

    def shown(self, said: list[Answer], notes: list[str]) -> str:
        kinds = ["done" if one.is_done else "" for one in said]
        return columns(self.names, [one.text for one in said], notes, kinds)

    def ask(
        self, question: str, talk: Talk, temperature: float, seed: float, length: float
    ) -> Iterator[tuple[str, str, Talk]]:
        """Yields what to show, a message, and the conversation."""
        nothing = [Answer()] * len(self.names)
        before = talk.answers[-1] if talk.answers else nothing
        try:
            text = checked(question)
            sampling = self.sampling(temperature, seed, length)
            asked = [talk.messages(i, text) for i in range(len(self.names))]
            pairs = zip(self.arena.contestants, asked, strict=True)
            streams = [answer(one, messages, sampling) for one, messages in pairs]
            said = nothing
            for said in side_by_side(streams):
                yield self.shown(said, [f"{len(one.ids)} tokens …" for one in said]), "", talk
        except UserError as error:
            yield self.shown(before, [""] * len(before)), f"{error}", talk
            return
        triples = zip(self.arena.contestants, asked, said, strict=True)
        notes = [note(self.arena, *triple) for triple in triples]
        talk = Talk([*talk.questions, text], [*talk.answers, said])
        turns = f"question {len(talk.questions)} of this conversation"
        yield self.shown(said, notes), turns, talk

    def restart(self) -> tuple[str, str, Talk]:
        nothing = [Answer()] * len(self.names)
        return self.shown(nothing, [""] * len(nothing)), "a new conversation", Talk()

    # vote

    def draw(
        self, question: str, kind: str, temperature: float, length: float
    ) -> Iterator[tuple[str, str, str, Round | None]]:
        """Yields what to show, the question, a message, and the round."""
        draw = random.SystemRandom()
        try:
            if question.strip():
                messages = [_user(checked(question))]
            elif self.arena.prompts:
                messages = draw.choice(self.arena.prompts)
            else:
                raise UserError("this ladder's questions can't be read here: type one")
            seed = draw.randrange(MOST_SEED)
            two = duel(self.arena, messages, seed, kind == SAMPLES[1])
            sampling = self.sampling(temperature, 0, length)
            sides = zip((two.left, two.right), two.seeds, strict=True)
            streams = [
                answer(one, messages, self.sampling(temperature, seed, length))
                for one, seed in sides
            ]
            shown = messages[-1]["content"]
            said: list[Answer] = []
            for said in side_by_side(streams):
                yield self.blind(said), shown, "", None
            yield self.blind(said), shown, "which one do you prefer?", Round(two, sampling, said)
        except UserError as error:
            yield self.blind([Answer(), Answer()]), "", f"{error}", None

    def blind(self, said: list[Answer]) -> str:
        notes = ["cut off" * (one.is_done and not one.stopped) for one in said]
        return columns(["left", "right"], [one.text for one in said], notes, ["", ""])

    def vote(self, choice: Choice, seen: Round | None) -> tuple[str | None, str, Round | None]:
        """What to show, a message, and the round with its vote."""
        if seen is None:
            return None, "draw two answers first", seen
        if seen.voted:
            return None, "you have voted on these: draw the next two", seen
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
        vote = Vote(
            id=uuid.uuid4().hex,
            voted=datetime.now(UTC).isoformat(timespec="seconds"),
            prompt=asked[0]["content"] if len(asked) == 1 else asked,
            choice=choice,
            left=sides[0],
            right=sides[1],
        )
        try:
            self.votes.add(vote)
        except OSError as error:
            return None, f"the vote could not be saved ({error.strerror}): try again", seen
        seen.voted = vote.id
        names = [two.left.name, two.right.name]
        kinds = ["chosen" if choice == side else "" for side in ("left", "right")]
        notes = [
            note(self.arena, one, asked, said)
            for one, said in zip((two.left, two.right), seen.answers, strict=True)
        ]
        shown = columns(names, [one.text for one in seen.answers], notes, kinds)
        return shown, f"saved: {names[0]} on the left, {names[1]} on the right", seen

    def undo(self, seen: Round | None) -> tuple[str, Round | None]:
        if seen is None or seen.voted is None:
            return "there is no vote to take back", seen
        try:
            there = self.votes.undo(seen.voted)
        except OSError as error:
            return f"the vote could not be taken back ({error.strerror}): try again", seen
        seen.voted = None
        return "taken back: vote again" if there else "that vote was gone already", seen

    # board

    def board(self) -> tuple[str, str, str]:
        """A line, and two tables."""
        votes, broken = self.votes.read()
        known = {one.run: one.name for one in self.arena.contestants}
        won = wins(votes)
        runs = list(dict.fromkeys([*known, *(run for pair in won for run in pair)]))
        title = {run: f"{known[run]} ({run})" if run in known else run for run in runs}
        ties = sum(vote.choice in ("tie", "both_bad") for vote in votes)
        line = f"{len(votes)} votes, {ties} of them without a winner; {self.votes.path}"
        line += f"; {broken} lines are no votes" * bool(broken)
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
        return (
            line,
            table(["stage", "votes", "strength, log-odds"], by_strength),
            table(["stage", "against", "votes", "won", "more votes to tell"], by_pair),
        )


def build(page: Page) -> gr.Blocks:
    """The page's components and events."""
    with gr.Blocks(title="fourstage arena", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Which answer do you prefer?\n"
            "Ask once and every stage of training answers, from random weights on. Vote on two "
            "answers, blind, and train the next model on your votes."
        )
        with gr.Tab("Compare", id="compare"):
            _compare(page)
        with gr.Tab("Vote", id="vote"):
            _vote(page)
        with gr.Tab("Board", id="board") as tab:
            line = gr.Markdown()
            ranks, pairs = gr.HTML(), gr.HTML()
            tab.select(page.board, None, [line, ranks, pairs], api_visibility="private")
    return blocks


def _settings(default_seed: bool) -> list[gr.components.Component]:
    with gr.Accordion("Settings", open=False), gr.Row():
        temperature = gr.Slider(0, 2, 0.7, step=0.1, label="temperature (0: the likeliest token)")
        length = gr.Slider(10, 400, 200, step=10, label="tokens of an answer, at most")
        seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=MOST_SEED)
        seed.visible = default_seed
    return [temperature, seed, length]


def _compare(page: Page) -> None:
    talk = gr.State(Talk())
    question = gr.Textbox(
        label="question",
        placeholder="What is an LLM?",
        lines=1,
        max_lines=6,
        elem_id="question",
        autofocus=True,
        submit_btn=True,
    )
    with gr.Row(elem_classes="examples"):
        examples = [gr.Button(text, size="sm", elem_classes="example") for text in EXAMPLES]
        again = gr.Button("New conversation", size="sm", elem_id="restart")
    message = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="message")
    shown = gr.HTML(page.restart()[0], elem_id="answers")
    settings = _settings(True)
    outputs = [shown, message, talk]
    options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    asking = [question.submit(page.ask, [question, talk, *settings], outputs, **options)]
    for example in examples:
        event = example.click(lambda text: text, example, question, **options)
        asking.append(event.then(page.ask, [question, talk, *settings], outputs, **options))
    again.click(page.restart, None, outputs, cancels=asking, **options)


def _vote(page: Page) -> None:
    seen = gr.State(None)
    question = gr.Textbox(
        label="question", placeholder="empty: one that sft was trained on", elem_id="vote-question"
    )
    kind = gr.Radio(list(SAMPLES), value=SAMPLES[0], show_label=False, container=False)
    draw = gr.Button("Draw two answers (n)", variant="primary", elem_id="draw")
    asked = gr.Textbox(label="asked", interactive=False, elem_id="asked")
    shown = gr.HTML(page.blind([Answer(), Answer()]), elem_id="two-answers")
    with gr.Row(elem_classes="choices"):
        buttons = {
            choice: gr.Button(text, elem_id=f"vote-{choice}") for choice, text in CHOICES.items()
        }
    message = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="voted")
    undo = gr.Button("Undo (u)", size="sm", elem_id="undo")
    temperature, _, length = _settings(False)
    options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    inputs = [question, kind, temperature, length]
    draw.click(page.draw, inputs, [shown, asked, message, seen], **options)
    for choice, button in buttons.items():

        def cast(seen: Round | None, choice: Choice = choice) -> Any:
            html, said, seen = page.vote(choice, seen)
            return gr.skip() if html is None else html, said, seen

        button.click(cast, seen, [shown, message, seen], **options)
    undo.click(page.undo, seen, [message, seen], **options)

"""Well-known sets on the Hugging Face hub: their commits, splits and columns."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fourstage.data.files import Row

TITLE = re.compile(r" = (?!= ).+(?<! =) = \n?")  # of an article, not of a section


@dataclass(frozen=True, kw_only=True)
class Known:
    """A well-known set. docs/data.md has its licence and size, and where its commit was found.

    columns: {name in our schema: name in the set}, of all fields that are read.
    """

    revision: str
    columns: Mapping[str, str]
    subsets: tuple[str, ...] = ()
    split: str = "train"
    heldout_split: str | None = None
    adapt: Callable[[Iterable[Row]], Iterator[Row]] | None = None


def articles(rows: Iterable[Row]) -> Iterator[Row]:
    """wikitext's lines as articles, each with its title."""
    article: list[str] = []
    first: Row | None = None
    for row in rows:
        line = row.get("text") or ""
        if first is None or TITLE.fullmatch(line):
            if first is not None:
                yield Row({"text": "".join(article)}, first.where)
            article, first = [], row
        article.append(line if line.endswith("\n") else f"{line}\n")
    if first is not None:
        yield Row({"text": "".join(article)}, first.where)


TEXT, MESSAGES = {"text": "text"}, {"messages": "messages"}
KNOWN = {
    "roneneldan/TinyStories": Known(
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        columns=TEXT,
        heldout_split="validation",
    ),
    "Salesforce/wikitext": Known(
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        columns=TEXT,
        subsets=("wikitext-103-raw-v1",),
        heldout_split="validation",
        adapt=articles,
    ),
    "HuggingFaceFW/fineweb-edu": Known(
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        columns=TEXT,
        subsets=("sample-10BT",),
    ),
    "tatsu-lab/alpaca": Known(
        revision="dce01c9b08f87459cf36a430d809084718273017",
        columns={name: name for name in ("instruction", "input", "output")},
    ),
    "HuggingFaceTB/smoltalk": Known(
        revision="5feaf2fd3ffca7c237fc38d1861bc30365d48ffa",
        columns=MESSAGES,
        subsets=("all",),
        heldout_split="test",
    ),
    "HuggingFaceH4/ultrachat_200k": Known(
        revision="8049631c405ae6576f93f445c6b8166f76f5505a",
        columns=MESSAGES,
        split="train_sft",
        heldout_split="test_sft",
    ),
    "Anthropic/hh-rlhf": Known(
        revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        columns={"chosen": "chosen", "rejected": "rejected"},
        heldout_split="test",
    ),
    "HuggingFaceH4/ultrafeedback_binarized": Known(
        revision="3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        columns={name: name for name in ("prompt", "chosen", "rejected")},
        split="train_prefs",
        heldout_split="test_prefs",
    ),
    "openai/gsm8k": Known(
        revision="740312add88f781978c0658806c59bc2815b9866",
        columns={"question": "question", "answer": "answer"},
        subsets=("main",),
        heldout_split="test",
    ),
    "EleutherAI/hendrycks_math": Known(
        revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
        columns={"question": "problem", "answer": "solution"},
        subsets=(
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
        heldout_split="test",
    ),
}

"""Sets on the hub: the real client against a stand-in on loopback."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fourstage import data
from fourstage.data import hub as hub_module
from fourstage.data.files import Row
from fourstage.data.hub import KNOWN, articles
from fourstage.data.schemas import conversation_from, document_from, pair_from, problem_from
from fourstage.data.verify import verify_all
from fourstage.errors import UserError
from tests.stand_in_hub import ROOT, Hub, ask, card, environment, parquet, said, serving

C, D = "c" * 40, "d" * 40
STORY, OTHER = "One day, a cat sat.", "A dog ran to Tim."
SHARD = "00000-of-00001.parquet"
ASKED = said("Hi there", "Hello.", "Bye", "See you.")


def known_sets() -> dict[str, dict[str, bytes]]:
    """Each known set with two or three rows, in the layout of its commit."""
    wiki = [" = Cats = \n", "", " Cats purr . \n", " = = Food = = \n", " = Dogs = \n", " Woof . \n"]
    chat = {"messages": ASKED, "source": "x"}
    pair = {
        "prompt": "Hi there",
        "prompt_id": "0",
        "chosen": said("Hi there", "Hello."),
        "rejected": said("Hi there", "No."),
        "messages": said("Hi there", "Hello."),
        "score_chosen": 9.0,
        "score_rejected": 1.0,
    }
    sum_ = {"question": "Tim has 2 cats and gets 3. How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
    half = {
        "problem": "What is half of one?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"It is $1/2$, so $\boxed{\frac{1}{2}}$.",
    }
    dialogue = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    }
    hh = gzip.compress(json.dumps(dialogue).encode(), mtime=0)
    subjects = KNOWN["EleutherAI/hendrycks_math"].subsets
    both = {"train": "train-*", "test": "test-*"}
    return {
        "roneneldan/TinyStories": {
            "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
            "TinyStories-train.txt": b"no records",
            "data/train-00000-of-00002-2d5a.parquet": parquet([{"text": STORY}]),
            "data/train-00001-of-00002-2d5a.parquet": parquet([{"text": OTHER}]),
            "data/validation-00000-of-00001-869c.parquet": parquet([{"text": "The end came."}]),
        },
        "Salesforce/wikitext": {
            "README.md": card(
                {
                    name: {s: f"{name}/{s}-*" for s in ("test", "train", "validation")}
                    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
                }
            ),
            f"wikitext-103-raw-v1/train-{SHARD}": parquet([{"text": line} for line in wiki]),
            f"wikitext-103-raw-v1/validation-{SHARD}": parquet([{"text": " = Eels = \n"}]),
            **{
                f"{name}-raw-v1/{split}-{SHARD}": b"not read"
                for name in ("wikitext-103", "wikitext-2")
                for split in ("test", "train", "validation")
                if name == "wikitext-2" or split == "test"
            },
        },
        "HuggingFaceFW/fineweb-edu": {
            "README.md": card(
                {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}}
            ),
            "data/CC-MAIN-2013-20/000_00000.parquet": b"not read",
            "sample/10BT/000_00000.parquet": parquet(
                [{"text": STORY, "id": "1", "url": "u", "language": "en", "score": 3.1}]
            ),
        },
        "tatsu-lab/alpaca": {
            "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
            "data/train-00000-of-00001-a09b.parquet": parquet(
                [{"instruction": "Add.", "input": "2, 3", "output": "5", "text": "Below is ..."}]
            ),
        },
        "HuggingFaceTB/smoltalk": {
            "README.md": card(
                {
                    "all": {s: f"data/all/{s}-*" for s in ("train", "test")},
                    "smol-rewrite": {"train": "data/smol-rewrite/train-*"},
                }
            ),
            f"data/smol-rewrite/train-{SHARD}": b"not read",
            f"data/all/train-{SHARD}": parquet([chat]),
            f"data/all/test-{SHARD}": parquet([chat | {"messages": said("Yes?", "No.")}]),
        },
        "HuggingFaceH4/ultrachat_200k": {
            "README.md": card(
                {
                    "default": {
                        f"{side}_{kind}": f"data/{side}_{kind}-*"
                        for kind in ("sft", "gen")
                        for side in ("train", "test")
                    }
                }
            ),
            f"data/train_gen-{SHARD}": b"not read",
            f"data/test_gen-{SHARD}": b"not read",
            f"data/train_sft-{SHARD}": parquet([{"prompt": "Hi there", "prompt_id": "0", **chat}]),
            f"data/test_sft-{SHARD}": parquet(
                [{"prompt": "Yes?", "messages": said("Yes?", "No.")}]
            ),
        },
        "Anthropic/hh-rlhf": {
            "README.md": b"---\nlicense: mit\n---\n",
            "harmless-base/train.jsonl.gz": hh,
            "harmless-base/test.jsonl.gz": hh,
            "helpful-base/train.jsonl.gz": hh,
            "helpful-base/test.jsonl.gz": hh,
            "red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(b'{"transcript": "x"}'),
        },
        "HuggingFaceH4/ultrafeedback_binarized": {
            "README.md": card(
                {"default": {f"{s}_prefs": f"data/{s}_prefs-*" for s in ("train", "test")}}
            ),
            f"data/train_prefs-{SHARD}": parquet([pair]),
            f"data/test_prefs-{SHARD}": parquet([pair | {"prompt": "Yes?"}]),
        },
        "openai/gsm8k": {
            "README.md": card(
                {
                    name: {s: f"{name}/{path}" for s, path in both.items()}
                    for name in ("main", "socratic")
                }
            ),
            f"main/train-{SHARD}": parquet([sum_]),
            f"main/test-{SHARD}": parquet(
                [{"question": "What is 1 more than 1?", "answer": "#### 2"}]
            ),
        },
        "EleutherAI/hendrycks_math": {
            "README.md": card(
                {name: {s: f"{name}/{path}" for s, path in both.items()} for name in subjects}
            ),
            **{
                f"{name}/{side}-{SHARD}": parquet([half | {"problem": f"{name} {side}?"}])
                for name in subjects
                for side in both
            },
        },
    }


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    for repo, files in known_sets().items():
        hub.add(repo, files)
    with serving(hub):
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def of(repo: str, source: str, **settings) -> dict:
    return {"source": source, "path": f"hf:{repo}", **settings}


SOURCES = {
    "roneneldan/TinyStories": "corpus",
    "Salesforce/wikitext": "corpus",
    "HuggingFaceFW/fineweb-edu": "corpus",
    "tatsu-lab/alpaca": "chat",
    "HuggingFaceTB/smoltalk": "chat",
    "HuggingFaceH4/ultrachat_200k": "chat",
    "Anthropic/hh-rlhf": "preference",
    "HuggingFaceH4/ultrafeedback_binarized": "preference",
    "openai/gsm8k": "reasoning",
    "EleutherAI/hendrycks_math": "reasoning",
}


@pytest.fixture(scope="module")
def read(hub, home) -> dict[tuple[str, bool], list]:
    """The rows of both sides of each known set."""
    sides = [
        (repo, held)
        for repo in SOURCES
        for held in (False, True)
        if not held or KNOWN[repo].heldout_split
    ]
    asked = [of(repo, SOURCES[repo], heldout=held) for repo, held in sides]
    return dict(zip(sides, ask(hub, home, *asked), strict=True))


def rows(read, repo: str, heldout: bool = False) -> list[Row]:
    return [Row(row["values"], row["where"]) for row in read[repo, heldout]]


def test_each_known_set_has_a_test_and_is_pinned() -> None:
    assert set(SOURCES) == set(KNOWN)
    assert all(len(known.revision) == 40 for known in KNOWN.values())


@pytest.mark.parametrize(
    ("repo", "train", "heldout"),
    [
        ("roneneldan/TinyStories", [STORY, OTHER], ["The end came."]),
        (
            "Salesforce/wikitext",
            [
                "= Cats = \n\n Cats purr . \n = = Food = =",
                "= Dogs = \n Woof .",
            ],
            ["= Eels ="],
        ),
        ("HuggingFaceFW/fineweb-edu", [STORY], None),
    ],
)
def test_texts(read, repo, train, heldout) -> None:
    assert [document_from(row) for row in rows(read, repo)] == train
    if heldout is not None:
        assert [document_from(row) for row in rows(read, repo, True)] == heldout


@pytest.mark.parametrize(
    ("repo", "expected", "heldout"),
    [
        ("tatsu-lab/alpaca", said("Add.\n2, 3", "5"), None),
        ("HuggingFaceTB/smoltalk", ASKED, said("Yes?", "No.")),
        ("HuggingFaceH4/ultrachat_200k", ASKED, said("Yes?", "No.")),
    ],
)
def test_chats(read, repo, expected, heldout) -> None:
    (row,) = rows(read, repo)
    assert conversation_from(row).messages == expected
    assert row.unread() == []  # what nothing reads isn't there
    if heldout is not None:
        assert [conversation_from(row).messages for row in rows(read, repo, True)] == [heldout]


@pytest.mark.parametrize(
    ("repo", "prompt", "n"),
    [
        ("Anthropic/hh-rlhf", "Hi", 2),  # of two of its folders, without the attempts to harm
        ("HuggingFaceH4/ultrafeedback_binarized", "Hi there", 1),
    ],
)
def test_pairs(read, repo, prompt, n) -> None:
    pairs = [pair_from(row) for row in rows(read, repo)]
    assert [(p.messages, p.chosen, p.rejected) for p in pairs] == [
        (said(prompt), "Hello.", "No.")
    ] * n
    assert len(rows(read, repo, True)) == n


def test_problems(read) -> None:
    (problem,) = map(problem_from, rows(read, "openai/gsm8k"))
    assert problem.question == "Tim has 2 cats and gets 3. How many?"
    assert (problem.worked, problem.answer) == ("2+3=5\n#### 5", "5")
    (heldout,) = map(problem_from, rows(read, "openai/gsm8k", True))
    assert heldout.question == "What is 1 more than 1?"


def test_math(read) -> None:
    problems = [problem_from(row) for row in rows(read, "EleutherAI/hendrycks_math")]
    subjects = KNOWN["EleutherAI/hendrycks_math"].subsets
    assert [p.question for p in problems] == [f"{subject} train?" for subject in subjects]
    assert {p.answer for p in problems} == {r"\frac{1}{2}"}
    answers = ["#### 1/2", "#### 0.5", r"#### $\dfrac12$", "#### 2", r"#### \frac{2}{1}", "1/2"]
    assert verify_all(problems[:1] * len(answers), answers) == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        (r"5\sqrt{2}", r"\sqrt{50}", r"2\sqrt{5}"),
        (r"(3,\infty)", r"(3, \infty)", r"[3,\infty)"),
        (r"\text{(A)}", "A", "B"),
        (r"x^2+2x+1", r"x^2 + 2x + 1", r"x^2+2x-1"),
        (r"90^\circ", "90", "45"),
        (
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\begin{pmatrix}2\\1\end{pmatrix}",
        ),
        (r"10,\!000", "10000", "1000"),
        (r"\frac{\pi}{4}", r"\pi/4", r"\pi/2"),
        (r"1, -2", "1,-2", "-2, 1"),
    ],
)
def test_the_kinds_of_answers_of_math(expected, right, wrong) -> None:
    row = Row({"question": "What?", "answer": rf"So it is \boxed{{{expected}}}."}, "row 1")
    problem = problem_from(row)
    assert problem.answer == expected
    assert verify_all([problem] * 3, [f"#### {a}" for a in (expected, right, wrong)]) == [1, 1, 0]


def test_an_article_begins_at_its_title() -> None:
    lines = ["Text before .\n", " = A = \n", " = = A section = = \n", " = B = B = \n", "b\n"]
    found = articles([Row({"text": line}, f"row {i}") for i, line in enumerate(lines)])
    assert [(row.get("text"), row.where) for row in found] == [
        ("Text before .\n", "row 0"),
        (" = A = \n = = A section = = \n", "row 1"),
        (" = B = B = \nb\n", "row 3"),
    ]
    assert list(articles([])) == []


def test_an_error_names_the_set_and_the_row(read) -> None:
    (row,) = rows(read, "openai/gsm8k")
    assert row.where == f"hf:openai/gsm8k main/train-{SHARD}, row 1"


def test_a_second_run_makes_no_request_and_reads_only_what_it_needs(hub, tmp_path) -> None:
    wanted = of("roneneldan/TinyStories", "corpus", most=1)
    hub.requests.clear()
    (first,) = ask(hub, tmp_path, wanted)
    fetched = {request for request in hub.requests if request.endswith(".parquet")}
    assert {request.split("/")[-1] for request in fetched} == {"train-00000-of-00002-2d5a.parquet"}
    hub.requests.clear()
    assert ask(hub, tmp_path, wanted) == [first]
    assert hub.requests == []
    assert ask(hub, tmp_path, wanted, HF_HUB_OFFLINE="1") == [first]


def test_a_mirror_is_the_same_set(hub, read, tmp_path) -> None:
    for repo, files in known_sets().items():
        for name, body in files.items():
            (path := tmp_path / "mirror" / repo / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
    data = tmp_path / "mirror" / "HuggingFaceTB" / "smoltalk" / "data"
    data.symlink_to(data.rename(tmp_path / "elsewhere"))
    asked = [
        of(repo, SOURCES[repo], heldout=held, root=str(tmp_path / "mirror")) for repo, held in read
    ]
    hub.requests.clear()
    assert ask(hub, tmp_path / "home", *asked, HF_HUB_OFFLINE="1") == list(read.values())
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["roneneldan/TinyStories", "Salesforce/wikitext"])
def test_the_held_out_split_is_what_a_corpus_holds_out(repo, read, files, tmp_path) -> None:
    for name, body in known_sets()[repo].items():
        (path := tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    corpus = data.load_corpus(files(root=str(tmp_path), corpus={"path": f"hf:{repo}"}))
    for side, heldout in ((corpus.train, False), (corpus.heldout, True)):
        assert list(side) == [document_from(row) for row in rows(read, repo, heldout)]


def test_a_mirror_of_another_commit_or_a_part_is_refused(hub, tmp_path) -> None:
    repo = tmp_path / "openai" / "gsm8k"
    for name, body in known_sets()["openai/gsm8k"].items():
        (path := repo / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    note = repo / ".cache" / "huggingface" / "download" / "main" / f"train-{SHARD}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{D}\netag\n1.0\n")
    asked = of("openai/gsm8k", "reasoning", root=str(tmp_path))
    (line,) = ask(hub, tmp_path, asked)
    pinned = KNOWN["openai/gsm8k"].revision
    again = f"hf download openai/gsm8k --repo-type dataset --revision {pinned} --local-dir {repo}"
    shard = f"data.reasoning: data.root: {repo}/main/train-{SHARD}"
    assert line == f"{shard} is of commit {D}, not {pinned}: {again}"
    tree = {
        "format_version": 1,
        "files": {n: {"size": 1, "blob_id": "0"} for n in known_sets()["openai/gsm8k"]},
    }
    (repo / ".cache" / "huggingface" / "trees").mkdir()
    (repo / ".cache" / "huggingface" / "trees" / f"{pinned}.json").write_text(json.dumps(tree))
    shutil.rmtree(repo / "main")
    (line,) = ask(hub, tmp_path, asked)
    assert line == f"{shard} is not there: {again}"
    shutil.rmtree(repo)
    (line,) = ask(hub, tmp_path, asked)
    assert line == f"data.reasoning: data.root: {repo} is not there: {again}"


def test_any_set_of_a_known_schema(hub, home) -> None:
    lines = [json.dumps({"ask": f"Say {i}", "reply": f"{i}."}) for i in range(3)]
    hub.add("me/mine", {"data/train.jsonl": "\n".join(lines).encode()})
    columns = {"instruction": "ask", "output": "reply"}
    (found,) = ask(hub, home, of(f"me/mine@{C}", "chat", columns=columns, most=2))
    assert [row["values"] for row in found] == [
        {"instruction": f"Say {i}", "output": f"{i}."} for i in range(2)
    ]


# --- errors


def test_each_error_is_a_line_that_says_what_to_do(hub, home) -> None:
    files = known_sets()["openai/gsm8k"]
    for name in ("gated", "broken", "full", "cut"):
        hub.add(f"me/{name}", files)
    hub.add("me/code", {"README.md": b"---\nlicense: mit\n---\n", "code.py": b"print()"})
    hub.add("me/other", {"train.jsonl": b'{"a": "x", "b": "y"}'})
    hub.add("me/bad", {"train.jsonl": b'{"a": "x", '})
    hub.add("me/card", {"README.md": b"---\nconfigs: [: x\n---\n", "train.jsonl": b"{}"})
    hub.add("me/zip", {"data.zip": b"PK"})
    hub.pages.add("me/page")
    hub.refused |= {"me/gated": (403, "GatedRepo"), "me/broken": (500, "")}
    lines = {
        f"me/gated@{C}": f"it is gated: accept its terms at {hub.url}/datasets/me/gated and log in",
        f"me/none@{C}": f"no such set at {hub.url}/datasets/me/none: check the name",
        f"me/mine@{D}": f"commit {D} is gone: take one from `git ls-remote https://huggingface.co/",
        f"me/code@{C}": "`datasets` can't tell its data files (No (supported) data files found",
        f"me/card@{C}": "`datasets` can't tell its data files (while parsing a flow node): use",
        f"me/zip@{C}": "`datasets` can't tell its data files (File is not a zip file): use",
        f"me/page@{C}": f"what {hub.url} answers is not a hub's: check HF_ENDPOINT and the proxy",
        "me/page": f"what {hub.url} answers is not a hub's: check HF_ENDPOINT and the proxy",
        f"me/..@{C}": "the hub has no such names (Repo id must use",
    }
    asked = [of(path, "reasoning", subset="main") for path in lines]
    hub.add("me/mine", {"data/train.jsonl": b"{}"})
    found = ask(hub, home, *asked)
    for path, line in zip(lines, found, strict=True):
        assert line.startswith(f"data.reasoning: hf:{path.split('@')[0]}: {lines[path]}"), line
        assert "\n" not in line

    gsm = "openai/gsm8k"
    found = ask(
        hub,
        home,
        of(gsm, "reasoning", subset="mian"),
        of(f"me/cut@{C}", "reasoning"),
        of(gsm, "reasoning", split="trian"),
        of(gsm, "reasoning", columns={"question": "problem"}),
        of(f"me/other@{C}", "chat", columns={"messages": "turns"}),
        of(f"me/bad@{C}", "chat"),
    )
    where = f"hf:{gsm} main/train-{SHARD}"
    assert found == [
        f"data.reasoning: hf:{gsm}: no subset 'mian': give subset=NAME, one of main, socratic",
        "data.reasoning: hf:me/cut: it has several subsets: give subset=NAME, one of main, "
        "socratic",
        f"data.reasoning: hf:{gsm}: no split 'trian': give split=NAME (held out: "
        "heldout_split=NAME), one of train, test",
        f"data.reasoning: {where}, row 1: no field 'problem' for question: it has question, answer",
        "data.chat: hf:me/other train.jsonl, line 1: no field 'turns' for messages: it has a, b",
        "data.chat: hf:me/bad train.jsonl, line 1: broken JSON (Expecting property name enclosed "
        "in double quotes): fix or remove the line",
    ]


def test_a_full_disk_and_a_broken_transfer(hub, tmp_path) -> None:
    files = known_sets()["openai/gsm8k"]
    hub.add("me/full", files)
    hub.declared[f"main/train-{SHARD}"] = 10**18
    (line,) = ask(hub, tmp_path, of(f"me/full@{C}", "reasoning", subset="main"))
    assert line.startswith(
        f"data.reasoning: hf:me/full: main/train-{SHARD} has 1,000,000,000.0 GB, and "
    )
    assert line.endswith(" GB free: make room, or set HF_HOME to a folder on another disk")
    hub.declared.clear()
    hub.add("me/cut", files)
    hub.truncated.add(f"main/train-{SHARD}")
    asked = of(f"me/cut@{C}", "reasoning", subset="main")
    (line,) = ask(hub, tmp_path, asked, quiet=False)
    assert line.startswith(f"data.reasoning: hf:me/cut: {hub.url} failed (peer closed connection")
    hub.truncated.clear()
    (again,) = ask(hub, tmp_path, asked)
    assert [row["values"]["answer"] for row in again] == ["2+3=<<2+3=5>>5\n#### 5"]


def test_a_set_without_a_commit_is_taken_at_its_latest(hub, tmp_path) -> None:
    """The same set as by its commit, after one request more; a branch likewise."""
    commit = hub.add("me/latest", known_sets()["openai/gsm8k"], commit="e" * 40)
    asked = {"subset": "main", "heldout_split": "test"}
    for path, revision in (("me/latest", None), ("me/latest@main", None), ("me/latest", "main")):
        settings = {**asked, **({"revision": revision} if revision else {})}
        (found,) = ask(hub, tmp_path / "a", of(path, "reasoning", **settings), quiet=False)
        assert [row["values"]["answer"] for row in found] == ["2+3=<<2+3=5>>5\n#### 5"]
    (by_commit,) = ask(hub, tmp_path / "a", of(f"me/latest@{commit}", "reasoning", **asked))
    assert by_commit == found
    (line,) = ask(hub, tmp_path / "b", of("me/latest@dev", "reasoning", **asked))
    assert line.startswith("data.reasoning: hf:me/latest: it has no revision dev: take one from")
    (line,) = ask(hub, tmp_path / "b", of("me/latest", "reasoning", **asked), HF_HUB_OFFLINE="1")
    assert line.startswith("data.reasoning: hf:me/latest: HF_HUB_OFFLINE is set: unset it, name")


@pytest.mark.parametrize("split", ["validation", None])
def test_both_sides_of_a_corpus_on_the_hub_are_the_set_s(files, tmp_path, split) -> None:
    """A held-out split as it is, or else a share of the records by their hash."""
    repo = tmp_path / "me" / "texts"
    repo.mkdir(parents=True)
    for name in ("train", "validation"):
        rows = [json.dumps({"text": f"{name} story {i}"}) + "\n" for i in range(60)]
        (repo / f"{name}.jsonl").write_text("".join(rows))
    settings = {"path": f"hf:me/texts@{C}", **({"heldout_split": split} if split else {})}
    corpus = data.load_corpus(files(corpus=settings, root=str(tmp_path)))
    train, heldout = set(corpus.train), set(corpus.heldout)
    both = {f"train story {i}" for i in range(60)}
    if split:
        assert train == both and heldout == {f"validation story {i}" for i in range(60)}
    else:
        assert train | heldout == both and not train & heldout and 0 < len(heldout) < 20


def test_the_commit_of_a_set_without_one_is_part_of_the_id(files, tmp_path) -> None:
    """A mirror tells it by the notes of the hub's client, else by its content."""
    repo = tmp_path / "me" / "mine"
    repo.mkdir(parents=True)
    (repo / "train.jsonl").write_text('{"prompt": "Hi", "response": "Hello."}\n')

    def digest(path):
        hub_module.pinned.cache_clear()
        config = files(chat={"path": path}, root=str(tmp_path))
        (at,) = data.fetched(config, "sft")["hub"].values()
        return data.digest(config, "sft"), at

    first = digest("hf:me/mine")
    assert first == digest("hf:me/mine") and len(first[1]) == 40
    (repo / "train.jsonl").write_text('{"prompt": "Hi", "response": "Bye."}\n')
    second = digest("hf:me/mine")
    assert second[0] != first[0] and second[1] != first[1]
    note = repo / ".cache" / "huggingface" / "download" / "train.jsonl.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{C}\n1\n")
    assert digest("hf:me/mine") == digest(f"hf:me/mine@{C}")


def test_no_hub(tmp_path) -> None:
    with serving(hub := Hub()):
        pass  # its port is closed now
    asked = of("openai/gsm8k", "reasoning")
    mirror = (
        "get it elsewhere with `hf download openai/gsm8k --repo-type dataset --revision "
        f"{KNOWN['openai/gsm8k'].revision} --local-dir FOLDER/openai/gsm8k` and set "
        "data.root=FOLDER"
    )
    (line,) = ask(hub, tmp_path, asked, quiet=False)
    assert line.startswith(f"data.reasoning: hf:openai/gsm8k: {hub.url} can't be reached (")
    assert line.endswith(f"): try again, or {mirror}")
    (line,) = ask(hub, tmp_path, asked, HF_HUB_OFFLINE="1")
    assert line == (
        "data.reasoning: hf:openai/gsm8k: not in the cache, and HF_HUB_OFFLINE is set: unset it, "
        f"or {mirror}"
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"path": "hf:gsm8k"}, "path: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
        ({"path": "hf:me/mine@"}, "path: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
        ({"path": f"hf:me/mine@{C}", "revision": C}, "revision: .* names one already"),
        ({"path": ["hf:openai/gsm8k"]}, "path: name one set on the hub alone"),
        ({"path": "a.jsonl", "split": "train"}, "split: only for a set on the hub"),
        ({"path": "hf:openai/gsm8k", "split": "test"}, "split: 'test' is the held-out split too"),
        ({"path": "a.jsonl", "heldout_path": "hf:openai/gsm8k"}, "heldout_path: expected files"),
        (
            {"path": "hf:openai/gsm8k", "heldout_path": "a", "heldout_split": "test"},
            "heldout_split: heldout_path is given too",
        ),
    ],
)
def test_settings_that_make_no_sense(files, settings, line) -> None:
    with pytest.raises(UserError, match=f"^data.reasoning.{line}"):
        files(reasoning=settings)


# --- identity


def test_identity_is_name_commit_and_settings(files) -> None:
    hub = {"corpus": {"path": "hf:roneneldan/TinyStories"}, "chat": {"path": "hf:tatsu-lab/alpaca"}}
    pinned = KNOWN["roneneldan/TinyStories"].revision

    def ids(**changes):
        config = files(
            **{
                k: {**hub.get(k, {}), **v} if isinstance(v, dict) else v
                for k, v in (hub | changes).items()
            }
        )
        return data.digest(config, "pretrain"), data.digest(config, "sft")

    before = ids()
    same = ids(
        root="/a/mirror", corpus={"path": f"hf:roneneldan/TinyStories@{pinned}", "split": "train"}
    )
    assert same == before
    for settings in (
        {"revision": C},
        {"split": "validation", "heldout_split": "train"},
        {"max_records": 5},
        {"columns": {"text": "text"}},
    ):
        pretrain, sft = ids(corpus=settings)
        assert pretrain != before[0] and sft == before[1]
    pretrain, sft = ids(chat={"max_answer_chars": 9})
    assert pretrain == before[0] and sft != before[1]
    assert ids(heldout=0.2) != before


def test_ids_of_sets_on_the_hub_survive_growth() -> None:
    from tests.data.conftest import make

    stages = ("pretrain", "sft", "reward", "ppo", "grpo")
    found = " ".join(data.digest(make("public"), stage) for stage in stages)
    assert found == "3ece5020694d d503836771ab 3912a704169d 3912a704169d 34d45ee07a57"


def test_files_beside_a_set_count_by_their_contents(files, tmp_path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"prompt": "Hi", "response": "Hello."}\n')
    settings = {"chat": {"path": str(path)}, "reasoning": {"path": "hf:openai/gsm8k"}}
    before = data.digest(files(**settings), "sft")
    other = path.rename(tmp_path / "other.jsonl")
    same = settings | {"chat": {"path": str(other)}}
    assert data.digest(files(**same), "sft") == before
    other.write_text('{"prompt": "Hi", "response": "Bye."}\n')
    assert data.digest(files(**same), "sft") != before


def test_other_held_out_prompts_are_told(files) -> None:
    chat = {"path": "hf:tatsu-lab/alpaca"}
    config = files(chat=chat, reasoning={"path": "hf:openai/gsm8k"})
    record = {
        "stage": "sft",
        "data": {"digest": data.digest(config, "sft"), **data.fetched(config, "sft")},
    }
    assert data.other_source(config, record) is None
    other = files(chat=chat, reasoning={"path": "hf:EleutherAI/hendrycks_math"})
    assert data.digest(other, "sft") == record["data"]["digest"]
    assert data.other_source(other, record) == "other held-out prompts were taken out of its chat"


def test_a_source_that_is_missing_is_told_before_anything_is_fetched(files) -> None:
    config = files(chat={"path": "hf:tatsu-lab/alpaca"})
    with pytest.raises(UserError, match="stages.pretrain needs data.corpus.path=FILE"):
        data.digest(config, "pretrain")


def test_max_records_of_files(files, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    empty = [{"question": "", "answer": "#### 1"}]
    records = empty + [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = files(reasoning={"path": str(path), "max_records": 30})
    problems = data.load_reasoning(config)
    assert (
        len(problems.train)
        + len(problems.heldout)
        + problems.notes["dropped_with_a_heldout_prompt"]
        == 30
    )
    assert problems.notes["unusable_empty_text"] == 1


# --- the whole ladder


def small_public(n: int = 40) -> dict[str, dict[str, bytes]]:
    """The sets of data=public with short records. The chats and the stories ask some of gsm8k's
    test questions, which no stage may train on."""
    files = known_sets()

    def problem(i: int) -> dict[str, str]:
        return {
            "question": f"What is {i} more than {i}?",
            "answer": f"{i}+{i}={2 * i}\n#### {2 * i}",
        }

    def pair(i: int) -> dict[str, Any]:
        prompt = f"Say the number {i}"
        return {
            "prompt": prompt,
            "chosen": said(prompt, f"It is {i}."),
            "rejected": said(prompt, "No."),
        }

    stories = [{"text": f"{STORY} It had {i} toys and was glad. " * 3} for i in range(n)]
    stories += [{"text": f"Mom said: {problem(i)['question']}"} for i in range(n, n + 5)]
    chats = [{"messages": said(f"Say {i} please", f"It is {i}.")} for i in range(n)]
    chats += [{"messages": said(problem(i)["question"], str(2 * i))} for i in range(n, n + 5)]
    gsm8k, talk = files["openai/gsm8k"], files["HuggingFaceTB/smoltalk"]
    feedback, tales = (
        files["HuggingFaceH4/ultrafeedback_binarized"],
        files["roneneldan/TinyStories"],
    )
    gsm8k[f"main/train-{SHARD}"] = parquet([problem(i) for i in range(n)])
    gsm8k[f"main/test-{SHARD}"] = parquet([problem(i) for i in range(n, n + 10)])
    talk[f"data/all/train-{SHARD}"] = parquet(chats)
    talk[f"data/all/test-{SHARD}"] = parquet(
        [{"messages": said("Say hello to Tim", "Hello, Tim.")}]
    )
    feedback[f"data/train_prefs-{SHARD}"] = parquet([pair(i) for i in range(n)])
    feedback[f"data/test_prefs-{SHARD}"] = parquet([pair(i) for i in range(n, n + 10)])
    tales["data/train-00000-of-00002-2d5a.parquet"] = parquet(stories[: n // 2])
    tales["data/train-00001-of-00002-2d5a.parquet"] = parquet(stories[n // 2 :])
    tales["data/validation-00000-of-00001-869c.parquet"] = parquet([{"text": f"{OTHER} " * 20}] * 3)
    return files


def long_public() -> dict[str, dict[str, bytes]]:
    """The sets of data=public with records as long as the real ones: most don't fit into the limits
    of debug=fast."""
    files, n = small_public(), 200
    words = ("the", "a", "big", "red", "dog", "cat", "ran", "sat", "to", "of", "and", "was", "glad")

    def text(size: int, i: int) -> str:
        """About `size` characters, other ones for each i."""
        draw = random.Random(f"{size} {i}")
        return " ".join(draw.choices(words, k=size // 4)).capitalize() + "."

    def chat(i: int) -> dict[str, Any]:
        size = i % 50
        texts = (text(40 + 9 * size, i), text(60 + 60 * size, -i))
        return {"messages": said(*texts, *texts[: 2 * (i % 2)])}

    def pair(i: int) -> dict[str, Any]:
        size = i % 50
        prompt = text(50 + 40 * size, i)
        chosen, rejected = (said(prompt, text(100 + 50 * size, -i - side)) for side in (0, 1000))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def problem(i: int) -> dict[str, str]:
        question = f"Tim has {i} cats. {text(60 + 6 * (i % 50), i)} How many are {i} more?"
        return {"question": question, "answer": f"{text(250, i)}\n{i}+{i}={2 * i}\n#### {2 * i}"}

    for repo, train, held, make in (
        ("HuggingFaceTB/smoltalk", "data/all/train", "data/all/test", chat),
        ("HuggingFaceH4/ultrafeedback_binarized", "data/train_prefs", "data/test_prefs", pair),
        ("openai/gsm8k", "main/train", "main/test", problem),
    ):
        files[repo][f"{train}-{SHARD}"] = parquet([make(i) for i in range(n)])
        files[repo][f"{held}-{SHARD}"] = parquet([make(i) for i in range(n, n + 40)])
    tales = files["roneneldan/TinyStories"]
    stories = [{"text": f"{STORY} {text(900, i)}"} for i in range(2 * n)]
    tales["data/train-00000-of-00002-2d5a.parquet"] = parquet(stories[:n])
    tales["data/train-00001-of-00002-2d5a.parquet"] = parquet(stories[n:])
    return files


WORDS = ("stage=grpo", "model=moe_nano", "debug=fast", "logger=none", "trainer=cpu")


def train(hub: Hub, home: Path, *words: str, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *WORDS, *words]
    environ = environment(hub, home, **changes)
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_whole_ladder(tmp_path) -> None:
    """From stand-ins of the sets of data=public; what is held out is in no source; a second ladder
    makes no request, and neither does a plan."""
    hub = Hub()
    for repo, files in small_public().items():
        hub.add(repo, files)
    with serving(hub):
        out = f"outputs={tmp_path / 'outputs'}"
        words = (out, "data=public")
        planned = train(hub, tmp_path / "home", *words, "ancestors=require")
        assert "ancestors=require: pretrain, sft, reward, ppo must be trained" in planned.stderr
        assert hub.requests == []
        done = train(hub, tmp_path / "home", *words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "%|" not in done.stderr
        assert hub.requests
        hub.requests.clear()
        other = train(hub, tmp_path / "home", *words, "seed=1")
        assert other.returncode == 0, other.stderr[-2000:]
        assert hub.requests == []
    records = {
        record["stage"]: record
        for path in (tmp_path / "outputs" / "runs").glob("*/run.json")
        if (record := json.loads(path.read_text()))["config"]["seed"] == 0
    }
    assert (
        list(map(records.__contains__, ("pretrain", "sft", "reward", "ppo", "grpo"))) == [True] * 5
    )
    assert records["pretrain"]["cost"]["data_paragraphs_dropped_with_a_heldout_prompt"] == 5
    assert records["sft"]["cost"]["data_dropped_from_train_as_heldout"] == 5
    assert "heldout" in records["grpo"]["data"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("data=public", "tokenizer=bpe"), ("data=public",), ("experiment=tinystories_gpu",)]
)
def test_ladders_on_records_of_real_lengths(tmp_path, words) -> None:
    """Each limit loses records and leaves some."""
    hub, outputs = Hub(), tmp_path / "outputs"
    for repo, files in long_public().items():
        hub.add(repo, files)
    with serving(hub):
        done = train(hub, tmp_path / "home", *words, f"outputs={outputs}")
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(path.read_text()) for path in (outputs / "runs").glob("*/run.json")]
    assert len(records) == 5
    cost = {record["stage"]: record["cost"] for record in records}
    assert cost["sft"]["data_train_rows"] >= 4 and cost["reward"]["data_train_rows"] >= 4
    assert cost["reward"]["data_train_dropped"] > 0
    if "data=public" not in words:
        (kept,) = (outputs / "data").glob("*/index.json")
        assert json.loads(kept.read_text())["vocab_size"] <= 4096

"""Sets on the hub: the real client against a stand-in on loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fourstage import data
from fourstage.data.files import Row
from fourstage.data.known_sets import KNOWN, articles
from fourstage.data.schemas import conversation_from, document_from, pair_from, problem_from
from fourstage.data.verify import verify_all
from tests.data.hub_sets import ASKED, OTHER, SHARD, STORY, C, D, known_sets
from tests.stand_in_hub import Hub, ask, said, serving


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


def test_no_hub(tmp_path) -> None:
    with serving(hub := Hub()):
        assert hub.url
    # its port is closed now
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

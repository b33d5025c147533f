"""Votes are on the disk before they count: several voters, crashes, full disks, edited files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fourstage.arena.votes import Side, Vote, Votes, wins

MANY = """
import sys
from pathlib import Path
from tests.arena.test_votes import vote
from fourstage.arena.votes import Votes
votes, who = Votes(Path(sys.argv[1])), sys.argv[2]
for i in range(int(sys.argv[3])):
    votes.add(vote(f"{who}-{i}", answer="x" * 500))
    if who == "undoes":
        assert votes.undo(f"{who}-{i}")
"""


def side(run: str = "sft-aaaaaaaaaa", answer: str = "An answer.", **changes) -> Side:
    options = {"stopped": True, "seed": 3, "temperature": 0.7, "max_new_tokens": 200}
    return Side(run=run, answer=answer, **{**options, **changes})


def vote(vote_id: str = "v1", choice="left", answer: str = "Left.", **changes) -> Vote:
    options = {"voted": "2026-11-29T12:00:00+00:00", "prompt": "What is a vote?"}
    sides = {"left": side(answer=answer), "right": side("ppo-bbbbbbbbbb", "Right.")}
    return Vote(id=vote_id, choice=choice, **{**options, **sides, **changes})


def ids(votes: Votes) -> list[str]:
    return [one.id for one in votes.read()[0]]


@pytest.fixture
def votes(tmp_path) -> Votes:
    return Votes(tmp_path / "outputs" / "arena" / "votes.jsonl")


# --- a line


def test_a_line_is_a_pair_and_says_who_was_who(votes):
    long = vote("v2", "right", "Left an", left=side(answer="Left an", stopped=False))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    turns = vote("v3", "tie", prompt=[*chat, {"role": "user", "content": "你好\u2028"}])
    for one in (vote(), long, turns):
        votes.add(one)
    lines = [json.loads(line) for line in votes.path.read_bytes().split(b"\n")[:-1]]
    settings = {"seed": 3, "temperature": 0.7, "max_new_tokens": 200}
    assert lines[0] == {
        "prompt": "What is a vote?",
        "chosen": "Left.",
        "rejected": "Right.",
        "unfinished": [],
        "arena": {
            "id": "v1",
            "voted": "2026-11-29T12:00:00+00:00",
            "choice": "left",
            "left": {"run": "sft-aaaaaaaaaa", "answer": "Left.", "stopped": True, **settings},
            "right": {"run": "ppo-bbbbbbbbbb", "answer": "Right.", "stopped": True, **settings},
        },
    }
    said = {name: lines[1][name] for name in ("chosen", "rejected", "unfinished")}
    assert said == {"chosen": "Right.", "rejected": "Left an", "unfinished": ["rejected"]}
    said = {name: lines[2][name] for name in ("chosen", "rejected", "unfinished")}
    assert said == {"chosen": None, "rejected": None, "unfinished": []}
    assert votes.read() == ([vote(), long, turns], 0)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\r\n\u2028\x00\x7f", "🦊", ' "} \\', ""])
def test_any_text_is_kept(votes, text):
    one = vote(answer=text, prompt=text)
    votes.add(one)
    votes.add(vote("next"))
    assert votes.read() == ([one, vote("next")], 0)
    assert votes.undo("next") and votes.read() == ([one], 0)


# --- other voters, and crashes


def start(votes: Votes, who: str, n: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", MANY, str(votes.path), who, str(n)])


def test_voters_at_once_lose_nothing(votes):
    """Eight processes vote fifty times each, beside one that takes each of its own back."""
    running = [start(votes, str(i), 50) for i in range(8)] + [start(votes, "undoes", 20)]
    assert [one.wait() for one in running] == [0] * len(running)
    found, broken = votes.read()
    assert broken == 0
    assert sorted(v.id for v in found) == sorted(f"{i}-{k}" for i in range(8) for k in range(50))
    assert [v.id for v in found if v.id.startswith("3-")] == [f"3-{k}" for k in range(50)]


def test_tabs_of_one_page_lose_nothing(votes):
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(votes.add, vote(str(i))) for i in range(80)]
        gone = [pool.submit(votes.undo, "7") for _ in range(3)]
    assert [one.result() for one in done] == [None] * 80
    expected = {str(i) for i in range(80)} - ({"7"} if any(x.result() for x in gone) else set())
    assert len(ids(votes)) == len(expected) and set(ids(votes)) == expected


def test_a_killed_voter_loses_no_vote_of_others(votes):
    votes.add(vote("first"))
    for _ in range(3):
        one = start(votes, "killed", 10_000)
        there = len(ids(votes))
        while len(ids(votes)) < there + 5:
            time.sleep(0.01)
        one.send_signal(signal.SIGKILL)
        one.wait()
        votes.add(vote(f"after-{there}"))  # the lock is free again
    found, broken = votes.read()
    assert broken == 0 and found[0].id == "first" and found[-1].id.startswith("after-")


@pytest.mark.parametrize("n", [0, 1, 30, -2])
def test_half_a_line_is_no_vote_and_is_repaired(votes, n):
    votes.add(vote("whole"))
    whole = votes.path.read_bytes()
    votes.add(vote("half", answer="é" * 100_000))
    half = votes.path.read_bytes()[len(whole) :][:n] or b"\0" * 9
    votes.path.write_bytes(whole + half)
    assert ids(votes) == ["whole"]
    assert not votes.undo("half")
    votes.add(vote("next"))
    assert ids(votes) == ["whole", "next"]
    assert votes.path.read_bytes().startswith(whole + b'{"prompt"')


def test_only_the_end_of_a_long_file_is_read(votes, monkeypatch):
    votes.add(vote())
    line = votes.path.read_bytes()
    votes.path.write_bytes(line * 100_000)
    read = 0
    original = open

    def counting(path, mode="r", **options):
        file = original(path, mode, **options)
        if Path(path) != votes.path:
            return file

        class Counting:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def read(self, n=-1):
                nonlocal read
                found = file.read(n)
                read += len(found)
                return found

        return Counting()

    monkeypatch.setattr("builtins.open", counting)
    votes.add(vote("last"))
    monkeypatch.undo()
    assert 0 < read < 100_000
    assert votes.path.stat().st_size > len(line) * 100_000
    assert votes.undo("last") and votes.path.stat().st_size == len(line) * 100_000


def test_a_full_disk_leaves_the_file_as_it_was(votes):
    """The file may not grow past its limit: the write is cut short, as on a full disk."""
    votes.add(vote("first"))
    before = votes.path.read_bytes()
    code = f"""
import resource, signal
from pathlib import Path
from tests.arena.test_votes import vote
from fourstage.arena.votes import Votes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, resource.RLIM_INFINITY))
votes = Votes(Path({str(votes.path)!r}))
for do in (lambda: votes.add(vote("second", answer="x" * 100_000)),
           lambda: votes.add(vote("third"))):
    try:
        do()
    except OSError as error:
        print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n" * 2
    assert votes.path.read_bytes() == before
    votes.add(vote("fourth"))
    assert ids(votes) == ["first", "fourth"]


def test_a_full_disk_at_undo_leaves_the_file_as_it_was(votes):
    for i in range(3):
        votes.add(vote(f"v{i}"))
    before = votes.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        with pytest.raises(OSError, match="File too large"):
            votes.undo("v0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert votes.path.read_bytes() == before
    assert [p.name for p in votes.path.parent.glob("*votes*") if "lock" not in p.name] == [
        "votes.jsonl"
    ]


def test_a_vote_and_its_name_are_synced(votes, monkeypatch):
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        found = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((found.name, found.stat().st_size if found.is_file() else 0))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    votes.add(vote())
    size = votes.path.stat().st_size
    assert synced == [("votes.jsonl", size), ("arena", 0), ("outputs", 0)]
    synced.clear()
    votes.undo("v1")
    assert synced[0][0].startswith(".votes.jsonl.") and synced[1] == ("arena", 0)


# --- undo, and files that people have edited


def test_undo_takes_back_any_vote(votes):
    for i in range(4):
        votes.add(vote(f"v{i}"))
    assert votes.undo("v3") and ids(votes) == ["v0", "v1", "v2"]
    assert votes.undo("v1") and ids(votes) == ["v0", "v2"]
    assert not votes.undo("v1") and ids(votes) == ["v0", "v2"]
    votes.add(vote("v1"))
    assert ids(votes) == ["v0", "v2", "v1"]


def test_without_a_file_there_is_no_vote(votes):
    assert votes.read() == ([], 0)
    assert not votes.undo("v1")


@pytest.mark.parametrize(
    "without_end", [b'{"prompt": "q2", "chosen": "a", "rejected": "b"}', b"garbage", b" \t"]
)
def test_lines_that_people_wrote_stay(votes, without_end):
    row = json.dumps(vote("edited").row).encode()
    other = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\r\n'
    odd = [b"\r\n", b"\n", b"garbage \xff\xfe\n", b"[1, 2]\n", b"null\n", b'{"arena": 5}\n', other]
    votes.path.parent.mkdir(parents=True)
    votes.path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + b"".join(odd) + without_end)
    assert votes.read() == ([vote("edited")], 5 + bool(without_end.strip()))
    votes.add(vote("new"))
    assert ids(votes) == ["edited", "new"]
    assert votes.undo("edited")
    lines = votes.path.read_bytes()
    assert lines.startswith(b"".join(odd) + without_end + b'\n{"prompt"')
    assert votes.undo("new")
    assert votes.path.read_bytes() == b"".join(odd) + without_end + b"\n"


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "up"},
        {"extra": 1},
        {"left": None},
        {"left": {"run": "sft"}},
        {"id": 5},
        {"choice": ["left"]},
    ],
)
def test_a_vote_of_another_version_is_counted_as_none(votes, change):
    row = vote().row
    row["arena"] |= change
    votes.path.parent.mkdir(parents=True)
    votes.path.write_text(json.dumps(row) + "\n" + "[" * 100_000 + "\n")
    assert votes.read() == ([], 2)


def test_a_link_stays_a_link(votes, tmp_path):
    real = tmp_path / "disk" / "mine.jsonl"
    real.parent.mkdir()
    votes.path.parent.mkdir(parents=True)
    votes.path.symlink_to(real)
    votes.add(vote("v1"))
    votes.add(vote("v2"))
    Votes(real).add(vote("v3"))
    assert votes.undo("v1") and votes.path.is_symlink()
    assert ids(votes) == ids(Votes(real)) == ["v2", "v3"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nobody_may_write(votes):
    votes.add(vote("v1"))
    votes.path.parent.chmod(0o500)
    votes.path.chmod(0o400)
    try:
        for change in (lambda: votes.add(vote("v2")), lambda: votes.undo("v1")):
            with pytest.raises(PermissionError):
                change()
    finally:
        votes.path.parent.chmod(0o700)
    assert ids(votes) == ["v1"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(OSError):
        Votes(tmp_path / "outputs" / "votes.jsonl").add(vote())


# --- who won


def test_wins_count_ties_as_half_and_no_duel_with_oneself():
    cast = [vote("1", "left"), vote("2", "right"), vote("3", "tie"), vote("4", "both_bad")]
    cast.append(vote("5", "left", right=side()))
    swapped = {"left": side("ppo-bbbbbbbbbb"), "right": side()}
    cast.append(vote("6", "right", **swapped))
    sft, ppo = "sft-aaaaaaaaaa", "ppo-bbbbbbbbbb"
    assert wins(cast) == {(sft, ppo): 3.0, (ppo, sft): 2.0}

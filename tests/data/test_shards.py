"""Tokens on disk: written once, the same for every reader, whole after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fourstage import data
from fourstage.data import corpus as corpus_module
from fourstage.data import files as files_module
from fourstage.data import shards, workers
from fourstage.data.__main__ import main
from fourstage.data.heldout import split_chats
from fourstage.data.keys import keys_of
from fourstage.data.shards import tokenized
from fourstage.errors import UserError
from fourstage.tokenizer import Tokenizer
from tests.data.conftest import make

TOK = Tokenizer.char()
TEXT = "".join(f"Paragraph {i} says {i * i}.\nAnd more.\n\n" for i in range(400))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return data.load_corpus(make("files", corpus={"path": str(path)}))


def ids_of(documents):
    return [i for text in documents for i in (TOK.bos_id, *TOK.encode(text))]


def folder_of(outputs):
    (folder,) = shards.folders(outputs)
    return folder


def test_the_files_hold_the_documents(corpus, tmp_path):
    tokens = tokenized(corpus, TOK, tmp_path)
    for side, documents in ((tokens.train, corpus.train), (tokens.heldout, corpus.heldout)):
        assert side.read(0, len(side)).tolist() == ids_of(documents)
        assert side.characters == sum(map(len, documents)) and side.unknown == 0
    assert {part.dtype for part in tokens.train.parts} == {np.dtype(np.uint16)}
    index = json.loads((folder_of(tmp_path) / "index.json").read_text())
    assert index["corpus"] == corpus.digest and index["train"]["tokens"] == len(tokens.train)


@pytest.mark.parametrize("size", [1, 1000, 4096, 12_000])
def test_files_of_any_size_hold_the_same(corpus, tmp_path, monkeypatch, size):
    monkeypatch.setattr(shards, "SHARD", size * (1 if size > 1 else 100))
    tokens = tokenized(corpus, TOK, tmp_path)
    assert tokens.train.read(0, len(tokens.train)).tolist() == ids_of(corpus.train)
    assert max(map(len, tokens.train.parts)) <= shards.SHARD


@pytest.mark.parametrize("most", [1, 17, 10**9])
def test_max_tokens_keeps_the_first_ones(tmp_path, most):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    whole = data.load_corpus(make("files", corpus={"path": str(path)}))
    some = data.load_corpus(make("files", corpus={"path": str(path), "max_tokens": most}))
    assert some.digest != whole.digest
    tokens = tokenized(some, TOK, tmp_path)
    assert tokens.train.read(0, 10**9).tolist() == ids_of(whole.train)[:most]
    assert tokens.heldout.read(0, 10**9).tolist() == ids_of(whole.heldout)


def test_max_heldout_limits_every_kind_of_heldout_side(tmp_path):
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(TEXT)
    rows.write_text("".join(json.dumps({"text": p}) + "\n" for p in TEXT.split("\n\n")[:-1]))
    for changes in (
        {"path": str(text)},
        {"path": str(text), "heldout_path": str(text)},
        {"path": str(rows)},
        {"path": str(rows), "heldout_path": str(rows)},
    ):
        most = 600 if changes["path"] == str(text) or len(changes) > 1 else 900  # by hash: about
        found = data.load_corpus(make("files", corpus={**changes, "max_heldout": 600}))
        assert 300 < found.heldout.characters <= most
        if "heldout_path" not in changes:
            kept = sum(map(len, [*found.train, *found.heldout]))
            assert kept == (len(TEXT) if changes["path"] == str(text) else len(TEXT) - 800)


def test_a_part_of_which_nothing_is_left_does_not_end_the_text(tmp_path, monkeypatch):
    """A long line with a held-out prompt goes as a whole; what follows it must stay."""
    prompt = "how many apples does the old man eat on every day of may"
    (tmp_path / "chats.jsonl").write_text(
        "".join(
            json.dumps({"prompt": text, "response": "Three."}) + "\n"
            for text in (f"{prompt} {i}" for i in range(40))
        )
    )
    line = "one two three four five six seven " * 100
    path = tmp_path / "text.txt"
    chats = {"path": str(tmp_path / "chats.jsonl")}
    config = make("files", corpus={"path": str(path)}, chat=chats)
    held = split_chats(config).heldout[0].messages[0]["content"]
    path.write_text(line + held + " " + line)
    monkeypatch.setattr(files_module.cut, "__defaults__", (500,))
    monkeypatch.setattr(corpus_module, "PIECE", 1)
    corpus = data.load_corpus(config)
    assert corpus.notes["paragraphs_dropped_with_a_heldout_prompt"]
    tokens = tokenized(corpus, TOK, tmp_path).train
    assert tokens.characters == corpus.train.characters > 5000
    assert tokens.read(0, 10**9).tolist() == ids_of(corpus.train)


def test_a_file_that_changes_meanwhile_is_not_kept(corpus, tmp_path, monkeypatch):
    path, write_side = tmp_path / "text.txt", shards.write_side

    def changing(*arguments):
        path.write_text(TEXT.replace("more", "less"))
        return write_side(*arguments)

    monkeypatch.setattr(shards, "write_side", changing)
    with pytest.raises(UserError, match="a file has changed while it was read"):
        tokenized(corpus, TOK, tmp_path)
    assert not shards.folders(tmp_path) and not list((tmp_path / "data").glob(".*part*"))
    monkeypatch.setattr(shards, "write_side", write_side)
    again = data.load_corpus(corpus.train.config)
    assert again.digest != corpus.digest
    tokenized(again, TOK, tmp_path)


def test_a_corpus_is_written_once(corpus, tmp_path, monkeypatch):
    tokenized(corpus, TOK, tmp_path)
    monkeypatch.setattr(shards, "write", None)
    tokenized(corpus, TOK, tmp_path)


def test_two_jobs_write_once(corpus, tmp_path, monkeypatch):
    written, write = [], shards.write

    def slow(*arguments):
        written.append(arguments)
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(shards, "write", slow)
    found = []
    jobs = [
        threading.Thread(target=lambda: found.append(tokenized(corpus, TOK, tmp_path)))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(written) == 1 and len(found) == 3


def test_a_job_that_waits_says_so(corpus, tmp_path, capsys):
    tokenized(corpus, TOK, tmp_path)
    folder = folder_of(tmp_path)
    with shards.lock(folder):
        job = threading.Thread(target=tokenized, args=(corpus, TOK, tmp_path))
        job.start()
        time.sleep(0.2)
    job.join()
    said = f"waiting for the tokens in {folder}, which another process is writing"
    assert said in capsys.readouterr().out


def damage(folder):
    path = folder / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def shorten(folder):
    path = folder / "heldout-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])


def without_dtype(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({k: index[k] for k in index if k != "dtype"}))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (damage, "train-00000.bin is damaged"),
        (shorten, "the heldout files are not of the size that was written"),
        (lambda folder: (folder / "index.json").write_text("{"), "not complete"),
        (without_dtype, "not complete"),
        (lambda folder: (folder / "checked.json").write_text("[1]") and damage(folder), "damaged"),
        (lambda folder: (folder / "train-00000.bin").unlink(), "not complete"),
        (lambda folder: (folder / "index.json").unlink(), "not complete"),
    ],
)
def test_what_is_damaged_is_written_again(corpus, tmp_path, capsys, harm, why):
    tokenized(corpus, TOK, tmp_path)
    before = {path.name: path.read_bytes() for path in folder_of(tmp_path).glob("*.bin")}
    harm(folder_of(tmp_path))
    tokenized(corpus, TOK, tmp_path)
    assert why in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in folder_of(tmp_path).glob("*.bin")} == before


def test_a_copied_folder_is_compared_once(corpus, tmp_path, monkeypatch):
    tokenized(corpus, TOK, tmp_path / "a")
    subprocess.run(["cp", "-r", tmp_path / "a", tmp_path / "b"], check=True)
    assert shards.fault(folder_of(tmp_path / "b")) is None
    monkeypatch.setattr(shards.hashlib, "file_digest", None)
    assert shards.fault(folder_of(tmp_path / "b")) is None


# --- pieces


@pytest.mark.parametrize("size", [10, 37, 100, 5000])
def test_pieces_do_not_change_the_text(tmp_path, monkeypatch, size):
    text = TEXT[:3000] + "x" * 500 + "\n" + "y z " * 100 + "\u4f60\u597d" * 50 + "\n\n\n\n end"
    assert "".join(files_module.cut([text], size)) == text
    pieces = list(files_module.cut(iter(text[i : i + 7] for i in range(0, len(text), 7)), size))
    assert pieces == list(files_module.cut([text], size)), "however it was read"
    assert max(map(len, pieces)) <= size
    path = tmp_path / "text.txt"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    monkeypatch.setattr(files_module, "CHUNK", size)
    assert files_module.read_text(str(path)) == text


def test_an_encoding_error_far_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "CHUNK", 16)
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 100 + b"\xe9" + b"b" * 50)
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 100\)"):
        files_module.read_text(str(path))
    path.write_bytes(b"line\n" * 30 + b"\0")
    with pytest.raises(UserError, match="line 31: a NUL character"):
        files_module.read_text(str(path))


@pytest.mark.parametrize("size", [60, 200, 1000])
def test_a_heldout_prompt_across_pieces_is_found(monkeypatch, size):
    """Wherever the text is cut: in the paragraph, between its lines, or at its blank line."""
    prompt = "How many apples does the old man eat, if he\n\neats three apples on every day of May?"
    keys = keys_of([], [prompt])
    filler = "".join(f"Filler sentence number {i}.\n\n" for i in range(40))
    for shift in range(0, size, 7):
        text = filler + "z" * shift + "\n\n" + prompt + "\n\n" + filler
        pieces = (
            corpus_module.Piece(t, i == 0) for i, t in enumerate(files_module.cut([text], size))
        )
        searched = (
            corpus_module.replace(piece, searched=True)
            for piece in corpus_module.with_context(pieces)
        )
        clean = corpus_module.cleaner(keys)(list(searched))
        left = "".join(t for _, t, _ in clean)
        assert "How many apples" not in left and "three apples" not in left
        assert left.count("Filler sentence number 3.") == 2


def test_a_scan_does_not_depend_on_the_pieces(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    config = make("files", corpus={"path": str(path)})
    whole = corpus_module.scan_corpus(config)
    monkeypatch.setattr(files_module.cut, "__defaults__", (100,))
    monkeypatch.setattr(corpus_module, "PIECE", 300)
    assert corpus_module.scan_corpus(config) == whole


def test_a_scan_of_large_files_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus_module, "REMEMBER", 100)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    config = make("files", corpus={"path": str(path)})
    scan, read = corpus_module.remembered_scan(config), corpus_module.scan_corpus
    monkeypatch.setattr(corpus_module, "scan_corpus", lambda config: None)
    assert corpus_module.remembered_scan(config) == scan
    monkeypatch.setattr(corpus_module, "scan_corpus", read)
    path.write_text(TEXT.replace("more", "less"))
    assert corpus_module.remembered_scan(config).digest != scan.digest
    other = make("files", corpus={"path": str(path), "heldout": 0.3})
    assert corpus_module.remembered_scan(other).characters != scan.characters


# --- processes


def square(exponent):
    return lambda x: (os.getpid(), x**exponent)


def test_several_processes_keep_the_order():
    found = list(workers.mapped(square, (2,), range(100)))
    assert [y for _, y in found] == [x * x for x in range(100)]
    assert len({pid for pid, _ in found}) > (len(os.sched_getaffinity(0)) > 1)


def fail(_):
    def on(x):
        if x == 30:
            raise UserError("thirty: leave it out")
        return x

    return on


def test_an_error_in_a_process_is_the_users():
    with pytest.raises(UserError, match="thirty: leave it out"):
        list(workers.mapped(fail, (0,), range(50)))


def be_killed(_):
    def on(x):
        if x == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    return on


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second core")
def test_a_killed_process_is_one_line():
    with pytest.raises(UserError, match="was killed, by the system perhaps for lack of memory"):
        list(workers.mapped(be_killed, (0,), range(50)))


def test_few_items_need_no_process(monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    assert len(list(workers.mapped(square, (1,), range(workers.FEW)))) == workers.FEW


def test_processes_encode_as_one_does(tmp_path, monkeypatch):
    """With special tokens in the text, which stay text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "<eot><user>" * 20 + TEXT)
    corpus = data.load_corpus(make("files", corpus={"path": str(path)}))
    alone = tokenized(corpus, TOK, tmp_path / "a").train
    monkeypatch.setattr(files_module.cut, "__defaults__", (500,))
    monkeypatch.setattr(corpus_module, "PIECE", 500)
    several = tokenized(corpus, TOK, tmp_path / "b").train
    assert several.read(0, 10**9).tolist() == alone.read(0, 10**9).tolist()


KILLED = """
import sys, time
from pathlib import Path
from fourstage import data
from fourstage.data import corpus, files, shards
from fourstage.tokenizer import Tokenizer
from tests.data.conftest import make

if __name__ == "__main__":
    path, outputs, slow = sys.argv[1:]
    files.cut.__defaults__, corpus.PIECE = (500,), 500
    found = data.load_corpus(make("files", corpus={"path": path}))
    if slow == "slow":
        write = shards.write_side

        def slowly(folder, name, encoded, *more):
            return write(folder, name, (time.sleep(0.05) or part for part in encoded), *more)

        shards.write_side = slowly
    print("begins", flush=True)
    shards.tokenized(found, Tokenizer.char(), Path(outputs))
"""


def test_a_kill_while_tokenizing_leaves_nothing_half_written(tmp_path):
    """Nor a process: the workers of a killed parent end."""
    (tmp_path / "text.txt").write_text(TEXT)
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path / "text.txt"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    job = subprocess.Popen(
        [*command, "slow"], stdout=subprocess.PIPE, text=True, env=environment, cwd=os.getcwd()
    )
    assert job.stdout.readline() == "begins\n"
    data_folder = tmp_path / "out" / "data"
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size > 2000 for p in data_folder.glob(".*.part/train-*.bin")):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    workers_of = children.read_text().split() if children.exists() else []
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not shards.folders(tmp_path / "out")
    subprocess.run([*command, "fast"], check=True, env=environment, capture_output=True)
    folder = folder_of(tmp_path / "out")
    assert {p.name for p in data_folder.iterdir()} == {folder.name, f".{folder.name}.lock"}
    calm = tmp_path / "calm"
    tokenized(
        data.load_corpus(make("files", corpus={"path": str(tmp_path / "text.txt")})), TOK, calm
    )
    for path in folder_of(calm).glob("*.bin"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    while any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in workers_of):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


# --- the command


def test_the_command_lists_checks_and_removes(corpus, tmp_path, capsys):
    options = [f"outputs={tmp_path}"]
    main(options)
    assert "no tokens yet" in capsys.readouterr().out
    tokenized(corpus, TOK, tmp_path)
    name = folder_of(tmp_path).name
    main(options)
    said = capsys.readouterr().out
    assert name in said and "text.txt" in "".join(said.split()) and "103 tokens" in said
    main(["check", *options])
    assert f"{name}: as it was written" in capsys.readouterr().out
    damage(folder_of(tmp_path))
    with pytest.raises(UserError, match=f"{name}: remove what is damaged"):
        main(["check", *options])
    with pytest.raises(UserError, match="has no 'nope'"):
        main(["rm", "nope", *options])
    with shards.lock(folder_of(tmp_path)), pytest.raises(UserError, match="wait for it"):
        main(["rm", name, *options])
    for content in ("{", "[]", '{"corpus": "x"}'):
        (folder_of(tmp_path) / "index.json").write_text(content)
        main(options)
        assert "not complete" in capsys.readouterr().out
    main(["rm", "all", *options])
    assert not shards.folders(tmp_path)
    for wrong in (["rm"], ["list", "x"], ["show"], ["check", "x=y"]):
        with pytest.raises(UserError, match="usage|unknown option"):
            main([*wrong, *options])

"""A seeded fuzzer of the command line, of run folders and of data files.

    python -m tests.fuzz [cases=300] [seed=0] [kinds=settings,runs,files] [at_once=2]

    settings  train.py with one to three odd values, over every key of the config
    runs      a command over a ladder of which one file was damaged
    files     a stage on the user's file, of every schema, in which something is wrong

Each case has to finish (exit 0, finite weights, strict JSON) or to end in one line (exit 1 or 2),
within LIMIT seconds. Cases are forked from this process, which has imported all that is slow.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).parent.parent
LIMIT = 60.0  # seconds a case
MEMORY = 12 * 2**30  # bytes of address space a case
STAGES = ("pretrain", "sft", "reward", "ppo", "grpo")
BASE = ("model=moe_nano", "debug=fast", "logger=none", "trainer=cpu")

# Values that a typo, a script or a sweep may hand over: small or absurd, as merely large ones may
# run for hours.
# fmt: off
WHOLE = ("0", "-1", "1", "2", "3", "5", "8", "30", "33")
REAL = ("-1", "-0.0", "0", "1e-40", "1e-9", "0.1", "0.5", "1", "1.5", "7", "100", "1e30", "1e38")
ABSURD = ("1" + "0" * 20, "-9223372036854775809", "1e38", "1e400", "inf", "nan")
WORDS = (
    "text", "'a b'", "é", "../../x", "x" * 5000, "00:00:00:01", "00:00:00:00", "pretrain",
    "sft", "reward", "muon", "adamw", "switch", "bias", "none", "loop", "grouped", "dapo",
    "dr_grpo", "k1", "k2", "bf16-mixed", "16-mixed", "wandb", "offline", "embedded", "files",
)
OTHERS = (
    "null", "true", "false", "", "[]", "{}", "[1,2]", "{a: 1}", "[null]", "${seed}", "${nope}",
    "???",
)
# fmt: on
ENDLESS = ("max_steps", "epochs", "resample_rounds")  # absurd ones run for ever, as they should
KEPT = ("outputs", "debug", "experiment", "sweep", "stage")  # what a case itself needs


class Case(NamedTuple):
    """`arguments` for `program` (train.py, or a command), in a folder that `prepare` fills."""

    kind: str
    program: str
    arguments: list[str]
    prepare: Callable[[Path], str]  # returns what was done, for the report


@dataclass
class Outcome:
    code: int
    seconds: float
    text: str  # stdout and stderr
    fault: str | None = None


# --- what may go wrong


def settings_cases(ladder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Every key comes before any comes again."""
    from omegaconf import OmegaConf

    from tests.fakes import composed

    tree = OmegaConf.to_container(composed(*BASE), resolve=True)
    values = {key: v for key, v in leaves(tree) if key.split(".")[0] not in KEPT}
    waiting: list[str] = []
    for _ in range(count):
        chosen = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            if not waiting:
                waiting = rng.sample(list(values), len(values))
            chosen.append(waiting.pop())
        overrides = [f"{key}={odd_value(key, values[key], rng)}" for key in chosen]
        if rng.random() < 0.05:
            overrides.append(rng.choice((f"~{chosen[0]}", f"+{chosen[0]}.x=1", f"{chosen[0]}x=1")))
        stages = [key.split(".")[1] for key in chosen if key.startswith("stages.")]
        stage = max(stages, key=STAGES.index) if stages else rng.choice(STAGES[:3])
        yield Case("settings", "train.py", [*BASE, f"stage={stage}", *overrides], copy_of(ladder))


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of all values, and the values; an empty dict is one."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def odd_value(key: str, usual: Any, rng: random.Random) -> str:
    """Mostly of the type of the usual value."""
    if key == "trainer.num_nodes":
        return rng.choice(("0", "-1", *ABSURD, *OTHERS))  # more nodes would be waited for
    absurd = () if key.endswith(ENDLESS) else ABSURD
    if isinstance(usual, bool) or rng.random() < 0.15:
        return rng.choice((*WHOLE, *WORDS, *OTHERS))
    if isinstance(usual, int):
        return rng.choice((*WHOLE, *WHOLE, *absurd))
    if isinstance(usual, float):
        return rng.choice((*REAL, *REAL, *absurd))
    return rng.choice((*WORDS, *OTHERS))


def runs_cases(ladder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """One file of one run is damaged; then a command that may meet it."""
    files = sorted(p.relative_to(ladder) for p in (ladder / "runs").rglob("*") if p.is_file())
    small = [file for file in files if file.name in ("run.json", "config.json", "eval.json")]
    for _ in range(count):
        file, seed = rng.choice(rng.choice((files, small))), rng.random()
        stage = rng.choice(STAGES)
        program, arguments = rng.choice(
            [
                ("runs", ["list"]),
                ("runs", ["show", stage]),
                ("runs", ["rm", stage, "force=true"]),
                ("report", []),
                ("report", ["run=ppo"]),
                ("dashboard", []),
                ("evaluation", [f"run={stage}"]),
                ("chat", [f"run={stage}", "prompt=What is an LLM?"]),
                ("train.py", [*BASE, f"stage={stage}"]),
                ("train.py", [*BASE, "stage=sft", "stages.sft.lr=1e-4"]),
            ]
        )

        def prepare(outputs: Path, file: Path = file, seed: float = seed) -> str:
            copy_of(ladder)(outputs)
            return f"{file}: {damage(outputs / file, random.Random(seed))}"

        yield Case("runs", program, arguments, prepare)


RECORDS: dict[str, list[Any]] = {
    "corpus": [{"text": f"The fox number {i} jumps over the lazy dog.\n" * 4} for i in range(40)],
    "chat": [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(40)],
    "chat_messages": [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(40)
    ],
    "chat_turns": [
        {"conversations": [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": "Yes"}]}
        for i in range(40)
    ],
    "chat_prompts": [{"prompt": f"Say {i}", "response": f"It is {i}."} for i in range(40)],
    "preference": [
        {"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": "No."} for i in range(40)
    ],
    "preference_dialogues": [
        {
            "chosen": f"\n\nHuman: Say {i}\n\nAssistant: It is {i}.",
            "rejected": f"\n\nHuman: Say {i}\n\nAssistant: No.",
        }
        for i in range(40)
    ],
    "reasoning": [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(40)],
}
STAGE_OF = {"corpus": "pretrain", "chat": "sft", "preference": "reward", "reasoning": "grpo"}


def files_cases(ladder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """A stage straight from the ladder's pretrain or sft run, on a file with one fault."""
    for _ in range(count):
        schema, seed = rng.choice(list(RECORDS)), rng.random()
        source = schema.split("_")[0]
        suffix = rng.choice((".jsonl", ".jsonl", ".json", ".parquet", ".txt"))
        stage = STAGE_OF[source]
        arguments = [*BASE, "data=files", f"stage={stage}", f"data.{source}.path=file{suffix}"]
        if stage != "pretrain":
            parent = next((ladder / "runs").glob("pretrain-*" if stage == "sft" else "sft-*"))
            arguments.append(f"stages.{stage}.parent={parent.name}")

        def prepare(
            outputs: Path, schema: str = schema, suffix: str = suffix, seed: float = seed
        ) -> str:
            copy_of(ladder)(outputs)
            return write_damaged(
                outputs.parent / f"file{suffix}", RECORDS[schema], random.Random(seed)
            )

        off = ["data.corpus.problems=0", "data.chat.demonstrations=0"]
        yield Case("files", "train.py", [*arguments, *off], prepare)


KINDS = {"settings": settings_cases, "runs": runs_cases, "files": files_cases}


# --- damage

# what a place in JSON may hold instead, as JSON text
ODD_JSON = (
    "null", "true", "-1", "0", "1e999", "NaN", "9" * 5000, '""', '"x"', '"../../x"', "[]", "{}",
    "[[]]", '{"a": null}', '"\\ud800"', '"\\u0000"', "[" * 100_000 + "]" * 100_000,
)  # fmt: skip


def damaged_json(value: Any, rng: random.Random) -> str:
    """JSON text of a value with one odd place, or one key less."""
    places = list(paths(value))
    path = rng.choice(places)
    mark = "\x00odd\x00"
    copy = json.loads(json.dumps({"": value}))
    holder: Any = copy
    for key in ("", *path)[:-1]:
        holder = holder[key]
    last = ("", *path)[-1]
    if rng.random() < 0.2 and isinstance(holder, dict) and path:
        del holder[last]
    else:
        holder[last] = mark
    return json.dumps(copy[""]).replace(json.dumps(mark), rng.choice(ODD_JSON))


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:20]) if isinstance(value, list) else items
    for key, inner in items:
        yield from paths(inner, (*at, key))


def damaged_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Truncated, flipped, emptied, or in another encoding."""
    if not content:
        return b"\x00", "a NUL"
    at = rng.randrange(len(content))
    flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
    text = content.decode("utf-8", "replace")
    return rng.choice(
        [
            (b"", "empty"),
            (content[:at], f"cut after {at} bytes"),
            (content[:at] + flipped + content[at + 1 :], f"a bit at {at}"),
            (content[:at] + b"\x00" * 9 + content[at:], f"NULs at {at}"),
            (text.encode("utf-16"), "UTF-16"),
            (text.encode("utf-8-sig"), "a byte order mark"),
            (content * 2, "twice"),
            (content.replace(b"\n", b"\r"), "CR line ends"),
        ]
    )


def damage(path: Path, rng: random.Random) -> str:
    """Damage one file of a run; returns what was done."""
    content = path.read_bytes()
    if rng.random() < 0.1:
        path.unlink()
        return "removed"
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.75:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        if lines:
            at = rng.randrange(len(lines))
            lines[at] = damaged_json(json.loads(lines[at]), rng)
            replace(path, "\n".join(lines).encode())
            return f"line {at + 1}: {lines[at][:300]}"
    changed, what = damaged_bytes(content, rng)
    replace(path, changed)
    return what


def replace(path: Path, content: bytes) -> None:
    """A new file: the old one is shared with other cases (see copy_of)."""
    path.unlink()
    path.write_bytes(content)


def write_damaged(path: Path, records: list[Any], rng: random.Random) -> str:
    """A file of records with one thing wrong; returns what."""
    lines = [json.dumps(record) for record in records]
    what = "nothing"
    if rng.random() < 0.7:
        at = rng.randrange(len(lines))
        lines[at] = damaged_json(records[at], rng)
        what = f"record {at + 1}: {lines[at][:300]}"
    if path.suffix == ".parquet":
        write_parquet(path, lines)
    elif path.suffix == ".json":
        path.write_text("[" + ",\n".join(lines) + "]")
    else:
        path.write_text("".join(line + "\n" for line in lines))
    if what == "nothing" or rng.random() < 0.2:
        changed, also = damaged_bytes(path.read_bytes(), rng)
        path.write_bytes(changed)
        what += f", {also}"
    return what


def write_parquet(path: Path, lines: list[str]) -> None:
    """The records that a table can hold."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for line in lines:
        try:
            pyarrow.Table.from_pylist([*rows, json.loads(line)])
            rows.append(json.loads(line))
        except (ValueError, TypeError, RecursionError, AttributeError, pyarrow.ArrowException):
            continue
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def copy_of(ladder: Path) -> Callable[[Path], str]:
    """Fills a folder with hard links to the ladder's files, which are never changed in place."""

    def prepare(outputs: Path) -> str:
        shutil.copytree(ladder, outputs, copy_function=os.link, symlinks=True)
        return ""

    return prepare


# --- running


@dataclass
class Running:
    """A case in a process of its own, in a folder of its own."""

    case: Case
    folder: Path
    done: str  # what was damaged
    child: int
    start: float

    @property
    def arguments(self) -> list[str]:
        return [*self.case.arguments, "outputs=outputs"]


def start(case: Case, folder: Path) -> Running:
    """Fork a process that runs the case: from one thread, as a fork copies the others' locks."""
    folder.mkdir()
    running = Running(case, folder, case.prepare(folder / "outputs"), 0, time.monotonic())
    child = os.fork()
    if child == 0:
        become(case.program, running.arguments, folder)
    running.child = child
    return running


def ended(running: Running) -> Outcome | None:
    """How the case ended, with what is wrong with that; None while it runs. Kills it at LIMIT."""
    seconds = time.monotonic() - running.start
    if seconds > LIMIT:
        os.killpg(running.child, signal.SIGKILL)
    found, status = os.waitpid(running.child, 0 if seconds > LIMIT else os.WNOHANG)
    if not found:
        return None
    text = (running.folder / "log").read_text(errors="replace")
    outcome = Outcome(os.waitstatus_to_exitcode(status), seconds, text)
    outcome.fault = fault(outcome, running.folder / "outputs", running.case.kind)
    if outcome.fault:
        shown = (a if len(a) < 200 else f"{a[:60]}…({len(a)})" for a in running.arguments)
        command = f"{running.case.program} {' '.join(shown)}"
        outcome.fault += f"\n  {command}\n  {running.done}"
    return outcome


def run_all(cases: list[Case], folder: Path, at_once: int) -> Iterator[tuple[int, Outcome]]:
    """Each case's number and outcome, as they end."""
    waiting, running = list(enumerate(cases))[::-1], {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, case = waiting.pop()
            running[number] = start(case, folder / str(number))
        for number, one in list(running.items()):
            if (outcome := ended(one)) is not None:
                yield number, outcome
                shutil.rmtree(running.pop(number).folder)
        time.sleep(0.01)


def become(program: str, arguments: list[str], folder: Path) -> None:
    """The forked process: the program, as `python` would run it, with its output in a file."""
    code = 3
    try:
        import resource

        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        file = os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
        os.chdir(folder)
        try:
            if program == "train.py":
                sys.argv = [str(REPO / program), *arguments]
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                sys.argv = ["fourstage", program, *arguments]
                runpy.run_module("fourstage", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:  # as the interpreter does it
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = 1 if isinstance(end.code, str) else end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def fault(outcome: Outcome, outputs: Path, kind: str) -> str | None:
    """What a user would call a bug, or None."""
    if outcome.seconds > LIMIT:
        return f"over {LIMIT:.0f} s"
    if "Traceback (most recent call last)" in outcome.text:
        lines = outcome.text.rstrip().splitlines()
        return "traceback: " + " | ".join(lines[-3:])[-600:]
    if outcome.code not in (0, 1, 2):
        return f"exit {outcome.code}: {outcome.text[-300:]}"
    if outcome.code:
        return None if outcome.text.strip() else f"exit {outcome.code} without a word"
    if kind == "runs":
        return None  # the damage is still there
    return unsound(outputs)


def unsound(outputs: Path) -> str | None:
    """Weights that are not finite, or JSON that is none, in a finished run."""
    import torch
    from safetensors.torch import load_file

    for record in sorted(outputs.glob("runs/*/run.json")):
        folder = record.parent
        for path in (*folder.glob("*.json"), *folder.glob("*.jsonl")):
            text = path.read_text()
            for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                try:
                    json.loads(part, parse_constant=not_json)
                except ValueError as error:
                    return f"{folder.name}/{path.name}: {error}"
        if json.loads(record.read_text())["status"] == "finished":
            weights = load_file(folder / "model.safetensors")
            if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
                return f"{folder.name}: weights that are not finite are finished"
    return None


def not_json(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def import_what_is_slow() -> None:
    """Before the forks, which share it: the libraries, and the embedded data of debug=fast."""
    import torch

    torch.set_num_threads(1)

    from fourstage.lineage.plan import make_plan
    from tests.fakes import config

    with tempfile.TemporaryDirectory() as outputs:
        make_plan(config(*BASE, "stage=grpo", f"outputs={outputs}"))


def fuzz(kinds: list[str], cases: int, seed: int, at_once: int) -> list[str]:
    """The faults of `cases` cases of each kind; prints them as they are found."""
    faults = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        whole = Case("settings", "train.py", [*BASE, "stage=grpo"], lambda outputs: "")
        running = start(whole, folder / "first")
        while (first := ended(running)) is None:
            time.sleep(0.1)
        assert first.code == 0 and first.fault is None, first.text
        ladder = folder / "first" / "outputs"
        for kind in kinds:
            begun, codes = time.monotonic(), Counter()
            all_cases = list(KINDS[kind](ladder, random.Random(f"{kind} {seed}"), cases))
            for number, outcome in run_all(all_cases, folder, at_once):
                codes[outcome.code] += 1
                if outcome.fault:
                    faults.append(outcome.fault)
                    print(f"{kind} {number}, {outcome.seconds:.0f} s: {outcome.fault}", flush=True)
            how = ", ".join(f"{n} with {code}" for code, n in sorted(codes.items()))
            seconds = time.monotonic() - begun
            print(f"{kind}: {len(all_cases)} cases in {seconds:.0f} s, ended {how}", flush=True)
    return faults


def main(arguments: list[str]) -> int:
    options = {"cases": "300", "seed": "0", "kinds": ",".join(KINDS), "at_once": "2"}
    options |= dict(argument.split("=", 1) for argument in arguments)
    import_what_is_slow()
    faults = fuzz(
        options["kinds"].split(","),
        int(options["cases"]),
        int(options["seed"]),
        int(options["at_once"]),
    )
    print(f"{len(faults)} faults")
    return min(1, len(faults))


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "WANDB_SILENT": "true"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    sys.exit(main(sys.argv[1:]))

"""conf/experiment/: each composes, fits its model and is planned without a request."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from omegaconf.errors import InterpolationResolutionError

from fourstage.errors import UserError
from fourstage.lineage.plan import make_plan
from tests.fakes import CONF, QUICK, config, own_files

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TEXT = "".join(
    f"{i}. All the world's a stage, and all the men merely players.\n" for i in range(400)
)


def files_of(experiment: str, folder: Path) -> list[str]:
    """What has to be named on its command line."""
    words = own_files(folder)
    rows = (folder / "reasoning.jsonl").read_text().splitlines(keepends=True)
    (folder / "gsm8k-train.jsonl").write_text("".join(rows[:-8]))
    (folder / "gsm8k-test.jsonl").write_text("".join(rows[-8:]))
    for name in ("tinyshakespeare", "wikitext2-valid", "wikitext2-test"):
        (folder / f"{name}.txt").write_text(TEXT)
    for name in ("chat", "preference"):
        there = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        named = {"chat": "instructions", "preference": "preferences"}[name]
        (folder / f"{named}.json").write_text(json.dumps(there))
    return {"own_data": words[1:], "real_cpu": [f"data.root={folder}"]}.get(experiment, [])


@pytest.fixture
def no_network(monkeypatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a request to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("quick", [(), QUICK], ids=["whole", "debug"])
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_makes_a_plan_offline(name, quick, tmp_path, no_network) -> None:
    words = [f"experiment={name}", "trainer=cpu", *quick, *files_of(name, tmp_path)]
    tree = config(*words, f"outputs={tmp_path}/outputs")
    plan = make_plan(tree)
    run = plan.runs[-1]
    assert run.stage == tree["stage"] == "grpo" and all(run.to_do for run in plan.runs)
    lost = [line for run in plan.runs for line in run.warnings if "leaves out" in line]
    assert lost == [] or quick
    command, room = plan.command, plan.command.model.max_seq_len
    assert command.evaluation.max_new_tokens + 256 <= room or quick
    assert command.debug == ("fast" if quick else None)
    most = command.data.corpus.max_tokens
    pretrain = command.stages["pretrain"]
    read = pretrain.max_steps * pretrain.batch_size * pretrain.block_size
    assert most is None or quick or 0.9 * most < read <= most  # no more than it reads is written


def test_own_data_says_which_file_to_name(tmp_path) -> None:
    words = ["experiment=own_data", "trainer=cpu", f"outputs={tmp_path}/outputs"]
    given = own_files(tmp_path)[1:]
    for n, line in enumerate(
        (
            r"^stages.pretrain needs data.corpus.path=FILE \(text to learn from\)$",
            "^data.corpus.problems and data.chat.demonstrations take problems .* give data.reasoni",
        )
    ):
        with pytest.raises(UserError, match=line):
            make_plan(config(*words, *given[:n]))
    zero = ["data.corpus.problems=0", "data.chat.demonstrations=0"]
    for n, line in ((1, "^stages.sft needs data.chat.path="), (2, "^stages.reward and .*ppo need")):
        with pytest.raises(UserError, match=line):
            make_plan(config(*words, *zero, *given[:n]))


def test_real_cpu_says_that_it_needs_its_folder(tmp_path) -> None:
    with pytest.raises(InterpolationResolutionError, match="data.root: not set: data.root=FOLDER"):
        config("experiment=real_cpu")
    with pytest.raises(UserError, match=f"^{tmp_path}/tinyshakespeare.txt: no such file"):
        make_plan(config("experiment=real_cpu", "trainer=cpu", f"data.root={tmp_path}"))


def test_debug_takes_long_records_of_any_data_but_the_embedded() -> None:
    def limits(*words: str) -> list[int]:
        stages = config("debug=fast", *words)["stages"]
        names = ("max_tokens", "max_prompt_tokens")
        return [values[name] for values in stages.values() for name in names if name in values]

    assert limits() == [64, 64, 48, 48]
    assert limits("data=files") == limits("data=public") == [256] * 4

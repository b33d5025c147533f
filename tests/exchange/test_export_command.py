"""The command `export`: what it writes where, what it refuses, and how it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourstage.errors import UserError
from fourstage.exchange.export import write_folder
from fourstage.model import ScalarModel
from fourstage.model.weights import Stored, open_stored
from fourstage.tokenizer import Tokenizer
from tests.exchange.exports import (
    FILES,
    IDS_BT,
    NANO,
    SHAPES,
    files,
    logits,
    network,
    reimported,
    save_run,
    typed,
)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = network(NANO)
    run = save_run(tmp_path, model)
    typed(tmp_path, "run=sft", f"to={tmp_path / 'new' / 'it'}")
    assert f"exported {run.name} to {tmp_path / 'new' / 'it'} (0.4 MB)" in capsys.readouterr().out
    found = reimported(tmp_path / "new" / "it")
    torch.testing.assert_close(logits(found, IDS_BT), logits(model, IDS_BT), atol=1e-5, rtol=0)
    card = (tmp_path / "new" / "it" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"# {run.name}" in card and "AutoModelForCausalLM.from_pretrained" in card
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["it"]  # nothing beside it


def test_the_command_for_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run = save_run(tmp_path, network(NANO))
    to = tmp_path / "it"
    for force in ("false", "true"):
        typed(tmp_path, "run=sft", f"to={to}", "format=gguf", f"force={force}")
        assert sorted(path.name for path in to.iterdir()) == ["README.md", "model.gguf"]
    assert (to / "model.gguf").read_bytes()[:4] == b"GGUF"
    card = (to / "README.md").read_text()
    assert "library_name: gguf\n" in card and 'Llama("model.gguf"' in card
    typed(tmp_path, f"run={run.name}", f"to={to}", "force=true")  # the other format in its place
    assert sorted(path.name for path in to.iterdir()) == sorted([*FILES, "README.md"])
    save_run(tmp_path, ScalarModel(network(SHAPES["dense_tiny"])), stage="reward")
    with pytest.raises(UserError, match="holds a reward model, but a language model is needed"):
        typed(tmp_path, "run=reward", f"to={tmp_path / 'other'}", "format=gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "runs"]


def test_without_gguf(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    save_run(tmp_path, network(NANO))
    with pytest.raises(UserError, match="format=gguf needs gguf: install it with `pip install"):
        typed(tmp_path, "run=sft", f"to={tmp_path / 'it'}", "format=gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    save_run(tmp_path, network(NANO))
    to = tmp_path / "it"
    typed(tmp_path, "run=sft", f"to={to}")
    (to / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists: give another to=, or force=true to replace it"):
        typed(tmp_path, "run=sft", f"to={to}")
    assert (to / "model.safetensors").read_bytes() == b"mine"
    typed(tmp_path, "run=sft", f"to={to}", "force=true")
    assert len((to / "model.safetensors").read_bytes()) > 1000
    (to / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which no export wrote"):
        typed(tmp_path, "run=sft", f"to={to}", "force=true")
    assert (to / "notes.txt").read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    typed(tmp_path, "run=sft", f"to={empty}")
    assert (empty / "config.json").exists()


def test_a_link_is_followed(tmp_path: Path) -> None:
    """To another disk, for example."""
    save_run(tmp_path, network(NANO))
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "it")
    for force in ("false", "true"):
        typed(tmp_path, "run=sft", f"to={tmp_path / 'link'}", f"force={force}")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "it" / "config.json").exists()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["it"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop: cannot be written"):
        typed(tmp_path, "run=sft", f"to={tmp_path / 'loop'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "loop", "runs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to=it"], "run: missing: give one, as in run=grpo"),
        (["run=sft"], "to: missing: give one, as in to=my-model"),
        (["run=sft", "to=it", "dtype=int8"], "dtype: expected one of float32, bfloat16"),
        (["run=sft", "to=it", "format=onnx"], "format: expected one of hf, gguf"),
        (["run=sft", "to=it", "force=1"], "force: expected true or false"),
        (["run=sft", "to=it", "dtypes=float32"], "dtypes: unknown key, did you mean dtype?"),
        (["run=nothing", "to=it"], "unknown run 'nothing'"),
        (["run=sft", "to=runs/sft-sftxxxxxxx/run.json"], "is a file: name a folder with to="),
        (["run=sft", "to=runs/sft-sftxxxxxxx/run.json/it"], "cannot be written (Not a directory)"),
        (["run=sft", f"to={'a' * 300}"], "cannot be written (File name too long)"),
        (["run=sft", "to=/"], "/ exists: give another to="),
        (["run=sft", "to=/", "force=true"], "which no export wrote: give another to="),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path, network(NANO))
    with pytest.raises(UserError) as caught:
        typed(tmp_path, *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = save_run(tmp_path, network(NANO))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with pytest.raises(UserError, match="this run is not finished"):
        typed(tmp_path, f"run={run.name}", f"to={tmp_path / 'it'}")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: (run / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda run: (run / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
        (lambda run: os.truncate(run / "model.safetensors", 9000), "damaged"),
    ],
)
def test_a_damaged_run(harm, message, tmp_path) -> None:
    run = save_run(tmp_path, network(NANO))
    harm(run)
    with pytest.raises(UserError, match=message):
        typed(tmp_path, "run=sft", f"to={tmp_path / 'it'}")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("blocks.1.mlp_norm.weight"), "do not fit the shape"),
        (lambda x: x.update({"norm.weight": torch.ones(3)}), "do not fit the shape"),
        (lambda x: x["blocks.1.attention.out.weight"].fill_(float("nan")), "is not finite"),
        (lambda x: x.update({"more.weight": torch.ones(3)}), "do not fit the shape"),
    ],
)
def test_weights_of_another_shape(change, message, tmp_path) -> None:
    """A run of an older version, without a checksum."""
    run = save_run(tmp_path, network(NANO))
    weights = load_file(run / "model.safetensors")
    change(weights)
    save_file(weights, run / "model.safetensors")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    with pytest.raises(UserError, match=message):
        typed(tmp_path, "run=sft", f"to={tmp_path / 'it'}")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_more_layers_than_transformers_reads(tmp_path: Path) -> None:
    deep = replace(NANO, d_model=4, d_expert=4, head_dim=2, n_layers=47)
    with pytest.raises(UserError, match="transformers leaves out layer 46 of a Glm4MoeForCausalLM"):
        write_folder(tmp_path / "it", network(deep), Tokenizer.char())
    write_folder(tmp_path / "it", network(replace(deep, n_layers=46)), Tokenizer.char())
    write_folder(
        tmp_path / "dense", network(replace(deep, num_experts=1, top_k=1)), Tokenizer.char()
    )


def test_heads_that_transformers_refuses(tmp_path: Path) -> None:
    shape = replace(SHAPES["llama"], d_model=30, n_heads=4, n_kv_heads=2)
    with pytest.raises(UserError, match="n_heads: 4 does not divide d_model .30., which transform"):
        write_folder(tmp_path / "it", network(shape), Tokenizer.char())
    assert not (tmp_path / "it").exists()
    write_folder(tmp_path / "it", network(replace(shape, qk_norm=True)), Tokenizer.char())


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """With a limit to the size of a file, as a full disk would end it in the middle."""
    save_run(tmp_path, network(NANO))
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "import sys; from fourstage.interruptions import run_command;"
        "from fourstage.exchange.__main__ import main; run_command(main)"
    )
    words = [f"outputs={tmp_path}", "run=sft", f"to={tmp_path / 'it'}"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'it'}: cannot be written (File too large)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_signal_leaves_nothing_half_written(tmp_path: Path, monkeypatch) -> None:
    save_run(tmp_path, network(NANO))
    to = tmp_path / "it"
    typed(tmp_path, "run=sft", f"to={to}")
    old = files(to)

    def stopped(*_) -> None:
        assert (tmp_path / ".it.part" / "config.json").exists()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fourstage.exchange.export.write_safetensors", stopped)
    with pytest.raises(SystemExit) as caught:
        typed(tmp_path, "run=sft", f"to={to}", "force=true")
    assert caught.value.code == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "runs"]
    assert files(to) == old


def test_another_export_to_the_same_folder_begins(tmp_path: Path, monkeypatch) -> None:
    save_run(tmp_path, network(NANO))

    def opened(*given) -> Stored:
        (tmp_path / ".it.part").mkdir(exist_ok=True)  # as the other does before it waits
        return open_stored(*given)

    monkeypatch.setattr("fourstage.exchange.export.open_stored", opened)
    typed(tmp_path, "run=sft", f"to={tmp_path / 'it'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "runs"]


def test_what_a_kill_left_is_cleared_up(tmp_path: Path) -> None:
    save_run(tmp_path, network(NANO))
    part = tmp_path / ".it.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    typed(tmp_path, "run=sft", f"to={tmp_path / 'it'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "runs"]
    assert len((tmp_path / "it" / "model.safetensors").read_bytes()) > 1000

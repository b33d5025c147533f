"""TRL and peft train an exported folder; what they save comes back through the importer."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourstage.exchange.checkpoint import load_checkpoint, read_checkpoint
from fourstage.exchange.gguf import write_gguf
from fourstage.model import Transformer
from tests.exchange.exports import Export, asked, exported, greedy, prompts, shown

pytest.importorskip("trl", reason="needs trl (make setup-dev)")
pytest.importorskip("peft", reason="needs peft (make setup-dev)")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"

PAIRS = [("Is it so?", "It is so."), ("12 + 3 = ?", "15"), ("Hi\n", " Hello! "), ("a", "b")]
ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": len(PAIRS),
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversations() -> Dataset:
    rows = [{"prompt": [asked(one)], "completion": [said(two)]} for one, two in PAIRS]
    return Dataset.from_list(rows)


def our_loss(export: Export) -> float:
    """The mean over all tokens with loss of PAIRS."""
    losses = []
    for one, two in PAIRS:
        ids, mask = export.tokenizer.chat([asked(one), said(two)])
        with torch.no_grad():
            logits = export.model.logits(export.model(torch.tensor([ids])).hidden_BTD)[0]
        picked = torch.tensor(mask[1:], dtype=torch.bool)
        targets = torch.tensor(ids[1:])
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none"))
        losses[-1] = losses[-1][picked]
    return torch.cat(losses).mean().item()


def imported(folder: Path) -> Transformer:
    found = read_checkpoint(folder, "it")
    return load_checkpoint(folder, found.model, found.vocab_size).eval()


def check_returns(folder: Path, model: Any, export: Export) -> Transformer:
    """A saved model computes the same here, and something else than before it was trained."""
    back = imported(folder)
    ids = torch.tensor([prompts(export.tokenizer, 30)[-1]])

    @torch.no_grad()
    def logits(ours: Transformer) -> Tensor:
        return ours.logits(ours(ids).hidden_BTD)

    with torch.no_grad():
        theirs = model.eval()(ids).logits
    torch.testing.assert_close(logits(back), theirs, atol=1e-4, rtol=0)
    assert (logits(back) - logits(export.model)).abs().max() > 0.01
    return back


@pytest.mark.parametrize("shape", ["moe_nano", "odd_shared", "tied", "dense_tiny"])
def test_sft(shape: str, tmp_path: Path) -> None:
    """The first loss is ours; a shared expert of zeros stays one."""
    export = exported(shape, tmp_path / "it")
    trainer = SFTTrainer(
        model=str(export.folder),
        args=SFTConfig(str(tmp_path / "out"), dataloader_drop_last=False, **ONE_STEP),
        train_dataset=conversations(),
    )
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(our_loss(export), abs=1e-4)
    trainer.save_model(str(tmp_path / "trained"))
    back = check_returns(tmp_path / "trained", trainer.model, export)
    if shape == "moe_nano":
        assert back.config.d_shared == 0


def test_grpo(tmp_path: Path) -> None:
    """Answers come in turns; one reward a number of characters."""
    export = exported("moe_nano", tmp_path / "it")
    seen: list[str] = []

    def reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        seen.extend(turns[0]["content"] for turns in completions)
        return [float(len(set(turns[0]["content"]))) for turns in completions]

    trainer = GRPOTrainer(
        model=str(export.folder),
        reward_funcs=reward,
        args=GRPOConfig(
            str(tmp_path / "out"), num_generations=4, max_completion_length=16, **ONE_STEP
        ),
        train_dataset=conversations().remove_columns("completion"),
    )
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == 4 and math.isfinite(log["loss"]) and log["grad_norm"] > 0
    trainer.save_model(str(tmp_path / "trained"))
    check_returns(tmp_path / "trained", trainer.model, export)


@pytest.mark.parametrize("shape", ["odd_shared", "llama"])
def test_lora(shape: str, tmp_path: Path) -> None:
    """On attention and all experts, merged and saved, and here again."""
    export = exported(shape, tmp_path / "it")
    experts = (
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if shape == "odd_shared" else None
    )
    modules = ["q_proj", "v_proj"]
    lora = LoraConfig(r=4, target_modules=modules, target_parameters=experts)
    model = AutoModelForCausalLM.from_pretrained(export.folder)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path / "out"), **ONE_STEP),
        train_dataset=conversations(),
        processing_class=AutoTokenizer.from_pretrained(export.folder),
        peft_config=lora,
    )
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert frozen and trained and all("lora_" in name for name in trained)
    assert any("experts" in name for name in trained) == (experts is not None)
    trainer.train()
    trainer.train()  # the first step moves B alone, which begins as zeros
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(export.folder).save_pretrained(tmp_path / "merged")
    back = check_returns(tmp_path / "merged", merged, export)
    if experts:
        for new, old in zip(back.blocks, export.model.blocks, strict=True):
            assert (new.mlp.experts.gate_up_EDF - old.mlp.experts.gate_up_EDF).abs().max() > 1e-3
            assert (new.mlp.experts.down_EFD - old.mlp.experts.down_EFD).abs().max() > 1e-3


def examples(page: Path) -> list[str]:
    """The Python on a page."""
    blocks = re.findall(r"(?m)(?:^(?:    .*)?\n)+", page.read_text("utf-8"))
    return [textwrap.dedent(block) for block in blocks if "import" in block]


def test_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    """docs/serving.md's Python, on a small model: it learns the answer."""
    export = exported("odd_shared", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    pipeline, llama_cpp, trl = examples(PAGE)
    exec(pipeline, {})
    ids = greedy(export, [export.tokenizer.prompt([asked("7 - 9 + 2 = ?")])], 200)[0]
    assert capsys.readouterr().out == shown(export.tokenizer, ids) + "\n"
    if importlib.util.find_spec("llama_cpp"):
        Path("my-gguf").mkdir()
        write_gguf(export.folder, Path("my-gguf/model.gguf"), "it")
        exec(llama_cpp, {})
        ids = greedy(export, [export.tokenizer.prompt([asked("What is an LLM?")])], 400)[0]
        assert capsys.readouterr().out == shown(export.tokenizer, ids) + "\n"
    # not in this process, where other tests may have made a device, for which it would pin memory
    subprocess.run([sys.executable, "-c", trl.replace("1e-3", "1e-2")], check=True)
    trained = replace(export, model=imported(tmp_path / "merged"))
    ids = greedy(trained, [export.tokenizer.prompt([asked("What is an LLM?")])], 40)[0]
    assert shown(export.tokenizer, ids) == "A large language model."

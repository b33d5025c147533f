"""One GRPO step (rollout, reward, update), against TRL's GRPOTrainer with the same weights.

    python -m benchmarks.grpo [repeats=5] [steps=2] [prompts=64] [group=8] [prompt_chars=8]
                              [new_tokens=16] [updates=1] [model=moe_tiny] [rewards=spread,tied]

On a CPU in fp32, loss grpo, beta 0, clipping at 1, AdamW (fused), no logs and nothing saved. Ours
is GRPOModule under Lightning's Trainer, with its own logs; the extra forward for the logged KL is
in its time. TRL's trainer runs with transformers' eager and grouped_mm experts, and the answers of
an optimizer step in one forward or, accumulated, 128 at a time. A step is one rollout with all its
updates; with several, TRL scores the answers once more before the first (it keeps none of its
sampler's log-probabilities), so one update is its best case. The reward is a function of the text
alone: `spread` hardly ever ties a group; `tied` ties most, as hard problems do: what ours then
leaves out has no gradient.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import peers
from benchmarks.common import (
    CHARACTERS,
    Block,
    Seconds,
    device_name,
    fit,
    interleave,
    known,
    milliseconds,
    now,
    on_device,
    print_json,
    print_table,
    read_arguments,
    reference_ids,
    shipped_model,
    stage_settings,
    start,
)
from fourstage.batch import PromptBatch
from fourstage.errors import UserError
from fourstage.model import ModelConfig, Transformer
from fourstage.rl.rewards import ReasoningReward
from fourstage.stages import grpo
from fourstage.stages.grpo import GRPOModule

LR = 1e-6  # so small that the answers stay what they were at the start, on both sides
ROWS = 128  # answers that a forward and backward of TRL hold, where a step is cut into pieces
OUR_ROWS = 256  # of ours, which are as many tokens: prompts are shared


def spread(text: str) -> float:
    """The share of vowels: a group of equal answers is rare."""
    return sum(c in "aeiou" for c in text) / max(1, len(text))


def tied(text: str) -> float:
    """1 for an e among the first two characters: until something is learnt, few groups have one."""
    return float("e" in text[:2])


REWARDS: dict[str, Callable[[str], float]] = {"spread": spread, "tied": tied}


@dataclass(frozen=True, kw_only=True)
class Options:
    repeats: int = 5
    steps: int = 2
    prompts: int = 64
    group: int = 8
    prompt_chars: int = 8
    new_tokens: int = 16
    updates: int = 1
    model: str = "moe_tiny"
    rewards: tuple[str, ...] = ("spread", "tied")

    @property
    def answers(self) -> int:
        return self.prompts * self.group


def texts(options: Options) -> list[str]:
    """The prompts, one after the other in the reference text."""
    n = options.prompt_chars
    ids = reference_ids()
    return [CHARACTERS.decode(ids[i * n : (i + 1) * n]) for i in range(options.prompts)]


def our_reward(reward: Callable[[str], float]) -> AbstractContextManager[Any]:
    """GRPOModule judges by this function, in place of a problem's verifier."""

    def judged(problems: Any, answers: list[str], stopped: Any) -> list[ReasoningReward]:
        return [ReasoningReward(correct=reward(answer), form=0.0) for answer in answers]

    return mock.patch.object(grpo, "reasoning_rewards", judged)


def our_block(
    config: ModelConfig, options: Options, reward: Callable[[str], float], zero_spread: list[float]
) -> Block:
    """The grpo stage; notes the share of tied groups of each step."""

    def policy() -> Transformer:
        torch.manual_seed(0)
        return Transformer(config, CHARACTERS.vocab_size)

    settings = stage_settings(
        "grpo",
        batch_size=options.prompts,
        micro_batch_size=OUR_ROWS,
        minibatch_size=options.answers // options.updates,
        group_size=options.group,
        max_new_tokens=options.new_tokens,
        lr=LR,
        warmup=0.0,
        kl_coef=0.0,  # TRL's beta
    )
    module = GRPOModule(policy(), policy(), CHARACTERS, settings, seed=0)
    prompts = [CHARACTERS.encode(text) for text in texts(options)]
    batch = PromptBatch(prompts, prompts, list(range(len(prompts))))

    def block(n: int) -> list[float]:
        with our_reward(reward):
            seconds, metrics = fit(module, [batch] * (n + 1), torch.device("cpu"))
        zero_spread.append(metrics["train/zero_spread"])
        return seconds[1:]

    return block


def trl_block(
    config: ModelConfig,
    options: Options,
    reward: Callable[[str], float],
    experts: str,
    pieces: int,
    folder: Path,
) -> Block:
    """TRL's trainer; the first rollout of a block makes the optimizer's state and is left out."""
    trl, transformers = peers.library("trl"), peers.library("transformers")
    import datasets

    torch.manual_seed(0)
    model = peers.glm4_moe(config, CHARACTERS.vocab_size)
    peers.copy_weights(Transformer(config, CHARACTERS.vocab_size), model)
    model.set_experts_implementation(experts)
    CHARACTERS.save(folder)

    class Stopwatch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(now() - self.start)

    def rewards(completions: Sequence[str], **_: Any) -> list[float]:
        return [reward(text) for text in completions]

    stopwatch = Stopwatch()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts(options)}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[stopwatch],
        args=trl.GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=options.answers // options.updates // pieces,
            gradient_accumulation_steps=pieces,
            steps_per_generation=pieces * options.updates,
            num_generations=options.group,
            max_completion_length=options.new_tokens,
            beta=0.0,
            loss_type="grpo",
            temperature=1.0,
            top_k=0,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            optim="adamw_torch_fused",
            router_aux_loss_coef=0.0,
            disable_dropout=True,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )

    trainer.remove_callback(transformers.PrinterCallback)

    def block(n: int) -> list[float]:
        stopwatch.seconds.clear()
        trainer.args.max_steps = (n + 1) * options.updates
        trainer.train()
        seconds, k = stopwatch.seconds, options.updates
        return [sum(seconds[i : i + k]) for i in range(k, len(seconds), k)]

    return block


def measure(
    reward: str, config: ModelConfig, options: Options, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """The table of one reward; its ratios and figures."""
    judge, zero_spread = REWARDS[reward], []
    blocks = {"ours": our_block(config, options, judge, zero_spread)}
    rows_a_step = options.answers // options.updates
    for experts in ("eager", "grouped_mm"):
        for pieces in dict.fromkeys((1, max(1, rows_a_step // ROWS))):
            name = f"trl {experts} {pieces} x {rows_a_step // pieces}"
            blocks[name] = trl_block(config, options, judge, experts, pieces, folder)
    found: dict[str, Seconds] = interleave(blocks, options.repeats, options.steps)
    share = statistics.mean(zero_spread)
    shape = config.name if reward == "spread" else f"{config.name}_{reward}"
    print(
        f"\n{shape}: {options.prompts} prompts of {options.prompt_chars} characters x "
        f"{options.group} answers of {options.new_tokens} tokens, {options.updates} updates; "
        f"{100 * share:.0f} % of the groups are tied"
    )
    ours = found["ours"].median
    print_table(
        ["", "ms a step (min .. max)", "ours is"],
        [[who, milliseconds(s), f"{s.median / ours:.2f} x"] for who, s in found.items()],
    )
    theirs = {who: s.median for who, s in found.items() if who != "ours"}
    ratios = {f"{shape}_vs_trl": min(theirs.values()) / ours}
    for experts in ("eager", "grouped_mm"):
        best = min(s for who, s in theirs.items() if f" {experts} " in who)
        ratios[f"{shape}_vs_trl_{experts}"] = best / ours
    figures = {f"{shape}_{who.replace(' ', '_')}_s": s.median for who, s in found.items()}
    return ratios, figures | {f"{shape}_zero_spread": share}


def main(arguments: list[str]) -> None:
    options = read_arguments(Options, arguments)
    known("rewards", options.rewards, REWARDS)
    if options.group < 2:
        raise UserError(f"group: must be at least 2, got {options.group}")
    if options.answers % options.updates:
        raise UserError(f"updates: must divide prompts x group ({options.answers})")
    device = on_device("cpu")
    ratios, figures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for reward in options.rewards:
            config = shipped_model(options.model)
            more_ratios, more_figures = measure(reward, config, options, Path(folder))
            ratios |= more_ratios
            figures |= more_figures
    print_json("grpo", device_name(device), ratios, figures)


if __name__ == "__main__":
    start(main)

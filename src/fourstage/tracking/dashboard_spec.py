"""What the W&B dashboards show: sections, their panels, and the keys of each panel. Plain data.

A test compares SECTIONS with the keys that the stages log: each key needs a panel, and each panel's
keys must be logged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from fourstage.evaluation.suite import PASS_K
from fourstage.ladder import LADDER

STEP = "trainer/global_step"  # the x axis that loggers.start_wandb defines


@dataclass(frozen=True)
class Panel:
    """One chart or table. A key may be a pattern with `*`.

    bars: summary values, a bar for each stage (a pattern: the matching keys under outputs)
    lines: the history against `x` (a pattern is the panel's only key, and W&B matches it)
    scatter: summary values against `x`, a point for each run; table: W&B tables of all runs
    """

    kind: Literal["bars", "lines", "scatter", "table"]
    title: str
    keys: tuple[str, ...]
    x: str = STEP


@dataclass(frozen=True)
class Section:
    """Panels under one heading; the report shows `text`, which says what to look for.

    groupby: what the report groups the runs by there, in the form of wr.Runset; stage: only its
    runs, or those of all.
    """

    name: str
    text: str
    panels: tuple[Panel, ...]
    groupby: tuple[str, ...] = ("JobType",)
    stage: str = ""


def bars(title: str, *keys: str) -> Panel:
    return Panel("bars", title, keys)


def row(title: str, *names: str) -> Panel:
    """A metric of the stage table, with the random weights' beside pretrain's."""
    return bars(title, *(f"{prefix}/{x}" for x in names for prefix in ("eval", "eval_random")))


def lines(title: str, *keys: str, x: str = STEP) -> Panel:
    return Panel("lines", title, keys, x)


def section(name: str, text: str, *panels: Panel) -> Section:
    return Section(name, text, panels)


# what ppo and grpo share
POLICY = (
    lines("KL to the reference (ppo: nats an answer, grpo: nats a token)", "train/kl"),
    lines("entropy, nats a token", "train/entropy"),
    lines("answer length, tokens", "train/answer_length"),
    lines("KL of the update", "train/approx_kl"),
    lines("clipped ratios, share of tokens", "train/clip_low", "train/clip_high"),
    lines("probability ratios", "train/ratio_mean", "train/ratio_max"),
    lines("passes over a rollout", "train/epochs"),
    lines("sampler and trainer differ by, nats", "train/sampler_gap"),
)

SECTIONS = (
    section(
        "ladder",
        "The same held-out items after every stage; the table below has the 95 % intervals.",
        row("bits per character and byte (lower is better)", "bits_per_char", "bits_per_byte"),
        row("facts completed and answered", "knowledge_completed", "knowledge_answered"),
        row("facts asked about, in a new wording", "knowledge_reworded"),
        row("well-formed answers", "well_formed"),
        row("reasoning accuracy", "reasoning_accuracy"),
        row("true score", "true_score"),
        row("friendly answers", "friendly"),
        bars("reward-model score", "eval/reward_model_score"),
        bars("held-out pairs ordered right", "eval/pair_accuracy"),
        row("pass at 1", "pass_at_1"),
        row("pass at k", *(f"pass_at_{k}" for k in PASS_K[1:])),
        bars("win rate against sft", "eval/win_rate", "eval/win_rate_learned"),
        row("chat: exact and contained answers", "chat_exact", "chat_contained"),
        row("chat: stopped, well-formed", "chat_stop_rate", "chat_format_rate"),
        row("distinct words and pairs of words", "distinct_1", "distinct_2"),
        bars("public benchmarks", "benchmark/*", "benchmark_random/*"),
        Panel("table", "every metric with its interval", ("ladder",)),
    ),
    section(
        "losses",
        "Pretrain and sft log nats a token; reward its pair loss.",
        lines("loss", "train/loss", "val/loss"),
        lines("bits per character and byte, held out", "val/bits_per_char", "val/bits_per_byte"),
        lines("loss of held-out pairs", "val/pair_nll"),
        lines("gradient norm", "train/grad_norm"),
        lines("learning rate", "train/lr"),
        lines("skipped optimizer steps", "train/skipped_steps"),
    ),
    section(
        "preference",
        "Over-optimisation: the learned score goes on rising where the true one falls.",
        lines("scores against KL, while training", "train/score", "train/true_score", x="train/kl"),
        Panel("scatter", "learned score, a point a run", ("train/score",), "train/kl"),
        Panel("scatter", "true score, a point a run", ("train/true_score",), "train/kl"),
        lines("learned and true score", "train/score", "train/true_score"),
        bars("KL to the sft policy, nats an answer", "eval/kl_to_sft"),
        bars("ties with sft", "eval/win_rate_ties"),
        bars("margin on held-out pairs", "eval/pair_margin"),
        lines("pairs ordered right", "train/accuracy", "val/accuracy"),
        lines("margin of the pairs", "train/margin"),
        lines("rewards", "train/reward_min", "train/reward_mean", "train/reward_max"),
        *POLICY,
        lines("KL coefficient", "train/kl_coef"),
        lines("policy and value loss", "train/policy_loss", "train/value_loss"),
        lines("explained variance of the value", "train/explained_variance"),
        lines("answers that stop", "train/stop_rate"),
    ),
    section(
        "reasoning",
        "grpo on verified problems: what it gains, on which tasks, and how far it moves.",
        lines("solved while training", "train/pass_at_*"),
        row("accuracy by task and difficulty", "reasoning_accuracy/*"),
        *(row(f"pass at {k} by task and difficulty", f"pass_at_{k}/*") for k in PASS_K),
        lines("reward", "train/reward"),
        lines("parts of the reward", "train/reward_correct", "train/reward_form"),
        lines("spread in a group", "train/reward_std"),
        lines("groups without a signal", "train/zero_spread"),
        lines("answers that stop", "train/stop_rate"),
        *POLICY,
    ),
    section(
        "router",
        "Every expert should have work: entropy near 1, a small maximum, none dead.",
        lines("entropy of the load (1: even)", "router/load_entropy"),
        lines("busiest expert over the mean", "router/max_over_mean"),
        lines("dead experts", "router/dead_experts"),
        lines("spread of the balancing biases", "router/bias_spread"),
        lines("tokens routed elsewhere than before the stage", "router/drift"),
        lines("entropy by layer", "router/load_entropy/layer*"),
        lines("busiest by layer", "router/max_over_mean/layer*"),
        lines("dead by layer", "router/dead_experts/layer*"),
        lines("biases by layer", "router/bias_spread/layer*"),
        lines("drift by layer", "router/drift/layer*"),
        row("entropy, held out", "router_entropy"),
        row("busiest expert over the mean, held out", "router_max_over_mean"),
        row("dead experts, held out", "router_dead"),
        bars("tokens routed elsewhere than by the parent, held out", "eval/router_drift"),
    ),
    section(
        "samples",
        "The same prompts, answered by every stage, and which answers are right where that is "
        "known: first side by side, then while training.",
        Panel("table", "answers of all stages", ("samples_by_stage",)),
        Panel("table", "answers while training", ("samples",)),
        row("length of the answers, tokens", "answer_tokens"),
    ),
    section(
        "system",
        "What it cost: time, work, memory, data.",
        lines("seconds a step", "speed/step_s"),
        lines("tokens per second", "speed/tokens_per_s"),
        lines("TFLOP/s", "speed/tflops"),
        lines("model FLOP utilisation", "speed/mfu"),
        bars("seconds", "cost/seconds", "cost/train_seconds", "cost/eval_seconds"),
        bars("steps", "cost/steps", "cost/skipped_steps"),
        bars("tokens", "cost/tokens", "cost/tokens_generated"),
        bars("FLOPs", "cost/flops"),
        bars("tokens per second, whole stage", "cost/tokens_per_s"),
        bars("model FLOP utilisation, whole stage", "cost/mfu"),
        bars("peak memory, MiB", "cost/peak_memory_mib", "cost/peak_gpu_memory_mib"),
        bars("data", "cost/data_*"),
    ),
)


# of a sweep: the history that says most of a stage
CURVES = {
    **{"pretrain": "val/loss", "sft": "val/loss", "reward": "val/accuracy"},
    **{"ppo": "train/true_score", "grpo": "train/pass_at_1"},
}


def sweep_sections(swept: Mapping[str, Sequence[str]], n_ladders: int) -> list[Section]:
    """The goals by the settings that a stage's runs differ in, {stage: keys of their config}, and,
    if there are several, by ladder. Seeds are within the groups."""
    found = [
        Section(
            f"sweep of {stage}",
            f"{stage} by {', '.join(key.removeprefix('stages.') for key in keys)}: the mean over "
            "seeds and its range. python -m fourstage report compare has intervals and tests.",
            _sweep_panels(stage),
            tuple(f"config.{key}" for key in keys),
            stage,
        )
        for stage, keys in swept.items()
        if keys
    ]
    if n_ladders > 1:
        goals = tuple(bars(f"{stage}: its goal", *_goals(stage)) for stage in LADDER)
        text = "The goals of every ladder, which W&B calls a group."
        found.append(Section("ladders side by side", text, goals, ("Group", "JobType")))
    return found


def _goals(stage: str) -> list[str]:
    row = LADDER[stage]
    return [f"eval/{key}" for key in (row.goal, row.instead) if key]


def _sweep_panels(stage: str) -> tuple[Panel, ...]:
    goals = [bars(key.removeprefix("eval/"), key) for key in _goals(stage)]
    curve = [lines("while training", CURVES[stage])] if stage in CURVES else []
    return (*goals, *curve, bars("seconds", "cost/seconds"))


def resolved(sections: tuple[Section, ...], known: set[str]) -> list[Section]:
    """The sections with known keys for each pattern of bars, without panels that have none."""
    found = []
    for section in sections:
        panels = (_resolved(panel, known) for panel in section.panels)
        found.append(replace(section, panels=tuple(panel for panel in panels if panel.keys)))
    return found


def _resolved(panel: Panel, known: set[str]) -> Panel:
    if panel.kind != "bars":
        return panel
    found: list[str] = []
    for key in panel.keys:
        found += sorted(k for k in known if fnmatchcase(k, key)) if "*" in key else [key]
    return replace(panel, keys=tuple(found))

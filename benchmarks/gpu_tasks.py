"""What benchmarks.gpu asks of a GPU, each in a process of its own: prints figures as one JSON line.

    python -m benchmarks.gpu_tasks versions|facts|checks|train|generate|rl [device=cuda|cpu] ...

A figure that is not what it must be is named in "failed"; all others are measured all the same.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    CHARACTERS,
    Shape,
    device_name,
    fit,
    now,
    on_device,
    pretrain_module,
    read_arguments,
    reference_ids,
    shipped_model,
    stage_settings,
    start,
    timed,
    token_batches,
)
from fourstage.batch import PromptBatch, Rollout
from fourstage.model import ScalarModel, Transformer
from fourstage.model.ops import grouped_mm
from fourstage.optim.muon import orthogonalize
from fourstage.rl.rewards import ReasoningReward
from fourstage.rl.rollout import answer_logprobs, pack
from fourstage.sampling import recording
from fourstage.sampling.decode import Decoder
from fourstage.sampling.generate import Generation, Sampling, generate
from fourstage.stages import GRPOModule, PPOModule, grpo
from fourstage.stages.supervised import next_token_nll
from fourstage.tracking.cost import mfu, peak_flops

PACKAGES = [
    *("lightning", "hydra", "omegaconf", "torchmetrics", "tokenizers", "safetensors", "filelock"),
    *("rich", "torchdata", "reasoning_gym", "math_verify", "pyarrow"),
]
OPTIONAL = ("deepspeed", "triton", "wandb", "datasets", "matplotlib")
NEVER = -1  # a stop token that is never drawn
FLOAT32, BF16 = 1e-4, 5e-2  # differences that two ways of computing may have


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str = "cuda"
    model: str | None = None
    rows: int | None = None
    tokens: int | None = None
    optimizer: str = "adamw"
    compile: bool = False
    stage: str = "grpo"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def shape(self) -> Shape:
        """The model and batch that it trains on."""
        config = shipped_model(self.model or ("moe_small" if self.on_gpu else "moe_nano"))
        rows, tokens = (32, 1024) if self.on_gpu else (8, 64)
        vocab_size = 32768 if self.on_gpu else CHARACTERS.vocab_size
        return Shape(config, vocab_size, self.rows or rows, self.tokens or tokens)

    def autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16) if self.on_gpu else nullcontext()


Figures = dict[str, Any]


def print_figures(figures: Figures, failed: list[str]) -> None:
    values = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(values | ({"failed": "; ".join(failed)} if failed else {})), flush=True)


# --- versions and facts


def versions(options: Options, device: torch.device) -> tuple[Figures, list[str]]:
    found: Figures = {"python": sys.version.split()[0], "torch": torch.__version__}
    found["device"] = device_name(device)
    if options.on_gpu:
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["memory_gib"] = properties.total_memory / 2**30
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    failed = []
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "yes"))
        except Exception as error:
            found[name] = f"no: {error}"[:80]
            failed += [] if name in OPTIONAL else [f"{name} does not import"]
    return found, failed


def milliseconds(step: Callable[[], Any], n: int = 5) -> float:
    return 1e3 * statistics.median(timed(step)(n))


def facts(options: Options, device: torch.device) -> tuple[Figures, list[str]]:
    found, failed = attention_facts(options, device), []
    with options.autocast():
        ones = torch.ones(2, 8, device=device, dtype=torch.bfloat16)
        found["rms_norm_dtype"] = str(F.rms_norm(ones, (8,)).dtype)
    errors, seconds = grouped_facts(options, device)
    found |= seconds
    for name, error in errors.items():
        found[name] = error
        if not error < BF16:
            failed.append(f"{name}: {error:.2g}")
    return found, failed


def attention_facts(options: Options, device: torch.device) -> Figures:
    """ms of a forward and backward, at a shape's first call and later, by backend."""
    dtype = torch.bfloat16 if options.on_gpu else torch.float32
    names = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"]
    found: Figures = {}
    for name in names if options.on_gpu else names[-1:]:
        try:
            for what, lengths in (("new", [257, 259, 263]), ("repeated", [263] * 3)):
                spent = []
                for T in lengths:
                    q = torch.randn(4, 8, T, 64, device=device, dtype=dtype, requires_grad=True)
                    with sdpa_kernel(getattr(SDPBackend, name)):
                        begin = now()
                        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
                        spent.append(now() - begin)
                found[f"{name.lower()}_{what}_ms"] = 1e3 * statistics.median(spent)
        except RuntimeError as error:
            found[f"{name.lower()}_ms"] = f"no: {str(error).splitlines()[0][:60]}"
    return found


def grouped_facts(options: Options, device: torch.device) -> tuple[Figures, Figures]:
    """grouped_mm and its gradients against a loop, with empty and odd groups; poisoned memory."""
    dtype = torch.bfloat16 if options.on_gpu else torch.float32
    ends = torch.tensor([3, 3, 40, 41, 41, 100, 128, 128], dtype=torch.int32, device=device)
    torch.manual_seed(0)
    x = torch.randn(128, 64, device=device, dtype=dtype)
    w = torch.randn(8, 64, 96, device=device, dtype=dtype) / 8
    poison = [torch.full((8, 64, 96), math.nan, device=device, dtype=dtype) for _ in range(8)]
    del poison

    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return grouped_mm(x, w, ends)

    def loop(x: Tensor, w: Tensor) -> Tensor:
        edges = [0, *ends.tolist()]
        return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip(edges, edges[1:]))])  # noqa: B905

    results, seconds = [], {}
    for name, run in (("grouped", grouped), ("loop", loop)):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = run(a, b)
        y.square().mean().backward()
        results.append([y.detach(), a.grad, b.grad])
        seconds[f"{name}_mm_ms"] = milliseconds(lambda run=run: run(x, w))
    pairs = zip(("product", "x_gradient", "w_gradient"), *results, strict=True)
    return {f"grouped_mm_{name}_error": gap(mine, its) for name, mine, its in pairs}, seconds


def gap(mine: Tensor, its: Tensor) -> float:
    """The norm of the difference, over the norm; inf where a number is not finite.

    In bf16 a token now and then goes to another expert: the largest difference would say that.
    """
    mine, its = mine.detach().double().cpu(), its.detach().double().cpu()
    apart = ((mine - its).norm() / its.norm().clamp(min=1e-9)).item()
    return apart if math.isfinite(apart) else math.inf


# --- checks


def small(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    config = shipped_model("moe_nano", init_std=0.1, **changes)
    return Transformer(config, CHARACTERS.vocab_size)


def loss_and_gradient(model: Transformer, ids: Tensor) -> list[Tensor]:
    """The logits of a training forward, and the gradient of its loss by the qkv weights."""
    model.train().zero_grad()
    output = model(ids)
    logits = model.logits(output.hidden_BTD)
    next_token_nll(logits, ids).backward()
    return [logits, model.blocks[0].attention.qkv.weight.grad.clone()]


def checks(options: Options, device: torch.device) -> tuple[Figures, list[str]]:
    ids = torch.tensor(reference_ids()[: 4 * 48]).view(4, 48)
    there = ids.to(device)
    found: Figures = {}
    limits: dict[str, float] = {}

    def compare(name: str, limit: float, mine: list[Tensor], its: list[Tensor]) -> None:
        found[name] = max(gap(a, b) for a, b in zip(mine, its, strict=True))
        limits[name] = limit

    mine = loss_and_gradient(small().to(device), there)
    compare("device_is_cpu_float32", FLOAT32, mine, loss_and_gradient(small(), ids))
    with options.autocast():
        grouped = loss_and_gradient(small().to(device), there)
        loop = loss_and_gradient(small(expert_path="loop").to(device), there)
        compare("grouped_is_loop", BF16, grouped, loop)
        again = loss_and_gradient(small().to(device), there)
        found["equal_runs_are_equal_bits"] = all(map(torch.equal, grouped, again))
        compare("packed_is_plain", BF16, *packed_and_plain(device))
        compare("decode_is_prefill", BF16, *decoded_and_read(there, recorded=False))
        if options.on_gpu:
            compare("recorded_is_read", BF16, *decoded_and_read(there, recorded=True))
            model = small().to(device)
            model.compile_blocks()
            compare("compiled_is_eager", BF16, loss_and_gradient(model, there), grouped)
    matrices = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))
    one, other = orthogonalize(matrices.to(device)), orthogonalize(matrices)
    compare("muon_is_cpu", BF16, [one], [other])
    failed = [f"{name}: {found[name]:.2g}" for name, limit in limits.items() if found[name] > limit]
    return found, failed


def packed_and_plain(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of answers that share prompts: packed, and with prompts of their own."""
    policy, ids = small().to(device).eval(), reference_ids()

    def rollout(copies: int) -> Rollout:
        prompts = [ids[40 * i : 40 * i + 24] for i in range(4) for _ in range(copies)][:8]
        answers = [ids[500 + 9 * i : 509 + 9 * i] for i in range(len(prompts))]
        said = Generation(answers, answers, [True] * len(prompts))
        return pack(prompts, said, CHARACTERS.pad_id)

    with torch.no_grad():
        packed = answer_logprobs(policy, rollout(2))
        rows = rollout(2)
        output = policy(rows.inputs, valid_BT=rows.is_input)
        logp = policy.logits(output.hidden_BTD).float().log_softmax(-1)
        B, A = rows.answer_ids.shape
        at = rows.predict_at[:, :, None].expand(B, A, logp.shape[-1])
        plain = logp.gather(1, at).gather(2, rows.answer_ids[:, :, None]).squeeze(2) * rows.mask
    return [packed], [plain]


@torch.no_grad()
def decoded_and_read(ids: Tensor, recorded: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Logits after each of some tokens: one at a time, and read at once; then with other weights,
    for which steps that were recorded are replayed."""
    model = small().to(ids.device).eval()
    model.records_steps = recorded
    decoded, read = [], []
    for _ in range(2):
        decoder = Decoder(model, ids.shape[1], rows=len(ids))
        decoder.prefill(ids[:, :8])
        decoded.append(torch.stack([decoder(ids[:, t]) for t in range(8, ids.shape[1])], 1))
        read.append(model.logits(model(ids).hidden_BTD)[:, 8:])
        if recorded and recording.can_record(model, torch.get_autocast_dtype("cuda")):
            assert decoder.steps.graphs, "no step was recorded"
        del decoder
        for weight in model.parameters():
            weight.mul_(1.1)
    return decoded, read


# --- speed


def train(options: Options, device: torch.device) -> tuple[Figures, list[str]]:
    shape, failed = options.shape(), []
    torch.manual_seed(0)
    model = Transformer(shape.config, shape.vocab_size)
    if options.compile:
        model.compile_blocks()
    module = pretrain_module(model, shape)
    module.settings = replace(module.settings, optimizer=options.optimizer)
    batches = [batch.to(device) for batch in token_batches(shape, 12)]
    begin = now()
    fit(module, batches[:2], device)
    found: Figures = {"first_steps_s": now() - begin}
    before = module.flops()
    seconds, logged = fit(module, batches, device)
    step = statistics.median(seconds[2:])
    flops = (module.flops() - before) / len(batches)
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16-mixed") if options.on_gpu else None
    found |= {
        "step_ms": 1e3 * step,
        "tokens_per_s": shape.rows * shape.tokens / step,
        "tflop_per_step": flops / 1e12,
        "loss": logged["train/loss"],
    }
    if peak:
        found["mfu"] = mfu(flops, step, peak, devices=1)
    if options.on_gpu:
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found["kernels_ms"] = longest_kernels(lambda: fit(module, batches[:2], device))
    if not math.isfinite(found["loss"]):
        failed.append(f"loss: {found['loss']}")
    return found, failed


def longest_kernels(step: Callable[[], Any]) -> dict[str, float]:
    """ms of the 15 kernels that take longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:15]
    return {e.key[:60]: round(e.self_device_time_total / 1e3, 2) for e in events}


def generating(options: Options, device: torch.device) -> tuple[Figures, list[str]]:
    shape, found = options.shape(), {}
    torch.manual_seed(0)
    model = Transformer(shape.config, shape.vocab_size).to(device).eval()
    ids = reference_ids()
    for rows in (1, 64, 512) if options.on_gpu else (1, 8):
        prompts = [ids[7 * i : 7 * i + 40] for i in range(rows)]
        for recorded in (False, True) if options.on_gpu else (False,):
            model.records_steps = recorded
            n = 64 if options.on_gpu else 16

            def run(prompts: list[list[int]] = prompts, n: int = n) -> None:
                with options.autocast():
                    generate(model, prompts, Sampling(max_new_tokens=n, stop_id=NEVER))

            run()
            name = f"{rows}_rows{'_recorded' if recorded else ''}"
            found[f"{name}_tokens_per_s"] = rows * n / (milliseconds(run, 3) / 1e3)
    if options.on_gpu:
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found, []


def rl(options: Options, device: torch.device) -> tuple[Figures, list[str]]:
    """A step of 64 prompts x 8 answers of 64 tokens (on a CPU of 4 x 4 of 8), judged by a rule."""
    config = options.shape().config
    n_prompts, group, length = (64, 8, 64) if options.on_gpu else (4, 4, 8)
    shared = {"micro_batch_size": 64, "max_new_tokens": length, "lr": 1e-6, "warmup": 0.0}
    ids = reference_ids()
    rows = n_prompts * (group if options.stage == "ppo" else 1)
    prompts = [ids[9 * i : 9 * i + 24] for i in range(rows)]
    batch = PromptBatch(prompts, prompts, list(range(rows)))

    def policy() -> Transformer:
        torch.manual_seed(0)
        return Transformer(config, CHARACTERS.vocab_size)

    if options.stage == "grpo":
        more = {"batch_size": n_prompts, "group_size": group, "minibatch_size": rows * group}
        settings = stage_settings("grpo", **shared, **more)
        module: Any = GRPOModule(policy(), policy(), CHARACTERS, settings, seed=0)
        grpo.reasoning_rewards = by_vowels
    else:
        settings = stage_settings("ppo", batch_size=rows, minibatch_size=rows, **shared)
        networks = [ScalarModel(policy()) for _ in range(2)]
        module = PPOModule(
            policy(),
            value=networks[0],
            reference=policy(),
            reward=networks[1],
            tokenizer=CHARACTERS,
            settings=settings,
            seed=0,
        )
    if options.on_gpu:
        module.policy.records_steps = True
    seconds, logged = fit(module, [batch] * 4, device)
    norm = logged["train/grad_norm"]
    found: Figures = {"step_s": statistics.median(seconds[1:]), "first_step_s": seconds[0]}
    found["grad_norm"] = norm
    found |= {k: v for k, v in logged.items() if "sampler" in k or k.endswith("ratio_max")}
    if options.on_gpu:
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found, [] if math.isfinite(norm) else [f"grad_norm: {norm}"]


def by_vowels(problems: Any, answers: list[str], stopped: Any) -> list[ReasoningReward]:
    share = [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in answers]
    return [ReasoningReward(correct=value, form=0.0) for value in share]


TASKS = {
    "versions": versions,
    "facts": facts,
    "checks": checks,
    "train": train,
    "generate": generating,
    "rl": rl,
}


def main(arguments: list[str]) -> None:
    name, *rest = arguments or [""]
    if name not in TASKS:
        sys.exit(f"error: expected one of {', '.join(TASKS)}, got {name!r}")
    options = read_arguments(Options, rest)
    device = on_device(options.device)
    print_figures(*TASKS[name](options, device))


if __name__ == "__main__":
    start(main)

"""The frozen evaluation suite: what every key means, computed from stored items only.

An item is one model's result on one held-out example: {"set": WHICH, "id": ..., ...}. A key's
`Definition` reads an array off each item and takes a statistic of the arrays' sum: a ratio reads
(numerator, denominator), a mean (value, 1), router health the loads [layers, experts].

95 % intervals, by kind of key (docs/evaluation.md says how often they cover the truth):

- a share of yes/no items: Wilson (1927).
- any other ratio, and every paired difference of ratios (over the items that both stages answered):
  Student's t with two items added, as Bonett and Price (2012) do for paired yes/no items, so that a
  few changed items, or items that don't vary, give no false certainty.
- router health: the seeded percentile bootstrap over items (Efron 1979), with the same resampled
  rows on both sides of a difference, stretched to include the value if the statistic is biased.

Changing the sets, the prompts or a definition needs a new SUITE; tables say which one they used.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import numpy as np

SUITE = "6"
INTERVAL = (0.025, 0.975)  # quantiles
Z = 1.959964  # the normal distribution's 97.5 % quantile
BOOTSTRAPS = 2000
PASS_K = (1, 2, 4, 8)
DIFFICULTIES = ("easy", "medium", "hard")

Metric = dict[str, Any]  # {"value", "n", "low", "high"}, or {"value": None, "why"}
Item = dict[str, Any]
Array = np.ndarray


def ratio(sums: Array) -> Array:
    """[N, 2] -> numerator / denominator [N]."""
    return sums[:, 0] / sums[:, 1]


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One key of the suite. The array shape [...] is the same for all items of a table row."""

    title: str
    sets: tuple[str, ...]  # of the items that it is computed from
    read: Callable[[Item], Any]  # an item's array [...]; None if the item doesn't count
    statistic: Callable[[Array], Array] = ratio  # of sums [N, ...] over items -> [N]
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    is_share: bool = False  # in [0, 1]: shown in percent
    yes_no: bool = False  # each item is a yes or a no
    by_problem: bool = False  # also computed for each task and each difficulty


def load_entropy(sums: Array) -> Array:
    """[N, L, E] -> mean over layers of the load's entropy, over log E: 1 is perfect balance."""
    share = sums / sums.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(share > 0, -share * np.log(share), 0.0)
    return terms.sum(-1).mean(-1) / math.log(sums.shape[-1])


def load_max_over_mean(sums: Array) -> Array:
    """[N, L, E] -> mean over layers of the busiest expert's load over the mean load."""
    return (sums.max(-1) / sums.mean(-1)).mean(-1)


def dead_experts(sums: Array) -> Array:
    """[N, L, E] -> experts of all layers that no token chose."""
    return (sums == 0).sum((-2, -1)).astype(float)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k answers is right, drawn from n of which c are right.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1); k <= n.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _mean(value: str | Callable[[Item], Any]) -> Callable[[Item], Any]:
    """Reads (value, 1) off an item: a field, or what a function makes of it. None isn't counted."""

    def read(item: Item) -> Any:
        found = item.get(value) if isinstance(value, str) else value(item)
        return None if found is None else (float(found), 1.0)

    return read


def _bits(size: str, item: Item) -> Any:
    return (item["bits"], item[size]) if item[size] else None


def _drift(item: Item) -> Any:
    drift = item["drift"]
    return None if drift is None else (sum(drift) / len(drift), item["tokens"])


def _pass(k: int, item: Item) -> float | None:
    return pass_at_k(item["samples"], item["correct"], k) if item["samples"] >= k else None


def _tie(item: Item) -> bool | None:
    win = item.get("win")
    return None if win is None else win == 0.5


def _answered(fact: str, item: Item) -> bool | None:
    return item["contained"] and item["stopped"] if item.get("fact") == fact else None


def _average(title: str, sets: Sequence[str], value: Any, **more: Any) -> Definition:
    return Definition(title=title, sets=tuple(sets), read=_mean(value), **more)


def _share(title: str, sets: Sequence[str], value: Any, **more: Any) -> Definition:
    more = {"better": "higher", "yes_no": True, **more}
    return _average(title, sets, value, is_share=True, **more)


def _router(title: str, statistic: Callable[[Array], Array], **more: Any) -> Definition:
    read = itemgetter("load")
    return Definition(title=title, sets=("router",), read=read, statistic=statistic, **more)


DEFINITIONS: dict[str, Definition] = {
    # the held-out corpus
    **{
        f"bits_per_{name}": Definition(
            title=f"bits per {what}",
            sets=("corpus",),
            read=partial(_bits, size),
            unit="bits",
            better="lower",
        )
        for name, what, size in (("char", "character", "chars"), ("byte", "byte", "bytes"))
    },
    # answers: sampled ones to chat prompts, greedy ones to problems
    "well_formed": _share("well-formed answers", ["chat", "reasoning"], "well_formed"),
    # problems: one greedy answer; and `samples` answers at temperature 1
    "reasoning_accuracy": _share("reasoning accuracy", ["reasoning"], "correct", by_problem=True),
    **{
        f"pass_at_{k}": _share(
            f"pass@{k}", ["reasoning_sampled"], partial(_pass, k), yes_no=False, by_problem=True
        )
        for k in PASS_K
    },
    # sampled answers to chat prompts
    "true_score": _average("true score", ["chat"], "true_score", better="higher"),
    "friendly": _share("friendly answers", ["chat"], "friendly"),
    "reward_model_score": _average(
        "reward-model score", ["chat"], "reward_model_score", better="higher"
    ),
    "win_rate": _share("wins against sft, true rule", ["chat"], "win", yes_no=False),
    "win_rate_ties": _share("ties with sft, true rule", ["chat"], _tie, better=None),
    "win_rate_learned": _share(
        "wins against sft, reward model", ["chat"], "win_learned", yes_no=False
    ),
    "kl_to_sft": _average("KL to sft", ["chat"], "kl_to_sft", unit="nats an answer"),
    "answer_tokens": _average(
        "answer length", ["chat"], lambda item: len(item["ids"]), unit="tokens"
    ),
    "chat_stop_rate": _share("chat answers that stop", ["chat"], "stopped"),
    "chat_format_rate": _share("well-formed chat answers", ["chat"], "well_formed"),
    "distinct_1": _share("distinct words in an answer", ["chat"], "distinct_1", yes_no=False),
    "distinct_2": _share("distinct word pairs in an answer", ["chat"], "distinct_2", yes_no=False),
    # greedy answers to chat prompts
    "chat_exact": _share("chat answers as the reference", ["chat_greedy"], "exact", better=None),
    "chat_contained": _share("chat answers with the reference", ["chat_greedy"], "contained"),
    # facts: how the corpus begins to state one, continued; and greedy answers to questions, which
    # have to hold the sentence and end by themselves
    "knowledge_completed": _share("held-out facts completed", ["completion"], "right"),
    "knowledge_answered": _share(
        "held-out facts answered", ["chat_greedy"], partial(_answered, "heldout")
    ),
    "knowledge_reworded": _share(
        "facts answered in a new wording", ["chat_greedy"], partial(_answered, "reworded")
    ),
    # what the routers do with the held-out corpus
    "router_entropy": _router("router load entropy (1: balanced)", load_entropy, better="higher"),
    "router_max_over_mean": _router(
        "busiest expert over the mean", load_max_over_mean, better="lower"
    ),
    "router_dead": _router("dead experts", dead_experts, unit="experts", better="lower"),
    "router_drift": Definition(
        title="tokens with other experts than in the parent",
        sets=("router",),
        read=_drift,
        is_share=True,
    ),
    # reward models: held-out pairs; a tie is not right
    "pair_accuracy": _share(
        "held-out pairs ordered right", ["pairs"], lambda item: item["chosen"] > item["rejected"]
    ),
    "pair_margin": _average(
        "margin of a pair",
        ["pairs"],
        lambda item: item["chosen"] - item["rejected"],
        better="higher",
    ),
}


def definition(name: str) -> Definition:
    """The definition of a key, also of "reasoning_accuracy/TASK". Raises KeyError."""
    base, _, part = name.partition("/")
    found = DEFINITIONS[base]
    return replace(found, title=f"{found.title}: {part.replace('_', ' ')}") if part else found


def metrics(items: Iterable[Item], reasons: Mapping[str, str], seed: int) -> dict[str, Metric]:
    """Every key that the items define, {name: {"value", "n", "low", "high"}}.

    A key without items is null with its reason from `reasons`, by key or by item set, and left out
    if there is no reason. The order of the items doesn't matter.
    """
    found: dict[str, Metric] = {}
    by_id = _by_id(items)
    for name, defined in DEFINITIONS.items():
        for part, keys in _parts(name, defined, by_id).items():
            vectors = [defined.read(by_id[key]) for key in keys]
            vectors = [vector for vector in vectors if vector is not None]
            if vectors:
                found[part] = _measured(defined, np.asarray(vectors, dtype=float), seed)
        whys = [reasons[key] for key in (name, *defined.sets) if key in reasons]
        if name not in found and whys:
            found[name] = missing(whys[0])
    return found


def differences(after: Iterable[Item], before: Iterable[Item], seed: int) -> dict[str, Metric]:
    """after - before for every key that both define, over their n common items."""
    found: dict[str, Metric] = {}
    afters, befores = _by_id(after), _by_id(before)
    common = {key: item for key, item in afters.items() if key in befores}
    for name, defined in DEFINITIONS.items():
        for part, keys in _parts(name, defined, common).items():
            pairs = [(defined.read(afters[key]), defined.read(befores[key])) for key in keys]
            pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
            if pairs:
                sides = (np.asarray(side, dtype=float) for side in zip(*pairs, strict=True))
                found[part] = _difference(defined, *sides, seed)
    return found


def missing(why: str) -> Metric:
    """A null cell with its reason."""
    return {"value": None, "why": why}


def joined(items: Iterable[Item], late: Iterable[Item]) -> list[Item]:
    """The items with the values that later models gave them, {"set", "id", NAME: VALUE...}."""
    said: dict[tuple[str, str], Item] = {}
    for item in late:
        said.setdefault(_key(item), {}).update(item)
    return [item | said.get(_key(item), {}) for item in items]


def difficulties(tasks: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """easy, medium or hard: terciles, within each task, of the worked solution's length.

    `lengths` are the characters of the worked solution, or of the question if there is none, for
    all held-out problems, so that a problem's difficulty doesn't depend on how many are asked. A
    problem's rank is the share of its task's problems that are shorter, with those of equal length
    counted half. A third may hold more of one task than of another: compare stages at one
    difficulty, not the difficulties of one stage.
    """
    by_task: dict[str, list[int]] = {}
    for task, length in sorted(zip(tasks, lengths, strict=True)):
        by_task.setdefault(task, []).append(length)

    def difficulty(task: str, length: int) -> str:
        values = by_task[task]
        twice = bisect_left(values, length) + bisect_right(values, length)
        return DIFFICULTIES[min(2, 3 * twice // (2 * len(values)))]

    return [difficulty(task, length) for task, length in zip(tasks, lengths, strict=True)]


# --- intervals


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927, eq. 4)."""
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def padded_t(values: Array, bound: tuple[float, float] | None) -> tuple[float, float]:
    """A 95 % interval of the mean of values [n]: Student's t with two items added.

    Bonett and Price (2012, J. Educ. Behav. Stat. 37, 479) add a pair that gains and one that loses
    to paired yes/no items. Here values within `bound` get one item at each end of it; unbounded
    ones get two, as far from the mean as the furthest value, so the interval has no width only if
    all n are equal. The degrees of freedom are those of the n items.
    """
    n = len(values)
    mean = values.mean()
    spread = np.abs(values - mean).max()
    padded = np.append(values, bound or (mean - spread, mean + spread))
    half = t_quantile(max(1, n - 1)) * padded.std(ddof=1) / math.sqrt(n + 2)
    low, high = bound or (-math.inf, math.inf)
    return float(max(low, padded.mean() - half)), float(min(high, padded.mean() + half))


def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t by its normal expansion (Abramowitz and Stegun 1964,
    26.7.5): 11 % short for df = 1, within 1 % from 2 and 0.1 % from 4."""
    return (
        Z
        + (Z**3 + Z) / (4 * df)
        + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * df**2)
        + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * df**3)
        + (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / (92160 * df**4)
    )


def linear(vectors: Array) -> Array:
    """Values [n] of (numerator, denominator) [n, 2] with the mean and variance of the ratio of the
    sums (the delta method; Cochran 1977, section 2.11). A mean's values stay as they are."""
    numerator, denominator = vectors.T
    found = numerator.sum() / denominator.sum()
    return found + (numerator - found * denominator) / denominator.mean()


def resampled_sums(vectors: Array, seed: int) -> Array:
    """Sums [BOOTSTRAPS, ...] of n vectors [n, ...], drawn with replacement by seed and n."""
    n = len(vectors)
    rng = np.random.default_rng(seed)
    at_once = max(1, 2_000_000 // n)  # limits the memory: a held-out text may have many blocks
    sums = []
    for at in range(0, BOOTSTRAPS, at_once):
        rows = rng.integers(0, n, (min(at_once, BOOTSTRAPS - at), n))
        rows += n * np.arange(len(rows))[:, None]
        counts = np.bincount(rows.ravel(), minlength=rows.size).reshape(rows.shape)
        sums.append(np.tensordot(counts.astype(float), vectors, axes=1))
    return np.concatenate(sums)


def _measured(defined: Definition, vectors: Array, seed: int) -> Metric:
    n = len(vectors)
    value = float(defined.statistic(vectors.sum(0)[None])[0])
    if defined.statistic is not ratio:
        low, high = np.quantile(defined.statistic(resampled_sums(vectors, seed)), INTERVAL)
    elif defined.yes_no:
        low, high = wilson(value * n, n)
    else:
        low, high = padded_t(linear(vectors), (0.0, 1.0) if defined.is_share else None)
    return _metric(value, n, low, high)


def _difference(defined: Definition, after: Array, before: Array, seed: int) -> Metric:
    def gain(sums: Array) -> Array:
        return defined.statistic(sums[:, 0]) - defined.statistic(sums[:, 1])

    both = np.stack([after, before], 1)
    if defined.statistic is not ratio:
        low, high = np.quantile(gain(resampled_sums(both, seed)), INTERVAL)
    else:
        bound = (-1.0, 1.0) if defined.is_share else None
        low, high = padded_t(linear(after) - linear(before), bound)
    return _metric(float(gain(both.sum(0)[None])[0]), len(after), low, high)


def _metric(value: float, n: int, low: float, high: float) -> Metric:
    low, high = float(min(low, value)), float(max(high, value))
    return {"value": round(value, 6), "n": n, "low": round(low, 6), "high": round(high, 6)}


def _key(item: Item) -> tuple[str, str]:
    return item["set"], str(item["id"])


def _by_id(items: Iterable[Item]) -> dict[tuple[str, str], Item]:
    """Sorted, so that intervals don't depend on the order of a file's lines."""
    return {_key(item): item for item in sorted(items, key=_key)}


def _parts(
    name: str, defined: Definition, by_id: dict[tuple[str, str], Item]
) -> dict[str, list[tuple[str, str]]]:
    """{name: keys of its items}: the whole, then each task, then each difficulty."""
    keys = [key for key in by_id if key[0] in defined.sets]
    parts = {name: keys}
    if defined.by_problem:
        tasks = sorted({by_id[key]["task"] for key in keys})
        parts |= {f"{name}/{t}": [k for k in keys if by_id[k]["task"] == t] for t in tasks}
        for level in DIFFICULTIES:
            chosen = [k for k in keys if by_id[k]["difficulty"] == level]
            parts[f"{name}/difficulty_{level}"] = chosen
    return parts

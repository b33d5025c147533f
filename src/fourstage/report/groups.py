"""Ladders that differ in their settings, as groups of seeds.

A setting is a key of a run's config or of an ancestor's (stages.sft.lr), and the route, the stages
of the policy's line. What can't change a figure is none: paths of outputs, loggers, devices, how
often something is logged. The commit and the versions are only said.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from fourstage.errors import UserError
from fourstage.report.ladder import Run
from fourstage.runs.records import start_name
from fourstage.runs.select import is_value

SECTIONS = ("model", "tokenizer", "data", "evaluation")  # of a config, which may change figures
WITHOUT_EFFECT = {  # a stage's keys that don't; a test compares them with stages/base.py
    *("parent", "reward_parent", "micro_batch_size", "val_every", "log_every", "sample_every"),
    *("checkpoint_every", "max_skipped"),
}
ROUTE, SEED = "route", "seed"
# a name -> beginnings of the keys that usually follow from it
NAMES = {
    "model.name": ("model.",),
    "tokenizer.name": ("tokenizer.",),
    "data.name": ("data.",),
    "debug": ("stages.", "evaluation."),
}
ABSENT = "–"  # a stage that the ladder doesn't reach
DEFAULT = "default"  # of a setting that an earlier version, which made the run, didn't have
MOST_NAMED = 3  # of the settings that always change together

Settings = dict[str, Any]  # key by dots -> value that can be hashed
CONSTANTS = {None: "null", True: "true", False: "false"}


@dataclass(frozen=True)
class Factor:
    """Settings that always change together: keys, short names, and their values by unit; `first`
    are those that others are compared with."""

    keys: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    first: tuple[Any, ...] | None = None

    @property
    def name(self) -> str:
        return _listed(self.names)

    @property
    def order(self) -> list[tuple[Any, ...]]:
        """The distinct values: the first, then numbers by size, texts as the units have them."""
        return sorted(dict.fromkeys(self.values), key=lambda v: (v != self.first, _place(v)))

    def said(self, unit: int) -> str:
        """A unit's values for readers: lr=1e-3, batch_size=8; a route is only its value."""
        return self.shown(self.values[unit])

    def shown(self, values: tuple[Any, ...]) -> str:
        """The same of any values."""
        return _listed(
            [
                typed(value) if name == ROUTE else f"{name}={typed(value)}"
                for name, value in zip(self.names, values, strict=True)
                if value != ABSENT
            ]
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" * (len(names) > MOST_NAMED)
    return ", ".join(names[:MOST_NAMED]) + more


def settings(line: Mapping[str, Run]) -> Settings:
    """What may change the figures of a run, from its ancestors and, last in `line`, itself. Where
    they don't agree, the value is a tuple of theirs."""
    found: dict[str, dict[Any, None]] = {}
    for stage, run in line.items():
        config, own = run.config, {"debug": run.record["debug"]}
        for section in SECTIONS:
            own |= _flat(config.get(section, {}), f"{section}.")
        of_stage = _flat(config["stages"][stage], f"stages.{stage}.")
        own |= {k: v for k, v in of_stage.items() if k.split(".")[2] not in WITHOUT_EFFECT}
        if "precision" in config.get("trainer", {}):
            own["trainer.precision"] = config["trainer"]["precision"]
        if "digest" in run.record.get("data", {}):
            own[f"data.digest.{stage}"] = run.record["data"]["digest"]
        own |= {"start": start_name(run.record)} if not run.parents else {}
        for key, value in own.items():
            found.setdefault(key, {})[value] = None
    last = list(line.values())[-1]
    said = {key: tuple(each) if len(each) > 1 else next(iter(each)) for key, each in found.items()}
    return said | {ROUTE: route(last, line), SEED: last.config["seed"]}


def _flat(tree: Mapping[str, Any], path: str) -> Settings:
    """Key by dots -> value; a list is its JSON."""
    found: Settings = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{path}{key}.")
        else:
            is_plain = value is None or isinstance(value, str | int | float)
            found[f"{path}{key}"] = value if is_plain else json.dumps(value)
    return found


def route(run: Run, line: Mapping[str, Run]) -> str:
    """The stages of the policy's line up to a run: pretrain → sft → grpo."""
    by_id = {one.id: one for one in line.values()}
    stages = []
    at: Run | None = run
    while at is not None:
        stages.insert(0, at.stage)
        at = by_id.get(at.parents.get("policy", ""))
    return " → ".join(stages)


def ancestry(run: Run, line: Mapping[str, Run]) -> dict[str, Run]:
    """The part of a ladder that a run descends from, and the run last."""
    by_id = {one.id: one for one in line.values()}
    found: dict[str, Run] = {}
    for parent in run.parents.values():
        if parent in by_id:
            found |= ancestry(by_id[parent], line)
    return {**found, run.stage: run}


def seeds(line: Mapping[str, Run]) -> str:
    """The seeds of a run and its ancestors: "0", or "0, 1" if they are not the same."""
    return ", ".join(dict.fromkeys(str(run.config["seed"]) for run in line.values()))


def factors(
    units: Sequence[Settings], by: Sequence[str] | None = None, beside: Sequence[str] = ()
) -> list[Factor]:
    """What the units differ in except for the seed; with `by`, which of these keys. Short names
    tell a key from those `beside` it too.

    A key of the model, the data or the tokenizer that follows from its name isn't said. Keys that
    always change together are one factor. A key that a unit lacks makes no difference.
    """
    columns = {key: _column(units, key) for key in dict.fromkeys(k for u in units for k in u)}
    columns = {key: column for key, column in columns.items() if len({*column} - {ABSENT}) > 1}
    unclear = {k: c for k, c in columns.items() if len({*c} - {ABSENT, DEFAULT}) == 1}
    columns = {key: column for key, column in columns.items() if key not in unclear}
    columns |= {key: c for key, c in unclear.items() if _tells_apart(c, [*columns.values()])}
    if by is None:
        columns.pop(SEED, None)
        for name, families in NAMES.items():
            for key in [k for k in columns if k != name and k.startswith(families)]:
                if name in columns and _follows(columns[key], columns[name]):
                    del columns[key]
        for key in [k for k in columns if k.startswith("data.digest.")]:
            others = [c for k, c in columns.items() if k.startswith("data.") and k != key]
            if others and _follows(columns[key], list(zip(*others, strict=True))):
                del columns[key]
    else:
        columns = {key: columns[key] for key in by if key in columns}
    if ROUTE in columns:
        columns[ROUTE] = _short_routes(columns[ROUTE])
    names = short_names([*columns, *(key for key in beside if key not in columns)])
    together: list[list[str]] = []
    # the route comes first in a group's name, then what other settings may follow from
    for key in sorted(columns, key=lambda k: (k != ROUTE, not k.endswith((".name", ".loss")))):
        same = [
            keys
            for keys in together
            if _follows(columns[keys[0]], columns[key]) and _follows(columns[key], columns[keys[0]])
        ]
        same[0].append(key) if same else together.append([key])
    return [
        Factor(
            tuple(keys),
            tuple(names[key] for key in keys),
            tuple(zip(*(columns[key] for key in keys), strict=True)),
        )
        for keys in together
    ]


def _column(units: Sequence[Settings], key: str) -> list[Any]:
    """A key's value in every unit."""
    return [value_of(unit, key) for unit in units]


def value_of(unit: Settings, key: str) -> Any:
    """A unit's value, or what stands for the one that it lacks."""
    return unit[key] if key in unit else _lacking(unit, key)


def _lacking(unit: Settings, key: str) -> str:
    """What stands for the value of a key that a unit lacks."""
    section = key.rpartition(".")[0]
    is_known = section == "model" or (section.startswith("stages.") and section.count(".") == 1)
    found = _below(unit, f"{key}.")
    has_others = is_known and any(other.startswith(f"{section}.") for other in unit)
    return DEFAULT if has_others and found == ABSENT else found


def _tells_apart(column: Sequence[Any], others: Sequence[Sequence[Any]]) -> bool:
    """Whether two units that all `others` (the seed among them) are alike in differ here: then the
    one value that is known isn't the default, or they would be one run."""
    alike: dict[tuple[Any, ...], set[Any]] = {}
    for unit, value in enumerate(column):
        alike.setdefault(tuple(other[unit] for other in others), set()).add(value)
    return any(len(values - {ABSENT}) > 1 for values in alike.values())


def _below(unit: Settings, path: str) -> str:
    """The settings under a key that another unit sets to null."""
    found = [
        f"{key.removeprefix(path)}: {typed(value)}"
        for key, value in unit.items()
        if key.startswith(path)
    ]
    return f"{{{', '.join(found)}}}" if found else ABSENT


def _follows(column: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether a value is known from the other one."""
    return len(set(zip(column, other, strict=True))) == len(set(other))


def _short_routes(routes: Sequence[str]) -> list[str]:
    """The routes from the last stage that all begin with."""
    parts = [route.split(" → ") for route in routes]
    same = 0
    while all(len(part) > same + 1 and part[: same + 2] == parts[0][: same + 2] for part in parts):
        same += 1
    return [" → ".join(part[same:]) for part in parts]


def swept(runs: Iterable[Run]) -> dict[str, list[str]]:
    """stage -> keys of their own configs that its finished real runs differ in; of keys that always
    change together the first."""
    found: dict[str, list[str]] = {}
    by_stage: dict[str, list[Settings]] = {}
    for run in runs:
        if run.is_finished and not run.is_debug:
            by_stage.setdefault(run.stage, []).append(settings({run.stage: run}))
    for stage, units in by_stage.items():
        keys = [factor.keys[0] for factor in factors(units)]
        known = ("stages.", "trainer.", *(f"{section}." for section in SECTIONS))
        own = [key for key in keys if key.startswith(known) and not key.startswith("data.digest.")]
        found |= {stage: own} if own else {}
    return found


def chosen(units: Sequence[Settings], by: Sequence[str]) -> list[str]:
    """The keys that by=lr,stages.grpo.loss means: a whole key, or how one ends. Raises UserError
    for one that is ambiguous, or that the ladders don't differ in."""
    if not all(by):
        raise UserError(f"by={','.join(by)}: a name is missing: expected by=KEY or by=KEY,KEY")
    every = dict.fromkeys(key for unit in units for key in unit)
    differ = [k for k in every if k != SEED and len({*_column(units, k)} - {ABSENT}) > 1]
    known = ", ".join(
        short_names([key for key in differ if not key.startswith("data.digest.")]).values()
    )
    found = []
    for name in by:
        if name == SEED:
            raise UserError(
                "by=seed: seeds are what means and intervals are over, so they make no groups: "
                f"group by {known or 'another setting'}"
            )
        same = [key for key in differ if key in (name, f"{name}.name")]
        ends = same[:1] or [key for key in differ if key.endswith(f".{name}")]
        if not ends:
            hint = " (by=route groups by the stages before)" if name == "parent" else ""
            raise UserError(
                f"by={name}: these ladders don't differ in it, but in {known or 'nothing'}{hint}"
            )
        if len(ends) > 1:
            raise UserError(f"by={name}: there are several: {', '.join(ends)}")
        found += ends
    return list(dict.fromkeys(found))


def base_of(words: Sequence[str], found: Sequence[Factor]) -> dict[str, str]:
    """Key -> value, as typed, of base=lr=3e-4,loss=dapo or, for a route, base=sft->grpo. Raises
    UserError for a key that the groups don't differ in, and for one that is ambiguous."""
    base: dict[str, str] = {}
    for word in words:
        for part in re.split(r",(?![^\[{(]*[\]})])", word.removeprefix("base=")):
            name, is_setting, text = part.strip().partition("=")
            if not is_setting or name == ROUTE:
                name, text = ROUTE, re.sub(r"\s*(->|→)\s*", " → ", text or name)
            if not text:
                raise UserError(f"{word}: a value is missing: expected base=KEY=VALUE")
            keys = [(k, short) for f in found for k, short in zip(f.keys, f.names, strict=True)]
            same = [k for k, short in keys if name in (k, short, k.removesuffix(".name"))]
            ends = same[:1] or [k for k, _ in keys if k.endswith(f".{name}")]
            if len(ends) != 1:
                there = ", ".join(ends or [short for _, short in keys]) or "nothing"
                why = "there are several:" if ends else "the groups don't differ in it, but in"
                raise UserError(f"base={part.strip()}: {why} {there}")
            if ends[0] in base:
                raise UserError(f"base: {name} is given twice")
            base[ends[0]] = text
    return base


def is_of(base: tuple[str, str], unit: Settings) -> bool:
    """Whether a unit has a value that was typed; a route may be typed without its beginning."""
    key, text = base
    value = value_of(unit, key)
    if key == ROUTE:
        return f" → {value}".endswith(f" → {text}")
    return typed(value) == text or is_value(value, text)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last parts, as many as tell it from the others: lr, sft.lr, model."""
    parts = {key: key.removeprefix("stages.").removesuffix(".name").split(".") for key in keys}
    return {
        key: next(
            ".".join(own[-n:])
            for n in range(1, len(own) + 1)
            if n == len(own)
            or not any(other[-n:] == own[-n:] for k, other in parts.items() if k != key)
        )
        for key, own in parts.items()
    }


def typed(value: Any) -> str:
    """A value as a user would type it: 1e-3, 0.05, null."""
    if value is None or isinstance(value, bool):
        return CONSTANTS[value]
    if isinstance(value, tuple):
        return ", ".join(map(typed, value))
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """The shortest text of a float: 0.05, 1e-3, 3.5e-4."""
    sign, digits, power = Decimal(repr(value)).normalize().as_tuple()
    text = "".join(map(str, digits))
    power = int(power) + len(text) - 1
    scientific = f"{'-' * sign}{text[0]}{'.' * (len(text) > 1)}{text[1:]}e{power}"
    return min(f"{Decimal(repr(value)).normalize():f}", scientific, key=len)


def _place(values: tuple[Any, ...]) -> list[tuple[int, float]]:
    """Sorts values: null, numbers by size, texts as they come, the longest route first; what isn't
    reached last."""
    return [
        (0, 0.0)
        if value is None or value == DEFAULT
        else (1, float(value))
        if isinstance(value, int | float)
        else (3 if value == ABSENT else 2, -float(str(value).count(" → ")))
        for value in values
    ]

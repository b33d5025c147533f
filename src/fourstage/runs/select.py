"""Which runs a command is about: conditions on their records, stage=grpo seed=0,1 model!=moe_nano.

A key is stage, id, status, debug, tag, parent, model, data, tokenizer, seed, or a key of a run's
config by dots (stages.grpo.lr). A comma means "one of"; all conditions must hold.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fourstage.errors import UserError
from fourstage.runs.records import Record

CONDITION = re.compile(r"([\w.]+)(!?)=(.*)", re.DOTALL)
NAMED = ("model", "data", "tokenizer")  # model=x is about config.model.name
CONSTANTS = {"null": None, "true": True, "false": False}
ANY_DEBUG = {"debug=true": True, "debug=false": False}  # of any name
AT_MOST = 12  # values that a message names


def matching(records: Mapping[Path, Record], conditions: Sequence[str]) -> dict[Path, Record]:
    """The runs for which all conditions hold, in the records' order.

    1e-3 is 0.001, and null is the value of what isn't set. key!=value holds for the runs that have
    the key with another value, and debug=true for debug runs of any name. Raises UserError for what
    isn't a condition, an unknown key, or a value that no run has.
    """
    names = {record["id"]: (record["stage"], folder.name) for folder, record in records.items()}
    for wanted in (ANY_DEBUG[condition] for condition in conditions if condition in ANY_DEBUG):
        records = {f: r for f, r in records.items() if (r["debug"] is not None) == wanted}
    parsed = [_parse(condition) for condition in conditions if condition not in ANY_DEBUG]
    facts = {folder: _facts(folder, record, names) for folder, record in records.items()}
    if records:
        for key, _, values in parsed:
            _check(key, values, list(facts.values()))
    return {
        folder: record
        for folder, record in records.items()
        if all(
            key in facts[folder] and _has(facts[folder][key], wanted) != negated
            for key, negated, wanted in parsed
        )
    }


def without(records: Mapping[Path, Record], conditions: Sequence[str]) -> dict[str, list[Path]]:
    """The runs that a condition doesn't choose, only as their version didn't have the setting, so
    that what they were trained with isn't known."""
    found: dict[str, list[Path]] = {}
    for condition in conditions:
        key = _parse(condition)[0]
        rest = matching(records, [other for other in conditions if other != condition])
        facts = {folder: _facts(folder, record, {}) for folder, record in rest.items()}
        found[condition] = [folder for folder in rest if _is_older(facts[folder], key)]
    return found


def _is_older(facts: Mapping[str, list[Any]], key: str) -> bool:
    """Whether a run lacks a setting of the model or of a stage, and has others of it."""
    section = key.rpartition(".")[0]
    is_known = section == "model" or (section.startswith("stages.") and section.count(".") == 1)
    return is_known and key not in facts and any(k.startswith(f"{section}.") for k in facts)


def not_chosen(n: int) -> str:
    """How many runs a condition isn't asked of."""
    one, few = ("1 run is", "it isn't") if n == 1 else (f"{n} runs are", "they aren't")
    return f"{one} of a version without it: {few} chosen"


def _parse(condition: str) -> tuple[str, bool, list[str]]:
    """The key, whether it is about other values, and the values."""
    found = CONDITION.fullmatch(condition)
    if not found or not all(found[3].split(",")):
        raise UserError(
            f"{condition!r}: expected key=value, key=value,value or key!=value: for example "
            "stage=grpo seed=0,1"
        )
    return found[1], bool(found[2]), found[3].split(",")


def _facts(
    folder: Path, record: Record, names: Mapping[str, tuple[str, str]]
) -> dict[str, list[Any]]:
    """key -> values of a run: several where it has several names or tags."""
    leaves = _leaves(record["config"])
    parent = record["parents"].get("policy")
    facts = {
        "stage": [record["stage"]],
        "id": [folder.name, record["id"]],
        "status": [record["status"]],
        "debug": [record["debug"]],
        "tag": record.get("tags") or [],
        "parent": [*names.get(parent, ()), parent] if parent else [None],
    }
    facts |= {name: leaves[f"{name}.name"] for name in NAMED if f"{name}.name" in leaves}
    return facts | {key: values for key, values in leaves.items() if key not in facts}


def _leaves(tree: Mapping[str, Any], path: str = "") -> dict[str, list[Any]]:
    """Key by dots -> value of a config; a list stands for its entries."""
    found: dict[str, list[Any]] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value if isinstance(value, list) else [value]
    return found


def _check(key: str, wanted: Sequence[str], facts: Sequence[Mapping[str, list[Any]]]) -> None:
    """Raises UserError if no run has the key or one of the values."""
    known = list(dict.fromkeys(key for values in facts for key in values))
    if key not in known:
        ends = [name for name in known if name.endswith(f".{key}")]
        hint = f"did you mean {' or '.join(ends)}?" if ends else _near(key, known)
        raise UserError(f"no run has a setting {key!r}: {hint}")
    there = [value for values in facts for value in values.get(key, ())]
    for text in wanted:
        if not _has(there, [text]):
            shown = list(dict.fromkeys(_written(value) for value in there))
            older = sum(_is_older(values, key) for values in facts)
            more = f"; {not_chosen(older)}" if older else ""
            raise UserError(f"no run has {key}={text}: {_near(text, shown)}{more}")


def _near(name: str, known: Sequence[str]) -> str:
    """The known names that are spelt alike, and what there is."""
    near = get_close_matches(name, known)
    more = f" and {len(known) - AT_MOST} more" if len(known) > AT_MOST else ""
    there = f"the runs have {', '.join(known[:AT_MOST])}{more}" if known else "the runs have none"
    return f"did you mean {' or '.join(near)}? ({there})" if near else there


def _has(values: Sequence[Any], wanted: Sequence[str]) -> bool:
    return any(is_value(value, text) for value in values for text in wanted)


def is_value(value: Any, text: str) -> bool:
    """Whether a value is what was typed; numbers are compared as numbers."""
    if value is None or isinstance(value, bool):
        return CONSTANTS.get(text.lower(), text) is value
    if isinstance(value, int | float):
        try:
            return float(text) == value
        except ValueError:
            return False
    return str(value) == text


def _written(value: Any) -> str:
    """A value as it is typed."""
    return next((name for name, constant in CONSTANTS.items() if constant is value), str(value))

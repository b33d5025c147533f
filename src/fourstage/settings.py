"""Plain config values -> frozen dataclasses, with one clear line for every mistake.

The dataclasses are the schema: their annotations say what a key may hold, their `__post_init__`
what values make sense. Nothing else of the package knows about config files.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fourstage.errors import UserError

LARGEST_INT = 2**63 - 1  # PyTorch counts in 64 bits and computes in float32
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the keyword-only dataclass `cls` from config values.

    `where` is the path of the values in the config ("stages.grpo", "" for the root); it stands in
    front of every message. Whole numbers become floats where a float is wanted, and lists become
    tuples where a tuple is wanted, so that equal settings have one form (run ids hash them).

    Raises UserError for an unknown or missing key, a value of the wrong type, and whatever the
    class' own `__post_init__` refuses (as UserError("key: what is wrong")).
    """
    assert is_dataclass(cls)
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{_join(where, key)}: unknown key, {hint}")
    ready = {}
    for name, field in known.items():
        if name in values:
            ready[name] = _convert(hints[name], values[name], _join(where, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{_join(where, name)}: missing, expected {_describe(hints[name])}")
    try:
        return cls(**ready)
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else _join(where, message)) from None


def hashed(config: Any) -> dict[str, Any]:
    """What of a config is part of a run's id.

    A field that came after the class' HASHED_UP_TO is left out where it has its default, which has
    to change nothing: so a config that grows renames no run.
    """
    names = [f.name for f in fields(config)]
    first = names[: names.index(config.HASHED_UP_TO) + 1]
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    defaults |= {
        f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING
    }
    return {
        name: value
        for name, value in asdict(config).items()
        if name in first or name not in defaults or value != defaults[name]
    }


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or UserError."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, args, value, where)
    if is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    wrong = UserError(f"{where}: expected {_describe(hint)}, got {value!r}")
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise wrong
        return value
    if origin in (list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise wrong
        if origin is tuple and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise wrong
            items = args
        else:
            items = args[:1] * len(value)
        return origin(
            _convert(item, v, f"{where}[{i}]")
            for i, (item, v) in enumerate(zip(items, value, strict=True))
        )
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise wrong
        item = args[1] if args else Any
        return {key: _convert(item, v, f"{where}.{key}") for key, v in value.items()}
    if hint is Any:
        return value
    if hint is types.NoneType:
        if value is not None:
            raise wrong
        return None
    assert hint in (bool, int, float, str), f"{where}: no rule for {hint}"
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: expected a finite number, got {value}")
        if abs(value) > LARGEST_FLOAT:
            raise UserError(f"{where}: must be at most {LARGEST_FLOAT:.2g} in size, got {value}")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong
    if hint is int and abs(value) > LARGEST_INT:
        raise UserError(f"{where}: must be at most {LARGEST_INT} in size, got {value}")
    return value


def _convert_union(hint: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in args:
        return None
    options = [a for a in args if a is not types.NoneType]
    if len(options) == 1 and (is_dataclass(options[0]) or get_origin(options[0])):
        return _convert(options[0], value, where)  # its own message is the more exact one
    for option in options:
        try:
            return _convert(option, value, where)
        except UserError:
            continue
    raise UserError(f"{where}: expected {_describe(hint)}, got {value!r}")


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values"
    if origin in (list, tuple):
        return "a list"
    if is_dataclass(hint) or origin is dict or hint is dict:
        return "keys and values"
    return _WORDS.get(hint, "a value")

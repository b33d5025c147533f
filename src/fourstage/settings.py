"""Plain config values -> frozen dataclasses, with one clear line for every mistake.

The dataclasses are the schema: their annotations say what a key may hold, their `__post_init__`
which values make sense. Nothing else in the package knows about config files.
"""

import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fourstage.errors import UserError, did_you_mean

# PyTorch counts in 64 bits and computes in float32
LARGEST = {int: 2**63 - 1, float: (2 - 2**-23) * 2.0**127}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

MOST_SEED = 2**32 - 1  # it is multiplied into the seeds of steps and rows

T = TypeVar("T")


def at_least(least: float, **options: Any) -> Any:
    """A field with a bound, which `Bounded` checks; so are the next two."""
    return field(metadata={"bound": f"at least {least}", "holds": lambda x: x >= least}, **options)


def between(least: float, most: float, **options: Any) -> Any:
    bound = f"between {least} and {most}"
    return field(metadata={"bound": bound, "holds": lambda x: least <= x <= most}, **options)


def positive(**options: Any) -> Any:
    return field(metadata={"bound": "above 0", "holds": lambda x: x > 0}, **options)


def share(**options: Any) -> Any:
    bound = "a share between 0 and 1"
    return field(metadata={"bound": bound, "holds": lambda x: 1e-9 < x < 1}, **options)


class Bounded:
    """A dataclass that raises UserError for a value, if any, outside its field's bound."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.metadata and value is not None and not f.metadata["holds"](value):
                raise UserError(f"{f.name}: must be {f.metadata['bound']}, got {value}")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the keyword-only dataclass `cls` from config values.

    `where` is the path of the values in the config ("stages.grpo", "" for the root), with which
    every message starts. Whole numbers become floats and lists become tuples where the annotation
    says so, because equal settings must hash alike in run ids.

    Raises UserError for an unknown or missing key, a value of the wrong type, and whatever the
    class's own `__post_init__` refuses (as UserError("key: what is wrong")).
    """
    assert is_dataclass(cls)
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected keys and values, got {values!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise UserError(f"{_join(where, key)}: unknown key, {hint}")
    ready = {}
    for name, f in known.items():
        if name in values:
            ready[name] = _convert(hints[name], values[name], _join(where, name))
        elif f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{_join(where, name)}: missing, expected {_describe(hints[name])}")
    try:
        return cls(**ready)
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else _join(where, message)) from None


def from_arguments(cls: type[T], arguments: Sequence[str]) -> T:
    """An instance from a command's key=value arguments. Raises UserError as `build` does."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r}: expected key=value, such as run=sft (see --help)")
        values[key] = _from_text(hints.get(key, str), text)
    return build(cls, values, "")


def given_once(words: Sequence[str]) -> None:
    """Raises UserError if two of the key=value words have the same key."""
    keys = [word.partition("=")[0] for word in words]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key}: given twice")


def _from_text(hint: Any, text: str) -> Any:
    """The text as the number or truth value that `hint` wants; `build` refuses what is neither."""
    kinds = {hint, *get_args(hint)}
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    for kind in kinds & {int, float}:
        with suppress(ValueError):
            return kind(text)
    return text


def hashed(config: Any) -> dict[str, Any]:
    """The part of a config that counts for a run's id.

    A field after the class's HASHED_UP_TO is left out at its default, which has to change nothing,
    so that a config can grow without renaming runs.
    """
    found: dict[str, Any] = {}
    values, is_new = asdict(config), False
    for f in fields(config):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if not is_new or values[f.name] != default:
            found[f.name] = values[f.name]
        is_new = is_new or f.name == config.HASHED_UP_TO
    return found


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it. Raises UserError."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, where)
    if is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        items = args if _is_fixed(hint) else args[:1] * len(value)
        if len(items) == len(value):
            pairs = enumerate(zip(items, value, strict=True))
            return origin(_convert(item, v, f"{where}[{i}]") for i, (item, v) in pairs)
    if origin is dict and isinstance(value, Mapping):
        item = args[1] if args else Any
        return {key: _convert(item, v, f"{where}.{key}") for key, v in value.items()}
    if origin is Literal and any(value == a and type(value) is type(a) for a in args):
        return value
    if hint is Any or (hint in (bool, str) and isinstance(value, hint)):
        return value
    if hint in LARGEST and isinstance(value, (int, hint)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: expected a finite number, got {value}")
        if abs(value) > (limit := LARGEST[hint]):
            shown = limit if hint is int else f"{limit:.2g}"
            raise UserError(f"{where}: must be at most {shown} in size, got {value}")
        return hint(value)
    raise UserError(f"{where}: expected {_describe(hint)}, got {value!r}")


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    if value is None and types.NoneType in get_args(hint):
        return None
    options = [option for option in get_args(hint) if option is not types.NoneType]
    if len(options) == 1 and (is_dataclass(options[0]) or get_origin(options[0])):
        return _convert(options[0], value, where)  # with a more exact message
    for option in options:
        try:
            return _convert(option, value, where)
        except UserError:
            continue
    raise UserError(f"{where}: expected {_describe(hint)}, got {value!r}")


def _is_fixed(hint: Any) -> bool:
    """Whether it is a tuple of so many values."""
    return get_origin(hint) is tuple and get_args(hint)[-1] is not Ellipsis


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is types.NoneType else _describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (list, tuple):
        return f"a list of {len(args)} values" if _is_fixed(hint) else "a list"
    if is_dataclass(hint) or origin is dict:
        return "keys and values"
    return WORDS.get(hint, "a value")

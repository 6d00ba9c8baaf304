"""Typed settings: dataclasses to and from JSON, and overrides by dotted path (`data.batch=2048`). An unknown field is an error."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from annotated_types import Ge

from .errors import IntermodalError, nearest

T = TypeVar("T")
Positive = typing.Annotated[int, Ge(1)]
NotNegative = typing.Annotated[int, Ge(0)]
PYTHONS = {"True": "true", "False": "false", "None": "null"}
"""How Python spells JSON's words: where a value may be any, as a text it would say something else."""


def smallest_first(values: Sequence[float]) -> bool:
    """For `Predicate`: a range whose ends stand in order."""
    return list(values) == sorted(values)


def not_all_zero(values: Sequence[float]) -> bool:
    """For `Predicate`: shares of which at least one counts."""
    return any(values)


class SettingError(IntermodalError):
    """A field that does not exist, or a value of the wrong type."""


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass tree as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def paths(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted path."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            out.update(paths(value, f"{name}."))
        elif _named(value):
            for part in value:
                out.update(paths(part, f"{name}.{part.name}."))
        else:
            out[name] = value
    return out


def override(config: T, assignments: Sequence[str]) -> T:
    """Apply `path=value` strings. Values are JSON where they parse as JSON (numbers, lists, true, null), text otherwise.

    Raises:
        SettingError: names the field, the nearest valid one, and the type it wants.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not all(path.split(".")):
            raise SettingError(f"{assignment!r} is not an override: write it as path=value, for example data.batch=256")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        config = _replaced(config, path.split("."), value, path)
    return config


def _replaced(config: Any, steps: list[str], value: Any, path: str) -> Any:
    name = steps[0]
    names = [field.name for field in dataclasses.fields(config)]
    if name not in names:
        done = path.rsplit(".".join(steps), 1)[0]
        every = [f"{done}{known}" for known in paths(config)] + [f"{done}{known}" for known in names]
        hint = nearest(path, every) or nearest(name, names)
        raise SettingError(f"there is no setting {path!r}{hint}; `{done or '.'}` has: {', '.join(names)}")
    current = getattr(config, name)
    hint = typing.get_type_hints(type(config), include_extras=True)[name]
    if len(steps) > 1:
        if _named(current):
            return dataclasses.replace(config, **{name: _one_replaced(current, steps[1:], value, path)})
        if _is_object(hint):
            value = json.loads(PYTHONS[value]) if isinstance(value, str) and value in PYTHONS else value
            whole = {**(current or {}), ".".join(steps[1:]): value}
            return dataclasses.replace(config, **{name: checked(whole, hint, path)})
        if not dataclasses.is_dataclass(current):
            raise SettingError(f"{path!r}: {name} is a single value, it has no parts")
        return dataclasses.replace(config, **{name: _replaced(current, steps[1:], value, path)})
    return dataclasses.replace(config, **{name: checked(value, hint, path)})


def _is_object(hint: Any) -> bool:
    """Whether a field is a JSON object of any names, or may be."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated or origin in (typing.Union, types.UnionType):
        return any(map(_is_object, parts[:1] if origin is typing.Annotated else parts))
    return origin is dict


def _named(value: Any) -> bool:
    """Whether a field is a list of settings that have names (stages): its parts are reached by theirs."""
    return (
        isinstance(value, tuple) and bool(value) and all(hasattr(part, "name") and dataclasses.is_dataclass(part) for part in value)
    )


def _one_replaced(parts: tuple[Any, ...], steps: list[str], value: Any, path: str) -> tuple[Any, ...]:
    names = [part.name for part in parts]
    if steps[0] not in names or len(steps) == 1:
        raise SettingError(f"{path!r}: write NAME.FIELD, NAME being one of {', '.join(names)}{nearest(steps[0], names)}")
    return tuple(_replaced(part, steps[1:], value, path) if part.name == steps[0] else part for part in parts)


def checked(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type, by JSON's rules: a list is a tuple and a whole number a float; text is not a number, nor is true.

    Raises:
        SettingError: it is not one.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import PydanticSerializationError, to_json

    try:
        return TypeAdapter(hint).validate_json(to_json(value, inf_nan_mode="constants"), strict=True, extra="forbid")
    except (ValidationError, PydanticSerializationError) as error:
        why = f" ({_why(error)})" if isinstance(error, ValidationError) else ""
        wanted = _words(hint)
        if isinstance(value, str) and wanted.startswith("a list of str"):  # what a shell's user writes first
            why = f"; write '{path}={json.dumps([value])}'"
        raise SettingError(f"{path} wants {wanted}, got {value!r}{why}") from None


def _why(error: Any) -> str:
    """A ValidationError's first reason. A predicate's is its function's name (`smallest_first`)."""
    first = error.errors()[0]
    broken = re.fullmatch(r"Predicate '(\w+)' failed", first["msg"])
    return f"Input should be {broken[1].replace('_', ' ')}" if broken else first["msg"]


def validated(config: T, path: str = "") -> T:
    """A dataclass tree with every value as its annotated type: Python itself would take `batch="many"`.

    Raises:
        SettingError: a value of the wrong type, by its path.
    """
    hints, values = typing.get_type_hints(type(config), include_extras=True), {}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value, hint, here = getattr(config, field.name), hints[field.name], f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            values[field.name] = validated(_instance(value, hint, here), f"{here}.")
        elif _named(value):
            part = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
            values[field.name] = tuple(validated(_instance(one, part, here), f"{here}.{one.name}.") for one in value)
        else:
            values[field.name] = checked(value, hint, here)
    return dataclasses.replace(config, **values)  # pyright: ignore[reportArgumentType]


def _instance(value: Any, hint: Any, path: str) -> Any:
    """`value`, which is of a dataclass. Raises SettingError: the hint names another class, or a list of them."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not any(isinstance(kind, type) and isinstance(value, kind) for kind in kinds):
        raise SettingError(f"{path} wants {_words(hint)}, got a {type(value).__name__}")
    return value


def _words(hint: Any) -> str:
    """A type as a person writes it in JSON."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _words(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _words(part) for part in parts)
    if origin is typing.Literal:
        return "one of " + ", ".join(json.dumps(part) for part in parts)
    if origin is dict:
        return "an object"
    if origin is tuple:
        inside = [_words(part) for part in parts if part is not ...]
        return f"a list of {inside[0]}" if ... in parts else f"[{', '.join(inside)}]"
    return getattr(hint, "__name__", None) or str(hint)


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """What `to_dict` gave, by dotted path; lists as they are."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return out


def from_dict(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """Rebuild a dataclass tree from `to_dict`.

    Raises:
        SettingError: an unknown field or a wrong type, by its path.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise SettingError(f"there is no setting {path}{name}{nearest(name, hints)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            arguments[name] = from_dict(hint, value, f"{path}{name}.")  # pyright: ignore[reportArgumentType]
        else:
            arguments[name] = checked(value, hint, f"{path}{name}")
    return cls(**arguments)

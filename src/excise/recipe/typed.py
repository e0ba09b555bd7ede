"""Plain values as the types of a dataclass's fields: YAML reads ``5e-5`` as text, so types come from the schema."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from excise.errors import UsageError


def filled(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """A dataclass from plain values, each as its field's type.

    Raises:
        UsageError: An unknown key (with the nearest known one) or a value of the wrong type, named by its path.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(values, Mapping):
        raise UsageError(f"{path}: expected a mapping, found {type(values).__name__}")
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(hints)}"
            raise UsageError(f"{path}: unknown key {str(key)!r}{hint}")
    return cls(**{key: _value(hints[key], value, f"{path}.{key}") for key, value in values.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    """``value`` as ``kind``; text becomes a number where the schema wants one (YAML reads ``5e-5`` as text)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, path)
    if kind is Any:
        return _numbers(value)
    if dataclasses.is_dataclass(kind):
        return filled(typing.cast(type, kind), value if value is not None else {}, path)
    if origin is Literal:
        if value not in args:
            raise UsageError(f"{path}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if isinstance(value, str) and args[1] is Any:
            value = {value: {}}
        if not isinstance(value, Mapping):
            raise UsageError(f"{path}: expected a mapping, found {type(value).__name__}")
        return {str(k): _value(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(args[0], v, f"{path}[{i}]") for i, v in enumerate(items))
    return _scalar(kind, value, path)


def _union(args: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    for kind in (a for a in args if a is not type(None)):
        try:
            return _value(kind, value, path)
        except UsageError as error:
            problem = error
    raise problem


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return os.path.expandvars(str(value))
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is not None and (kind is float or number.is_integer()):
            return kind(number)
    raise UsageError(f"{path}: expected {kind.__name__}, found {value!r}")


def _numbers(value: Any) -> Any:
    """Text that is a number as a number, inside the free-form settings of a term."""
    if isinstance(value, Mapping):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

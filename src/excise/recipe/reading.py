"""Recipes from strict YAML and command-line overrides, and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from excise.errors import UsageError
from excise.recipe.schema import Recipe
from excise.recipe.typed import filled


def build(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested plain values.

    Raises:
        UsageError: An unknown key (with the nearest known one) or a value of the wrong type, named by its path.
    """
    return filled(Recipe, values, "recipe")


def load(
    source: str | None, overrides: Sequence[tuple[str, str]] = (), changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe: a YAML file or the name of one that ships with the package, then ``key.sub value`` overrides.

    ``changes`` are dotted keys and plain values that lie between the two.

    A relative path inside a recipe file is relative to the working directory; ``${EXCISE_SHARED}`` and other
    environment variables are expanded in strings. ``extends: NAME`` (or a list of names or files) begins with other
    recipes: later ones and the file's own values win, field by field (``optimiser.lr``, ``objective.forget``). A field
    is replaced whole, so naming the forget terms says which there are.

    Raises:
        UsageError: No such recipe, YAML that does not parse, or a bad key or value.
    """
    values = read_yaml(source) if source else {}
    for key, value in (changes or {}).items():
        put(values, key.split("."), value)
    for key, text in overrides:
        try:
            put(values, key.split("."), yaml.safe_load(text) if text else text)
        except yaml.YAMLError:
            raise UsageError(f"--{key}: the value is not YAML; quote it") from None
    return build(values)


def read_yaml(source: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain values of a recipe file, or of a recipe that ships with the package, on top of those that it extends.

    Args:
        source: A file or a name.
        inside: The recipes that extend this one, outermost first.

    Raises:
        UsageError: As in `load`, and for recipes that extend each other in a circle.
    """
    values = _yaml(source)
    parents = values.pop("extends", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise UsageError(f"{source}: extends: give the name of a recipe, or a list of names")
    merged: dict[str, Any] = {}
    for parent in parents:
        if parent in (*inside, source):
            raise UsageError(f"{source}: extends: {' -> '.join([*inside, source, parent])} is a circle")
        _lay_over(merged, read_yaml(parent, (*inside, source)))
    _lay_over(merged, values)
    return merged


def _lay_over(values: dict[str, Any], others: Mapping[str, Any]) -> None:
    """Set the fields of ``others`` in ``values``, section by section; a field is replaced whole."""
    for key, value in others.items():
        # `initialise` is a field that stands at the top: naming another start replaces the first.
        if key != "initialise" and isinstance(value, Mapping) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}
        else:
            values[key] = value


def _yaml(source: str) -> dict[str, Any]:
    path: Any = Path(source)
    if not path.is_file():
        path = resources.files("excise") / "recipes" / f"{source}.yaml"
        if not path.is_file():
            near = difflib.get_close_matches(source, shipped(), 1)
            raise UsageError(f"no recipe {source!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{source}{where}: not a YAML file: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values or {}, dict):
        raise UsageError(f"{source}: a recipe is a mapping of sections")
    return values or {}


def shipped() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("excise") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a nested value, making the mappings on the way; a term that is given by name alone becomes a mapping."""
    for key in keys[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {} if inner is None else {str(inner): {}}
        values = inner
    values[keys[-1]] = value


def plain(recipe: Any) -> Any:
    """A recipe as nested plain values, ready for YAML or JSON."""
    if dataclasses.is_dataclass(recipe) and not isinstance(recipe, type):
        return {f.name: plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}
    if isinstance(recipe, Mapping):
        return {k: plain(v) for k, v in recipe.items()}
    if isinstance(recipe, tuple | list):
        return [plain(v) for v in recipe]
    return recipe


def dump(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with dotted keys set to new values.

    Example:
        >>> changed(Recipe(), {"optimiser.lr": 1e-3}).optimiser.lr
        0.001
    """
    values = plain(recipe)
    for key, value in changes.items():
        put(values, key.split("."), value)
    return build(values)

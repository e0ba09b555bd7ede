"""The house rules as tests: who may import whom, what stays light, a first line in every file, long files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "excise"
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}
LONG = 300

EVERYTHING = frozenset({"*"})
LEAVES = frozenset({"errors", "files"})


def _table() -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """The table of docs/design.md: module -> what it may import, and the modules that must never name torch."""
    may: dict[str, frozenset[str]] = {}
    light: set[str] = set()
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for line in re.findall(r"^\| (?!module|-)(.+) \|$", text.split("## Who may import whom")[1], re.MULTILINE):
        names, allowed, torch = (_names(cell) for cell in line.split(" | "))
        assert not names & set(may), f"docs/design.md names {names & set(may)} twice"
        may |= dict.fromkeys(names, allowed)
        light |= names if torch else set()
    return may, frozenset(light)


def _names(cell: str) -> frozenset[str]:
    words = {"nothing", "never", "everything", "the package itself", ""}
    names = [part.strip().strip("`") for part in cell.split(",")]
    assert all(name in words or f"`{name}`" in cell for name in names), cell
    said = {"everything": "*", "the package itself": ""}
    return frozenset(said.get(name, name) for name in names if name not in {"nothing", ""})


# Module (or package, which then counts as one) -> what it may import of this package. The longest name that fits
# decides; a package may import its own parts; `errors` and `files` are open to everyone.
MAY_IMPORT, NO_TORCH = _table()


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_name(path): path for path in _sources("src/excise")}


def _imports(tree: ast.AST, name: str, package: bool) -> Iterator[tuple[int, str]]:
    """Every import below ``tree``, function bodies and `importlib.import_module("...")` included: (line, full name)."""
    here = ["excise", *name.split(".")] if name else ["excise"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (1 if package else 0)
            base = here[: len(here) - up] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def _own(full: str) -> str | None:
    """The module of this package that an import names; None for other packages and for names of the façade itself."""
    parts = full.split(".")
    if parts[0] != "excise":
        return None
    while parts[1:]:
        if ".".join(parts[1:]) in SOURCES:
            return ".".join(parts[1:])
        parts.pop()
    return None


def _fits(name: str, entry: str) -> bool:
    return name == entry or (bool(entry) and name.startswith(f"{entry}."))


def _rule(name: str) -> str | None:
    return max((entry for entry in MAY_IMPORT if _fits(name, entry)), key=len, default=None)


def _allowed(name: str, target: str) -> bool:
    rule = _rule(name)
    if rule is None:
        return False
    may = MAY_IMPORT[rule]
    own_parts = not rule.startswith("metrics") and _fits(target, rule) and rule != ""
    return may == EVERYTHING or own_parts or any(_fits(target, entry) for entry in (may | LEAVES) - {name})


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_only_what_the_table_allows(name: str) -> None:
    path = SOURCES[name]
    assert _rule(name) is not None, f"{name}: new module: give it a row in docs/design.md"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    targets = [(line, _own(full)) for line, full in _imports(tree, name, path.name == "__init__.py")]
    wrong = {
        f"{path.name}:{line}: {name} may not import {target}"
        for line, target in targets
        if target is not None and not _allowed(name, target)
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_no_row_allows_what_nobody_uses() -> None:
    """A permission that lies about is a door that somebody will walk through."""
    unused = {rule: set(may - {"*"}) for rule, may in MAY_IMPORT.items()}
    for name, path in SOURCES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = {_own(full) for _, full in _imports(tree, name, path.name == "__init__.py")}
        rule = _rule(name) or ""
        unused[rule] -= {entry for entry in unused[rule] if any(t and _fits(t, entry) for t in targets)}
    assert not {rule: entries for rule, entries in unused.items() if entries}
    assert not [rule for rule in MAY_IMPORT if not any(_fits(name, rule) for name in SOURCES)]


def test_the_rule_sees_hidden_imports() -> None:
    hidden = (
        "def f():\n    from excise import run\n    from .metrics import measure\n"
        "    import importlib\n    importlib.import_module('excise.train')\n"
    )
    names = {full for _, full in _imports(ast.parse(hidden), "reporting.page", package=False)}
    assert {"excise.run", "excise.reporting.metrics.measure", "excise.train"} <= names
    assert not _allowed("reporting.page", "run")
    assert not _allowed("metrics.catalogue", "metrics.scores")
    assert not _allowed("metrics", "metrics.measure")
    assert _allowed("reporting.page", "reporting.style")
    assert _allowed("attacks", "metrics.measure")
    assert _rule("nothing_like_this") is None


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if any(_fits(n, entry) for entry in NO_TORCH)))
def test_light_modules_never_name_torch(name: str) -> None:
    path = SOURCES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    heavy = [f"{path.name}:{line}: {full}" for line, full in _imports(tree, name, package=False)]
    assert not [text for text in heavy if text.split(": ")[1].split(".")[0] in HEAVY - {"datasets", "accelerate"}]


@pytest.mark.parametrize("group", ["excise", "excise.cli", "reporting"])
def test_importing_stays_light(group: str) -> None:
    """What is imported with the module itself, in a process of its own."""
    modules = [group] if group != "reporting" else [f"excise.{n}" for n in SOURCES if _fits(n, "reporting")]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        f"heavy = {sorted(HEAVY)!r}\nprint([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"{group} pulls in {done.stdout.strip()}"


@pytest.mark.parametrize(
    "path", _sources("src", "tests", "studies", "benchmarks"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{path.name} has no docstring"
    assert len(docstring.splitlines()[0].split()) >= 4, f"{path.name}: the first line should say what the file is for"


def test_long_files_are_pointed_at() -> None:
    """A hint, not a wall: a file past the limit may still tell one story."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _sources("src")}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > LONG]
    if long:
        warnings.warn(f"files past {LONG} lines, do they tell one story? " + "; ".join(long), stacklevel=1)
    assert lengths, "no source found"

"""The wheel, installed elsewhere: every file of the package is in it, every module imports, the command works."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "excise"


def _run(*command: str | Path, cwd: Path) -> str:
    # No PYTHONPATH: only what is installed may be found.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    [made] = out.glob("excise-*.whl")
    return made


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of another environment that holds the wheel and borrows our dependencies.

    They are borrowed by a ``.pth`` line: of a folder added in that way Python reads no further ``.pth`` files, so an
    editable install of the source cannot slip in and answer in the wheel's place.
    """
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel, cwd=home)
    [site] = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    missing = _files(PACKAGE) - inside
    assert not missing, f"not in the wheel (an ignore pattern that is not anchored?): {sorted(missing)}"
    tops = {name.split("/")[0] for name in inside}
    assert len(tops) == 2, f"more than the package and its metadata: {sorted(tops)}"
    kinds = {Path(name).suffix for name in inside if name.startswith("excise/")}
    assert {".py", ".j2", ".yaml"} <= kinds
    assert "excise/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_every_module_imports_from_the_wheel(elsewhere: Path, tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, pathlib, sys
import excise
assert pathlib.Path(excise.__file__).is_relative_to(sys.prefix), excise.__file__
names = [m.name for m in pkgutil.walk_packages(excise.__path__, "excise.")]
for name in names:
    importlib.import_module(name)
print("\\n".join(names))
"""
    imported = set(_run(elsewhere / "python", "-c", code, cwd=tmp_path).split())
    source = {name.removesuffix(".py").removesuffix("/__init__") for name in _files(PACKAGE) if name.endswith(".py")}
    assert imported == {name.replace("/", ".") for name in source} - {"excise"}


def test_the_command_and_its_data_work_from_the_wheel(elsewhere: Path, tmp_path: Path) -> None:
    listed = _run(elsewhere / "excise", "recipes", cwd=tmp_path).splitlines()
    shipped = {path.stem for path in (PACKAGE / "recipes").glob("*.yaml")}
    assert {line.split()[0] for line in listed} == shipped
    code = (
        "from importlib import resources as r\n"
        "print(*(path.name for path in (r.files('excise') / 'reporting/templates').iterdir()))"
    )
    assert _run(elsewhere / "python", "-c", code, cwd=tmp_path).split()

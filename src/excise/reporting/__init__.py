"""Run folder to report: one HTML file that opens anywhere, and the short table that the terminal prints.

Only saved files are read: no torch, no transformers, no model, no network. The package can be called:
``excise.report(folder)`` is `build`, like the other commands that are functions of `excise`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from excise import artifacts
from excise.files import write_text


def build(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder from what lies in it, and return its path.

    The page holds no script and loads nothing. It quotes texts of records only where the folder has an
    ``examples.json``, and then says so first.

    Raises:
        InputRefused: No run folder, or one of its files cannot be read.

    Example:
        >>> build("no/such/folder")
        Traceback (most recent call last):
        excise.errors.InputRefused: no/such/folder: no manifest.json here: give the folder that a run wrote
    """
    run = artifacts.open_run(run_dir)
    write_text(run.report, render(run))
    return run.report


def render(run: artifacts.RunFolder) -> str:
    """The page as a string."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from excise.reporting.page import gather

    templates = resources.files("excise.reporting").joinpath("templates")
    style = Markup(templates.joinpath("report.css").read_text("utf-8").strip())
    source = templates.joinpath("report.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(page=gather(run, style)) + "\n"


def summary(run_dir: str | Path) -> list[list[str]]:
    """The key numbers of a run as rows of plain strings, a heading row first; the command line prints them.

    Raises:
        InputRefused: No run folder, or its results cannot be read.
    """
    from excise.reporting.numbers import summary_rows
    from excise.reporting.words import visible

    rows: list[list[str]] = visible(summary_rows(artifacts.read_results(artifacts.open_run(run_dir))))
    return rows

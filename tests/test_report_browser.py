"""The report in a real browser, at a phone's and a desktop's width: whole, legible, and without a sideways scroll."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

import excise.reporting
from fake_grown_run import OVER, write_grown_run
from fake_run import HOSTILE, write_fake_run
from fake_tagged_run import write_fake_tagged_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: install chromium (apt-get install chromium) to see the report as people do"
)

WIDTHS = [390, 1280]
SECTIONS = [
    "verdict", "not-tested", "tests", "numbers", "pictures", "adapter", "findings", "examples", "settings", "citations",
]  # fmt: skip
# What a test-only copy of the page measures about itself; the real page holds no script.
PROBE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const all = names => [...document.querySelectorAll(names)];
  const width = document.documentElement.clientWidth;
  const framed = e => e.closest(".scroll, pre, .skip, .drawing");
  const wide = all("body *").filter(e => !framed(e) && e.getBoundingClientRect().right > width + 1);
  const shown = all("p, dd, dt, td, th, li, span, figcaption, code, pre").filter(e => e.offsetParent);
  parent.postMessage({
    window: innerWidth,
    page: document.documentElement.scrollWidth,
    wide: wide.map(e => e.tagName + "." + e.className),
    smallest: Math.min(...shown.map(e => parseFloat(getComputedStyle(e).fontSize))),
    drawn: Math.min(...all(".drawing text").map(e => e.getBoundingClientRect()).map(r => Math.min(r.width, r.height))),
    tables: all(".scroll").filter(e => e.scrollWidth > e.clientWidth).length,
    colour: getComputedStyle(document.body).backgroundColor,
  }, "*");
});
</script>"""
# A browser's window has a least width of its own, a frame has none: so the copy is laid out in a frame.
FRAME = """<!doctype html><title>waiting</title>
<script>addEventListener("message", e => { document.title = "MEASURED " + JSON.stringify(e.data); });</script>
<iframe src="{name}" style="width: {width}px; height: 900px; border: 0"></iframe>"""


def chromium(page: Path, *flags: str) -> str:
    """Open a page in a browser without a profile, a network or a screen; returns what it prints."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={profile}", *flags, page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return excise.reporting.build(write_fake_run(folder, examples=True).root)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return excise.reporting.build(write_fake_run(folder, examples=True, hostile=HOSTILE).root)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a tagger, with hostile names of sides and models."""
    folder = tmp_path_factory.mktemp("tagged")
    return excise.reporting.build(write_fake_tagged_run(folder, hostile=HOSTILE).root)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a verified run, with hostile text in its verdict, pictures and audit."""
    folder = tmp_path_factory.mktemp("verified")
    return excise.reporting.build(write_grown_run(folder, OVER, hostile=True).root)


def measured(page: Path, width: int, *flags: str) -> dict[str, object]:
    """Sizes of the page as laid out at this width, told by a copy of it that may run a script."""
    text, policies = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    assert policies == 1
    page.with_name("probe.html").write_text(text.replace("</body>", f"{PROBE}</body>"), "utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.replace("{name}", "probe.html").replace("{width}", str(width)), "utf-8")
    out = chromium(frame, "--window-size=1600,1000", "--dump-dom", "--virtual-time-budget=3000", *flags)
    found = re.search(r"<title>MEASURED (.*?)</title>", out)
    assert found, "the page did not finish loading"
    result: dict[str, object] = json.loads(html.unescape(found.group(1)))
    assert result["window"] == width
    return result


@pytest.mark.parametrize("width", WIDTHS)
def test_no_sideways_scroll_and_nothing_too_small_to_read(
    page: Path, hostile: Path, tagged: Path, verified: Path, width: int
) -> None:  # fmt: skip
    for path in (page, hostile, tagged, verified):
        found = measured(path, width)
        assert found["page"] == width, found
        assert found["wide"] == []
        assert float(str(found["smallest"])) >= 12  # CSS pixels
        assert float(str(found["drawn"])) > 4  # a text inside a drawing is at least this high and wide
        assert width > 390 or int(str(found["tables"])) >= 2  # wide tables scroll in their own box


def test_the_browser_keeps_every_section(page: Path) -> None:
    dom = chromium(page, "--dump-dom", "--window-size=1280,900")
    places = [dom.index(f'<section id="{name}"') for name in SECTIONS]
    assert places == sorted(places)
    assert dom.count("<svg") == dom.count("</svg>") > 10
    assert "Content-Security-Policy" in dom
    assert dom.index("</main>") > places[-1]  # nothing broke out of the page's frame


@pytest.mark.parametrize("name", ["hostile", "verified"])
def test_hostile_text_does_not_run_in_a_browser(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text("utf-8"))
    copy = path.with_name("unprotected.html")  # escaping alone must hold, without the policy
    copy.write_text(text.replace("<head>", "<head><script>alert = () => { document.title = 'RAN' }</script>"), "utf-8")
    dom = chromium(copy, "--dump-dom", "--virtual-time-budget=3000")
    assert "<title>RAN" not in dom
    assert "<svg onload" not in dom
    assert "<img" not in dom


def test_the_policy_stops_a_script_that_gets_in(page: Path) -> None:
    copy = page.with_name("injected.html")
    copy.write_text(
        page.read_text("utf-8").replace("</main>", "<script>document.title = 'RAN'</script></main>"), "utf-8"
    )
    assert "<title>RAN" not in chromium(copy, "--dump-dom", "--virtual-time-budget=3000")


def test_dark_screens_get_dark_paper(page: Path) -> None:
    assert measured(page, 1280)["colour"] == "rgb(255, 255, 255)"
    dark = measured(page, 1280, "--blink-settings=preferredColorScheme=0")
    assert dark["colour"] == "rgb(20, 24, 28)"


@pytest.mark.parametrize("width", WIDTHS)
def test_screenshots_are_taken_at_the_width_asked_for(page: Path, tmp_path: Path, width: int) -> None:
    """Also keeps them for a person to look at, where EXCISE_SCREENSHOTS names a folder."""
    shot = Path(os.environ.get("EXCISE_SCREENSHOTS") or tmp_path) / f"report-{width}.png"
    chromium(page, f"--window-size={width},2400", f"--screenshot={shot}")
    content = shot.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (width, 2400)
    assert len(content) > 50_000  # a blank page is a few kilobytes

"""The page in a real browser: headless Chromium, phone and desk, light and dark.

One run loads the page four times, each in a frame of its own width and colour scheme, and prints
what a script measured in them.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from fourstage.report import main
from tests.ladders import write_ladder

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=10000",
)
MEASURE = """
const found = {};
function rgb(text) { return text.match(/[0-9.]+/g).map(Number); }
for (const id of ['390-light', '390-dark', '1280-light', '1280-dark']) {
  const frame = document.createElement('iframe'), [width, scheme] = id.split('-');
  frame.style = `width: ${width}px; height: 900px; border: 0; color-scheme: ${scheme}`;
  frame.srcdoc = document.getElementById('page').value;
  frame.onload = () => {
    const page = frame.contentDocument, view = frame.contentWindow, top = page.documentElement;
    const chart = page.querySelector('.large svg').getBoundingClientRect().bottom;
    const link = page.querySelector('nav a'), hidden = !link.checkVisibility();
    page.querySelectorAll('details').forEach(details => details.open = true);
    const colour = selector => {
      const element = page.querySelector(selector);
      return element && rgb(view.getComputedStyle(element).color);
    };
    const clipped = [...page.querySelectorAll('svg text, pre, p, li, figcaption')].filter(
      e => e.getBoundingClientRect().right > top.clientWidth + 1 && !e.closest('.wide'));
    const shown = kind => view.getComputedStyle(page.querySelector(kind)).display != 'none';
    const cell = page.querySelector('td:first-child'), box = cell.closest('.wide');
    box.scrollLeft = 60;
    found[id] = {
      first: chart, hidden: hidden, link: link.getBoundingClientRect().height,
      scroll: top.scrollWidth, client: top.clientWidth, clipped: clipped.length,
      dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
      text: colour('p'), better: colour('.better'), worse: colour('.worse'),
      chart: rgb(view.getComputedStyle(page.querySelector('.charts svg text')).fill),
      across: shown('.ladder figure:first-child'), down: shown('.ladder figure:last-child'),
      scrolled: box.scrollLeft, sticky: cell.getBoundingClientRect().left,
      tables: page.querySelectorAll('table').length, drawings: page.querySelectorAll('svg').length,
    };
    document.getElementById('found').textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    # Ubuntu has a stub of that name, which only says how to get it
    if CHROMIUM is None or subprocess.run([CHROMIUM, "--version"], capture_output=True).returncode:
        pytest.skip("no Chromium here: the page is not looked at in a browser")
    folder = tmp_path_factory.mktemp("browser")
    write_ladder(folder, n=30)
    main([f"outputs={folder}"])
    text = html.escape((folder / "report" / "report.html").read_text(encoding="utf-8"))
    copy = folder / "frames.html"
    copy.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><body><pre id="found"></pre>'
        f'<textarea id="page">{text}</textarea><script>{MEASURE}</script></body>',
        encoding="utf-8",
    )
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    printed = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert printed, done.stderr[-1000:]
    return json.loads(html.unescape(printed[1]))


def luminance(rgb: list[float]) -> float:
    """Relative luminance (WCAG 2.2) of a colour of 0 to 255."""
    parts = [x / 255 for x in rgb[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_frame_was_looked_at(found: dict[str, dict]) -> None:
    assert sorted(found) == ["1280-dark", "1280-light", "390-dark", "390-light"]
    for seen in found.values():
        assert seen["tables"] >= 8 and seen["drawings"] >= 20


def test_the_page_never_scrolls_sideways(found: dict[str, dict]) -> None:
    for name, seen in found.items():
        assert seen["client"] in (390, 1280), name
        assert seen["scroll"] <= seen["client"], name
        assert seen["clipped"] == 0, name


def test_the_first_screen_shows_the_sentences_and_the_chart(found: dict[str, dict]) -> None:
    for name, seen in found.items():
        assert seen["first"] <= 844, name


def test_the_menu_opens_to_links_that_a_thumb_can_hit(found: dict[str, dict]) -> None:
    """At least 24 pixels high (WCAG 2.2, 2.5.8)."""
    for seen in found.values():
        assert seen["hidden"] and seen["link"] >= 24


def test_a_wide_table_scrolls_in_its_box_and_its_stages_stay(found: dict[str, dict]) -> None:
    for scheme in ("light", "dark"):
        assert found[f"390-{scheme}"]["scrolled"] == 60
        assert found[f"390-{scheme}"]["sticky"] == pytest.approx(16, abs=1)


def test_the_ladder_runs_downwards_on_a_phone(found: dict[str, dict]) -> None:
    for name, seen in found.items():
        assert seen["down"] == name.startswith("390")
        assert seen["across"] == name.startswith("1280")


def test_colours_follow_the_scheme_and_are_legible(found: dict[str, dict]) -> None:
    """Contrast of 4.5 to 1 or more (WCAG 2.2, 1.4.3) for text and for what is better or worse."""
    for name, seen in found.items():
        assert seen["dark"] == name.endswith("dark")
        behind = luminance([18, 18, 18]) if seen["dark"] else 1.0  # Canvas
        for part in ("text", "chart", "better", "worse"):
            lighter, darker = sorted((luminance(seen[part]), behind), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (name, part)

"""Takes the pictures of docs/arena.md, with the demo's ladder:

python -m tests.arena.pictures outputs docs/figures

It needs the extra web, playwright and Chromium. It reads a copy of the ladder: no vote is cast.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from tests.arena.browser import Visitor, chromium, serving

QUESTION = "What is an LLM?"
COLOURS = 64  # enough for text, and a third of the bytes


def take(page, path: Path) -> None:
    """The page down to its last line."""
    page.evaluate("document.activeElement.blur()")
    height = page.evaluate("document.querySelector('main').getBoundingClientRect().bottom")
    png = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": height})
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS)
    picture.save(path, optimize=True)


def main(outputs: str, folder: str) -> None:
    with serving(f"outputs={outputs}") as served, chromium() as browser:
        visitor = Visitor(browser, served.url)
        visitor.ask(QUESTION)
        take(visitor.page, Path(folder) / "arena-compare.png")
        visitor.tab("Vote")
        visitor.page.click("text=Settings >> visible=true")
        visitor.page.fill("#vote-question input, #vote-question textarea", QUESTION)
        visitor.page.click("text=Settings >> visible=true")
        two = ["the same", "the same"]
        while two[0] == two[1]:
            visitor.draw()
            two = visitor.page.locator("#two-answers .answer").all_text_contents()
        take(visitor.page, Path(folder) / "arena-vote.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

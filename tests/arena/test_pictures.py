"""The pictures of docs/arena.md can be taken, and are of the page as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.arena import pictures

pytest.importorskip("gradio")

FIGURES = Path(__file__).parents[2] / "docs" / "figures"


@pytest.mark.slow
def test_the_pictures_of_the_page(ladder, tmp_path) -> None:
    pictures.main(str(ladder), str(tmp_path))
    for name in ("arena-compare.png", "arena-vote.png"):
        with Image.open(tmp_path / name) as taken, Image.open(FIGURES / name) as shown:
            assert taken.width == shown.width == 1280
            assert abs(taken.height - shown.height) < 100

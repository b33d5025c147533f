"""The report's drawings: over-optimisation, difficulty, curves, and the ladder as a picture."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import matplotlib.image
import pytest

from fourstage.evaluation import suite
from fourstage.report import main
from fourstage.report.charts import (
    Node,
    Strip,
    before_after,
    lineage,
    lines,
    over_optimisation,
    thinned,
)
from fourstage.report.figures import over_optimisation_blocks
from fourstage.report.html import Figures, Paragraph, Table
from tests.ladders import (
    folder,
    read_items,
    run_id,
    section,
    write_ladder,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole ladder and its report, for tests that change nothing."""
    outputs = tmp_path_factory.mktemp("full")
    write_ladder(outputs)
    main([f"outputs={outputs}"])
    return outputs


# --- over-optimisation, difficulty, curves


def test_scores_are_drawn_against_kl() -> None:
    columns = {
        "train/kl": [(1.0, 0.0), (2.0, 4.0), (3.0, 9.0), (4.0, 16.0)],
        "train/score": [(1.0, 0.1), (2.0, 1.0), (3.0, 2.0), (4.0, 3.0), (5.0, 9.0)],
        "train/true_score": [(1.0, 0.5), (2.0, 1.5), (3.0, 1.4), (4.0, 0.2)],
    }
    blocks = over_optimisation_blocks(columns)
    table = blocks[-1]
    assert isinstance(table, Table)
    assert [list(row) for row in table.rows] == [
        ["0.00", "0.100", "0.500"],
        ["4.00", "1.000", "1.500"],
        ["9.00", "2.000", "1.400"],
        ["16.00", "3.000", "0.200"],
    ]
    assert isinstance(blocks[1], Figures)


@pytest.mark.parametrize("rollouts", [1, 12, 13])
def test_the_caption_says_what_is_drawn(rollouts: int) -> None:
    points = [(float(i), float(i)) for i in range(rollouts)]
    columns = {"train/kl": points, "train/score": points}
    _, _, figures, table = over_optimisation_blocks(columns)
    assert isinstance(figures, Figures) and isinstance(table, Table)
    (figure,) = figures.figures
    assert figure.title == "Learned reward"
    assert figure.caption.startswith("Dots are PPO's rollouts; lines join the means of neighbours")
    assert "Over-optimisation" not in figure.caption and len(table.rows) == min(rollouts, 4)
    both = over_optimisation_blocks(columns | {"train/true_score": points})
    assert isinstance(both[1], Figures)
    assert both[1].figures[0].title == "Learned reward and true score"
    assert "Over-optimisation would" in both[1].figures[0].caption


def test_a_tiny_negative_kl_is_shown_as_0() -> None:
    table = over_optimisation_blocks({"train/kl": [(1.0, -1e-6)], "train/score": [(1.0, 0.5)]})[-1]
    assert isinstance(table, Table) and list(table.rows[0]) == ["0.00", "0.500"]


def test_no_true_score_and_no_kl_are_said() -> None:
    columns = {"train/kl": [(1.0, 0.5)], "train/score": [(1.0, 0.1)]}
    said = over_optimisation_blocks(columns)[1]
    assert isinstance(said, Paragraph) and said.text.startswith("The true score is not known")
    said = over_optimisation_blocks({"train/score": [(1.0, 0.1)]})[1]
    assert isinstance(said, Paragraph) and said.text.startswith("Not drawn: metrics.csv has no KL")
    assert over_optimisation_blocks(None) == []


def test_kl_stands_at_its_square_root() -> None:
    """On the axis 4 nats are twice as far from 0 as 1 nat is; a negative estimate is at 0."""
    svg = over_optimisation("KL", "score", {"s": [(-0.1, 0.0), (1.0, 0.0), (4.0, 0.0)]}).svg
    dots = re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill-opacity: 0.35', svg)
    zero, one, four = (float(x) for x in dots)
    assert four - zero == pytest.approx(2 * (one - zero), abs=1e-4)


def test_accuracy_by_difficulty(full: Path) -> None:
    text = section(full, "Accuracy by difficulty")
    assert "| problems | random | pretrain | sft | ppo | grpo | grpo − ppo |" in text
    rows = read_items(folder(full, "grpo") / "eval_items.jsonl").values()
    easy = [r["correct"] for r in rows if r["set"] == "reasoning" and r["difficulty"] == "easy"]
    line = next(line for line in text.splitlines() if line.startswith("| easy |"))
    assert line.split(" | ")[5].startswith(f"{100 * sum(easy) / len(easy):.1f} % [")


def test_a_drawing_takes_the_colours_of_the_page() -> None:
    svg, again = (lines("step", "nats", {"train/loss": [(1, 2.0), (2, 1.0)]}).svg for _ in "ab")
    assert svg == again
    assert svg.startswith("<svg ") and "currentColor" in svg and "#010203" not in svg
    assert "<metadata" not in svg and "train/loss" in svg


def test_a_drawing_in_a_file_is_black_on_white_under_its_title() -> None:
    drawing = lines("step", "nats", {"train/loss": [(1, 2.0), (2, 1.0)]})
    inline, files = drawing.svg, drawing.files("pretrain: <loss>")
    assert list(files) == ["svg", "png"]
    svg = files["svg"].decode()
    assert ">pretrain: &lt;loss&gt;</text>" in svg and "fill: #ffffff" in svg
    assert "#000000" in svg and "currentColor" not in svg and "#010203" not in svg
    assert "<dc:date>" not in svg and b"Software" not in files["png"]
    pixels = matplotlib.image.imread(io.BytesIO(files["png"]))
    assert pixels.shape[:2] == (round(160 * (2.7 + 0.45)), round(160 * 4.8))
    assert (pixels[[0, -1], :, :3] == 1).all()  # white up to the edges
    title = pixels[: int(160 * 0.3), : int(160 * 2)]
    assert title[..., :3].min() < 0.05
    assert "<loss>" not in inline and "pretrain" not in drawing.svg  # the page has its own


def test_goals_stand_on_scales_whose_right_end_is_better() -> None:
    """Bits fall from 4 to 2 on a scale from 5 to 1: from a quarter of the way to three quarters."""
    before, after = ({"value": x, "low": x - 0.5, "high": x + 0.5} for x in (4.0, 2.0))
    ends = ("5.000", "1.000")
    strip = Strip("sft", "bits", "4 → 2, better", (before, after), (5.0, 1.0), ends)
    coin = {"value": 0.5, "low": 0.5, "high": 0.5}
    alone = Strip("grpo", "right", "90 %", (coin, suite.missing("")), (0.0, 1.0), ("0", "1"))
    svg = before_after([strip, alone]).svg
    texts = re.findall(">([^<>]+)</text>", svg)
    assert texts == [
        *("before", "after", "further right is better"),
        *("sft", "bits", "4 → 2, better", *ends),
        *("grpo", "right", "90 %", "0", "1"),
    ]
    spans = re.findall(r'd="M ([\d.]+) [\d.]+\nL ([\d.]+) [\d.]+\n" clip', svg)
    scale, quarter = ("6", "354"), (354 - 6) / 4
    before_ends, after_ends = ("49.5", "136.5"), ("223.5", "310.5")
    assert spans == [scale, before_ends, after_ends, scale]  # the coin has no interval
    places = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', svg)]
    assert {6 + quarter, 6 + 2 * quarter, 6 + 3 * quarter} < set(places)


def test_thinned() -> None:
    assert thinned([(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)], 2) == [(2.0, 3.0), (5.0, 6.0)]


# --- the ladder as a picture


def test_lineage_draws_every_parent_once() -> None:
    nodes = [
        Node("sft", ["<id>"], []),
        Node("reward", ["r"], ["sft"]),
        Node("ppo", ["p"], ["sft", "reward", "not shown"]),
    ]
    for across in (True, False):
        svg = lineage(nodes, across).svg
        assert svg.count("fill-opacity: 0.13") == len(nodes) and len(arrows(svg)) == 3
        assert "&lt;id&gt;" in svg


def arrows(svg: str) -> list[str]:
    """The lines of the arrows, without their heads."""
    return re.findall(r'<path d="([^"]*)" [^>]*style="fill: none; stroke: currentColor', svg)


def test_lineage_of_the_page(full: Path) -> None:
    text = (full / "report" / "report.html").read_text()
    figures = text.split('<div class="ladder">')[1].split("</div>")[0].split("</figure>")
    assert len(figures) == 3  # across, downwards, and what follows
    for drawn in figures[:2]:
        assert drawn.count("fill-opacity: 0.13") == 6 and len(arrows(drawn)) == 6
        assert run_id("ppo", 0) in drawn and "1 min 01 s" in drawn
        assert re.search(r">\d\.\d{3} → \d\.\d{3}</text>", drawn)  # bits a character
        assert re.search(r">50\.0 → \d\d\.\d %</text>", drawn)  # the reward model, from a coin


def test_deleted_and_rebuilt_the_report_has_the_same_bytes(full: Path) -> None:
    first = contents(full / "report")
    shutil.rmtree(full / "report")
    main([f"outputs={full}"])
    assert first == contents(full / "report")
    assert sorted(name for name in first if "/" not in name) == [
        *("report.html", "report.md", "stages.json")
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_drawing_of_the_page_is_a_file_too(full: Path) -> None:
    text = (full / "report" / "report.html").read_text()
    titles = re.findall("<figcaption><strong>(.*?)</strong>", text)
    names = {re.sub("[^a-z0-9]+", "-", title.lower()) for title in titles}
    assert len(names) == len(titles) == text.count("<svg ") > 20
    found = {path.name for path in (full / "report" / "figures").iterdir()}
    assert found == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    shown = re.findall(
        r"^!\[.*\]\(figures/(.*)\.png\)$", (full / "report" / "report.md").read_text(), re.M
    )
    assert {*shown, "the-ladder-downwards"} == names and len(shown) == len(names) - 1


def test_figures_of_an_earlier_report_do_not_survive(tmp_path: Path) -> None:
    figures = tmp_path / "report" / "figures"
    figures.mkdir(parents=True)
    for name in ("old.svg", "old.png", "mine.txt"):
        (figures / name).write_text("old")
    write_ladder(tmp_path, n=6, steps=0, experts=1, stages=("pretrain",))
    main([f"outputs={tmp_path}"])
    names = [
        "goals-before-and-after",
        "the-ladder",
        "the-ladder-downwards",
        "reasoning-accuracy-by-difficulty",
    ]
    kept = {f"{name}.{kind}" for name in names for kind in ("svg", "png")} | {"mine.txt"}
    assert {path.name for path in figures.iterdir()} == kept

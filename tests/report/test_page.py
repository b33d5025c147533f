"""The page, and the blocks that it is made of."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fourstage.report.charts import thinned
from fourstage.report.figures import MOST_POINTS, panels
from fourstage.report.html import Answers, Bullets, Paragraph, Table, markdown, page
from tests.report.by_hand import LADDER, NASTY, write_run

# --- report.html


class Page(HTMLParser):
    """Fails on an unclosed or crossed tag; keeps ids, attributes that load something, and text."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.loaded.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_well_formed_and_stands_alone(full: Path) -> None:
    text = (full / "report" / "report.html").read_text(encoding="utf-8")
    html = Page(text)
    assert len(html.ids) == len(set(html.ids))
    assert all(link.startswith("#") for link in html.loaded)
    assert all(link[1:] in html.ids for link in html.loaded)
    assert not html.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)", text)
    for way in ("color-scheme: light dark", 'name="viewport"', "@media print"):
        assert way in text
    assert any(NASTY in part for part in html.texts)  # what a reader sees is what the model said
    titles = re.findall("<figcaption><strong>(.*?)</strong>", text)
    assert titles == [
        "Goals before and after",
        "The ladder",
        "The ladder downwards",  # for a phone
        "pretrain: loss",
        "sft: loss",
        "reward: loss",
        "reward: accuracy",
        "ppo: reward",
        "ppo: KL to the reference",
        "grpo: accuracy",
        "grpo: reward",
        "grpo: KL to the reference",
        "Learned reward and true score",
    ]
    assert len(re.findall("<svg ", text)) == len(titles)


def test_the_same_runs_give_the_same_bytes(full: Path, tmp_path: Path) -> None:
    """Another process, another hash seed, another folder, another order of writing."""
    for stage in reversed(LADDER):
        write_run(tmp_path / "again", stage, curves=True)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "fourstage", "report", f"outputs={tmp_path / 'again'}"]
    source = str(Path(__file__).parents[2] / "src")
    environment["PYTHONPATH"] = source
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert str(tmp_path / "again" / "report" / "report.html") in done.stdout
    found = (full / "report").rglob("*")
    names = sorted(str(path.relative_to(full / "report")) for path in found if path.is_file())
    assert [name for name in names if not name.startswith("figures/")] == [
        *("report.html", "report.md", "stages.json")
    ]
    assert len(names) == 3 + 2 * 13  # drawings, each as SVG and PNG
    for name in names:
        first = (full / "report" / name).read_bytes()
        assert first == (tmp_path / "again" / "report" / name).read_bytes()
        assert b"2026-01-01" not in first  # no times of day


def test_the_report_needs_no_heavy_import() -> None:
    """It reads files only, so torch and the rest stay out."""
    code = "import sys, fourstage.report; print(sorted(m for m in sys.modules if '.' not in m))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "hydra", "matplotlib"} & set(re.findall(r"\w+", done.stdout))


def test_the_page_has_one_menu_and_folds_what_is_long(full: Path) -> None:
    text = (full / "report" / "report.html").read_text(encoding="utf-8")
    assert text.count("<nav>") == 1
    menu = text.split("<nav>\n<details>\n<summary>On this page</summary>\n")[1].split("</nav>")[0]
    links = re.findall('<a href="#(.*?)">(.*?)</a>', menu)
    assert [title for _, title in links] == re.findall("<h2 id=.*?>(.*?)</h2>", text)
    assert ("what-each-stage-changed", "What each stage changed") in links
    assert "</h1>\n<nav>" in text  # before all else
    folded = re.findall("<details>\n<summary><h2 id=.*?>(.*?)</h2></summary>", text)
    assert folded == ["The whole suite", "By task and by difficulty"]
    assert text.count("<details>") == text.count("</details>") == 3


# --- the blocks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a *b* <i> | `c` & \x07", "a \\*b\\* \\<i\\> \\| \\`c\\` \\& \ufffd"),
        ("[c](d) [e] _f_ g_h", "\\[c\\](d) [e] \\_f\\_ g_h"),
        ("# no heading", "\\# no heading"),
        ("- no list", "\\- no list"),
        ("1. no list", "1\\. no list"),
        ("-1.5 [2, 3]\nnext", "-1.5 [2, 3] / next"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, expected: str) -> None:
    assert markdown([Paragraph(text)]) == expected + "\n"


def test_markdown_tables_and_lists() -> None:
    blocks = [Table(["x|y", "z"], [["1\n2", "-3"]]), Bullets(["a", "- b"])]
    expected = "| x\\|y | z |\n| --- | --- |\n| 1 / 2 | -3 |\n\n- a\n- \\- b\n"
    assert markdown(blocks) == expected


def test_html_escapes_everything() -> None:
    said = [("<i>", "</pre><script>", [("&", "small")]), ("s", "\nfirst line empty", [])]
    answers = Answers("<b>", said)
    text = page("<t>", [answers, Paragraph("<p>"), Table(["<th>"], [["<td>"]])])
    html = Page(text)
    assert {"<t>", "<b>", "<i>", "\n</pre><script>", "&", "<p>", "<th>", "<td>"} <= set(html.texts)
    assert "script" not in html.tags
    assert "<pre>\n\nfirst line empty</pre>" in text


def test_curves_are_thinned_by_means() -> None:
    points = [(float(x), float(x % 2)) for x in range(2 * MOST_POINTS)]
    few = thinned(points, MOST_POINTS)
    assert len(few) == MOST_POINTS
    assert few[:2] == [(0.5, 0.5), (2.5, 0.5)]
    assert thinned(points[:5], MOST_POINTS) == points[:5]


def test_charts_are_drawn_for_the_columns_that_are_there() -> None:
    points = [(1.0, 1.0)]
    names = ["train/loss", "val/loss", "train/policy_loss", "train/kl", "train/kl_coef"]
    charts = panels("sft", {name: points for name in names})
    assert [(title, list(series)) for title, _, series in charts] == [
        ("sft: loss", ["train/loss", "val/loss"]),
        ("sft: KL to the reference", ["train/kl"]),
    ]
    units = [panels(stage, {"train/kl": points})[0][1] for stage in ("ppo", "grpo")]
    assert units == ["nats an answer", "nats a token"]  # as stages/ppo.py and grpo.py log it


def test_a_setting_in_a_table_stays_on_one_line() -> None:
    html = page("t", [Table(["group"], [["sft → grpo, lr=1e-3, <x"]])])
    assert "<td>sft → grpo, <b>lr=1e-3,</b> &lt;x</td>" in html


@pytest.mark.skipif(sys.platform != "linux", reason="the limit doesn't stand for a full disk")
def test_a_full_disk_leaves_whole_files(outputs, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fourstage", "report", f"outputs={outputs}"]
    subprocess.run(command, check=True, capture_output=True)
    before = {path: path.read_bytes() for path in (outputs / "report").rglob("*") if path.is_file()}
    (run,) = outputs.glob("runs/grpo-*")
    row = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(row | {"cost": {"seconds": 12345.0}}))
    limited = ["bash", "-c", 'ulimit -f 30; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        "error: disk full.*: free space and run the same command again\n", done.stderr
    )
    assert len(before[outputs / "report" / "report.html"]) > 30 * 1024
    after = {path: path.read_bytes() for path in (outputs / "report").rglob("*") if path.is_file()}
    assert after.keys() >= before.keys()
    large = [path for path, content in before.items() if len(content) > 30 * 1024]
    assert all(after[path] == before[path] for path in large)
    subprocess.run(command, check=True, capture_output=True)
    assert not list((outputs / "report").rglob(".*"))

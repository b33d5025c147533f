"""The arena's page in a browser: asking, voting, looks, and what strangers type."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

import pytest

from fourstage.chat import ChatSettings, start
from tests.arena.browser import Visitor, chromium, serving

pytest.importorskip("gradio")

pytestmark = pytest.mark.slow

STAGES = ["random", "pretrain", "sft", "ppo", "grpo"]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def url(ladder):
    with serving(f"outputs={ladder}") as served:
        yield served.url


@pytest.fixture
def visitor(browser, url):
    """A new one; nothing that he did left this machine, and his console is clean."""
    found = Visitor(browser, url)
    yield found
    found.page.context.close()
    assert all(one.startswith((url, "data:", "blob:")) for one in found.requests)
    assert found.errors == []


def votes(outputs: Path) -> list[dict]:
    path = outputs / "arena" / "votes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- compare


def test_all_stages_answer_side_by_side(visitor) -> None:
    answers = visitor.ask("What is an LLM?")
    assert visitor.titles("#answers") == STAGES
    assert len(answers) == 5 and all(answers)
    tops = visitor.page.eval_on_selector_all(
        "#answers .said", "all => all.map(x => x.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1
    notes = visitor.page.eval_on_selector_all(
        "#answers .note", "all => all.map(x => x.textContent)"
    )
    assert all("log p" in note and "learned reward" in note for note in notes)


def test_examples_and_a_conversation(visitor) -> None:
    visitor.page.click("text=What is overfitting?")
    visitor.message("#message", "question 1 of")
    first = visitor.answers()
    second = visitor.ask("And what else?", turn=2)
    asked = visitor.page.eval_on_selector_all(
        "#answers .said:last-child p:not(.note)", "all => all.map(x => x.textContent)"
    )
    assert asked == ["What is overfitting?", first[-1], "And what else?", second[-1]]
    visitor.page.click("#restart")
    visitor.page.wait_for_selector("#answers .answer", state="detached")


def test_the_same_seed_says_the_same_and_temperature_0_is_the_chats(visitor, ladder) -> None:
    page = visitor.page
    first = visitor.ask("Hello!")
    page.click("#restart")
    page.wait_for_selector("#answers .answer", state="detached")
    assert visitor.ask("Hello!") == first
    page.click("#restart")
    page.click("button:has-text('Settings'):visible")
    page.get_by_label("seed").fill("1")
    assert visitor.ask("Hello!") != first
    page.click("#restart")
    page.get_by_label("number input for temperature").fill("0")
    page.keyboard.press("Tab")
    settings = [ChatSettings(run=name, outputs=str(ladder), temperature=0.0) for name in STAGES]
    expected = ["".join(start(one).answer("Hello!")) for one in settings]
    assert visitor.ask("Hello!") == expected


# --- vote


def test_a_vote_by_key_is_blind_until_it_is_cast(browser, own_ladder) -> None:
    with serving(f"outputs={own_ladder}") as served:
        visitor = Visitor(browser, served.url)
        page = visitor.page
        visitor.tab("Vote")
        said: list[str] = []
        page.on("response", lambda r: said.append(r.text()) if "queue" in r.url else None)
        for key, choice in zip(("ArrowLeft", "ArrowRight", "t", "b"), range(4), strict=True):
            visitor.draw()
            assert visitor.titles() == ["left", "right"]
            assert not any(name in page.inner_html("#two-answers") for name in STAGES)
            page.wait_for_timeout(100)  # until the responses are read
            assert said and not any(f"{name}-" in text for name in STAGES for text in said)
            page.keyboard.press(key)
            visitor.message("#voted", "saved")
            said.clear()
            row = votes(own_ladder)[choice]
            runs = [row["arena"][side]["run"].split("-")[0] for side in ("left", "right")]
            assert visitor.titles() == [{"start": "random"}.get(run, run) for run in runs]
        assert [v["arena"]["choice"] for v in votes(own_ladder)] == [
            *("left", "right", "tie", "both_bad"),
        ]
        page.keyboard.press("ArrowLeft")  # once more, on the same two
        visitor.message("#voted", "you have voted on these")
        page.keyboard.press("u")
        visitor.message("#voted", "taken back")
        assert len(votes(own_ladder)) == 3
        page.reload()
        page.wait_for_selector("#answers .said")
        visitor.tab("Board")
        visitor.message("#counted", "3 votes, 1 without")
        assert visitor.errors == []
        assert served.stop(signal.SIGINT) == 130
    with serving(f"outputs={own_ladder}") as served:  # the votes are still there
        visitor = Visitor(browser, served.url)
        visitor.tab("Board")
        visitor.message("#counted", "3 votes, 1 without")


def test_voting_early_twice_and_in_two_tabs(browser, own_ladder) -> None:
    with serving(f"outputs={own_ladder}") as served:
        tabs = [Visitor(browser, served.url) for _ in range(2)]
        for visitor in tabs:
            visitor.tab("Vote")
            visitor.page.keyboard.press("t")
            visitor.message("#voted", "press n first")
            visitor.page.keyboard.press("u")
            visitor.message("#voted", "no vote to take back")
            visitor.draw()
        for visitor in tabs:
            visitor.page.dblclick("#vote-left")
        for visitor in tabs:
            visitor.page.wait_for_selector("#two-answers .chosen")
        tabs[0].page.wait_for_timeout(500)
        assert len(votes(own_ladder)) == 2
        for visitor in tabs:
            visitor.page.click("#undo")
            visitor.message("#voted", "taken back")
        assert votes(own_ladder) == []


def test_keys_do_not_vote_where_they_mean_something_else(visitor, ladder) -> None:
    page = visitor.page
    visitor.tab("Vote")
    visitor.draw()
    before = len(votes(ladder))
    page.click("button:has-text('Settings'):visible")
    page.fill("#vote-question textarea", "")
    page.focus("#vote-question textarea")
    page.keyboard.type("tbnu")
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#vote-question textarea") == "tbnu"
    page.get_by_role("slider").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("slider").first.input_value() == "0.8"
    page.get_by_role("tab", name="Vote").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    assert len(votes(ladder)) == before


@pytest.mark.skipif(sys.platform != "linux", reason="another process's limits")
def test_a_full_disk_loses_no_vote(browser, own_ladder) -> None:
    with serving(f"outputs={own_ladder}") as served:
        visitor = Visitor(browser, served.url)
        visitor.tab("Vote")
        visitor.draw()
        limit = served.process.pid, resource.RLIMIT_FSIZE
        free = resource.prlimit(*limit)
        resource.prlimit(*limit, (0, free[1]))  # no file may grow
        visitor.page.keyboard.press("t")
        visitor.message("#voted", "the vote could not be saved (File too large): try again")
        assert visitor.titles() == ["left", "right"]
        resource.prlimit(*limit, free)
        visitor.page.keyboard.press("t")
        visitor.message("#voted", "saved")
        assert len(votes(own_ladder)) == 1


# --- what strangers type

HOSTILE = [
    "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>",
    "${document.title='hit'} {{document.title}} `${1}`",
    "# no heading **bold** [x](javascript:document.title='hit')",
    "\x00\x01\x1b[31m \u202e\u0627\u0644\u0639\u0631\u0628\u064a\u0629\u2066",
    "\ud800 half a character",
]


@pytest.mark.parametrize("question", HOSTILE)
def test_a_question_is_text(visitor, question) -> None:
    page = visitor.page
    visitor.paste(question)
    page.press("#question textarea", "Enter")
    visitor.message("#message", "question 1 of")
    shown = page.text_content("#answers .asked")
    # HTML has no NUL
    assert shown.replace("\ufffd", "") == question.replace("\x00", "").replace("\ud800", "")
    assert page.title() == "fourstage arena"
    assert page.query_selector("#answers img, #answers script, #answers a") is None


@pytest.mark.parametrize("n", [1_000, 100_001, 1_000_000])
def test_a_question_that_is_too_long_is_refused(visitor, n) -> None:
    page = visitor.page
    visitor.paste("x" * n)
    page.press("#question textarea", "Enter")
    visitor.message("#message", "shorten")
    page.click("text=Hello!")
    visitor.message("#message", "question 1 of")


# --- looks

CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (rgb) => {
        const [r, g, b] = rgb.map((x) => x / 255).map(
            (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const over = (top, below) => [0, 1, 2].map(
        (i) => top[i] * top[3] / 255 + below[i] * (1 - top[3] / 255));
    const under = (node) => {
        const layers = [];
        for (; node; node = node.parentElement) {
            const color = rgba(getComputedStyle(node).backgroundColor);
            if (color[3] > 0) layers.push(color);
            if (color[3] === 255) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
    };
    const found = [];
    for (const node of document.querySelectorAll("body *:not(input[type=checkbox])")) {
        const own = [...node.childNodes].some((x) => x.nodeType === 3 && x.textContent.trim());
        const hint = node.placeholder && !node.value;
        if (!(own || hint || node.value)) continue;
        if (!node.checkVisibility({visibilityProperty: true})) continue;
        const box = node.getBoundingClientRect();
        if (box.width < 2 || box.height < 2) continue;
        const below = under(node);
        const ink = rgba(getComputedStyle(node, hint ? "::placeholder" : null).color);
        const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) found.push([ratio.toFixed(2), node.tagName, node.className,
            (node.value || node.placeholder || node.textContent).slice(0, 30)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_and_stays_in_its_place(browser, url, width, scheme, tmp_path) -> None:
    visitor = Visitor(browser, url, width, color_scheme=scheme)
    page = visitor.page
    page.wait_for_timeout(500)
    page.evaluate(
        """() => {
            window.moved = 0;
            new PerformanceObserver((list) => {
                for (const one of list.getEntries())
                    if (!one.hadRecentInput) window.moved += one.value;
            }).observe({type: "layout-shift"});
        }"""
    )
    visitor.ask("What is an LLM?")
    visitor.ask("And why?", turn=2)
    assert page.evaluate("window.moved") < 0.02
    for name in ("Compare", "Vote", "Board"):
        visitor.tab(name)
        if name == "Vote":
            visitor.draw()
        for button in page.query_selector_all("button:has-text('Settings'):visible"):
            button.click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) == []
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)


def test_the_keyboard_reaches_all_and_shows_where_it_is(visitor) -> None:
    page = visitor.page
    page.wait_for_function("document.activeElement.tagName === 'TEXTAREA'")
    seen: list[str] = []
    while not seen or not seen[-1].startswith("grpo"):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const one = document.activeElement;
                const style = getComputedStyle(one);
                return [one.ariaLabel || one.textContent.trim(), style.outlineStyle];
            }"""
        )
        seen.append(name)
        assert outline != "none", name
    order = ["What is an LLM?", "New conversation", "Settings", *STAGES]
    places = [next(i for i, name in enumerate(seen) if name.startswith(x)) for x in order]
    assert places == sorted(places)


# --- ladders of other kinds


def test_one_run_alone(browser, own_ladder) -> None:
    with serving(f"outputs={own_ladder}", "runs=sft") as served:
        visitor = Visitor(browser, served.url)
        visitor.ask("Hello!")
        assert [name.split("-")[0] for name in visitor.titles("#answers")] == ["sft"]
        visitor.tab("Vote")
        visitor.draw()
        visitor.page.keyboard.press("ArrowRight")
        visitor.message("#voted", "saved")
        (vote,) = votes(own_ladder)
        assert vote["arena"]["left"]["run"] == vote["arena"]["right"]["run"]
        visitor.tab("Board")
        visitor.message("#counted", "1 vote, 0 without a winner")


def test_signals_end_it(own_ladder) -> None:
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
        with serving(f"outputs={own_ladder}", "runs=sft") as served:
            assert served.stop(signum) == code

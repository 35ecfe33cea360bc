"""Plays a page of traces in a browser: steps, keys, prompts, colours and details, and that no text in it becomes code."""

import json
import re

import numpy as np
import pytest

from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding.beliefs import Beliefs
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.decoder import GIVEN
from jaxblock.reporting.trace import TracedModel, trace_page
from jaxblock.streaming import Trace
from tests.reporting.browser import started

MASK, FILL, EOT = 90, 91, 92
LAYOUT = Layout(8, 4, "same_position", "aligned", None, MASK, FILL, (EOT, FILL))
EVIL = "</script><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"


def piece(token: int) -> str:
    return {MASK: "<mask>", EOT: "<eot>", 13: EVIL}.get(token, f"▁t{token}")


def trace(steps: list[int], tokens: list[int]) -> Trace:
    committed = np.array(steps) >= 0
    ids = np.array([[token, MASK, 7] for token in tokens], np.int32) * committed[:, None]
    shares = np.tile([0.5, 0.3, 0.01], (len(tokens), 1)) * committed[:, None]
    probability = np.where(committed, 0.5, 0)
    ids[1, 0], probability[1] = 6, 0.0001  # a token that was drawn although others were more probable
    count = max(steps) + 1
    return Trace(np.array(tokens), np.array(steps), count, 9 * count, count, Beliefs(probability, ids, shares))


@pytest.fixture(scope="module")
def page() -> str:
    first = [trace([0, 2, 1, 3, 5, 4, 4, 5], [10, 11, 12, 13, 14, EOT, FILL, FILL])] * 2
    second = [trace([0, 1, 1, 0, -1, -1, -1, -1], [10, 11, EOT, FILL, *[FILL] * 4])] * 2
    models = [
        TracedModel("runs/a", LAYOUT, DecodeConfig(), piece, first, ["t10 t11", EVIL]),
        TracedModel("runs/b & c", LAYOUT, DecodeConfig(temperature=0.5), piece, second, ["t10", "t10"]),
    ]
    return trace_page(["How many?", f"A second prompt {EVIL}"], models)


@pytest.fixture(scope="module")
def infilled() -> str:
    """A page of a text with a span of three tokens, given text, and a span of one, which begins the text."""
    steps = [0, 1, 2, GIVEN, GIVEN, 3]
    layout = LAYOUT._replace(block=2, infill=True)
    one = TracedModel("runs/a", layout, DecodeConfig(), piece, [trace(steps, [*range(10, 16)])], [" \n"])
    return trace_page([""], [one])


def test_the_page_is_whole_and_needs_nothing_else(page):
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"<link|<img|src=\"|href=|url\(|https?:|@import", page.replace("src=x", ""))
    assert page.count("<script") == page.count("</script") == 4 and "onerror" in page and "<img" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page).group(1))
    assert data["prompts"][1]["text"] == f"A second prompt {EVIL}" and data["columns"][0]["pieces"]["13"] == EVIL
    assert data["columns"][1]["settings"] == "rule low_confidence, 8 positions in blocks of 4, temperature 0.5"


@pytest.mark.slow
def test_a_browser_plays_it(page, tmp_path):
    (tmp_path / "trace.html").write_text(page, encoding="utf-8")
    with started() as browser:
        tab = browser.new_page(color_scheme="dark")
        problems, requests = [], []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(f"file://{tmp_path}/trace.html")
        tokens, at = tab.locator("section[aria-label='runs/a'] .t"), tab.locator("#at")

        def shown() -> str:
            return " ".join(tokens.all_text_contents()[:4])

        assert at.text_content() == "step 6 of 6"
        tab.keyboard.press("Home")
        assert at.text_content() == "step 0 of 6" and shown() == "░░ ░░ ░░ ░░"
        tab.keyboard.press("ArrowRight")
        assert shown() == " t10 ░░ ░░ ░░" and tab.locator("section[aria-label='runs/a'] .fresh").count() == 1
        tab.locator("#step").fill("3")
        assert shown() == " t10  t11  t12 ░░"
        status = tab.locator(".status").all_text_contents()
        assert status == [
            "3 forward passes, 3 of 8 tokens, 1.00 per forward pass",
            "2 forward passes, 4 of 8 tokens, 2.00 per forward pass, stopped early",
        ]
        # The candidates of a token, by pointer and by keyboard; a mask keeps its secret.
        tokens.nth(1).hover()
        tip = tab.locator("#tip").inner_text()
        assert "committed in step 3" in tip and "t6" in tip and "<mask> (never committed)" in tip
        assert re.search(r"✓ later\s+t11\s+<0.1%", tip)
        tokens.nth(0).focus()
        for _ in range(3):
            tab.keyboard.press("ArrowRight")
        assert "a mask at this step" in tab.locator("#tip").inner_text() and at.text_content() == "step 3 of 6"
        assert tokens.nth(3).evaluate("token => token === document.activeElement")
        tab.keyboard.press("Escape")
        assert tab.locator("#tip").is_hidden()
        # Playing ends at the last step; the button then plays again.
        tab.locator("#speed").select_option("12")
        tab.locator("#play").click()
        assert tab.locator("#play").text_content() == "Pause"
        tab.get_by_text("step 6 of 6").wait_for()
        assert tab.locator("#play").text_content() == "Play" and tab.locator(".answer").first.is_visible()
        assert tab.locator(".never").count() == 4 + 1  # one stands in the legend
        # Colours: by step, and the theme.
        by_probability = tokens.nth(0).evaluate("token => getComputedStyle(token).backgroundColor")
        tab.keyboard.press("c")
        assert tokens.nth(0).evaluate("token => getComputedStyle(token).backgroundColor") != by_probability
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.get_by_role("button", name="Light colours").click()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        # Text of the second prompt stays text.
        tab.keyboard.press("n")
        assert EVIL in tab.locator("#question").text_content() and tab.locator(".answer").first.text_content() == EVIL
        assert EVIL in tokens.all_text_contents() and tab.title() == "How the canvas was filled"
        assert tab.locator("img").count() == 0 and problems == [] and len(requests) == 1


@pytest.mark.slow
def test_a_browser_shows_the_blocks_of_spans(infilled, tmp_path):
    (tmp_path / "trace.html").write_text(infilled, encoding="utf-8")
    with started() as browser:
        tab = browser.new_page()
        tab.goto(f"file://{tmp_path}/trace.html")
        assert tab.locator(".block b").all_text_contents() == ["block 1", "block 2", "given", "block 3"]
        assert [box.locator(".t").count() for box in tab.locator(".block").all()] == [2, 1, 2, 1]
        assert (
            tab.locator("#question").text_content() == "(empty)" and tab.locator("#prompt").inner_text() == "1: (empty)"
        )
        assert tab.locator(".answer").text_content() == "(white space only)"
        tab.keyboard.press("c")
        tokens = tab.locator(".block .t")
        values = tokens.evaluate_all("all => all.map(token => token.style.getPropertyValue('--value'))")
        assert values[:3] == ["0", "1", "0"] and values[5] == "0"  # by step: the last of its block is 1, the only one 0
        tokens.nth(5).hover()
        assert "position 6, block 3, committed in step 4" in tab.locator("#tip").inner_text()
        tokens.nth(4).hover()
        assert "position 5, given" in tab.locator("#tip").inner_text()

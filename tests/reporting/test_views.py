"""Tests views of decodes and runs: on a terminal and elsewhere, pictures, and pages, which a browser opens; no text becomes code."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding.beliefs import Beliefs
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.decoder import GIVEN
from jaxblock.errors import UserError
from jaxblock.reporting import curves, panels, plots
from jaxblock.reporting.describe import visible_text
from jaxblock.reporting.report import About, report_page, thinned
from jaxblock.reporting.run_files import read_run_files
from jaxblock.reporting.trace import TracedModel, trace_page
from jaxblock.reporting.watch import Watch
from jaxblock.streaming import Trace
from jaxblock.training.observe import metrics

MASK, EOS, EOT = 99, 8, 9
EVIL = "</script><script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"
CANVASES = [[1, MASK, MASK, MASK], [1, 2, MASK, MASK], [1, 2, MASK, EOS], [1, 2, EOT, EOS]]


def piece(token):
    return {MASK: "<mask>", EOS: "<eos>", EOT: "<eot>", 13: EVIL}.get(token, f"▁t{token}")


def shown(terminal, canvases, height=30, nfe=None, start=()):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, height=height, color_system="standard", _environ={})
    with Watch("How [many]?", piece, mask_id=MASK, block=2, stop_ids=(EOS, EOT), start=start, console=console) as watch:
        for canvas in canvases:
            watch.step(canvas, nfe)
    return out.getvalue()


def test_without_a_terminal_one_line_per_block():
    assert shown(False, CANVASES).splitlines() == [
        "prompt: How [many]?",
        "block 1/2  2 steps   t1 t2",
        "block 2/2  2 steps  <eot> ·",
        "step 4  NFE 4  4/4 tokens  1.00 tokens per forward",
    ]
    # An early stop is said, and unfinished blocks are not lines.
    assert shown(False, [[1, MASK, MASK, MASK], [1, EOT, MASK, MASK]], nfe=4).splitlines()[1:] == [
        "block 1/2  2 steps   t1<eot>",
        "step 2  NFE 4  2/4 tokens  0.50 tokens per forward  stopped early",
    ]
    for terminal in (False, True):  # as while the decoder is compiled
        assert "compiling" in shown(terminal, []) and "0/0" not in shown(terminal, [])
    # Blocks of spans begin after given text.
    filled = [[1, MASK, MASK, 4, 5, 6, MASK], [1, 2, MASK, 4, 5, 6, MASK], [1, 2, 3, 4, 5, 6, MASK], [*range(1, 8)]]
    start = [MASK] * 3 + [4, 5, 6, MASK]
    assert shown(False, filled, start=start).splitlines()[1:-1] == [
        "block 1/3  2 steps   t1 t2",
        "block 2/3  1 step   t3",
        "given   t4 t5 t6",
        "block 3/3  1 step   t7",
    ]
    assert "▶ 3" in shown(True, filled, start=start) and "given" in shown(True, filled, start=start)


def test_on_a_terminal_fresh_tokens_are_highlighted_and_masks_dim():
    text = shown(True, CANVASES[:3])
    assert "\x1b[30;43m t2\x1b[0m" in text and "\x1b[90m░░ " in text
    assert "How [many]?" in text and "▶ 1" in text and "▶ 2" in text
    final = text[text.rindex("How [many]?") :]
    assert "43m" not in final and "▶" not in final
    # A canvas taller than the terminal is shown around the active block.
    text = shown(True, [[*list(range(1, 7)) * 10, *[MASK] * 60]], height=14)
    assert "blocks above" in text or "blocks below" in text
    assert text[: text.index("step 1")].rsplit("How", 1)[1].count("\n") < 14
    pieces = {"▁a": " a", "Ġa": " a", "\n": "⏎", "\x1b[31m": "\\x1b[31m", "": "∅", "é": "é", "\t": "⇥"}
    assert {raw: visible_text(raw) for raw in pieces} == pieces  # visible and harmless


def train(step, **more):
    return {"step": step, "kind": "train", "loss": 5.0 / (1 + step), "lr": 1e-3, "grad_norm": 1.0} | more


def evaluation(step, correct):
    nelbo = {"mean": 4.0 / (1 + step), "se": 0.1}
    pass_at_1 = {"correct": correct, "n": 8, "low": 0.1, "high": 0.9}
    return {"step": step, "kind": "eval", "nelbo_per_token": nelbo, "pass_at_1": pass_at_1}


RUNS = {
    "full": [evaluation(0, 1)]
    + [train(s, loss_by_block=[[2.0, 1.0]] * 4, loss_by_count=[[1.0, 2.0]] * 8) for s in range(1, 40)]
    + [evaluation(40, 7), evaluation(50, 6)],
    "one step": [train(1, loss_by_block=[[0.0, 0.0]], loss_by_count=[[0.0, 0.0]]), evaluation(1, 0)],
    "diverged": [train(s, loss=float("nan"), grad_norm=float("inf")) for s in (1, 2)],
    "empty": [],
}


def write(path, name):
    path.write_text("".join(json.dumps(row) + "\n" for row in RUNS[name]), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # what earlier tests left may be collected here
def test_pictures_of_full_short_and_empty_runs(tmp_path, name):
    written = plots.plot_run(write(tmp_path / "metrics.jsonl", name), tmp_path / "plots")
    assert [Path(p).name for p in written] == ["loss.png", "nelbo.png", "pass_at_1.png", "curves.png"]
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in written)


def test_what_is_drawn_is_what_was_logged(tmp_path):
    full, one = (metrics.read_metrics(write(tmp_path / "m.jsonl", name)) for name in ("full", "one step"))

    def drawn(run, name):
        curves.draw_panel(axes := Figure().subplots(), panels.PANELS[name](run))
        return axes

    axes = drawn(full, "pass_at_1")
    assert np.asarray(axes.get_lines()[0].get_ydata()).tolist() == [1 / 8, 7 / 8, 6 / 8]
    bars = axes.containers[0].lines[2][0].get_segments()
    assert np.allclose(np.stack(bars)[:, :, 1], [[0.1, 0.9]] * 3)
    assert axes.get_ylabel() == "share of problems solved, linear scale"
    line = np.asarray(drawn(full, "loss_by_count").get_lines()[0].get_xydata())
    assert line.tolist() == [[count, 0.5] for count in range(1, 9)]  # masked counts start at 1
    # Of fewer points than make a curve, the values are written.
    few = [drawn(one, name) for name in ("loss_by_block", "pass_at_1")]
    assert not few[0].get_lines() and few[0].texts[0].get_text().startswith("there is only one block index")
    assert not few[1].get_lines() and few[1].texts[0].get_text() == "step 1: 0.0% [10.0%, 90.0%]"
    wide = [train(step, loss=10.0 ** (3 - step)) for step in range(5)]
    axes = drawn(metrics.Metrics(wide, []), "loss")
    assert axes.get_yscale() == "log" and axes.get_ylabel().endswith("nats, log scale")
    # Smoothing keeps constants and means.
    assert panels.smoothed(np.full(7, 3.0), 5).tolist() == [3.0] * 7
    assert panels.smoothed(np.array([0.0, 3.0, 6.0]), 3).tolist() == [0.0, 3.0, 6.0]
    assert panels.smoothed(np.array([0.0, 9.0, 0.0]), 3)[1] == 3.0


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture
def opened(tmp_path):
    """Returns a function that opens a page's text and returns its tab; the page must cause no error, nor load anything else."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `browser`)")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    problems, requests = [], []
    with playwright.sync_playwright() as driver:
        if found is None and not os.path.exists(driver.chromium.executable_path):
            pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is installed, nor playwright's own")
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)

        def open_page(html, scheme):
            (tmp_path / "page.html").write_text(html, encoding="utf-8")
            tab = browser.new_page(color_scheme=scheme)
            tab.on("pageerror", lambda error: problems.append(str(error)))
            tab.on("console", lambda message: problems.append(message.text))
            tab.on("request", lambda request: requests.append(request.url))
            tab.goto(f"file://{tmp_path}/page.html")
            return tab

        yield open_page
        browser.close()
        assert problems == [] and len(requests) == 1


LAYOUT = Layout(8, 4, "same_position", "aligned", None, MASK, EOS, (EOT, EOS))


def check_whole(page):
    """Asserts that a page needs nothing else, and that no text in it became a script or an image."""
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    known = page.replace("src=x", "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<link|<img|src=\"|href=|url\(|https?:|@import", known)
    assert page.count("<script") == page.count("</script") == 4 and "onerror" in page


def trace(steps, tokens):
    committed = np.array(steps) >= 0
    ids = np.array([[token, MASK, 7] for token in tokens], np.int32) * committed[:, None]
    shares = np.tile([0.5, 0.3, 0.01], (len(tokens), 1)) * committed[:, None]
    probability = np.where(committed, 0.5, 0)
    ids[1, 0], probability[1] = 6, 0.0001  # a token that was drawn although others were more probable
    count = max(steps) + 1
    return Trace(np.array(tokens), np.array(steps), count, 9 * count, count, Beliefs(probability, ids, shares))


@pytest.fixture(scope="module")
def page():
    first = [trace([0, 2, 1, 3, 5, 4, 4, 5], [10, 11, 12, 13, 14, EOT, EOS, EOS])] * 2
    second = [trace([0, 1, 1, 0, -1, -1, -1, -1], [10, 11, EOT, EOS, *[EOS] * 4])] * 2
    models = [
        TracedModel("runs/a", LAYOUT, DecodeConfig(), piece, first, ["t10 t11", EVIL]),
        TracedModel("runs/b & c", LAYOUT, DecodeConfig(temperature=0.5), piece, second, ["t10", "t10"]),
    ]
    return trace_page(["How many?", f"A second prompt {EVIL}"], models)


def test_a_page_of_traces_is_whole_and_needs_nothing_else(page):
    check_whole(page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page).group(1))
    assert data["prompts"][1]["text"] == f"A second prompt {EVIL}" and data["columns"][0]["pieces"]["13"] == EVIL
    assert data["columns"][1]["settings"] == "rule low_confidence, 8 positions in blocks of 4, temperature 0.5"


@pytest.mark.slow
def test_a_browser_plays_it(page, opened):
    tab = opened(page, "dark")
    tokens, at = tab.locator("section[aria-label='runs/a'] .t"), tab.locator("#at")

    def shown():
        return " ".join(tokens.all_text_contents()[:4])

    assert at.text_content() == "step 6 of 6"
    tab.keyboard.press("Home")
    assert at.text_content() == "step 0 of 6" and shown() == "░░ ░░ ░░ ░░"
    tab.keyboard.press("ArrowRight")
    assert shown() == " t10 ░░ ░░ ░░" and tab.locator("section[aria-label='runs/a'] .fresh").count() == 1
    tab.locator("#step").fill("3")
    assert shown() == " t10  t11  t12 ░░"
    assert tab.locator(".status").all_text_contents() == [
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
    assert tab.locator("img").count() == 0


@pytest.mark.slow
def test_a_browser_shows_the_blocks_of_spans(opened):
    """Of a text with a span of three tokens, given text, and a span of one, which begins the text."""
    layout, filled = LAYOUT._replace(block=2, infill=True), trace([0, 1, 2, GIVEN, GIVEN, 3], [*range(10, 16)])
    tab = opened(trace_page([""], [TracedModel("runs/a", layout, DecodeConfig(), piece, [filled], [" \n"])]), "light")
    assert tab.locator(".block b").all_text_contents() == ["block 1", "block 2", "given", "block 3"]
    assert [box.locator(".t").count() for box in tab.locator(".block").all()] == [2, 1, 2, 1]
    assert [tab.locator(name).inner_text() for name in ("#question", "#prompt")] == ["(empty)", "1: (empty)"]
    assert tab.locator(".answer").text_content() == "(white space only)"
    tab.keyboard.press("c")
    tokens = tab.locator(".block .t")
    values = tokens.evaluate_all("all => all.map(token => token.style.getPropertyValue('--value'))")
    assert values[:3] == ["0", "1", "0"] and values[5] == "0"  # by step: the last of its block is 1, the only one 0
    tokens.nth(5).hover()
    assert "position 6, block 3, committed in step 4" in tab.locator("#tip").inner_text()
    tokens.nth(4).hover()
    assert "position 5, given" in tab.locator("#tip").inner_text()


SUMMARY = {
    "split": "test",
    "step": 1200,
    "grader": "gsm8k_flexible",
    "decode": {"rule": "low_confidence", "cache": "dual", "temperature": 0.5, "response_len": 64, "threshold": None},
    "canvas": {"response_len": 24, "block": 8},
    "pass_at_1": {"correct": 6, "n": 8, "low": 0.41, "high": 0.93},
    "nelbo_per_token": {"mean": 0.5, "se": 0.01},
    "nfe": 12.25,
    "compared_with": {"file": "a/problems.jsonl", "only_a": 1, "only_b": 2, "p_value": 1.0},
}


@pytest.fixture
def runs(tmp_path):
    """Makes a run's metrics and samples, an evaluation in its folder, and three beside it, one of them broken."""
    run = tmp_path / "runs" / EVIL.replace("/", "")
    for folder in (run / "score", tmp_path / "runs" / "other", tmp_path / "runs" / "broken", tmp_path / "far"):
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(SUMMARY | {"checkpoint": str(run)}))
    (tmp_path / "runs" / "other" / "summary.json").write_text(json.dumps(SUMMARY | {"checkpoint": EVIL, "nfe": "many"}))
    (tmp_path / "runs" / "broken" / "summary.json").write_text("{")
    time = {"kind": "goodput", "goodput": 0.75, "seconds": {"step": 30.0, "compile": 10.0}, "step_seconds": 0.5}
    rows = [evaluation(0, 1), *(train(step, tokens_per_second=1e5) for step in range(1, 1301)), evaluation(650, 4)]
    rows += [evaluation(1300, 7), {"step": 1300, **time}, {"step": 650, "kind": "resume"}]
    rows.sort(key=lambda row: row["step"])
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"step": step, "index": 3, "correct": step > 0, "prompt": f"2+2? {EVIL}", "response": f"{EVIL} {step}"}
               for step in (0, 1300)]  # fmt: skip
    lines = [*map(json.dumps, answers), "nonsense", json.dumps({"step": "x", "prompt": "a", "response": "b"})]
    (run / "samples.jsonl").write_text("\n".join(lines) + '\n{"step": 1')  # the last line was cut off
    return run


def page_of(run, *given):
    facts, changed = [("network", f"tiny {EVIL}")], [("train.steps", "1300")]
    about = About(run.name, str(run), facts, changed, f"# {EVIL}\ntrain: {{}}\n")
    return report_page(about, read_run_files(run, given))


def test_a_report_says_what_the_run_left_behind(runs, tmp_path):
    page = page_of(runs, tmp_path / "far")
    check_whole(page)
    for said in (
        "Up to step 1,300: goodput 75%: step 30 s, compile 10 s",
        "87.5% [10.0%, 90.0%] (7 of 8) at step 1,300",
        "lowest 0.003075 at step 1,300",
        "from step 650",
        "75.0% [41.0%, 93.0%] (6 of 8)",
        "a/problems.jsonl: 2 right here alone, 1 right there alone (McNemar p = 1)",
        "<td>gsm8k_flexible</td>",
        "<td>1,200</td>",
        "low_confidence, 64 positions in blocks of 8, cache dual, temperature 0.5",
        "2 lines of samples.jsonl are no samples",
        "broken/summary.json: not a JSON file",
    ):
        assert said in page, said
    assert page.count('<tr class="own"') == 2 and page.count('<tr class="other"') == 1  # score and far; other
    assert page.index(">1,300</td>") < page.index(">0</td>")  # the newest sample comes first
    for given in (tmp_path, tmp_path / "runs" / "broken"):
        with pytest.raises(UserError, match=r"summary\.json"):
            read_run_files(runs, [given])
    # Long lines are thinned to means with their range.
    line = panels.train_panel(read_run_files(runs).metrics, "loss", "Loss", "nats").lines[0]
    thin = thinned(line)
    assert line.x.size == 1300 and thin.x.size == 434 and thin.name == "Loss (mean and range of 3)"
    assert (thin.x[0], thin.x[-1]) == (3, 1300) and thin.y[0] == pytest.approx(line.y[:3].mean())
    assert (thin.low[1], thin.high[1]) == (line.y[5], line.y[3]) and thin.y[-1] == line.y[-1]
    # A run that has only begun.
    (tmp_path / "empty").mkdir()
    begun = page_of(tmp_path / "empty")
    assert all(said in begun for said in ("no training steps logged", "no row of goodput yet", "no samples.jsonl"))


@pytest.mark.slow
def test_a_browser_reads_the_curves(runs, opened):
    tab = opened(page_of(runs), "light")
    chart = tab.locator("#panel-pass_at_1 svg[role=img]")
    chart.hover()
    tip = tab.locator("#tip").inner_text()
    assert "step 650" in tip and "50.0% [10.0%, 90.0%]" in tip
    chart.focus()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    assert tab.locator("#said").text_content() == "step 1,300: Pass@1 87.5% [10.0%, 90.0%]"
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").is_hidden()
    # The scale is said on the axis, and can be changed.
    loss = tab.locator("#panel-loss")
    assert "loss in nats, log scale" in loss.inner_text()
    loss.get_by_role("button", name="linear scale").click()
    assert "loss in nats, linear scale" in loss.inner_text()
    loss.get_by_text("values").click()
    # The rows are made when the browser says that it is open.
    loss.locator("table tr").nth(400).wait_for(state="attached")
    # A panel without a curve says why, and no text became code.
    assert "no loss by block index logged" in tab.locator("#panel-loss_by_block").inner_text()
    assert tab.title() == f"Run {runs.name}" and EVIL in tab.locator("td.text").first.text_content()
    assert tab.locator("img").count() == 0

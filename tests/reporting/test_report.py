"""Reads what a run left behind and draws its report, and reads the curves of the page in a browser."""

import json
import re

import pytest

from jaxblock.errors import UserError
from jaxblock.reporting.report import About, report_page, thinned
from jaxblock.reporting.run_files import read_run_files
from tests.reporting.browser import started
from tests.reporting.test_trace_page import EVIL
from tests.reporting.test_views import evaluation, train

SUMMARY = {
    "split": "test",
    "decode": {"rule": "low_confidence", "cache": "dual"},
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


def page_of(run, *given) -> str:
    about = About(
        run.name, str(run), [("network", f"tiny {EVIL}")], [("train.steps", "1300")], f"# {EVIL}\ntrain: {{}}\n"
    )
    return report_page(about, read_run_files(run, given))


def test_a_report_says_what_the_run_left_behind(runs, tmp_path):
    page = page_of(runs, tmp_path / "far")
    assert page.count("<script") == page.count("</script") == 4 and "<img" not in page
    assert not re.search(r"<link|href=|url\(|https?:|@import", page.replace("http://www.w3.org/2000/svg", ""))
    for said in (
        "Up to step 1,300: goodput 75%: step 30 s, compile 10 s",
        "87.5% [10.0%, 90.0%] (7 of 8) at step 1,300",
        "lowest 0.003075 at step 1,300",
        "from step 650",
        "75.0% [41.0%, 93.0%] (6 of 8)",
        "a/problems.jsonl: 2 right here alone, 1 right there alone (McNemar p = 1)",
        "low_confidence, cache dual",
        "2 lines of samples.jsonl are no samples",
        "broken/summary.json: not a JSON file",
    ):
        assert said in page, said
    assert page.count('<tr class="own"') == 2 and page.count('<tr class="other"') == 1  # score and far; other
    assert page.index(">1,300</td>") < page.index(">0</td>")  # the newest sample comes first
    for given in (tmp_path, tmp_path / "runs" / "broken"):
        with pytest.raises(UserError, match=r"summary\.json"):
            read_run_files(runs, [given])
    # A run that has only begun.
    empty = tmp_path / "empty"
    empty.mkdir()
    begun = page_of(empty)
    assert all(said in begun for said in ("no training steps logged", "no row of goodput yet", "no samples.jsonl"))


def test_long_lines_are_thinned_to_means_with_their_range(runs):
    from jaxblock.reporting.panels import train_panel

    line = train_panel(read_run_files(runs).metrics, "loss", "Loss", "nats").lines[0]
    thin = thinned(line)
    assert line.x.size == 1300 and thin.x.size == 434 and thin.name == "Loss (mean and range of 3)"
    assert (thin.x[0], thin.x[-1]) == (3, 1300) and thin.y[0] == pytest.approx(line.y[:3].mean())
    assert (thin.low[1], thin.high[1]) == (line.y[5], line.y[3]) and thin.y[-1] == line.y[-1]


@pytest.mark.slow
def test_a_browser_reads_the_curves(runs, tmp_path):
    (tmp_path / "report.html").write_text(page_of(runs), encoding="utf-8")
    with started() as browser:
        tab = browser.new_page(color_scheme="light")
        problems, requests = [], []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(f"file://{tmp_path}/report.html")
        chart = tab.locator("#panel-pass_at_1 svg[role=img]")
        chart.hover()
        assert (
            "step 650" in tab.locator("#tip").inner_text()
            and "50.0% [10.0%, 90.0%]" in tab.locator("#tip").inner_text()
        )
        chart.focus()
        tab.keyboard.press("Home")
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#said").text_content() == "step 1,300: Pass@1 87.5% [10.0%, 90.0%]"
        tab.keyboard.press("Escape")
        assert tab.locator("#tip").is_hidden()
        # The scale is said on the axis, and can be changed.
        loss = tab.locator("#panel-loss")
        assert "loss in nats, log scale" in loss.inner_text()
        loss.get_by_role("button", name="linear scale").click()
        assert "loss in nats, linear scale" in loss.inner_text()
        loss.get_by_text("values").click()
        assert loss.locator("table tr").count() > 400
        # A panel without a curve says why, and no text became code.
        assert "no loss by block index logged" in tab.locator("#panel-loss_by_block").inner_text()
        assert tab.title() == f"Run {runs.name}" and EVIL in tab.locator("td.text").first.text_content()
        assert tab.locator("img").count() == 0 and problems == [] and len(requests) == 1

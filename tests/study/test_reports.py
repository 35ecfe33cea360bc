"""What a report says of a study that is not finished, of broken results, and of results that different versions computed."""

import copy
import json
import re
from types import SimpleNamespace

import pytest

from jaxblock.commands import study as command
from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.study import analysis, cells, report, results, work
from jaxblock.study.scores import made_by, training_loss
from jaxblock.training.config import TrainConfig
from tests.study.test_study import TREE, laid_out, planted

VERSIONS = {"commit": "a" * 40, "jax": "0.9", "device": "1 x cpu"}
OTHER = VERSIONS | {"commit": "b" * 40 + "+changes"}
NAMES = ("aaaaaaaaaaaa, jax 0.9, 1 x cpu", "bbbbbbbbbbbb with changes, jax 0.9, 1 x cpu")


def three_primaries():
    tree = copy.deepcopy(TREE)
    one = {"arms": ["blockwise", "classical"], "decodings": ["own"], "primary": True}
    tree["experiments"] = {f"e{at}": {**one, "budgets": [5, 10 + at]} for at in range(3)}
    return laid_out(tree)


def whole_results(study, plan):
    """Returns planted results with everything that a result has."""
    made = planted(study, plan, 0.0)
    for cell in plan.cells:
        result = made[cell.name]
        result |= {"arm": cell.arm, "fingerprint": cells.fingerprint(study, cell), "versions": dict(VERSIONS)}
        for point in cell.points:
            result["scores"][str(point)]["how"] = cells.how_scored(study, cell.arm, point.decoding)
    return made


def written(study, plan, made, folder):
    report.write_report(study, plan, made, folder)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def rows_of(text, name):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {name} |")]


@pytest.mark.parametrize("seeds", [0, 1, 7])
def test_what_is_claimed_of_an_unfinished_study_is_claimed_of_the_finished_one(seeds, tmp_path):
    study, plan = three_primaries()
    made = planted(study, plan, 0.05)
    full = analysis.primary(analysis.analyse(study, plan, made))
    assert full["e0"].p < 0.05 < full["e0"].p_adjusted and not full["e0"].found
    for cell in plan.cells:
        if cell.arm == "classical" and cell.seed >= seeds:
            for steps in (11, 12):
                del made[cell.name]["scores"][f"{steps}/own"]
    part = analysis.primary(analysis.analyse(study, plan, made))
    assert list(part) == ["e0"] and part["e0"].p_adjusted >= full["e0"].p_adjusted and not part["e0"].found
    for text in written(study, plan, made, tmp_path):
        assert text.count(f"incomplete: {seeds} of 8 seeds") == 2
        assert text.count("no difference shown while other hypotheses are incomplete") == 1
        assert text.count("], provisional") == (4 if seeds > 1 else 0)
    assert (tmp_path / "report.md").read_text().count(
        f"|  |  | incomplete: {seeds} of 8 seeds |"
    ) == 2  # and no p-value


CELL, POINT = "blockwise-s1", "5/own"
SHORT = copy.deepcopy(TREE) | {"seeds": 2, "experiments": {"steps": TREE["experiments"]["steps"]}}


def replaced(*path_and_value):
    """Returns a function that replaces a value in the result of `CELL`, or takes it away where no value is given."""
    *path, last, value = path_and_value

    def change(made):
        at = made[CELL]
        for key in path:
            at = at[key]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return change


SCORE = ("scores", POINT)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda made: made.update({CELL: []}), f"{CELL}.json: the result of a cell is a JSON object, not []"),
        (lambda made: made.update({"extra-s0": {"hello": 1}}), "extra-s0.json: steps is missing"),
        (lambda made: made.update({"extra-s0": {"steps": 1, "scores": {}}}), "extra-s0.json: seconds is missing"),
        (replaced("fingerprint", None), f"{CELL}.json: fingerprint is missing"),
        (replaced("steps", "9"), f"{CELL}.json: steps is '9', not a whole number"),
        (replaced("arm", "gone"), f"{CELL}.json: arm is 'gone', but the cell of this name is of arm blockwise"),
        (replaced("scores", []), f"{CELL}.json: scores is [], not an object"),
        (replaced("seconds", {"training": "long"}), f"{CELL}.json, seconds: training is 'long', not a number"),
        (replaced("continued_with", [3]), f"{CELL}.json: continued_with has an item that is not an object"),
        (replaced("scores", POINT, 3), f"{CELL}.json, scores: {POINT} is 3, not an object"),
        (replaced(*SCORE, "how", None), f"{CELL}.json, point {POINT}: how is missing"),
        (replaced(*SCORE, "nfe", None), f"{CELL}.json, point {POINT}: nfe is missing"),
        (replaced(*SCORE, "correct", "ff"), f"point {POINT}: correct has a bit for each of its 64 problems, 16 hexadecimal digits, but it"),
        (replaced(*SCORE, "correct", "zz" * 8), f"point {POINT}: correct has a bit for each of its 64 problems"),
        (replaced(*SCORE, "problems", 0), f"point {POINT}: correct has a bit for each of its 0 problems"),
        (replaced(*SCORE, "nelbo_per_token", {}), f"{CELL}.json, point {POINT}, nelbo_per_token: mean is missing"),
        (replaced(*SCORE, "loss", [1.0]), f"{CELL}.json, point {POINT}: loss is [1.0], not the sum and the number of tokens"),
        (replaced(*SCORE, "versions", "new"), f"{CELL}.json, point {POINT}: versions is 'new', not an object"),
    ],
)  # fmt: skip
def test_a_broken_result_is_refused_with_its_file_and_field_before_anything_is_written(change, says, tmp_path):
    study, plan = laid_out(SHORT)
    made = whole_results(study, plan)
    results.write_plan(tmp_path, json.dumps(SHORT), plan, {cell.name: "x" for cell in plan.cells})
    change(made)
    (tmp_path / results.RESULTS).mkdir()
    for name, result in made.items():
        (tmp_path / results.RESULTS / f"{name}.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=re.escape(says)) as error:
        command.run(command.Options("report", str(tmp_path)), Config())
    assert "copy the file again from where it was computed, or move it away" in str(error.value)
    assert not list(tmp_path.glob("report.*")) and not (tmp_path / report.PICTURES).exists()


def test_results_without_the_nelbo_that_the_study_asks_for_are_refused():
    study, plan = laid_out(SHORT)
    made = planted(study, plan, 0.0)
    results.check_contents(plan, made)
    with pytest.raises(UserError, match="results/blockwise-s0.json, point 5/own: nelbo_per_token is missing"):
        results.check_contents(plan, made, bounded=True)


def test_each_score_says_which_versions_computed_it_and_time_before_an_interruption_is_kept(tmp_path, monkeypatch):
    study, plan = laid_out()
    cell, codes = plan.cell("classical-s3"), [143, 143, 0, 0]
    monkeypatch.setattr(work, "read_manifest", lambda folder: SimpleNamespace(inputs={"train": {"sha256": "5" * 64}}))
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(
        work, "_score", lambda *_: {"problems": 8, "correct": "ff", "nfe": 1.0, "tokens_per_forward": 1.0}
    )
    monkeypatch.setattr(work, "training_loss", lambda train, steps: None)

    def run(versions, points, train=lambda config: codes.pop(0), check=lambda: None):
        monkeypatch.setattr(work, "_versions", lambda: dict(versions))
        part = cells.Cell(cell.arm, cell.seed, cell.steps, cell.points[:points], cell.start)
        work.run_cell(study, part, str(tmp_path), work.Verbs(None, train, None), print, check)
        return results.read_results(tmp_path)[cell.name]

    with pytest.raises(ZeroDivisionError):  # as if it had been killed: the result names the versions that began
        run(VERSIONS, 1, lambda config: 1 // 0)
    assert results.read_results(tmp_path)[cell.name]["versions"] == VERSIONS
    with pytest.raises(ZeroDivisionError):  # another process has taken the cell over: nothing is written
        run(VERSIONS, 1, lambda config: 0, lambda: 1 // 0)
    assert results.read_results(tmp_path)[cell.name]["scores"] == {}
    clock = iter(range(0, 10**6, 10))
    first = run(VERSIONS, 1)
    assert (first["steps"], first["seconds"], first["scores"]) == (0, {"training": 10.0}, {})
    assert run(VERSIONS, 1)["seconds"] == {"training": 20.0} and run(OTHER, 1)["seconds"]["training"] == 30.0
    found = run(VERSIONS | {"jax": "1.0"}, 3)  # the run is complete: this one only scores
    assert found["versions"] == VERSIONS and found["continued_with"] == [OTHER]
    own = [score.get("versions") for score in found["scores"].values()]
    assert own == [OTHER, *[VERSIONS | {"jax": "1.0"}] * 2]
    assert made_by(found, ["5/own"]) == set(NAMES)


def test_a_report_names_the_versions_and_warns_where_they_differ_within_a_comparison(tmp_path):
    study, plan = laid_out()
    made = whole_results(study, plan)
    text, page = written(study, plan, made, tmp_path)
    scores = sum(len(cell.points) for cell in plan.cells)
    [row] = rows_of(text, NAMES[0])
    assert row == [NAMES[0], "24", str(scores), "[start-s0](results/start-s0.json)"] and "Warning" not in text + page
    made["classical-s2"]["scores"]["20/whole"]["versions"] = OTHER  # of the grid alone
    text, page = written(study, plan, made, tmp_path)
    assert rows_of(text, NAMES[1]) == [[NAMES[1], "0", "1", "[classical-s2](results/classical-s2.json)"]]
    warning = "Warning: its cells were trained or scored by different versions, so that a difference may be one between these: "
    for shown in (text, page):
        assert shown.count(warning) == 1 and f"{warning}16 by {NAMES[0]}; 1 by {NAMES[1]}." in shown
    assert text.index("matching") > text.index(warning) > text.index("tokens.svg") and "versions of scores" in page


def test_the_training_loss_is_that_of_the_second_half_before_a_checkpoint_and_shown_where_all_have_it(tmp_path):
    lines = [{"step": at, "kind": "train", "loss_by_block": [[at, 2.0], [1.0, 1.0]]} for at in (10, 15, 20, 30, 38)]
    # The last line of a run whose last checkpoint could not be read: the run goes on from the one before.
    again = [{"step": 30, "kind": "resume"}, {"step": 40, "kind": "train", "loss_by_block": [[0.5, 1.0]]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*lines, *again]))
    train = TrainConfig(out=str(tmp_path), log_every=10, keep_steps=(15,))
    for steps, want in ((5, None), (10, [11, 3]), (15, [27, 6]), (20, [37, 6]), (30, [52, 6]), (40, [31.5, 4])):
        assert training_loss(train, steps) == want, steps
    assert training_loss(TrainConfig(out=str(tmp_path / "absent")), 100) is None
    tree = copy.deepcopy(SHORT)
    tree["experiments"]["long"] = {
        **SHORT["experiments"]["steps"],
        "budgets": [5, 10, 20],
    }  # three budgets make a curve
    study, plan = laid_out(tree)
    made = whole_results(study, plan)
    for cell in plan.cells:
        for point in cell.points:
            made[cell.name]["scores"][str(point)]["loss"] = [3.0 * point.steps, 2.0]
    header, column = " | training loss per masked token |", " | 30.0000 ± 0.0000 |"

    def shown():
        text = written(study, plan, made, tmp_path)[0]
        picture = (tmp_path / report.PICTURES / "long.svg").read_text()
        return text.count(header), text.count(column), len(re.findall('id="axes_', picture))

    assert shown() == (2, 4, 4)
    del made["classical-s1"]["scores"]["10/own"]["loss"]
    assert shown() == (1, 2, 3)

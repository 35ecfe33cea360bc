"""A study: its file, the cells that it is laid out in, what a cell computes, and what a report says of planted results."""

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxblock.commands import study as command
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree
from jaxblock.diffusion import laws
from jaxblock.errors import UserError
from jaxblock.io.files import write_bytes
from jaxblock.io.owners import this_process
from jaxblock.models.families import registry
from jaxblock.study import amounts, analysis, cells, report, results, runner, work
from jaxblock.study.scores import solved
from jaxblock.study.study_file import read_study, study_from_tree

ROOT = Path(__file__).parents[2]

TREE = {
    "title": "A study",
    "seeds": 8,
    "common": {"optimizer": {"schedule": "constant", "warmup_steps": 0}, "train": {"batch_size": 4}},
    "tasks": {"sums": {"canvas": {"prompt_len": 16, "response_len": 16, "block": 4}}},
    "arms": {
        "start": {"task": "sums", "steps": 10, "method": {"objective": "classical"}},
        "blockwise": {"task": "sums", "start": "start"},
        "classical": {"task": "sums", "start": "start", "method": {"objective": "classical"}},
    },
    "decodings": {"own": {}, "whole": {"canvas": {"block": 16}}},
    "experiments": {
        "steps": {"arms": ["blockwise", "classical"], "decodings": ["own"], "budgets": [5, 20], "primary": True},
        "tokens": {
            "arms": ["blockwise", "classical"], "decodings": ["own"], "budgets": [40], "unit": "masked_tokens", "seeds": 3
        },
        "grid": {"kind": "grid", "arms": ["blockwise", "classical"], "decodings": ["own", "whole"], "budgets": [20]},
    },
    "scoring": {"split": "validation", "problems": 64, "nelbo_rows": 0},
}  # fmt: skip


def changed(*path_and_value, tree=TREE):
    """Returns the study's tree with one value replaced."""
    tree = copy.deepcopy(tree)
    *path, last, value = path_and_value
    at = tree
    for key in path:
        at = at[key]
    at[last] = value
    return tree


def arch(arm="blockwise"):
    model = config_from_tree({"model": {"d_model": 8, "n_layers": 1, "n_heads": 2, "mlp_dim": 12}}, "a test").model
    return registry.architecture_from_config(model, vocab_size=32, mask_id=1, eos_id=2, pad_id=2)


def laid_out(tree=TREE):
    study = study_from_tree(tree, "study.yaml")
    return study, cells.lay_out(study, arch)


RELATED = {"kind": "relation", "arms": ["blockwise", "classical"], "decodings": ["own"]}
SCORED = {"scoring": TREE["scoring"] | {"nelbo_rows": 4}}
OTHER = changed("arms", "other", {"task": "others", "start": "start"})
TWO_TASKS = changed("tasks", "others", TREE["tasks"]["sums"], tree=OTHER)
GRADIENTS = {"kind": "gradients", "arms": ["blockwise"], "budgets": [5]}
MEASURED = changed("experiments", "grid", GRADIENTS)
WINDOW = {"sums": {"canvas": {"response_len": 16, "block": 4, "suffix_window": 4}}}
PRIMARY = TREE["experiments"]["steps"]
EXACT = changed("tasks", "others", TREE["tasks"]["sums"] | {"evaluate": {"grader": "exact"}})
ELSEWHERE = changed("decodings", "elsewhere", {"task": "others"}, tree=EXACT)
SMALLER = changed("arms", "blockwise", {"task": "sums", "start": "start", "canvas": {"block": 2}})


@pytest.mark.parametrize(
    "tree, says",
    [
        (changed("tasks", {}), "tasks is missing or empty"),
        (changed("nonsense", 1), "has no key 'nonsense'"),
        (changed("seeds", [1, 1]), "seeds must be a number of seeds, or a list of different whole numbers"),
        (changed("arms", "blockwise", "task", "sum"), "arms.blockwise.task names 'sum', which is not there; did you mean sums?"),
        (changed("arms", "start", "start", "start"), "arms start from each other in a circle: start <- start"),
        (changed("arms", "start", {"task": "sums"}), "arms.start.steps is missing"),
        (changed("arms", "start", "steps", 0), "arms.start.steps must be a whole number of at least 1"),
        (changed("arms", "start", "seed", -1), "arms.start.seed must be a whole number of at least 0, not -1"),
        (changed("arms", "blockwise", "seed", 3), "arms.blockwise.seed is 3, so arms.start, from which it starts, needs a seed too"),
        (changed("arms", "start", {"task": "sums", "steps": 10, "seed": 3, "start": "classical"}), "in a circle"),
        (changed("arms", "classical", {"task": "sums", "seed": 3}), "experiments.steps has arms with a seed of their own (classical)"),
        (changed("arms", "blockwise", "train", {"seed": 3}), "arms.blockwise sets train.seed, which the study sets itself"),
        (changed("arms", "blockwise", "method", {"lwa": 3}), "unknown key method.lwa"),
        (changed("decodings", "own", {"train": {"steps": 1}}), "decodings.own has no key 'train'"),
        (changed("decodings", "own", {"task": "sum"}), "decodings.own.task names 'sum', which is not there; did you mean sums?"),
        (changed("tasks", "other", {}), "no arm is trained or scored on task other"),
        (changed("tasks", "sums", {"data": {"tokenizer": "task:sum"}}), "tasks.sums.data.tokenizer names 'sum'"),
        (changed("arms", "blockwise", "data", {"level": "easy"}), "arms.blockwise has settings of data: give them to a task"),
        (changed("experiments", "steps", "arms", ["blockwise", "classic"]), "did you mean classical?"),
        (changed("experiments", "steps", "budgets", [20, 5]), "experiments.steps.budgets must be whole numbers of at least 1 that rise"),
        (changed("experiments", "steps", "budgets", []), "experiments.steps.budgets is missing or empty"),
        (changed("experiments", "steps", "reference", "start"), "experiments.steps.reference names 'start'"),
        (changed("experiments", "steps", "unit", "hours"), "experiments.steps.unit"),
        (changed("experiments", "tokens", "seeds", 9), "experiments.tokens.seeds is 9: the study has 8 seeds"),
        (changed("experiments", "grid", "decodings", ["own"]), "experiments.grid is a grid"),
        (changed("experiments", "steps", "decodings", ["own", "own"]), "experiments.steps.decodings names one of them twice"),
        (changed("experiments", "steps", "kind", "pace"), "experiments.steps is of the kind pace, which tests nothing"),
        (changed("experiments", "tokens", "kind", "pace"), "tokens compares the pace of decoding: give one budget, and two"),
        (changed("experiments", "tokens", "kind", "relation"), "experiments.tokens.budgets has no effect, since a relation"),
        (changed("experiments", "all", {"kind": "relation", "arms": ["blockwise"]}), "experiments.all.decodings is missing"),
        (changed("experiments", "all", {**RELATED, "decodings": ["own", "whole"]}), "by one way of decoding: give one, not 2"),
        (changed("experiments", "all", RELATED), "experiments.all needs the NELBO: set scoring.nelbo_rows to 1 or more"),
        (changed("experiments", "all", {**RELATED, "arms": ["start"]}) | SCORED, "has arm start, which no other experiment scores by own"),
        (changed("experiments", "all", {**RELATED, "arms": ["blockwise", "other"]}, tree=TWO_TASKS) | SCORED,
         "scored on different tasks by own (blockwise: sums, other: others): give each task"),
        (changed("experiments", "grid", {**GRADIENTS, "decodings": ["own"]}), "grid measures gradients, which need no decodings"),
        (changed("experiments", "grid", {**GRADIENTS, "primary": True}), "grid is of the kind gradients, which tests nothing"),
        (MEASURED | {"gradients": {"forwards": 6}}, "gradients.forwards is 6: it must be a multiple of 4"),
        (MEASURED | {"gradients": {"examples": 2}}, "gradients.examples is 2: it must be at least 3"),
        (MEASURED | {"gradients": {"bound_blocks": [5]}}, "divide canvas.response_len 16, not"),
        (MEASURED | {"gradients": {"bound_blocks": [1, 4], "batch": 3}}, "unknown key gradients.batch"),
        (MEASURED | {"tasks": WINDOW}, "whole aligned canvas"),
        (changed("gradients", {"batches": 3}), "gradients has no effect"),
        # What cannot be reported, or tests nothing.
        (changed("experiments", {f"e{at}": PRIMARY for at in range(4)}), "4 experiments are primary (e0, e1, e2, e3), but a study tests 3"),
        (changed("experiments", "steps", "arms", ["classical"]), "experiments.steps is primary, but has one arm"),
        (changed("experiments", "grid", {**TREE["experiments"]["grid"], "arms": ["blockwise"], "decodings": ["own"]}), "two arms or more"),
        (changed("experiments", "grid", "decodings", ["whole", "own"]),
         "so whole must decode every arm by the blocks of 4 that blockwise, at the same place of arms, is trained with, but decodes "
         "blockwise by 16: change the order, or set decodings.whole.canvas.block to 4"),
        (SMALLER, "so own must decode every arm by the blocks of 2 that blockwise, at the same place of arms, is trained with, but "
         "decodes classical by 4"),
        (changed("tasks", "sums", "canvas", "block", 16, tree=changed("decodings", "whole", {"decode": {"cache": "dual"}})),
         "blockwise and classical are both trained with blocks of 16: leave one out"),
        (changed("arms", "classical", TREE["arms"]["blockwise"]), "compares blockwise and classical, whose settings are the same"),
        (changed("experiments", "steps", "decodings", ["own", "again"], tree=changed("decodings", "again", {"canvas": {"block": 4}})),
         "decodes by own and again, whose settings are the same"),
        (changed("scoring", "problems", 1), "scoring.problems is 1: intervals for new problems need 2 or more"),
        (changed("scoring", "nelbo_rows", -3), "scoring.nelbo_rows is -3: it must be 1 or more, or 0 for no NELBO"),
        # What the study would overrule.
        (changed("common", "evaluate", {"problems": 7}), "common sets evaluate.problems, which the study sets itself: set scoring"),
        (changed("decodings", "own", {"evaluate": {"split": "validation"}}), "decodings.own sets evaluate.split, which the study sets"),
        (changed("arms", "blockwise", "evaluate", {"nelbo": False}), "set scoring.nelbo_rows instead, which is 0 for no NELBO"),
        (changed("tasks", "sums", {"evaluate": {"nelbo_rows": 4}}), "tasks.sums sets evaluate.nelbo_rows"),
        *((changed("arms", "blockwise", "train", {field: 1}), f"blockwise sets train.{field}, which the study sets itself: leave it out")
          for field in ("keep", "eval_every", "eval_problems", "eval_nelbo_rows")),
        (changed("arms", "blockwise", "model", {"init_from": "org/name"}), "arms.blockwise sets model.init_from, but arms.blockwise"),
        (changed("arms", "blockwise", "model", {"d_model": 64}), "starts from start, whose network it takes: leave it out, or set it for"),
        (changed("arms", "other", "start", "start", tree=changed("tasks", "others", {"model": {"n_layers": 2}}, tree=TWO_TASKS)),
         "tasks.others sets model.n_layers, but arms.other starts from start, whose network it takes"),
        (changed("experiments", "tokens", "decodings", ["elsewhere"], tree=ELSEWHERE),
         "decodings.elsewhere scores blockwise on task others, which sets evaluate.grader to exact, but by the settings of blockwise's own "
         "task, where it is gsm8k_strict: set decodings.elsewhere.evaluate.grader"),
        # What is no name, or no seed.
        *((changed("seeds", seeds), "seeds must be a number of seeds, or a list")
          for seeds in (True, 2.5, 8.0, [[1]], [True], -1, 10**9, "8")),
        (changed("decodings", {8: {}, "whole": {}}), "decodings has the key 8, which is no text: put it in quotes"),
        (changed("arms", "a/../../b", {"task": "sums"}), "arms has the name 'a/../../b': give it one of letters"),
        (changed("experiments", "../../evil", PRIMARY), "experiments has the name '../../evil'"),
        (changed("tasks", "..", TREE["tasks"]["sums"]), "tasks has the name '..'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_the_place_and_what_to_write(tree, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        study_from_tree(tree, "study.yaml")
    assert str(error.value).startswith("study.yaml")


def test_cells_come_seed_by_seed_after_their_start_with_every_point_that_an_experiment_needs():
    study, plan = laid_out()
    assert [cell.name for cell in plan.cells[:4]] == ["start-s0", "blockwise-s0", "classical-s0", "start-s1"]
    assert len(plan.cells) == 24 and plan.cells[1].start == "start-s0" and plan.cells[0].steps == 10
    # A block of 4 has 2.5 masked tokens on average, a response of 16 has 8.5: 40 steps of blocks are 12 of responses.
    assert plan.steps["tokens"] == {"blockwise": (40,), "classical": (12,)}
    assert [str(point) for point in plan.cells[2].points] == ["5/own", "12/own", "20/own", "20/whole"]
    assert [str(point) for point in plan.cell("classical-s3").points] == ["5/own", "20/own", "20/whole"]
    config = cells.run_config(study, plan.cell("classical-s3"), "out")
    assert (config.train.seed, config.train.steps, config.train.keep_steps) == (3, 20, (5, 20))
    assert config.model.init_from == "out/runs/start-s3" and config.train.out == "out/runs/classical-s3"


def test_what_cannot_be_computed_is_refused_before_anything_runs(tmp_path):
    wide = changed("tasks", "sums", "canvas", {"prompt_len": 300, "response_len": 16, "block": 4})
    longer = {"arms": ["start"], "decodings": ["own"], "budgets": [5, 11]}
    for tree, says in (
        (changed("experiments", "tokens", "budgets", [1]), "experiments.tokens.budgets, arm classical: a budget of 1 steps of the "
         "reference arm is 0.29 of a step: raise it to 4 or more"),
        (changed("experiments", "tokens", "budgets", [3]), "a budget of 3 steps of the reference arm is 0.88 of a step"),
        (changed("experiments", "tokens", "budgets", [4, 5, 9]),
         "arm classical: the budgets 4 and 5 are both 1 steps of this arm: leave one of them out"),
        (changed("experiments", "steps", "unit", "flops", tree=wide), "on one of 316 positions train.widths auto computes fewer: set "
         "train.widths to full"),
        (changed("experiments", "longer", longer), "experiments.longer scores start after 11 steps, but other arms start from it after 10"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(says)):
            laid_out(tree)
    nothing = work.Verbs(None, None, None)
    with pytest.raises(UserError, match="gs://bucket/study: a study's folder is local"):
        runner.prepare_study("study.yaml", "gs://bucket/study", nothing, print)
    # What needs no network is refused before data are prepared.
    (tmp_path / "study.yaml").write_text(json.dumps(changed("experiments", "tokens", "budgets", [1])))
    with pytest.raises(
        UserError, match=r"study\.yaml: experiments\.tokens\.budgets, arm classical: a budget of 1 steps"
    ):
        runner.prepare_study(str(tmp_path / "study.yaml"), str(tmp_path / "out"), nothing, print)
    assert not (tmp_path / "out").exists()
    for tree, arm, says in (
        (changed("common", "decode", {"steps_per_block": 8}), "blockwise", "blockwise-s0: decode.steps_per_block 8 is more than the 4"),
        (changed("decodings", "whole", {"canvas": {"block": 16}, "decode": {"threshold": 0.5}}), "classical",
         "classical-s0: decode.threshold 0.5 has no effect"),
    ):  # fmt: skip
        study, plan = laid_out(tree)
        with pytest.raises(UserError, match=says):
            runner.check_cell(study, plan.cell(f"{arm}-s0"), "out", arch())


def test_what_is_known_is_computed_again_where_its_settings_changed_and_only_there():
    """By the fingerprints of weights, by arm, and of scores, by arm and way of decoding."""
    ways = [(arm, way) for arm in ("blockwise", "classical") for way in ("own", "whole")]

    def known(tree):
        study, plan = laid_out(tree)
        weights = {cell.name: cells.fingerprint(study, cell) for cell in plan.cells}
        return weights, {one: cells.how_scored(study, *one) for one in ways}

    weights, scores = known(TREE)
    assert len(set(weights.values())) == len(weights)
    for tree, arms, scored in [
        (changed("common", "train", {"batch_size": 4, "log_every": 7}), set(), []),
        (changed("experiments", "steps", "budgets", [5, 99]), set(), []),  # the learning rate is constant
        (changed("arms", "classical", "method", {"objective": "classical", "law": "bernoulli"}), {"classical"}, []),
        (changed("arms", "classical", "optimizer", {"lr": 0.5}), {"classical"}, []),
        (changed("arms", "start", "steps", 11), {"blockwise", "classical"}, []),
        (changed("common", "optimizer", {"warmup_steps": 1}), {"start", "blockwise", "classical"}, []),
        (changed("scoring", {"split": "test", "problems": 64, "nelbo_rows": 0}), set(), ways),
        (changed("decodings", "own", {"decode": {"cache": "dual"}}), set(), [one for one in ways if one[1] == "own"]),
        (changed("common", "decode", {"batch_size": 3}), set(), []),
    ]:
        other_weights, other_scores = known(tree)
        assert {name.split("-")[0] for name in weights if other_weights[name] != weights[name]} == arms
        assert [one for one in ways if other_scores[one] != scores[one]] == scored


def test_expected_masks_are_the_mean_of_what_the_laws_draw():
    draws, n, rng = 20_000, 5, np.random.default_rng(1)
    uniform, position = rng.random(draws, np.float32), rng.random((draws, n), np.float32)
    laws_and_floors = [*itertools.product(("exact_count", "bernoulli"), (0.0, 0.3)), ("floored_bernoulli", 0.0)]
    for law, floor in laws_and_floors:
        count = np.float32(floor) + np.float32(1 - floor) * uniform
        masked, _ = jax.jit(getattr(laws, law))(count, position, np.ones((draws, n), bool))
        sizes = np.asarray(masked.sum(-1))
        assert abs(sizes.mean() - amounts.expected_masks(law, n, floor)) < 4 * sizes.std() / draws**0.5, (law, floor)
    assert amounts.expected_masks("stratified_count", 8) == 4.5


def planted(study, plan, advantage):
    """Returns results in which `blockwise` solves each problem with a chance that is higher by ``advantage``, and its seeds vary."""
    rng, made = np.random.default_rng(5), {}
    easy = rng.uniform(0.2, 0.6, study.scoring.problems)
    about = {"seconds": {"training": 9.0}, "versions": {}, "settings": {}}
    for cell in plan.cells:
        chance = np.clip(easy + rng.normal(0, 0.02) + advantage * (cell.arm == "blockwise"), 0, 1)
        scores = {}
        for point in cell.points:
            correct = np.packbits(rng.uniform(size=easy.size) < chance).tobytes().hex()
            scores[str(point)] = {"problems": easy.size, "correct": correct, "nfe": 16.0, "tokens_per_forward": 1.0}
        made[cell.name] = {"scores": scores, "steps": cell.steps, **about}
    return made


def test_all_seeds_may_start_from_one_checkpoint():
    tree = changed("arms", "start", "seed", 100)
    tree["experiments"]["plateau"] = {"arms": ["start"], "decodings": ["own"], "budgets": [5, 10]}
    study, plan = laid_out(tree)
    of = {cell.name: cells.fingerprint(study, cell) for cell in plan.cells}
    assert len(plan.cells) == len(of) == len(set(of.values())) == 17
    assert list(of)[:4] == ["start-s100", "blockwise-s0", "classical-s0", "blockwise-s1"]
    assert {cell.start for cell in plan.cells[1:]} == {"start-s100"}
    assert [str(point) for point in plan.cells[0].points] == ["5/own", "10/own"]
    first, second = (cells.run_config(study, plan.cell(name), "out") for name in ("start-s100", "blockwise-s3"))
    assert first.train.seed == 100 and second.train.seed == 3 and second.model.init_from == first.train.out
    other, other_plan = laid_out(changed("arms", "start", "seed", 101))
    assert cells.fingerprint(other, other_plan.cell("blockwise-s3")) != of["blockwise-s3"]
    plateau = analysis.analyse(study, plan, planted(study, plan, 0.2))[-1]
    assert plateau.seeds == (100,) and plateau.curves["start", "own"].solved.shape == (2, 1, 64)


def test_a_planted_effect_is_found_and_a_planted_null_is_not(tmp_path):
    study, plan = laid_out()
    made, nothing = (planted(study, plan, effect) for effect in (0.2, 0.0))
    found, null = (analysis.primary(analysis.analyse(study, plan, one))["steps"] for one in (made, nothing))
    assert found.found and abs(found.interval.estimate - 0.2) < 0.08 and not null.found
    report.write_report(study, plan, made, tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "24 of 24 cells are done" in text and "| steps | +" in text and "a difference" in text
    assert page.count("<svg") == 3 and "http://www.w3.org" in page and "<script" not in page and "src=" not in page
    del made["classical-s7"]["scores"]["20/own"]  # the seed is then left out of what needs this score
    analysed = {one.name: one for one in analysis.analyse(study, plan, made)}
    assert (len(analysed["steps"].seeds), len(analysed["tokens"].seeds)) == (7, 3)
    killed = dataclasses.replace(this_process(), pid=2**22)  # Linux gives no process this number
    write_bytes(tmp_path / "claims" / ".classical-s7.lock" / "000001", killed.as_json())
    said = report.status(plan, made, tmp_path)
    assert [line.split()[2] for line in said.splitlines()[1:-1]] == ["0"] * len(study.arms)
    assert "23 of 24 cells" in said and not results.is_done(plan.cell("classical-s7"), made["classical-s7"])
    made["classical-s1"]["scores"]["5/own"]["problems"] = 32
    with pytest.raises(UserError, match=r"steps: results/classical-s1.json, point 5/own has 32 problems but .* has 64"):
        analysis.analyse(study, plan, made)


def test_a_cell_that_another_process_computes_does_not_hold_up_the_others(tmp_path, monkeypatch):
    started, (study, plan) = [], laid_out()

    def write(cell):
        done = {"steps": cell.steps, "scores": dict.fromkeys(map(str, cell.points))}
        results.write_result(tmp_path, cell.name, done)

    class Pool(runner._Jobs):
        def start(self, cell):
            started.append(cell.name)
            self.running[cell.name] = (None, 0)

        def ended(self):
            for name in list(self.running):
                del self.running[name]
                busy = name == "blockwise-s0" and started.count(name) == 1
                if not busy:
                    write(plan.cell(name))
                yield name, runner.BUSY if busy else 0

        def close(self):
            pass

    write(plan.cell("start-s0"))
    monkeypatch.setattr(runner, "_Jobs", Pool)
    monkeypatch.setattr(runner, "AGAIN", 1.0)
    monkeypatch.setattr(runner, "_complete", lambda cell, found, *_: results.is_done(cell, found.get(cell.name)))
    assert runner.run_cells(study, plan, str(tmp_path), 1, ["blockwise-s0", "classical-s0"], print, poll=0.001) == []
    assert started == ["blockwise-s0", "classical-s0", "blockwise-s0"]


def test_a_study_that_is_terminated_ends_its_cells(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def sleeps(command, **options):
        started.append(popen(["sleep", "600"], **options))
        return started[0]

    def say(line):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner.subprocess, "Popen", sleeps)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        runner.run_cells(*laid_out(), str(tmp_path), 1, (), say, poll=0.001)
    assert signal.getsignal(signal.SIGTERM) is before
    try:
        assert started[0].wait(10) == -signal.SIGTERM
    finally:
        started[0].kill()


def test_a_process_that_ends_without_an_error_and_without_its_result_is_not_started_again(tmp_path, monkeypatch):
    started, said, popen = [], [], subprocess.Popen

    def ends(command, **options):
        started.append(command)
        return popen(["true"], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", ends)
    study, plan = laid_out()
    left = runner.run_cells(study, plan, str(tmp_path), 1, ["blockwise-s0"], said.append, poll=0.01)
    assert left == ["start-s0", "blockwise-s0"] and len(started) == 1
    assert started[0][-1] == cells.identity(study, plan.cell("start-s0"))
    assert "start-s0: ended without an error, but is not done; see" in said[-1]


@pytest.mark.parametrize(
    "tree",
    [
        changed("experiments", "steps", "budgets", [5, 21]),
        changed("arms", "blockwise", "optimizer", {"lr": 0.5}),
        changed("decodings", "own", {"decode": {"cache": "dual"}}),
        changed("scoring", "problems", 65),
    ],
)
def test_a_cell_is_not_computed_by_the_plan_of_another_file_in_the_same_folder(tree):
    (study, plan), (other, its_plan) = laid_out(), laid_out(tree)
    cell = plan.cell("blockwise-s0")
    wanted = cells.identity(study, cell)
    assert runner.planned_cell(study, plan, cell.name, wanted, "out") == cell
    assert (
        runner.planned_cell(other, its_plan, "start-s0", cells.identity(study, plan.cell("start-s0")), "out").arm
        == "start"
    )
    says = "out holds the plan of another file, or of another version of it, than the one whose blockwise-s0 is to be computed"
    for theirs in (
        other,
        study_from_tree(renamed(TREE), "study.yaml"),
    ):  # the last: the file and the plan are of two writers
        with pytest.raises(UserError, match=says):
            runner.planned_cell(theirs, its_plan, cell.name, wanted, "out")
    with pytest.raises(UserError, match="the study has no cell nonsense"):
        runner.planned_cell(study, plan, "nonsense", None, "out")


def renamed(tree):
    """Returns the tree with other names of an arm and of a way of decoding."""
    text = json.dumps(tree).replace('"blockwise"', '"by_block"').replace('"own"', '"self"')
    return json.loads(text)


@pytest.mark.parametrize(
    "runs, says",
    [
        ({"start-s0": [5, 10]}, None),
        ({"start-s0": [30], "blockwise-s0": [5]}, None),  # it began before
        ({"start-s0": [10, 30]}, "blockwise-s0 starts from step 10 of out/runs/start-s0 (arms.start.steps), which is at step 30: use"),
        ({"start-s0": [5], "blockwise-s0": []}, "which is at step 5: use another --out, or move it and out/results/start-s0.json away"),
        ({}, "which has no checkpoint"),
    ],
)  # fmt: skip
def test_a_cell_starts_where_its_study_says_or_not_at_all(runs, says, monkeypatch):
    monkeypatch.setattr(runner, "is_run", lambda run: Path(run).name in runs)
    monkeypatch.setattr(runner, "_steps_of", lambda run: runs[Path(run).name])
    study, plan = laid_out()
    runner.check_start(study, plan.cell("start-s0"), "out")
    with pytest.raises(UserError, match=re.escape(says)) if says else contextlib.nullcontext():
        runner.check_start(study, plan.cell("blockwise-s0"), "out")


@pytest.mark.parametrize(
    "options, says",
    [
        (
            {"action": "report", "seeds": (0, 1)},
            "study report does not use --seeds: leave it out (its options are: --out)",
        ),
        ({"action": "report", "jobs": -3}, "study report does not use --jobs"),
        (
            {"action": "status", "cells": ("nonsense",)},
            "study status does not use --cells: leave it out (its options are: none)",
        ),
        ({"action": "status", "out": "out"}, "study status does not use --out"),
        ({"action": "cell", "seeds": (0,)}, "study cell does not use --seeds"),
        ({"action": "run", "identity": "0"}, "study run does not use --identity"),
    ],
)
def test_an_option_that_an_action_does_not_use_is_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=re.escape(says)):
        command.run(command.Options(target=str(tmp_path), **options), Config())


@pytest.mark.parametrize(
    "chosen, seeds, found",
    [
        ((), (1,), ["start-s1", "blockwise-s1", "classical-s1"]),
        (("blockwise-s1", "classical-s2"), (1, 3), ["blockwise-s1"]),
        (("blockwise-s1",), (), ["blockwise-s1"]),
        (("blockwise-s1",), (2, 3), "none of blockwise-s1 has a seed of 2, 3: leave out --seeds or --cells"),
        (("blockwise",), (), "the study has no cell blockwise; its cells are"),
        ((), (8,), "the study has no seed 8"),
    ],
)
def test_cells_are_chosen_by_name_and_by_seed(chosen, seeds, found):
    options = command.Options("run", "study.yaml", cells=chosen, seeds=seeds)
    with pytest.raises(UserError, match=found) if isinstance(found, str) else contextlib.nullcontext():
        assert command._wanted(options, *laid_out()) == found


def test_results_of_other_settings_or_other_texts_are_not_put_together(tmp_path):
    study, plan = laid_out()

    def result(name, texts="a", **fields):
        cell = plan.cell(name)
        how = {str(point): cells.how_scored(study, cell.arm, point.decoding) for point in cell.points}
        scores = {point: {"how": hashed, "texts": texts} for point, hashed in how.items()}
        known = {"arm": cell.arm, "fingerprint": cells.fingerprint(study, cell), "scores": scores, "records": "b"}
        return known | fields

    def check(other, **more):
        made = {"blockwise-s0": result("blockwise-s0"), "classical-s0": other, **more}
        results.check_results(study, plan, made, tmp_path)

    check(result("classical-s0"), removed={"arm": "removed"})
    earlier = result("classical-s0")  # an earlier version wrote no hashes of texts
    del earlier["records"]
    for score in earlier["scores"].values():
        del score["texts"]
    check(earlier)
    first, second = (result(name) for name in ("blockwise-s0", "classical-s0"))
    first["scores"]["5/own"]["grader_version"], second["scores"]["5/own"]["grader_version"] = "1", "2"
    with pytest.raises(UserError, match="has a score 5/own by versions of a grader that are not those of"):
        check(second, **{"blockwise-s0": first})
    for other, says in (
        (result("classical-s0", "c"), "classical-s0.json has a score 5/own on problems of task sums that are not"),
        (result("classical-s0", records="c"), "s0.json was trained on records of task sums that are not those"),
        (result("classical-s0", fingerprint="0"), "classical-s0.json is the result of a cell with other"),
        (result("classical-s0", scores={"5/own": {"how": "0"}}), "has a score 5/own on other problems or"),
    ):
        with pytest.raises(UserError, match=says):
            check(other)


def test_a_cell_that_is_stopped_goes_on_with_the_scores_that_are_missing(tmp_path, monkeypatch):
    study, plan = laid_out()
    monkeypatch.setattr(work, "read_manifest", lambda folder: SimpleNamespace(inputs={"train": {"sha256": "5" * 64}}))
    cell, scored, trained, last = plan.cell("classical-s3"), [], [], [2]

    def evaluate(config, run, step, out):
        if len(scored) in last:
            raise UserError("the machine is gone")
        scored.append((step, config.canvas.block))
        assert (config.evaluate.split, config.evaluate.problems) == ("validation", 64)
        (folder := tmp_path / out).mkdir(parents=True)
        rows = [{"index": at, "grader": "exact", "correct": at % 3 == 0, "prompt": f"{at}?"} for at in range(10)]
        rows[3]["reference"] = "other" if config.canvas.block == 16 else "4"
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = {"nfe": 1 / 3, "tokens_per_forward": 1.0, "decode_seconds": 2.0, "stopped": 9}
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    def run(cell):
        verbs = work.Verbs(lambda config: 0, lambda config: trained.append(config.train.steps), evaluate)
        assert work.run_cell(study, cell, str(tmp_path), verbs, print) == 0
        return results.read_results(tmp_path)[cell.name]

    with pytest.raises(UserError, match="the machine is gone"):
        run(cell)
    assert not results.is_done(cell, results.read_results(tmp_path)[cell.name])
    last.clear()
    result = run(cell)
    assert scored == [(5, 4), (20, 4), (20, 16)]
    assert results.is_done(cell, result) and result["scores"]["20/whole"]["nfe"] == 0.333333
    texts = [result["scores"][point]["texts"] for point in ("5/own", "20/own", "20/whole")]
    assert texts[0] == texts[1] != texts[2] and result["records"] == "5" * 16
    assert solved(result["scores"]["5/own"]).tolist() == [at % 3 == 0 for at in range(10)]
    run(cell)
    assert len(scored) == 3  # nothing is scored twice
    # A shorter form of the study finds the longer run, and does not ask for fewer steps than it has.
    shorter = dataclasses.replace(cell, steps=5, points=(cells.Point(5, "whole"),))
    assert run(shorter)["steps"] == 20
    assert trained == [20] * 4 and scored[3:] == [(5, 16)]


SHIPPED = sorted(path.stem for path in (ROOT / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "small")) for name in SHIPPED])
def test_studies_that_ship_are_valid_and_their_cells_can_be_laid_out(name):
    study = read_study(ROOT / "configs" / "study" / f"{name}.yaml")
    plan = cells.lay_out(study, arch)
    assert {cell.arm for cell in plan.cells} == study.arms.keys()
    own = {arm.seed for arm in study.arms.values()} - {None}
    assert {cell.seed for cell in plan.cells} == {*study.seeds, *own}
    for cell in plan.cells:
        cells.run_config(study, cell, "out")
    for arm, way in {(cell.arm, point.decoding) for cell in plan.cells for point in cell.points}:
        if way in study.decodings:
            cells.scored_config(study, arm, way, "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in (ROOT / "docs" / "study").glob("*/cells.json")), ids=lambda p: p.name
)
def test_committed_results_are_of_the_studies_that_ship_and_their_report_can_be_made_again(folder, tmp_path):
    study, plan = results.read_plan(folder)
    found = results.read_results(folder)
    assert found and study == read_study(ROOT / "configs" / "study" / f"{folder.name}.yaml")
    for name, result in found.items():
        assert result["fingerprint"] == cells.fingerprint(study, plan.cell(name))
        for point in plan.cell(name).points:
            assert result["scores"][str(point)]["how"] == cells.how_scored(study, result["arm"], point.decoding)
    report.write_report(study, plan, found, tmp_path)
    # What is shown is what the results say.
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()


def test_pages_show_the_numbers_of_the_reports_that_they_name():
    """A row of a page's table that stands under the header of a report's table stands in that report too."""
    docs, rows = ROOT / "docs" / "study", 0
    for page in docs.glob("*.md"):
        text = page.read_text()
        reports = [path for path in docs.glob("*/report.md") if f"]({path.relative_to(docs)}" in text]
        lines = [line for path in reports for line in path.read_text().splitlines()]
        shown = {line for line in lines if line.startswith("| ")}
        headers = {line for line, after in itertools.pairwise(lines) if after.startswith("| ---")}
        for table in text.split("\n\n"):
            header, *rest = table.strip().splitlines() or [""]
            if header in headers:
                rows += len(rest[1:])
                assert not set(rest[1:]) - shown, (page.name, set(rest[1:]) - shown)
    assert rows > 0

"""Transfer rules against the peers' vectors, and what must hold of any vector.

A decoding rule is one record: whoever adds one writes an entry of ``RULES``, and everything else follows from it.
"""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.diffusion.decoding import measures, rules, transfer
from jaxblock.diffusion.decoding.config import DecodeConfig, RuleName
from jaxblock.diffusion.decoding.rules import RULES, Rule, check_options, unused_steps
from jaxblock.diffusion.decoding.transfer import Scores, StepInfo
from jaxblock.errors import UserError
from tests.diffusion.conftest import FIXED, decoded, make_layout

WIDTH = 12


@pytest.fixture(scope="module")
def vectors(shared):
    return json.loads((shared / "golden" / "quota" / "vectors.json").read_text())


@pytest.mark.parametrize("schedule, key", [("even", "llada"), ("dllm_linear", "dllm_linear"), ("dream", "dream")])
def test_schedules(vectors, schedule, key):
    for case in vectors[key]:
        eps = case.get("eps", 1e-3)
        row = transfer.quota_table(schedule, case["n"], case["steps"], eps)[case["n"]].tolist()
        assert row == case["counts"] + [0] * (case["steps"] - len(case["counts"])), case
        if key == "dream":
            grid = transfer.dream_grid(case["steps"], eps)
            assert grid.dtype == np.float32 and grid.tolist() == case["timesteps"], case
    for steps in (1, 3, 8, 32):
        table = transfer.quota_table(schedule, 32, steps)
        assert table.min() >= 0 and table.sum(1).tolist() == list(range(33)), "every mask is committed"


def accepted(rule, confidence, eligible=None):
    """Which positions a rule commits; padded with ineligible ones, so that all cases share their compiled code."""
    n = len(confidence)
    eligible = np.pad([True] * n if eligible is None else eligible, (0, WIDTH - n))
    with np.errstate(divide="ignore"):
        surprise = -np.log(np.pad(np.array(confidence, np.float32), (0, WIDTH - n), constant_values=1.0))
    scores = Scores(jnp.zeros((1, WIDTH), jnp.int32), jnp.asarray(surprise[None]), jnp.asarray(eligible[None]))
    chosen = np.asarray(rule(scores, StepInfo(jnp.int32(0), jnp.asarray([n], jnp.int32))))[0]
    assert not (chosen & ~eligible).any()
    return chosen[:n].astype(int).tolist()


def test_factor_and_threshold_rules(vectors):
    for case in vectors["factor"]:
        for variant, key in (("strict", "mask_strict"), ("v1", "mask_fastdllm_v1")):
            rule = transfer.by_factor(case["factor"], WIDTH, variant)
            assert accepted(rule, case["confidence"]) == case[key], case
    for case in vectors["threshold"]:
        assert accepted(transfer.by_threshold(case["threshold"]), case["confidence"]) == case["mask"], case


TRANSFERS = {
    "quota": transfer.by_quota(transfer.quota_table("even", WIDTH, 2)),
    "threshold": transfer.by_threshold(0.9),
    "factor": transfer.by_factor(1.0, WIDTH),
    "factor_v1": transfer.by_factor(1.0, WIDTH, "v1"),
}


def test_a_confidence_at_the_bound_is_accepted_and_ties_go_to_the_lowest_index():
    """At least the threshold; and under the factor 1.5 the second has (2 + 1)(1 - 1/2) = 1.5."""
    assert accepted(TRANSFERS["quota"], [0.3, 0.5, 0.5, 0.5]) == [0, 1, 1, 0]
    assert accepted(transfer.by_threshold(1.0), [0.9, 1.0, 1.0]) == [0, 1, 1]
    assert accepted(transfer.by_threshold(0.5), [0.75, 0.5, 0.25]) == [1, 1, 0]
    for variant in ("strict", "v1"):
        assert accepted(transfer.by_factor(1.5, WIDTH, variant), [0.75, 0.5, 0.25, 0.125]) == [1, 1, 0, 0]


@pytest.mark.parametrize("name", TRANSFERS)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0])), min_size=6, max_size=6))
def test_any_rule_commits_the_best_and_only_what_is_eligible(name, positions):
    """So every step of every rule makes progress, and a decoder of at most B steps a block ends."""
    eligible, confidence = zip(*positions, strict=True)
    chosen = accepted(TRANSFERS[name], confidence, eligible)
    if any(eligible):
        assert chosen[positions.index(max(positions))], "the best; ties go to the lowest index"
    worst_chosen = min((confidence[i] for i in range(6) if chosen[i]), default=1)
    assert all(confidence[i] <= worst_chosen for i in range(6) if eligible[i] and not chosen[i])


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name].most_masks])
@pytest.mark.parametrize("fields", [{}, {"quota": "dream"}, {"steps_per_block": 4}, {"quirks": "fast_dllm"}], ids=str)
def test_no_block_ever_has_more_masks_than_its_rule_says(name, fields):
    """However many it begins with; the most there can be are there in some block, so that no step looks at too many."""
    if "quota" in fields and "quota" not in RULES[name].uses:
        return
    options, size = DecodeConfig(rule=name, **fields), 6
    most = RULES[name].most_masks(options, size)
    commit = jax.jit(rules.transfer_of(options, size))
    began = np.arange(size + 1, dtype=np.int32)
    left = np.arange(size) < began[:, None]
    surprise = np.random.default_rng(0).permuted(
        np.tile(np.arange(5.0, 5.0 + size, dtype=np.float32), (size + 1, 1)), axis=1
    )
    for step, bound in enumerate(most):
        assert left.sum(1).max() == bound, step
        left &= ~np.asarray(
            commit(Scores(np.zeros(left.shape, np.int32), surprise, left), StepInfo(np.int32(step), began))
        )
    assert not left.any() and len(most) == (
        4 if "steps_per_block" in fields and RULES[name].pace == "settings" else size
    )


def _with_rule(name: str, **fields) -> DecodeConfig:
    """Settings that name a rule of this test: the annotation of ``rule`` knows the package's rules alone."""
    options = DecodeConfig(**fields)
    object.__setattr__(options, "rule", name)
    return options


def test_a_new_rule_is_one_entry(monkeypatch):
    """It commits positions from left to right, two a step, is measured by entropy and looks at ``threshold``."""
    assert get_args(RuleName) == tuple(RULES), "the command line shows every rule"

    def leftmost(options, block):
        return lambda scores, info: scores.eligible & (jnp.cumsum(scores.eligible, axis=-1) <= 2)

    monkeypatch.setitem(RULES, "leftmost", Rule(leftmost, measures.ENTROPY, "candidates", "rule", uses=("threshold",)))
    check_options(_with_rule("leftmost", threshold=0.5, top_p=0.9))
    with pytest.raises(UserError, match="decode.quota dream has no effect under decode.rule leftmost"):
        check_options(_with_rule("leftmost", quota="dream"))
    with pytest.raises(UserError, match="or rule to confidence_threshold or leftmost"):
        check_options(DecodeConfig(threshold=0.5))
    assert unused_steps(DecodeConfig(steps_per_block=4)) == unused_steps(DecodeConfig(rule="factor")) == []
    (note,) = unused_steps(DecodeConfig(rule="factor", steps_per_block=4))
    assert "decode.steps_per_block 4 is not used" in note
    net = FIXED, {"table": np.zeros((2, 9, 11), np.float32)}
    out = decoded(net, make_layout(), _with_rule("leftmost", early_stop=False), [[1, 2]])
    assert out.commit_step[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]


def test_a_rule_looks_at_what_it_says():
    """Changing a setting that the rule does not name changes nothing that it commits."""
    changes = {"quota": "dllm_linear", "threshold": 0.6, "factor": 3.0, "factor_rule": "v1", "eps": 0.5}

    @jax.jit
    def every(scores):
        found, info = {}, StepInfo(jnp.int32(0), scores.eligible.sum(-1))
        for name, rule in RULES.items():
            for field, value in {"rule": name, **changes}.items():
                options = DecodeConfig(**{"rule": name, "steps_per_block": 2, field: value})
                found[name, field] = rule.transfer(options, 6)(scores, info)
        return found

    rng = np.random.default_rng(0)
    surprise, eligible = rng.uniform(0, 1, (5, 6)).astype(np.float32), rng.integers(0, 2, (5, 6)).astype(bool)
    found = jax.device_get(every(Scores(np.zeros((5, 6), np.int32), surprise, eligible)))
    for (name, field), chosen in found.items():
        if field not in RULES[name].uses:
            np.testing.assert_array_equal(chosen, found[name, "rule"], err_msg=f"{name} {field}")

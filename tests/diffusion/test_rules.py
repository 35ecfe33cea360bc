"""A decoding rule is one record: whoever adds one writes an entry of ``RULES``, and everything else follows from it."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion.decoding import measures, transfer
from jaxblock.diffusion.decoding.config import DecodeConfig, RuleName
from jaxblock.diffusion.decoding.rules import RULES, Rule, check_options, unused_steps
from jaxblock.errors import UserError
from tests.diffusion.decoding import FIXED, decode_jit, padded


def _with_rule(name: str, **fields) -> DecodeConfig:
    """Settings that name a rule of this test: the annotation of ``rule`` knows the package's rules alone."""
    options = DecodeConfig(**fields)
    object.__setattr__(options, "rule", name)
    return options


def test_the_command_line_shows_every_rule():
    assert get_args(RuleName) == tuple(RULES)


def test_a_new_rule_is_one_entry(tiny, monkeypatch):
    """It commits positions from left to right, two a step, is measured by entropy and looks at ``threshold``."""

    def leftmost(options, block):
        def pick(scores, info):
            place = jnp.cumsum(scores.eligible, axis=-1) - 1
            return scores.eligible & (place < 2)

        return pick

    monkeypatch.setitem(RULES, "leftmost", Rule(leftmost, measures.ENTROPY, "candidates", "rule", uses=("threshold",)))
    check_options(_with_rule("leftmost", threshold=0.5, top_p=0.9))
    with pytest.raises(UserError, match="decode.quota dream has no effect under decode.rule leftmost"):
        check_options(_with_rule("leftmost", quota="dream"))
    with pytest.raises(UserError, match="or rule to confidence_threshold or leftmost"):
        check_options(DecodeConfig(threshold=0.5))
    assert unused_steps(DecodeConfig(steps_per_block=4)) == unused_steps(DecodeConfig(rule="factor")) == []
    (note,) = unused_steps(DecodeConfig(rule="factor", steps_per_block=4))
    assert "decode.steps_per_block 4 is not used" in note

    options, params = _with_rule("leftmost", early_stop=False), {"table": np.zeros((2, 9, 11), np.float32)}
    out = jax.device_get(decode_jit(FIXED, tiny[1](), options, params, 0, *padded([[1, 2]])))
    assert out.commit_step[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]


def test_a_rule_looks_at_what_it_says():
    """Changing a setting that the rule does not name changes nothing that it commits."""
    block, rng = 6, np.random.default_rng(0)
    changes = {"quota": "dllm_linear", "threshold": 0.6, "factor": 3.0, "factor_rule": "v1", "eps": 0.5}

    @jax.jit
    def every(surprise, eligible):
        scores = transfer.Scores(jnp.zeros((5, block), jnp.int32), surprise, eligible)
        info = transfer.StepInfo(jnp.int32(0), eligible.sum(-1))
        found = {}
        for name, rule in RULES.items():
            for field, value in {"rule": name, **changes}.items():
                options = DecodeConfig(**{"rule": name, "steps_per_block": 2, field: value})
                found[name, field] = rule.transfer(options, block)(scores, info)
        return found

    surprise, eligible = rng.uniform(0, 1, (5, block)).astype(np.float32), rng.integers(0, 2, (5, block)).astype(bool)
    found = jax.device_get(every(surprise, eligible))
    for (name, field), chosen in found.items():
        assert not (chosen & ~eligible).any()
        if field not in RULES[name].uses:
            np.testing.assert_array_equal(chosen, found[name, "rule"], err_msg=f"{name} {field}")

"""The peers' decoders, token for token and step for step, through ``jaxblock.load(folder).decode``."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxblock

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


# One case for each way to decode is fast. The others differ in sizes and schedules, whose numbers test_quota.py has.
FAST = (
    *("quota_nondivisible_3blocks", "cfg", "confidence_eos_eot_inf"),
    *("thr0.6_none", "factor1.0_gqa_none_v1", "entropy_leftpad"),
    *("thr0.6_prefix", "fixed_nondiv_dual", "block_prefix_thr0.6", "block_dual_entropy"),
)


def _cases():
    for folder in ("decode_llada", "decode_fast", "decode_dream"):
        file = GOLDEN / folder / "cases.json"
        for name, case in (json.loads(file.read_text()) if file.exists() else {}).items():
            marks = () if name in FAST else pytest.mark.slow
            yield pytest.param(folder, name, case, id=f"{folder}-{name}", marks=marks)


@pytest.fixture(scope="module")
def models(shared):
    names = ("llada_mha", "llada_gqa_tied", "dream")
    return {name: jaxblock.load(shared / "golden" / "forward" / name) for name in names}


def _options(name, case):
    if case.get("source") == "Fast-dLLM block decoder":
        sizes = dict(response_len=case["max_new_tokens"], block=case["block_length"])
        sizes["steps_per_block"] = case["steps"] * case["block_length"] // case["max_new_tokens"]
        rule = {"threshold": case["threshold"]} if "threshold" in case else {"quota": "dream", "eps": case["eps"]}
        return dict(rule=case["alg"], cache=case["cache"], quirks="fast_dllm", early_stop=False, **sizes, **rule)
    if "alg" in case:  # Dream's generate knows no blocks: one block, as long as the response
        size = dict(response_len=case["max_new_tokens"], block=case["max_new_tokens"], steps_per_block=case["steps"])
        same = {field: case[field] for field in ("eps", "temperature", "alg_temp", "top_p", "top_k")}
        return dict(rule=case["alg"], quota="dream", early_stop=False, **size, **same)
    options = dict(response_len=case["gen_length"], block=case["block_length"], early_stop=False)
    options["cache"] = case.get("cache", "none")
    options["steps_per_block"] = case["steps"] * case["block_length"] // case["gen_length"]
    options["cfg_scale"] = case.get("cfg_scale") or 0.0
    for field, rule in (("threshold", "confidence_threshold"), ("factor", "factor")):
        if case.get(field):
            options |= {"rule": rule, field: case[field]}
    if name.endswith("_v1"):
        options["factor_rule"] = "v1"
    if case.get("logits_eos_inf"):
        options |= {"eos_suppression": "logits", "fill_id": case["eos_id"]}
    if case.get("confidence_eos_eot_inf"):
        stops = (case["eot_id"], case["eos_id"])
        options |= {"eos_suppression": "confidence", "fill_id": case["eos_id"], "stop_ids": stops}
    return options


@pytest.mark.parametrize("folder, name, case", list(_cases()))
def test_decodes_as_published(models, folder, name, case):
    with np.load(GOLDEN / folder / f"{name}.npz") as arrays:
        z = dict(arrays)
    width = z["prompt_ids"].shape[1]
    got = models[case["model"]].decode(
        z["prompt_ids"], z.get("attention_mask"), return_steps=True, **_options(name, case)
    )
    np.testing.assert_array_equal(got.ids, z["output_ids"][:, width:])
    if "canvases" in z:
        np.testing.assert_array_equal(got.canvases, z["canvases"][:, :, width:])
        committed = (got.canvases != case["mask_id"]).sum(-1)
        np.testing.assert_array_equal(np.diff(committed, axis=0), z["committed_per_step"])
    if "forward_lengths" in z:
        assert got.positions.tolist() == [z["forward_lengths"].sum()]
    passes = 2 if case.get("cfg_scale") else 1
    steps = int(case.get("nfe") or case["steps"])
    assert got.nfe.tolist() == [passes * steps] * len(got.ids)
    if "output_ids_without_option" in z:
        assert (z["output_ids_without_option"] != z["output_ids"]).any()

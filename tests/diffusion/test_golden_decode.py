"""The peers' decoders, token for token and step for step, through ``jaxblock.load(folder).decode``."""

import numpy as np
import pytest

from tests.diffusion.conftest import golden_arrays, golden_json

# One case for each way to decode is fast. The others differ in sizes and schedules, whose numbers test_quota.py has.
FAST = (
    *("quota_nondivisible_3blocks", "cfg", "confidence_eos_eot_inf"),
    *("thr0.6_none", "factor1.0_gqa_none_v1", "entropy_leftpad"),
    *("thr0.6_prefix", "fixed_nondiv_dual", "block_prefix_thr0.6", "block_dual_entropy"),
)
DECODED = [
    pytest.param(folder, name, case, id=f"{folder}-{name}", marks=() if name in FAST else pytest.mark.slow)
    for folder in ("decode_llada", "decode_fast", "decode_dream")
    for name, case in golden_json(f"{folder}/cases.json").items()
]


def _options(name, case):
    if "alg" in case:
        sizes = dict(response_len=case["max_new_tokens"], block=case.get("block_length", case["max_new_tokens"]))
    else:
        sizes = dict(response_len=case["gen_length"], block=case["block_length"])
    options = dict(early_stop=False, steps_per_block=case["steps"] * sizes["block"] // sizes["response_len"], **sizes)
    if case.get("source") == "Fast-dLLM block decoder":
        rule = {"threshold": case["threshold"]} if "threshold" in case else {"quota": "dream", "eps": case["eps"]}
        return dict(rule=case["alg"], cache=case["cache"], quirks="fast_dllm", **options, **rule)
    if "alg" in case:  # Dream's generate knows no blocks: one block, as long as the response
        same = {field: case[field] for field in ("eps", "temperature", "alg_temp", "top_p", "top_k")}
        return dict(rule=case["alg"], quota="dream", **options, **same)
    options |= {"cache": case.get("cache", "none"), "cfg_scale": case.get("cfg_scale") or 0.0}
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


@pytest.mark.parametrize("folder, name, case", DECODED)
def test_decodes_as_published(golden_model, folder, name, case):
    z = golden_arrays(f"{folder}/{name}.npz")
    width = z["prompt_ids"].shape[1]
    got = golden_model(case["model"]).decode(
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

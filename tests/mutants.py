"""Plants known bugs (mutants) one by one, and shows that the test meant for each notices it.

    python -m tests.mutants [NAME ...]

Works on a copy of the package and its tests in a temporary folder. The named tests must pass there first; then each mutant
replaces one piece of the source, and its test must fail. Prints a table, and exits with 1 where a mutant survives. The tests
need no reference data. `tests/test_mutants.py` checks that the table below still fits the source.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A bug to plant: its name, the file, a text that stands there once, what replaces it, and the test that must fail."""

    name: str
    file: str
    text: str
    bug: str
    test: str


# fmt: off
MUTANTS = [
    # Files from elsewhere, and files for others.
    Mutant("index-names-any-file", "jaxblock/huggingface/tensor_files.py",
           "if file != os.path.basename(file):", "if not file:",
           "tests/huggingface/test_bad_checkpoints.py::test_what_is_wrong_with_a_folder_is_named[index points outside]"),
    Mutant("rslora-taken-for-lora", "jaxblock/huggingface/peft_config.py",
           "return rank, alpha * rank**0.5 if self.rslora else alpha", "return rank, alpha",
           "tests/huggingface/test_peft.py::test_ranks_and_scales_are_those_of_peft[rslora]"),
    Mutant("export-not-compared", "jaxblock/huggingface/save.py",
           "if not np.isfinite(difference) or (same_types and difference > 0):", "if False:",
           "tests/huggingface/test_roundtrip.py::test_verify_sees_a_changed_weight_and_a_changed_config"),
    Mutant("export-with-nan-passes", "jaxblock/huggingface/save.py",
           "if not np.isfinite(difference) or (same_types and difference > 0):", "if same_types and difference > 0:",
           "tests/huggingface/test_roundtrip.py::test_verify_sees_a_changed_weight_and_a_changed_config"),
    Mutant("export-not-read-back", "jaxblock/model/exporting.py",
           "return verify_checkpoint(place, merged.net, merged.params, self._probe())", "return 0.0",
           "tests/huggingface/test_roundtrip.py::test_an_autoregressive_start_decodes_once_it_has_a_mask"),
    Mutant("scores-of-other-weights-in-the-card", "jaxblock/cards/scores.py",
           'if weights is None or found.summary.get("weights") != weights:', "if False:",
           "tests/cards/test_cards.py::test_evaluations_that_are_named"),
    Mutant("edited-card-replaced-on-the-hub", "jaxblock/io/hub_upload.py",
           "kept = _CARD in changed and not _is_our_card(name)", "kept = False",
           "tests/io/test_hub_upload.py::test_what_is_there_is_replaced_only_where_that_was_asked_for"),
    Mutant("private-export-becomes-public", "jaxblock/io/hub_upload.py",
           "if private and not found.private:", "if False:",
           "tests/io/test_hub_upload.py::test_public_and_private"),
    Mutant("samples-are-repeated-by-a-resume", "jaxblock/training/observe/samples.py",
           'and sample["step"] > step', "and False",
           "tests/training/test_observe.py::test_a_tracker_that_fails_stops_nothing_and_is_told_of_once"),
    Mutant("new-rows-not-the-mean", "jaxblock/huggingface/placement.py",
           "axis=axis, keepdims=True) / held", "axis=axis, keepdims=True) / x.shape[axis]",
           "tests/huggingface/test_roundtrip.py::test_new_rows_are_the_mean_of_the_old[False-None]"),
    Mutant("checksum-not-compared", "jaxblock/training/checkpoints/checksums.py",
           "return None if _size_and_checksum(path) == expected else", "return None if size == expected[0] else",
           "tests/training/test_checkpoints.py"
           "::test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used[flip]"),
    Mutant("run-loaded-on-one-device", "jaxblock/loading.py",
           'devices = _all_devices(run.arch, run.config.train) if mesh == "all" else mesh', "devices = None",
           "tests/test_many_devices.py::test_the_verbs_use_all_devices_and_write_what_one_device_writes"),
    Mutant("folder-loaded-on-one-device", "jaxblock/loading.py",
           'devices = _all_devices(arch, None) if mesh == "all" else mesh', "devices = None",
           "tests/test_many_devices.py::test_the_verbs_use_all_devices_and_write_what_one_device_writes"),
    Mutant("chat-on-one-device", "jaxblock/commands/chat.py",
           'step=options.step, mesh="all")', "step=options.step)",
           "tests/test_many_devices.py::test_chat_and_harness_load_on_all_devices"),
    Mutant("harness-on-one-device", "jaxblock/commands/harness.py",
           'step=options.step, mesh="all")', "step=options.step)",
           "tests/test_many_devices.py::test_chat_and_harness_load_on_all_devices"),
    # The decoder's caches and windows.
    Mutant("stale-keys-not-hidden", "jaxblock/models/attention/xla.py",
           "mask.visible_keys(keys) & ((after_first < 0) | (after_first >= width))", "mask.visible_keys(keys)",
           "tests/models/test_attention.py::test_new_keys_take_the_places_of_kept_ones"),
    Mutant("part-without-the-position-before", "jaxblock/diffusion/decoding/passes.py",
           'return 1 if layout.alignment == "shifted" and options.quirks == "none" else 0', "return 0",
           "tests/diffusion/test_cache.py"
           "::test_caches_change_no_token_of_a_single_layer_and_every_position_is_counted[prefix-shifted]"),
    Mutant("window-cut-off", "jaxblock/diffusion/canvas.py",
           "max(visible[k] for k in group)", "min(visible[k] for k in group)",
           "tests/diffusion/test_queue.py::test_four_shapes_serve_all_usual_prompts_and_blocks[192-256-32-2-none-40]"),
    # Pages.
    Mutant("beliefs-of-the-last-step", "jaxblock/diffusion/decoding/beliefs.py",
           "lambda old, new: pick(chosen, new.astype(old.dtype), old), beliefs, found)",
           "lambda old, new: new.astype(old.dtype), beliefs, found)",
           "tests/test_api.py::test_a_trace_holds_what_the_network_believed_when_it_committed[options0]"),
    Mutant("text-ends-the-script", "jaxblock/reporting/page.py",
           r'text.replace("<", "\\u003c")', "text",
           "tests/reporting/test_views.py::test_a_page_of_traces_is_whole_and_needs_nothing_else"),
    # Infilling.
    Mutant("block-beyond-its-span", "jaxblock/diffusion/canvas.py",
           "valid = jnp.cumprod(masked, axis=1).astype(bool)", "valid = masked",
           "tests/diffusion/test_reachability.py"
           "::test_every_view_and_commit_of_the_decoder_is_the_replays[spans-same_position]"),
    Mutant("right-side-hidden", "jaxblock/diffusion/canvas.py",
           "    if not layout.infill:\n", "    if True:\n",
           "tests/diffusion/test_reachability.py"
           "::test_every_view_and_commit_of_the_decoder_is_the_replays[spans-same_position]"),
    Mutant("guidance-sees-what-is-given", "jaxblock/diffusion/decoding/passes.py",
           "jnp.where(given | (in_response < 0),", "jnp.where(in_response < 0,",
           "tests/diffusion/test_decoder.py"
           "::test_every_rule_fills_the_spans_alone_and_never_with_the_mask_token[low_confidence]"),
    # Data.
    Mutant("prompt-no-prefix", "jaxblock/data/tokens/encoding.py",
           "if ids[: len(prompt_ids)] == prompt_ids:", "if prompt_ids:",
           "tests/data/test_templates.py::test_bad_templates"),
    Mutant("mask-in-prompt", "jaxblock/data/tokens/encoding.py",
           "if self.special.mask in ids:", "if False:", "tests/data/test_templates.py::test_bad_templates"),
    Mutant("mask-in-response", "jaxblock/data/tokens/encoding.py",
           "if self.special.mask in response_ids:", "if False:", "tests/data/test_templates.py::test_bad_templates"),
    Mutant("special-token-in-a-text", "jaxblock/data/tokens/control.py",
           "            if found:", "            if found and message['role'] == 'user':",
           "tests/data/test_templates.py::test_special_tokens_in_a_records_text_are_refused"),
    Mutant("text-that-becomes-a-special-token", "jaxblock/data/tokens/control.py",
           "if self._only_control(ids) == expected:", "if True:",
           "tests/data/test_templates.py::test_text_that_becomes_a_control_token_is_refused_with_its_place"),
    Mutant("template-not-in-fingerprint", "jaxblock/data/store/manifest.py",
           "dict(hashes), dict(tokenizer), template]", "dict(hashes), dict(tokenizer)]",
           "tests/data/test_prepare.py::test_a_second_call_finds_it_and_any_change_is_noticed"),
    Mutant("tokenizer-not-in-fingerprint", "jaxblock/data/store/manifest.py",
           "dict(hashes), dict(tokenizer), template]", "dict(hashes), template]",
           "tests/data/test_prepare.py::test_a_second_call_finds_it_and_any_change_is_noticed"),
    Mutant("loader-without-seed", "jaxblock/data/loader.py",
           "SeedSequence([seed, 0xDA7A])", "SeedSequence([0xDA7A])",
           "tests/data/test_loader.py::test_an_epoch_visits_everything_of_a_file_once_and_each_is_shuffled_anew"),
    Mutant("mixture-without-epochs", "jaxblock/data/mixture.py",
           "0xDA7A, file, epoch]", "0xDA7A, file]",
           "tests/data/test_loader.py::test_an_epoch_visits_everything_of_a_file_once_and_each_is_shuffled_anew[per_sequence-three-files]"),
    Mutant("mixture-by-the-largest-lag", "jaxblock/data/mixture.py",
           "(slack - 1) * length - slack * lag[file]) * waits[file]", "-lag[file])",
           "tests/data/test_loader.py::test_counts_are_right_in_every_window_of_rows"),
    # A checkpoint knows what it is.
    Mutant("other-tokenizer", "jaxblock/data/store/same_text.py",
           "    return a == b\n", "    return True\n",
           "tests/training/test_stored_text.py::test_other_tokens_than_the_checkpoint_s_are_refused[tokens-run]"),
    Mutant("other-template", "jaxblock/data/store/same_text.py",
           "not _same_template(", "not str(",
           "tests/training/test_stored_text.py::test_other_tokens_than_the_checkpoint_s_are_refused[template-export]"),
    Mutant("added-mask", "jaxblock/data/store/same_text.py",
           'token["id"] != mask', "True", "tests/training/test_stored_text.py::test_all_ids_of_a_start_are_kept[list]"),
    Mutant("stop-ids-not-exported", "jaxblock/huggingface/companions.py",
           "*(() if trained is None else trained.stop_ids)", "*()",
           "tests/training/test_stored_text.py::test_all_ids_of_a_start_are_kept[turn end]"),
    Mutant("ends-of-a-start-dropped", "jaxblock/models/families/registry.py",
           "(arch.eos_id, *arch.end_ids) if end != eos_id", "() if end != eos_id",
           "tests/training/test_stored_text.py::test_all_ids_of_a_start_are_kept[list]"),
    # Training.
    Mutant("no-weight-k-i", "jaxblock/diffusion/sampling.py",
           "n_blocks[:, None] / jnp.maximum(used, 1), 0.0)", "1 / jnp.maximum(used, 1), 0.0)",
           "tests/diffusion/test_laws.py::test_expected_gradient_is_the_nelbos[exact_count-per_sequence-1-aligned]"),
    Mutant("antithetic-halves-not-shared", "jaxblock/diffusion/sampling.py",
           "share = jnp.repeat(share, each, axis=1) / each", "share = jnp.repeat(share, each, axis=1)",
           "tests/diffusion/test_laws.py::test_expected_gradient_is_the_nelbos[antithetic-per_sequence-2-aligned]"),
    Mutant("no-shift", "jaxblock/diffusion/canvas.py",
           "at=jnp.maximum(active - predicts_next, 0),", "at=active,",
           "tests/diffusion/test_reachability.py::test_every_masked_set_of_every_block_is_reached[shifted-4]"),
    Mutant("shift-always", "jaxblock/diffusion/canvas.py",
           "at=jnp.maximum(active - predicts_next, 0),", "at=jnp.maximum(active - 1, 0),",
           "tests/diffusion/test_reachability.py::test_every_masked_set_of_every_block_is_reached[same_position-3]"),
    Mutant("suffix-window-from-block-start", "jaxblock/diffusion/canvas.py",
           "(block + 1) * layout.block + layout.suffix_window)", "block * layout.block + layout.suffix_window)",
           "tests/reporting/test_inspect.py::test_what_a_draw_shows_by_hand"),
    Mutant("rows-cut-to-their-places", "jaxblock/training/step.py",
           "        fits,\n", "        jnp.bool_(True),\n",
           "tests/training/test_widths.py::test_losses_and_gradients_are_those_of_rows_at_the_canvas_width[rows that do not fit]"),
    Mutant("shortest-row-in-the-widest-place", "jaxblock/training/lines.py",
           "jnp.argsort(-_by_line(needed, size)", "jnp.argsort(_by_line(needed, size)",
           "tests/training/test_widths.py::test_rows_are_sorted_within_their_lines_and_fit_whenever_some_order_fits"),
    Mutant("average-moves-in-a-skipped-step", "jaxblock/training/step.py",
           "average = select(finite, next_average(average, params, state.step, ema), average)",
           "average = next_average(average, params, state.step, ema)",
           "tests/faults/test_skipping.py::test_a_skipped_step_changes_neither_weights_nor_their_average"),
    Mutant("one-prompt-mask-for-all-draws", "jaxblock/diffusion/sampling.py",
           "of_prompt = jax.random.uniform(jax.random.fold_in(n, 1), (rows, draws, prompt_room))",
           "of_prompt = jnp.tile(jax.random.uniform(jax.random.fold_in(n, 1), (rows, 1, prompt_room)), (1, draws, 1))",
           "tests/diffusion/test_reachability.py"
           "::test_every_pattern_of_masked_prompt_tokens_is_shown_and_nothing_else_changes[blockwise]"),
    Mutant("prompt-masks-in-the-response", "jaxblock/diffusion/corruption.py",
           "(at < canvas.prompt_len[:, None]) & (u < method.prompt_mask_rate)",
           "(at < of_prompt.shape[1]) & (u < method.prompt_mask_rate)",
           "tests/diffusion/test_reachability.py"
           "::test_every_pattern_of_masked_prompt_tokens_is_shown_and_nothing_else_changes[blockwise]"),
    Mutant("floor-on-the-rate-not-its-law", "jaxblock/diffusion/sampling.py",
           "count = method.rate_floor + (1 - method.rate_floor) * count", "count = jnp.maximum(count, method.rate_floor)",
           "tests/diffusion/test_laws.py::test_a_floor_leaves_out_small_counts_and_rates[exact_count]"),
    # Decoding and scoring.
    Mutant("below-the-threshold", "jaxblock/diffusion/decoding/transfer.py",
           "(scores.surprise <= bound)", "(scores.surprise < bound)",
           "tests/diffusion/test_quota.py::test_a_confidence_at_the_bound_is_accepted_and_ties_go_to_the_lowest_index"),
    Mutant("below-the-factor", "jaxblock/diffusion/decoding/transfer.py",
           "~(scores.surprise <= bounds[ranks])", "~(scores.surprise < bounds[ranks])",
           "tests/diffusion/test_quota.py::test_a_confidence_at_the_bound_is_accepted_and_ties_go_to_the_lowest_index"),
    Mutant("too-few-positions-looked-at", "jaxblock/diffusion/decoding/masked.py",
           "min(-(-int(masks) // size) * size, block)", "min(max(int(masks) // size, 1) * size, block)",
           "tests/diffusion/test_decoder.py"
           "::test_a_step_asks_for_logits_of_as_many_positions_as_may_be_masks[quota]"),
    Mutant("most-masks-after-the-step", "jaxblock/diffusion/decoding/transfer.py",
           "before = np.cumsum(table, axis=1) - table", "before = np.cumsum(table, axis=1)",
           "tests/diffusion/test_quota.py::test_no_block_ever_has_more_masks_than_its_rule_says"),
    Mutant("top-p-stops-at-the-sum-itself", "jaxblock/diffusion/decoding/scoring.py",
           "mass[..., :-1] <= top_p]", "mass[..., :-1] < top_p]",
           "tests/diffusion/test_scoring.py::test_a_token_that_takes_the_sum_to_top_p_exactly_is_not_the_last"),
    Mutant("finished-rows-go-on", "jaxblock/diffusion/decoding/decoder.py",
           "live = valid & ~carry.done[:, None]", "live = valid",
           "tests/diffusion/test_decoder.py::test_early_stop_freezes_finished_rows_and_saves_forwards"),
    Mutant("keys-by-the-place-in-the-batch", "jaxblock/inference.py",
           "len(row.prompt), row.index, row.block", "len(row.prompt), at, row.block",
           "tests/diffusion/test_queue.py::test_a_row_is_what_the_scan_over_all_rows_makes_of_it[origin]"),
    Mutant("long-answers-are-left-to-the-end", "jaxblock/diffusion/decoding/queue.py",
           "row.block if last else 0", "0",
           "tests/diffusion/test_queue.py::test_hardly_a_place_is_empty"),
    Mutant("what-follows-a-choice-is-scored", "jaxblock/diffusion/likelihood.py",
           "valid = jnp.arange(layout.block) < sets.size[:, None]", "valid = jnp.arange(layout.block) <= sets.size[:, None]",
           "tests/diffusion/test_likelihood.py::test_single_sets_of_first_tokens_stand_side_by_side"),
    Mutant("copies-counted-in-the-nelbo", "jaxblock/evaluation/runner.py",
           "canvas._replace(n_blocks=jnp.where(keep, canvas.n_blocks, 0))",
           "canvas._replace(n_blocks=jnp.where(keep, canvas.n_blocks, canvas.n_blocks))",
           "tests/evaluation/test_scores.py::test_bound_agrees_with_the_interface"),
    Mutant("nelbo-in-batches-of-64", "jaxblock/evaluation/runner.py",
           "min(self.decode.batch_size, len(records))", "min(64, len(records))",
           "tests/evaluation/test_scores.py::test_bound_agrees_with_the_interface"),
    Mutant("all-rows-in-one-program", "jaxblock/model/network.py",
           "min(self.decode_defaults.batch_size, count)", "count",
           "tests/test_api.py::test_logits_and_bounds_are_computed_in_batches"),
    # What a study claims.
    Mutant("few-seeds-vary-too-little", "jaxblock/study/crossed.py",
           "np.sqrt(ratio * df / chi_squared)", "np.sqrt(df / chi_squared)",
           "tests/study/test_statistics.py::test_draws_have_students_spread"),
    Mutant("students-tails-left-out", "jaxblock/study/crossed.py",
           "np.sqrt(ratio * df / chi_squared)", "np.sqrt(ratio)",
           "tests/study/test_statistics.py::test_draws_have_students_spread"),
    Mutant("the-problems-are-taken-as-given", "jaxblock/study/hypotheses.py",
           "np.maximum(sign_flip_p(difference.mean(-1)), crossed_p(difference))", "sign_flip_p(difference.mean(-1))",
           "tests/study/test_statistics.py::test_a_planted_effect_is_found_and_a_planted_null_is_not"),
    Mutant("every-pair-counts", "jaxblock/study/relation.py",
           "np.sign(np.subtract.outer(x, x))[pairs]", "np.sign(np.subtract.outer(x, x))[np.triu_indices(len(x), 1)]",
           "tests/study/test_comparisons.py::test_agreement_is_kendalls_tau_and_counts_only_the_chosen_pairs"),
    Mutant("the-first-sign-change", "jaxblock/study/crossover.py",
           "np.where(ours < 0, places, -1).max(-1)", "np.where((ours < 0).any(-1), np.argmax(ours < 0, -1), -1)",
           "tests/study/test_statistics.py::test_the_last_sign_change_by_hand"),
]
# fmt: on


def plant(root: Path, mutant: Mutant) -> str:
    """Returns the source of a mutant's file, below ``root``, with the bug in it; its text must be there exactly once."""
    source = (root / mutant.file).read_text()
    found = source.count(mutant.text)
    if found != 1:
        raise ValueError(
            f"mutant {mutant.name!r}: its text is in {mutant.file} {found} times, not once; "
            "change the table in tests/mutants.py to what the source says now"
        )
    return source.replace(mutant.text, mutant.bug)


def failure(root: Path, tests: Sequence[str]) -> str | None:
    """Runs tests of a tree by their node ids; returns what pytest prints if one of them fails, None if all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    how = {"cwd": root, "env": {**os.environ, "PYTHONPATH": str(root)}, "text": True}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {' '.join(tests)}:\n{done.stdout}")
    return done.stdout if done.returncode else None


def survivors(root: Path, mutants: Sequence[Mutant]) -> list[str]:
    """Plants mutants in a tree, one by one, and prints what became of each; returns the names of those that survive."""
    left = []
    for mutant in mutants:
        path = root / mutant.file
        sound, begin = path.read_text(), time.perf_counter()
        path.write_text(plant(root, mutant))
        survives = failure(root, [mutant.test]) is None
        path.write_text(sound)
        verdict = "SURVIVES" if survives else "dies"
        print(f"{mutant.name:36} {verdict:8} {time.perf_counter() - begin:6.1f} s  {mutant.test}", flush=True)
        if survives:
            left.append(mutant.name)
    return left


def main(names: Sequence[str]) -> int:
    """Runs the mutants of these names, or all where none is given; returns the exit code."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no mutant is called {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in names or known]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "jaxblock"
        for part in ("jaxblock", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        failed = failure(root, list(dict.fromkeys(mutant.test for mutant in chosen)))
        if failed is not None:
            print(f"{failed}\nthis fails without any mutant: mend it first", file=sys.stderr)
            return 1
        left = survivors(root, chosen)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutants die")
    if left:
        print(f"no test notices: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant to plant (default: all)")
    sys.exit(main(parser.parse_args().names))

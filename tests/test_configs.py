"""The sections of a config; the configs that ship are valid, run for two steps or compile at full size, with the memory they promise."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import jax
import pytest
from jax.sharding import Mesh

from jaxblock import build
from jaxblock.cli import main
from jaxblock.commands import train as verbs
from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.evaluation.config import GraderName
from jaxblock.evaluation.graders import GRADERS
from jaxblock.fit.shapes import RunShapes, bytes_per_device, lower_step, run_shapes
from jaxblock.fit.sizes import PUBLISHED
from jaxblock.models.families import registry
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.step import Learner
from tests import runs

EVERY = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))}
LOADED = {name: load_config(str(path)) for name, path in EVERY.items()}
RUN = [name for name, config in LOADED.items() if (config.model.init_from or "runs/").startswith("runs/")]


def test_every_config_is_valid_and_sections_say_what_a_resumed_run_may_change():
    assert all(check_config(config) is config for config in LOADED.values())
    sections = {field.name: getattr(Config(), field.name) for field in dataclasses.fields(Config)}
    assert [section.section_name for section in sections.values()] == list(sections)
    fixed = {name: vars(section).keys() - section.changeable(saved=True) for name, section in sections.items()}
    free = {"data": {"prepared", "overwrite", "allow_other_template", "verify", "prepare_workers"},
            "model": {"remat", "attention", "scan_layers", "init_from", "init_step", "loss_chunk"}}  # fmt: skip
    assert fixed == {name: vars(section).keys() - free.get(name, set()) for name, section in sections.items()} | {
        "train": {"steps", "batch_size", "seed", "overfit_one_batch"}, "decode": set(), "evaluate": set()
    }  # fmt: skip
    # Without a checkpoint the start is made again, and must be the same start.
    for section in sections.values():
        assert section.changeable(saved=False) == section.changeable(saved=True) - {"init_from", "init_step"}
    assert get_args(GraderName) == tuple(GRADERS)


# Those that start from random weights

# Little data, of which a tokenizer makes long prompts, and a small network.
DATA = "--data.builtin_train 1000 --data.builtin_test 16 --data.validation_records 16 --data.overwrite --data.overlong drop"
TRAIN = (
    "--train.steps 2 --train.eval_problems 8 --train.eval_nelbo_rows 8 --train.log_every 1 --optimizer.warmup_steps 1 "
    "--decode.batch_size 8 --decode.steps_per_block 2 --model.d_model 32 --model.n_layers 1 --model.mlp_dim 32"
)


@pytest.mark.slow
@pytest.mark.parametrize("builtin", [True, False])
def test_configs_run(builtin, tmp_path, monkeypatch, draw_curves, request):
    """Prepares and trains what they say, each after the one that it starts from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verbs, "draw_curves", draw_curves)
    names = [name for name in RUN if (LOADED[name].data.train == "builtin") == builtin]
    for name in sorted(names, key=lambda name: LOADED[name].model.init_from or ""):
        config, flags = LOADED[name], ["--config", str(EVERY[name]), *DATA.split()]
        if not builtin:
            flags += ["--data.vocab_size", "600"]  # few lines have few words
            for file in map(Path, (config.data.train, config.data.test)):
                # The file's first lines, where the config looks for it.
                lines = (request.getfixturevalue("shared") / file).read_text(encoding="utf-8").splitlines(keepends=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(lines[:150]), encoding="utf-8")
        assert Path(config.data.prepared).exists() or main(["prepare", *flags]) == 0
        assert main(["train", *flags, *TRAIN.split()]) == 0
        run = Path(config.train.out)
        trained, evaluated = (runs.rows(run, kind) for kind in ("train", "eval"))
        assert [row["step"] for row in trained] == [1, 2] and all(math.isfinite(row["loss"]) for row in trained)
        assert [row["step"] for row in evaluated] == [0, 2]
        assert all(row["pass_at_1"]["n"] == 8 and math.isfinite(row["nelbo_per_token"]["mean"]) for row in evaluated)
        assert (run / "plots" / "curves.png").is_file()


# Those for published checkpoints

GB = 1e9
LLADA_8B, DREAM_7B = PUBLISHED["GSAI-ML/LLaDA-8B-Instruct"], PUBLISHED["Dream-org/Dream-v0-Instruct-7B"]
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "max_position_embeddings": 8192, "eos_token_id": 2,
}  # fmt: skip

# preset: (checkpoint, mesh, GB of trained state, GB of frozen base), over all devices.
PRESETS: dict[str, tuple[dict[str, Any], tuple[int, int, int], float, float]] = {
    # 335.5 M adapters in float32 with two moments; 8.02 B weights in bfloat16.
    "llada_8b_paper": (LLADA_8B, (2, 4, 1), 0.3355 * 12, 16.03),
    "llada_8b_lora": (LLADA_8B, (1, 4, 2), 0.1678 * 12, 16.03),
    # bfloat16 weights and two 8-bit moments.
    "llada_8b_full": (LLADA_8B, (1, 8, 1), 8.016 * 4, 0.0),
    "dream_7b_lora": (DREAM_7B, (1, 2, 4), 0.1615 * 12, 15.23),
    # 9.8 M adapters; 134.5 M weights in float32. Four rows a batch, three key/value heads: four devices.
    "smollm2_lora": (SMOLLM2_135M, (1, 4, 1), 0.00977 * 12, 0.538),
    "dream_7b_full": (DREAM_7B, (1, 8, 1), 7.616 * 4, 0.0),
}


def built(name: str) -> tuple[Learner, Mesh, RunShapes]:
    """Returns a preset's learner, its mesh, and the arguments of its step by shapes alone."""
    sizes, shape, *_ = PRESETS[name]
    config, arch = LOADED[name], registry.from_hf(sizes, name)
    if arch.mask_id is None:
        arch = registry.with_mask(arch, 0, config.model.alignment)
    learner = build.learner(config, arch, (arch.eos_id,))
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    return learner, mesh, run_shapes(config, learner, mesh)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_state_is_as_large_as_said_and_split(name):
    *_, found = built(name)
    _, (_, fsdp, tensor), trained, frozen = PRESETS[name]
    sizes = (jax.tree.map(lambda leaf: leaf.size * leaf.dtype.itemsize, tree) for tree in (found.state, found.frozen))
    state, base = (sum(jax.tree.leaves(tree)) for tree in sizes)
    assert (state / GB, base / GB) == (pytest.approx(trained, rel=0.02), pytest.approx(frozen, rel=0.01))
    # Split over fsdp and tensor, but for norms and the like.
    assert bytes_per_device((found.state, found.frozen)) == pytest.approx((state + base) / (fsdp * tensor), rel=0.06)


# One of LoRA over fsdp and tensor, one of all weights over fsdp.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dream_7b_lora", "llada_8b_full"])
def test_a_presets_step_compiles_at_full_size(name):
    config, (learner, mesh, found) = LOADED[name], built(name)
    memory = lower_step(learner, found, mesh).compile().memory_analysis()
    inputs = bytes_per_device((found.state, found.frozen))
    batch = 4 * config.train.batch_size * (config.canvas.prompt_len + config.canvas.response_len + 5)
    assert inputs <= memory.argument_size_in_bytes <= inputs + batch + 4096
    # The state is updated in place.
    assert memory.alias_size_in_bytes >= 0.99 * bytes_per_device(found.state)

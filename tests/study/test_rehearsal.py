"""Runs the studies that need a GPU or a pod with tiny models and few steps: everything else is as their files say."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxblock.cli import main
from jaxblock.data.text import corpus
from jaxblock.data.text.recipes import PROMPT
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.study import results
from tests.data.conftest import LLADA_TEMPLATE, SPECIALS
from tests.models.networks import random_params

pytestmark = pytest.mark.slow

FAMILY = {"gpu": "llama", "full": "llada"}
SIZES = dict(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, mlp_dim=24, norm_eps=1e-5, rope_theta=1e4)


def checkpoint(folder, family):
    """Makes a checkpoint with a tokenizer, which stands for the one that a study starts from."""
    problems = corpus.generate("train", 200)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIALS, "<file_sep>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT] * 50 + [f"{one['question']}\n{one['answer']}" for one in problems], trainer)
    mask = tokenizer.token_to_id("<|mdm_mask|>") if family == "llada" else None
    eos = tokenizer.token_to_id("<|endoftext|>")
    ids = dict(vocab_size=tokenizer.get_vocab_size(), mask_id=mask, eos_id=eos, pad_id=eos, max_len=512)
    arch = Architecture(family=family, **(SIZES | dict(tie_embeddings=False) | registry.traits(family) | ids))
    save_checkpoint(folder, arch, jax.device_put(random_params(registry.param_table(arch), std=0.1)))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": LLADA_TEMPLATE}))


def records(folder):
    """Writes a few records in the form of each data set; returns the files by the names of the recipes."""
    made = {"gsm8k": corpus.generate("train", 60)}
    made["metamathqa"] = [
        {"query": one["question"], "response": one["answer"], "type": "MATH"} for one in made["gsm8k"]
    ]
    made["test"] = corpus.generate("test", 4)
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in made}


def cut(tree, start, files):
    """Cuts a study to one seed, few steps and few problems; data sets and checkpoints are replaced by small ones."""
    tree["seeds"], tree["scoring"] = [0], {"split": "test", "problems": 2, "nelbo_rows": 2}
    tree["common"]["train"] |= {"batch_size": 2, "save_every": 100}
    tree["common"]["evaluate"]["nelbo_samples"] = 1
    if "lora" in tree["common"]:
        tree["common"]["lora"] |= {"rank": 2, "alpha": 4}
    for task in tree["tasks"].values():
        task["data"] |= {"train": files[task["data"]["recipe"]], "test": files["test"], "validation_records": 4}
        task["data"]["tokenizer"] = str(start)
    for sections in (tree["common"], *tree["arms"].values()):
        if "init_from" in sections.get("model", {}):
            sections["model"]["init_from"] = str(start)
        if "warmup_steps" in sections.get("optimizer", {}):
            sections["optimizer"]["warmup_steps"] = 1
        if "steps" in sections:
            sections["steps"] = 4
    for one in tree["experiments"].values():
        of_start = one["arms"] == ["start"]
        one["budgets"] = ([2, 4] if of_start else [8, 16])[: len(one["budgets"])]
    return tree


@pytest.mark.parametrize("name", ["gpu", "full"])
def test_a_study_for_larger_machines_runs_small(name, tmp_path, monkeypatch):
    # A cell's process has one device, since compiling for the eight of the tests takes most of a minute.
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    monkeypatch.setenv("XLA_FLAGS", flags)
    start = tmp_path / "start"
    checkpoint(start, FAMILY[name])
    tree = yaml.safe_load((Path(__file__).parents[2] / "configs" / "study" / f"{name}.yaml").read_text())
    spec, out = tmp_path / f"{name}.yaml", tmp_path / "study"
    spec.write_text(yaml.safe_dump(cut(tree, start, records(tmp_path))))
    assert main(["study", "run", str(spec), "--out", str(out), "--jobs", "2"]) == 0
    assert main(["study", "report", str(out)]) == 0
    _, plan = results.read_plan(out)
    found = results.read_results(out)
    for cell in plan.cells:
        assert results.is_done(cell, found[cell.name])
        assert all(np.isfinite(score["nelbo_per_token"]["mean"]) for score in found[cell.name]["scores"].values())
    assert f"{len(plan.cells)} of {len(plan.cells)} cells are done" in (out / "report.md").read_text()

"""Runs the studies that need a GPU or a pod with tiny models and few steps: everything else is as their files say."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tokenizers import ByteLevelBPETokenizer

from jaxblock.cli import main
from jaxblock.data.text import corpus
from jaxblock.data.text.recipes import PROMPT
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.families import registry
from jaxblock.study import results
from tests.data.conftest import LLADA_TEMPLATE, SPECIALS
from tests.models.networks import make_arch, random_params

pytestmark = pytest.mark.slow


def checkpoint(folder, family):
    """Makes a checkpoint with a tokenizer, which stands for the one that a study starts from."""
    texts = [PROMPT] * 50 + [f"{one['question']}\n{one['answer']}" for one in corpus.generate("train", 200)]
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=False)
    special = [*SPECIALS, "<file_sep>"]
    tokenizer.train_from_iterator(texts, vocab_size=700, special_tokens=special, show_progress=False)
    mask = tokenizer.token_to_id("<|mdm_mask|>") if family == "llada" else None
    eos = tokenizer.token_to_id("<|endoftext|>")
    ids = dict(vocab_size=tokenizer.get_vocab_size(), mask_id=mask, eos_id=eos, pad_id=eos)
    arch = make_arch(family, max_len=512, **ids)
    save_checkpoint(folder, arch, jax.device_put(random_params(registry.param_table(arch), std=0.1)))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": LLADA_TEMPLATE}))


def cut(tree, start, files):
    """Cuts a study to one seed, few steps and few problems; data sets and checkpoints are replaced by small ones."""
    tree["seeds"], tree["scoring"] = [0], {"split": "test", "problems": 2, "nelbo_rows": 2}
    tree["common"]["train"] |= {"batch_size": 2, "save_every": 100, "fsdp": 1}
    tree["common"]["evaluate"]["nelbo_samples"] = 1
    if "lora" in tree["common"]:
        tree["common"]["lora"] |= {"rank": 2, "alpha": 4}
    for task in tree["tasks"].values():
        task["data"] |= {"train": files[task["data"]["recipe"]], "test": files["test"], "validation_records": 4}
        task["data"]["tokenizer"] = str(start)
    for sections in (tree["common"], *tree["arms"].values()):
        for section, name, value in (("model", "init_from", str(start)), ("optimizer", "warmup_steps", 1)):
            if name in sections.get(section, {}):
                sections[section][name] = value
        if "steps" in sections:
            sections["steps"] = 4
    for one in tree["experiments"].values():
        of_start = one["arms"] == ["start"]
        one["budgets"] = ([2, 4] if of_start else [8, 16])[: len(one["budgets"])]
    return tree


@pytest.mark.parametrize(("name", "family"), [("gpu", "llama"), ("full", "llada")])
def test_a_study_for_larger_machines_runs_small(name, family, tmp_path, monkeypatch):
    # A cell's process has one device, since compiling for the eight of the tests takes most of a minute.
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    monkeypatch.setenv("XLA_FLAGS", flags)
    checkpoint(tmp_path / "start", family)
    # A few records in the form of each data set, by the names of the recipes.
    made = {"gsm8k": corpus.generate("train", 60), "test": corpus.generate("test", 4)}
    made["metamathqa"] = [{"query": x["question"], "response": x["answer"], "type": "MATH"} for x in made["gsm8k"]]
    files = {recipe: str(tmp_path / f"{recipe}.jsonl") for recipe in made}
    for recipe, rows in made.items():
        Path(files[recipe]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = yaml.safe_load((Path(__file__).parents[2] / "configs" / "study" / f"{name}.yaml").read_text())
    spec, out = tmp_path / f"{name}.yaml", tmp_path / "study"
    spec.write_text(yaml.safe_dump(cut(tree, tmp_path / "start", files)))
    assert main(["study", "run", str(spec), "--out", str(out), "--jobs", "2"]) == 0
    assert main(["study", "report", str(out)]) == 0
    _, plan = results.read_plan(out)
    found = results.read_results(out)
    for cell in plan.cells:
        assert results.is_done(cell, found[cell.name])
        assert all(np.isfinite(score["nelbo_per_token"]["mean"]) for score in found[cell.name]["scores"].values())
    assert f"{len(plan.cells)} of {len(plan.cells)} cells are done" in (out / "report.md").read_text()

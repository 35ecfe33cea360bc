"""What a checkpoint records about text and decoding travels to its export and back, and is compared with prepared data."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as huggingface

import jaxblock
from jaxblock.cli import config_of, main, parse
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.data.config import DataConfig
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import EarlierVersionWarning, UserError
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach
from jaxblock.models.spec import init_params
from jaxblock.training import weights
from jaxblock.training.checkpoints.run_folder import open_run
from jaxblock.training.resume import check_resume
from jaxblock.training.stored_text import read_text, template_for_others

SPECIAL = ("<|mask|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|pad|>", "<|start|>")
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def model(tiny_run: Path) -> jaxblock.Model:
    """The tiny run with other settings than the defaults everywhere, and with adapters."""
    found = jaxblock.load(tiny_run)
    assert found.encoder is not None
    lora = Lora(2, 4.0, 0.0, ("blocks/q",))
    adapters = init_params(adapter_table(registry.param_table(found.arch), lora), 3, np.float32)
    asked = dataclasses.replace(found.encoder.config, prompt_template="Sum: {prompt}", system="1")
    special = dataclasses.replace(found.encoder.special, ends=(7,))
    return dataclasses.replace(
        found,
        net=dataclasses.replace(found.net, lora=lora),
        params=attach(found.params, adapters),
        encoder=Encoder(found.encoder.tokenizer, found.encoder.template, special, asked),
        stop_ids=special.stop_ids,
        canvas=dataclasses.replace(found.canvas, suffix_window=8),
        decode_defaults=dataclasses.replace(found.decode_defaults, rule="factor", factor=1.5),
    )


def test_an_export_is_loaded_as_what_was_trained(model: jaxblock.Model, tiny_run: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "merged")
    model.save_adapter(tmp_path / "alone")
    jaxblock.load(tmp_path / "merged").save(tmp_path / "again")
    (tmp_path / "base").mkdir()
    jaxblock.load(tiny_run).save(tmp_path / "plain")
    want = model.decode([[5, 6, 7]], return_steps=True)
    for name in ("merged", "alone", "again"):
        base = {"base": tmp_path / "plain"} if name == "alone" else {}
        found = jaxblock.load(tmp_path / name, **base)
        for field in ("canvas", "decode_defaults", "stop_ids"):
            assert getattr(found, field) == getattr(model, field)
        assert found.encoder is not None and model.encoder is not None
        assert found.encoder.special == model.encoder.special and found.encoder.template == model.encoder.template
        assert found.encoder.prompt("1+1?") == model.encoder.prompt("1+1?")
        np.testing.assert_array_equal(found.decode([[5, 6, 7]], return_steps=True).ids, want.ids)
        command = ["--checkpoint", str(tmp_path / name)]
        assert config_of(parse("decode", command)).canvas == model.canvas
        assert config_of(parse("decode", [*command, "--decode.factor", "2"])).decode.rule == "factor"
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert set(model.stop_ids) <= set(generation["eos_token_id"]) and generation["jaxblock"]["format"] == 1


def test_other_libraries_render_the_template_that_was_trained(model: jaxblock.Model) -> None:
    """They give it no `eot_token`, and the other tokens as the tokenizer's own settings have them: none here."""
    assert model.encoder is not None
    alone = dataclasses.replace(model.encoder.template, source=template_for_others(model.encoder), tokens={})
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert alone.render(turns, True) == model.encoder.template.render(turns, True)


def _block(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "generation_config.json"
    content = json.loads(path.read_text())
    change(content["jaxblock"])
    path.write_text(json.dumps(content))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes((f.parent / "other" / "tokenizer" / "tokenizer.model").read_bytes()),
        r"tokenizer.model is not the tokenizer that the model was trained with .*take 'jaxblock' out",
    ),
    "template": (lambda f: (f / "template.jinja").write_text("{{ messages }}"), "template.jinja is not the template"),
    "mask": (lambda f: _block(f, lambda b: b["text"]["special"].update(mask=5)), "config.json calls 1 the mask token"),
    "format": (lambda f: _block(f, lambda b: b.update(format=9)), "has the format 9, not 1"),
    "canvas": (lambda f: _block(f, lambda b: b["canvas"].update(block="4")), r"canvas.block must be int, not '4'"),
    "sizes": (lambda f: _block(f, lambda b: b["canvas"].update(block=5)), r"\(jaxblock\): canvas.block 5 does not divide"),
    "no text": (lambda f: _block(f, lambda b: b.pop("text")), "is not what an export writes"),
    "no special": (lambda f: _block(f, lambda b: b["text"].pop("special")), "is not what an export writes"),
    "an id": (lambda f: _block(f, lambda b: b["text"]["special"].update(eot=10**9)), "not all ids below"),
    "a word": (lambda f: _block(f, lambda b: b["text"]["special"].update(eot="x")), "a special id is no number"),
    "prompt": (lambda f: _block(f, lambda b: b["text"].update(prompt_template="x")), r"has no \{prompt\}"),
}


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    jaxblock.load(tiny_run).save(folder)
    return folder


@pytest.fixture(scope="module")
def others(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same records prepared with another tokenizer of the same size (`tokens`), and with another template (`template`)."""
    folder = tmp_path_factory.mktemp("others")
    data = load_config(str(tiny_config)).data
    size = open_prepared(data.prepared).manifest.vocab_size
    changes = {"tokens": {"tokenizer_type": "unigram", "vocab_size": size}, "template": {}}
    template = folder / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content + eot_token }}{% endfor %}")
    changes["template"] = {
        "tokenizer": str(Path(data.prepared) / "tokenizer"),
        "template": str(template),
    }
    for name, fields in changes.items():
        prepare(dataclasses.replace(data, prepared=str(folder / name), **fields), load_config(str(tiny_config)).canvas)
    return folder


def test_x(others: Path) -> None:
    pass

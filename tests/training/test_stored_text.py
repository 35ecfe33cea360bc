"""What a checkpoint records about text and decoding travels to its export and back, and is compared with prepared data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as huggingface

import jaxblock
from jaxblock.cli import config_of, main, parse
from jaxblock.commands import decode
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.data.config import DataConfig
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.store.same_text import CheckpointText, check_same_text
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import EarlierVersionWarning, UserError
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach
from jaxblock.models.spec import init_params
from jaxblock.training import weights
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.run_folder import open_run
from jaxblock.training.resume import check_resume
from jaxblock.training.stored_text import template_for_others

SPECIAL = ("<|mask|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|pad|>", "<|start|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def _adapted(model: jaxblock.Model) -> jaxblock.Model:
    """The model with adapters on one matrix."""
    lora = Lora(2, 4.0, 0.0, ("blocks/q",))
    adapters = init_params(adapter_table(registry.param_table(model.arch), lora), 3, np.float32)
    net = dataclasses.replace(model.net, lora=lora)
    return dataclasses.replace(model, net=net, params=attach(model.params, adapters))


@pytest.fixture
def model(tiny_run: Path) -> jaxblock.Model:
    """The tiny run with other settings than the defaults everywhere, and with adapters."""
    found = _adapted(jaxblock.load(tiny_run))
    assert found.encoder is not None
    asked = dataclasses.replace(found.encoder.config, prompt_template="Sum: {prompt}", system="1")
    special = dataclasses.replace(found.encoder.special, ends=(7,))
    return dataclasses.replace(
        found,
        encoder=Encoder(found.encoder.tokenizer, found.encoder.template, special, asked),
        stop_ids=special.stop_ids,
        canvas=dataclasses.replace(found.canvas, suffix_window=8),
        decode_defaults=dataclasses.replace(found.decode_defaults, rule="factor", factor=1.5),
    )


def test_an_export_is_loaded_as_what_was_trained(model: jaxblock.Model, tiny_run: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "merged")
    model.save_adapter(tmp_path / "alone")
    jaxblock.load(tmp_path / "merged").save(tmp_path / "again")
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
        lambda f: (f / "tokenizer.model").write_bytes(
            (f.parent / "other" / "tokenizer" / "tokenizer.model").read_bytes()
        ),
        r"tokenizer.model is not the tokenizer that the model was trained with .*take 'jaxblock' out",
    ),
    "template": (lambda f: (f / "template.jinja").write_text("{{ messages }}"), "template.jinja is not the template"),
    "mask": (lambda f: _block(f, lambda b: b["text"]["special"].update(mask=5)), "config.json calls 1 the mask token"),
    "format": (lambda f: _block(f, lambda b: b.update(format=9)), "has the format 9, not 1"),
    "canvas": (lambda f: _block(f, lambda b: b["canvas"].update(block="4")), r"canvas.block must be int, not '4'"),
    "sizes": (
        lambda f: _block(f, lambda b: b["canvas"].update(block=5)),
        r"\(jaxblock\): canvas.block 5 does not divide",
    ),
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
    template = folder / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content + eot_token }}{% endfor %}")
    changes: dict[str, dict[str, Any]] = {
        "tokens": {"tokenizer_type": "unigram", "vocab_size": size},
        "template": {"tokenizer": data.prepared, "template": str(template)},
    }
    for name, fields in changes.items():
        prepare(dataclasses.replace(data, prepared=str(folder / name), **fields), load_config(str(tiny_config)).canvas)
    return folder


@pytest.mark.parametrize("case", DAMAGES)
def test_an_export_whose_files_were_replaced_is_refused(
    exported: Path, others: Path, tmp_path: Path, case: str
) -> None:
    change, message = DAMAGES[case]
    shutil.copytree(exported, tmp_path / "hf")
    (tmp_path / "other").symlink_to(others / "tokens")
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        jaxblock.load(tmp_path / "hf")


@pytest.mark.parametrize("made", ["run", "export"])
@pytest.mark.parametrize("name", ["tokens", "template"])
def test_other_tokens_than_the_checkpoint_s_are_refused(
    tiny_config: Path, tiny_run: Path, exported: Path, others: Path, tmp_path: Path, capsys: Any, made: str, name: str
) -> None:
    """By train and by evaluate, which name both folders; another template may be asked for, another tokenizer may not."""
    source, data = str({"run": tiny_run, "export": exported}[made]), str(others / name)
    common = ["--config", str(tiny_config), "--data.prepared", data]
    verbs = {
        "train": ["--model.init_from", source, "--train.out", str(tmp_path / "out")],
        "evaluate": ["--checkpoint", source, "--out", str(tmp_path / "out")],
    }
    different = "different tokenizers" if name == "tokens" else "different chat templates ('plain' and "
    for verb, flags in verbs.items():
        assert main([verb, *common, *flags]) == 2
        told = capsys.readouterr().err
        assert f"{source} and {data} have {different}" in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    config = dataclasses.replace(load_config(str(tiny_config)), model=ModelConfig(init_from=source))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, allow_other_template=True))
    if name == "template":
        assert weights.architecture(config, open_prepared(data), None).d_model == 16
        return
    with pytest.raises(UserError, match=different):
        weights.architecture(config, open_prepared(data), None)


def test_decode_puts_prompts_into_the_text_that_was_trained(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["decode", "--data.prompt_template", "{prompt}9", "1+1?"]
    assert main([*flags, "--checkpoint", str(tiny_run)]) == 2
    assert (
        f"data.prompt_template is '{{prompt}}9', but {tiny_run} was trained with '{{prompt}}'"
        in capsys.readouterr().err
    )
    own = open_run(tiny_run).prepared.encoder
    changed = decode.with_prompt_settings(own, DataConfig(prompt_template="{prompt}9"), "other", recorded=False)
    assert changed.prompt("1+1?") == own.prompt("1+1?9")


def test_a_resumed_run_keeps_its_tokens(tiny_run: Path, others: Path) -> None:
    """Even where the settings and inputs are the same, as after an update of the library that trains the tokenizer."""
    run = open_run(tiny_run)
    same = dataclasses.replace(open_prepared(others / "tokens"), manifest=run.manifest)
    with (
        contextlib.closing(CheckpointReader(tiny_run)) as checkpoints,
        pytest.raises(UserError, match="have different tokenizers"),
    ):
        check_resume(run.config, tiny_run, checkpoints, 120, same)


def _start(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> Architecture:
    """Makes a folder of an autoregressive network with a tokenizer whose template ends a turn by <|end|>."""
    tokens = ["<unk>", "user", "assistant", "a", "b", *SPECIAL]
    tokenizer = huggingface.Tokenizer(
        huggingface.models.WordLevel({text: i for i, text in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = huggingface.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    arch = Architecture("llama", 32, 16, 2, 2, 2, 8, 32, 1e-5, 1e4, 64, True, None, 6, 6, "shifted")
    save_checkpoint(folder, arch, init_params(registry.param_table(arch), 0, np.float32))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in content.items() if key not in ("pad_token_id", "eos_token_id")}
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return arch


@pytest.mark.parametrize(
    ("config", "generation", "stop_ids"),
    [
        ({"eos_token_id": 6, "pad_token_id": None}, {}, (9, 6)),
        ({"eos_token_id": [6, 7, 8]}, {"temperature": 0.6}, (9, 6, 7, 8)),
        ({"eos_token_id": [8], "pad_token_id": 10, "use_cache": True}, {"eos_token_id": [8, 7]}, (9, 8, 7)),
        ({"eos_token_id": 6, "bos_token_id": 11}, {"eos_token_id": 8, "pad_token_id": 10}, (9, 6, 8)),
    ],
    ids=["turn end", "list", "pad", "generation config"],
)
def test_all_ids_of_a_start_are_kept(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], stop_ids: tuple[int, ...]
) -> None:
    """From the files of an autoregressive start to prepared data, the run's network, its export, and back."""
    source = tmp_path / "start"
    _start(source, config, generation)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}')
    data = DataConfig(
        prepared=str(tmp_path / "data"), train=str(tmp_path / "rows.jsonl"), test=None, validation_records=0,
        tokenizer=str(source), template="tokenizer", mask_token="<|mask|>",
    )  # fmt: skip
    prepare(data, CanvasConfig(prompt_len=16, response_len=8))
    prepared = open_prepared(tmp_path / "data")
    assert prepared.special.stop_ids == stop_ids and prepared.special.mask == 5
    arch = weights.architecture(Config(data=data, model=ModelConfig(init_from=str(source))), prepared, None)
    grown = dataclasses.replace(data, prepared=str(tmp_path / "grown"), mask_token="<|new|>", add_mask_token=True)
    prepare(grown, CanvasConfig(prompt_len=16, response_len=8))
    started = Config(data=grown, model=ModelConfig(init_from=str(source)))
    assert weights.architecture(started, open_prepared(grown.prepared), None).mask_id == 12
    exported = registry.to_hf(arch, "float32")
    origin = json.loads((source / "config.json").read_text())
    assert {name: exported.get(name) for name in origin} == origin and exported["mask_token_id"] == 5
    assert ("pad_token_id" in exported) == ("pad_token_id" in origin)
    model = dataclasses.replace(jaxblock.load(source, mask_id=5), encoder=prepared.encoder, recorded=True)
    assert set(model.stop_ids) == {*stop_ids, 7}  # with every known end of a turn, since nothing is recorded
    model = dataclasses.replace(model, net=dataclasses.replace(model.net, arch=arch), stop_ids=stop_ids)
    model.save(tmp_path / "export")
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == set(stop_ids) and generation.items() <= {**written, **generation}.items()
    again = jaxblock.load(tmp_path / "export")
    assert (again.stop_ids, again.arch.pad_id, again.arch.eos_id) == (stop_ids, arch.pad_id, arch.eos_id)
    assert again.encoder is not None and again.encoder.special == prepared.special
    # The data may name another end of the sequence, which adapters alone have beside a base that says otherwise.
    other = Encoder(
        prepared.tokenizer, prepared.encoder.template, dataclasses.replace(prepared.special, eos=7, ends=()), data
    )
    alone = _adapted(dataclasses.replace(jaxblock.load(source, mask_id=5), encoder=other, recorded=True))
    alone = dataclasses.replace(alone, base=str(source), stop_ids=other.special.stop_ids)
    alone = dataclasses.replace(alone, net=dataclasses.replace(alone.net, arch=registry.with_end(alone.arch, 7)))
    alone.save_adapter(tmp_path / "alone")
    again = jaxblock.load(tmp_path / "alone")
    assert (again.stop_ids, again.arch.eos_id) == ((9, 7), 7)


def test_folders_of_an_earlier_version_open_with_a_warning(tiny_config: Path, tmp_path: Path) -> None:
    """What they could not record is not compared; the same data are not prepared again."""
    config = load_config(str(tiny_config))
    data = dataclasses.replace(config.data, prepared=str(tmp_path / "data"))
    shutil.copytree(config.data.prepared, data.prepared)
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["special"]["ends"]
    path.write_text(json.dumps({**manifest, "format": 1}))
    (tmp_path / "data" / "files.json").unlink()
    with pytest.warns(EarlierVersionWarning, match="did not record all ids that end a response"):
        opened = open_prepared(data.prepared)
    assert opened.special.ends is None and len(opened.special.stop_ids) == 2
    told: list[str] = []
    prepare(data, config.canvas, told.append)
    assert told == [f"already prepared: {data.prepared} holds the same settings and inputs"]
    new = dataclasses.replace(open_prepared(config.data.prepared).special, ends=(7,))
    more = dataclasses.replace(opened, encoder=Encoder(opened.tokenizer, opened.encoder.template, new, data))
    text = CheckpointText("old", opened.tokenizer, opened.encoder, recorded=True)
    check_same_text(text, more, allow_other_template=False)
    with pytest.raises(UserError, match=r"different tokens that end a response \(\[2, 3, 4\] and \[2, 3, 7\]\)"):
        four = dataclasses.replace(new, ends=(4,))
        check_same_text(text._replace(encoder=Encoder(opened.tokenizer, opened.encoder.template, four, data)), more,
                        allow_other_template=False)  # fmt: skip

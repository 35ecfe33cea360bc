"""What a checkpoint records about text and decoding travels to its export and back, and is compared with prepared data."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers as huggingface

import jaxblock
from jaxblock.cli import config_of, parse
from jaxblock.commands import decode
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.data.config import DataConfig
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.data.store.same_text import CheckpointText, check_same_text
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import EarlierVersionWarning, UserError
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import Lora, adapter_table, attach
from jaxblock.training import weights
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.run_folder import open_run
from jaxblock.training.resume import check_resume
from jaxblock.training.stored_text import template_for_others
from tests.huggingface import breaking
from tests.huggingface.breaking import Break
from tests.models.networks import random_params

SPECIAL = ("<|mask|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|pad|>", "<|start|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def _adapted(model: jaxblock.Model, **changes: Any) -> jaxblock.Model:
    """Returns the model with adapters on one matrix, and with other fields changed."""
    lora = Lora(2, 4.0, 0.0, ("blocks/q",))
    adapters = jax.device_put(random_params(adapter_table(registry.param_table(model.arch), lora)))
    net = dataclasses.replace(model.net, lora=lora)
    return dataclasses.replace(model, net=net, params=attach(model.params, adapters), **changes)


@pytest.fixture
def model(tiny_run: Path) -> jaxblock.Model:
    """Returns the tiny run with other settings than the defaults everywhere, and with adapters."""
    found = jaxblock.load(tiny_run)
    own = found.encoder
    special = dataclasses.replace(own.special, ends=(7,))
    asked = dataclasses.replace(own.config, prompt_template="Sum: {prompt}", system="1")
    return _adapted(
        found,
        encoder=Encoder(own.tokenizer, own.template, special, asked),
        stop_ids=special.stop_ids,
        canvas=dataclasses.replace(found.canvas, suffix_window=8),
        decode_defaults=dataclasses.replace(found.decode_defaults, rule="factor", factor=1.5),
    )


def test_an_export_is_loaded_as_what_was_trained(model, tiny_export, tmp_path):
    model.save(tmp_path / "merged")
    model.save_adapter(tmp_path / "alone")
    jaxblock.load(tmp_path / "merged").save(tmp_path / "again")
    want = model.decode([[5, 6, 7]])
    for name in ("merged", "alone", "again"):
        found = jaxblock.load(tmp_path / name, **({"base": tiny_export} if name == "alone" else {}))
        for field in ("canvas", "decode_defaults", "stop_ids"):
            assert getattr(found, field) == getattr(model, field)
        assert (found.encoder.special, found.encoder.template) == (model.encoder.special, model.encoder.template)
        assert found.encoder.prompt("1+1?") == model.encoder.prompt("1+1?")
        if name != "merged":
            np.testing.assert_array_equal(found.decode([[5, 6, 7]]), want)
        settings = config_of(parse("decode", ["--checkpoint", str(tmp_path / name), "--decode.factor", "2"]))
        assert settings.canvas == model.canvas and settings.decode.rule == "factor"
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert set(model.stop_ids) <= set(generation["eos_token_id"]) and generation["jaxblock"]["format"] == 1
    # Other libraries give the template no `eot_token`, and the other tokens as the tokenizer's own settings have them: none here.
    alone = dataclasses.replace(model.encoder.template, source=template_for_others(model.encoder), tokens={})
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert alone.render(turns, True) == model.encoder.template.render(turns, True)


def _changed(path: str, value: Any = None) -> Break:
    """Returns a function that changes a value in generation_config.json; None takes it out."""

    def edit(content: dict[str, Any]) -> None:
        *outer, name = path.split(".")
        for key in outer:
            content = content[key]
        content[name] = value
        if value is None:
            del content[name]

    return breaking.change("generation_config.json", edit)


def _replaced(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


DAMAGES: dict[str, tuple[Break, str]] = {
    "tokenizer": (
        lambda f: shutil.copy(f.parent / "other/tokenizer/tokenizer.model", f),
        r"tokenizer.model is not the tokenizer that .* trained with.*take 'jaxblock' out",
    ),
    "template": (_replaced("template.jinja", "{{ messages }}"), "/template.jinja is not the template"),
    "template of others": (_replaced("chat_template.jinja", "x"), "chat_template.jinja is not the template"),
    "end of others": (_changed("eos_token_id", [[2]]), r"eos_token_id \[\[2\]\], but jaxblock in it 1 and"),
    "mask of others": (_changed("mask_token_id", []), r"mask_token_id \[\] and"),
    "mask": (_changed("jaxblock.text.special.mask", 5), "config.json calls 1 the mask token"),
    "format": (_changed("jaxblock.format", 9), "has the format 9, not 1"),
    "canvas": (_changed("jaxblock.canvas.block", "4"), r"canvas.block must be int, not '4'"),
    "sizes": (_changed("jaxblock.canvas.block", 5), r"\(jaxblock\): canvas.block 5 does not divide"),
    "no text": (_changed("jaxblock.text"), "is not what an export writes"),
    "no special": (_changed("jaxblock.text.special"), "is not what an export writes"),
    "an id": (_changed("jaxblock.text.special.eot", 10**9), "not all ids below"),
    "a word": (_changed("jaxblock.text.special.eot", "x"), "a special id is no number"),
    "prompt": (_changed("jaxblock.text.prompt_template", "x"), r"has no \{prompt\}"),
}


@pytest.fixture(scope="module")
def others(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepares the same records with another tokenizer of the same size (`tokens`), and with another template (`template`)."""
    folder, config = tmp_path_factory.mktemp("others"), load_config(str(tiny_config))
    size = open_prepared(config.data.prepared).manifest.vocab_size
    template = folder / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content + eot_token }}{% endfor %}")
    changes = {
        "tokens": {"tokenizer_type": "unigram", "vocab_size": size},
        "template": {"tokenizer": config.data.prepared, "template": str(template)},
    }
    for name, changed in changes.items():
        prepare(dataclasses.replace(config.data, prepared=str(folder / name), **changed), config.canvas)
    return folder


@pytest.mark.parametrize("case", DAMAGES)
def test_an_export_whose_files_were_replaced_is_refused(tiny_export, others, tmp_path, case):
    change, message = DAMAGES[case]
    (tmp_path / "other").symlink_to(others / "tokens")
    change(shutil.copytree(tiny_export, tmp_path / "hf"))
    with pytest.raises(UserError, match=message):
        jaxblock.load(tmp_path / "hf")


@pytest.mark.parametrize("made", ["run", "export"])
@pytest.mark.parametrize("name", ["tokens", "template"])
def test_other_tokens_than_the_checkpoint_s_are_refused(
    tiny_config, tiny_run, tiny_export, others, tmp_path, ran, made, name
):
    """By train and by evaluate, which name both folders; another template may be asked for, another tokenizer may not."""
    source, data, out = {"run": tiny_run, "export": tiny_export}[made], others / name, tmp_path / "out"
    common = f"--config {tiny_config} --data.prepared {data}"
    different = "different tokenizers" if name == "tokens" else "different chat templates ('plain' and "
    for verb in (f"train --model.init_from {source} --train.out {out}", f"evaluate --checkpoint {source} --out {out}"):
        told = ran(f"{verb} {common}", 2).err
        assert f"{source} and {data} have {different}" in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    allowed = dataclasses.replace(load_config(str(tiny_config)).data, allow_other_template=True)
    config = Config(model=ModelConfig(init_from=str(source)), data=allowed)
    refused = pytest.raises(UserError, match=different) if name == "tokens" else contextlib.nullcontext()
    with refused:
        assert weights.architecture(config, open_prepared(str(data)), None).d_model == 16


def test_decode_puts_prompts_into_the_text_that_was_trained(tiny_run, ran):
    told = ran(f"decode --data.prompt_template {{prompt}}9 1+1? --checkpoint {tiny_run}", 2).err
    assert f"data.prompt_template is '{{prompt}}9', but {tiny_run} was trained with '{{prompt}}'" in told
    own = open_run(tiny_run).prepared.encoder
    changed = decode.with_prompt_settings(own, DataConfig(prompt_template="{prompt}9"), "other", recorded=False)
    assert changed.prompt("1+1?") == own.prompt("1+1?9")


def test_a_resumed_run_keeps_its_tokens(tiny_run, others):
    """Even where the settings and inputs are the same, as after an update of the library that trains the tokenizer."""
    run = open_run(tiny_run)
    same = dataclasses.replace(open_prepared(others / "tokens"), manifest=run.manifest)
    refused = pytest.raises(UserError, match="have different tokenizers")
    with contextlib.closing(CheckpointReader(tiny_run)) as checkpoints, refused:
        check_resume(run.config, tiny_run, checkpoints, 120, same)


def _start(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> None:
    """Makes a folder of an autoregressive network with a tokenizer whose template ends a turn by <|end|>."""
    tokens = ["<unk>", "user", "assistant", "a", "b", *SPECIAL]
    tokenizer = huggingface.Tokenizer(
        huggingface.models.WordLevel({text: i for i, text in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = huggingface.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    arch = Architecture("llama", 32, 16, 2, 2, 2, 8, 32, 1e-5, 1e4, 64, True, None, 6, 6, "shifted")
    save_checkpoint(folder, arch, random_params(registry.param_table(arch)))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    breaking.change(
        "config.json", lambda content: [content.pop(name, None) for name in ("pad_token_id", "eos_token_id")], **config
    )(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _prepared(folder: Path, source: Path, **mask: Any) -> tuple[Prepared, Architecture]:
    """Prepares one record with a start's tokenizer; returns it, and the architecture of a run on it that begins there."""
    rows = folder.with_suffix(".jsonl")
    rows.write_text('{"question": "a", "answer": "b"}')
    files = dict(prepared=str(folder), train=str(rows), test=None, validation_records=0)
    data = DataConfig(**files, tokenizer=str(source), template="tokenizer", **mask)
    prepare(data, CanvasConfig(prompt_len=16, response_len=8))
    found = open_prepared(folder)
    return found, weights.architecture(Config(data=data, model=ModelConfig(init_from=str(source))), found, None)


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
def test_all_ids_of_a_start_are_kept(tmp_path, config, generation, stop_ids):
    """From the files of an autoregressive start to prepared data, the run's network, its export, and back."""
    source, export, adapters = tmp_path / "start", tmp_path / "export", tmp_path / "alone"
    _start(source, config, generation)
    prepared, arch = _prepared(tmp_path / "data", source, mask_token="<|mask|>")
    assert prepared.special.stop_ids == stop_ids and prepared.special.mask == arch.mask_id == 5
    assert _prepared(tmp_path / "grown", source, mask_token="<|new|>", add_mask_token=True)[1].mask_id == 12
    exported, origin = registry.to_hf(arch, "float32"), json.loads((source / "config.json").read_text())
    assert {name: exported.get(name) for name in origin} == origin and exported["mask_token_id"] == 5
    assert ("pad_token_id" in exported) == ("pad_token_id" in origin)
    model = dataclasses.replace(jaxblock.load(source, mask_id=5), encoder=prepared.encoder, recorded=True)
    assert set(model.stop_ids) == {*stop_ids, 7}  # with every known end of a turn, since nothing is recorded
    dataclasses.replace(model, net=dataclasses.replace(model.net, arch=arch), stop_ids=stop_ids).save(export)
    written = json.loads((export / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == set(stop_ids) and generation.items() <= {**written, **generation}.items()
    again = jaxblock.load(export)
    assert (again.stop_ids, again.arch.pad_id, again.arch.eos_id) == (stop_ids, arch.pad_id, arch.eos_id)
    assert again.encoder.special == prepared.special
    # The data may name another end of the sequence, which adapters alone have beside a base that says otherwise.
    special = dataclasses.replace(prepared.special, eos=7, ends=())
    encoder = Encoder(prepared.tokenizer, prepared.encoder.template, special, prepared.encoder.config)
    alone = _adapted(model, encoder=encoder, base=str(source), stop_ids=special.stop_ids)
    net = dataclasses.replace(alone.net, arch=registry.with_end(alone.arch, 7))
    dataclasses.replace(alone, net=net).save_adapter(adapters)
    again = jaxblock.load(adapters)
    assert (again.stop_ids, again.arch.eos_id) == ((9, 7), 7)


def test_folders_of_an_earlier_version_open_with_a_warning(tiny_config, tmp_path):
    """What they could not record is not compared; the same data are not prepared again."""
    config = load_config(str(tiny_config))
    folder = shutil.copytree(config.data.prepared, tmp_path / "data")
    breaking.change("manifest.json", lambda content: content["special"].pop("ends"), format=1)(folder)
    (folder / "files.json").unlink()
    with pytest.warns(EarlierVersionWarning, match="did not record all ids that end a response"):
        opened = open_prepared(folder)
    assert opened.special.ends is None and len(opened.special.stop_ids) == 2
    told: list[str] = []
    data = dataclasses.replace(config.data, prepared=str(folder))
    prepare(data, config.canvas, told.append)
    assert told == [f"already prepared: {folder} holds the same settings and inputs"]

    def encoder(end: int) -> Encoder:
        special = dataclasses.replace(open_prepared(config.data.prepared).special, ends=(end,))
        return Encoder(opened.tokenizer, opened.encoder.template, special, data)

    more = dataclasses.replace(opened, encoder=encoder(7))
    text = CheckpointText("old", opened.tokenizer, opened.encoder, recorded=True)
    check_same_text(text, more, allow_other_template=False)
    with pytest.raises(UserError, match=r"different tokens that end a response \(\[2, 3, 4\] and \[2, 3, 7\]\)"):
        check_same_text(text._replace(encoder=encoder(4)), more, allow_other_template=False)

"""What a checkpoint records about text and decoding travels to its export and back, and is compared with prepared data."""

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
from jaxblock.cli import config_of, parse
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
    """Returns the model with adapters on one matrix."""
    lora = Lora(2, 4.0, 0.0, ("blocks/q",))
    adapters = init_params(adapter_table(registry.param_table(model.arch), lora), 3, np.float32)
    net = dataclasses.replace(model.net, lora=lora)
    return dataclasses.replace(model, net=net, params=attach(model.params, adapters))


@pytest.fixture
def model(tiny_run: Path) -> jaxblock.Model:
    """Returns the tiny run with other settings than the defaults everywhere, and with adapters."""
    found = _adapted(jaxblock.load(tiny_run))
    asked = dataclasses.replace(found.encoder.config, prompt_template="Sum: {prompt}", system="1")
    special = dataclasses.replace(found.encoder.special, ends=(7,))
    return dataclasses.replace(
        found,
        encoder=Encoder(found.encoder.tokenizer, found.encoder.template, special, asked),
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
        command = ["--checkpoint", str(tmp_path / name), "--decode.factor", "2"]
        settings = config_of(parse("decode", command))
        assert settings.canvas == model.canvas and settings.decode.rule == "factor"
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert set(model.stop_ids) <= set(generation["eos_token_id"]) and generation["jaxblock"]["format"] == 1


def test_other_libraries_render_the_template_that_was_trained(model):
    """They give it no `eot_token`, and the other tokens as the tokenizer's own settings have them: none here."""
    alone = dataclasses.replace(model.encoder.template, source=template_for_others(model.encoder), tokens={})
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert alone.render(turns, True) == model.encoder.template.render(turns, True)


def _block(**changes: Any) -> Callable[[Path], object]:
    """Returns a function that changes the block of ours in generation_config.json; None takes a value out."""

    def change(folder: Path) -> None:
        path = folder / "generation_config.json"
        content = json.loads(path.read_text())
        for place, value in changes.items():
            *outer, name = place.split("__")
            inside = content["jaxblock"]
            for key in outer:
                inside = inside[key]
            inside.pop(name) if value is None else inside.update({name: value})
        path.write_text(json.dumps(content))

    return change


def _generation(**changes: Any) -> Callable[[Path], object]:
    """Returns a function that changes what generation_config.json says to other libraries."""

    def change(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _other_tokenizer(folder: Path) -> None:
    shutil.copy(folder.parent / "other" / "tokenizer" / "tokenizer.model", folder)


DAMAGES = {
    "tokenizer": (_other_tokenizer, r"tokenizer.model is not the tokenizer that .* trained with .*take 'jaxblock' out"),
    "template": (lambda f: (f / "template.jinja").write_text("{{ messages }}"), "template.jinja is not the template"),
    "template of others": (
        lambda f: (f / "chat_template.jinja").write_text("x"),
        "chat_template.jinja is not the template",
    ),
    "end of others": (_generation(eos_token_id=[[2]]), r"eos_token_id \[\[2\]\], but jaxblock in it 1 and"),
    "mask of others": (_generation(mask_token_id=[]), r"mask_token_id \[\] and"),
    "mask": (_block(text__special__mask=5), "config.json calls 1 the mask token"),
    "format": (_block(format=9), "has the format 9, not 1"),
    "canvas": (_block(canvas__block="4"), r"canvas.block must be int, not '4'"),
    "sizes": (_block(canvas__block=5), r"\(jaxblock\): canvas.block 5 does not divide"),
    "no text": (_block(text=None), "is not what an export writes"),
    "no special": (_block(text__special=None), "is not what an export writes"),
    "an id": (_block(text__special__eot=10**9), "not all ids below"),
    "a word": (_block(text__special__eot="x"), "a special id is no number"),
    "prompt": (_block(text__prompt_template="x"), r"has no \{prompt\}"),
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
    for name, fields in changes.items():
        prepare(dataclasses.replace(config.data, prepared=str(folder / name), **fields), config.canvas)
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
    config = load_config(str(tiny_config))
    allowed = dataclasses.replace(config.data, allow_other_template=True)
    config = dataclasses.replace(config, model=ModelConfig(init_from=str(source)), data=allowed)
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
def test_all_ids_of_a_start_are_kept(tmp_path, config, generation, stop_ids):
    """From the files of an autoregressive start to prepared data, the run's network, its export, and back."""
    source = tmp_path / "start"
    _start(source, config, generation)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}')
    canvas = CanvasConfig(prompt_len=16, response_len=8)
    data = DataConfig(
        prepared=str(tmp_path / "data"), train=str(tmp_path / "rows.jsonl"), test=None, validation_records=0,
        tokenizer=str(source), template="tokenizer", mask_token="<|mask|>",
    )  # fmt: skip
    grown = dataclasses.replace(data, prepared=str(tmp_path / "grown"), mask_token="<|new|>", add_mask_token=True)
    started, masks = [], []
    for one in (data, grown):
        prepare(one, canvas)
        started.append(open_prepared(one.prepared))
        found = weights.architecture(Config(data=one, model=ModelConfig(init_from=str(source))), started[-1], None)
        masks.append(found.mask_id)
        arch = arch if one is grown else found
    prepared = started[0]
    assert prepared.special.stop_ids == stop_ids and prepared.special.mask == 5 and masks == [5, 12]
    exported, origin = registry.to_hf(arch, "float32"), json.loads((source / "config.json").read_text())
    assert {name: exported.get(name) for name in origin} == origin and exported["mask_token_id"] == 5
    assert ("pad_token_id" in exported) == ("pad_token_id" in origin)
    model = dataclasses.replace(jaxblock.load(source, mask_id=5), encoder=prepared.encoder, recorded=True)
    assert set(model.stop_ids) == {*stop_ids, 7}  # with every known end of a turn, since nothing is recorded
    dataclasses.replace(model, net=dataclasses.replace(model.net, arch=arch), stop_ids=stop_ids).save(
        tmp_path / "export"
    )
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == set(stop_ids) and generation.items() <= {**written, **generation}.items()
    again = jaxblock.load(tmp_path / "export")
    assert (again.stop_ids, again.arch.pad_id, again.arch.eos_id) == (stop_ids, arch.pad_id, arch.eos_id)
    assert again.encoder.special == prepared.special
    # The data may name another end of the sequence, which adapters alone have beside a base that says otherwise.
    special = dataclasses.replace(prepared.special, eos=7, ends=())
    alone = _adapted(
        dataclasses.replace(model, encoder=Encoder(prepared.tokenizer, prepared.encoder.template, special, data))
    )
    net = dataclasses.replace(alone.net, arch=registry.with_end(alone.arch, 7))
    dataclasses.replace(alone, base=str(source), stop_ids=special.stop_ids, net=net).save_adapter(tmp_path / "alone")
    again = jaxblock.load(tmp_path / "alone")
    assert (again.stop_ids, again.arch.eos_id) == ((9, 7), 7)


def test_folders_of_an_earlier_version_open_with_a_warning(tiny_config, tmp_path):
    """What they could not record is not compared; the same data are not prepared again."""
    config = load_config(str(tiny_config))
    data = dataclasses.replace(config.data, prepared=str(tmp_path / "data"))
    path = shutil.copytree(config.data.prepared, data.prepared) + "/manifest.json"
    manifest = json.loads(Path(path).read_text())
    del manifest["special"]["ends"]
    Path(path).write_text(json.dumps({**manifest, "format": 1}))
    (tmp_path / "data" / "files.json").unlink()
    with pytest.warns(EarlierVersionWarning, match="did not record all ids that end a response"):
        opened = open_prepared(data.prepared)
    assert opened.special.ends is None and len(opened.special.stop_ids) == 2
    told: list[str] = []
    prepare(data, config.canvas, told.append)
    assert told == [f"already prepared: {data.prepared} holds the same settings and inputs"]

    def encoder(end: int) -> Encoder:
        special = dataclasses.replace(open_prepared(config.data.prepared).special, ends=(end,))
        return Encoder(opened.tokenizer, opened.encoder.template, special, data)

    more = dataclasses.replace(opened, encoder=encoder(7))
    text = CheckpointText("old", opened.tokenizer, opened.encoder, recorded=True)
    check_same_text(text, more, allow_other_template=False)
    with pytest.raises(UserError, match=r"different tokens that end a response \(\[2, 3, 4\] and \[2, 3, 7\]\)"):
        check_same_text(text._replace(encoder=encoder(4)), more, allow_other_template=False)

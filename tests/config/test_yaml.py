"""Config files: what is mistyped or of the wrong type gets an error that says what to set."""

import pytest

from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree, load_config, to_yaml, with_fields
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", "unknown key trian; did you mean train?"),
        ("train: {step: 3}", "unknown key train.step; did you mean steps?"),
        ("train: {batchsize: 3}", "unknown key train.batchsize; did you mean batch_size?"),
        ("canvas: {zzz: 3}", "unknown key canvas.zzz; known keys: prompt_len, response_len, block"),
        (
            "method: {law: exact_counts}",
            "method.law is 'exact_counts'; did you mean exact_count?; choose from exact_count,",
        ),
        ("train: {resume: no}", "train.resume is False"),  # YAML 1.1's no
        ("train: {steps: many}", "train.steps must be int, not 'many'"),
        ("train: {steps: 3.5}", "train.steps must be int, not 3.5"),
        ("train: {steps: true}", "train.steps must be int, not True"),
        ("train: {debug: 1}", "train.debug must be bool, not 1"),
        ("optimizer: {lr: fast}", "optimizer.lr must be float, not 'fast'"),
        ("decode: {stop_ids: 3}", "decode.stop_ids must be a list of int, not 3"),
        ("decode: {stop_ids: [a]}", "decode.stop_ids must be int, not 'a'"),
        ("train: {profile: []}", "train.profile must be a list of 2 int, not []"),
        ("train: 3", "train must be a mapping of keys, not 3"),
        ("train: 0", "train must be a mapping of keys, not 0"),
        ("- train", "the file must be a mapping of keys"),
        ("train: {steps: 1, steps: 2}", "the key 'steps' is there twice"),
        ("train: {steps: 1}\ntrain: {seed: 2}", "the key 'train' is there twice"),
        ("train: {steps: 1", "not valid YAML"),
        ("train:\n\tsteps: 1", "not valid YAML"),
        ("train: {? [a, b]: 1}", "a key must be one word"),
        ("train: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ('train: {steps: !!int "abc"}', "not valid YAML: invalid literal"),
        ("train: {steps: !!timestamp x}", "not valid YAML"),
        ("[" * 100_000, "not valid YAML: lists or mappings are nested too deeply"),
        (f"optimizer: {{lr: 1{'0' * 400}}}", "optimizer.lr must be float, not 1000"),
        (f"train: {{steps: 0x{'f' * 9000}}}", "train.steps is a number of 36,000 bits: it must be at most"),
        ('"\\e[31mtrain": 1', "unknown key \\x1b[31mtrain; did you mean train?"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntrain: {out: [*c, *c]}", "unknown key a"),
        ("train: {out: " + "[" * 50 + "]" * 50 + "}", "train.out must be str, not [[[[...]]]]"),
        ("#" * 300_000, "300,000 bytes are too many for a file of settings"),
        (
            "a: &a {x: 1}\n"
            + "".join(f"{v}: &{v} {{<<: [{f'*{u},' * 9}]}}\n" for u, v in zip("abcd", "bcde", strict=True)),
            "more than 1000",
        ),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        check_config(load_config(str(path)))
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or " bits" in message  # checks of values do not know the file


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"data: {train: caf\xe9}")
    with pytest.raises(UserError, match="latin.yaml: not valid YAML"):
        load_config(str(tmp_path / "latin.yaml"))


def test_values_as_people_write_them(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "optimizer: {lr: 1e-3, b1: 0, clip_norm: 2}\n"  # YAML reads 1e-3 as text, 0 and 2 as integers
        "evaluate: {problems: None, nelbo_rows: null}\n"
        "decode: {stop_ids: [1, 2]}\n"
        "train:\n"
    )
    found = load_config(str(path))
    assert (found.optimizer.lr, found.optimizer.b1, found.optimizer.clip_norm) == (1e-3, 0.0, 2.0)
    assert isinstance(found.optimizer.clip_norm, float)
    assert (found.evaluate.problems, found.evaluate.nelbo_rows, found.decode.stop_ids) == (None, None, (1, 2))
    assert found.train == Config().train
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(str(tmp_path / "empty.yaml")) == Config() == load_config(None)


def test_what_is_written_is_read_back(tmp_path):
    config = config_from_tree({"decode": {"stop_ids": [4, 5]}, "data": {"system": "Be: brief"}}, "here")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_fields_can_be_replaced_by_name():
    found = with_fields(DecodeConfig(seed=3), {"stop_ids": [1], "temperature": 1}, "decode")
    assert found == DecodeConfig(seed=3, stop_ids=(1,), temperature=1.0)
    with pytest.raises(UserError, match="unknown key temprature; did you mean temperature?"):
        with_fields(DecodeConfig(), {"temprature": 1}, "decode")

"""Settings from files: what is mistyped, impossible or without effect gets an error that says what to set."""

import pytest
import yaml

from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.presets import presets
from jaxblock.config.yaml import config_from_tree, load_config
from jaxblock.errors import UserError

# What stands in a file, and what the message says.
MISTAKES = r"""
trian: {steps: 3} | unknown key trian; did you mean train?
train: {step: 3} | unknown key train.step; did you mean steps?
train: {batchsize: 3} | unknown key train.batchsize; did you mean batch_size?
train: {lr: 3} | unknown key train.lr; did you mean optimizer.lr?
decode: {block: 3, prompt_len: 3} | unknown key decode.prompt_len; did you mean canvas.prompt_len?
canvas: {zzz: 3} | unknown key canvas.zzz; known keys: prompt_len, response_len, block
data: {sample_packing: 1} | data.sample_packing: rows are not packed here: one canvas holds one prompt and its response
data: {group_texts: 1} | data.group_texts: rows are not packed here: one canvas holds one prompt and its response
model: {scan_layers: 1} | choose from auto, true, false
method: {law: exact_counts} | method.law is 'exact_counts'; did you mean exact_count?; choose from exact_
train: {resume: no} | train.resume: YAML reads no, off and false as false; write it in quotes, as one of
data: {prepared: yes} | data.prepared must be a text, and YAML reads yes, no, on and off as true and false
data: {seed: 010} | YAML reads 010 as another number
optimizer: {lr: 1:30.5} | YAML reads 1:30.5 as another number
train: {steps: many} | train.steps must be int, not 'many'
train: {steps: 3.5} | train.steps must be int, not 3.5
train: {steps: true} | train.steps must be int, not True
train: {debug: 1} | train.debug must be bool, not 1
optimizer: {lr: fast} | optimizer.lr must be float, not 'fast'
decode: {stop_ids: 3} | decode.stop_ids must be a list of int, not 3
decode: {stop_ids: [a]} | decode.stop_ids must be int, not 'a'
train: {profile: []} | train.profile must be a list of 2 int, not []
train: 3 | train must be a mapping of keys, not 3
train: 0 | train must be a mapping of keys, not 0
- train | the file must be a mapping of keys
train: {steps: 1, steps: 2} | the key 'steps' is there twice
{train: {steps: 1}, train: {seed: 2}} | the key 'train' is there twice
train: {steps: 1 | not valid YAML
train: {? [a, b]: 1} | a key must be one word
train: 2001-99-99 | not valid YAML: month must be in 1..12
train: {steps: !!int "abc"} | not valid YAML: invalid literal
train: {steps: !!timestamp x} | not valid YAML
data: {train: café} | config.yaml: not valid YAML
"\e[31mtrain": 1 | unknown key \x1b[31mtrain; did you mean train?
{a: &a [x, x], b: &b [*a, *a], c: &c [*b, *b], train: {out: [*c, *c]}} | unknown key a
"""
# Each mapping merges nine copies of the one before it.
MERGED = "a: &a {x: 1}\n" + "".join(f"{v}: &{v} {{<<: [{f'*{u},' * 9}]}}\n" for u, v in ("ab", "bc", "cd", "de"))
LONG_MISTAKES = [
    ("train:\n\tsteps: 1", "not valid YAML"),
    ("[" * 20_000, "not valid YAML: lists or mappings are nested too deeply"),
    (f"optimizer: {{lr: 1{'0' * 400}}}", "optimizer.lr must be float, not 1000"),
    (f"train: {{steps: 0x{'f' * 9000}}}", "train.steps is a number of 36,000 bits: it must be at most"),
    ("train: {out: " + "[" * 50 + "]" * 50 + "}", "train.out must be str, not [[[[...]]]]"),
    ("#" * 300_000, "300,000 bytes are too many for a file of settings"),
    (MERGED, "more than 1000"),
]


@pytest.mark.parametrize(
    ("text", "message"), [line.split(" | ") for line in MISTAKES.strip().splitlines()] + LONG_MISTAKES
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        check_config(load_config(str(path)))
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or " bits" in message  # checks of values do not know the file


IMPOSSIBLE = r"""
canvas: {block: 7} | block 7 does not divide canvas.response_len 32: set block to 8 or response_len to 35
canvas: {block: 64} | canvas.block 64 is longer than canvas.response_len 32
canvas: {prompt_len: 4090} | is longer than model.max_len 4096
canvas: {suffix_window: 4, context: paper} | canvas.context
method: {law: antithetic} | set method.draws to 2
method: {objective: classical, draws: 2} | classical SFT has one block, the whole response, so that more than 1
method: {objective: classical, law: antithetic, draws: 4} | set it to 2
method: {draws: 5} | method.draws is 5, but a response has 4 blocks at most
method: {objective: classical, prefix_mask_rate: 0.5} | method.prefix_mask_rate and method.suffix_mask_prob have no effect
method: {objective: classical, suffix_mask_prob: 0.5} | method.suffix_mask_prob have no effect on classical
{canvas: {suffix_window: 4}, method: {objective: classical}} | set canvas.suffix_window to null, or method.objective
method: {law: antithetic, draws: 2, rate_floor: 0.5} | method.rate_floor has no place in law antithetic
method: {law: floored_bernoulli, rate_floor: 0.5} | no place in law floored_bernoulli: it has the floor of
model: {d_model: 30} | model.d_model 30 must split into model.n_heads 4 heads of an even size
model: {n_kv_heads: 3} | must be a multiple of model.n_kv_heads 3
optimizer: {warmup_steps: 2000} | optimizer.warmup_steps 2000 is more than train.steps 1000
train: {steps: 30} | would never reach its peak. Set optimizer.warmup_steps to 3
optimizer: {warmup: log} | optimizer.warmup is log, which only the schedule deepspeed_cosine knows
optimizer: {scheduler_steps: after_update} | (cosine now) to deepspeed_cosine
optimizer: {warmup_floor: 0.1, schedule: linear} | optimizer.warmup_floor is 0.1, which only
optimizer: {name: adafactor, b1: 0, moments: int8} | keeps no moments
train: {data_parallel: 0} | train.data_parallel is 0
decode: {rule: factor, quota: dream} | under decode.rule factor: set quota to even, or rule to low_
decode: {rule: random, alg_temp: 1} | decode.alg_temp 1.0 has no effect under decode.rule random
decode: {threshold: 0.5} | set threshold to 0.9, or rule to confidence_threshold
decode: {factor_rule: v1} | decode.factor_rule v1 has no effect under decode.rule low_confidence
decode: {rule: entropy, eps: 0.01} | decode.eps 0.01 has no effect without Dream's time grid
decode: {top_p: 0.9, top_k: 5} | decode.top_p and decode.top_k cannot change the best token
decode: {rule: origin, top_k: 5} | set decode.temperature above 0, top_k to null
decode: {rule: origin, eos_suppression: confidence} | confidence has no effect under decode.rule orig
decode: {stop_ids: [3, -1]} | decode.stop_ids is (3, -1): it must be 0 or more
train: {out: "a\0b"} | train.out is 'a\x00b': it holds a character that no text has
data: {system: "\ud800"} | data.system is '\ud800': it holds a character that no text has
"""
"""Settings, and what the message says. Each would otherwise give NaN, hang, have no effect, or be read as another number."""
OUT_OF_RANGE = """
it must be at least 1 | train.steps=0 train.fsdp=0 decode.steps_per_block=0 decode.top_k=0 evaluate.problems=0 evaluate.nelbo_rows=0
it must be 0 or more | optimizer.warmup_steps=-1 train.seed=-1
it must be above 0 | optimizer.lr=0.0 model.rope_theta=0.0 lora.alpha=-1.0
it must be above 0, at most 1 | decode.threshold=0.0 decode.top_p=0.0
it must be above 0 and below 1 | decode.eps=1.0 model.norm_eps=-1e-05
it must be at least 0 and below 1 | method.rate_floor=1.0 optimizer.b2=1.0
it is a probability, from 0 to 1 | method.prefix_mask_rate=1.5
it is a share, from 0 to 1 | optimizer.final_ratio=2.0
it must be from 0 to 1,000 | decode.temperature=-0.1 decode.cfg_scale=1e+30
it must be from 0 to 1,024 | train.loader_workers=1000000
it must be from 0 to 100,000,000 | train.watchdog_seconds=1e+30
it must be from 1 to 10,000 | model.n_layers=0 model.n_layers=2000000000
it must be from 1 to 65,536 | model.n_heads=0 method.draws=0
it must be from 1 to 16,777,216 | canvas.block=0 canvas.prompt_len=-1 decode.block=-8
it must be at most 2,147,483,647 | decode.seed=1099511627776
it must be a finite number | model.rope_theta=nan model.init_std=inf optimizer.lr=inf optimizer.clip_norm=nan decode.temperature=-inf
its size must be from 1.2e-38 to 3.4e+38 | optimizer.eps=1e-300 optimizer.weight_decay=1e+39
"""


@pytest.mark.parametrize("case", IMPOSSIBLE.strip().splitlines())
def test_impossible_values_are_refused(case):
    text, message = case.split(" | ")
    with pytest.raises(UserError) as caught:
        check_config(config_from_tree(yaml.safe_load(text), "here"))
    assert message in str(caught.value)


@pytest.mark.parametrize(("says", "values"), [line.split(" | ") for line in OUT_OF_RANGE.strip().splitlines()])
def test_numbers_out_of_range_are_refused(says, values):
    for name, value in (one.split("=") for one in values.split()):
        section, field = name.split(".")
        with pytest.raises(UserError) as caught:
            check_config(config_from_tree({section: {field: yaml.safe_load(value)}}, "here"))
        assert f"{name} is {value}: {says}" in str(caught.value)


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
    path.write_text("# nothing yet\n")
    assert load_config(str(path)) == Config() == load_config(None)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "confidence_threshold", "threshold": 0.5, "temperature": 1, "top_p": 0.9},
        {"rule": "factor", "factor": 2, "factor_rule": "v1", "eos_suppression": "confidence"},
        {"rule": "entropy", "quota": "dream", "eps": 0.01, "alg_temp": 0.5, "top_p": 0.9, "top_k": 5},
        {"rule": "origin", "eps": 0.01, "temperature": 1, "top_k": 5, "eos_suppression": "logits"},
        {"rule": "low_confidence", "alg_temp": 0.5, "quota": "dllm_linear", "top_p": 1},
    ],
)
def test_decoding_options_that_fit_together_are_accepted_and_only_the_sections_that_a_verb_uses_are_checked(options):
    config = config_from_tree({"decode": options, "train": {"steps": 10}, "canvas": {"prompt_len": 8000}}, "here")
    assert check_config(config, ["decode", "train", "canvas", "method"]) is config
    with pytest.raises(UserError, match="warmup_steps"):
        check_config(config, ["train", "optimizer"])


def test_a_preset_is_found_by_name_and_what_could_mean_two_things_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = presets()["llada_8b_lora"]
    assert load_config("llada_8b_lora") == load_config(str(preset)) != Config()
    for file in ("llada_8b_lora.yaml", "mine.yaml", "mine"):
        (tmp_path / file).write_text("train: {steps: 3}")
    for file in ("llada_8b_lora.yaml", "./llada_8b_lora.yaml", "mine.yaml", "mine"):
        assert load_config(file).train.steps == 3
    for given, message in {
        "llada_8b_lora": f"for the file give --config ./llada_8b_lora.yaml, for the preset --config {preset}",
        "configs/dream_7b_lora.yaml": "there is no such file. The preset of that name is --config dream_7b_lora",
        "lada_8b_lora": "no preset and no file of that name; did you mean llada_8b_lora?",
        "zzz": "presets: dream_7b_full, dream_7b_lora,",
        "configs/zzz.yaml": "cannot read configs/zzz.yaml",
        "configs/dream_7b_lora": "cannot read configs/dream_7b_lora",
    }.items():
        with pytest.raises(UserError, match=message):
            load_config(given)
    (tmp_path / "llada_8b_lora.yaml").unlink()
    (tmp_path / "llada_8b_lora.yaml").symlink_to(preset)
    assert load_config("llada_8b_lora") == load_config(str(preset))


def test_presets_are_listed_and_printed(ran):
    listed = ran("presets").out
    assert [line for line in listed.splitlines() if line[0] != " "] == list(presets())
    assert "    Fine-tunes the classically pre-trained model of the quickstart by Blockwise SFT.\n" in listed
    assert all(len(line) <= 100 for line in listed.splitlines()) and "docs/benchmarks.md" not in listed
    assert ran("presets smollm2_lora").out == presets()["smollm2_lora"].read_text()
    assert "there is no preset 'smollm'; did you mean smollm2_lora?" in ran("presets smollm", 2).err

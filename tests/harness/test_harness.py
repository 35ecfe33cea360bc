"""Runs tasks of lm-evaluation-harness on a tiny model: the verb agrees with ``evaluate``, and likelihoods with an enumeration."""

import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxblock
from jaxblock import loading
from jaxblock.errors import UserError
from jaxblock.evaluation.graders import gsm8k_strict
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.versions import running_versions

pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from jaxblock.harness import bounds
from jaxblock.harness import tasks as harness_tasks
from jaxblock.harness.gen_kwargs import read_gen_kwargs
from jaxblock.harness.language_model import HarnessModel
from jaxblock.harness.tasks import all_tasks, asks_for_greedy, load_tasks

pytestmark = pytest.mark.slow  # the fast tests' environment lacks the extra
PAGE = (Path(__file__).parents[2] / "docs" / "harness.md").read_text(encoding="utf-8")
(OUR_TASK,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
DATA = """\
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
fewshot_split: train
test_split: test
metadata: {{version: 1}}
"""
TASKS = {
    "sums": "output_type: generate_until\n" + OUR_TASK.partition("test_split: test\n")[2],
    "choose": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{ [question[:3] + '=1', '=+###?=', question[:3] + '=1'] }}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


def _write_tasks(folder, records, tasks):
    """Writes task files that read the records of a folder."""
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{DATA.format(folder=records)}{text}")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Lets the verbs use one device, for which the other tests compile the same programs, and not read lm-eval's own tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_all_devices", lambda arch, train: None)
        patch.setattr(harness_tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def tasks(tiny_config, tmp_path_factory):
    """Returns a folder of task files on the records of the tiny experiment."""
    folder = tmp_path_factory.mktemp("tasks")
    _write_tasks(folder, tiny_config.parent, TASKS)
    return folder


@pytest.fixture(scope="module")
def lm(model):
    return HarnessModel(model, nelbo_samples=15, not_greedy=["t"])


def _asked(kind, *requests, task="t", repeats=1):
    """Returns requests of one kind, each given as (document, index, arguments)."""
    return [Instance(kind, {}, arguments, index, (task, document, repeats)) for document, index, arguments in requests]


def _scored(lm, *requests, **options):
    """Returns (log-likelihood, whether it is the greedy answer) of texts, each given as (document, index, (prompt, text))."""
    return lm.loglikelihood(_asked("loglikelihood", *requests, **options))


def _enumerated(model, prompt, response):
    """Returns the NELBO of the first tokens of a response, set by set, from the logits of the whole canvas."""
    total, mask, size = 0.0, model.arch.mask_id, model.canvas.block
    for first in range(0, len(response), size):
        block = response[first : first + size]
        sets = [s for n in range(1, len(block) + 1) for s in itertools.combinations(range(len(block)), n)]
        end = len(prompt) + model.canvas.response_len
        rows = np.full((15, 40), mask)  # one shape, so that one program is compiled
        rows[:, : len(prompt)], rows[:, len(prompt) :][:, :first] = prompt, response[:first]
        for row, hidden in zip(rows, sets, strict=False):
            row[len(prompt) + first :][: len(block)] = [mask if i in hidden else t for i, t in enumerate(block)]
        logits = model.logits(rows, np.broadcast_to(np.arange(40) < end, rows.shape)).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, hidden in zip(log_p, sets, strict=False):
            nll = -sum(row[len(prompt) + first + i, block[i]] for i in hidden)
            total += nll / len(hidden) / math.comb(len(block), len(hidden))
    return total


def _exact(model, prompt, text):
    """Returns the enumerated NELBO of a text after a prompt, which the tokenizer sees together."""
    start, whole = len(model.tokenizer.encode(prompt)), model.tokenizer.encode(prompt + text)
    return _enumerated(model, whole[:start], whole[start:])


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_verb_agrees_with_evaluate_and_keeps_the_errors_of_likelihoods(tiny_run, tasks, ran, tmp_path):
    flags = f"--checkpoint {tiny_run} --include_path {tasks} --apply_chat_template --out {tmp_path}/found"
    said = ran(f"harness {flags} --tasks sums,choose --limit 6 --nelbo_samples 3")
    assert "|sums" in said.out and "|Tasks|" in said.out.replace(" ", "") and "exact_match" in said.out
    assert "18 texts scored, 0 exactly, 18 by random masks" in said.out and "6 answers" in said.out
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert results["results"]["choose"]["acc,none"] == 1.0 and results["config"]["checkpoint"] == str(tiny_run)
    assert results["git_hash"] == running_versions().get("commit")
    sums, choose = (_lines(tmp_path / "found" / f"samples_{task}.jsonl") for task in ("sums", "choose"))
    ran(f"evaluate --checkpoint {tiny_run} --out {tmp_path}/scores --evaluate.problems 6 --evaluate.no_nelbo")
    for problem, sample in zip(_lines(tmp_path / "scores" / "problems.jsonl"), sums, strict=True):
        assert (problem["response"], problem["correct"]) == (sample["resps"][0][0], sample["exact_match"] == 1)
        assert problem["nfe"] == sample["jaxblock"][0]["nfe"] and problem["prompt"] == sample["doc"]["question"]
    for sample in choose:
        same, other, again = sample["jaxblock"]
        assert sample["resps"][0][0] == [-same["nelbo"], None] and same["is_greedy"] is None  # no metric asks for it
        assert same["standard_error"] > 0 and other["standard_error"] > 0 and not same["exact"]
        # The first and the last choice are the same text: under the same masks their difference is known exactly.
        assert (again["nelbo"], again["above_best_standard_error"]) == (same["nelbo"], 0.0)
    assert len({sample["jaxblock"][1]["nelbo"] for sample in choose}) == 6
    ran(f"harness {flags} --tasks sums --limit 2", 2)  # the folder exists
    said = ran(f"harness --checkpoint {tiny_run} --tasks {tasks}/sums.yaml --num_fewshot 0 --limit 1").err
    assert "the network was trained on prompts in its chat template" in said


ANSWERS = {
    "so #### 18": "a #### 18", "so #### 18.": "a #### 18", "#### 18.\n": "b #### 18\n", "#### 18": "c #### 18.",
    "#### 1,000": "d #### 1000", "#### 1000": "e #### 1,000", "#### -3": "f #### -3", "#### $18": "g #### 18",
    "no": "h #### 18", "#### 17 #### 18": "i #### 18", "#### 18,": "j #### 18", "#### 18.0": "k #### 18", "18": "l #### 18",
}  # fmt: skip
"""Responses with the reference answer of each: right ones in every form that `evaluate` grades as right, and wrong ones."""


class Scripted(LM):
    """Answers the questions "0", "1", ... with the responses of ``ANSWERS``."""

    loglikelihood = loglikelihood_rolling = NotImplemented

    def generate_until(self, requests, disable_tqdm=False):
        return [list(ANSWERS)[int(request.args[0])] for request in requests]


def test_the_task_of_the_page_grades_as_evaluate_does(tmp_path, monkeypatch):
    (tmp_path / "my_gsm8k.yaml").write_text(OUR_TASK)
    records = [{"question": str(at), "answer": answer} for at, answer in enumerate(ANSWERS.values())]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    found = lm_eval.simple_evaluate(Scripted(), tasks=load_tasks(["my_gsm8k.yaml"], None, allow_code=False))
    ours = [gsm8k_strict(response, answer).correct for response, answer in ANSWERS.items()]
    assert [sample["exact_match"] == 1 for sample in found["samples"]["my_gsm8k"]] == ours
    assert set(ours) == {True, False}


def test_the_snippet_of_the_page_runs(tiny_run, tasks):
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    names = {"manager": TaskManager(include_path=str(tasks))}
    for said, here in {
        '"runs/mine", mesh="all"': repr(str(tiny_run)),
        'tasks=["arc_easy"], limit=100': 'tasks=["choose"], limit=2, task_manager=manager',
        "nelbo_samples=64": "nelbo_samples=3",
        '("arc_easy", 0)': '("choose", 0)',
    }.items():
        assert said in snippet
        snippet = snippet.replace(said, here)
    exec(compile(snippet, "harness.md", "exec"), names)
    assert names["results"]["results"]["choose"]["acc,none"] == 1.0 and len(names["lm"].details.of(("choose", 0))) == 3


def test_likelihoods_are_the_enumeration_of_masked_sets(lm, model):
    texts = ["1", "1+2=3", "no", "1+2=3\n#### 3"]
    found = _scored(lm, *((7, at, ("1+2?", text)) for at, text in enumerate(texts)))
    assert [value for value, _ in found] == pytest.approx([-_exact(model, "1+2?", text) for text in texts], rel=1e-5)
    about = lm.details.of(("t", 7))
    assert [one["exact"] for one in about] == [True] * 4 and not any(one["standard_error"] for one in about)
    # A text of one token takes one forward pass.
    told = []
    _scored(HarnessModel(model, say=told.append, not_greedy=["t"]), (1, 0, ("1+2?", "1")))
    assert told == ["scored 1 of 1 masked sets"]


def test_drawn_masks_are_unbiased_and_belong_to_the_question(model):
    lm, prompt, text = HarnessModel(model, nelbo_samples=4, not_greedy=["t"]), "1+2?", "1+2=3\n##"
    values = np.array([value for value, _ in _scored(lm, *((document, 0, (prompt, text)) for document in range(60)))])
    assert abs(values.mean() + _exact(model, prompt, text)) < 4 * values.std() / math.sqrt(len(values))
    # The error that is told is at least the spread: the draws are stratified, which it does not count on.
    told = np.mean([lm.details.of(("t", document))[0]["standard_error"] for document in range(60)])
    assert values.std() < 1.5 * told < 30 * values.std()
    _scored(lm, (5, 1, (prompt, "1+2=4")), (5, 0, (prompt, "1+2=3")))
    first, second = lm.details.of(("t", 5))
    apart = math.hypot(first["standard_error"], second["standard_error"])
    worse = max(first, second, key=lambda one: one["above_best"])
    assert 0 <= worse["above_best_standard_error"] < apart / 2
    # Choices without their context, which acc_mutual_info asks for, are not among those that are compared.
    _scored(lm, (6, 0, (prompt, "77")), (6, 1, (prompt, "88")), (6, 2, ("", "7")), (6, 3, ("", "8")))
    choices, bare = lm.details.of(("t", 6))[:2], lm.details.of(("t", 6))[2:]
    assert min(one["above_best"] for one in choices) == 0 and not any("above_best" in one for one in bare)


def test_whether_a_text_is_the_greedy_answer(lm, model):
    prompts = ["1+2?", "9?", "3+4?", "5?"]  # as many as a batch holds
    texts = [model.tokenizer.decode(row[:6]) for row in model.decode(list(map(model.tokenizer.encode, prompts)))]
    assert all(len(model.tokenizer.encode(text)) == 6 and "?" not in text for text in texts)
    asked = [(at, 0, (prompts[at], texts[at][:n])) for at in range(4) for n in (1, 6)]
    asked += [(at, 1, (prompts[at], texts[at][:3] + "?")) for at in range(4)]
    hot = HarnessModel(dataclasses.replace(model, decode_defaults=model.options(temperature=5.0)), nelbo_samples=15)
    for one in (lm, hot):
        assert [is_greedy for _, is_greedy in _scored(one, *asked, task="acc")] == [True] * 8 + [False] * 4


def test_whole_texts_are_scored_in_windows(lm, model):
    text, rolling = "1+2=3\n#### 3", "loglikelihood_rolling"
    (rolled,) = lm.loglikelihood_rolling(_asked(rolling, (0, 0, (text,))))
    ((after_nothing, _),) = _scored(lm, (0, 0, ("", text)))
    assert rolled == pytest.approx(after_nothing, rel=1e-6)
    assert lm.loglikelihood_rolling(_asked(rolling, (0, 0, ("",)))) == [0.0]
    layout, ids = model.layout(model.options()), list(range(100, 140))
    parts = list(bounds.windows(ids, 9, layout, 10, 3))
    assert [part.response for part in parts] == [ids[:16], ids[16:32], ids[32:]]
    assert [part.prompt for part in parts] == [[9], ids[6:16], ids[22:32]]
    assert [part.first_block for part in parts] == [0, 4, 8]
    (long,) = lm.loglikelihood_rolling(_asked(rolling, (0, 0, (text * 2,))))
    ids, prefix = model.tokenizer.encode(text * 2), lm._texts.prefix
    expected = _enumerated(model, [prefix], ids[:16]) + _enumerated(model, [prefix, *ids[:16]][-24:], ids[16:])
    assert long == pytest.approx(-expected, rel=1e-5) and lm.details.of(("t", 0))[-1]["tokens"] == len(ids)


def test_answers_end_as_the_task_says(lm, model):
    whole = model.tokenizer.decode(model.text_ids(model.decode([model.tokenizer.encode("1+2?")] * 4)[0]))
    assert len(whole) >= 6
    letter = next(letter for letter in whole[2:] if letter not in whole[:2])
    cut = whole[: whole.index(letter)]
    asked = [
        ({"until": ["Question:"]}, whole),
        ({"until": [letter, "no such text"], "do_sample": False}, cut),
        ({"until": letter, "max_new_tokens": 16, "num_beams": 1}, cut),
        ({"max_gen_toks": 3}, whole[:3]),
        ({"until": [], "temperature": 0.0, "do_sample": True}, whole),
    ]
    requests = _asked("generate_until", *((at, 0, ("1+2?", kwargs)) for at, (kwargs, _) in enumerate(asked)), task="u")
    assert lm.generate_until(requests) == [text for _, text in asked]
    costs = [lm.details.of(("u", document))[0] for document in range(len(asked))]
    assert costs[3] | {"nfe": 4, "tokens": 3, "ended": "length"} == costs[3]  # one block of four
    assert costs[1]["nfe"] <= costs[0]["nfe"] and costs[1]["ended"] == "until"
    # Repeats of a request are drawn anew, and do not depend on what else is asked.
    hot = {"do_sample": True, "temperature": 3.0, "until": []}
    several = _asked("generate_until", (8, 0, ("1+2?", hot)), (9, 0, ("9?", hot)), repeats=4)
    drawn = lm.generate_until([several[0]] * 4 + [several[1]] * 4)
    assert len(set(drawn)) == 8 and lm.generate_until([several[1]] * 4) == drawn[4:]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "task t: generation_kwargs: num_beams = 4 cannot be honoured by a blockwise decoder"),
        ({"min_length": 3}, "min_length = 3 cannot be honoured"),
        ({"max_gen_toks": 17}, "allows answers of 17 tokens (max_gen_toks), and the canvas has 16 response positions"),
        ({"max_gen_toks": 0}, "must be a number of tokens, not 0"),
        ({"until": [3]}, "until must be texts, not [3]"),
        ({"until": [""]}, "until must be texts"),
        ({"do_sample": "yes"}, "do_sample cannot be 'yes'"),
        ({"temperature": True}, "temperature cannot be True"),
        ({"temperature": -1}, "task t: generation_kwargs: decode.temperature is -1.0"),
        ({"temperature": 1, "top_p": 3}, "decode.top_p is 3.0"),
        ({"do_sample": False, "temperature": 0.7}, "temperature 0.7 has no effect beside do_sample: false"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p 0.5 has no effect beside temperature 0"),
        ({"do_sample": True, "temperature": 0, "top_k": 3}, "top_k 3 has no effect beside temperature 0"),
        ({"top_p": 0.5}, "decode.top_p cannot change the best token"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(model, kwargs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_gen_kwargs(kwargs, model, "task t")


def test_sampling_is_the_tasks_where_it_says_and_else_the_users(model):
    own = dataclasses.replace(model, decode_defaults=model.options(temperature=0.5, top_p=0.9))
    for kwargs, expected in (
        ({}, (0.5, 0.9, None)),
        ({"do_sample": False}, (0.0, None, None)),
        ({"temperature": 0}, (0.0, None, None)),
        ({"do_sample": True}, (1.0, 0.9, None)),
        ({"temperature": 0.7, "top_p": 1.0, "top_k": 5}, (0.7, None, 5)),
        ({"top_p": 0.5, "top_k": 1}, (0.5, 0.5, 1)),
    ):
        options = read_gen_kwargs(kwargs, own, "task t").options
        assert (options.temperature, options.top_p, options.top_k) == expected, kwargs


def _turn(text, role="user"):
    return {"role": role, "content": text}


def test_conversations_are_shown_as_training_shows_them(lm, model):
    chat = [_turn("1+2?"), _turn("3", "assistant"), _turn("4?")]
    wide = HarnessModel(dataclasses.replace(model, canvas=dataclasses.replace(model.canvas, prompt_len=64)))
    text, shown = wide.apply_chat_template(chat), model.encoder.prompt(chat)
    assert wide._texts.prompt(text, "here") == shown
    begun = wide.apply_chat_template([*chat, _turn("4=", "assistant")], add_generation_prompt=False)
    assert begun == text + "4="
    assert wide._texts.prompt(begun, "here") == [*shown, *model.tokenizer.encode("4=")]
    prompt, (one, two) = wide._texts.prompt_and_choices(text, ["4", "4=4"], "here")
    assert prompt == shown and (len(one), len(two)) == (1, 3)
    # Tasks without a question still have a turn of the user, with nothing in it.
    nothing = lm.apply_chat_template([_turn("")])
    assert nothing == lm.apply_chat_template([_turn("1+2?")]).replace("1+2?", "")
    assert lm._texts.prompt_and_choices(nothing, ["4", "5"], "here")[0] == model.tokenizer.encode(nothing)
    eot = model.tokenizer.piece(model.stop_ids[0])
    bare, unread = (dataclasses.replace(model, **{name: None}) for name in ("encoder", "tokenizer"))
    for bad, message in (
        (lambda: lm.apply_chat_template([*chat[:-1], _turn(f"4{eot}")]), "the tasks' conversation that ends with '4"),
        (lambda: lm.apply_chat_template([_turn(f"1{eot}")]), "special token"),
        (lambda: lm._texts.prompt(f"1+2?{eot}", "here"), "special token"),
        (lambda: wide._texts.prompt_and_choices(text, [f"4{eot}"], "here"), "special token"),
        (lambda: lm._texts.text(eot, "here"), "special token"),
        (lambda: lm._texts.prompt_and_choices("1?", ["", "4"], "here"), "an answer to be scored has no token"),
        (lambda: lm._texts.prompt_and_choices("1?", ["1" * 17], ""), "17 tokens, and the canvas has 16 response"),
        (lambda: lm._texts.prompt_and_choices("1+2? " * 9, ["4"], "here"), "more than canvas.prompt_len 24"),
        (lambda: HarnessModel(bare).apply_chat_template(chat), "has no chat template"),
        (lambda: HarnessModel(unread), "has no tokenizer"),
        (lambda: HarnessModel(model, nelbo_samples=1), "it must be at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            bad()


def test_a_token_of_prompt_and_choice_belongs_to_every_choice(model, monkeypatch):
    """A tokenizer that joins "?" and a digit: the prompt ends before "?", for the choice without a digit as well."""
    pieces = {"1": 5, "+": 6, "?": 7, "?4": 8, "4": 9, "n": 10}
    lm = HarnessModel(model)
    joined = re.compile(r"\?4|.")
    monkeypatch.setattr(type(model.tokenizer), "encode", lambda self, text: [pieces[p] for p in joined.findall(text)])
    assert lm._texts.prompt_and_choices("1+1?", ["4", "n"], "here") == ([5, 6, 5], [[8], [7, 10]])


def test_many_devices_answer_as_one_does(tiny_run, lm):
    many = HarnessModel(jaxblock.load(tiny_run, mesh=make_mesh(2, 4)), nelbo_samples=15, not_greedy=["t"])
    asked = [(at, 0, ("1+2?", text)) for at, text in enumerate(("1+2=3", "7", "no"))]
    np.testing.assert_allclose(*([value for value, _ in _scored(one, *asked)] for one in (many, lm)), rtol=1e-5)
    asked = [(at, 0, (text, {"until": ["#"]})) for at, text in enumerate(("1+2?", "9?", "3?", "4?"))]
    ours, theirs = (one.generate_until(_asked("generate_until", *asked)) for one in (many, lm))
    assert ours == theirs


BAD_TASKS = {
    "unsafe": "output_type: generate_until\nunsafe_code: true\ndoc_to_text: question\ndoc_to_target: answer\n",
    "failing": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: []}\nprocess_results: !function steps.fail\n",
    "no_function": "output_type: generate_until\ndoc_to_text: !function steps.nothing\ndoc_to_target: answer\n",
    "hub": TASKS["sums"],
    "empty": TASKS["sums"],
    "my-task": TASKS["sums"],
    "my_task": TASKS["sums"],
}


@pytest.fixture(scope="module")
def bad_tasks(tiny_config, tmp_path_factory):
    """Returns a folder of the task files, and of some that cannot be run."""
    folder = tmp_path_factory.mktemp("bad")
    _write_tasks(folder, tiny_config.parent, TASKS | BAD_TASKS)
    (folder / "steps.py").write_text("def fail(doc, results):\n    return {'x': 1 // 0}\n")
    (folder / "none.jsonl").touch()
    wrong = {"hub": ("path: json", "path: a/b"), "empty": (f"{tiny_config.parent}/test", f"{folder}/none")}
    for name, (said, here) in wrong.items():
        (folder / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text().replace(said, here))
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("summs", "there is no task 'summs' in"),
        ("nowhere.yaml", "--tasks nowhere.yaml: there is no such file"),
        ("sums --include_path nowhere", "--include_path nowhere is no folder"),
        ("hub", "task hub: its data (or a metric) are not on this machine, and the hub cannot be reached (no network)"),
        ("unsafe", "task unsafe runs the code that the network writes"),
        ("failing --limit 4", "a task's file, its functions or its metrics fail: ZeroDivisionError"),
        ("no_function", "task no_function cannot be loaded: AttributeError"),
        ("empty", "task empty: a split of its data has no records"),
        ("sums --num_fewshot 500", "a task's split of examples has fewer of them than --num_fewshot"),
        ("sums --limit 0", "--limit is 0: it must be a number of documents"),
        ("sums --num_fewshot -1", "--num_fewshot is -1"),
        ("sums --gen_kwargs temperature", "--gen_kwargs 'temperature' cannot be read"),
        (
            "sums --gen_kwargs max_gen_toks=4,max_gen_toks=16",
            "cannot be read ('max_gen_toks' is given twice; keep one of",
        ),
        (f"sums --gen_kwargs temperature={'[' * 5000}", "cannot be read (maximum recursion depth"),
        (
            "my-task my_task --out {tasks}/never",
            "tasks my-task and my_task would both write their samples to samples_my_task",
        ),
        ("sums --gen_kwargs num_beams=3 --limit 1", "task sums: generation_kwargs: num_beams = 3"),
        ("sums --nelbo_samples 1", "nelbo_samples is 1: it must be at least 2"),
        ("sums --no_fewshot_as_multiturn", "has no effect without --apply_chat_template"),
        ("{tasks}/sums.yaml {tasks}/choose.yaml --num_fewshot 3 --limit 1", "more than canvas.prompt_len 24"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(flags, message, tiny_run, bad_tasks, ran, monkeypatch):
    def offline(path, *args, load=datasets.load_dataset, **kwargs):
        if path == "a/b":
            raise ConnectionError("no network")
        return load(path, *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", offline)
    place = "" if "--include_path" in flags else f"--include_path {bad_tasks}"
    said = ran(f"harness --checkpoint {tiny_run} {place} --tasks {flags.format(tasks=bad_tasks)}", 2).err
    assert said.splitlines()[-1].startswith("jaxblock: ") and message in said.splitlines()[-1]


def test_what_is_missing_is_told_before_tasks_are_read(tmp_path, tiny_run, ran, monkeypatch):
    said = ran(f"harness --checkpoint {tmp_path}/nowhere --tasks gsm8k", 2).err
    assert f"{tmp_path}/nowhere" in said and "reading the list" not in said and said.count("\n") == 1
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = ran(f"harness --checkpoint {tiny_run} --tasks sums", 2).err
    assert "pip install 'jaxblock[harness]'" in said and said.count("\n") == 1


def test_groups_patterns_and_names_give_each_task_once(tasks, tmp_path):
    shutil.copytree(tasks, tmp_path / "grouped")
    (tmp_path / "grouped" / "both.yaml").write_text("group: both\ntask: [sums, choose]\n")
    for names in (["both,sums", "ch*"], ["sums", "choose", "both"]):
        (found,) = load_tasks(names, str(tmp_path / "grouped"), allow_code=False)
        assert found.name == "both" and {task.task_name for task in all_tasks([found])} == {"sums", "choose"}
    found = load_tasks(["sums", str(tasks / "choose.yaml")], str(tasks), allow_code=False)
    assert [(task.task_name, asks_for_greedy(task)) for task in found] == [("sums", True), ("choose", False)]

"""Runs tasks of lm-evaluation-harness on a tiny model: the verb agrees with ``evaluate``, and likelihoods with an enumeration."""

import dataclasses
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
from jaxblock.harness.gen_kwargs import read_gen_kwargs
from jaxblock.harness.language_model import HarnessModel
from jaxblock.harness.tasks import all_tasks, asks_for_greedy, load_tasks

pytestmark = pytest.mark.slow  # the fast tests' environment lacks the extra
DATA = (
    "dataset_path: json\ndataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}\n"
)
SPLITS = "training_split: train\nfewshot_split: train\ntest_split: test\nmetadata: {{version: 1}}\n"
TASKS = {
    "sums": """\
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer.split('#### ')[-1].strip()}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [",", "\\\\$", "\\\\.$"]}}]
""",
    "choose": """\
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{ [question[:3] + '=1', '=+###?=', question[:3] + '=1'] }}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Lets the verbs use one device, for which the other tests compile the same programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_all_devices", lambda arch, train: None)
        yield


@pytest.fixture(scope="module")
def tasks(tiny_config, tmp_path_factory):
    """Returns a folder of task files on the records of the tiny experiment."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        whole = f"task: {name}\n{DATA}{SPLITS}{text}".format(folder=tiny_config.parent)
        (folder / f"{name}.yaml").write_text(whole)
    return folder


@pytest.fixture(scope="module")
def model(tiny_run):
    return jaxblock.load(tiny_run)


@pytest.fixture(scope="module")
def lm(model):
    return HarnessModel(model, nelbo_samples=15, not_greedy=["t"])


def _asked(kind, *requests, task="t", repeats=1):
    """Returns requests of one kind, each given as (document, index, arguments)."""
    return [Instance(kind, {}, arguments, index, (task, document, repeats)) for document, index, arguments in requests]


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


def test_the_verb_agrees_with_evaluate_and_keeps_the_errors_of_likelihoods(tiny_run, tasks, ran, tmp_path, model):
    flags = f"--checkpoint {tiny_run} --include_path {tasks} --apply_chat_template --out {tmp_path}/found"
    said = ran(f"harness {flags} --tasks sums,choose --limit 6 --nelbo_samples 3")
    assert "|sums" in said.out and "|Tasks|" in said.out.replace(" ", "") and "exact_match" in said.out
    assert "18 texts scored, 0 exactly, 18 by random masks" in said.out and "6 answers" in said.out
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert results["results"]["choose"]["acc,none"] == 1.0 and results["config"]["checkpoint"] == str(tiny_run)
    ran(f"evaluate --checkpoint {tiny_run} --out {tmp_path}/scores --evaluate.problems 6 --evaluate.no_nelbo")
    problems = (tmp_path / "scores" / "problems.jsonl").read_text().splitlines()
    samples = {
        task: list(map(json.loads, (tmp_path / "found" / f"samples_{task}.jsonl").read_text().splitlines()))
        for task in TASKS
    }
    for problem, sample in zip(map(json.loads, problems), samples["sums"], strict=True):
        assert (problem["response"], problem["correct"]) == (sample["resps"][0][0], sample["exact_match"] == 1)
        assert problem["nfe"] == sample["jaxblock"][0]["nfe"] and problem["prompt"] == sample["doc"]["question"]
    for sample in samples["choose"]:
        same, other, again = sample["jaxblock"]
        assert sample["resps"][0][0] == [-same["nelbo"], None] and same["is_greedy"] is None  # no metric asks for it
        assert same["standard_error"] > 0 and other["standard_error"] > 0 and not same["exact"]
        # The first and the last choice are the same text: under the same masks their difference is known exactly.
        assert (again["nelbo"], again["above_best_standard_error"]) == (same["nelbo"], 0.0)
    assert len({sample["jaxblock"][1]["nelbo"] for sample in samples["choose"]}) == 6
    assert results["git_hash"] == running_versions().get("commit")
    ran(f"harness {flags} --tasks sums --limit 2", 2)  # the folder exists
    assert (
        "the network was trained on prompts in its chat template"
        in ran(f"harness --checkpoint {tiny_run} --tasks {tasks}/sums.yaml --num_fewshot 0 --limit 1").err
    )


ANSWERS = {
    "so #### 18": "a #### 18", "so #### 18.": "a #### 18", "#### 18.\n": "b #### 18\n", "#### 18": "c #### 18.",
    "#### 1,000": "d #### 1000", "#### 1000": "e #### 1,000", "#### -3": "f #### -3", "#### $18": "g #### 18",
    "no": "h #### 18", "#### 17 #### 18": "i #### 18", "#### 18,": "j #### 18", "#### 18.0": "k #### 18", "18": "l #### 18",
}  # fmt: skip
"""Responses with the reference answer of each: right ones in every form that `evaluate` grades as right, and wrong ones."""


class Scripted(LM):
    """Answers the questions "0", "1", ... with the responses of ``ANSWERS``."""

    def generate_until(self, requests, disable_tqdm=False):
        return [list(ANSWERS)[int(request.args[0])] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_the_task_of_the_page_grades_as_evaluate_does(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "harness.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "my_gsm8k.yaml").write_text(text)
    records = [{"question": str(at), "answer": answer} for at, answer in enumerate(ANSWERS.values())]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    found = lm_eval.simple_evaluate(Scripted(), tasks=load_tasks(["my_gsm8k.yaml"], None, allow_code=False))
    ours = [gsm8k_strict(response, answer).correct for response, answer in ANSWERS.items()]
    assert [sample["exact_match"] == 1 for sample in found["samples"]["my_gsm8k"]] == ours and set(ours) == {
        True,
        False,
    }


def test_the_snippet_of_the_page_runs(tiny_run, tasks):
    page = (Path(__file__).parents[2] / "docs" / "harness.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
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
    prompt = "1+2?"
    texts = ["1", "1+2=3", "no", "1+2=3\n#### 3"]
    found = lm.loglikelihood(_asked("loglikelihood", *((7, at, (prompt, text)) for at, text in enumerate(texts))))
    ids = model.tokenizer.encode(prompt)
    for (value, _), text in zip(found, texts, strict=True):
        whole = model.tokenizer.encode(prompt + text)
        assert value == pytest.approx(-_enumerated(model, whole[: len(ids)], whole[len(ids) :]), rel=1e-5)
    about = lm.details.of(("t", 7))
    assert [one["exact"] for one in about] == [True] * 4 and not any(one["standard_error"] for one in about)
    # A text of one token takes one forward pass.
    told = []
    HarnessModel(model, say=told.append, not_greedy=["t"]).loglikelihood(_asked("loglikelihood", (1, 0, (prompt, "1"))))
    assert told == ["scored 1 of 1 masked sets"]


def test_drawn_masks_are_unbiased_and_belong_to_the_question(model):
    asked = [(document, 0, ("1+2?", "1+2=3\n##")) for document in range(60)]
    lm = HarnessModel(model, nelbo_samples=4, not_greedy=["t"])
    values = np.array([value for value, _ in lm.loglikelihood(_asked("loglikelihood", *asked))])
    ids, whole = model.tokenizer.encode("1+2?"), model.tokenizer.encode("1+2?1+2=3\n##")
    exact = -_enumerated(model, whole[: len(ids)], whole[len(ids) :])
    spread = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - exact) < 4 * spread
    # The error that is told is at least the spread: the draws are stratified, which it does not count on.
    told = np.mean([lm.details.of(("t", document))[0]["standard_error"] for document in range(60)])
    assert values.std() < 1.5 * told < 30 * values.std()
    two = _asked("loglikelihood", (5, 0, ("1+2?", "1+2=3")), (5, 1, ("1+2?", "1+2=4")))
    lm.loglikelihood(two[::-1])
    first, second = lm.details.of(("t", 5))
    apart = math.hypot(first["standard_error"], second["standard_error"])
    worse = max(first, second, key=lambda one: one["above_best"])
    assert 0 <= worse["above_best_standard_error"] < apart / 2
    # Choices without their context, which acc_mutual_info asks for, are not among those that are compared.
    lm.loglikelihood([*_asked("loglikelihood", (6, 0, ("1+2?", "77")), (6, 1, ("1+2?", "88"))),
                      *_asked("loglikelihood", (6, 2, ("", "7")), (6, 3, ("", "8")))])  # fmt: skip
    choices, bare = lm.details.of(("t", 6))[:2], lm.details.of(("t", 6))[2:]
    assert min(one["above_best"] for one in choices) == 0 and not any("above_best" in one for one in bare)


def test_whether_a_text_is_the_greedy_answer(lm, model):
    prompts = ["1+2?", "9?", "3+4?", "5?"]  # as many as a batch holds
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    answers = [model.tokenizer.decode(row[:6]) for row in model.decode(ids)]
    asked = [
        (at, 0, (prompt, text[:n]))
        for at, (prompt, text) in enumerate(zip(prompts, answers, strict=True))
        for n in (1, 6)
    ]
    asked += [(at, 1, (prompt, text[:3] + "?")) for at, (prompt, text) in enumerate(zip(prompts, answers, strict=True))]
    assert all(len(model.tokenizer.encode(text)) == 6 for text in answers) and not any("?" in text for text in answers)
    greedy = [is_greedy for _, is_greedy in lm.loglikelihood(_asked("loglikelihood", *asked, task="acc"))]
    assert greedy == [True] * 8 + [False] * 4
    hot = HarnessModel(dataclasses.replace(model, decode_defaults=model.options(temperature=5.0)), nelbo_samples=15)
    assert [is_greedy for _, is_greedy in hot.loglikelihood(_asked("loglikelihood", *asked, task="acc"))] == greedy


def test_whole_texts_are_scored_in_windows(lm, model):
    text = "1+2=3\n#### 3"
    (rolled,) = lm.loglikelihood_rolling(_asked("loglikelihood_rolling", (0, 0, (text,))))
    ((after_nothing, _),) = lm.loglikelihood(_asked("loglikelihood", (0, 0, ("", text))))
    assert rolled == pytest.approx(after_nothing, rel=1e-6)
    assert lm.loglikelihood_rolling(_asked("loglikelihood_rolling", (0, 0, ("",)))) == [0.0]
    layout, ids = model.layout(model.options()), list(range(100, 140))
    parts = list(bounds.windows(ids, 9, layout, 10, 3))
    assert [token for part in parts for token in part.response] == ids
    assert [len(part.response) for part in parts] == [16, 16, 8] and [part.first_block for part in parts] == [0, 4, 8]
    assert [part.prompt for part in parts] == [[9], ids[6:16], ids[22:32]]
    (long,) = lm.loglikelihood_rolling(_asked("loglikelihood_rolling", (0, 0, (text * 2,))))
    ids, prefix = model.tokenizer.encode(text * 2), lm._texts.prefix
    first, rest = ids[:16], ids[16:]
    expected = _enumerated(model, [prefix], first) + _enumerated(model, ([prefix] + first)[-24:], rest)
    assert long == pytest.approx(-expected, rel=1e-5) and lm.details.of(("t", 0))[-1]["tokens"] == len(ids)


def test_answers_end_as_the_task_says(lm, model):
    ids = model.tokenizer.encode("1+2?")
    whole = model.tokenizer.decode(model.text_ids(model.decode([ids] * 4)[0]))
    assert len(whole) >= 6
    letter = next(letter for letter in whole[2:] if letter not in whole[:2])
    asked = [
        (0, {"until": ["Question:"]}, whole),
        (1, {"until": [letter, "no such text"], "do_sample": False}, whole[: whole.index(letter)]),
        (2, {"until": letter, "max_new_tokens": 16, "num_beams": 1}, whole[: whole.index(letter)]),
        (3, {"max_gen_toks": 3}, whole[:3]),
        (4, {"until": [], "temperature": 0.0, "do_sample": True}, whole),
    ]
    requests = _asked("generate_until", *((document, 0, ("1+2?", kwargs)) for document, kwargs, _ in asked), task="u")
    assert lm.generate_until(requests) == [text for *_, text in asked]
    costs = [lm.details.of(("u", document))[0] for document, *_ in asked]
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
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(model, kwargs, message):
    with pytest.raises(UserError) as error:
        read_gen_kwargs(kwargs, model, "task t")
    assert message in str(error.value)


def test_sampling_is_the_tasks_where_it_says_and_else_the_users(model):
    own = dataclasses.replace(model, decode_defaults=model.options(temperature=0.5, top_p=0.9))
    for kwargs, expected in (
        ({}, (0.5, 0.9, None)),
        ({"do_sample": False}, (0.0, None, None)),
        ({"temperature": 0}, (0.0, None, None)),
        ({"do_sample": True}, (1.0, 0.9, None)),
        ({"temperature": 0.7, "top_p": 1.0, "top_k": 5}, (0.7, None, 5)),
    ):
        options = read_gen_kwargs(kwargs, own, "task t").options
        assert (options.temperature, options.top_p, options.top_k) == expected, kwargs


def test_conversations_are_shown_as_training_shows_them(lm, model):
    chat = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4?"},
    ]
    wide = HarnessModel(dataclasses.replace(model, canvas=dataclasses.replace(model.canvas, prompt_len=64)))
    text, shown = wide.apply_chat_template(chat), model.encoder.prompt(chat)
    assert wide._texts.prompt(text, "here") == shown
    begun = wide.apply_chat_template([*chat, {"role": "assistant", "content": "4="}], add_generation_prompt=False)
    assert begun == text + "4="
    assert wide._texts.prompt(begun, "here") == [*shown, *model.tokenizer.encode("4=")]
    prompt, (one, two) = wide._texts.prompt_and_choices(text, ["4", "4=4"], "here")
    assert prompt == shown and (len(one), len(two)) == (1, 3)
    # Tasks without a question still have a turn of the user, with nothing in it.
    nothing = lm.apply_chat_template([{"role": "user", "content": ""}])
    assert nothing == lm.apply_chat_template([{"role": "user", "content": "1+2?"}]).replace("1+2?", "")
    assert lm._texts.prompt_and_choices(nothing, ["4", "5"], "here")[0] == model.tokenizer.encode(nothing)
    eot = model.tokenizer.piece(model.stop_ids[0])
    with pytest.raises(UserError, match="the tasks' conversation that ends with '4"):
        lm.apply_chat_template([*chat[:-1], {"role": "user", "content": f"4{eot}"}])
    for bad in (
        lambda: lm.apply_chat_template([{"role": "user", "content": f"1{eot}"}]),
        lambda: lm._texts.prompt(f"1+2?{eot}", "here"),
        lambda: wide._texts.prompt_and_choices(text, [f"4{eot}"], "here"),
        lambda: lm._texts.text(eot, "here"),
    ):
        with pytest.raises(UserError, match="special token"):
            bad()
    for context, choices, message in (
        ("1?", ["", "4"], "an answer to be scored has no token"),
        ("1?", ["1" * 17], "has 17 tokens, and the canvas has 16 response positions"),
        ("1+2? " * 9, ["4"], "more than canvas.prompt_len 24"),
    ):
        with pytest.raises(UserError, match=message):
            lm._texts.prompt_and_choices(context, choices, "here")
    bare = HarnessModel(dataclasses.replace(model, encoder=None))
    with pytest.raises(UserError, match="has no chat template"):
        bare.apply_chat_template(chat)
    with pytest.raises(UserError, match="has no tokenizer"):
        HarnessModel(dataclasses.replace(model, tokenizer=None))
    with pytest.raises(UserError, match="it must be at least 2"):
        HarnessModel(model, nelbo_samples=1)


def test_a_token_of_prompt_and_choice_belongs_to_every_choice(model, monkeypatch):
    """A tokenizer that joins "?" and a digit: the prompt ends before "?", for the choice without a digit as well."""
    pieces = {"1": 5, "+": 6, "?": 7, "?4": 8, "4": 9, "n": 10}

    def encode(self, text):
        ids = []
        while text:
            piece = max((p for p in pieces if text.startswith(p)), key=len)
            ids, text = [*ids, pieces[piece]], text[len(piece) :]
        return ids

    lm = HarnessModel(model)
    monkeypatch.setattr(type(model.tokenizer), "encode", encode)
    assert lm._texts.prompt_and_choices("1+1?", ["4", "n"], "here") == ([5, 6, 5], [[8], [7, 10]])


def test_many_devices_answer_as_one_does(tiny_run, model, lm):
    many = HarnessModel(jaxblock.load(tiny_run, mesh=make_mesh(2, 4)), nelbo_samples=15, not_greedy=["t"])
    asked = _asked("loglikelihood", *((at, 0, ("1+2?", text)) for at, text in enumerate(("1+2=3", "7", "no"))))
    (ours, theirs) = (one.loglikelihood(asked) for one in (many, lm))
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], rtol=1e-5)
    answers = _asked(
        "generate_until", *((at, 0, (text, {"until": ["#"]})) for at, text in enumerate(("1+2?", "9?", "3?", "4?")))
    )
    assert many.generate_until(answers) == lm.generate_until(answers)


BAD_TASKS = {
    "unsafe": "output_type: generate_until\nunsafe_code: true\ndoc_to_text: question\ndoc_to_target: answer\n",
    "failing": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: []}\nprocess_results: !function steps.fail\n",
    "no_function": "output_type: generate_until\ndoc_to_text: !function steps.nothing\ndoc_to_target: answer\n",
}


def test_a_checkpoint_that_is_not_there_is_told_before_tasks_are_read(tmp_path, ran):
    said = ran(f"harness --checkpoint {tmp_path}/nowhere --tasks gsm8k", 2).err
    assert f"{tmp_path}/nowhere" in said and "reading the list" not in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks summs", "there is no task 'summs' in"),
        ("--tasks nowhere.yaml", "--tasks nowhere.yaml: there is no such file"),
        ("--tasks sums --include_path nowhere", "--include_path nowhere is no folder"),
        (
            "--tasks hub",
            "task hub: its data (or a metric) are not on this machine, and the hub cannot be reached (no network)",
        ),
        ("--tasks unsafe", "task unsafe runs the code that the network writes"),
        ("--tasks failing --limit 4", "a task's file, its functions or its metrics fail: ZeroDivisionError"),
        ("--tasks no_function", "task no_function cannot be loaded: AttributeError"),
        ("--tasks empty", "task empty: a split of its data has no records"),
        ("--tasks sums --num_fewshot 500", "a task's split of examples has fewer of them than --num_fewshot"),
        ("--tasks sums --limit 0", "--limit is 0: it must be a number of documents"),
        ("--tasks sums --num_fewshot -1", "--num_fewshot is -1"),
        ("--tasks sums --gen_kwargs temperature", "--gen_kwargs 'temperature' cannot be read"),
        ("--tasks sums --gen_kwargs num_beams=3 --limit 1", "task sums: generation_kwargs: num_beams = 3"),
        ("--tasks sums --nelbo_samples 1", "nelbo_samples is 1: it must be at least 2"),
        ("--tasks sums --no_fewshot_as_multiturn", "has no effect without --apply_chat_template"),
        ("--tasks {tasks}/sums.yaml {tasks}/choose.yaml --num_fewshot 3 --limit 1", "more than canvas.prompt_len 24"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(flags, message, tiny_run, tasks, tiny_config, ran, monkeypatch):
    for name, text in BAD_TASKS.items():
        whole = f"task: {name}\n{(DATA + SPLITS).format(folder=tiny_config.parent)}{text}"
        (tasks / f"{name}.yaml").write_text(whole)
    (tasks / "steps.py").write_text("def fail(doc, results):\n    return {'x': 1 // 0}\n")
    (tasks / "hub.yaml").write_text(
        (tasks / "sums.yaml").read_text().replace("task: sums", "task: hub").replace("path: json", "path: a/b")
    )
    (tasks / "none.jsonl").write_text("")
    (tasks / "empty.yaml").write_text(
        re.sub("task: sums|test: [^}]*", lambda m: "task: empty" if "task" in m[0] else f"test: {tasks}/none.jsonl",
               (tasks / "sums.yaml").read_text(), count=2)
    )  # fmt: skip
    load = datasets.load_dataset

    def offline(path, *args, **kwargs):
        if path == "a/b":
            raise ConnectionError("no network")
        return load(path, *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr("jaxblock.harness.tasks.TaskManager", _only_local())
    place = "" if "--include_path" in flags else f" --include_path {tasks}"
    lines = ran(f"harness --checkpoint {tiny_run} {flags.format(tasks=tasks)}{place}", 2).err.splitlines()
    assert message in lines[-1] and lines[-1].startswith("jaxblock: ")


def _only_local():
    """Returns the class that knows tasks without lm-eval's own, which take long to read."""
    from lm_eval.tasks import TaskManager

    return lambda include_path=None, include_defaults=True: TaskManager(
        include_path=include_path, include_defaults=False
    )


def test_groups_patterns_and_names_give_each_task_once(tasks, tmp_path, monkeypatch):
    shutil.copytree(tasks, tmp_path / "grouped")
    (tmp_path / "grouped" / "both.yaml").write_text("group: both\ntask: [sums, choose]\n")
    monkeypatch.setattr("jaxblock.harness.tasks.TaskManager", _only_local())
    for names in (["both,sums", "ch*"], ["sums", "choose", "both"]):
        (found,) = load_tasks(names, str(tmp_path / "grouped"), allow_code=False)
        assert found.name == "both" and {task.task_name for task in all_tasks([found])} == {"sums", "choose"}
    found = load_tasks(["sums", str(tasks / "choose.yaml")], str(tasks), allow_code=False)
    assert [task.task_name for task in found] == ["sums", "choose"]
    assert [asks_for_greedy(task) for task in found] == [True, False]


def test_without_the_extra_a_line_says_what_to_install(tiny_run, ran, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = ran(f"harness --checkpoint {tiny_run} --tasks sums", 2).err
    assert "pip install 'jaxblock[harness]'" in said and len(said.splitlines()) == 1

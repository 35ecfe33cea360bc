r"""Tests graders on hand-made cases: GSM8K's strict and flexible one, answers in ``\boxed{}``, exact text, and the user's own."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks import grader_pairs
from jaxblock.data.store.records import Record
from jaxblock.errors import UserError
from jaxblock.evaluation import boxed
from jaxblock.evaluation.graders import GRADERS, find_grader, normalise_gsm8k
from jaxblock.evaluation.symbolic import LONGEST, Comparer, shared_comparer

REFERENCE = "She sells 9 * 2 = 18 a day. #### 18"

# response, reference, strict correct, flexible correct
GSM8K = [
    ("9 * 2 = 18\n#### 18", REFERENCE, True, True),
    ("#### 18.", REFERENCE, True, True),
    ("#### 18.00", REFERENCE, False, False),  # compared as text, not as numbers
    ("#### $18", REFERENCE, False, True),  # strict takes no currency sign
    ("####18", REFERENCE, False, True),  # strict wants the space
    ("The answer is 18.", REFERENCE, False, True),
    ("The answer is \\boxed{18}", REFERENCE, False, True),
    ("#### 18 or maybe 20", REFERENCE, True, False),  # first against last
    ("#### 20 #### 18", REFERENCE, False, True),
    ("#### 18\nQuestion 2", REFERENCE, True, False),  # run on after the answer
    ("18, so the total is 18 ...", REFERENCE, False, False),  # "..." is the last run of number characters
    ("#### 1,800", "#### 1800", True, True),
    ("#### 1800", "#### 1,800", True, True),
    ("#### -5", "#### -5", True, True),
    ("#### 5", "#### -5", False, False),
    ("10-5", "#### 5", False, False),  # flexible reads the minus as a sign
    ("#### 3.5", "#### 3.5", True, True),
    ("no number at all", REFERENCE, False, False),
    ("none", "none", False, False),  # nothing extracted is never correct
    ("", REFERENCE, False, False),
    ("", "", False, False),
    ("#### ", REFERENCE, False, False),
    ("#### 18", "18", True, True),  # a bare reference
]

# Spellings of one answer in each line, divided by two blanks.
SAME = r"""
\frac{1}{2}  \dfrac12  \tfrac{1}2  1/2  0.5  0.50  .5  $\frac 12$  1/2.
1234  1,234  1{,}234  \$1234  1234.00  1234\text{ dollars}  1234~\mbox{cm}  1,234 dollars  1 234  1\,234
\left(1,2\right)  (1, 2)  (1,\,2)
90  90^\circ  90^{\circ}  90\%  90%
Tuesday  \text{Tuesday}  \textbf{Tuesday}
2\sqrt{3}  2\sqrt3  2 \sqrt{3}
-3  - 3  -3.0
\frac{x+1}{2}  \frac{x + 1}2
1 1/2
1 2
"""

# A response's answer, the reference's, whether they are equal as mathematics, and by the text rule of the MATH data set.
BOXED = [
    (r"\frac12", "0.5", True, True),
    ("x+1", "1+x", True, False),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", True, False),
    (r"1.5\times10^3", "1500", True, False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False, False),
    (r"12 \text{ cm}^2", "12", True, True),
    (r"90^\circ", "90", True, True),
    ("5", "x=5", True, True),
    ("y=5", "x=5", False, True),  # the text rule drops both names
    ("x>5", "5<x", True, False),
    ("x>5", r"x\ge5", False, False),
    (r"x\ge5", r"[5,\infty)", True, False),
    ("2 pi", "2", False, False),
    ("(1,2)", "(2,1)", False, False),
    ("(1,2)", r"\{1,2\}", False, False),
    (r"\{2,1\}", r"\{1,2\}", True, False),
    ("[1,2]", "(1,2)", False, False),
    ("1/2", "12", False, False),
    ("1 1/2", "11/2", False, True),  # the text rule drops blanks
    ("-2", "2", False, False),
    ("0.33", "1/3", False, False),
    ("1234567", "1234568", False, False),
    ("BA", "AB", False, False),
    ("ba", "ab", True, False),  # a product
    (r"\text{tuesday}", "Tuesday", True, False),
    ("Monday", "Tuesday", False, False),
    (r"\varnothing", r"\emptyset", True, False),
    ("", "5", False, False),
    ("", "", False, False),
]


def test_graders_of_text_agree_with_the_table():
    for response, reference, *verdicts in GSM8K:
        found = [GRADERS[name](response, reference).correct for name in ("gsm8k_strict", "gsm8k_flexible")]
        assert found == verdicts, (response, reference)
    graded = GRADERS["gsm8k_strict"]("so #### 1,234.", "a #### b #### $1,234")
    assert graded == (True, "1,234.", "1234", None)
    assert GRADERS["gsm8k_strict"]("The answer is 4", REFERENCE).extracted is None
    assert GRADERS["gsm8k_flexible"]("4 then -12", REFERENCE).extracted == "-12"
    assert [normalise_gsm8k(text) for text in ("ABC.", "x\ny #### 7\n", "a..")] == ["abc", "7", "a."]
    exact = {" a b\n": True, "A b": False, "a  b": False, "a b.": False}  # it forgives outer space alone
    assert {text: GRADERS["exact"](text, "a b").correct for text in exact} == exact


def test_one_answer_has_one_spelling_and_different_answers_stay_different():
    found = []
    for group in SAME.strip().splitlines():
        (spelling,) = {boxed.normalise_latex(text) for text in group.split("  ")}
        assert boxed.normalise_latex(spelling) == spelling
        found.append(spelling)
    others = ("1,2", "12", "(1,23)", "0.05", "x+1", "1+x", r"\leftarrow", "10", "-1/2", "11/2", r"2\mathrm{i}", "2")
    found += [boxed.normalise_latex(text) for text in others]
    assert len(set(found)) == len(found)


def test_which_answer_is_read():
    for text, expected in [
        (r"so $\boxed{1}$, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 7$", "7"),
        (r"$\boxed x$", "x"),
        (r"\boxed{5}, as asked: in \boxed form", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{7}, which I put in \boxed{}", "7"),
        ("The answer is $3$ and $4$.", "3 and 4"),
        (r"The answer is $\$5$.", r"\$5"),
        ("answer is" + "\n" * 50_000, None),  # read in bounded time
        (r"\boxed{1} and cut \boxed{\frac{1}{", None),
        ("The answer is: 5\nThe answer is 7", "7"),
        ("The answer is 3.5. I hope it is correct.", "3.5"),
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("**Answer:** \\(x^2\\)", "x^2"),
        (r"The answer is 3, or \boxed{4}", "4"),
        ("no answer", None),
    ]:
        assert boxed.extract_answer(text) == expected, text


def test_answers_are_compared_as_mathematics_and_as_text(monkeypatch):
    monkeypatch.setattr(shared_comparer(), "seconds", 60.0)  # the machine may be busy
    for given, expected, *verdicts in BOXED:
        pair = rf"\boxed{{{given}}}", rf"\boxed{{{expected}}}"
        assert [GRADERS[name](*pair).correct for name in ("math_boxed", "hendrycks_math")] == verdicts, pair
    grade = GRADERS["math_boxed"]
    solution = r"We have $x = \frac{6}{4}$, so the answer is $\boxed{\frac{3}{2}}$."
    assert grade(r"Then \boxed{\dfrac32}", solution) == (True, r"\dfrac32", r"\frac{3}{2}", None)
    assert grade("The answer is: 3/2", "3/2").correct
    assert not grade("3/2", solution).correct  # not said to be the answer
    assert not grade("", solution).correct and grade("", solution).extracted is None


def test_answers_that_were_graded_wrong_once(shared, monkeypatch):
    monkeypatch.setattr(shared_comparer(), "seconds", 60.0)
    cases = [json.loads(line) for line in (shared / "cases" / "grading.jsonl").read_text("utf-8").splitlines()]
    graded = [GRADERS[case["grader"]](case["response"], case["reference"]).correct for case in cases]
    assert len(cases) == 60 and graded == [case["right"] for case in cases]


def test_references_are_right_about_themselves_and_not_about_others(shared):
    gsm8k = [str(shared / "data" / "gsm8k" / "test.jsonl"), "--grader"]
    for grader, answers, others, flags in (
        ("gsm8k_strict", 351, 4, []),
        ("gsm8k_flexible", 351, 4, []),
        ("math_boxed", 351, 1, ["--box"]),
        ("hendrycks_math", 353, 1, ["--box"]),  # which keeps the comma of 5,600
    ):
        found = grader_pairs.main([*gsm8k, grader, *flags, "--others", str(others)])
        assert found["references"] == found["right_about_themselves"] == 1319
        assert found["pairs_of_different_answers"] == answers * others and found["right_pairs"] == []


def test_a_hostile_answer_ends_and_harms_no_later_one():
    comparer, found = Comparer(seconds=0.5), []

    def compare():
        """Runs in a thread, where the library's own alarm signals fail."""
        hostile = ["9^{9^{9^9}}", "{" * 100_000, r"\frac{" * 50]
        found.extend(comparer.compare(text, "5") for text in hostile)
        comparer.seconds = 60.0
        found.append(comparer.compare("2+3", "5"))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    slow, long, nested, later = found
    assert slow == (False, "not compared within 0.5 s")
    assert long == (False, f"longer than {LONGEST} characters") and not nested.equal
    assert later == (True, None)
    comparer._worker.kill()  # as a system does that runs out of memory
    assert comparer.compare("2+3", "5").undecided and comparer.compare("2+3", "5").equal
    comparer.close()
    grade = GRADERS["math_boxed"](rf"\boxed{{{'1+' * LONGEST}1}}", r"\boxed{5}")
    assert not grade.correct and "longer" in grade.undecided


def record(prompt="?", response="#### 18", fields_json=""):
    return Record(np.zeros(0, np.int32), np.zeros(0, np.int32), prompt, response, "train.jsonl:17", 3, fields_json)


USERS = """import numpy as np
from jaxblock.evaluation.graders import Graded
def says(response, reference, record): return response == f"{record.prompt} {reference}"
def numpy_bool(response, reference, record): return np.equal(len(response), 1)
def whole_grade(response, reference, record): return Graded(True, "a", "b")
def divides(response, reference, record): return 1 / 0 > 1
def leaves(response, reference, record): raise SystemExit
def half(response, reference, record): return 0.5
def of_two(response, reference): return True
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("users.py").write_text(USERS)
    Path("unfinished.py").write_text("\n\ndef f(:\n")
    Path("failing.py").write_text("\nraise KeyError('no key')\n")
    return tmp_path


def test_a_function_of_the_user_grades_with_the_record_at_hand(users):
    for place in ("users.py", str(users / "users.py"), "users"):
        grader = find_grader(f"{place}:says")
        assert grader("? #### 18", record()).correct and not grader("#### 18", record()).correct
        assert grader.name == f"{place}:says" and grader.version.startswith("sha256:")
    assert find_grader("users:numpy_bool")("1", record()) == (True, None, "#### 18", None)
    assert find_grader("users:whole_grade")("1", record()) == (True, "a", "b", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8k_strct", r"no grader 'gsm8k_strct'; did you mean gsm8k_strict\? .*file\.py:function"),
        ("users.py", "no grader 'users.py'"),
        (":says", "no grader ':says'"),
        ("absent.py:says", r"no file .*absent\.py"),
        ("absent.module:says", "cannot import absent.module: ModuleNotFoundError.*PYTHONPATH"),
        ("users.py:sais", r"users\.py has no function 'sais'; did you mean says\?"),
        ("users:zzz", "no function 'zzz'; its functions: says, "),
        ("users.py:of_two", r"must take \(response, reference, record\)"),
        ("unfinished.py:f", r"SyntaxError.*unfinished\.py.*3"),
        ("failing.py:f", r"KeyError: 'no key' \(.*failing\.py:2\)"),
        ("users.py:divides", r"train\.jsonl:17: .*users\.py:divides failed: ZeroDivisionError.*users\.py:6\)$"),
        ("users:leaves", r"train\.jsonl:17: .*failed: SystemExit.*users\.py:7\)$"),
        ("users.py:half", r"train\.jsonl:17: .*returned 0\.5 \(float\): return True or False"),
    ],
)
def test_what_is_wrong_with_a_grader_is_told(users, name, message):
    with pytest.raises(UserError, match=message) as told:
        find_grader(name)("1", record())
    assert "\n" not in str(told.value)


def test_countdown_is_graded_by_the_example_of_the_documentation(shared):
    grade = find_grader(f"{Path(__file__).parents[2] / 'docs' / 'countdown.py'}:grade")
    rows = [json.loads(x) for x in (shared / "data" / "countdown" / "cd3_test.jsonl").read_text().splitlines()]
    records = [record(row["input"], row["output"]) for row in rows]
    assert len(records) > 500 and all(grade(each.response, each).correct for each in records)
    puzzle = record("15,44,79,50", "44-15=29,79-29=50")
    in_words = record("Reach fifty.", "44-15=29,79-29=50", '{"numbers": [15, 44, 79], "target": 50}')
    for response, right in (
        ("79-44=35,15+35=50", True),  # another way
        (" 79 - 44 = 35, 35 + 15 = 50\n", True),
        ("44-15=29,79-29=51", False),  # wrong sum
        ("44-15=29,79-28=50", False),  # a number that is not there
        ("79-29=50", False),  # one that is not there yet
        ("44-15=29", False),  # ends elsewhere
        ("44-15=29,29+21=50", False),
        ("44/15=29,79-29=50", False),
        ("15-15=0,50+0=50", False),
        ("__import__('os')", False),
        ("", False),
    ):
        assert grade(response, puzzle).correct is grade(response, in_words).correct is right, response

"""Tests graders on hand-made cases, also those on which strict and flexible are known to differ."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxblock.data.store.records import Record
from jaxblock.errors import UserError
from jaxblock.evaluation.graders import GRADERS, find_grader, normalise_gsm8k

REFERENCE = "She sells 9 * 2 = 18 a day. #### 18"

# response, reference, strict correct, flexible correct
CASES = [
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
    ("#### 7", "#### 7", True, True),
    ("no number at all", REFERENCE, False, False),
    ("", REFERENCE, False, False),
    ("#### ", REFERENCE, False, False),
    ("#### 18", "18", True, True),  # a bare reference
]


def test_gsm8k_graders_agree_with_the_table():
    for response, reference, *verdicts in CASES:
        found = [GRADERS[name](response, reference).correct for name in ("gsm8k_strict", "gsm8k_flexible")]
        assert found == verdicts, (response, reference)


def test_what_is_extracted_and_expected():
    graded = GRADERS["gsm8k_strict"]("so #### 1,234.", "a #### b #### $1,234")
    assert graded == (True, "1,234.", "1234", None)
    assert GRADERS["gsm8k_strict"]("The answer is 4", REFERENCE).extracted is None
    assert GRADERS["gsm8k_flexible"]("4 then -12", REFERENCE).extracted == "-12"
    # Nothing extracted is never correct.
    assert not GRADERS["gsm8k_strict"]("", "").correct and not GRADERS["gsm8k_flexible"]("none", "none").correct


def test_normalise():
    spellings = {"$1,000.": "1000", "ABC.": "abc", "x\ny #### 7": "7", "3.5": "3.5", "#### 1 #### 2": "2", "a..": "a."}
    assert {text: normalise_gsm8k(text) for text in spellings} == spellings
    assert normalise_gsm8k("#### 5\n") == "5"


def test_exact_forgives_outer_space_alone():
    given = {" a b\n": True, "A b": False, "a  b": False, "a b.": False}
    assert {text: GRADERS["exact"](text, "a b").correct for text in given} == given


def record(prompt: str = "?", response: str = "#### 18", fields_json: str = "") -> Record:
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
        assert grader.name == f"{place}:says" and grader.version is not None and grader.version.startswith("sha256:")
    assert find_grader("users:numpy_bool")("1", record()) == (True, None, "#### 18", None)
    assert find_grader("users:whole_grade")("1", record()) == (True, "a", "b", None)
    assert find_grader("gsm8k_strict").version is None
    before = find_grader("users.py:says").version
    Path("users.py").write_text(USERS + "\n")
    assert find_grader("users.py:says").version != before


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

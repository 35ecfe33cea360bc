"""Grades Countdown: an example of a grader that is given to ``evaluate.grader`` (evaluation.md)."""

import re
from collections import Counter

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def problem(record):
    """Returns the numbers and the target: other fields of the record where it has them, else what its prompt lists."""
    if "target" in record.fields:
        return record.fields["numbers"], record.fields["target"]
    *numbers, target = (int(number) for number in record.prompt.split(","))
    return numbers, target


def grade(response, reference, record):
    """Tells whether the steps use numbers that are there, are right, and end at the target."""
    numbers, target = problem(record)
    there = Counter(numbers)
    for step in response.replace(" ", "").strip().split(","):
        found = STEP.fullmatch(step)
        if found is None:
            return False
        a, b, result = int(found[1]), int(found[3]), int(found[4])
        there.subtract([a, b])
        right = {"+": a + b == result, "-": a - b == result, "*": a * b == result, "/": b != 0 and a == b * result}
        if min(there.values()) < 0 or not right[found[2]]:
            return False
        there[result] += 1
    return result == target

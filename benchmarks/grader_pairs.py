r"""Grades references as responses: each against itself, and against the references of other problems with another answer.

A grader must accept every reference as its own answer. Two problems may have the same answer by chance; any other pair that
is graded as right is printed, to be judged by eye: `0.5` and `\frac{1}{2}` are equal, `x = 5` and `5` pass for equal.

    python -m benchmarks.grader_pairs gsm8k/test.jsonl --field answer --grader gsm8k_strict
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxblock.evaluation.graders import GRADERS


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints and returns the counts, and the pairs of different answers that are graded as right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines")
    parser.add_argument("--field", default="answer", help="the field that holds the reference")
    parser.add_argument("--grader", default="math_boxed", choices=GRADERS)
    parser.add_argument(
        "--box", action="store_true", help=r"put the text after a reference's last `#### ` into \boxed{}"
    )
    parser.add_argument(
        "--others", type=int, help="the number of other answers that each is compared with; all if absent"
    )
    args = parser.parse_args(argv)
    grade = GRADERS[args.grader]
    texts = [json.loads(line)[args.field] for line in args.file.read_text(encoding="utf-8").split("\n") if line.strip()]
    if args.box:
        texts = [rf"\boxed{{{text.rpartition('#### ')[2]}}}" for text in texts]
    own = [grade(text, text) for text in texts]
    counts = Counter(grade_.expected for grade_ in own)
    first = {grade_.expected: text for grade_, text in reversed(list(zip(own, texts, strict=True)))}
    answers = list(first)
    compared, right = 0, []
    for at, answer in enumerate(answers):
        following = answers[at + 1 :] + answers[:at]
        for other in following[: args.others]:
            compared += 1
            if grade(first[answer], first[other]).correct:
                right.append((answer, other))
    n = len(texts)
    found = {
        "references": n,
        "right_about_themselves": sum(grade_.correct for grade_ in own),
        "different_answers": len(answers),
        "same_answer_by_chance": sum(count * (count - 1) for count in counts.values()) / max(n * (n - 1), 1),
        "pairs_of_different_answers": compared,
        "right_pairs": right,
    }
    print("\n".join(f"{name}: {value}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()

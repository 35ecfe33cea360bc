"""Decides what happens to records that are too long, and counts them."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

_OVER_TOTAL = "longer than data.max_total_len"
_SIDES = ("prompt", "response")


class Verdict(NamedTuple):
    """Tells how an example fits the rules.

    Attributes:
        where: The place of the record, for error messages.
        lengths: The numbers of tokens of prompt and response, before anything is cut.
        dropped: The reason why it is left out; empty where it is kept.
        cut: Whether its response is cut to the canvas.
    """

    where: str
    lengths: tuple[int, int]
    dropped: str
    cut: bool


class LengthRules:
    """Applies the rules on lengths to single examples. It does not change, so that processes may have copies.

    A training record with more than `data.max_total_len` tokens is dropped. Then every record must fit the canvas;
    `data.overlong` says what happens if it does not.
    """

    def __init__(self, data: DataConfig, canvas: CanvasConfig) -> None:
        """Takes the rules from the settings, which are resolved (see `recipes.with_recipe`)."""
        self.overlong, self.block = data.overlong, canvas.block
        self.limits = (canvas.prompt_len, canvas.response_len)
        # Without a file of validation records, they are taken from the training records, whose limit then applies to them.
        self._ruled = ("train", "validation") if data.validation is None else ("train",)
        self.most_tokens = data.max_total_len or 0

    def judge(self, split: str, example: Example, prompt_ids: list[int], response_ids: list[int]) -> Verdict:
        """Tells whether an example of a split is kept, and whether its response is cut. A prompt is never cut."""
        lengths = (len(prompt_ids), len(response_ids))
        if self.most_tokens and split in self._ruled and sum(lengths) > self.most_tokens:
            return Verdict(example.where, lengths, _OVER_TOTAL, False)
        long = self.too_long(lengths)
        if long == ["response"] and self.overlong == "truncate":
            return Verdict(example.where, lengths, "", True)
        return Verdict(example.where, lengths, f"{' and '.join(long)} too long" if long else "", False)

    def too_long(self, lengths: tuple[int, int]) -> list[str]:
        """Returns which sides ("prompt", "response") of these lengths do not fit the canvas."""
        return [side for side, length, limit in zip(_SIDES, lengths, self.limits, strict=True) if length > limit]


class LengthCheck:
    """Remembers which examples of all splits were too long, for one error about all of them."""

    def __init__(self, rules: LengthRules) -> None:
        """Begins with no example seen."""
        self._rules, self._counts, self._first = rules, Counter[str](), ""
        self.longest = [0, 0]
        """The numbers of tokens of the longest prompt and the longest response, of those within `data.max_total_len`."""

    def add(self, verdict: Verdict) -> None:
        """Adds an example to the counts of those that are too long."""
        if verdict.dropped == _OVER_TOTAL:
            return
        self.longest = [max(pair) for pair in zip(self.longest, verdict.lengths, strict=True)]
        long = self._rules.too_long(verdict.lengths)
        self._counts.update(["records", *long, *(["too long"] if long else [])])
        if long and not self._first:
            side = _SIDES.index(long[0])
            length, limit = verdict.lengths[side], self._rules.limits[side]
            self._first = (
                f"{verdict.where}: the {long[0]} is {length} tokens long, {length - limit} more than "
                f"canvas.{long[0]}_len = {limit}"
            )

    def check(self) -> None:
        """Raises UserError where `data.overlong` is `error` and an example was too long.

        The message names the first such record, counts all of them, and says which canvas lengths would fit them.
        """
        if self._rules.overlong != "error" or not self._first:
            return
        counts, block = self._counts, self._rules.block
        needed = {"prompt": self.longest[0], "response": -(-self.longest[1] // block) * block}
        sides = [f"canvas.{side}_len = {length}" for side, length in needed.items() if counts[side]]
        raise UserError(
            f"{self._first}. {counts['too long']} of {counts['records']} records are too long "
            f"({counts['prompt']} prompts, {counts['response']} responses). To keep them all set {' and '.join(sides)}; "
            "or set data.overlong to `drop`, or to `truncate` (cuts responses, drops over-long prompts)"
        )


class SplitCount:
    """Counts what is kept, dropped and cut of one split."""

    def __init__(self, split: str, rules: LengthRules, check: LengthCheck, most_records: int) -> None:
        """Begins with no record seen.

        Args:
            split: "train", "validation" or "test".
            rules: The rules by which examples are dropped.
            check: Is told of every example.
            most_records: The number of examples of one input that are kept; 0 for all.
        """
        self._split, self._rules, self._check, self._most_records = split, rules, check, most_records
        self._dropped, self._cut, self._left_out = Counter[str](), Counter[str](), Counter[str]()
        self._fields = [0, 0]
        self._seen = self._unknown = 0
        self.kept = 0
        """The number of examples that are kept so far."""

    def add(self, verdict: Verdict) -> bool:
        """Counts an example; returns whether it is kept."""
        self._check.add(verdict)
        self._seen += 1
        if verdict.dropped:
            self._dropped[verdict.dropped] += 1
            return False
        self._cut.update(["response too long"] if verdict.cut else [])
        self.kept += 1
        return True

    def add_fields(self, size: int, left_out: list[str]) -> None:
        """Counts the bytes of the other fields of an example that is kept, and their names where they could not be kept."""
        self._left_out.update(left_out)
        self._fields = [self._fields[0] + (size > 0), self._fields[1] + size]

    def add_unknown(self, unknown: bool) -> None:
        """Counts an example that is kept and whose response holds letters that the tokenizer lacks."""
        self._unknown += unknown

    def is_full(self, before: int) -> bool:
        """Tells whether an input needs no more examples, of which `before` were kept of the inputs before it."""
        return self._most_records > 0 and self.kept - before == self._most_records

    def skip(self, examples: int) -> None:
        """Counts the examples of an input that come after the last one that is kept."""
        self._seen += examples
        if examples:
            self._dropped["beyond data.max_records"] += examples

    def report(self) -> dict[str, Any]:
        """Returns {"kept": n, "dropped": {reason: n}, "cut": {reason: n}}.

        Where records have other fields, it has "fields": {"records": n, "bytes": n, "left_out": {name: n}} too, of those kept for
        graders and those that JSON cannot hold; where responses hold letters that the tokenizer lacks, "unknown": their number.

        Raises:
            UserError: If no record is left (unless `data.overlong` is `error`: then `LengthCheck.check` raises).
        """
        if self._seen and self._dropped[_OVER_TOTAL] == self._seen:
            raise UserError(
                f"all {self._seen} {self._split} records have more than data.max_total_len = {self._rules.most_tokens} tokens"
            )
        if not self.kept and self._rules.overlong != "error":
            (prompt, response), (longest_prompt, longest_response) = self._rules.limits, self._check.longest
            raise UserError(
                f"no {self._split} record fits the canvas ({prompt} + {response} tokens); the longest prompt has "
                f"{longest_prompt} tokens, the longest response {longest_response}"
            )
        report = {"kept": self.kept, "dropped": dict(self._dropped), "cut": dict(self._cut)}
        if self._fields[0] or self._left_out:
            names = ("records", "bytes")
            report["fields"] = {**dict(zip(names, self._fields, strict=True)), "left_out": dict(self._left_out)}
        if self._unknown:
            report["unknown"] = self._unknown
        return report

"""Decides what happens to records that are too long, and counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxblock.data.config import DataConfig
from jaxblock.data.store.records import Record
from jaxblock.data.text.examples import Example
from jaxblock.data.text.fields import fields_json
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError


class LengthRules:
    """Applies the rules on lengths to every split, and counts the records that they drop.

    A training record with more than `data.max_total_len` tokens is dropped. Then every record must fit the canvas;
    `data.overlong` says what happens if it does not. Of the training records that fit, the first `data.max_records` are kept.
    """

    def __init__(self, data: DataConfig, canvas: CanvasConfig) -> None:
        """Takes the rules from the settings, which are resolved (see `recipes.with_recipe`)."""
        self._data, self._block = data, canvas.block
        self._limits = {"prompt": canvas.prompt_len, "response": canvas.response_len}
        self._first_complaint = ""
        self._counts: Counter[str] = Counter()
        self._longest = {"prompt": 0, "response": 0}

    def apply(
        self, split: str, pairs: Iterable[tuple[list[int], list[int]]], examples: list[Example]
    ) -> tuple[list[Record], dict[str, Any]]:
        """Applies the rules to a split.

        Args:
            split: "train", "validation" or "test".
            pairs: The ids of each example's prompt and response; no more of them are read than are needed.
            examples: The examples that the ids belong to.

        Returns:
            (the records that fit, a report {"kept": n, "dropped": {reason: n}, "cut": {reason: n}} of how many records
            were kept, dropped and cut). A prompt is never cut. Where records have other fields, the report has "fields":
            {"records": n, "bytes": n, "left_out": {name: n}} too, of those kept for graders and those that JSON cannot hold.

        Raises:
            UserError: If no record is left (unless `data.overlong` is `error`: then `check` raises), or a record's other
                fields are too large.
        """
        kept: list[Record] = []
        dropped: Counter[str] = Counter()
        cut: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        # Without a file of validation records, they are taken from the training records, whose limit then applies to them.
        ruled = split == "train" or split == "validation" and self._data.validation is None
        most_tokens = self._data.max_total_len if ruled else None
        most_records = self._data.max_records if split == "train" else None
        for place, ((prompt_ids, response_ids), example) in enumerate(zip(pairs, examples, strict=True), 1):
            if most_tokens and len(prompt_ids) + len(response_ids) > most_tokens:
                dropped["longer than data.max_total_len"] += 1
                continue
            long = self._too_long(prompt_ids, response_ids, example.where)
            if long == ["response"] and self._data.overlong == "truncate":
                response_ids = response_ids[: self._limits["response"]]
                cut["response too long"] += 1
            elif long:
                dropped[f"{' and '.join(long)} too long"] += 1
                continue
            ids = (np.array(prompt_ids, np.int32), np.array(response_ids, np.int32))
            fields, not_kept = fields_json(example.fields, example.where)
            left_out.update(not_kept)
            kept.append(Record(*ids, example.prompt, example.response, example.source, len(kept), fields))
            if len(kept) == most_records:
                if place < len(examples):
                    dropped["beyond data.max_records"] = len(examples) - place
                break
        if examples and dropped["longer than data.max_total_len"] == len(examples):
            raise UserError(
                f"all {len(examples)} {split} records have more than data.max_total_len = {most_tokens} tokens"
            )
        if not kept and self._data.overlong != "error":
            raise UserError(
                f"no {split} record fits the canvas ({self._limits['prompt']} + {self._limits['response']} tokens); "
                f"the longest prompt has {self._longest['prompt']} tokens, the longest response "
                f"{self._longest['response']}"
            )
        report = {"kept": len(kept), "dropped": dict(dropped), "cut": dict(cut)}
        sizes = [len(record.fields_json) for record in kept if record.fields_json]
        if sizes or left_out:
            report["fields"] = {"records": len(sizes), "bytes": sum(sizes), "left_out": dict(left_out)}
        return kept, report

    def check(self) -> None:
        """Raises UserError where `data.overlong` is `error` and a record of any split was too long.

        The message names the first such record, counts all of them, and says which canvas lengths would fit them.
        """
        if self._data.overlong != "error" or not self._first_complaint:
            return
        counts = self._counts
        needed = {
            "prompt": self._longest["prompt"],
            "response": -(-self._longest["response"] // self._block) * self._block,
        }
        sides = [f"canvas.{side}_len = {length}" for side, length in needed.items() if counts[side]]
        raise UserError(
            f"{self._first_complaint}. {counts['too long']} of {counts['records']} records are too long "
            f"({counts['prompt']} prompts, {counts['response']} responses). To keep them all set {' and '.join(sides)}; "
            "or set data.overlong to `drop`, or to `truncate` (cuts responses, drops over-long prompts)"
        )

    def _too_long(self, prompt_ids: list[int], response_ids: list[int], where: str) -> list[str]:
        """Counts a record, and returns which of its sides ("prompt", "response") do not fit the canvas."""
        long = []
        for side, ids in (("prompt", prompt_ids), ("response", response_ids)):
            limit = self._limits[side]
            self._longest[side] = max(self._longest[side], len(ids))
            if len(ids) > limit:
                long.append(side)
                self._first_complaint = self._first_complaint or (
                    f"{where}: the {side} is {len(ids)} tokens long, {len(ids) - limit} more than "
                    f"canvas.{side}_len = {limit}"
                )
        self._counts.update(["records", *long, *(["too long"] if long else [])])
        return long

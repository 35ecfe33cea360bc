"""Lengths: which canvases are valid, and what happens to records that do not fit one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxblock.config.config import Config
from jaxblock.data.store.records import Record
from jaxblock.data.text.sources import Example
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError


def check_canvas(canvas: CanvasConfig) -> None:
    """Checks the lengths of a canvas.

    Raises:
        UserError: If one is not positive, or the block does not divide the response (the nearest that does is named).
    """
    for name in ("prompt_len", "response_len", "block"):
        if getattr(canvas, name) < 1:
            raise UserError(f"canvas.{name} = {getattr(canvas, name)}: it must be 1 or more")
    if canvas.response_len % canvas.block:
        valid = [n for n in range(1, canvas.response_len + 1) if canvas.response_len % n == 0]
        nearest = min(valid, key=lambda n: (abs(n - canvas.block), n))
        up = -(-canvas.response_len // canvas.block) * canvas.block
        raise UserError(
            f"canvas.block = {canvas.block} does not divide canvas.response_len = {canvas.response_len}: set "
            f"canvas.block = {nearest}, "
            f"or canvas.response_len = {up}"
        )


class LengthPolicy:
    """What happens to records that are too long, and the count of them.

    Training records pass the rule of `data.max_total_len` first, and only `data.max_records` of them are kept; then
    every record meets the canvas (`data.overlong`).
    """

    def __init__(self, config: Config) -> None:
        """Reads the rules of resolved settings (see `recipes.resolve`)."""
        self._policy, self._canvas, self._data = config.data.overlong, config.canvas, config.data
        self._first = ""
        self._long: Counter[str] = Counter()
        self._longest = {"prompt": 0, "response": 0}

    def apply(
        self, split: str, pairs: Iterable[tuple[list[int], list[int]]], examples: list[Example]
    ) -> tuple[list[Record], dict[str, Any]]:
        """Applies the rules to a split.

        Args:
            split: Its name.
            pairs: Ids of prompt and response of each example; not read beyond the last that is needed.
            examples: The examples themselves.

        Returns:
            Records that fit, and {"kept", "dropped", "cut"} with reasons. Nothing is ever cut off a prompt.

        Raises:
            UserError: If none is left.
        """
        kept: list[Record] = []
        dropped: Counter[str] = Counter()
        cut: Counter[str] = Counter()
        # A validation split taken from the training records follows their rule.
        ruled = split == "train" or split == "validation" and self._data.validation is None
        most_tokens = self._data.max_total_len if ruled else None
        most_records = self._data.max_records if split == "train" else None
        for place, ((prompt_ids, response_ids), example) in enumerate(zip(pairs, examples, strict=True), 1):
            if most_tokens and len(prompt_ids) + len(response_ids) > most_tokens:
                dropped["longer than data.max_total_len"] += 1
                continue
            long = self._too_long(prompt_ids, response_ids, example.where)
            if "response" in long and self._policy == "truncate" and "prompt" not in long:
                response_ids = response_ids[: self._canvas.response_len]
                cut["response too long"] += 1
            elif long:
                dropped[f"{' and '.join(long)} too long"] += 1
                continue
            ids = (np.array(prompt_ids, np.int32), np.array(response_ids, np.int32))
            kept.append(Record(*ids, example.prompt, example.response, example.source, len(kept)))
            if len(kept) == most_records:
                if place < len(examples):
                    dropped["beyond data.max_records"] = len(examples) - place
                break
        if examples and dropped["longer than data.max_total_len"] == len(examples):
            raise UserError(
                f"all {len(examples)} {split} records have more than data.max_total_len = {most_tokens} tokens"
            )
        if not kept and self._policy != "error":
            raise UserError(
                f"no {split} record fits the canvas ({self._canvas.prompt_len} + {self._canvas.response_len} tokens); "
                f"the longest prompt has {self._longest['prompt']} tokens, the longest response "
                f"{self._longest['response']}"
            )
        return kept, {"kept": len(kept), "dropped": dict(dropped), "cut": dict(cut)}

    def check(self) -> None:
        """Raises the error of the policy `error`, which names the first record and counts them all."""
        if self._policy != "error" or not self._first:
            return
        count = f"{self._long['records']} of {self._long['all']} records are too long"
        sides = [f"canvas.{side}_len = {self._needed(side)}" for side in ("prompt", "response") if self._long[side]]
        raise UserError(
            f"{self._first}. {count} ({self._long['prompt']} prompts, {self._long['response']} responses). To keep "
            "them all set "
            f"{' and '.join(sides)}; or set data.overlong to `drop`, or to `truncate` (cuts responses, drops "
            "over-long prompts)"
        )

    def _too_long(self, prompt_ids: list[int], response_ids: list[int], where: str) -> list[str]:
        long = []
        self._long["all"] += 1
        for side, ids in (("prompt", prompt_ids), ("response", response_ids)):
            self._longest[side] = max(self._longest[side], len(ids))
            limit = getattr(self._canvas, f"{side}_len")
            if len(ids) > limit:
                long.append(side)
                self._long[side] += 1
                if not self._first:
                    excess = len(ids) - limit
                    self._first = (
                        f"{where}: the {side} is {len(ids)} tokens long, {excess} more than canvas.{side}_len = {limit}"
                    )
        self._long["records"] += bool(long)
        return long

    def _needed(self, side: str) -> int:
        step = self._canvas.block if side == "response" else 1
        return -(-self._longest[side] // step) * step

"""Lengths: which canvases are valid, and what happens to records that do not fit one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from jaxblock.config import CanvasConfig, Config
from jaxblock.data.records import Record
from jaxblock.data.sources import Example
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
    """What happens to records longer than the canvas (`data.overlong`), and the count of them."""

    def __init__(self, config: Config) -> None:
        self._policy, self._canvas = config.data.overlong, config.canvas
        self._first = ""
        self._long: Counter[str] = Counter()
        self._longest = {"prompt": 0, "response": 0}

    def apply(
        self, split: str, pairs: list[tuple[list[int], list[int]]], examples: list[Example]
    ) -> tuple[list[Record], dict[str, Any]]:
        """Records that fit, and {"kept", "dropped", "cut"} with reasons. Nothing is ever cut off a prompt."""
        kept: list[Record] = []
        dropped: Counter[str] = Counter()
        cut: Counter[str] = Counter()
        for (prompt_ids, response_ids), example in zip(pairs, examples, strict=True):
            long = self._too_long(prompt_ids, response_ids, example.where)
            if "response" in long and self._policy == "truncate" and "prompt" not in long:
                response_ids = response_ids[: self._canvas.response_len]
                cut["response too long"] += 1
            elif long:
                dropped[f"{' and '.join(long)} too long"] += 1
                continue
            ids = (np.array(prompt_ids, np.int32), np.array(response_ids, np.int32))
            kept.append(Record(*ids, example.prompt, example.response, example.source, len(kept)))
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

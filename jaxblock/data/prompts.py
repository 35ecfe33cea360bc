"""Converts a caller's prompts (lists, or a padded array with a mask) into rows without padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array

from jaxblock.data.loader import pad_ids
from jaxblock.errors import UserError, shown

Ids = Sequence[Sequence[int]] | np.ndarray | Array
"""A batch of token ids: a list of lists, or an array [B, T]."""


def as_array(ids: Any, name: str = "ids") -> np.ndarray:
    """Returns ids as an array, int32; nothing is rounded or cut off.

    Args:
        ids: A row of ids, or a batch [B, T].
        name: The ids' name in messages.

    Raises:
        UserError: The rows have different lengths, or an id is no whole number.
    """
    try:
        found = np.asarray(ids)
    except ValueError as error:
        raise UserError(
            f"{name} are a batch [B, T]: rows of one length; pad them, and say so by attention_mask"
        ) from error
    if found.size and (found.dtype.kind not in "iu" or found.min() < -(2**31) or found.max() >= 2**31):
        raise UserError(f"{name} must be token ids, which are whole numbers: {shown(ids)}")
    return found.astype(np.int32)


def flush_left(ids: np.ndarray, attention_mask: Ids | None) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Moves each row's real tokens to the left.

    Args:
        ids: The tokens [B, T].
        attention_mask: 1 for real tokens, 0 for padding [B, T]; None where all are real.

    Returns:
        (ids [B, T], lengths [B], for each row the original positions of its tokens).

    Raises:
        UserError: The ids or the mask have the wrong shape, or the mask has other numbers than 0 and 1, or padding between
            real tokens, whose places would then change.
    """
    if ids.ndim != 2 or not ids.size:
        raise UserError(f"ids are a batch [B, T], but these have the shape {ids.shape}")
    if attention_mask is None:
        everything = [np.arange(ids.shape[1]) for _ in ids]
        return ids, np.full(len(ids), ids.shape[1], np.int32), everything
    mask = np.asarray(attention_mask)
    real = mask == 1
    if real.shape != ids.shape:
        raise UserError(f"attention_mask has the shape {real.shape}, the ids {ids.shape}: they must be equal")
    if not (real | (mask == 0)).all():
        raise UserError("attention_mask must be 1 for real tokens and 0 for padding, and holds other numbers")
    sources = [np.flatnonzero(row) for row in real]
    for row, source in enumerate(sources):
        if source.size and source[-1] - source[0] >= source.size:
            raise UserError(f"attention_mask has padding between the real tokens of row {row}: put it on either side")
    rows, lengths = pad_ids([row[source] for row, source in zip(ids, sources, strict=True)], ids.shape[1])
    return rows, lengths, sources


def refuse_text(prompts: Any) -> None:
    """Raises UserError where prompts are texts or messages, not ids."""
    text = (str, Mapping)
    batch = prompts if isinstance(prompts, Iterable) else ()
    firsts = (row[0] if isinstance(row, list | tuple) and row else row for row in batch)
    if isinstance(prompts, str) or any(isinstance(first, text) for first in firsts):
        raise UserError("prompts are token ids here, not text: model.generate(...) takes texts and messages")


def split_prompts(prompt_ids: Ids, attention_mask: Ids | None) -> list[np.ndarray]:
    """Splits a batch into its prompts, without padding.

    Args:
        prompt_ids: The prompts; an array may be padded on either side.
        attention_mask: 1 for real tokens, 0 for padding; None where all are real.

    Returns:
        Each prompt's ids.

    Raises:
        UserError: The input is not a batch of prompts, or the mask has the wrong shape.
    """
    refuse_text(prompt_ids)
    if attention_mask is None and isinstance(prompt_ids, list | tuple):
        prompts = [as_array(row, "prompts") for row in prompt_ids]
        if any(row.ndim != 1 for row in prompts):
            raise UserError("prompts are a batch: a list of lists of ids, or an array [B, P]; put one prompt in [ ]")
        return prompts
    rows, lengths, _ = flush_left(as_array(prompt_ids), attention_mask)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]

"""Converts a caller's prompts (lists, or a padded array with a mask) into rows without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array

from jaxblock.data.loader import pad_ids
from jaxblock.errors import UserError

Ids = Sequence[Sequence[int]] | np.ndarray | Array
"""A batch of token ids: a list of lists, or an array [B, T]."""


def as_array(ids: Ids) -> np.ndarray:
    """Returns a batch of ids as an array [B, T].

    Raises:
        UserError: The rows have different lengths.
    """
    try:
        return np.asarray(ids, np.int32)
    except ValueError as error:
        raise UserError("ids are a batch [B, T]: rows of one length; pad them, and say so by attention_mask") from error


def flush_left(ids: np.ndarray, attention_mask: Ids | None) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Moves each row's real tokens to the left.

    Args:
        ids: The tokens [B, T].
        attention_mask: 1 for real tokens, 0 for padding [B, T]; None where all are real.

    Returns:
        (ids [B, T], lengths [B], for each row the original positions of its tokens).

    Raises:
        UserError: The ids or the mask have the wrong shape.
    """
    if ids.ndim != 2:
        raise UserError(f"ids are a batch [B, T], but these have the shape {ids.shape}")
    if attention_mask is None:
        everything = [np.arange(ids.shape[1]) for _ in ids]
        return ids, np.full(len(ids), ids.shape[1], np.int32), everything
    real = np.asarray(attention_mask).astype(bool)
    if real.shape != ids.shape:
        raise UserError(f"attention_mask has the shape {real.shape}, the ids {ids.shape}: they must be equal")
    sources = [np.flatnonzero(row) for row in real]
    rows, lengths = pad_ids([row[source] for row, source in zip(ids, sources, strict=True)], ids.shape[1])
    return rows, lengths, sources


def refuse_text(prompts: Any) -> None:
    """Raises UserError where prompts are texts or messages, not ids."""
    text = (str, Mapping)
    firsts = (row[0] if isinstance(row, list | tuple) and row else row for row in prompts)
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
    if attention_mask is None and not isinstance(prompt_ids, np.ndarray | Array):
        prompts = [np.asarray(row, np.int32) for row in prompt_ids]
        if any(row.ndim != 1 for row in prompts):
            raise UserError("prompts are a batch: a list of lists of ids, or an array [B, P]; put one prompt in [ ]")
        return prompts
    rows, lengths, _ = flush_left(as_array(prompt_ids), attention_mask)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]

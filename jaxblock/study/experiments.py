"""Describes the experiments of a study, each a comparison of arms, and checks what each kind of them needs."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxblock.config.yaml import build_from_tree
from jaxblock.errors import UserError, shown
from jaxblock.study.gradients.sizes import GRADIENTS

Unit = Literal["steps", "flops", "masked_tokens", "block_positions"]
"""What two arms are given the same amount of: updates, computing, masked tokens with loss, or positions of active blocks."""

Kind = Literal["curve", "grid", "gradients", "relation", "pace"]

RELATION = "relation"
"""The kind of the experiments that need no score of their own: they relate the NELBO and Pass@1 of the others' scores."""


@dataclass(frozen=True)
class Experiment:
    """Compares arms at one or several lengths of training.

    Attributes:
        title: one line for the report.
        arms: the arms that are compared; the last one is the control. A single one is only drawn.
        budgets: the lengths of training, in steps of the arm `reference`; none for a `relation`.
        decodings: the ways of decoding by which each arm is scored; none where gradients are measured.
        unit: what the other arms get as much of as `reference` does in these steps.
        reference: the arm whose steps the budgets count; None for the first one.
        primary: whether the experiment tests a hypothesis of the protocol; others are exploratory.
        seeds: the number of seeds, from the study's first one on; None for all.
        kind: `curve` compares each arm with the control along the budgets, and each way of decoding with the first one; `grid` asks
            at one budget whether an arm is best decoded with its own block size; `gradients` measures the gradients of each arm's
            checkpoints at the budgets (docs/study/gradients.md); `relation` asks whether the scores that other experiments need
            have the same order by NELBO as by Pass@1; `pace` compares the tokens per forward pass at equal Pass@1, by ways of
            decoding from the most careful to the fastest one, at one budget.
    """

    title: str
    arms: tuple[str, ...]
    budgets: tuple[int, ...] = ()
    decodings: tuple[str, ...] = ()
    unit: Unit = "steps"
    reference: str | None = None
    primary: bool = False
    seeds: int | None = None
    kind: Kind = "curve"


def experiment_from_tree(value: Any, where: str, name: str) -> Experiment:
    """Builds an experiment from plain values; raises UserError where a field that its kind needs is missing, or has no effect."""
    place = f"experiments.{name}"
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {place} must be a mapping of keys, not {shown(value)}")
    kind = value.get("kind")
    if kind == GRADIENTS and value.get("decodings"):
        raise UserError(f"{where}: {place} measures gradients, which need no decodings: leave them out")
    for field in ("budgets", "unit", "reference", "seeds"):
        if kind == RELATION and field in value:
            raise UserError(
                f"{where}: {place}.{field} has no effect, since a relation takes the scores that the other experiments need: leave it "
                "out"
            )
    needed = {GRADIENTS: ("arms", "budgets"), RELATION: ("arms", "decodings")}
    for field in needed.get(str(kind), ("arms", "decodings", "budgets")):
        if not value.get(field):
            raise UserError(f"{where}: {place}.{field} is missing or empty")
    return build_from_tree(Experiment, {"title": name, **value}, where, f"{place}.")


def check_experiment(
    one: Experiment,
    place: str,
    where: str,
    arms: Mapping[str, str],
    decodings: Mapping[str, str | None],
    seeds: int,
) -> None:
    """Checks an experiment against the study that it belongs to.

    Args:
        one: the experiment.
        place: where it stands in the file, such as ``experiments.pace``.
        where: the file.
        arms: the task of each arm of the study.
        decodings: the task of each way of decoding; None where it is the arm's.
        seeds: the number of seeds of the study.

    Raises:
        UserError: a name is unknown, a number is out of range, or its kind cannot be computed from what it names.
    """
    for arm in one.arms:
        check_name(arm, arms, where, f"{place}.arms")
    for way in one.decodings:
        check_name(way, decodings, where, f"{place}.decodings")
    check_name(one.reference or one.arms[0], one.arms, where, f"{place}.reference")
    if one.budgets and (min(one.budgets) < 1 or list(one.budgets) != sorted(set(one.budgets))):
        raise UserError(
            f"{where}: {place}.budgets must be whole numbers of at least 1 that rise, not {list(one.budgets)}"
        )
    if one.seeds is not None and not 1 <= one.seeds <= seeds:
        raise UserError(f"{where}: {place}.seeds is {one.seeds}: the study has {seeds} seeds")
    for what, names in (("arms", one.arms), ("decodings", one.decodings)):
        if len(set(names)) < len(names):
            raise UserError(f"{where}: {place}.{what} names one of them twice: {', '.join(names)}")
    if one.primary and one.kind not in ("curve", "grid"):
        raise UserError(f"{where}: {place} is of the kind {one.kind}, which tests nothing: leave out primary")
    if one.primary and len(one.arms) < 2:
        raise UserError(
            f"{where}: {place} is primary, but has one arm, which is compared with nothing: give it a control, or leave out primary"
        )
    _check_kind(one, place, where, arms, decodings)


def _check_kind(
    one: Experiment, place: str, where: str, arms: Mapping[str, str], decodings: Mapping[str, str | None]
) -> None:
    """Raises UserError where the budgets, arms and decodings are not what the experiment's kind needs."""
    if one.kind == "grid" and (len(one.budgets) != 1 or len(one.arms) < 2 or len(one.arms) != len(one.decodings)):
        raise UserError(
            f"{where}: {place} is a grid: give one budget, two arms or more, and for each arm the decoding that belongs to it"
        )
    if one.kind == "pace" and (len(one.budgets) != 1 or len(one.decodings) < 2):
        raise UserError(
            f"{where}: {place} compares the pace of decoding: give one budget, and two decodings or more, the most careful first"
        )
    if one.kind == RELATION and len(one.decodings) != 1:
        raise UserError(f"{where}: {place} relates scores by one way of decoding: give one, not {len(one.decodings)}")
    for way in one.decodings:
        tasks = {arm: decodings[way] or arms[arm] for arm in one.arms}
        if len(set(tasks.values())) > 1:
            raise UserError(
                f"{where}: {place} compares arms that are scored on different tasks by {way} "
                f"({', '.join(f'{arm}: {task}' for arm, task in tasks.items())}): give each task an experiment of its own"
            )


def check_name(name: str | None, known: Collection[str], where: str, place: str) -> None:
    """Raises UserError with the nearest known name where a name is not known."""
    if name not in known:
        raise UserError(f"{where}: {place} names {shown(name)}, which is not there{nearest(str(name), known)}")


def nearest(name: str, known: Collection[str]) -> str:
    """Returns the end of a message about an unknown name: the known name that is most like it, or all known names."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"

"""The sections of a config: each is named as in ``Config``, and says at every field whether a resumed run may change it."""

from __future__ import annotations

import dataclasses
from typing import get_args

from jaxblock.config.config import Config
from jaxblock.evaluation.config import GraderName
from jaxblock.evaluation.graders import GRADERS

SECTIONS = [type(section) for section in Config().sections()]


def test_sections_have_the_names_of_the_fields_that_hold_them() -> None:
    assert [section.section_name for section in SECTIONS] == [field.name for field in dataclasses.fields(Config)]


def test_every_grader_can_be_chosen() -> None:
    assert get_args(GraderName) == tuple(GRADERS)


def test_what_a_resumed_run_may_change() -> None:
    found = {section.section_name: section.changeable(saved=True) for section in SECTIONS}
    everything = {section.section_name: {field.name for field in dataclasses.fields(section)} for section in SECTIONS}
    assert found == {
        "data": {"prepared", "overwrite", "allow_other_template", "verify"},
        "canvas": set(),
        "method": set(),
        "model": {"remat", "attention", "scan_layers", "init_from", "init_step", "loss_chunk"},
        "lora": set(),
        "optimizer": set(),
        "train": everything["train"] - {"steps", "batch_size", "seed", "overfit_one_batch"},
        "decode": everything["decode"],
        "evaluate": everything["evaluate"],
    }
    # Without a checkpoint the start is made again, and must be the same start.
    for section in SECTIONS:
        assert section.changeable(saved=False) == found[section.section_name] - {"init_from", "init_step"}

"""The sections of a config: each is named as in ``Config``, and says at every field whether a resumed run may change it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
import textwrap
from typing import get_args

import pytest

from jaxblock.config.config import Config
from jaxblock.evaluation.config import GraderName
from jaxblock.evaluation.graders import GRADERS
from jaxblock.settings import Section

SECTIONS = [type(section) for section in Config().sections()]


def test_sections_have_the_names_of_the_fields_that_hold_them() -> None:
    assert [section.section_name for section in SECTIONS] == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.section_name)
def test_every_field_has_a_sentence(section: type[Section]) -> None:
    """``--help`` shows these sentences."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(node, ast.ClassDef)
    said = {
        before.target.id
        for before, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert said == {field.name for field in dataclasses.fields(section)}


def test_every_grader_can_be_chosen() -> None:
    assert get_args(GraderName) == tuple(GRADERS)


def test_what_a_resumed_run_may_change() -> None:
    found = {section.section_name: section.changeable(saved=True) for section in SECTIONS}
    everything = {section.section_name: {field.name for field in dataclasses.fields(section)} for section in SECTIONS}
    assert found == {
        "data": {"prepared", "overwrite", "allow_other_template"},
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


def test_settings_and_the_command_line_need_no_jax() -> None:
    """``--help`` does not wait for JAX."""
    code = "import sys, jaxblock.cli, jaxblock.config.checks, jaxblock.config.yaml; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

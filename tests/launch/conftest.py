"""Fixtures for the tests of the launch scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.gcloud import Desk


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)

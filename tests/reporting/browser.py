"""Opens pages in a headless browser, for tests that click and type; they are skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def started() -> Iterator:
    """Yields a browser of ``playwright``, or skips the test with the reason."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `browser`)")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        if found is None and not os.path.exists(driver.chromium.executable_path):
            pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is installed, nor playwright's own")
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()

"""Configures the documentation site: ``python -m sphinx -W docs docs/_build`` builds it (CONTRIBUTING.md).

Sphinx with MyST reads the same Markdown pages that are read in the repository. Every link between pages, to a heading or to a
file, is checked, and with -W a broken one fails the build.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the pages describe this checkout, whatever is installed

from generated_pages import write_pages  # noqa: E402

import jaxblock  # noqa: E402

project = "jaxblock"
author = copyright = "The jaxblock authors"
release = jaxblock.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # links to headings work as they do where the repository is read
myst_fence_as_directive = ["math"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"jaxblock {release}"
html_static_path: list[str] = []

write_pages(HERE)

"""Writes the pages of the site that follow from other files: all settings, the notebook, README and CONTRIBUTING."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from sphinx.pycode import ModuleAnalyzer

from jaxblock.config.config import Config

HEAD = """\
# All settings

Each section of a YAML file with its fields, their defaults, and what they do, as `jaxblock train --help-all` prints them.
`--section.field value` sets one on the command line. [Which settings to use](../choosing.md) says which matter.
"""


def write_pages(docs: Path) -> None:
    """Writes the pages into the folder ``_reference``, whose content is not kept in the repository.

    Args:
        docs: the folder of the documentation.
    """
    folder = docs / "_reference"
    folder.mkdir(exist_ok=True)
    settings = "\n".join([HEAD, *(line for section in Config().sections() for line in _section(section))]) + "\n"
    _write(folder / "settings.md", settings)
    notebook = json.loads((docs / "notebooks" / "start.ipynb").read_text(encoding="utf-8"))
    _write(folder / "notebook.md", "\n\n".join(_cell(cell) for cell in notebook["cells"]) + "\n")
    for name in ("README", "CONTRIBUTING"):
        text = (docs.parent / f"{name}.md").read_text(encoding="utf-8")
        _write(folder / f"{name.lower()}.md", _moved(text, docs.parent))


def _write(page: Path, text: str) -> None:
    """Writes a page, unless it holds the text already: an unchanged page is not built again."""
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def _cell(cell: dict[str, Any]) -> str:
    """Returns a cell of a notebook as Markdown; a cell that begins with %%sh is for a shell."""
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    if text.startswith("%%sh\n"):
        shown = re.sub(r"^#.*\n| \$JAXBLOCK_NOTEBOOK_FLAGS", "", text.removeprefix("%%sh\n"), flags=re.M)
        return f"```sh\n{shown}\n```"
    return f"```python\n{text}\n```"


def _moved(text: str, root: Path) -> str:
    """Returns the text of a page at the repository's root with its links as they are in ``docs/_reference``.

    A site cannot link to a folder of the repository: of such a link the text stays.
    """
    text = re.sub(
        r"\[([^\]]+)\]\(([\w./-]+)\)", lambda found: found[1] if (root / found[2]).is_dir() else found[0], text
    )
    text = re.sub(r"\]\((README|CONTRIBUTING)\.md", lambda found: f"]({found[1].lower()}.md", text)
    text = re.sub(r"\]\(docs/", "](../", text)
    return re.sub(r"\]\((?!\w+:|\.\./|#|readme\.md|contributing\.md)", "](../../", text)


def _section(section: Any) -> list[str]:
    """Returns the lines of a section: its heading and the table of its fields."""
    said = ModuleAnalyzer.for_module(type(section).__module__).find_attr_docs()
    rows = []
    for field in dataclasses.fields(section):
        sentence = " ".join(" ".join(said[type(section).__name__, field.name]).split()).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{_default(getattr(section, field.name))}` | {sentence} |")
    return [f"## {section.section_name}\n", "| field | default | what it does |", "|---|---|---|", *rows, ""]


def _default(value: Any) -> str:
    """Returns a default as a YAML file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value).replace("|", "\\|").replace("\n", "\\n") or '""'

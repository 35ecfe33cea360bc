"""Lists the packages for setuptools: those in ``jaxblock/``, and ``configs/``, which is installed as ``jaxblock/presets/``; and
makes the package's description of README.md.

All else about the package is in pyproject.toml, where neither a folder outside of the package nor a changed text can be given.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup


def description() -> str:
    """Returns README.md with the paths of its relative links as text, since on a package index these links lead nowhere."""
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")

    def path(link: re.Match[str]) -> str:
        text, target = link.groups()
        return f"`{target}`" if text == target else f"{text} (`{target}`)"

    return re.sub(r"\[([^]]+)\]\((?!https?://|#)([^)]+)\)", path, readme)


setup(
    packages=[
        *find_namespace_packages(include=["jaxblock", "jaxblock.*"], exclude=["*.__pycache__"]),
        "jaxblock.presets",
        "jaxblock.presets.study",
    ],
    package_dir={"jaxblock.presets": "configs", "jaxblock.presets.study": "configs/study"},
    package_data={
        "jaxblock.reporting.assets": ["*"],
        "jaxblock.presets": ["*.yaml"],
        "jaxblock.presets.study": ["*.yaml"],
    },
    long_description=description(),
    long_description_content_type="text/markdown",
)

"""Lists the packages for setuptools: those in ``jaxblock/``, and ``configs/``, which is installed as ``jaxblock/presets/``.

All else about the package is in pyproject.toml, where a folder outside of the package cannot be added to those that are found.
"""

from setuptools import find_namespace_packages, setup

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
)

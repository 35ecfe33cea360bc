"""Lists the packages for setuptools: those in ``jaxblock/``, and ``configs/``, which is installed as ``jaxblock/presets/``.

All else about the package is in pyproject.toml, where a folder outside of the package cannot be added to those that are found.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxblock", "jaxblock.*"]), "jaxblock.presets"],
    package_dir={"jaxblock.presets": "configs"},
    package_data={"jaxblock": ["reporting/assets/*"], "jaxblock.presets": ["*.yaml", "study/*.yaml"]},
)

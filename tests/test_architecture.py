"""Holds the lines of the house: which room may import which. Reads sources, runs nothing.

(What may be written where, and that the public is documented, are rules of ruff: pyproject.toml.)

Every rule is a function of ``{module name: source}`` to a list of complaints. Each is fed the whole package, which must
be clean, and then snippets that break it, which must not be.
"""

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "jaxblock"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]

ARROWS = """
room          may import, when the program runs
types
errors
uniforms
settings      errors
io            errors
diffusion     types errors uniforms settings
parallel      types errors
models        types errors uniforms settings parallel
config        errors settings io diffusion
data          errors settings io
huggingface   types errors io parallel models
inference     types settings diffusion parallel models
evaluation    types errors settings io diffusion parallel models data inference
training      types errors settings io diffusion parallel models config data huggingface evaluation
build         types settings diffusion models config training
fit           errors io diffusion parallel models config data huggingface training build
streaming     types settings diffusion parallel models
cards         errors io models config data training
model         types errors settings io diffusion parallel models config data huggingface inference streaming training cards
chat          errors config data diffusion model
loading       errors settings io parallel models data huggingface training build model
harness       types errors settings diffusion parallel models data inference model
reporting     types errors settings io diffusion streaming training
study         types errors settings io diffusion models config data evaluation training loading reporting
quickstart    errors io config reporting
__init__      errors model loading
cli           errors settings io parallel config __init__ commands
__main__      cli
"""
"""The arrows between rooms, from the ground up: a room imports itself and rooms above it in this list, never below.

``settings`` is ``settings.py`` and the ``config.py`` of every room: a section of settings belongs to its room, and any
room may read it, since it imports nothing but the vocabulary."""

JOINERS = {"commands": "a verb brings together whatever it needs; nothing but cli.py imports it"}
"""The rooms and modules that may join any others, and why. Even they make no circle."""

NO_FILES = {"io", "data", "huggingface", "evaluation", "reporting", "cards", "model", "loading", "cli", "commands"}
"""Rooms that the method, the network and the train step must not reach, however indirectly."""

PURE = ("uniforms", "diffusion", "models", "parallel", "training.step")

MAY_IMPORT = {room: set(targets) for room, *targets in map(str.split, ARROWS.strip().splitlines()[1:])}
MOST_LINES_OF_A_FUNCTION = 70


@functools.cache
def _imports(source: str) -> list[tuple[str, int, bool]]:
    """Returns each imported thing (``package.module`` or ``package.module.name``), its line, and whether it is for types only."""
    nodes = list(ast.walk(ast.parse(source)))
    checked = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    types_only = {inner for node in checked for statement in node.body for inner in ast.walk(statement)}
    return [
        (
            f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name,
            node.lineno,
            node in types_only,
        )
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]


def _ours(sources: Sources, target: str) -> str | None:
    """Returns the module of ours that an imported name lives in; None for somebody else's."""
    package, *parts = target.split(".")
    if package != PACKAGE:
        return None
    found = (".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in sources)
    return next(found, ".".join(parts[:2]) or "__init__")


def _edges(sources: Sources) -> Iterator[tuple[str, str, int, bool]]:
    """Yields importing module, imported module, line, and whether the import is for types only."""
    for module, source in sources.items():
        for name, line, types_only in _imports(source):
            target = _ours(sources, name)
            if target is not None and target != module:
                yield module, target, line, types_only


def _room(module: str) -> str:
    """Returns the room of a module; the settings of all rooms are one."""
    settings = module.endswith(".config") and module != "config.config"
    return "settings" if settings else module.split(".")[0]


def _graph(sources: Sources) -> dict[str, set[str]]:
    """Returns what each module imports when the program runs."""
    edges = [(module, target) for module, target, _, types_only in _edges(sources) if not types_only]
    return {module: {target for other, target in edges if other == module} for module in sources}


def rooms_import_what_they_may(sources: Sources) -> list[str]:
    """Holds the table above. For the method and the network an import for types alone counts too."""
    complaints = []
    for module, target, line, types_only in _edges(sources):
        room, other = _room(module), _room(target)
        strict = room in ("diffusion", "models", "parallel", "settings")
        if room in JOINERS or other == room or (types_only and not strict):
            continue
        if other not in MAY_IMPORT.get(room, ()):
            complaints.append(f"{module}:{line}: imports {target}; {room} may import {MAY_IMPORT.get(room)}")
    return complaints


def modules_make_no_circle(sources: Sources) -> list[str]:
    """Modules do not import each other in a circle; neither do rooms, as the table shows."""
    try:
        TopologicalSorter(_graph(sources)).prepare()
    except CycleError as error:
        return ["imports in a circle: " + " <- ".join(error.args[1])]
    return []


def pure_rooms_reach_no_files(sources: Sources) -> list[str]:
    """No chain of run-time imports leads from the method, the network or the train step to a room that does I/O."""
    graph = _graph(sources)
    chains = {module: module for module in sources if module in PURE or _room(module) in PURE}
    for module in (waiting := list(chains)):
        for target in graph.get(module, set()) - chains.keys():
            chains[target] = f"{chains[module]} -> {target}"
            waiting.append(target)
    return [chain for module, chain in chains.items() if _room(module) in NO_FILES]


def functions_fit_a_screen(sources: Sources) -> list[str]:
    """A function is read without scrolling."""
    return [
        f"{module}:{node.lineno}: {node.name} ends in line {node.end_lineno}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_A_FUNCTION
    ]


# fmt: off
BROKEN: dict[Rule, list[dict[str, str]]] = {
    rooms_import_what_they_may: [
        {"diffusion.canvas": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxblock import config"},
        {"diffusion.canvas": "def f():\n    import jaxblock.io.files"},
        {"diffusion.config": "from jaxblock.diffusion.canvas import view", "diffusion.canvas": ""},
        {"models.transformer": "from jaxblock.io import files", "io.files": ""},
        {"training.loop": "from jaxblock.fit.compile import x"},
        {"data.loader": "import jaxblock.models.spec as spec", "models.spec": ""},
        {"evaluation.runner": "from jaxblock.model import y"},
        {"cellar.wine": "from jaxblock import config", "config": ""},
    ],
    modules_make_no_circle: [
        {"build": "from jaxblock.fit.shapes import x", "fit.shapes": "from jaxblock import build"},
        {"data.a": "from jaxblock.data import b", "data.b": "def f():\n    from jaxblock.data.a import x"},
    ],
    pure_rooms_reach_no_files: [
        {"training.step": "import jaxblock.training.state", "training.state": "from jaxblock.io import files"},
        {"models.layers": "from jaxblock.models.names import x", "models.names": "import jaxblock.data.loader as r"},
    ],
    functions_fit_a_screen: [
        {"model": "def f():\n" + "    x = 1\n" * 70}, {"model": "class A:\n    def f(self):\n" + "        x = 1\n" * 70},
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    """Returns every source file by its name inside the package."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for path, name in names.items()}
    assert {"__init__", "diffusion.canvas", "training.step", "models", "cli"} <= files.keys()
    return files


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule_and_a_breach_is_caught(rule, package):
    assert rule(package) == []
    for breach in BROKEN[rule]:
        assert rule(breach), f"not caught: {breach}"


def test_the_table_names_real_rooms_and_points_down_and_there_is_no_drawer_for_odds_and_ends(package):
    """Each room of the table imports rooms above it in the list alone, so that no two can import each other."""
    rooms, above = {_room(module) for module in package}, set(JOINERS)
    assert rooms == MAY_IMPORT.keys() | JOINERS.keys() and rooms >= NO_FILES
    for room, targets in MAY_IMPORT.items():
        assert targets <= above, f"{room} may import {targets - above}, which the table does not name above it"
        above.add(room)
    names = {part for module in package for part in module.split(".")}
    assert not names & {"util", "utils", "helper", "helpers", "misc", "common"}

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
from typing import NamedTuple

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
quickstart    errors io config
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
MOST_LINES_OF_A_FUNCTION = 70


class Import(NamedTuple):
    """One imported thing: ``package.module`` or ``package.module.name``."""

    target: str
    line: int
    for_types_only: bool


@functools.cache
def _imports(source: str) -> tuple[Import, ...]:
    def visit(node: ast.AST, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for at, statement in enumerate([*node.body, *node.orelse]):
                yield from visit(statement, types_only or at < len(node.body))
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = "." * node.level + (node.module or "") + "." if isinstance(node, ast.ImportFrom) else ""
            yield from (Import(base + alias.name, node.lineno, types_only) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, types_only)

    return tuple(visit(ast.parse(source), False))


def _ours(sources: Sources, target: str) -> str | None:
    """Returns the module of ours that an imported name lives in; None for somebody else's."""
    package, *parts = target.split(".")
    if package != PACKAGE:
        return None
    found = (".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in sources)
    return next(found, ".".join(parts[:2]) or "__init__")


def _edges(sources: Sources, types_too: bool = False) -> Iterator[tuple[str, str, int]]:
    """Yields importing module, imported module and line."""
    for module, source in sources.items():
        for found in _imports(source):
            target = _ours(sources, found.target)
            if target is not None and target != module and (types_too or not found.for_types_only):
                yield module, target, found.line


def _room(module: str) -> str:
    """Returns the room of a module; the settings of all rooms are one."""
    settings = module.endswith(".config") and module != "config.config"
    return "settings" if settings else module.split(".")[0]


def _may_import() -> dict[str, set[str]]:
    """Reads the table of arrows."""
    rows = [line.split() for line in ARROWS.strip().splitlines()[1:]]
    return {room: set(targets) for room, *targets in rows}


def _graph(sources: Sources, name: Callable[[str], str] = str) -> dict[str, set[str]]:
    """Returns what each module (or whatever ``name`` makes of it) imports when the program runs, apart from itself."""
    graph: dict[str, set[str]] = {}
    for module, target, _ in _edges(sources):
        graph.setdefault(name(module), set()).update({name(target)} - {name(module)})
    return graph


def rooms_import_what_they_may(sources: Sources) -> list[str]:
    """Holds the table above. For the method and the network an import for types alone counts too."""
    complaints, at_run_time, may_import = [], set(_edges(sources)), _may_import()
    for edge in _edges(sources, types_too=True):
        module, target, line = edge
        room, other = _room(module), _room(target)
        strict = room in ("diffusion", "models", "parallel", "settings")
        if room in JOINERS or other == room or not (strict or edge in at_run_time):
            continue
        if room not in may_import:
            complaints.append(f"{module}: a new room: add it to the table of arrows")
        elif other not in may_import[room]:
            complaints.append(f"{module}:{line}: imports {target}; {room} may import {sorted(may_import[room])}")
    return complaints


def rooms_make_no_circle(sources: Sources) -> list[str]:
    """Neither rooms nor modules import each other in a circle."""
    complaints = []
    for name in (_room, str):
        try:
            TopologicalSorter(_graph(sources, name)).prepare()
        except CycleError as error:
            complaints.append("imports in a circle: " + " <- ".join(error.args[1]))
    return complaints


def pure_rooms_reach_no_files(sources: Sources) -> list[str]:
    """No chain of run-time imports leads from the method, the network or the train step to a room that does I/O."""
    graph = _graph(sources)

    def chains(path: tuple[str, ...], seen: set[str]) -> Iterator[str]:
        for target in sorted(graph.get(path[-1], set()) - seen):
            seen.add(target)
            if _room(target) in NO_FILES:
                yield " -> ".join((*path, target))
            else:
                yield from chains((*path, target), seen)

    pure = [module for module in sources if module in PURE or _room(module) in PURE]
    return [chain for module in pure for chain in chains((module,), {module})]


def functions_fit_a_screen(sources: Sources) -> list[str]:
    """A function is read without scrolling."""
    functions = [
        (f"{module}:{node.lineno}: {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [f"{name} has {lines} lines" for name, lines in functions if lines > MOST_LINES_OF_A_FUNCTION]


def names_say_what_a_thing_is(sources: Sources) -> list[str]:
    """No drawers for odds and ends."""
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    return [module for module in sources if drawers & set(module.split("."))]


# fmt: off
BROKEN: dict[Rule, list[dict[str, str]]] = {
    rooms_import_what_they_may: [
        {"diffusion.canvas": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxblock import config"},
        {"diffusion.canvas": "def f():\n    import jaxblock.io.files"},
        {"diffusion.config": "from jaxblock.diffusion.canvas import view", "diffusion.canvas": ""},
        {"models.transformer": "from jaxblock.io import files", "io.files": ""},
        {"training.loop": "from jaxblock.fit.compile import x"},
        {"data.loader": "import jaxblock.models.spec as spec", "models.spec": ""},
        {"cellar.wine": "from jaxblock import config", "config": ""},
    ],
    rooms_make_no_circle: [
        {"build": "from jaxblock.fit.shapes import x", "fit.shapes": "from jaxblock import build"},
        {"data.a": "from jaxblock.data import b", "data.b": "def f():\n    from jaxblock.data.a import x"},
        {"training.loop": "from jaxblock.evaluation.runner import x", "training.start": "",
         "evaluation.runner": "from jaxblock.model import y", "model": "from jaxblock.training import start"},
    ],
    pure_rooms_reach_no_files: [
        {"training.step": "import jaxblock.training.state", "training.state": "from jaxblock.io import files"},
        {"models.layers": "from jaxblock.models.names import x", "models.names": "import jaxblock.data.loader as r"},
    ],
    functions_fit_a_screen: [
        {"model": "def f():\n" + "    x = 1\n" * 70}, {"model": "class A:\n    def f(self):\n" + "        x = 1\n" * 70},
    ],
    names_say_what_a_thing_is: [{"data.utils": ""}],
}
FINE = {
    "types": "",
    "models.transformer": "from jaxblock.types import View",
    "training.step": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxblock.data.loader import Batch",
    "data.loader": "def f():\n" + "    x = 1\n" * 69,
}
"""What looks close to a breach and is none."""
# fmt: on


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    """Returns every source file by its name inside the package."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        files[name] = path.read_text(encoding="utf-8")
    assert {"diffusion.canvas", "training.step", "models.transformer", "cli"} <= files.keys()
    return files


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule_and_a_breach_is_caught(rule, package):
    assert rule(package) == []
    for breach in BROKEN[rule]:
        assert rule(breach), f"not caught: {breach}"
    assert rule(FINE) == []


def test_the_table_names_real_rooms_and_points_down(package):
    """Each room of the table imports rooms above it in the list alone, so that no two can import each other."""
    rooms, above = {_room(module) for module in package}, set(JOINERS)
    assert rooms == _may_import().keys() | JOINERS.keys() and rooms >= NO_FILES
    for room, targets in _may_import().items():
        assert targets <= above, f"{room} may import {targets - above}, which the table does not name above it"
        above.add(room)

"""Holds the lines of the house: which room may import which, what may be written where. Reads sources, runs nothing.

Every rule is a function of ``{module name: source}`` to a list of complaints. Each is fed the whole package, which must
be clean, and then a snippet that breaks it, which must not be.
"""

from __future__ import annotations

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
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

ARROWS = """
room          may import, when the program runs
types
errors
settings      errors
io            errors
diffusion     types errors settings
parallel      types errors
models        types errors settings parallel
config        errors settings io diffusion
data          errors settings io
huggingface   types errors io parallel models
evaluation    types errors settings io diffusion parallel models data
training      types errors settings io diffusion parallel models config data huggingface evaluation
build         settings diffusion models config training
fit           errors io diffusion parallel models config data huggingface training build
model         types errors settings io diffusion parallel models config data huggingface training
loading       errors settings io parallel models data huggingface training build model
reporting     types errors settings io diffusion training
__init__      errors model loading
cli           errors settings io parallel config __init__ commands
__main__      cli
"""
"""The arrows between rooms, from the ground up: a room imports itself and rooms above it in this list, never below.

``settings`` is ``settings.py`` and the ``config.py`` of every room: a section of settings belongs to its room, and any
room may read it, since it imports nothing but the vocabulary."""

JOINERS = {"commands": "a verb brings together whatever it needs; nothing but cli.py imports it"}
"""The rooms and modules that may join any others, and why. Even they make no circle."""

NO_FILES = {"io", "data", "huggingface", "evaluation", "reporting", "model", "loading", "cli", "commands"}
"""Rooms that the method, the network and the train step must not reach, however indirectly."""

TRANSFORMS = ("jit", "grad", "value_and_grad", "scan", "vmap", "remat", "pmap", "cond", "Optimizer")
PURE = ("diffusion", "models", "parallel", "training.step")
MOST_LINES_OF_A_FUNCTION = 70


class Import(NamedTuple):
    """One imported thing: ``package.module`` or ``package.module.name``."""

    target: str
    line: int
    for_types_only: bool


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


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

    return tuple(visit(_parsed(source), False))


def _ours(sources: Sources, target: str) -> str | None:
    """The module of ours that an imported name lives in; None for somebody else's."""
    if target.split(".")[0] != PACKAGE:
        return None
    parts = target.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in sources:
            return ".".join(parts[:end])
    return ".".join(parts[:2]) or "__init__"


def _edges(sources: Sources, types_too: bool = False) -> Iterator[tuple[str, str, int]]:
    """(importing module, imported module, line)."""
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


def _joins(module: str) -> bool:
    return module in JOINERS or _room(module) in JOINERS


def imports_are_absolute(sources: Sources) -> list[str]:
    """A relative import would slip past the other rules."""
    return [
        f"{module}:{found.line}: relative import"
        for module, source in sources.items()
        for found in _imports(source)
        if found.target.startswith(".")
    ]


def rooms_import_what_they_may(sources: Sources) -> list[str]:
    """The table above. For the method and the network an import for types alone counts too."""
    complaints, at_run_time, may_import = [], set(_edges(sources)), _may_import()
    for edge in _edges(sources, types_too=True):
        module, target, line = edge
        room, other = _room(module), _room(target)
        strict = room in ("diffusion", "models", "parallel", "settings")
        if _joins(module) or other == room or not (strict or edge in at_run_time):
            continue
        if room not in may_import:
            complaints.append(f"{module}: a new room: add it to the table of arrows")
        elif other not in may_import[room]:
            complaints.append(f"{module}:{line}: imports {target}; {room} may import {sorted(may_import[room])}")
    return complaints


def _graph(sources: Sources, name: Callable[[str], str] = str) -> dict[str, set[str]]:
    """What each module (or whatever ``name`` makes of it) imports when the program runs, apart from itself."""
    graph: dict[str, set[str]] = {}
    for module, target, _ in _edges(sources):
        graph.setdefault(name(module), set()).update({name(target)} - {name(module)})
    return graph


def rooms_make_no_circle(sources: Sources) -> list[str]:
    """Imports point down: neither rooms nor modules import each other in a circle."""
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


def no_torch(sources: Sources) -> list[str]:
    """torch and transformers belong to tests and benchmarks."""
    return [
        f"{module}:{found.line}: imports {found.target}"
        for module, source in sources.items()
        for found in _imports(source)
        if {"torch", "transformers"} & set(found.target.split("."))
    ]


@functools.cache
def _names(source: str) -> tuple[tuple[str, int], ...]:
    """Every dotted name that is used, with import aliases undone: ``nnx.jit`` -> ``flax.nnx.jit``."""
    known, found = {}, []
    nodes = list(ast.walk(_parsed(source)))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                found.append((base + alias.name, node.lineno))
                if base or alias.asname:
                    known[alias.asname or alias.name] = base + alias.name
    for node in nodes:
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if isinstance(at, ast.Name):
            found.append((".".join([known.get(at.id, at.id), *reversed(parts)]), node.lineno))  # type: ignore[attr-defined]
    return tuple(found)


def _used(sources: Sources, wanted: set[str], allowed: Callable[[str], bool]) -> list[str]:
    return sorted({
        f"{module}:{line}: {name}"
        for module, source in sources.items()
        if not allowed(module)
        for name, line in _names(source)
        if name in wanted
    })  # fmt: skip


def partition_specs_stay_in_parallel(sources: Sources) -> list[str]:
    """Elsewhere there are logical names only."""
    spec = {f"{where}{name}" for where in ("jax.", "jax.sharding.") for name in ("PartitionSpec", "P")}
    return _used(sources, spec | {"jax.interpreters.pxla.PartitionSpec"}, lambda module: _room(module) == "parallel")


def nnx_defines_and_jax_runs(sources: Sources) -> list[str]:
    """Flax's own transforms are nowhere, and ``nnx.merge`` is in one file."""
    transforms = {f"flax.nnx.{name}" for name in TRANSFORMS}
    merge = _used(sources, {"flax.nnx.merge"}, lambda module: module == "models.transformer")
    return merge + _used(sources, transforms, lambda module: False)


def functions_fit_a_screen(sources: Sources) -> list[str]:
    """A function is read without scrolling."""
    functions = [
        (module, node, (node.end_lineno or node.lineno) - node.lineno + 1)
        for module, source in sources.items()
        for node in ast.walk(_parsed(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [f"{m}:{node.lineno}: {node.name} has {n} lines" for m, node, n in functions if n > MOST_LINES_OF_A_FUNCTION]


def _public(sources: Sources) -> Iterator[tuple[str, ast.ClassDef | None, Definition]]:
    """(module, class or None, definition) of all that has no underscore in front, not inside a function."""
    for module, source in sources.items():
        waiting: list[tuple[ast.ClassDef | None, ast.AST]] = [(None, _parsed(source))]
        while waiting:
            owner, node = waiting.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, Definition) and not child.name.startswith("_"):
                    yield module, owner, child
                if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                    waiting.append((child, child))
                elif isinstance(child, ast.If | ast.Try):
                    waiting.append((owner, child))


def the_public_is_documented(sources: Sources) -> list[str]:
    """A docstring on every public class, function and method; that of a protocol or an abstract class serves those who implement it."""
    promised = {
        node.name
        for _, owner, node in _public(sources)
        if owner is not None and any(ast.unparse(base).endswith(("Protocol", "ABC")) for base in owner.bases)
        if ast.get_docstring(node)
    }
    return [
        f"{module}:{node.lineno}: {f'{owner.name}.' if owner else ''}{node.name} has no docstring"
        for module, owner, node in _public(sources)
        if not ast.get_docstring(node) and not (owner and node.name in promised)
    ]


def modules_say_what_they_are(sources: Sources) -> list[str]:
    """A docstring on every file that is not an empty ``__init__``."""
    return [m for m, source in sources.items() if source.strip() and not ast.get_docstring(_parsed(source))]


def no_stubs(sources: Sources) -> list[str]:
    """What is not built is not there."""
    return _used(sources, {"NotImplementedError"}, lambda module: False)


def names_say_what_a_thing_is(sources: Sources) -> list[str]:
    """No drawers for odds and ends."""
    drawers = {"util", "utils", "helper", "helpers", "misc", "common"}
    return [module for module in sources if drawers & set(module.split("."))]


# fmt: off
BROKEN: dict[Rule, list[dict[str, str]]] = {
    imports_are_absolute: [
        {"diffusion.canvas": "from ..io.files import read_json"}, {"data.loader": "from . import records"},
    ],
    rooms_import_what_they_may: [
        {"diffusion.canvas": "from jaxblock.models.spec import Table"},
        {"diffusion.canvas": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxblock import config"},
        {"diffusion.canvas": "def f():\n    import jaxblock.io.files"},
        {"diffusion.config": "from jaxblock.diffusion.canvas import view", "diffusion.canvas": ""},
        {"models.transformer": "from jaxblock.io import files", "io.files": ""},
        {"models.transformer": "from jaxblock.diffusion import canvas", "diffusion.canvas": ""},
        {"parallel.rules": "from jaxblock.models.spec import Table"},
        {"training.loop": "from jaxblock.fit.compile import x"},
        {"training.optim.make": "from jaxblock.build import network"},
        {"data.loader": "import jaxblock.models.spec as spec", "models.spec": ""},
        {"evaluation.graders": "from jaxblock.training import loop", "training.loop": ""},
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
    no_torch: [
        {"models.layers": "import torch.nn as nn"},
        {"model": "def f():\n    from transformers import AutoModel"},
        {"huggingface.load": "from safetensors.torch import load_file"},
        {"model": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"},
    ],
    partition_specs_stay_in_parallel: [
        {"training.step": "from jax.sharding import PartitionSpec as S\nS('data')"},
        {"models.layers": "import jax\nx = jax.sharding.PartitionSpec()"},
        {"models.layers": "from jax import P\nP('data')"},
        {"models.layers": "import jax.sharding as sh\nsh.PartitionSpec()"},
    ],
    nnx_defines_and_jax_runs: [
        {"training.step": "from flax import nnx\nnnx.merge(a, b)"},
        {"training.step": "from flax.nnx import merge as m\nm(a, b)"},
        {"models.transformer": "from flax import nnx\n@nnx.jit\ndef f(): ..."},
        {"models.transformer": "import flax.nnx as n\nn.scan(f)"},
        {"training.optim.make": "import flax\nflax.nnx.Optimizer(m, t)"},
        {"training.step": "from flax import nnx\nnnx.value_and_grad(f)"},
    ],
    functions_fit_a_screen: [
        {"model": "def f():\n" + "    x = 1\n" * 70}, {"model": "class A:\n    def f(self):\n" + "        x = 1\n" * 70},
    ],
    the_public_is_documented: [
        {"model": "def f():\n    return 1"},
        {"model": "class A:\n    '''Said.'''\n    def f(self):\n        return 1"},
        {"model": "class A:\n    def _f(self):\n        return 1"},
        {"model": "if x:\n    def f():\n        return 1"},
    ],
    modules_say_what_they_are: [{"model": "import jax"}],
    no_stubs: [{"model": "def f():\n    raise NotImplementedError('later')"}, {"model": "raise NotImplementedError"}],
    names_say_what_a_thing_is: [{"data.utils": ""}],
}
# fmt: on

SAID = "'''Ours.'''\n"
FINE = {
    "types": SAID,
    "models.transformer": SAID
    + "from flax import nnx\nfrom jaxblock.types import View\nnnx.merge(nnx.split(module)[0], params)",
    "parallel.rules": SAID + "from jax.sharding import PartitionSpec\nPartitionSpec()",
    "training.step": SAID
    + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxblock.data.loader import Batch",
    "data.loader": """"Ours."
from typing import Protocol

class Source(Protocol):
    "Promises."
    def read(self):
        "Said once."

class File:
    "Implements."
    def read(self):
        def inner():
            return 1
        return inner
""",
}
"""What looks close to a breach and is none."""


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    """Every source file by its name inside the package."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        files[name] = path.read_text(encoding="utf-8")
    assert {"diffusion.canvas", "training.step", "models.transformer", "cli"} <= files.keys()
    return files


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule, package: Sources) -> None:
    assert rule(package) == []


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_breach_is_caught(rule: Rule) -> None:
    for breach in BROKEN[rule]:
        assert rule(breach), f"not caught: {breach}"
    assert rule(FINE) == []


def test_the_table_points_down() -> None:
    """Each room of the table imports rooms above it in the list alone, so that no two can import each other."""
    above = set(JOINERS)
    for room, targets in _may_import().items():
        assert targets <= above, f"{room} may import {targets - above}, which the table does not name above it"
        above.add(room)


def test_the_table_names_real_rooms(package: Sources) -> None:
    """A rule for a room that has been renamed would hold nothing."""
    rooms = {_room(module) for module in package}
    assert rooms == _may_import().keys() | JOINERS.keys()
    assert rooms >= NO_FILES

"""Defines the Jinja environment of chat templates: a sandbox in which a stranger's template ends soon and stays small.

Jinja's own sandbox keeps a template away from files and from Python's internals, but lets it loop and grow without end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes

MOST_ROUNDS = 100_000
"""The number of rounds of loops, and of calls of macros, that a template may take for one conversation."""
MOST_LETTERS = 10_000_000
"""The length of the longest text or list that an operation may give, and the largest number that it may be given."""
_MOST_WORK = (
    1_000_000_000  # the largest product of the sizes that an operation takes, which bounds its result beforehand
)
_MOST_BITS = 10_000  # of a whole number


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles templates whose loops, texts and numbers are bounded; one that goes beyond raises TemplateError."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **named: Any) -> None:
        """Makes the environment with Jinja's own arguments."""
        super().__init__(**named)
        self._rounds = 0
        del self.globals["lipsum"]  # writes texts of any length for one number
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}

    def from_string(self, source: Any, globals: Any = None, template_class: Any = None) -> jinja2.Template:
        """Returns the template of a Jinja text, with a check in every loop and macro and wherever texts are joined.

        Raises:
            TemplateSyntaxError: the text is no template.
        """
        tree = _Checks().visit(self.parse(source))
        tree.body.insert(0, nodes.ExprStmt(_call("begin", [], 1), lineno=1))
        return super().from_string(tree, globals, template_class)

    def begin(self) -> None:
        """Counts rounds from 0 again; is called at the start of every template."""
        self._rounds = 0

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes a product, a power, a sum or a formatted text, unless it would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            _require(bits <= _MOST_BITS, "a number")
        else:
            _check_work([left, right], operator == "%")
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        """Calls a function, or a method of a value, unless an argument or the result is too large."""
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        formats = isinstance(owner, str) and function.__name__.startswith("format")
        _check_work([owner, *arguments, *named.values()], formats)
        return _checked(super().call(context, function, *arguments, **named))

    def count_round(self) -> str:
        """Counts one round of a loop; is called in every loop and macro.

        Raises:
            TemplateError: the template takes too many.
        """
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            raise jinja2.TemplateError(f"its loops take more than {MOST_ROUNDS:,} rounds")
        return ""

    def join_texts(self, *parts: Any) -> str:
        """Joins texts, as the operator ``~`` does, unless they are too long."""
        texts = [str(part) for part in parts]
        _require(sum(map(len, texts)) <= MOST_LETTERS, "a text")
        return "".join(texts)


class _Checks(jinja2.visitor.NodeTransformer):
    """Puts calls of the environment's checks into a template's tree."""

    def _visit_body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("count_round", [], node.lineno), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _visit_body

    def visit_Concat(self, node: Any) -> Any:
        """Replaces ``a ~ b`` by a checked call."""
        self.generic_visit(node)
        return _call("join_texts", node.nodes, node.lineno)


def _call(name: str, arguments: list[Any], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a filter that checks its arguments and its result."""

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        _check_work([*arguments, *named.values()], function.__name__ == "do_format")
        return _checked(function(*arguments, **named))

    return checked


def _check_work(values: Iterable[Any], formats: bool) -> None:
    """Checks, before an operation, that what it is given cannot make a result that is far too large."""
    sizes = []
    for value in values:
        if isinstance(value, int):
            _require(abs(value) <= MOST_LETTERS, "a number")
            sizes.append(abs(value))
        elif isinstance(value, str | bytes | list | tuple | dict):
            sizes.append(len(value))
            if formats and isinstance(value, str):
                digits = "".join(letter if letter.isdigit() else " " for letter in value).split()
                sizes += [int(width[:12]) for width in digits]
            elif formats and isinstance(value, tuple):
                sizes += [abs(part) for part in value if isinstance(part, int)]
    _require(math.prod(max(1, size) for size in sizes) <= _MOST_WORK, "a result")


def _checked(value: Any) -> Any:
    if isinstance(value, int):
        _require(value.bit_length() <= _MOST_BITS, "a number")
    elif isinstance(value, str | list | tuple):
        _require(len(value) <= MOST_LETTERS, "a result")
    return value


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise jinja2.TemplateError(f"{what} in it becomes too large")

"""Loads and calls a grader that the user wrote, named as ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxblock.data.store.records import Record
from jaxblock.errors import UserError, first_line

UserFunction = Callable[[str, str, Record], Any]


def load_function(name: str) -> tuple[UserFunction, str | None]:
    """Imports a user's grader.

    Args:
        name: ``package.module:function``, or ``file.py:function`` with a path from the current folder.

    Returns:
        The function, and a hash of its file ("sha256:..."), which tells versions of it apart; None without a file.

    Raises:
        UserError: there is no such file, module or function, it cannot be imported, or it does not take three arguments.
    """
    place, _, attribute = name.rpartition(":")
    module = _import(name, place)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        close = difflib.get_close_matches(attribute, functions, n=1)
        hint = f"did you mean {close[0]}?" if close else f"its functions: {', '.join(functions) or 'none'}"
        raise UserError(f"evaluate.grader: {place} has no function {attribute!r}; {hint}")
    try:
        inspect.signature(function).bind("", "", None)
    except TypeError as error:
        raise UserError(
            f"evaluate.grader: {name} must take (response, reference, record), the record as the third argument: {error}"
        ) from error
    except ValueError:  # some builtins have no signature
        pass
    source = getattr(module, "__file__", None)
    version = f"sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]}" if source else None
    return function, version


def _import(name: str, place: str) -> ModuleType:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UserError(f"evaluate.grader: {name}: there is no file {Path(place).absolute()}")
    try:
        if not is_file:
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"jaxblock_grader_{Path(place).stem}", place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        hint = ""
        if not is_file and isinstance(error, ModuleNotFoundError) and place.startswith(str(error.name)):
            hint = "; a module must be installed or on PYTHONPATH, a file is named as file.py:function"
        raise UserError(f"evaluate.grader: cannot import {place}: {describe_failure(error, place)}{hint}") from error


def describe_failure(error: BaseException, place: str) -> str:
    """Describes an exception of the user's code in a line, with the file and line of their code that raised it.

    Args:
        error: the exception.
        place: the user's file, or a module's name. The line is the last one in that file; else the last of all.
    """
    told = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{told} ({error.filename}:{error.lineno})" if error.filename not in told else told
    frames = traceback.extract_tb(error.__traceback__)
    module_file = place if place.endswith(".py") else "/".join(place.split(".")) + ".py"
    own = [frame for frame in frames if frame.filename.replace("\\", "/").endswith(module_file.replace("\\", "/"))]
    theirs = [frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename != __file__]
    last = (own or theirs)[-1:]
    return f"{told} ({last[0].filename}:{last[0].lineno})" if last else told

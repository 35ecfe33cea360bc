"""Lists everything that is wrong with a checkpoint's tensors in one message; guards an export until it is known to be right."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from jaxblock.errors import UserError
from jaxblock.huggingface.tensor_files import DTYPES, FolderContents
from jaxblock.io.folders import check_vacant, discard_folder, move_into_place
from jaxblock.io.locks import FolderLock, only_writer
from jaxblock.io.paths import PathLike, as_path, explained, is_remote
from jaxblock.models.spec import Table, flatten
from jaxblock.parallel import processes
from jaxblock.types import Params


def only_exporter(folder: PathLike, *, together: bool) -> AbstractContextManager[FolderLock | None]:
    """Keeps other processes from writing an export's folder while it is written and checked.

    Args:
        folder: the folder of the export.
        together: whether the processes of a group write it together; process 0 then holds the lock for all.
    """
    lock = functools.partial(only_writer, folder)
    return processes.entered_by_first(lock) if together else lock()


@contextlib.contextmanager
def kept_if_right(folder: PathLike, marker: str, *, together: bool) -> Iterator[None]:
    """Removes an export that was just made if the block, which checks it, raises.

    Args:
        folder: the folder of the export.
        marker: its commit marker.
        together: whether the processes of a group have written it together; process 0 then removes it.
    """
    try:
        yield
    except BaseException:
        if not together or jax.process_index() == 0:
            with contextlib.suppress(OSError, UserError):  # the first error says what is wrong
                discard_folder(folder, marker)
        raise


@contextlib.contextmanager
def old_kept_until_right(folder: PathLike, marker: str, *, overwrite: bool, together: bool) -> Iterator[PathLike]:
    """Yields the folder to write an export to; one beside an export that is there, which it replaces when the block ends.

    Args:
        folder: the folder of the export, whose lock is held.
        marker: its commit marker; a folder without it is never replaced.
        overwrite: whether an existing export is replaced.
        together: whether the processes of a group write it together; process 0 then replaces it.

    Raises:
        UserError: what is there is no export, or cannot be replaced.
    """
    if not overwrite or not as_path(folder).exists():
        yield folder
        return
    check_vacant(folder, marker=marker, overwrite=True)
    if is_remote(folder):
        raise UserError(
            f"{folder}: an export in an object store is not replaced: choose another path, or remove it first"
        )
    target = Path(os.path.realpath(folder))  # so that the folder is replaced and a link to it is kept
    beside, first = target.with_name(f".{target.name}.partial-new"), not together or jax.process_index() == 0
    if first and beside.exists():
        discard_folder(beside, marker)  # of a killed try: the lock says that nobody writes it
    if together:
        processes.wait(f"{beside} can be written")
    yield beside
    if first:
        with explained("replace", folder):
            move_into_place(beside, as_path(target), marker=marker, overwrite=True)
    if together:
        processes.wait(f"{folder} is replaced")


def summary_line(what: str, items: Iterable[str]) -> list[str]:
    """Returns a list of one line that counts and names the items, or an empty list where there are none.

    Args:
        what: what the items have in common, as in "missing".
        items: the names of the items.
    """
    items = list(items)
    return [f"{what} ({len(items)}): {', '.join(items)}"] if items else []


def shape_differences(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    unexpected: str = "not expected",
    unreadable: Collection[str] = (),
) -> list[str]:
    """Lists the arrays that are missing, not expected, or of another shape.

    Args:
        found: the shapes of the arrays that were found, by name.
        expected: the shapes of the arrays that should be there, by name.
        unexpected: the heading of the line that names the arrays which are in ``found`` only.
        unreadable: names of arrays that are damaged, which are not reported as missing.

    Returns:
        One line for each kind of difference.
    """
    missing = [name for name in expected if name not in found and name not in unreadable]
    wrong = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return [
        *summary_line("missing", missing),
        *summary_line(unexpected, [name for name in found if name not in expected]),
        *summary_line("wrong shape", wrong),
    ]


def tensor_problems(
    contents: FolderContents,
    expected: Mapping[str, tuple[int, ...]],
    *,
    unexpected: str = "not expected",
    ignored: Collection[str] = (),
) -> list[str]:
    """Lists what is wrong with the tensors of a folder, as its files store them.

    Args:
        contents: the tensors found in the files.
        expected: the shapes of the tensors that the files should hold, by name.
        unexpected: the heading of the line that names the other tensors.
        ignored: names of other tensors that the files may hold.

    Returns:
        One line for each kind of problem.
    """
    stored = contents.stored
    shapes = {name: tensor.shape for name, tensor in stored.items() if name not in ignored}
    odd = [n for n in expected if n in stored and stored[n].dtype not in DTYPES]
    return [
        *contents.notes,
        *shape_differences(shapes, expected, unexpected=unexpected, unreadable=contents.damaged),
        *summary_line("damaged", [f"{name} ({why})" for name, why in contents.damaged.items()]),
        *summary_line("unsupported type", [f"{name} is {stored[name].dtype}" for name in odd]),
    ]


def check_export(folder: PathLike, params: Params, table: Table, what: str) -> None:
    """Raises a UserError that names every difference between a tree to be exported and the table that describes it.

    Args:
        folder: the folder to export to, for the message.
        params: a nested dict of arrays.
        table: the parameters that the export should hold.
        what: what the table describes, for the message "these are not {what}".
    """
    found = {path: leaf.shape for path, leaf in flatten(params).items()}
    problems = shape_differences(found, {path: spec.shape for path, spec in table.items()})
    if problems:
        raise UserError(f"cannot export to {folder}: these are not {what}: {'; '.join(problems)}")


def check_no_problems(problems: list[str], headline: str, advice: str) -> None:
    """Raises a UserError, with a headline, one line for each problem, and advice, unless the list of problems is empty."""
    if problems:
        lines = "\n  ".join([f"{headline}:", *problems])
        raise UserError(f"{lines}\n{advice}")

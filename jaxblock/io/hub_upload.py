"""Uploads an export to the Hugging Face hub: checks first what would go wrong, and replaces nothing that it was not told to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import HfApi, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from jaxblock.errors import UserError, first_line, shown
from jaxblock.io.files import sha256
from jaxblock.io.folders import EXPORT_FILES
from jaxblock.io.hub import hub_answer
from jaxblock.io.paths import explained
from jaxblock.io.signed_text import is_unedited

_CARD = "README.md"
_OF_THE_HUB = (".gitattributes",)  # the hub writes it into every repository
_MARKERS = ("config.json", "adapter_config.json")


class Repository(NamedTuple):
    """Describes a repository on the hub.

    Attributes:
        exists: whether it is there, and may be seen with this token.
        private: whether only its owners see it.
        files: its files by their paths; without those that the hub writes itself.
    """

    exists: bool
    private: bool
    files: Mapping[str, RepoFile]


def find_repository(name: str, *, private: bool, overwrite: bool) -> Repository:
    """Checks, before long work, that an export can be pushed to a repository.

    Args:
        name: the repository, ``org/name``.
        private: whether the repository is to be private.
        overwrite: whether files that are there may be replaced.

    Returns:
        What is there now.

    Raises:
        UserError: the name is not of this form, there is no token or no network, the repository is public although it is to be
            private, or it holds files that are no part of an export and ``overwrite`` is off.
    """
    _check_name(name)
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"cannot push to {name}: there is no access token. Run `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = HfApi()
    try:
        info = api.repo_info(name)
        entries = api.list_repo_tree(name, recursive=True)
        files = {e.path: e for e in entries if isinstance(e, RepoFile) and e.path not in _OF_THE_HUB}
    except errors.RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # the hub answers 401 where it does not know the token
            raise UserError(_why(error, name)) from error
        return Repository(False, private, {})
    except Exception as error:  # huggingface_hub raises its own exceptions and those of several HTTP libraries
        raise UserError(_why(error, name)) from error
    found = Repository(True, bool(info.private), files)
    if private and not found.private:
        raise UserError(
            f"the hub repository {name} is public: give --public (private=False) if everybody may see this export, or another name"
        )
    other = [path for path in files if path != _CARD and not _is_of_export(path)]
    if other and not overwrite:
        raise UserError(_holds(name, other, "that are no part of an export"))
    return found


def push_folder(
    folder: str,
    name: str,
    *,
    private: bool = True,
    overwrite: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> str:
    """Uploads the export in a local folder; where an earlier try was interrupted, what had arrived is not sent again.

    Files of the repository that the export does not have are removed if they are an export's (weights, configs, tokenizer), which
    would otherwise be read with it; others stay. So does a README.md that we did not write, or that was edited.

    Args:
        folder: the local folder, which holds a whole export.
        name: the repository, ``org/name``; it is made where it does not exist.
        private: whether it is made as a private one.
        overwrite: whether files that are there, with another content, are replaced.
        say: prints a line for the user.

    Returns:
        The address of the repository's page.

    Raises:
        UserError: as ``find_repository``; or the folder holds no export, the repository holds other files than the folder
            and ``overwrite`` is off, or the upload failed.
    """
    root = Path(folder)
    if not any((root / marker).is_file() for marker in _MARKERS):
        raise UserError(f"{folder} holds no whole export (no {' or '.join(_MARKERS)}): export a checkpoint first")
    there = find_repository(name, private=private, overwrite=overwrite)
    with explained("read", folder):
        ours = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        changed = [path for path, file in there.files.items() if path in ours and not _is_same(ours[path], file)]
    gone = [path for path in there.files if path not in ours and _is_of_export(path)]
    if (changed or gone) and not overwrite:
        raise UserError(_holds(name, [*changed, *gone], "that differ from this export's"))
    try:
        kept = _CARD in changed and not _is_our_card(name)
        if kept:
            say(
                f"{name} has a {_CARD} that was not written by jaxblock, or was edited: it stays. The new one is {root / _CARD}"
            )
        if gone:
            say(f"{name}: removing what this export does not have: {', '.join(gone)}")
        api = HfApi()
        address = str(api.create_repo(name, private=private, exist_ok=True))
        if there.exists and there.private and not private:
            say(f"{name} is private and stays so: its settings on the hub make it public")
        api.upload_folder(
            repo_id=name,
            folder_path=root,
            commit_message="Upload an export of jaxblock",
            ignore_patterns=[_CARD] if kept else None,
            delete_patterns=[escape(path) for path in gone] or None,
        )
    except Exception as error:
        raise UserError(_why(error, name)) from error
    return address


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
        right = name.count("/") == 1
    except errors.HFValidationError:
        right = False
    if not right:
        raise UserError(
            f"{shown(name)} is no name for a repository on the hub: give ORG/NAME, such as my-name/my-model"
        )


def _is_of_export(path: str) -> bool:
    return "/" not in path and path != _CARD and any(fnmatch(path, pattern) for pattern in EXPORT_FILES)


def _is_same(ours: Path, theirs: RepoFile) -> bool:
    """Compares a file with the hub's by its hash; large files there have a SHA-256, small ones git's SHA-1."""
    size = ours.stat().st_size
    if size != theirs.size:
        return False
    if theirs.lfs is not None:
        return sha256(ours) == theirs.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % size + ours.read_bytes()).hexdigest() == theirs.blob_id


def _is_our_card(name: str) -> bool:
    """Tells whether the repository's README.md is one that we wrote and nobody edited."""
    return is_unedited(Path(huggingface_hub.hf_hub_download(name, _CARD)).read_bytes())


def _holds(name: str, files: list[str], what: str) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return (
        f"the hub repository {name} holds files {what}: {shown(files[0])}{more}. Choose another name, or give --overwrite "
        "(overwrite=True), which replaces an earlier export there (its history keeps it) and leaves other files"
    )


def _why(error: Exception, name: str) -> str:
    """Explains why a repository could not be used and says what to do."""
    error = hub_answer(error)
    status = (
        error.response.status_code if isinstance(error, errors.HfHubHTTPError) and error.response is not None else None
    )
    text = f"cannot push to {name}: "
    if status == 401:
        return (
            f"{text}the hub does not know this access token: run `hf auth login`, or set HF_TOKEN to one that may write"
        )
    if status == 403:
        return f"{text}this access token may not write there ({first_line(error)}): correct the name, or use a token that may write"
    if status == 404:
        return f"{text}the hub has no such repository, or this token may not see it: correct the name, or use another token"
    if status == 409:
        return f"{text}somebody else changed it meanwhile: run the command again"
    if isinstance(error, ValueError):  # the client found it wrong, such as the header of an edited README.md
        return f"{text}{' '.join(str(error).split())}"
    return (
        f"{text}the hub could not be reached or did not take it ({type(error).__name__}: {first_line(error)}). Run the command "
        f"again when it can: what has arrived is not sent again"
    )

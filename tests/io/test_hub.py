"""Tests that hub names become local folders, paths stay as they are, and errors say what to do; no network is used."""

from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from jaxblock.errors import UserError
from jaxblock.io import hub


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Returns a function that replaces ``snapshot_download`` by one that returns a folder or raises, and knows its calls."""
    monkeypatch.chdir(tmp_path)

    def replace(result: Any) -> Mock:
        raises = isinstance(result, BaseException)
        download = Mock(side_effect=result) if raises else Mock(return_value=str(result))
        monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
        return download

    return replace


def test_a_hub_name_is_downloaded(stand_in, tmp_path):
    for name, repo, revision in [
        ("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Instruct", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ]:
        download = stand_in(tmp_path / "cache")
        assert hub.local_checkpoint(name) == str(tmp_path / "cache")
        download.assert_called_once()
        assert (*download.call_args.args, download.call_args.kwargs["revision"]) == (repo, revision)


def test_neither_code_nor_pickles_are_asked_for(stand_in, tmp_path):
    download = stand_in(tmp_path)
    hub.local_checkpoint("org/name")
    options = download.call_args.kwargs
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += [
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
        "generation_config.json",
        "adapter_config.json",
        "README.md",
    ]
    others = ["modeling_llada.py", "pytorch_model.bin", "model.pt", "original/consolidated.00.pth"]
    others += ["onnx/model.safetensors", "original/params.json"]
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted


def test_what_lies_here_is_taken_from_here(stand_in, tmp_path):
    download = stand_in(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in ("org/name", str(tmp_path), "/nowhere/at/all", "nowhere", "a/b/c", "./a/b", "../a"):
        assert hub.local_checkpoint(name) == name
    assert hub.local_checkpoint(tmp_path / "org") == str(tmp_path / "org")
    assert hub.local_checkpoint("org/tokenizer.json") == "org/tokenizer.json"  # a mistyped file's path is told as such
    download.assert_not_called()


@pytest.mark.parametrize(
    "kind, message",
    [
        (errors.GatedRepoError, "repository org/name is gated: accept its terms .* HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no repository org/name .*correct the name.*HF_TOKEN"),
        (errors.RevisionNotFoundError, "has no revision v2: correct what follows the @"),
        (errors.LocalEntryNotFoundError, "Without a network: .*hf download org/name.*give its path"),
        (ConnectionError, r"\(ConnectionError: what the server said\)\. Without a network"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_went_wrong_says_what_to_do(stand_in, kind, message):
    error = kind.__new__(kind)
    Exception.__init__(error, "what the server said\nand more")
    stand_in(error)
    with pytest.raises(UserError, match=f"^org/name@v2 is no local folder, and .*{message}"):
        hub.local_checkpoint("org/name@v2")

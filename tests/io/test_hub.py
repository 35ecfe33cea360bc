"""Tests that hub names become local folders, paths stay as they are, and errors say what to do; no network is used."""

from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import errors

from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.errors import UserError
from jaxblock.io import hub


def stand_in(monkeypatch: pytest.MonkeyPatch, result: Any) -> Mock:
    """Replaces ``snapshot_download`` by a function that returns a folder or raises, and remembers what was asked."""
    raises = isinstance(result, BaseException)
    download = Mock(side_effect=result) if raises else Mock(return_value=str(result))
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    return download


@pytest.mark.parametrize(
    "name, repo, revision",
    [
        ("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Instruct", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_a_hub_name_is_downloaded(monkeypatch, tmp_path, name, repo, revision):
    monkeypatch.chdir(tmp_path)
    download = stand_in(monkeypatch, tmp_path / "cache")
    assert hub.local_checkpoint(name) == str(tmp_path / "cache")
    download.assert_called_once()
    assert (*download.call_args.args, download.call_args.kwargs["revision"]) == (repo, revision)


def test_neither_code_nor_pickles_are_asked_for(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.chdir(tmp_path)
    download = stand_in(monkeypatch, tmp_path)
    hub.local_checkpoint("org/name")
    options = download.call_args.kwargs
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["tokenizer.model", "chat_template.jinja", "merges.txt", "generation_config.json", "adapter_config.json"]
    others = ["modeling_llada.py", "pytorch_model.bin", "model.pt", "original/consolidated.00.pth", "README.md"]
    others += ["onnx/model.safetensors", "original/params.json"]
    patterns = {name: options[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted


def test_what_lies_here_is_taken_from_here(monkeypatch, tmp_path):
    download = stand_in(monkeypatch, tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", str(tmp_path), "/nowhere/at/all", "nowhere", "a/b/c", "./a/b", "../a"):
        assert hub.local_checkpoint(name) == name
    assert hub.local_checkpoint(tmp_path / "org") == str(tmp_path / "org")
    assert hub.local_checkpoint("org/tokenizer.json") == "org/tokenizer.json"  # a mistyped file's path is told as such
    download.assert_not_called()


def _error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "what the server said\nand more")
    return error


@pytest.mark.parametrize(
    "error, message",
    [
        (errors.GatedRepoError, "repository org/name is gated: accept its terms .* HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no repository org/name .*correct the name.*HF_TOKEN"),
        (errors.RevisionNotFoundError, "has no revision v2: correct what follows the @"),
        (errors.LocalEntryNotFoundError, "Without a network: .*hf download org/name.*give its path"),
        (ConnectionError, r"\(ConnectionError: what the server said\)\. Without a network"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_went_wrong_says_what_to_do(monkeypatch, tmp_path, error, message):
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch, _error(error))
    with pytest.raises(UserError, match=f"^org/name@v2 is no local folder, and .*{message}"):
        hub.local_checkpoint("org/name@v2")


def test_a_tokenizer_may_be_a_hub_name(monkeypatch, tmp_path):
    import tokenizers as huggingface

    words = huggingface.Tokenizer(huggingface.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))
    stand_in(monkeypatch, tmp_path)
    assert load_tokenizer("org/name").encode("b") == [1]

"""The hub's real client pushes exports to a stand-in and reads them there; names mean repositories or folders; errors say what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors

import jaxblock
from jaxblock.errors import UserError
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.hub_upload import push_folder
from jaxblock.io.signed_text import is_unedited, signed
from tests.io.stand_ins import READ_ONLY, TOKEN, File, Hub

CARD = "---\nlicense: mit\n---\n\n# {}\n"
ROOT = Path(__file__).resolve().parents[2]
WANTED = """README.md adapter_config.json chat_template.jinja config.json generation_config.json merges.txt
    model-00001-of-00002.safetensors model.safetensors.index.json tokenizer.json tokenizer.model"""
OTHERS = "modeling_llada.py pytorch_model.bin model.pt original/a.00.pth onnx/model.safetensors original/params.json"


@pytest.fixture
def export(tmp_path):
    """Returns a folder that looks like an export."""
    return _filled(tmp_path / "mine", {"config.json": "{}", "model.safetensors": "weights", "README.md": _card("mine")})


def _card(name: str) -> str:
    return signed(CARD.format(name))


def _filled(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def _there(hub: Hub) -> dict[str, str]:
    found = {path: file.content.decode() for path, file in hub.repositories["org/mine"].items()}
    return {path: text for path, text in found.items() if path != ".gitattributes"}


def test_a_hub_name_is_downloaded_without_code_and_pickles(hub):
    hub.repositories["org/name"] = {name: File(b"{}") for name in f"{WANTED} {OTHERS}".split()}
    hub.private["org/name"] = False
    folder = Path(local_checkpoint("org/name"))
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == WANTED.split()


@pytest.fixture
def download(monkeypatch, tmp_path):
    """Replaces the function that downloads from the hub, in a folder of our own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(return_value="/cache"))
    return huggingface_hub.snapshot_download


def test_what_lies_here_is_taken_from_here_and_a_name_may_have_a_revision(download, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in ("org/name", str(tmp_path), "/nowhere/at/all", "nowhere", "a/b/c", "./a/b", "../a"):
        assert local_checkpoint(name) == name
    assert local_checkpoint(tmp_path / "org") == str(tmp_path / "org")
    assert local_checkpoint("org/tokenizer.json") == "org/tokenizer.json"  # a mistyped file's path is told as such
    download.assert_not_called()
    for name, revision in (("GSAI-ML/LLaDA-8B", None), ("org/name", "v1.0"), ("org/name", "refs/pr/3")):
        assert local_checkpoint(name if revision is None else f"{name}@{revision}") == "/cache"
        assert (*download.call_args.args, download.call_args.kwargs["revision"]) == (name, revision)


WRONG = {
    errors.GatedRepoError: "repository org/name is gated: accept its terms .* HF_TOKEN",
    errors.RepositoryNotFoundError: "no repository org/name .*correct the name.*HF_TOKEN",
    errors.RevisionNotFoundError: "has no revision v2: correct what follows the @",
    errors.LocalEntryNotFoundError: "Without a network: .*hf download org/name.*give its path",
    ConnectionError: r"\(ConnectionError: what the server said\)\. Without a network",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_went_wrong_with_a_download_says_what_to_do(download, kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "what the server said\nand more")
    download.side_effect = error
    with pytest.raises(UserError, match=f"^org/name@v2 is no local folder, and .*{WRONG[kind]}"):
        local_checkpoint("org/name@v2")


def test_an_interrupted_push_goes_on_and_what_is_pushed_is_loaded_from_there(hub, tiny_run, tmp_path, ran, monkeypatch):
    out = tmp_path / "mine"
    hub.failing = 1
    said = ran(f"export --push org/tiny --checkpoint {tiny_run} --out {out}", 2).err
    [again] = re.findall(r"if that stops: jaxblock (.*)\n", said)
    assert again == f"export --checkpoint {out} --push org/tiny" and hub.private["org/tiny"] and not hub.commits
    assert "cannot push to org/tiny" in said and "the stand-in was told to fail" in said
    assert f"pushed to {hub.url}/org/tiny; to load it: jaxblock.load" in ran(again).out
    assert len(hub.sent) == 2 == len(hub.blobs)  # the weights and the tokenizer, neither of them twice
    assert set(hub.repositories["org/tiny"]) == {".gitattributes", *(file.name for file in out.iterdir())}
    monkeypatch.chdir(tmp_path)
    model = jaxblock.load("org/tiny")
    np.testing.assert_array_equal(model.logits([[3, 4, 5]]), jaxblock.load(tiny_run).logits([[3, 4, 5]]))
    # The same weights once more: nothing is sent and nothing is committed.
    assert jaxblock.load(tiny_run).push_to_hub("org/tiny") == f"{hub.url}/org/tiny"
    assert hub.commits == ["Upload an export of jaxblock"] and len(hub.sent) == 2
    card = huggingface_hub.ModelCard(hub.repositories["org/tiny"]["README.md"].content.decode())
    assert 'jaxblock.load("org/tiny")' in card.text


def test_what_is_printed_of_adapters_whose_base_is_a_folder_can_be_typed(hub, tmp_path, ran):
    folder = _filled(tmp_path / "my adapters", {"adapter_config.json": '{"base_model_name_or_path": null}'})
    said = ran(f"export --checkpoint '{folder}' --push org/adapters")
    assert f"export --checkpoint '{folder}' --push" in said.err and 'load("org/adapters", base=...)' in said.out


def test_large_files_go_through_xet_as_the_client_does_by_itself(export, tmp_path):
    """In a process of its own, which reads HF_ENDPOINT, with nothing of the client changed."""
    code = "import sys; from jaxblock.io.hub_upload import push_folder; print(push_folder(*sys.argv[1:]))"
    with Hub(tmp_path / "xet").running() as server:
        env = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        for _ in range(2):
            command = [sys.executable, "-c", code, str(export), "org/mine"]
            done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.strip().endswith("/org/mine"), done.stderr
        assert len(server.commits) == 1 and list((tmp_path / "xet").rglob("*.tagset"))
        assert set(server.repositories["org/mine"]) == {".gitattributes", *(file.name for file in export.iterdir())}


def test_what_is_there_is_replaced_only_where_that_was_asked_for(hub, export):
    said: list[str] = []
    assert push_folder(str(export), "org/mine").endswith("/org/mine")
    first = _there(hub)
    (export / "config.json").write_text('{"a": 1}')
    (export / "README.md").write_text(_card("another"))
    with pytest.raises(UserError, match=r"org/mine holds files that differ from this export's: 'README.md' and 1 more"):
        push_folder(str(export), "org/mine")
    assert _there(hub) == first
    # The weights of an earlier export that this one lacks would be read with it; the user's picture is the user's.
    hub.repositories["org/mine"] |= {"adapter_config.json": File(b"{}"), "images/a.png": File(b"png")}
    no_part = "that are no part of an export: 'images/a.png'. Choose another name, or give --overwrite"
    with pytest.raises(UserError, match=no_part):
        push_folder(str(export), "org/mine")
    push_folder(str(export), "org/mine", overwrite=True, say=said.append)
    assert said == ["org/mine: removing what this export does not have: adapter_config.json"]
    wanted = {path.name: path.read_text() for path in export.iterdir()} | {"images/a.png": "png"}
    assert _there(hub) == wanted
    # A card that was edited on the hub stays, and that is said.
    edited = wanted["README.md"].replace("another", "my words")
    hub.repositories["org/mine"]["README.md"] = File(edited.encode())
    (export / "config.json").write_text('{"a": 2}')
    push_folder(str(export), "org/mine", overwrite=True, say=said.append)
    assert "README.md that was not written by jaxblock, or was edited: it stays" in said[-1]
    assert _there(hub) == {**wanted, "README.md": edited, "config.json": '{"a": 2}'}
    assert is_unedited(wanted["README.md"].replace("\n", "\r\n").encode()) and not is_unedited(edited.encode())


def test_public_and_private(hub, export):
    said: list[str] = []
    push_folder(str(export), "org/open", private=False)
    with pytest.raises(UserError, match="org/open is public: give --public"):
        push_folder(str(export), "org/open")
    push_folder(str(export), "org/shut")
    push_folder(str(export), "org/shut", private=False, say=said.append)
    assert said == ["org/shut is private and stays so: its settings on the hub make it public"]
    assert hub.private == {"org/open": False, "org/shut": True}


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        ("--out {new} --push mine", TOKEN, "'mine' is no name for a repository on the hub: give ORG/NAME"),
        ("--out {new} --push org/mi/ne", TOKEN, "give ORG/NAME"),
        ("--out {new} --push org/-mine-", TOKEN, "give ORG/NAME"),
        ("--out {new} --push org/mine", None, "there is no access token. Run `hf auth login`, or set HF_TOKEN"),
        ("--out {new} --push org/mine", "hf_wrong", "the hub does not know this access token"),
        ("--out {new} --push org/full", TOKEN, "no part of an export: 'thesis.tex'. Choose another name"),
        ("--out {new} --public", TOKEN, "public is for push"),
        ("", TOKEN, "no --out: name the folder to make"),
        ("--push org/mine", TOKEN, "is no local export: give --out too"),
    ],
)
def test_what_cannot_be_pushed_is_refused_first(hub, tiny_run, tmp_path, ran, monkeypatch, flags, token, message):
    hub.repositories["org/full"], hub.private["org/full"] = {"thesis.tex": File(b"all my work")}, True
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    said = ran(f"export --checkpoint {tiny_run} {flags.format(new=tmp_path / 'new')}", 2).err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists() and "org/mine" not in hub.repositories


def test_what_the_hub_refuses_is_explained(hub, export, monkeypatch):
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            push_folder(str(export), "org/mine")

    (export / "README.md").write_text("---\nlicense: [\n---\n")
    refused(r"cannot push to org/mine: Invalid metadata in README.md")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    refused(r"^cannot push to org/mine: this access token may not write there")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(r"^cannot push to org/mine: the hub could not be reached .*again when it can")
    (export / "config.json").unlink()
    refused("holds no whole export")

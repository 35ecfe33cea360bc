"""Exports are pushed to a stand-in for the hub by the hub's real client; what would go wrong there is said before the work."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import jaxblock
from jaxblock.errors import UserError
from jaxblock.io.hub_upload import push_folder
from jaxblock.io.signed_text import is_unedited, signed
from tests import hub as stand_in
from tests.hub import READ_ONLY, TOKEN, File, Hub

CARD = "---\nlicense: mit\n---\n\n# {}\n"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Starts a stand-in to which the client of this process talks by Git LFS, with an empty cache."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with stand_in.served(tmp_path / "xet") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server
        assert server.refused == []


@pytest.fixture
def export(tmp_path):
    """Returns a folder that looks like an export."""
    return _filled(
        tmp_path / "mine",
        {"config.json": "{}", "model.safetensors": "weights", "README.md": signed(CARD.format("mine"))},
    )


def _filled(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def _there(hub: Hub, name: str) -> dict[str, Any]:
    return {path: file.content.decode() for path, file in hub.repositories[name].items() if path != ".gitattributes"}


def test_a_run_is_pushed_and_loaded_from_the_hub_and_an_interrupted_push_goes_on(
    hub, tiny_run, tmp_path, ran, monkeypatch
):
    out = tmp_path / "mine"
    command = f"--push org/tiny --checkpoint {tiny_run} --out {out}"
    hub.failing = 1
    said = ran(f"export {command}", 2).err
    again = re.search(r"if that stops: jaxblock (export --checkpoint .* --push org/tiny)\n", said)[1]
    assert (
        again == f"export --checkpoint {out} --push org/tiny"
        and "cannot push to org/tiny" in said
        and hub.private["org/tiny"]
    )
    assert "the stand-in was told to fail" in said and not hub.commits
    assert f"pushed to {hub.url}/org/tiny; to load it: jaxblock.load" in ran(again).out
    assert set(hub.sent.values()) == {1} and len(hub.sent) == 2  # the weights and the tokenizer, neither of them twice
    assert sorted(hub.repositories["org/tiny"]) == sorted([".gitattributes", *(file.name for file in out.iterdir())])
    monkeypatch.chdir(tmp_path)
    model = jaxblock.load("org/tiny")
    np.testing.assert_array_equal(model.logits([[3, 4, 5]]), jaxblock.load(tiny_run).logits([[3, 4, 5]]))
    # The same weights once more: nothing is sent and nothing is committed.
    assert jaxblock.load(tiny_run).push_to_hub("org/tiny") == f"{hub.url}/org/tiny"
    assert hub.commits == ["Upload an export of jaxblock"] and set(hub.sent.values()) == {1}
    card = huggingface_hub.ModelCard(hub.repositories["org/tiny"]["README.md"].content.decode())
    assert 'jaxblock.load("org/tiny")' in card.text


def test_what_is_printed_of_adapters_whose_base_is_a_folder_can_be_typed(hub, tmp_path, ran):
    folder = _filled(tmp_path / "my adapters", {"adapter_config.json": '{"base_model_name_or_path": null}'})
    said = ran(f"export --checkpoint '{folder}' --push org/adapters")
    assert f"export --checkpoint '{folder}' --push" in said.err and 'load("org/adapters", base=...)' in said.out


def test_large_files_go_through_xet_as_the_client_does_by_itself(export, tmp_path):
    """In a process of its own, which reads HF_ENDPOINT, with nothing of the client changed."""
    code = "import sys; from jaxblock.io.hub_upload import push_folder; print(push_folder(*sys.argv[1:]))"
    with stand_in.served(tmp_path / "xet") as server:
        env = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        env = {**os.environ, **env, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", code, str(export), "org/mine"]
        for _ in range(2):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.strip().endswith("/org/mine"), done.stderr
        assert server.refused == [] and len(server.commits) == 1 and list((tmp_path / "xet").rglob("*.tagset"))
        assert set(server.repositories["org/mine"]) == {".gitattributes", *(file.name for file in export.iterdir())}


def test_what_is_there_is_replaced_only_where_that_was_asked_for(hub, export):
    said: list[str] = []
    assert push_folder(str(export), "org/mine").endswith("/org/mine")
    first = _there(hub, "org/mine")
    (export / "config.json").write_text('{"a": 1}')
    (export / "README.md").write_text(signed(CARD.format("another")))
    with pytest.raises(UserError, match=r"org/mine holds files that differ from this export's: 'README.md' and 1 more"):
        push_folder(str(export), "org/mine")
    assert _there(hub, "org/mine") == first
    # The weights of an earlier export that this one lacks would be read with it; the user's picture is the user's.
    hub.repositories["org/mine"] |= {"adapter_config.json": File(b"{}"), "images/a.png": File(b"png")}
    with pytest.raises(
        UserError, match="that are no part of an export: 'images/a.png'. Choose another name, or give --overwrite"
    ):
        push_folder(str(export), "org/mine")
    push_folder(str(export), "org/mine", overwrite=True, say=said.append)
    assert said == ["org/mine: removing what this export does not have: adapter_config.json"]
    wanted = {path.name: path.read_text() for path in export.iterdir()}
    assert _there(hub, "org/mine") == {**wanted, "images/a.png": "png"}
    # A card that was edited on the hub stays, and that is said.
    edited = wanted["README.md"].replace("another", "my words")
    hub.repositories["org/mine"]["README.md"] = File(edited.encode())
    (export / "config.json").write_text('{"a": 2}')
    push_folder(str(export), "org/mine", overwrite=True, say=said.append)
    assert "README.md that was not written by jaxblock, or was edited: it stays" in said[-1]
    assert _there(hub, "org/mine") == {**wanted, "images/a.png": "png", "README.md": edited, "config.json": '{"a": 2}'}
    assert is_unedited(wanted["README.md"].replace("\n", "\r\n").encode()) and not is_unedited(edited.encode())


def test_public_and_private(hub, export):
    push_folder(str(export), "org/open", private=False)
    assert hub.private == {"org/open": False}
    with pytest.raises(UserError, match="org/open is public: give --public"):
        push_folder(str(export), "org/open")
    push_folder(str(export), "org/shut")
    said: list[str] = []
    push_folder(str(export), "org/shut", private=False, say=said.append)
    assert hub.private["org/shut"] and said == [
        "org/shut is private and stays so: its settings on the hub make it public"
    ]


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        ("--out {new} --push mine", TOKEN, "'mine' is no name for a repository on the hub: give ORG/NAME"),
        ("--out {new} --push org/mi/ne", TOKEN, "give ORG/NAME"),
        ("--out {new} --push org/-mine-", TOKEN, "give ORG/NAME"),
        ("--out {new} --push org/mine", None, "there is no access token. Run `hf auth login`, or set HF_TOKEN"),
        ("--out {new} --push org/mine", "hf_wrong", "the hub does not know this access token"),
        (
            "--out {new} --push org/full",
            TOKEN,
            "holds files that are no part of an export: 'thesis.tex'. Choose another name",
        ),
        ("--out {new} --public", TOKEN, "public is for push"),
        ("", TOKEN, "no --out: name the folder to make"),
        ("--push org/mine", TOKEN, "is no local export: give --out too"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_export(
    hub, tiny_run, tmp_path, ran, monkeypatch, flags, token, message
):
    hub.repositories["org/full"], hub.private["org/full"] = {"thesis.tex": File(b"all my work")}, True
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    new = tmp_path / "new"
    said = ran(f"export --checkpoint {tiny_run} {flags.format(new=new)}", 2).err
    assert message in said and said.count("\n") == 1 and not new.exists() and "org/mine" not in hub.repositories


def test_a_token_that_may_only_read_and_a_hub_that_is_not_there(hub, export, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    with pytest.raises(UserError, match=r"^cannot push to org/mine: this access token may not write there"):
        push_folder(str(export), "org/mine")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^cannot push to org/mine: the hub could not be reached .*again when it can"):
        push_folder(str(export), "org/mine")


def test_folders_that_are_not_right(hub, export):
    (export / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match=r"cannot push to org/mine: Invalid metadata in README.md"):
        push_folder(str(export), "org/mine")
    (export / "config.json").unlink()
    with pytest.raises(UserError, match="holds no whole export"):
        push_folder(str(export), "org/mine")

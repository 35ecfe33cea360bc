"""Tokenizer folders as LLaDA and Dream ship them, and starts that have no mask token yet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as huggingface

from jaxblock.data.config import DataConfig
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.data.tokens.encoding import checkpoint_encoder
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import SentencePieceTokenizer
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError
from jaxblock.io import hub

DREAM_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The behaviour of Dream's own template: ChatML with a default system prompt, and a line break after each turn."""

ROWS = [{"question": "How many?", "answer": "12"}]
DREAM_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")


def _prepare(folder: Path, rows: list[Any], **data: Any) -> Prepared:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train": str(folder / "train.jsonl"), "test": None, "validation_records": 0, "template": "tokenizer"}
    out = str(folder / f"out{len(list(folder.glob('out*')))}")
    prepare(DataConfig(**{"prepared": out, **settings, **data}), CanvasConfig(prompt_len=200, response_len=96))
    return open_prepared(out)


def _shown(opened: Prepared, ids: Any) -> str:
    return opened.tokenizer.decode(ids, skip_special=False)


@pytest.fixture
def dream_folder(tmp_path: Path) -> Path:
    """vocab.json, merges.txt and the settings, without a tokenizer.json; the config.json names the special ids."""
    folder = tmp_path / "dream"
    folder.mkdir()
    tokenizer = huggingface.Tokenizer(huggingface.models.BPE())
    tokenizer.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = huggingface.pre_tokenizers.ByteLevel.alphabet()
    trainer = huggingface.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["How many are there? It's 12 + 5 = 17 apples, they said."] * 5, trainer)
    tokenizer.model.save(str(folder))
    size = tokenizer.get_vocab_size()
    added = {
        str(size + i): {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for i, text in enumerate(DREAM_ADDED)
    }
    settings = {
        "added_tokens_decoder": {key: {**entry, "special": True} for key, entry in added.items()},
        "chat_template": DREAM_TEMPLATE,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"mask_token_id": size + 4, "eos_token_id": size}))
    return folder


def test_llada_s_own_template_and_special_tokens(tmp_path: Path, tokenizer_folder: Callable[..., str]) -> None:
    opened = _prepare(tmp_path, ROWS, tokenizer=tokenizer_folder(), system="Be brief.")
    (record,) = opened.records("train")
    start, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
    turns = f"{start}system{end}Be brief.<|eot_id|>{start}user{end}How many?<|eot_id|>{start}assistant{end}"
    assert _shown(opened, record.prompt_ids) == f"<|startoftext|>{turns}"
    assert _shown(opened, record.response_ids) == "12<|eot_id|>"
    assert opened.encoder.prompt(record.prompt) == record.prompt_ids.tolist()
    pieces = [opened.tokenizer.piece(i) for i in (opened.special.mask, opened.special.eos, opened.special.eot)]
    assert pieces == ["<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>"]
    assert sorted(opened.manifest.tokenizer["files"]) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_turn_is_asked_with_all_that_was_said_before_it(
    tmp_path: Path, tokenizer_folder: Callable[..., str], dream_folder: Path, family: str
) -> None:
    folder = tokenizer_folder() if family == "llada" else str(dream_folder)
    said = ["one?", "1", "two?", "2, surely", "three?", "3"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    opened = _prepare(tmp_path, [{"messages": turns}], tokenizer=folder, turns="all")
    rows = list(opened.records("train"))
    assert [row.source for row in rows] == ["train.jsonl:1#1", "train.jsonl:1#2", "train.jsonl:1#3"]
    assert opened.manifest.inputs["train"]["conversations"] == 1 and opened.manifest.splits["train"]["kept"] == 3
    end = "<|eot_id|>" if family == "llada" else "<|im_end|>"
    assert [_shown(opened, row.response_ids) for row in rows] == [f"{text}{end}" for text in said[1::2]]
    for at, row in enumerate(rows):
        asked = _shown(opened, row.prompt_ids)
        assert [text for text in said if text in asked] == said[: 2 * at + 1]
        if at:
            before = rows[at - 1]
            earlier = [*before.prompt_ids.tolist(), *before.response_ids.tolist()]
            assert row.prompt_ids.tolist()[: len(earlier)] == earlier


def test_dream_s_files_template_and_special_tokens(tmp_path: Path, dream_folder: Path) -> None:
    opened = _prepare(tmp_path, ROWS, tokenizer=str(dream_folder))
    (record,) = opened.records("train")
    assert _shown(opened, record.prompt_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert _shown(opened, record.response_ids) == "12<|im_end|>"
    pieces = [opened.tokenizer.piece(i) for i in (opened.special.mask, opened.special.eos, opened.special.eot)]
    assert pieces == ["<|mask|>", "<|endoftext|>", "<|im_end|>"]
    # The export carries the original files beside the tokenizer.json that was made of them.
    assert sorted(opened.tokenizer.files) == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    again = checkpoint_encoder(dream_folder, load_tokenizer(dream_folder), opened.special.mask, opened.special.eos)
    assert again is not None and again.special == opened.special
    assert again.prompt("How many?") == record.prompt_ids.tolist()
    assert checkpoint_encoder(dream_folder, opened.tokenizer, None, opened.special.eos) is None


def test_dream_s_files_cut_texts_as_transformers_does(dream_folder: Path) -> None:
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2").Qwen2Tokenizer
    theirs = qwen2(str(dream_folder / "vocab.json"), str(dream_folder / "merges.txt"))
    ours = load_tokenizer(dream_folder)
    for text in ("It's 12 + 5 = 17!", "  a\n\n b\t\r\n", "they'LL said2apples", "Où? e\u0301 中文 😀", "\n \n1"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"])


def test_a_hub_name_is_asked_for_its_tokenizer_not_its_weights(
    tmp_path: Path, dream_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append([repo, *options["allow_patterns"]])
        return str(dream_folder)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    opened = _prepare(tmp_path, ROWS, tokenizer="org/dream")
    assert opened.tokenizer.piece(opened.special.mask) == "<|mask|>"
    assert opened.special == _prepare(tmp_path, ROWS, tokenizer=str(dream_folder)).special
    assert asked and all(repo == "org/dream" and "*.safetensors" not in patterns for repo, *patterns in asked)


def test_files_that_make_no_tokenizer_are_named(dream_folder: Path) -> None:
    path = dream_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    moved = {str(int(i) + 1): entry for i, entry in settings["added_tokens_decoder"].items()}
    for change, complaint in [
        ({"tokenizer_class": "GPT2Tokenizer"}, "of a 'GPT2Tokenizer' .* are not read, only those of DreamTokenizer"),
        ({"added_tokens_decoder": moved}, "do not belong together"),
    ]:
        path.write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=complaint):
            load_tokenizer(dream_folder)
    path.write_text(json.dumps(settings))
    (dream_folder / "merges.txt").write_text("zq zq\n")
    with pytest.raises(UserError, match="merges.txt or tokenizer_config.json cannot be used"):
        load_tokenizer(dream_folder)


def test_what_config_json_calls_the_mask_wins_over_names(tmp_path: Path, tokenizer_folder: Callable[..., str]) -> None:
    folder = Path(tokenizer_folder())
    for content, mask, eos in [
        ({"mask_token_id": 599, "eos_token_id": [0, 1]}, 599, 0),
        ({"mask_token_id": 9_000}, 9_000, 1),  # a row of the embedding that has no text
        ({"architectures": ["Other"]}, 2, 1),
    ]:
        (folder / "config.json").write_text(json.dumps(content))
        opened = _prepare(tmp_path, ROWS, tokenizer=str(folder))
        assert (opened.special.mask, opened.special.eos) == (mask, eos)
        assert opened.manifest.vocab_size == max(opened.tokenizer.vocab_size, mask + 1)


@pytest.fixture
def start_folder(tokenizer_folder: Callable[..., str]) -> Path:
    """A tokenizer of an autoregressive model: no mask, one reserved token."""
    folder = Path(tokenizer_folder(without="<|mdm_mask|>"))
    tokenizer = huggingface.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|reserved_special_token_0|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": {}}))
    return folder


def test_a_template_for_another_tokenizer_is_named(tmp_path: Path, tokenizer_folder: Callable[..., str]) -> None:
    complaint = r"does not end the response; .* The template writes <\|eot_id\|>, which the tokenizer does not have"
    with pytest.raises(UserError, match=complaint):
        _prepare(tmp_path, ROWS, tokenizer=tokenizer_folder(without="<|eot_id|>"))


def test_a_start_without_a_mask_names_candidates(tmp_path: Path, start_folder: Path) -> None:
    advice = (
        r"data.mask_token: .* name an unused token, or set data.add_mask_token. Candidates: <\|reserved_special_token_0"
    )
    with pytest.raises(UserError, match=advice):
        _prepare(tmp_path, ROWS, tokenizer=str(start_folder))
    opened = _prepare(tmp_path, ROWS, tokenizer=str(start_folder), mask_token="<|reserved_special_token_0|>")
    assert opened.tokenizer.piece(opened.special.mask) == "<|reserved_special_token_0|>"
    with pytest.raises(UserError, match=r"train.jsonl:1: .* special token '<\|reserved_special_token_0"):
        rows = [{"question": "<|reserved_special_token_0|>", "answer": "12"}]
        _prepare(tmp_path, rows, tokenizer=str(start_folder), mask_token="<|reserved_special_token_0|>")


def test_a_mask_can_be_added_and_is_carried_along(tmp_path: Path, start_folder: Path) -> None:
    before = load_tokenizer(start_folder)
    opened = _prepare(tmp_path, ROWS, tokenizer=str(start_folder), mask_token="<|mask|>", add_mask_token=True)
    assert opened.special.mask == before.vocab_size == opened.manifest.vocab_size - 1
    folder = Path(opened.folder) / "tokenizer"
    again = load_tokenizer(folder)
    assert again.id_of("<|mask|>") == before.vocab_size
    text = "How many?<|eot_id|>12"
    assert again.encode(text) == before.encode(text)
    assert again.encode("a<|mask|>b")[1:-1] == [before.vocab_size]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["mask_token"] == settings["added_tokens_decoder"][str(before.vocab_size)]["content"] == "<|mask|>"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert theirs.mask_token_id == before.vocab_size
    assert theirs(text, add_special_tokens=False)["input_ids"] == before.encode(text)


def test_a_mask_that_cannot_be_added_says_why(
    tmp_path: Path, start_folder: Path, pieces: SentencePieceTokenizer
) -> None:
    (start_folder / "config.json").write_text('{"mask_token_id": 4}')
    pieces.save(tmp_path)
    for tokenizer, name, complaint in [
        (str(start_folder / "tokenizer.json"), "<|mask|>", "has a mask token .its config.json: mask_token_id 4"),
        (str(tmp_path / "tokenizer.model"), "<|other|>", "is a SentencePiece model, .* unused token .*<|mdm_mask|>"),
        (str(tmp_path / "tokenizer.model"), None, r"has '<\|mdm_mask\|>' already .id \d+."),
    ]:
        with pytest.raises(UserError, match=complaint):
            _prepare(tmp_path, ROWS, tokenizer=tokenizer, mask_token=name, add_mask_token=True, template="plain")

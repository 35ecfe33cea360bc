"""Tokenizer folders as LLaDA and Dream ship them, and starts that have no mask token yet."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers as huggingface

from jaxblock.data.config import DataConfig
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import Prepared, open_prepared
from jaxblock.data.tokens.encoding import checkpoint_encoder
from jaxblock.data.tokens.load import load_tokenizer
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


def prepared(folder: Path, tokenizer: Any, rows: list[Any] = ROWS, **data: Any) -> Prepared:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train": str(folder / "train.jsonl"), "test": None, "validation_records": 0, "template": "tokenizer"}
    out = str(folder / f"out{len(list(folder.glob('out*')))}")
    settings |= {"prepared": out, "tokenizer": str(tokenizer), **data}
    prepare(DataConfig(**settings), CanvasConfig(prompt_len=200, response_len=96))
    return open_prepared(out)


def shown(opened: Prepared, ids: Any) -> str:
    return opened.tokenizer.decode(ids, skip_special=False)


def special_pieces(opened: Prepared) -> list[str]:
    return [opened.tokenizer.piece(i) for i in (opened.special.mask, opened.special.eos, opened.special.eot)]


@pytest.fixture
def dream_folder(tmp_path):
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
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(size + i): {"content": text, **flags} for i, text in enumerate(DREAM_ADDED)}
    settings = {"added_tokens_decoder": added, "chat_template": DREAM_TEMPLATE, "tokenizer_class": "DreamTokenizer"}
    settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"mask_token_id": size + 4, "eos_token_id": size}))
    return folder


@pytest.fixture
def start_folder(tokenizer_folder):
    """A tokenizer of an autoregressive model: no mask, one reserved token."""
    folder = Path(tokenizer_folder(without="<|mdm_mask|>"))
    tokenizer = huggingface.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|reserved_special_token_0|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": {}}))
    return folder


def test_llada_s_own_template_and_special_tokens(tmp_path, tokenizer_folder):
    opened = prepared(tmp_path, tokenizer_folder(), system="Be brief.")
    (record,) = opened.records("train")
    start, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
    turns = f"{start}system{end}Be brief.<|eot_id|>{start}user{end}How many?<|eot_id|>{start}assistant{end}"
    assert shown(opened, record.prompt_ids) == f"<|startoftext|>{turns}"
    assert shown(opened, record.response_ids) == "12<|eot_id|>"
    assert opened.encoder.prompt(record.prompt) == record.prompt_ids.tolist()
    assert special_pieces(opened) == ["<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>"]
    assert sorted(opened.manifest.tokenizer["files"]) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("family, end", [("llada", "<|eot_id|>"), ("dream", "<|im_end|>")])
def test_every_turn_is_asked_with_all_that_was_said_before_it(tmp_path, tokenizer_folder, dream_folder, family, end):
    said = ["one?", "1", "two?", "2, surely", "three?", "3"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    folder = tokenizer_folder() if family == "llada" else dream_folder
    opened = prepared(tmp_path, folder, [{"messages": turns}], turns="all")
    rows = list(opened.records("train"))
    assert [row.source for row in rows] == ["train.jsonl:1#1", "train.jsonl:1#2", "train.jsonl:1#3"]
    assert opened.manifest.inputs["train"]["conversations"] == 1 and opened.manifest.splits["train"]["kept"] == 3
    assert [shown(opened, row.response_ids) for row in rows] == [f"{text}{end}" for text in said[1::2]]
    earlier: list[int] = []
    for at, row in enumerate(rows):
        asked = shown(opened, row.prompt_ids)
        assert [text for text in said if text in asked] == said[: 2 * at + 1]
        assert row.prompt_ids.tolist()[: len(earlier)] == earlier
        earlier = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]


def test_dream_s_files_template_and_special_tokens(tmp_path, dream_folder):
    opened = prepared(tmp_path, dream_folder)
    (record,) = opened.records("train")
    asked = "system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
    assert shown(opened, record.prompt_ids) == f"<|im_start|>{asked}<|im_start|>assistant\n"
    assert shown(opened, record.response_ids) == "12<|im_end|>"
    assert special_pieces(opened) == ["<|mask|>", "<|endoftext|>", "<|im_end|>"]
    # The export carries the original files beside the tokenizer.json that was made of them.
    assert sorted(opened.tokenizer.files) == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    again = checkpoint_encoder(dream_folder, load_tokenizer(dream_folder), opened.special.mask, opened.special.eos)
    assert again.special == opened.special and again.prompt("How many?") == record.prompt_ids.tolist()
    assert checkpoint_encoder(dream_folder, opened.tokenizer, None, opened.special.eos) is None


def test_dream_s_files_cut_texts_as_transformers_does(dream_folder):
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2").Qwen2Tokenizer
    theirs = qwen2(str(dream_folder / "vocab.json"), str(dream_folder / "merges.txt"))
    ours = load_tokenizer(dream_folder)
    for text in ("It's 12 + 5 = 17!", "  a\n\n b\t\r\n", "they'LL said2apples", "Où? e\u0301 中文 😀", "\n \n1"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"])


def test_a_hub_name_is_asked_for_its_tokenizer_not_its_weights(tmp_path, dream_folder, monkeypatch):
    asked: list[list[str]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append([repo, *options["allow_patterns"]])
        return str(dream_folder)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert prepared(tmp_path, "org/dream").special == prepared(tmp_path, dream_folder).special
    assert asked and all(repo == "org/dream" and "*.safetensors" not in patterns for repo, *patterns in asked)


def test_files_that_make_no_tokenizer_are_named(dream_folder):
    path = dream_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    moved = {str(int(i) + 1): entry for i, entry in settings["added_tokens_decoder"].items()}
    for change, merges, complaint in [
        ({"tokenizer_class": "GPT2Tokenizer"}, "", "of a 'GPT2Tokenizer' .* not read, only those of DreamTokenizer"),
        ({"added_tokens_decoder": moved}, "", "do not belong together"),
        ({}, "zq zq\n", "merges.txt or tokenizer_config.json cannot be used"),
    ]:
        path.write_text(json.dumps({**settings, **change}))
        (dream_folder / "merges.txt").write_text(merges or (dream_folder / "merges.txt").read_text())
        with pytest.raises(UserError, match=complaint):
            load_tokenizer(dream_folder)


def test_what_config_json_calls_the_mask_wins_over_names(tmp_path, tokenizer_folder):
    folder = Path(tokenizer_folder())
    for content, mask, eos in [
        ({"mask_token_id": 599, "eos_token_id": [0, 1]}, 599, 0),
        ({"mask_token_id": 9_000}, 9_000, 1),  # a row of the embedding that has no text
        ({"architectures": ["Other"]}, 2, 1),
    ]:
        (folder / "config.json").write_text(json.dumps(content))
        opened = prepared(tmp_path, folder)
        assert (opened.special.mask, opened.special.eos) == (mask, eos)
        assert opened.manifest.vocab_size == max(opened.tokenizer.vocab_size, mask + 1)


def test_a_template_for_another_tokenizer_is_named(tmp_path, tokenizer_folder):
    complaint = r"does not end the response; .* The template writes <\|eot_id\|>, which the tokenizer does not have"
    with pytest.raises(UserError, match=complaint):
        prepared(tmp_path, tokenizer_folder(without="<|eot_id|>"))


def test_a_start_without_a_mask_names_candidates(tmp_path, start_folder):
    advice = r"data.mask_token: .* name an unused token, or set data.add_mask_token. Candidates: <\|reserved_special_"
    with pytest.raises(UserError, match=advice):
        prepared(tmp_path, start_folder)
    mask = "<|reserved_special_token_0|>"
    assert special_pieces(prepared(tmp_path, start_folder, mask_token=mask))[0] == mask
    with pytest.raises(UserError, match=r"train.jsonl:1: .* special token '<\|reserved_special_token_0"):
        prepared(tmp_path, start_folder, [{"question": mask, "answer": "12"}], mask_token=mask)


def test_a_mask_can_be_added_and_is_carried_along(tmp_path, start_folder):
    before = load_tokenizer(start_folder)
    opened = prepared(tmp_path, start_folder, mask_token="<|mask|>", add_mask_token=True)
    folder = Path(opened.folder) / "tokenizer"
    again, mask = load_tokenizer(folder), before.vocab_size
    assert again.id_of("<|mask|>") == opened.special.mask == opened.manifest.vocab_size - 1 == mask
    text = "How many?<|eot_id|>12"
    assert again.encode(text) == before.encode(text) and again.encode("a<|mask|>b")[1:-1] == [mask]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["mask_token"] == settings["added_tokens_decoder"][str(mask)]["content"] == "<|mask|>"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert theirs.mask_token_id == mask and theirs(text, add_special_tokens=False)["input_ids"] == before.encode(text)


def test_a_mask_that_cannot_be_added_says_why(tmp_path, start_folder, pieces):
    (start_folder / "config.json").write_text('{"mask_token_id": 4}')
    pieces.save(tmp_path)
    model = tmp_path / "tokenizer.model"
    for tokenizer, name, complaint in [
        (start_folder / "tokenizer.json", "<|mask|>", "has a mask token .its config.json: mask_token_id 4"),
        (model, "<|other|>", "is a SentencePiece model, .* unused token .*<|mdm_mask|>"),
        (model, None, r"has '<\|mdm_mask\|>' already .id \d+."),
    ]:
        with pytest.raises(UserError, match=complaint):
            prepared(tmp_path, tokenizer, mask_token=name, add_mask_token=True, template="plain")

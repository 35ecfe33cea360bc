"""Tokenizers lose nothing, find their special tokens, and are cut as their checkpoint's settings and transformers say.

Where transformers is installed (benchmarks/requirements.txt), what is expected below is compared with what it does.
"""

import importlib
import importlib.util
import json
from unittest.mock import Mock

import pytest
import tokenizers as huggingface
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.data.config import DataConfig
from jaxblock.data.tokens.encoding import checkpoint_encoder
from jaxblock.data.tokens.find_special import find_special
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import train_tokenizer
from jaxblock.data.tokens.templates import NAMED
from jaxblock.data.tokens.tokenizer_json import HuggingFaceTokenizer
from jaxblock.errors import UserError
from jaxblock.io import hub

transformers = importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None


def special_of(tokenizer, **config):
    return find_special(tokenizer, "chat", NAMED["chat"], DataConfig(**config), {})[1]


def pieces_of(tokenizer, text):
    return [tokenizer.piece(i) for i in tokenizer.encode(text)]


HARD_TEXTS = [
    "  two blanks first, one last ",
    "tab\t, line\r\nfeed\n\n, zero \0",
    "Où? “5 + 7” é e\u0301 😀 中文 \u0650",
    "SentencePiece's own space \u2581 and \u2581\u2581, a \u2585, \u2047, <unk>, <s>, <0x41>",
    *("", " "),
]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_every_model_type_round_trips(kind):
    texts = [f"Ada has {n} coins.\n{n} + 1 = {n + 1}" for n in range(60)]
    tokenizer = train_tokenizer(texts, DataConfig(tokenizer_type=kind, vocab_size=500))
    for text in texts + HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text and tokenizer.id_of("<unk>") not in ids
    assert 256 < tokenizer.vocab_size <= 500 and "\n" in pieces_of(tokenizer, "1\n2")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_round_trips(pieces, text):
    assert pieces.decode(pieces.encode(text), skip_special=False) == text


def test_special_tokens_are_single_and_can_be_skipped(pieces, tokenizer_folder):
    ids = pieces.encode("a<|eot_id|><|mdm_mask|> b")
    assert pieces.decode(ids) == "a b"
    assert [pieces.piece(i) for i in ids if i < 10] == ["<|eot_id|>", "<|mdm_mask|>"]
    mask, eos, eot = (pieces.id_of(text) for text in ("<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>"))
    found = special_of(pieces)
    assert (found.mask, found.eos, found.eot, found.pad, found.stop_ids) == (mask, eos, eot, eos, (eot, eos))
    assert special_of(pieces, eos_token="<|eot_id|>").stop_ids == (eot,)
    with pytest.raises(UserError, match="data.mask_token: '<|eot_id|>' is also"):
        special_of(pieces, mask_token="<|eot_id|>")
    for name, text in [("mask", "<|mdm_mask|>"), ("eos", "<|endoftext|>"), ("eot", "<|eot_id|>")]:
        with pytest.raises(UserError, match=rf"data\.{name}_token: .* no token ") as caught:
            special_of(load_tokenizer(tokenizer_folder({text: "<|other|>"})), **{f"{name}_token": text})
        assert ("mask_token_id" in str(caught.value)) == (name == "mask")


def test_training_says_what_to_set():
    for split, expected in [(False, ["12"]), (True, ["1", "2"])]:
        tokenizer = train_tokenizer(["12 + 34 = 46"] * 20, DataConfig(vocab_size=400, split_digits=split))
        assert pieces_of(tokenizer, "12") == expected
    for config, texts, complaint in [
        ({"vocab_size": 200}, ["a"], "data.vocab_size = 200 is too small: bytes and special tokens alone need 263"),
        ({"vocab_size": 270}, ["abcdefghijklmnopqrstuvwxyz"] * 9, r"set at least 28\d"),
        ({"vocab_size": 300}, ["", "\n"], "the training text is empty"),
        ({"mask_token": "MASK"}, ["a"], "'MASK' of a trained tokenizer must be in brackets"),
    ]:
        with pytest.raises(UserError, match=complaint):
            train_tokenizer(texts, DataConfig(**config))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (
            b'{"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}}',
            "model.dropout .* another way",
        ),
        *((some, "not a Hugging Face tokenizer.json") for some in (b"{", b"[" * 100_000, b"{}")),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "not a Hugging Face tokenizer.json"),
        # A letter for which the model has no token.
        (
            huggingface.models.BPE({"a": 0, "b": 1}, []),
            r"no token for '\?' at character 1 and none for unknown letters",
        ),
        (huggingface.models.WordLevel({"a": 0}, unk_token="[UNK]"), r"cannot encode the text .*Missing \[UNK\] token"),
        (huggingface.models.Unigram([("a", -1.0)], None), r"cannot encode the text .*unk_id"),
    ],
)
def test_what_is_no_tokenizer_or_cannot_encode_is_named(content, complaint):
    content = content if isinstance(content, bytes) else huggingface.Tokenizer(content).to_str().encode()
    with pytest.raises(UserError, match=complaint):
        HuggingFaceTokenizer({"tokenizer.json": content}, "test").encode("a?")


def entry(content, **flags):
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


A, B, END = "<|a|>", "<|b|>", "<|eot_id|>"
TEXT = f"1{A} {B} 2{END} 3"
BOTH = ["1", A, "Ġ", B, "Ġ2", END, "Ġ3"]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
LISTED = {"additional_special_tokens": [B]}
FLAGS = {"5": entry(END, rstrip=True), "600": entry(A), "601": entry(B, lstrip=True, special=False)}
# The files beside a tokenizer.json of 600 tokens, and the pieces of TEXT.
DECLARED = {
    "with ids": ({CONFIG: {"added_tokens_decoder": {"601": entry(B), "600": entry(A)}}}, BOTH),
    "with flags": ({CONFIG: {"added_tokens_decoder": FLAGS}}, ["1", A, B, "Ġ2", END, "3"]),
    "in a list": ({CONFIG: {"additional_special_tokens": [A, {"__type": "AddedToken", **entry(B)}]}}, BOTH),
    "in an object": ({CONFIG: {"extra_special_tokens": {"a_token": A, "b_token": B}}}, BOTH),
    "in the older file": ({CONFIG: {"additional_special_tokens": [A]}, ADDED: {B: 601, A: 600}}, BOTH),
    "in the older map": ({CONFIG: {"bos_token": A}, MAP: LISTED}, BOTH),
    "as padding alone": ({CONFIG: {"pad_token": A, "added_tokens_decoder": {}}, MAP: LISTED}, []),
}


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("case", DECLARED)
def test_declared_tokens_are_added(tokenizer_folder, case):
    files, pieces = DECLARED[case]
    folder = write(tokenizer_folder(), files)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == (602 if pieces else 600)
    if pieces:
        assert pieces_of(tokenizer, TEXT) == pieces and (tokenizer.id_of(A) == 600 or case == "in the older map")
        ordinary = {B} if case in ("with flags", "in the older file") else set()
        assert tokenizer.special_texts & {A, B, END} == {A, B, END} - ordinary
    masked = tokenizer.with_special_token("<|m|>", "mask_token")
    assert masked.encode(TEXT) == tokenizer.encode(TEXT) and masked.id_of("<|m|>") == tokenizer.vocab_size
    # There, padding would get an id for which an embedding has no row; objects are newer.
    if transformers is not None and case not in ("as padding alone", "in an object"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)


PLAIN, LLAMA = {}, {"tokenizer_class": "LlamaTokenizer"}
# The settings beside a model with a dummy prefix, a text, and its pieces.
SPACES = [
    (PLAIN, "a</s>b<|e|>c", ["▁a", "</s>", "▁b", "<|e|>", "c"]),
    (LLAMA, "a</s>b<|e|>c", ["▁a", "</s>", "▁b", "<|e|>", "▁c"]),
    (LLAMA | {"legacy": True}, " a</s> b", ["▁", "▁a", "</s>", "▁", "▁b"]),
    (LLAMA | {"legacy": False}, "a</s>b<|e|>c", ["▁a", "</s>", "b", "<|e|>", "c"]),
    (LLAMA | {"legacy": False}, " a</s> b", ["▁a", "</s>", "▁b"]),
    (LLAMA | {"legacy": False}, "</s>b", ["</s>", "b"]),
    (LLAMA | {"legacy": False}, "", []),
    (LLAMA | {"legacy": False, "add_prefix_space": False}, "a</s>b", ["a", "</s>", "b"]),
    (LLAMA | {"add_prefix_space": False}, "a</s> b", ["a", "</s>", "▁b"]),
    (LLAMA | {"legacy": False, "additional_special_tokens": ["b"]}, "ab", ["▁a", "b"]),
]


def test_spaces_at_special_tokens_of_a_model_that_begins_words_with_a_space(sentencepiece_model, tmp_path):
    options = {"model_type": "bpe", "vocab_size": 300, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = sentencepiece_model(["a b c ab"] * 20, user_defined_symbols=["<|e|>"], **options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    write(tmp_path, {"config.json": {"model_type": "llama"}})
    for changes, text, pieces in SPACES:
        write(tmp_path, {CONFIG: changes})
        assert pieces_of(load_tokenizer(tmp_path), text) == pieces, (changes, text)
        if transformers is not None and changes != PLAIN:
            theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
            assert theirs.convert_ids_to_tokens(theirs(text, add_special_tokens=False)["input_ids"]) == pieces
    write(tmp_path, {ADDED: {A: 300, "</s>": 2}})
    with pytest.raises(UserError, match=r"add '<\|a\|>', which a SentencePiece model cannot take; make a tokenizer.js"):
        load_tokenizer(tmp_path)


DREAM_ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
DREAM_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The behaviour of Dream's own template: ChatML with a default system prompt, and a line break after each turn."""


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
    added = {str(size + i): entry(text) for i, text in enumerate(DREAM_ADDED)}
    content = {"added_tokens_decoder": added, "chat_template": DREAM_TEMPLATE, "tokenizer_class": "DreamTokenizer"}
    content |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    return write(folder, {CONFIG: content, "config.json": {"mask_token_id": size + 4, "eos_token_id": size}})


DREAM_FILES = {"merges.txt", "tokenizer.json", CONFIG, "vocab.json"}  # the originals, and what was made of them
USER, ASSISTANT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
DREAM_ASKED = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
# The tokenizer's files, a prompt of one turn, and the special tokens.
LLADA_ASKED = f"<|startoftext|>{USER}How many?<|eot_id|>{ASSISTANT}"
FAMILIES = {
    "llada": ({"tokenizer.json", CONFIG}, LLADA_ASKED, ["<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>"]),
    "dream": (DREAM_FILES, f"{DREAM_ASKED}<|im_start|>assistant\n", ["<|mask|>", "<|endoftext|>", "<|im_end|>"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_is_asked_as_its_files_say(prepared, tokenizer_folder, dream_folder, monkeypatch, family):
    files, prompt, special = FAMILIES[family]
    folder = dream_folder if family == "dream" else tokenizer_folder()
    download = Mock(return_value=str(folder))
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    said = ["How many?", "12", "two?", "2, surely", "three?", "3"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    opened = prepared("org/name", [{"messages": turns}], template="tokenizer", turns="all")
    # The hub is asked for the tokenizer, not for the weights.
    assert download.called and all(call.args == ("org/name",) for call in download.call_args_list)
    assert not any("*.safetensors" in call.kwargs["allow_patterns"] for call in download.call_args_list)
    rows, decode = list(opened.records("train")), opened.tokenizer.decode
    assert [row.source for row in rows] == ["train.jsonl:1#1", "train.jsonl:1#2", "train.jsonl:1#3"]
    manifest, ids = opened.manifest, opened.special
    assert manifest.inputs["train"]["conversations"] == 1 and manifest.splits["train"]["kept"] == 3
    assert [decode(row.response_ids, skip_special=False) for row in rows] == [text + special[2] for text in said[1::2]]
    earlier = []
    for at, row in enumerate(rows):
        asked = decode(row.prompt_ids, skip_special=False)
        assert [text for text in said if text in asked] == said[: 2 * at + 1] and (at or asked == prompt)
        assert row.prompt_ids.tolist()[: len(earlier)] == earlier
        earlier = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
    assert [opened.tokenizer.piece(i) for i in (ids.mask, ids.eos, ids.eot)] == special
    assert manifest.tokenizer["files"].keys() == opened.tokenizer.files.keys() == files
    again = checkpoint_encoder(folder, load_tokenizer(folder), ids.mask, ids.eos)
    assert again.special == ids and again.prompt("How many?") == rows[0].prompt_ids.tolist()
    assert checkpoint_encoder(folder, opened.tokenizer, None, ids.eos) is None


def test_dream_s_files_cut_texts_as_transformers_does(dream_folder):
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2").Qwen2Tokenizer
    theirs = qwen2(str(dream_folder / "vocab.json"), str(dream_folder / "merges.txt"))
    ours = load_tokenizer(dream_folder)
    for text in ("It's 12 + 5 = 17!", "  a\n\n b\t\r\n", "they'LL said2apples", "Où? e\u0301 中文 😀", "\n \n1"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"])


def test_folders_that_hold_no_tokenizer_are_named(tmp_path, tokenizer_folder, dream_folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    (tmp_path / "bad.txt").write_text("")
    llada, dream = tokenizer_folder(), json.loads((dream_folder / CONFIG).read_text())
    moved = {str(int(i) + 1): entry for i, entry in dream["added_tokens_decoder"].items()}
    other = dream | {"tokenizer_class": "GPT2Tokenizer"}
    for path, files, complaint in [
        (tmp_path / "none", {}, "does not exist; give `train`"),
        (tmp_path / "empty", {}, "holds neither tokenizer.json, nor vocab.json with merges.txt, nor"),
        (tmp_path / "bad.model", {}, "not a SentencePiece model"),
        (tmp_path / "bad.txt", {}, "neither a SentencePiece .model nor"),
        (llada, {CONFIG: {"added_tokens_decoder": {"900": entry(A)}}}, r"<\|a\|>' the id 900, but .* it would be 600"),
        (llada, {CONFIG: {"added_tokens_decoder": [1]}}, "added_tokens_decoder, .* cannot be read"),
        (llada, {CONFIG: {}, ADDED: {A: "x"}}, "added_tokens.json cannot be read"),
        (llada, {CONFIG: {}, ADDED: {A: float("inf")}}, "added_tokens.json cannot be read"),
        (dream_folder, {CONFIG: other}, "of a 'GPT2Tokenizer' .* not read, only those of DreamTokenizer"),
        (dream_folder, {CONFIG: dream | {"added_tokens_decoder": moved}}, "do not belong together"),
        (dream_folder, {CONFIG: dream, "merges.txt": "zq zq"}, "merges.txt or tokenizer_config.json cannot be used"),
    ]:
        with pytest.raises(UserError, match=complaint):
            load_tokenizer(write(path, files))


def test_a_checkpoint_s_template_and_the_ids_in_its_config_json_are_taken(prepared, tokenizer_folder):
    unknown = r"does not end the response; .* The template writes <\|eot_id\|>, which the tokenizer does not have"
    with pytest.raises(UserError, match=unknown):
        prepared(tokenizer_folder({"<|eot_id|>": "<|other|>"}), template="tokenizer")
    for content, mask, eos in [
        ({"mask_token_id": 599, "eos_token_id": [0, 1]}, 599, 0),
        ({"mask_token_id": 9_000}, 9_000, 1),  # a row of the embedding that has no text
        ({"architectures": ["Other"]}, 2, 1),
    ]:
        opened = prepared(write(tokenizer_folder(), {"config.json": content}), template="tokenizer", overwrite=True)
        assert (opened.special.mask, opened.special.eos) == (mask, eos)
        assert opened.manifest.vocab_size == max(opened.tokenizer.vocab_size, mask + 1)


# The tokenizer of an autoregressive model has no mask, but a reserved token.
RESERVED = "<|reserved_special_token_0|>"
START = {"<|mdm_mask|>": RESERVED}


def test_what_a_tokenizer_lacks_or_has_already_is_named(tmp_path, prepared, tokenizer_folder, pieces):
    pieces.save(tmp_path)
    start, model = tokenizer_folder(START), tmp_path / "tokenizer.model"
    added = {"template": "plain", "add_mask_token": True}
    asked = {"mask_token": RESERVED, "rows": [(RESERVED, "12")]}
    advice = r"data.mask_token: .* name an unused token, or set data.add_mask_token. Candidates: <\|reserved_special_"
    for tokenizer, options, complaint in [
        (start, {}, advice),
        (start, asked, r"train.jsonl:1: .* special token '<\|reserved_special_token_0"),
        (model, {"mask_token": "<|other|>", **added}, "is a SentencePiece model, .* unused token .*<.mdm_mask.>"),
        (model, added, r"has '<\|mdm_mask\|>' already .id \d+."),
        (start / "tokenizer.json", added, "has a mask token .its config.json: mask_token_id 4"),
    ]:
        if "mask_token_id" in complaint:
            write(start, {"config.json": {"mask_token_id": 4}})
        with pytest.raises(UserError, match=complaint):
            prepared(tokenizer, **{"template": "tokenizer", **options})


def test_a_mask_can_be_named_or_added_and_is_carried_along(tmp_path, prepared, tokenizer_folder):
    start = tokenizer_folder(START)
    opened = prepared(start, template="tokenizer", mask_token=RESERVED)
    assert opened.tokenizer.piece(opened.special.mask) == RESERVED
    before, added = load_tokenizer(start), {"add_mask_token": True, "overwrite": True}
    opened = prepared(start, template="tokenizer", mask_token="<|mask|>", **added)
    folder = tmp_path / "out" / "tokenizer"
    again, mask = load_tokenizer(folder), before.vocab_size
    assert again.id_of("<|mask|>") == opened.special.mask == opened.manifest.vocab_size - 1 == mask
    text = "How many?<|eot_id|>12"
    assert again.encode(text) == before.encode(text) and again.encode("a<|mask|>b")[1:-1] == [mask]
    settings = json.loads((folder / CONFIG).read_text())
    assert settings["mask_token"] == settings["added_tokens_decoder"][str(mask)]["content"] == "<|mask|>"
    if transformers is not None:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert theirs.mask_token_id == mask and ids == before.encode(text)

"""Small tokenizers and training files for the tests of the data room."""

import json
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxblock.data.config import DataConfig
from jaxblock.data.text import corpus
from jaxblock.data.tokens.sentencepiece_model import train_tokenizer

LLADA_TEMPLATE = (
    "{% set rows = messages %}{% for m in rows %}"
    "{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}"
    "{{ text }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
"""The behaviour of LLaDA's own template: the assistant's header comes at the end whether or not it is asked for."""

SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"]
SPECIALS += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="session")
def pieces():
    """A SentencePiece tokenizer trained on a few built-in problems."""
    texts = [f"{record['question']}\nuser assistant\n{record['answer']}" for record in corpus.generate("train", 300)]
    return train_tokenizer(texts, DataConfig(vocab_size=700), SPECIALS)


@pytest.fixture
def tokenizer_folder(tmp_path):
    """Makes a Hugging Face tokenizer folder (byte-level BPE) with LLaDA's special tokens and template."""

    def make(without: str = "") -> str:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {"vocab_size": 600, "special_tokens": [text for text in SPECIALS if text != without]}
        options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        texts = [f"{record['question']}\n{record['answer']}" for record in corpus.generate("train", 100)]
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        pad = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}
        settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": LLADA_TEMPLATE}))
        return str(folder)

    return make


@pytest.fixture
def jsonl(tmp_path):
    """Writes records, given as (question, answer), to a file."""

    def make(name: str, rows: Sequence[tuple[str, str]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
        return str(path)

    return make

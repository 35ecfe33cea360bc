"""Small tokenizers, training files and prepared folders for the tests of the data room."""

import io
import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxblock.data.config import DataConfig
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.text import corpus
from jaxblock.data.tokens.sentencepiece_model import train_tokenizer
from jaxblock.diffusion.config import CanvasConfig

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


@pytest.fixture(scope="session")
def sentencepiece_model():
    """Trains a SentencePiece model as others do, and returns its bytes."""

    def train(texts, **options):
        model = io.BytesIO()
        options |= {"hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2, "model_writer": model}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), **options)
        return model.getvalue()

    return train


@pytest.fixture
def tokenizer_folder(tmp_path):
    """Makes a Hugging Face tokenizer folder (byte-level BPE) with LLaDA's template and special tokens, some replaced."""

    def make(instead=None):
        special = [(instead or {}).get(text, text) for text in SPECIALS]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {"vocab_size": 600, "special_tokens": special, "show_progress": False}
        texts = [f"{record['question']}\n{record['answer']}" for record in corpus.generate("train", 100)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        pad = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}
        settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
        settings |= {"chat_template": LLADA_TEMPLATE, "added_tokens_decoder": {}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture
def jsonl(tmp_path):
    """Writes records, given as they are or as (question, answer), to a file."""

    def make(name, rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        records = [
            row if isinstance(row, dict) else dict(zip(("question", "answer"), row, strict=True)) for row in rows
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return make


@pytest.fixture
def prepared(tmp_path, jsonl):
    """Prepares a training file of one record, or what is given, in the folder "out", and opens it."""

    def make(tokenizer="train", rows=(("How many?", "12"),), *, canvas=(300, 96, 8), progress=print, **data):
        settings = {"prepared": str(tmp_path / "out"), "test": None, "validation_records": 0, **data}
        train = settings.pop("train", None) or jsonl("train.jsonl", rows)
        config = DataConfig(train=train, tokenizer=str(tokenizer), **settings)
        prepare(config, CanvasConfig(*canvas), progress)
        return open_prepared(config.prepared)

    return make

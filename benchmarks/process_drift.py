"""Compares one process with 8 devices and two with 4 each: whether batches and draws are equal, and how losses drift.

All run the real set-up, data reader and compiled step on a model like the quickstart's, as processes joined over loopback
(launch/local_pod.sh). One process with one device is compared too: a mesh whose sums have another order. Ids and noise are
compared by the SHA-256 of the global arrays of every step.

    python -m benchmarks.process_drift --steps 100
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """\
data: {{prepared: {folder}/prepared, train: {folder}/train.jsonl, test: {folder}/test.jsonl, validation_records: 0,
       template: plain, tokenizer_type: char, vocab_size: 300}}
canvas: {{prompt_len: 24, response_len: 16, block: 4}}
method: {{blocks: pairs}}
model: {{d_model: {d}, n_layers: {layers}, n_heads: 4, mlp_dim: {mlp}}}
optimizer: {{lr: 3.0e-3, warmup_steps: 10}}
train: {{steps: {steps}, batch_size: 16, fsdp: 2, eval_every: 0, eval_problems: 0, eval_nelbo_rows: 0}}
"""


def worker(config_file: str, out: str, *, one: bool = False) -> None:
    """Runs one process's part (``one``: on one device); process 0 writes a line per step into ``out``/steps.jsonl."""
    import jax
    import numpy as np
    from rich.console import Console

    from benchmarks.sessions import loaded_session
    from jaxblock.config.yaml import load_config
    from jaxblock.data.loader import BatchAt, batches
    from jaxblock.parallel import rules
    from jaxblock.training.step import jit_step

    config = load_config(config_file)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, out=out, fsdp=1 if one else 2))
    session = loaded_session(config, Console(stderr=True))
    whole = rules.replicated(session.mesh)
    at = BatchAt(
        session.prepared.records("train"),
        canvas=config.canvas,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        kind=config.method.blocks,
        process_index=session.process_index,
        process_count=session.process_count,
    )
    stream = batches(at)
    objective = session.learner.objective
    everything = jax.jit(
        lambda batch, step: (batch, objective.draw(batch, objective.canvas(batch), step)),
        out_shardings=whole,
    )
    step_fn = jit_step(session.learner, session.state, session.mesh)
    state, rows = session.state, []
    with jax.set_mesh(session.mesh):
        for step in range(config.train.steps):
            batch = session.on_mesh(next(stream))
            drawn = [np.asarray(leaf) for leaf in jax.tree.leaves(everything(batch, step))]
            state, metrics = step_fn(state, batch, session.frozen)
            loss = metrics.losses.loss
            digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in drawn)).hexdigest()
            rows.append({"drawn": digest, "loss": float(loss.total) / float(loss.weight)})
        params = jax.device_get(jax.jit(lambda tree: tree, out_shardings=whole)(state.params))
    session.checkpoints.save(state, config.train.steps, {})
    session.checkpoints.close()
    if session.process_index == 0:
        flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(params)])
        np.save(Path(out) / "params.npy", flat)
        (Path(out) / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(folder: Path, groups: list[tuple[int, int]], *, steps: int, d: int, layers: int) -> list[dict[str, Any]]:
    """Trains once for each (number of processes, devices of each) in a folder.

    Returns:
        For each group but the first, against the first: ``drawn_equal`` (steps whose ids and noise are bit-equal),
        ``loss_step_1`` and ``loss_last`` (relative difference), ``loss_worst`` (the largest of all steps), ``params``
        (norm of the difference over the norm).
    """
    import numpy as np

    sums = [(a, b) for a in range(10) for b in range(10)]
    lines = [json.dumps({"question": f"{a}+{b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}) + "\n" for a, b in sums]
    (folder / "train.jsonl").write_text("".join(lines[:90]))
    (folder / "test.jsonl").write_text("".join(lines[90:]))
    config = folder / "drift.yaml"
    config.write_text(CONFIG.format(folder=folder, d=d, layers=layers, mlp=2 * d, steps=steps))
    subprocess.run([sys.executable, "-m", "jaxblock", "prepare", "--config", config], cwd=ROOT, check=True)
    runs = []
    for processes, devices in groups:
        out = folder / f"{processes}x{devices}"
        command = [sys.executable, "-m", "benchmarks.process_drift", "--worker", str(config), str(out)]
        if processes * devices == 1:
            command.append("--one")
        pod = [str(ROOT / "launch" / "local_pod.sh"), str(processes), "--devices", str(devices), "--", *command]
        subprocess.run(pod, cwd=ROOT, check=True)
        rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
        runs.append((rows, np.load(out / "params.npy")))
    (first, whole), found = runs[0], []
    for (processes, devices), (rows, params) in zip(groups[1:], runs[1:], strict=True):
        apart = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(first, rows, strict=True)]
        found.append(
            {
                "group": f"{processes}x{devices}",
                "steps": steps,
                "drawn_equal": sum(a["drawn"] == b["drawn"] for a, b in zip(first, rows, strict=True)),
                "loss_step_1": apart[0],
                "loss_last": apart[-1],
                "loss_worst": max(apart),
                "params": float(np.linalg.norm(whole - params) / np.linalg.norm(whole)),
            }
        )
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parses the options, compares the groups of processes, and prints how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("CONFIG", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(*options.worker, one=options.one)
        return []
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), [(1, 8), (2, 4), (1, 1)], steps=options.steps, d=options.d, layers=options.layers)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()

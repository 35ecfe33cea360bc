"""Measures loading and exporting gigabytes of weights: GB/s, peak host memory, and whether every bit survives.

Makes a checkpoint in LLaDA's layout (bfloat16, several shards, random bits) in a temporary folder, then loads it,
loads and exports it, and loads the export, each in a fresh process. On a CPU the loaded arrays are host memory, so the
limit is the arrays plus one layer's tensors plus 20%; on an accelerator pass ``--device-memory``: the arrays are not in
host memory, and the limit is one layer's tensors (or the embedding, the largest tensor) plus 20%. With several devices
the arrays are split over them (FSDP).

    python -m benchmarks.load_checkpoint
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.load_checkpoint
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxblock.huggingface.load import load_checkpoint, read_architecture
from jaxblock.huggingface.placement import stored_shape, tensor_names
from jaxblock.huggingface.save import save_checkpoint
from jaxblock.huggingface.tensor_writer import PendingTensor, split_into_files, write_tensors
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.spec import ParamSpec, Table
from jaxblock.parallel.mesh import make_mesh
from jaxblock.parallel.rules import param_shardings

GB = 1e9


def make(folder: Path, arch: Architecture, shard_bytes: int) -> Table:
    """Writes a checkpoint of random finite bfloat16 values, tensor by tensor, without JAX.

    Returns:
        The checkpoint's table of parameters.
    """
    table = registry.param_table(arch)
    block = np.random.default_rng(0).integers(0, 1 << 16, 1 << 20, np.uint16)
    block = (block & 0xBFFF).astype(np.uint16)  # clears an exponent bit: no infinities and no NaN
    bf16 = jax.dtypes.canonicalize_dtype("bfloat16")

    def values(spec: ParamSpec, name: str) -> np.ndarray:
        shape = stored_shape(spec)
        turned = np.roll(block, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % block.size)
        return np.resize(turned, shape).view(bf16)

    pending = {
        name: PendingTensor(np.dtype(bf16), stored_shape(spec), partial(values, spec, name))
        for spec in table.values()
        for name in tensor_names(spec)
    }
    folder.mkdir()
    files = split_into_files(pending, shard_bytes)
    for file, names in files.items():
        write_tensors(folder / file, names, pending)
    (folder / "config.json").write_text(json.dumps(registry.to_hf(arch, "bfloat16")))
    return table


def peak_bytes() -> int:
    """Returns the most memory that this process has ever held, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(folder: str, out: str | None) -> dict[str, float]:
    """Measures loading, and exporting where ``out`` is given, in this process: seconds and peaks above the idle process."""
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    devices = jax.device_count()
    shardings = None
    if devices > 1:
        shardings = param_shardings(make_mesh(1, devices), registry.param_table(read_architecture(folder)))
    before = peak_bytes()
    begin = time.perf_counter()
    arch, params = load_checkpoint(folder, shardings=shardings)
    jax.block_until_ready(params)
    found = {"load_seconds": time.perf_counter() - begin, "load_peak": peak_bytes() - before}
    found["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if out is not None:
        begin = time.perf_counter()
        save_checkpoint(out, arch, params, max_shard_bytes=10**9)
        found |= {"save_seconds": time.perf_counter() - begin, "save_peak": peak_bytes() - before}
    return found


def fresh(folder: Path, out: Path | None = None) -> dict[str, float]:
    """Runs ``measure`` in a process of its own and returns what it measured."""
    command = [sys.executable, "-m", "benchmarks.load_checkpoint", "--measure", str(folder)]
    done = subprocess.run([*command, *([str(out)] if out else [])], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every tensor's bytes, by the tensor's name."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()
            found |= {n: hashlib.sha256(tensors.get_tensor(n).view(np.uint8)).hexdigest() for n in names}
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 2048), ("layers", 24), ("mlp", 5632), ("vocab", 32_000), ("shard-mb", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", help="where to make the files; None for the system's temporary folder")
    parser.add_argument("--device-memory", action="store_true", help="loaded arrays are not in host memory")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        found = measure(args.measure[0], args.measure[1] if len(args.measure) > 1 else None)
        print(json.dumps(found))
        return found
    heads = args.d // 128 or 1
    arch = Architecture(
        "llada", args.vocab, args.d, args.layers, heads, heads, args.d // heads, args.mlp, 1e-5, 5e5, 4096, False,
        args.vocab - 1, 1, 1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="jaxblock-") as scratch:
        made, exported = Path(scratch) / "made", Path(scratch) / "exported"
        table = make(made, arch, args.shard_mb * 10**6)
        once, both = fresh(made), fresh(made, exported)
        again = fresh(exported)
        exact = digests(made) == digests(exported)
    layer = sum(2 * int(np.prod(spec.shape[1:])) for spec in table.values() if spec.stacked)
    largest = 2 * args.vocab * args.d
    bar = 1.2 * (max(layer, largest) if args.device_memory else once["bytes"] + layer)
    return report(once, both, again, exact, layer, bar)


def report(
    once: dict[str, float], both: dict[str, float], again: dict[str, float], exact: bool, layer: int, bar: float
) -> dict[str, Any]:
    """Prints what was measured, as docs/benchmarks.md shows it."""
    size = once["bytes"]
    print(
        f"checkpoint {size / GB:.2f} GB, one layer {layer / GB:.3f} GB; {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    print("| | seconds | GB/s | peak host memory | of the checkpoint | bar |")
    print("|---|---|---|---|---|---|")
    rows = (
        ("load", once["load_seconds"], once["load_peak"]),
        ("load, then export", both["save_seconds"], both["save_peak"]),
        ("load the export", again["load_seconds"], again["load_peak"]),
    )
    for name, seconds, peak in rows:
        verdict = f"{peak / size:.3f} | {bar / GB:.2f} GB, {'met' if peak <= bar else 'missed'}"
        print(f"| {name} | {seconds:.1f} | {size / seconds / GB:.2f} | {peak / GB:.2f} GB | {verdict} |")
    print(f"import, export, import: {'every bit the same' if exact else 'DIFFERENT'}")
    return {"rows": rows, "exact": exact, "bytes": size, "bar": bar}


if __name__ == "__main__":
    main()

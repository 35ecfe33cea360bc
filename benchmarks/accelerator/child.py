"""Runs one item in this process: ``python -m benchmarks.accelerator.child ITEM ...``, as the kit starts it.

Every finding is a line of JSON, written as soon as it is there, so that it survives a crash of what comes after it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerator import device_items, sizes
from benchmarks.accelerator.attention import attention
from benchmarks.accelerator.device_items import Context
from benchmarks.accelerator.measure import NoTime, Rows, Skip, out_of_memory, reason
from benchmarks.accelerator.quickstart import quickstart
from jaxblock.parallel.host_memory import keep_freed_memory

RUN: dict[str, Callable[[Context], Rows]] = {
    "parity": device_items.parity,
    "weights": device_items.weights,
    "lora": device_items.lora,
    "lora-long": device_items.lora_long,
    "int8": device_items.int8,
    "decode": device_items.decode,
    "decode-caches": device_items.decode_caches,
    "attention": attention,
    "checkpoint": device_items.checkpoint,
    "quickstart": quickstart,
}

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the item that the arguments name; what became of it is in its file, not in the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("item", choices=RUN)
    parser.add_argument("--record", type=Path, required=True, help="file that gets a line of JSON for every finding")
    parser.add_argument("--out", type=Path, required=True, help="folder for the item's own files")
    parser.add_argument("--golden", type=Path, required=True, help="folder of the golden models")
    parser.add_argument("--seconds", type=float, required=True, help="the time that it may take")
    parser.add_argument("--tiny", action="store_true", help="sizes of the rehearsal")
    args = parser.parse_args(argv)
    with args.record.open("w", encoding="utf-8") as record:

        def write(kind: str, value: Any) -> None:
            record.write(json.dumps({kind: value}) + "\n")
            record.flush()

        try:
            write("environment", environment())
            context = Context(sizes.TINY if args.tiny else sizes.FULL, args.out, args.golden, args.seconds)
            failed = []
            for row in RUN[args.item](context):
                write("row", row)
                failed += [row["case"]] if "failed" in row else []
            write("end", {"status": "failed in part", "reason": "; ".join(failed)} if failed else {"status": "done"})
        except Skip as skip:
            write("end", {"status": "skipped", "reason": str(skip)})
        except NoTime as short:
            write("end", {"status": "no time left", "reason": str(short)})
        except Exception as error:
            write("end", {"status": "out of memory" if out_of_memory(error) else "failed", "reason": reason(error)})
            raise
    return 0


def environment() -> dict[str, Any]:
    """Describes the devices and the software of this process."""
    devices = jax.local_devices()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "versions": versions,
    }


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    sys.exit(main())

"""The accelerator kit: rehearsed end to end on a CPU, and its handling of items that crash, hang or find no memory."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from packaging.utils import canonicalize_name

from benchmarks.accelerator import __main__ as kit
from benchmarks.accelerator import wheels
from benchmarks.accelerator.sizes import ITEMS, TINY
from benchmarks.small_network import CACHES, token_forwards

SPEED = {"median": 12345.6, "least": 0.001234, "most": 2, "runs": 3}
# Stands in for the process of an item: what it does depends on the item.
STUB = f"""
import json, os, pathlib, signal, sys, time
item, record = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--record") + 1]).open("w")
with open(pathlib.Path(__file__).parent / "calls.txt", "a") as calls:
    calls.write(item + chr(10))
def write(**line):
    print(json.dumps(line), file=record, flush=True)
write(environment=dict(device="a chip", platform="toy", devices=1, runtime="none", versions=dict(jax="1.2")))
write(row=dict(case="first", speed={SPEED}, size=None, kind="text"))
if item == "parity":
    write(end=dict(status="skipped", reason="not here"))
if item == "weights":
    os.kill(os.getpid(), signal.SIGKILL)
if item == "lora":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if item == "lora-long":
    write(end=dict(status="out of memory", reason="RESOURCE_EXHAUSTED"))
if item == "int8":
    sys.exit("the last | words")
if item in ("decode", "decode-caches", "attention", "checkpoint", "quickstart"):
    write(end=dict(status="done"))
"""


def results(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["items"]


@pytest.mark.slow
def test_whatever_becomes_of_an_item_is_a_result_and_only_what_the_time_cut_short_is_taken_up(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(kit, "CHILD", [sys.executable, str(tmp_path / "stub.py")])
    monkeypatch.setattr(kit, "LEAST", 0.1)
    monkeypatch.setattr(kit, "GRACE", 0.2)
    # Three seconds for the item that hangs, and as many as there are for the others, so that a slow machine does not matter.
    shares = [item._replace(share=0.005 if item.name == "lora" else 1.0) for item in ITEMS]
    monkeypatch.setattr(kit, "ITEMS", shares)
    out = tmp_path / "out"

    def run(*flags: str) -> int:
        return kit.main(["--tiny", "--out", str(out), "--commit", "abc", *flags])

    run("--minutes", "0.0001", "--only", "checkpoint")
    assert {name: result["status"] for name, result in results(out).items()} == {"checkpoint": "no time left"}
    assert run("--minutes", "10") == 1
    found = results(out)
    assert {name: result["status"] for name, result in found.items()} == {
        "parity": "skipped", "weights": "crashed", "lora": "time limit", "lora-long": "out of memory", "int8": "crashed",
        "decode": "done", "decode-caches": "done", "attention": "done", "checkpoint": "done", "quickstart": "done",
    }  # fmt: skip
    assert found["weights"]["reason"] == "signal 9; last words: none"
    assert found["int8"]["reason"] == "exit code 1; last words: the last | words"
    rows = [{"case": "first", "speed": SPEED, "size": None, "kind": "text"}]
    assert all(result["rows"] == rows for result in found.values())  # what it had found stays
    text = (out / "results.md").read_text()
    device = r"\| 1 x a chip \(toy\) \| \d{4}-\d\d-\d\d \| abc \| jax 1.2; none \| parity, weights, lora,"
    assert re.search(device, text)
    assert r"| int8 | crashed: exit code 1; last words: the last \| words |" in text
    assert (
        "| first | speed | 12,346 (0.001234 to 2, 3) |\n|  | size | not known on this device |\n|  | kind | text |"
        in text
    )
    run("--minutes", "10")
    run("--minutes", "10", "--only", "int8", "--again")
    assert (tmp_path / "calls.txt").read_text().split() == [*(item.name for item in ITEMS), "lora", "int8"]
    with pytest.raises(SystemExit, match="holds results of other sizes"):
        kit.main(["--out", str(out)])


def test_a_case_that_fails_is_named_and_does_not_end_its_item(tmp_path, monkeypatch):
    from benchmarks.accelerator import child  # brings all that the kit imports from jaxblock
    from benchmarks.accelerator.measure import NoTime, Skip, attempt

    assert list(child.RUN) == [item.name for item in ITEMS]

    def skip() -> dict[str, float]:
        raise Skip("no division by 0")

    cases = {"a": skip, "b": lambda: {"result": 1 / 0}, "c": lambda: {"result": 0.5}}
    record = tmp_path / "findings.jsonl"
    for error, status, why in (
        (None, "failed in part", "b"),
        (Skip("why"), "skipped", "why"),
        (NoTime("short"), "no time left", "short"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB\nmore"), "out of memory", "RuntimeError: RESOURCE_EXHAUSTED: 3 GB"),
        (ValueError("two\nlines"), "failed", "ValueError: two"),
    ):

        def item(_: object, error: Exception | None = error) -> Iterator[dict[str, Any]]:
            yield from (attempt(*case) for case in cases.items())
            if error is not None:
                raise error

        monkeypatch.setitem(child.RUN, "parity", item)
        with suppress(RuntimeError, ValueError):
            child.main(["parity", "--record", str(record), "--out", "out", "--golden", "golden", "--seconds", "1"])
        environment, *rows, end = map(json.loads, record.read_text().splitlines())
        assert environment["environment"]["platform"] == "cpu" and end == {"end": {"status": status, "reason": why}}
        found = [list(row["row"].values()) for row in rows]
        assert found == [["a", "no division by 0"], ["b", "ZeroDivisionError: division by zero"], ["c", 0.5]]


def test_what_does_not_fit_is_skipped_with_its_reason(tmp_path, monkeypatch):
    from benchmarks.accelerator import device_items, internals
    from benchmarks.accelerator.measure import Skip

    monkeypatch.setattr(internals, "device_limit", lambda device: 1.0)
    context = device_items.Context(TINY, tmp_path, tmp_path, 1.0)
    numbers = jax.ShapeDtypeStruct(
        (1024, 1024), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    for measured, why in (
        (lambda: list(device_items.weights(context)), "the weights alone take"),
        (lambda: list(device_items.decode(context)), "the weights alone take"),
        (lambda: internals.planned(lambda: jax.jit(jnp.sin).lower(numbers), numbers), "it needs"),
    ):
        with pytest.raises(Skip, match=f"{why} .* of a device, which gives .* to programs"):
            measured()


def test_the_list_of_wheels_is_whole():
    listed = wheels.listed()
    needed = wheels.wheels()
    assert set(needed) <= set(listed), "make the list again: python -m benchmarks.accelerator.wheels"
    own = {canonicalize_name(requirement.name) for requirement in wheels.required()}
    assert own - {"jax", "numpy", "scipy"} <= set(listed) and not {"jax", "jaxlib"} & set(listed)
    # What another version of Python needs besides is pinned for that version; anything else is superfluous.
    pins = "".join(file.read_text() for file in wheels.ROOT.glob("constraints-py*.txt"))
    pinned = {canonicalize_name(line.split("==")[0]) for line in pins.splitlines() if "==" in line}
    assert set(listed) <= pinned


@pytest.mark.slow
def test_rehearsal(tmp_path, monkeypatch):
    """Every item runs on the CPU, with tiny sizes and the code of an accelerator; called again, none is repeated."""
    one_device = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("XLA_FLAGS", one_device)
    command = ["--tiny", "--out", str(tmp_path), "--minutes", "20"]
    assert kit.main(command) == 0, (tmp_path / "results.md").read_text()
    found = results(tmp_path)
    assert list(found) == [item.name for item in ITEMS]
    assert all(result["status"] == "done" for name, result in found.items() if name != "parity"), found
    assert found["parity"]["status"] == ("done" if wheels.ROOT.parent.joinpath("shared").is_dir() else "skipped")
    rows = {name: {row["case"]: row for row in result["rows"]} for name, result in found.items()}
    assert not [row for name in rows for row in rows[name].values() if "failed" in row]
    assert all(row["within 2e-5"] == "yes" for row in rows["parity"].values() if "skipped" not in row)
    (whole,), (_, step), (_, small) = (list(rows[name].values()) for name in ("weights", "lora", "int8"))
    assert whole["bytes"] == step["base, bytes"] == 2 * whole["parameters"] > small["base, bytes"]
    assert step["tokens/s"]["median"] == pytest.approx(TINY.short.rows * TINY.short.length / step["step, s"]["median"])
    forwards = TINY.decoding.response // TINY.decoding.block * TINY.steps_per_block
    assert [row["forwards"] for row in rows["decode"].values()] == [forwards] * len(TINY.batches)
    sizes = (TINY.decoding.prompt, TINY.decoding.response, TINY.decoding.block, TINY.steps_per_block)
    fed = [token_forwards(cache, *sizes) for cache in CACHES] * len(TINY.batches)
    assert [row["token-forwards of a row"] for row in rows["decode-caches"].values()] == fed
    errors = [v for row in rows["attention"].values() for k, v in row.items() if k.startswith("error")]
    assert len(errors) == 8 and max(errors) < 0.02
    assert [row["steps"] for case, row in rows["quickstart"].items() if case.startswith("train")] == [3, 3]
    assert all("of 8" in row["Pass@1"] for case, row in rows["quickstart"].items() if case.startswith("score"))
    text = (tmp_path / "results.md").read_text()
    assert "| 1 x cpu (cpu) |" in text and "there is no fused attention for this platform" in text
    monkeypatch.setattr(kit, "run_item", lambda *_: pytest.fail("an item was run again"))
    assert kit.main(command) == 0

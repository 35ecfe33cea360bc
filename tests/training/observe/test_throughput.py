"""Tests the arithmetic of a step against numbers worked out by hand, and its share of a chip's peak."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import Mesh

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.spec import matmul_flops_per_token
from jaxblock.parallel.chips import CHIPS
from jaxblock.training.observe import throughput
from jaxblock.training.observe.throughput import Work


def test_arithmetic_against_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Architecture(
        "llada", vocab_size=13, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, mlp_dim=24, norm_eps=1e-5,
        rope_theta=100.0, max_len=64, mask_id=11, eos_id=10, pad_id=10, tie_embeddings=False,
    )  # fmt: skip
    table = registry.param_table(arch)
    work = Work(rows=2, positions=20, predicted=8)
    per_token = matmul_flops_per_token(table, arch, 10, head=False)
    head = 2 * arch.vocab_size * arch.d_model
    assert throughput.model_flops(table, arch, work) == 3 * (20 * per_token + 8 * head)
    attention = per_token - matmul_flops_per_token(table, arch, 0, head=False)
    assert throughput.model_flops(table, arch, work, {}) == 2 * (20 * per_token + 8 * head) + 20 * attention

    mesh = Mesh(jax.devices()[:4], ("data",))
    assert throughput.peak_flops(mesh) is None and throughput.utilisation(1e12, 2.0, None) == {}
    monkeypatch.setattr(throughput, "chip_of", lambda device: CHIPS["v5e"])
    assert throughput.peak_flops(mesh) == 4 * 197e12
    assert throughput.utilisation(197e12, 2.0, 4 * 197e12) == {"model_flops_per_second": 98.5e12, "mfu": 0.125}

"""Tests which of XLA's options programs of small networks get."""

from unittest.mock import Mock

import jax
import pytest

from jaxblock.parallel import compiling

CPU, TPU = (Mock(spec=jax.Device, platform=name) for name in ("cpu", "tpu"))


@pytest.mark.parametrize("cores", [1, 2])
def test_small_programs_on_a_cpu_are_compiled_quickly_with_options_that_jax_knows(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_usable_cores", lambda: cores)
    emitters = {compiling.EMITTERS: False} if jax.__version_info__ < (0, 11) else {}
    options = compiling.quick_options([CPU], compiling.SMALL, {})
    assert options == (emitters | {compiling.PIECES: 1} if cores == 1 else emitters)
    assert compiling.quick_options([CPU], compiling.SMALL + 1, {}) == compiling.quick_options([CPU, TPU], 1, {}) == {}
    assert compiling.quick_options([CPU], 1, {"XLA_FLAGS": f"--{compiling.EMITTERS}=true --{compiling.PIECES}=8"}) == {}
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2

"""Keeps JAX from looking for a TPU that this machine does not have."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

_OF_A_TPU = ("TPU_", "JAX_FORCE_TPU_INIT", "CLOUD_TPU_")  # variables that machines with a TPU, and their users, set
_OF_JAX = (
    "TPU_SKIP_MDS_QUERY",
    "TPU_ML_PLATFORM",
)  # what importing JAX sets on any machine, for processes that are started then, too


def skip_missing_tpu(variables: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> bool:
    """Sets JAX_PLATFORMS to cpu where libtpu is installed, as the `plan` extra does, and there is neither TPU nor GPU plugin.

    JAX would start libtpu, which looks for a TPU for up to a minute and prints a page of errors. Call it before JAX is imported.

    Args:
        variables: the environment variables; where JAX_PLATFORMS or one about TPUs is set, nothing is changed.
        devices: the folder of the machine's devices.

    Returns:
        Whether anything was changed.
    """
    of_a_tpu = (name for name in variables if name.startswith(_OF_A_TPU) and not name.startswith(_OF_JAX))
    if variables.get("JAX_PLATFORMS") or any(of_a_tpu):
        return False
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_plugins") is not None:
        return False
    if any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*")):
        return False
    variables["JAX_PLATFORMS"] = "cpu"
    return True

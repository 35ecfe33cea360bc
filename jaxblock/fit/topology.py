"""Parses names of topologies (``v5e-16``), and makes device objects to compile for without having such devices."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import jax

from jaxblock.errors import UserError, first_line, install_command
from jaxblock.parallel.chips import CHIPS, Chip

# The shapes of slices that Google offers, by their number of chips. The number in the name of a v4 or v5p slice counts
# TensorCores, of which a chip has two.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
_NAME = re.compile(r"(?:(\d+)x)?([a-z]\w*)-(\d+)")
_MOST_GPUS = 8


class Topology(NamedTuple):
    """Describes the devices that a run is planned for.

    Attributes:
        name: the topology's name, as it was given.
        chip: the description of one chip.
        slices: the number of slices, which are connected by the data-centre network.
        chips: the number of chips in one slice.
        shape: the shape of a TPU slice (``4x4``); empty for other platforms.
        platform: ``tpu``, ``gpu`` or ``cpu``.
    """

    name: str
    chip: Chip
    slices: int
    chips: int
    shape: str
    platform: str

    @property
    def devices(self) -> int:
        """Counts the chips of all slices."""
        return self.slices * self.chips

    @property
    def is_estimate(self) -> bool:
        """Returns whether programs are compiled for the host's CPU, because there is no compiler for the platform at hand."""
        return self.platform != "tpu"


def parse_topology(name: str) -> Topology:
    """Parses a topology's name, such as ``v5e-16``, ``2xv5e-256``, ``v5p-8`` (4 chips), ``h100-8`` or ``cpu-8``.

    Raises:
        UserError: the name is unknown, or no slice of that size is offered.
    """
    found = _NAME.fullmatch(name)
    kind = found[2] if found else ""
    if found is None or kind not in (*CHIPS, "cpu"):
        known = ", ".join(f"{chip}-N" for chip in (*CHIPS, "cpu"))
        raise UserError(f"topology {name!r} is unknown: use one of {known}, or 2xv5e-256 for two slices")
    slices, count = int(found[1] or 1), int(found[3])
    if min(slices, count) < 1:
        raise UserError(f"topology {name!r}: slices and chips must be at least 1")
    if kind == "cpu":
        host = Chip("CPU", _host_memory() / (slices * count), None, None, None, None, "this machine")
        return Topology(name, host, slices, count, "", "cpu")
    chip = CHIPS[kind]
    if kind.startswith("h"):
        if slices > 1 or count > _MOST_GPUS:
            raise UserError(f"topology {name!r}: GPUs are planned for one node of up to {_MOST_GPUS}, such as {kind}-8")
        return Topology(name, chip, 1, count, "", "gpu")
    by_core = kind in ("v4", "v5p")
    chips, shapes = (count // 2, _CUBES) if by_core else (count, _FLAT)
    if chips not in shapes or (by_core and count % 2):
        offered = ", ".join(f"{kind}-{2 * size if by_core else size}" for size in shapes)
        raise UserError(f"topology {name!r} is not offered: choose from {offered}")
    if slices > 1 and chip.across is None:
        raise UserError(f"topology {name!r}: several slices are planned for v5e and v6e, whose network is published")
    return Topology(name, chip, slices, chips, shapes[chips], "tpu")


def compile_environment(topology: Topology) -> dict[str, str]:
    """Returns the environment variables of a process that compiles for a topology."""
    given = {"JAX_PLATFORMS": "cpu"}
    if topology.platform != "tpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
        given["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.devices}".strip()
        return given
    # With these libtpu does not look for a chip, and works while another process compiles or trains.
    return {**given, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def devices_to_compile_for(topology: Topology) -> list[jax.Device]:
    """Returns device objects that programs can be compiled for; TPU devices made here cannot run programs.

    Raises:
        UserError: libtpu is not installed, or this process has too few host devices.
    """
    if topology.platform != "tpu":
        found = jax.devices("cpu")
        if len(found) < topology.devices:
            raise UserError(f"{topology.name}: this process has {len(found)} host devices")
        return found[: topology.devices]
    from jax.experimental import topologies

    kind = topology.name.split("-")[0].split("x")[-1]
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{topology.shape}", **options)
    except Exception as error:  # libtpu's own types of exceptions
        raise UserError(
            f"no compiler for {topology.name} ({first_line(error)}): install the libtpu wheel that goes with "
            f"this JAX ({install_command('jaxblock[plan]')}); no TPU is needed"
        ) from error
    return list(described.devices)


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

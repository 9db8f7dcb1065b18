"""Header of a TensorRT plan, and whether the plan can run on this device: checked before it is deserialised.

A plan is executable code for one GPU and one version of TensorRT. Its first bytes contain the version, its manifest
names the GPU.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

from edgefg.artifact.manifest import PlanInfo, build_command, read_manifest
from edgefg.errors import DeviceMismatchError, ManifestError, RuntimeUnavailableError

PLAN = "engine.plan"
"""Name of the plan that a device builds beside the ONNX file ``model.onnx``."""
OUT_OF_MEMORY = re.compile(r"out of memory|could not be allocated|OutOfMemory|MemoryAllocation", re.IGNORECASE)
"""Messages of TensorRT and CUDA if memory ran out, which is not the fault of a plan."""
_MAGIC = 0x74727466  # "ftrt", little-endian
_SERIALISATION = 0
_HEADER = 28
_VERSION = slice(24, 28)


class GpuInfo(NamedTuple):
    """A GPU as its driver describes it."""

    name: str
    compute_capability: str
    """``major.minor``, for instance ``8.7``."""
    memory: int
    """Bytes."""


def gpu_number(device: str | None, path: Path) -> int:
    """Return the number of the GPU that ``GPU``, ``GPU:1`` or ``cuda:1`` names; None is the first, 0.

    Raises:
        RuntimeUnavailableError: it names something else, on which a plan (``path``, for the message) cannot run.
    """
    found = re.fullmatch(r"(?:gpu|cuda)(?::(\d+))?", (device or "gpu").lower())
    if found is None:
        raise RuntimeUnavailableError(
            f"device {device!r}: {path.name} is a TensorRT plan; choose GPU, or GPU:1 for the second one"
        )
    return int(found[1] or 0)


def check_header(data: bytes, path: Path) -> str | None:
    """Return the TensorRT version that a plan was written by, for instance ``10.16.1.11``; None if it is not known.

    Args:
        data: the plan, at least its first 28 bytes.
        path: for messages.

    Raises:
        RuntimeUnavailableError: the bytes are not a plan, or are too few.
    """
    if len(data) < _HEADER:
        raise RuntimeUnavailableError(
            f"{path} has {len(data)} bytes, too few for a TensorRT plan; copy or build it again"
        )
    magic, serialisation = struct.unpack_from("<II", data)
    if magic != _MAGIC:
        raise RuntimeUnavailableError(
            f"{path} begins with {data[:4].hex()}, but a TensorRT plan with 66747274 ('ftrt'); copy or build it again"
        )
    # Another serialisation keeps its version elsewhere: unknown is not bad, TensorRT itself will judge it.
    return ".".join(map(str, data[_VERSION])) if serialisation == _SERIALISATION else None


def mismatch(info: PlanInfo | None, written_by: str | None, device: GpuInfo, tensorrt: str) -> str | None:
    """Return why a plan cannot run here; None if it can.

    Args:
        info: the plan's entry in its manifest; None for a plan without a manifest.
        written_by: the version in its header, see `check_header`.
        device: the GPU here.
        tensorrt: the version here.
    """
    for version in (written_by, info.tensorrt if info else None):
        if version is not None and not _same_version(version, tensorrt):
            return f"it was built by TensorRT {version}, here is {tensorrt}"
    if info is None or _fits(info, device):
        return None
    return (
        f"it was built on {info.gpu} (compute capability {info.compute_capability}), here is {device.name}"
        f" ({device.compute_capability})"
    )


def check_fits(path: Path, info: PlanInfo | None, written_by: str | None, device: GpuInfo, tensorrt: str) -> None:
    """Raise `DeviceMismatchError`, with the command that builds the plan again, if it cannot run here."""
    reason = mismatch(info, written_by, device, tensorrt)
    if reason is not None:
        raise DeviceMismatchError(
            f"{path} is not for this device: {reason}; build it here: {build_command(path, info)}"
        )


def source_of(plan: Path) -> Path | None:
    """Return the ONNX file that a plan was built from; None where its manifest names none.

    After an interrupted rebuild, the manifest may describe another build.
    """
    try:
        info = read_manifest(plan).plan
    except ManifestError:
        return None
    return plan.with_name(info.source.name) if info and info.source else None


def _same_version(built: str, here: str) -> bool:
    # Jetson's packages say 10.3.0 where the plan's header says 10.3.0.30.
    ours, theirs = built.split("."), here.split(".")
    shorter = min(len(ours), len(theirs))
    return ours[:shorter] == theirs[:shorter]


def _fits(info: PlanInfo, device: GpuInfo) -> bool:
    if info.hardware_compatible == "ampere-plus":
        return int(device.compute_capability.split(".")[0]) >= 8
    if info.hardware_compatible == "same-capability":
        return info.compute_capability == device.compute_capability
    return (info.gpu, info.compute_capability) == (device.name, device.compute_capability)

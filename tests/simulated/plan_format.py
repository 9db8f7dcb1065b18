"""Simulated plans: the header of a real one, then a description as JSON, the ONNX file and a checksum."""

from __future__ import annotations

import hashlib
import struct

import msgspec

VERSIONS = {10: (10, 16, 1, 11), 11: (11, 4, 0, 106)}
"""The simulated TensorRT per major version."""
MAGIC = 0x74727466
HEADER = 28

Version = tuple[int, int, int, int]
Shape = tuple[int, ...]


class Plan(msgspec.Struct, kw_only=True):
    """What a simulated plan says of itself."""

    gpu: str
    compute_capability: tuple[int, int]
    compatible: str = "NONE"
    version_compatible: bool = False
    stripped: bool = False
    name: str = "Simulated network"
    profiles: list[tuple[int, int, int]] = []
    """Batch sizes (least, usual, most) of each profile, for a network of one input."""
    shapes: list[dict[str, tuple[Shape, Shape, Shape]]] = []
    """Or the whole shapes, by input."""
    slow: float = 0.0
    wrong: float = 0.0


def write_plan(plan: Plan, onnx: bytes, version: Version) -> bytes:
    text = msgspec.json.encode(plan)
    body = struct.pack("<I", len(text)) + text + onnx
    return struct.pack("<II16x", MAGIC, 0) + bytes(version) + body + hashlib.sha256(body).digest()


def read_version(data: bytes) -> Version | None:
    """Return the TensorRT of a plan; None where the bytes do not begin as a plan does."""
    if len(data) < HEADER or struct.unpack_from("<II", data) != (MAGIC, 0):
        return None
    major, minor, patch, build = data[24:28]
    return major, minor, patch, build


def read_plan(data: bytes, version: Version, *, compatible: bool = False) -> tuple[Plan, bytes]:
    """Raise ValueError, with what TensorRT would log, where it would refuse the bytes."""
    found = read_version(data)
    if found is None:
        raise ValueError("Error Code 1: Serialization (Serialization assertion stdArchiveReader magicTag failed)")
    body, digest = data[HEADER:-32], data[-32:]
    plan = _describe(body) if hashlib.sha256(body).digest() == digest else None
    if found != version and not (compatible and plan is not None and plan.version_compatible):
        raise ValueError(
            "Error Code 6: API Usage Error (The engine plan file is not compatible with this version of TensorRT,"
            f" expecting library version {'.'.join(map(str, found))} got {'.'.join(map(str, version))})"
        )
    if plan is None:
        raise ValueError("Error Code 1: Serialization (Serialization assertion failed: the engine data is corrupt)")
    (size,) = struct.unpack_from("<I", body)
    return plan, body[4 + size :]


def _describe(body: bytes) -> Plan:
    (size,) = struct.unpack_from("<I", body)
    return msgspec.json.decode(body[4 : 4 + size], type=Plan)

"""The enumerations of the two simulated majors, with the numbers of the real bindings (read off 10.16.1 and 11.4.0).

The numbers differ between the majors, so that code which carries a number over is found.
"""

from __future__ import annotations

from typing import Any

from tests.simulated.tensorrt_core import bound_enum

_BUILDER_FLAGS = {
    10: {"FP16": 0, "INT8": 1, "DEBUG": 2, "GPU_FALLBACK": 3, "REFIT": 4, "DISABLE_TIMING_CACHE": 5, "TF32": 6}
    | {"SPARSE_WEIGHTS": 7, "SAFETY_SCOPE": 8, "OBEY_PRECISION_CONSTRAINTS": 9, "PREFER_PRECISION_CONSTRAINTS": 10}
    | {"DIRECT_IO": 11, "REJECT_EMPTY_ALGORITHMS": 12, "VERSION_COMPATIBLE": 13, "EXCLUDE_LEAN_RUNTIME": 14, "FP8": 15}
    | {"ERROR_ON_TIMING_CACHE_MISS": 16, "BF16": 17, "DISABLE_COMPILATION_CACHE": 18, "WEIGHTLESS": 19}
    | {"STRIP_PLAN": 19, "REFIT_IDENTICAL": 20, "WEIGHT_STREAMING": 21, "INT4": 22, "REFIT_INDIVIDUAL": 23}
    | {"STRICT_NANS": 24, "MONITOR_MEMORY": 25, "FP4": 26, "EDITABLE_TIMING_CACHE": 27}
    | {"DISTRIBUTIVE_INDEPENDENCE": 28},
    11: {"DEBUG": 2, "GPU_FALLBACK": 3, "REFIT": 4, "DISABLE_TIMING_CACHE": 5, "TF32": 6, "SPARSE_WEIGHTS": 7}
    | {"SAFETY_SCOPE": 8, "DIRECT_IO": 11, "VERSION_COMPATIBLE": 12, "EXCLUDE_LEAN_RUNTIME": 13}
    | {"ERROR_ON_TIMING_CACHE_MISS": 15, "DISABLE_COMPILATION_CACHE": 17, "STRIP_PLAN": 18, "REFIT_IDENTICAL": 19}
    | {"WEIGHT_STREAMING": 20, "REFIT_INDIVIDUAL": 22, "STRICT_NANS": 23, "MONITOR_MEMORY": 24}
    | {"EDITABLE_TIMING_CACHE": 26, "DISTRIBUTIVE_INDEPENDENCE": 27},
}
_CREATION_FLAGS = {
    10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1, "PREFER_JIT_PYTHON_PLUGINS": 2, "PREFER_AOT_PYTHON_PLUGINS": 3},
    11: {"STRONGLY_TYPED": 0, "PREFER_JIT_PYTHON_PLUGINS": 1, "PREFER_AOT_PYTHON_PLUGINS": 2},
}
_POOLS = ["WORKSPACE", "DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM", "TACTIC_DRAM", "TACTIC_SHARED_MEMORY"]
_PARSER_ERRORS = ["SUCCESS", "INTERNAL_ERROR", "MEM_ALLOC_FAILED", "MODEL_DESERIALIZE_FAILED", "INVALID_VALUE"]
_PARSER_ERRORS += ["INVALID_GRAPH", "INVALID_NODE", "UNSUPPORTED_GRAPH", "UNSUPPORTED_NODE", "UNSUPPORTED_NODE_ATTR"]
_PARSER_ERRORS += ["UNSUPPORTED_NODE_INPUT", "UNSUPPORTED_NODE_DATATYPE", "UNSUPPORTED_NODE_DYNAMIC"]
_PARSER_ERRORS += ["UNSUPPORTED_NODE_SHAPE", "REFIT_FAILED"]


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


MemoryPoolType = bound_enum("MemoryPoolType", _numbered(_POOLS))
ErrorCode = bound_enum("ErrorCode", _numbered(_PARSER_ERRORS))
HardwareCompatibilityLevel = bound_enum(
    "HardwareCompatibilityLevel", _numbered(["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"])
)
ProfilingVerbosity = bound_enum("ProfilingVerbosity", _numbered(["LAYER_NAMES_ONLY", "NONE", "DETAILED"]))
ExecutionContextAllocationStrategy = bound_enum(
    "ExecutionContextAllocationStrategy", _numbered(["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
)


def enums_of(major: int) -> dict[str, Any]:
    """Return the enumerations that a major version has."""
    common = (
        MemoryPoolType,
        ErrorCode,
        HardwareCompatibilityLevel,
        ProfilingVerbosity,
        ExecutionContextAllocationStrategy,
    )
    return {kind.__name__: kind for kind in common} | {
        "BuilderFlag": bound_enum("BuilderFlag", _BUILDER_FLAGS[major]),
        "NetworkDefinitionCreationFlag": bound_enum("NetworkDefinitionCreationFlag", _CREATION_FLAGS[major]),
    }

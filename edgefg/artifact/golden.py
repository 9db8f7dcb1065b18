"""The golden set: frames and expected results, with which a device proves that it reproduces the artifact.

One ``.npz`` file of at most 2 MB, without pickle: raw frames, their network inputs, the FP32 parent's logits and the
artifact's own logits. The tolerances are in the manifest.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.artifact.manifest import Manifest
from edgefg.errors import InferenceError, ManifestError, ParityError, one_line
from edgefg.preprocess import Color, InputSpec, UInt8Array, prepare
from edgefg.runtime import runtime_for

MAX_BYTES = 2_000_000
# Raised by NumPy and zipfile for files that are truncated, altered or of another kind.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    NotImplementedError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
FloatArray = npt.NDArray[np.float32]


class GoldenSet(msgspec.Struct, frozen=True, eq=False):
    """Frames with the result of each step."""

    frames: tuple[UInt8Array, ...]
    """Each ``uint8 [H, W, 3]`` BGR, any size."""
    inputs: UInt8Array
    """``uint8 [K, height, width, 3]`` RGB."""
    parent_logits: FloatArray
    """``float32 [K, classes]`` of the FP32 parent."""
    logits: FloatArray
    """``float32 [K, classes]`` of the artifact itself."""


class GoldenPrediction(Protocol):
    """The part of `edgefg.Prediction` that is compared."""

    @property
    def index(self) -> int:
        """The class."""

    @property
    def logits(self) -> FloatArray:
        """``float32 [classes]``."""


class GoldenClassifier(Protocol):
    """The part of `edgefg.Classifier` that is used."""

    @property
    def path(self) -> Path:
        """The model file."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""

    def predict_batch(self, frames: Sequence[UInt8Array], *, color: Color = "bgr") -> Sequence[GoldenPrediction]:
        """Classify frames, each ``uint8 [H, W, 3]``."""


class GoldenReport(msgspec.Struct, frozen=True):
    """Greatest deviations over the golden set; all within the manifest's tolerances."""

    frames: int
    input_levels: int
    logits: float
    parent_logits: float


def choose_frames(frames: Sequence[UInt8Array], spec: InputSpec, classes: int) -> tuple[UInt8Array, ...]:
    """Take frames, in order, as long as the golden set's uncompressed size stays below `MAX_BYTES`."""
    chosen: list[UInt8Array] = []
    left = MAX_BYTES - 20_000
    for frame in frames:
        left -= frame.nbytes + spec.height * spec.width * 3 + 8 * classes + 1_000
        if left < 0:
            break
        chosen.append(frame)
    return tuple(chosen)


def write(golden: GoldenSet, path: Path) -> None:
    """Write a golden set as a compressed ``.npz``."""
    arrays: dict[str, Any] = {f"frame_{i:03d}": frame for i, frame in enumerate(golden.frames)}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, inputs=golden.inputs, parent_logits=golden.parent_logits, logits=golden.logits, **arrays
    )
    path.write_bytes(buffer.getvalue())


def read(path: Path) -> GoldenSet:
    """Read a golden set. Raises `ManifestError` if the file is not one."""
    try:
        # From memory: given a path, NumPy leaves a broken file open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            names = sorted(name for name in file.files if name.startswith("frame_"))
            frames = tuple(file[name] for name in names)
            golden = GoldenSet(frames, file["inputs"], file["parent_logits"], file["logits"])
    except _UNREADABLE as exc:
        raise ManifestError(f"{path} is not a golden set ({one_line(exc)}); export the artifact again") from exc
    count, logits = len(golden.frames), golden.logits
    fits = golden.inputs.ndim == 4 and golden.inputs.dtype == np.uint8 and logits.ndim == 2
    if not fits or logits.shape != golden.parent_logits.shape or not 0 < count == len(golden.inputs) == len(logits):
        raise ManifestError(f"{path} is inconsistent: its arrays do not belong together; export the artifact again")
    return golden


def check(classifier: GoldenClassifier) -> GoldenReport:
    """Run the golden set on this device and compare every step with the recorded result.

    Raises:
        ManifestError: the artifact has no golden set.
        ParityError: a step deviates by more than its tolerance; the message names the step.
    """
    info = classifier.manifest.golden
    if info is None:
        raise ManifestError(f"{classifier.path.name} has no golden set; export it again to get one")
    golden = read(classifier.path.parent / info.file)
    spec = classifier.manifest.input
    if golden.inputs.shape[1:] != (spec.height, spec.width, 3):
        raise ManifestError(
            f"the golden set has network inputs {list(golden.inputs.shape[1:])}, the manifest says"
            f" {[spec.height, spec.width, 3]}: they do not belong together; export the artifact again"
        )
    inputs = np.stack([prepare(frame, spec) for frame in golden.frames])
    levels = int(np.abs(inputs.astype(np.int16) - golden.inputs).max())
    _within("preprocess", levels, info.input_levels, "levels of the network input")
    # The recorded inputs, not this device's, go to the engine, so that each step is judged by itself.
    try:
        predictions = classifier.predict_batch(list(golden.inputs), color="rgb")
    except InferenceError as exc:
        raise ParityError(f"engine: {exc}") from exc
    logits = np.stack([prediction.logits for prediction in predictions])
    known = runtime_for(classifier.path).int8_remedy if classifier.manifest.precision == "int8" else ""
    remedy = f", or {known}" if known else ""
    own = _deviation(logits, golden.logits)
    _within("engine", own, info.logits, "against the artifact's own logits", remedy)
    parent = _deviation(logits, golden.parent_logits)
    _within("engine", parent, info.parent_logits, "against the FP32 parent's logits", remedy)
    best = golden.logits.argmax(axis=1)
    for prediction, expected, row in zip(predictions, best.tolist(), golden.logits, strict=True):
        if prediction.index != expected and row[expected] - row[prediction.index] > 2 * info.logits:
            raise ParityError(
                f"decision: class {prediction.index} instead of {expected} though the logits agree; reinstall edgefg"
            )
    return GoldenReport(len(golden.frames), levels, own, parent)


def _deviation(found: FloatArray, expected: FloatArray) -> float:
    if found.shape != expected.shape:
        raise ManifestError(f"the golden set has logits {expected.shape}, the engine returned {found.shape}")
    return float(np.abs(found - expected).max())


def _within(step: str, deviation: float, tolerance: float, what: str, remedy: str = "") -> None:
    if not deviation <= tolerance:  # a NaN fails
        raise ParityError(
            f"{step}: deviates by {deviation:.4g} {what}, allowed are {tolerance:.4g};"
            f" this device does not reproduce the artifact: export or build it on this device{remedy}"
        )

"""Every exception that edgefg raises on purpose.

One tree, so that a caller catches as wide or as narrow as it wants:

    EdgefgError
    ├── DataError                 a data set or an image file cannot be used
    ├── FrameError                an array given to ``predict`` is not a frame
    ├── TrainingError             a training run cannot go on
    │   └── HardwareError         its devices or precision are not available
    ├── CheckpointError           a ``.safetensors`` checkpoint cannot be used
    ├── WeightsError              starting weights are not available
    ├── ManifestError             the JSON beside a model is missing, broken or of a later schema
    ├── IntegrityError            a file differs from what its manifest recorded
    ├── DeviceMismatchError       an engine was built for another device
    ├── RuntimeUnavailableError   the inference engine is not installed or failed to load the model
    ├── InferenceError            the inference engine failed, or its logits are not finite
    ├── ExportError               a stage from checkpoint to artifact failed
    │   └── BuildError            an engine builder failed
    └── ParityError               an artifact does not reproduce its parent
        └── GateError             it is worse than its parent by more than was allowed

A message states what is wrong and what to do. A vendor's exception is chained
(``raise … from exc``).
"""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Return a vendor's message, however many lines it has, as one line."""
    return " ".join(str(error).split())


class EdgefgError(Exception):
    """Root of all errors that edgefg raises on purpose."""


class DataError(EdgefgError):
    """A data set, a folder of images or an image file is missing, corrupt or inconsistent."""


class FrameError(EdgefgError, ValueError):
    """An array given to ``predict`` is not a frame of the stated colour order."""


class TrainingError(EdgefgError):
    """A training run cannot go on: its loss is not finite, or its folder holds another run."""


class HardwareError(TrainingError):
    """The requested devices or precision are not available."""


class CheckpointError(EdgefgError):
    """A ``.safetensors`` checkpoint is missing, truncated, of a later schema or of other settings."""


class WeightsError(EdgefgError):
    """The requested starting weights are not available or do not fit the network."""


class ManifestError(EdgefgError):
    """A manifest is missing, truncated, inconsistent or of a later schema."""


class IntegrityError(EdgefgError):
    """A file's size or SHA-256 differs from what the manifest recorded."""


class DeviceMismatchError(EdgefgError):
    """An engine was built for another device or another version of its engine."""


class RuntimeUnavailableError(EdgefgError):
    """An inference engine is not installed, or it refused the model."""


class InferenceError(EdgefgError):
    """An inference engine failed on a frame, or returned logits that are not finite."""


class ExportError(EdgefgError):
    """A stage between checkpoint and artifact failed; nothing half-written is left under the final name."""


class BuildError(ExportError):
    """An engine builder failed."""


class ParityError(EdgefgError):
    """An artifact does not reproduce what its manifest or its parent says; the message names the step."""


class GateError(ParityError):
    """An artifact is worse than its parent by more than was allowed; the message names the classes."""

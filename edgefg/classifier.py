"""The classifier: opens a model file and classifies frames (manifest → preprocess → runtime → decide)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from edgefg.artifact import golden
from edgefg.artifact.manifest import Manifest, bare_manifest, check_artifact, read_manifest
from edgefg.artifact.signature import verify_signature
from edgefg.decision import Prediction, decide
from edgefg.errors import ManifestError
from edgefg.preprocess import Color, InputSpec, UInt8Array, check_frame, prepare
from edgefg.runtime import load, runtime_for

# Frames per inference of an engine that accepts any batch.
_CHUNK = 16


class Classifier:
    """A fine-grained classifier, loaded from an artifact.

    Args:
        path: the model file; its manifest lies beside it (same stem, ``.json``).
        threads: CPU threads of the engine; None: the engine decides.
        device: the engine's device, for instance ``GPU`` with OpenVINO; None is its default.
        top_k: number of classes in each prediction.
        verify: run the golden set before returning, to prove that this device reproduces the artifact.
        trusted_key: PEM file of an Ed25519 public key; the artifact must carry a signature by it (`edgefg sign`).
        labels: class names in the order of the logits, only for a model file without manifest, for instance a plan by
            trtexec. Nothing about such a file can be checked, so there is a warning.
        input: input of the network, also only without manifest; a number is the side of a square.

    One classifier may be shared by threads. It is a context manager; `close` is idempotent.

    Raises:
        ManifestError: the manifest is missing, truncated or of a later schema.
        IntegrityError: a file differs from the manifest, or the signature is not valid. Both are checked before the
            engine reads the file.
        DeviceMismatchError: a TensorRT plan was built for another device or TensorRT. The message names the command
            that rebuilds it; `edgefg.export.tensorrt.rebuild` does the same in Python.
        RuntimeUnavailableError: the engine is not installed or refused the model.
        ParityError: ``verify`` found a deviation.

    Example:
        >>> with Classifier("model.xml") as classifier:  # doctest: +SKIP
        ...     print(classifier.predict(cv2.imread("photo.jpg")).label)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        top_k: int = 5,
        verify: bool = False,
        trusted_key: str | Path | None = None,
        labels: Sequence[str] | None = None,
        input: InputSpec | int | None = None,
    ) -> None:
        if top_k < 1 or (threads is not None and threads < 1):
            raise ValueError(f"top_k and threads are at least 1; got top_k={top_k}, threads={threads}")
        self.path = Path(path)
        runtime_for(self.path)  # before the manifest is read: a file that nothing opens has none
        if trusted_key is not None:
            verify_signature(self.path, Path(trusted_key))
        self._top_k = top_k
        self._closed = False
        self.manifest: Manifest = _manifest_of(self.path, labels, input)
        self._runtime = load(self.path, threads=threads, device=device)
        try:
            self._batch = self._check_input()
            if verify:
                golden.check(self)
        except BaseException:
            self.close()
            raise

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return self.manifest.labels

    @property
    def runtime_version(self) -> str:
        """Name and version of the engine in use."""
        return self._runtime.version

    def predict(self, frame: UInt8Array, *, color: Color = "bgr") -> Prediction:
        """Classify one frame.

        Args:
            frame: ``uint8 [H, W, 3]`` (``[H, W]`` for ``gray``, ``[H, W, 4]`` for ``bgra``/``rgba``), any size.
            color: the frame's channel order; OpenCV's BGR by default.

        Raises:
            FrameError: ``frame`` is not such an array.
            InferenceError: the engine failed, or returned logits that are not finite.
        """
        start = time.perf_counter()
        inputs = prepare(frame, self.manifest.input, color=color)[np.newaxis]
        return self._run(inputs, 1, start)[0]

    def predict_batch(self, frames: Sequence[UInt8Array], *, color: Color = "bgr") -> list[Prediction]:
        """Classify any number of frames, in order; an engine with a static batch of N takes them in chunks of N.

        Frames may differ in size. The timings of a prediction are those of its chunk, divided by the chunk's length.
        Every frame is checked before the first one runs.
        """
        frames = list(frames)
        for frame in frames:
            check_frame(frame, color)
        return list(self._predict_chunks(frames, color))

    def _predict_chunks(self, frames: list[UInt8Array], color: Color) -> Iterator[Prediction]:
        size = self._batch or _CHUNK
        for first in range(0, len(frames), size):
            start = time.perf_counter()
            inputs = np.stack([prepare(f, self.manifest.input, color=color) for f in frames[first : first + size]])
            yield from self._run(inputs, len(inputs), start)

    def _run(self, inputs: UInt8Array, count: int, start: float) -> list[Prediction]:
        """Infer one chunk of prepared inputs, filled up to a static batch, and decide each of its ``count`` frames."""
        if self._closed:
            raise RuntimeError("this Classifier is closed; open a new one")
        if self._batch is not None and count < self._batch:
            inputs = np.concatenate([inputs, np.repeat(inputs[-1:], self._batch - count, axis=0)])
        prepared = time.perf_counter()
        try:
            logits = self._runtime.infer(inputs)
        except Exception as exc:
            if self._closed:
                raise RuntimeError("this Classifier was closed during the call") from exc
            raise
        inferred = time.perf_counter()
        preprocess_ms = (prepared - start) * 1e3 / count
        infer_ms = (inferred - prepared) * 1e3 / count
        if logits.shape != (len(inputs), len(self.labels)):
            raise ManifestError(
                f"{self.path.name} returned logits {list(logits.shape)} for {len(inputs)} frames, but its manifest has"
                f" {len(self.labels)} labels: they do not belong together; export the artifact again"
            )
        return [decide(row, self.manifest, self._top_k, (preprocess_ms, infer_ms)) for row in logits[:count]]

    def _check_input(self) -> int | None:
        """Compare the engine's input with the manifest's; return the static batch, None if any batch is accepted."""
        spec, (shape, dtype) = self.manifest.input, self._runtime.input
        if dtype != "uint8" or len(shape) != 4 or shape[1:] != (spec.height, spec.width, 3):
            raise ManifestError(
                f"{self.path.name} takes {dtype} {list(shape)}, but its manifest has uint8"
                f" [N, {spec.height}, {spec.width}, 3]: they do not belong together; export the artifact again"
            )
        return shape[0]

    def close(self) -> None:
        """Free the engine; further predictions raise RuntimeError. Idempotent."""
        if not self._closed:
            self._closed = True
            self._runtime.close()

    def __enter__(self) -> Classifier:
        """Return the classifier itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the classifier."""
        self.close()


def _manifest_of(path: Path, labels: Sequence[str] | None, input: InputSpec | int | None) -> Manifest:
    """Read the manifest and check the files; with labels and input, make a manifest of them, with a warning."""
    if labels is None and input is None:
        manifest = read_manifest(path)
        check_artifact(manifest, path)
        return manifest
    if labels is None or input is None:
        raise ManifestError(f"{path.name} was opened with only one of labels and input; give both, or its manifest")
    spec = input if isinstance(input, InputSpec) else InputSpec(height=input, width=input)
    manifest = bare_manifest(path, labels, spec)
    warnings.warn(
        f"{path} has no manifest: neither its bytes nor its labels nor its preprocessing can be checked; `edgefg"
        " export` and `edgefg build` write one",
        stacklevel=3,
    )
    return manifest
